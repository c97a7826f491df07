"""``secure-fedprompt simulate``: many clients in one process, the same state machines.

Server and clients are the machines of the real programs, frames are encoded and decoded as on the
wire; only sockets, processes and waiting are left out. Image features are computed once for all.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import Progress

from secure_fedprompt import show
from secure_fedprompt.clients.data.loading import Dealt, load_shares
from secure_fedprompt.clients.features import Features
from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.session import Session
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.engines import Engine, Inline, Processes, Ray, divided, trainer_of
from secure_fedprompt.host import command
from secure_fedprompt.host.recorded import RecordedHub
from secure_fedprompt.host.recorder import recorder
from secure_fedprompt.memory import Network
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.errors import (
    ConfigError,
    DataError,
    SecureFedPromptError,
    UpdateError,
)
from secure_fedprompt.protocol.keys import Identity, Member, remember_signatures
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.protections import PROTECTIONS
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.planning import RunState
from secure_fedprompt.server.run import Run
from secure_fedprompt.server.serve import CountedHub
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import Store, started

# Not a choice here: there are no keys, addresses or waiting.
ABSENT = {
    *("config", "key", "roster", "bind", "server", "state_dir", "part", "clients", "policy"),
    *("helper", "metrics_bind", "track", "compile"),  # every client would have a graph of its own
    *("patience", "gather_seconds", "stage_seconds", "training_seconds", "alive_seconds"),
}
_POLICY = Policy(
    graphs=("complete", "regular"),
    colluders=0,
    min_clip=0.0,
    min_weight=1,
    min_seen=1,
    selections=("secure", "secure-federation"),
    metrics=(),
    weights=(),
    client_helpers=True,
    max_lr=10.0,
    max_momentum=0.999,
    max_weight_decay=1.0,
    max_batch_size=1 << 16,
)


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(
        "secure-fedprompt simulate",
        "Run a federation in one process, with the same protocol state machines as the programs.",
        "  secure-fedprompt simulate --parts 50 --rounds 3 --partition dirichlet --shots 16\n"
        "  secure-fedprompt simulate --parts 20 --dropout 0.1 --dataset photos.zip --lr 0.01\n"
        "  secure-fedprompt simulate --parts 200 --engine processes --workers 8",
    )
    parser.add_argument(
        "--dropout", type=float, default=0.0, metavar="SHARE",
        help="share of the clients that vanish in each round, at a random message",
    )  # fmt: skip
    parser.add_argument(
        "--engine", choices=("inline", "processes", "ray"), default="inline",
        help="who trains: this process, others on this machine, or actors of a Ray cluster "
        "(pip install 'secure-fedprompt[ray]')",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=0, metavar="COUNT",
        help="processes or actors, each with a model of its own; 0 is one for each core",
    )  # fmt: skip
    parser.add_argument(
        "--ray-address", default="", metavar="ADDRESS",
        help="of a running Ray cluster, such as auto; empty starts one on this machine",
    )  # fmt: skip
    parser.add_argument(
        "--ray-gpus", type=float, default=0.0, metavar="SHARE", help="of a GPU for each actor"
    )
    command.add_flags(parser, ServerSettings, skip=frozenset(ABSENT))
    shared = set(ServerSettings.__struct_fields__)
    command.add_flags(parser, ClientSettings, skip=frozenset(ABSENT | shared))
    parser.set_defaults(parts=10)
    args = parser.parse_args(argv)
    return command.guard(lambda: _run(args), args)


def _run(args: argparse.Namespace) -> int:
    server, client = started(command.load(ServerSettings, args)), command.load(ClientSettings, args)
    if not 0 <= args.dropout < 1:
        raise ConfigError(f"dropout = {args.dropout}: must be at least 0 and below 1")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console, transient=True) as bar:
        task = bar.add_task("rounds", total=server.rounds + int(server.metrics != "off"))
        trainers = make_trainers(client, server.method_settings())
        store = Store(Path(args.run_dir or scratch), server)
        if store.finished:
            store.close()
            raise ConfigError(f"run_dir = {args.run_dir!r} holds a finished run: choose another")

        def tell(kind: str, value: Any) -> None:
            if kind == "round":
                bar.advance(task)
            if kind == "round" and not console.is_terminal:
                console.print(f"learning round {value['learning_round']} {value['outcome']}")

        store.on_event.append(tell)
        try:
            engine = engine_of(args, client, server.method_settings(), trainers)
            done = simulate_run(server, store, trainers, args.dropout, engine)
            summary = store.summary()
            store.event("finished", f"prompt {summary['prompt']}")
            show.add_history(summary, {str(number): row for number, row in done.history.items()})
            for row in summary["rounds"]:
                row["seconds"] = {}  # of a clock that jumps from deadline to deadline
        finally:
            store.close()
    show.show_run(console, summary)
    if norms := [norm for learner in done.learners.values() for norm in learner.norms]:
        low, middle, high = (float(q) for q in np.quantile(norms, (0.1, 0.5, 0.9)))
        summary["update_norm"] = {"low": low, "median": middle, "high": high}
        console.print(
            f"norm of an update: median {middle:.2g}, {low:.2g} to {high:.2g} for 8 in 10 of them; "
            "dp_clip near the median suits client noise ('secure-fedprompt explain --dp-noise')",
            soft_wrap=True,
        )
    command.write_json(args.json, "simulation", summary)
    return 0


def make_trainers(
    settings: ClientSettings, method: MethodSettings | None = None, dealt: Dealt | None = None
) -> dict[str, LocalTrainer]:
    """One trainer per client, over one model and one cache of what the method needs of images.

    Args:
        dealt: images and who holds which, in the place of what the settings say.

    Raises:
        DataError: a client has no training image.
    """
    import torch

    from secure_fedprompt.clients.backbone import Backbone
    from secure_fedprompt.clients.methods.base import build

    if settings.threads:
        torch.set_num_threads(settings.threads)
    train, test, shares = dealt or load_shares(settings)
    if without := [k for k, share in enumerate(shares) if not len(share.train)]:
        raise DataError(
            f"{len(without)} of {len(shares)} clients have no training image, client"
            f"{without[0]:03d} first: fewer clients (--parts), or more images of each class "
            "(--shots, --per-class)"
        )
    backbone = Backbone.load(
        settings.model, settings.pretrained, settings.device, settings.precision
    )
    quiet = lambda what, done, total: None  # noqa: E731
    needs = build(method or MethodSettings(), backbone, train.class_names).needs
    features = [Features(backbone, images, needs, quiet, "") for images in (train, test)]
    names = [f"client{k:03d}" for k in range(len(shares))]
    return {
        name: trainer_of(
            settings, backbone, (train, test), share,
            (features[0].subset(share.train), features[1].subset(share.test)), name,
            (k, len(shares)),
        )
        for k, (name, share) in enumerate(zip(names, shares, strict=True))
    }  # fmt: skip


def train(engine: Engine, sessions: dict[str, Session[LocalLearner]], network: Network) -> bool:
    """Have everybody trained who waits for it; whether anybody did."""
    jobs = [(name, s.work) for name, s in sessions.items() if s.work is not None]
    for (name, work), outcome in zip(jobs, engine.train(jobs) if jobs else [], strict=True):
        if isinstance(outcome, UpdateError):
            sent = sessions[name].failed(work, outcome)
        elif isinstance(outcome, SecureFedPromptError):
            raise outcome
        else:
            sent = sessions[name].trained(work, outcome)
        for message in sent:
            network.send(name, message)
    return bool(jobs)


def engine_of(
    args: argparse.Namespace,
    settings: ClientSettings,
    method: MethodSettings,
    trainers: dict[str, LocalTrainer],
) -> Callable[[dict[str, LocalLearner]], Engine]:
    """What the flags ask for.

    Raises:
        ConfigError: they contradict each other.
    """
    if args.workers < 0:
        raise ConfigError(f"--workers {args.workers}: at least 1, or 0 for one for each core")
    if args.engine == "inline":
        if args.workers or args.ray_address:
            raise ConfigError("--workers and --ray-address need --engine processes or ray")
        return Inline
    cores = os.cpu_count() or 1
    count = min(args.workers or cores, len(trainers))
    threads = settings.threads or max(1, cores // count)

    def made(learners: dict[str, LocalLearner]) -> Engine:
        needs = next(iter(learners.values())).method.needs
        shares = divided(settings, method, trainers, needs, count, threads)
        if args.engine == "ray":
            return Ray(shares, learners, args.ray_address, args.ray_gpus)
        return Processes(shares, learners)

    return made


def _vanishing(
    names: list[str], dropout: float, rng: np.random.Generator
) -> Callable[[str, str, Frame], Frame | None]:
    """Loses what a share of the clients send, in each round from a random message on."""
    left: dict[str, int] = {}

    def tap(sender: str, recipient: str, frame: Frame) -> Frame | None:
        nonlocal left
        plan = frame.message.plan if isinstance(frame.message, m.Plan) else None
        if plan is not None and recipient == plan.cohort[0]:
            gone = rng.choice(names, round(dropout * len(names)), replace=False)
            left = {str(name): int(rng.integers(0, 5)) for name in gone}
        if sender in left:
            left[sender] -= 1
        return None if left.get(sender, 0) < 0 else frame

    return tap


@dataclass(frozen=True)
class Simulated:
    """What a simulated run left.

    Attributes:
        state: the server's last.
        history: metrics by learning round that clients opened, if any.
        learners: clients with their methods as the last round left them.
        prompt: the last global one, as clients know it, flat.
    """

    state: RunState
    history: dict[int, dict[str, float]]
    learners: dict[str, LocalLearner]
    prompt: Prompt


def simulate_run(
    settings: ServerSettings,
    store: Store,
    trainers: dict[str, LocalTrainer],
    dropout: float = 0.0,
    engine: Callable[[dict[str, LocalLearner]], Engine] = Inline,
    on_frame: Callable[[str, str, m.Message], None] | None = None,
) -> Simulated:
    """Drive server and sessions to the end of the run. The audit log is the server's.

    Args:
        engine: made of the learners once they are known; trains them.
        on_frame: sees each message that arrives, with sender and recipient; the server is "".

    Raises:
        SecureFedPromptError: the run failed.
    """
    remember_signatures()  # every client checks those of all others
    identities = {name: Identity.generate() for name in ("server", *trainers)}
    policy = msgspec.structs.replace(_POLICY, protections=tuple(PROTECTIONS))
    roster = Roster.of(tuple(
        Member.of(key, name, "client" if name in trainers else "server")
        for name, key in identities.items()
    ))  # fmt: skip
    sessions = {
        name: Session(
            Party(name, identities[name], roster, policy, MemoryJournal(), os.urandom),
            trainer,
            exempt=True,
        )
        for name, trainer in trainers.items()
    }
    server = msgspec.structs.replace(
        settings, clients=len(trainers), alive_seconds=1e12, patience=settings.gather_seconds
    )
    run = Run(server, roster, store, os.urandom, RunState(), 0.0, identities["server"])
    member, mode, limit = roster.by_name["server"], settings.audit, settings.audit_mb
    log = recorder(store.folder, mode, limit, identities["server"], member, roster)
    engines = list[Engine]()  # one, once there is something to train

    def wait(clock: float) -> float:
        """Train, while the clock stands still; else on to the next deadline."""
        if not engines and any(s.work is not None for s in sessions.values()):
            engines.append(engine({name: s.learner for name, s in sessions.items()}))
        if engines and train(engines[0], sessions, network):
            return clock
        return max(clock + 1.0, run.current.deadline if run.current else run.gather_until)

    lossy = _vanishing(list(sessions), dropout, np.random.default_rng(settings.seed))

    def tap(sender: str, recipient: str, frame: Frame) -> Frame | None:
        kept = lossy(sender, recipient, frame)
        if kept is not None and on_frame is not None:
            on_frame(sender, recipient, kept.opened())
        return kept

    network = Network(tap, wait)
    count = lambda *frame: store.count(run.state.round, *frame)  # noqa: E731
    counted = CountedHub(network.hub, count)
    network.hub = RecordedHub(counted, log) if log else counted
    for name, session in sessions.items():
        network.join(name, session.on)
        network.send(name, session.hello())
    try:
        network.run(run)
    finally:
        for made in engines:
            made.close()
        if log is not None:
            log.close()
    if run.error:
        raise run.error
    history: dict[int, dict[str, float]] = {}
    for session in sessions.values():
        history |= session.history
    learners = {name: session.learner for name, session in sessions.items()}
    final = next(session.final for session in sessions.values() if session.final is not None)
    return Simulated(run.state, history, learners, final)
