"""The server program: ``python -m secure_fedprompt.server --config server.toml``."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from secure_fedprompt.host import command, files
from secure_fedprompt.host.log import Log
from secure_fedprompt.host.recorded import RecordedHub
from secure_fedprompt.host.recorder import recorder
from secure_fedprompt.host.tracking import tracked
from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import ConfigError, PlanError
from secure_fedprompt.protocol.transport import Hub
from secure_fedprompt.server.door import bound_handles
from secure_fedprompt.server.exporter import Exporter
from secure_fedprompt.server.hub import CurveHub
from secure_fedprompt.server.reload import Reload
from secure_fedprompt.server.run import Run
from secure_fedprompt.server.serve import CountedHub, hear, post
from secure_fedprompt.server.settings import ServerSettings, check_settings, noise_of, quorum_of
from secure_fedprompt.server.store import BEST, TROUBLE, Store, started

EXAMPLES = """\
  python -m secure_fedprompt.server --config server.toml
  python -m secure_fedprompt.server --key server.pem --roster roster.toml \\
      --bind tcp://0.0.0.0:5570 --rounds 10 --n-ctx 16 --lr 0.01
  # stopped or killed? the same run_dir goes on where it was
  python -m secure_fedprompt.server --config server.toml --run-dir runs/monday"""

GOODBYE_SECONDS = 10.0
NOTED = ("method", "protection", "rounds", "lr", "epochs", "batch_size", "weights", "metrics",
         "dp_noise")  # fmt: skip
FACTS = ("learning_round", "round", "outcome", "metrics", "dropped", "seconds", "bytes")


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(
        "python -m secure_fedprompt.server",
        "Aggregate the clients' prompts without seeing any single one. Holds no model and no data.",
        EXAMPLES,
    )
    command.add_flags(parser, ServerSettings)
    args = parser.parse_args(argv)

    def read() -> ServerSettings:
        return started(command.load(ServerSettings, args))

    return command.guard(lambda: serve(read(), args.json, read), args)


def serve(
    settings: ServerSettings,
    json_path: str | None,
    read: Callable[[], ServerSettings] | None = None,
) -> int:
    """Run to the end.

    Args:
        read: reads the settings again, for a roster that changes on the way.

    Raises:
        SecureFedPromptError: the run cannot begin, or failed.
    """
    folder = settings.run_dir.replace("{time}", time.strftime("%Y%m%d-%H%M%S"))
    with Log("server", settings.log, settings.log_level) as log:
        asked = Reload(settings, read or (lambda: settings), log)
        while not _serve(msgspec.structs.replace(asked.settings, run_dir=folder), json_path, asked):
            log.info("roster", "going on with the changed roster")
    return 0


def _serve(settings: ServerSettings, json_path: str | None, asked: Reload) -> bool:
    """Whether the run is over, or was stopped; else it goes on with another roster."""
    log = asked.log
    check_settings(settings)
    identity = files.read_identity(settings.key)
    roster = files.read_roster(settings.roster)
    me = files.member_of(identity, roster, ("server",))
    log.name = me.name
    folder = Path(settings.run_dir.replace("{time}", time.strftime("%Y%m%d-%H%M%S")))
    if settings.facts.encrypted:  # can we, before anybody waits
        clients = len(roster.with_role("client"))
        try:
            chosen = homomorphic.choose(settings.protection, clients, settings.flood_bits)
        except PlanError as error:
            raise ConfigError(f"protection = {settings.protection!r}: {error}") from None
        homomorphic.scheme(settings.protection, chosen)
    with contextlib.ExitStack() as stack:
        store = Store(folder, settings)
        stack.callback(store.close)
        if store.finished:
            raise ConfigError(f"run folder {folder} holds a finished run: choose another run_dir")
        store.on_event.append(lambda kind, value: tell(log, kind, value, settings, folder))
        _shown(stack, store, settings, log)
        state = store.load()
        run = Run(settings, roster, store, os.urandom, state, time.monotonic(), identity)
        warn(log, settings, run.expected)

        def denied(key: str, more: int) -> None:
            since = f"; {more} more since the last such line" if more else ""
            log.warning(
                "denied", f"refused a connection as {key}: no such key on this roster "
                f"('secure-fedprompt roster list' shows those that are){since}", key=key,
            )  # fmt: skip

        def count(peer: str, direction: str, kind: str, size: int) -> None:
            store.count(state.round, peer, direction, kind, size)

        frames = recorder(folder, settings.audit, settings.audit_mb, identity, me, roster)
        if frames is not None:
            stack.callback(frames.close)
        bound_handles(len(roster.members))
        socket = CurveHub(
            settings.bind, identity, roster, denied, frames.sent if frames else lambda *_: None
        )
        stack.callback(socket.close)
        counted = CountedHub(socket, count)
        hub: Hub = RecordedHub(counted, frames) if frames else counted
        where = "resuming" if state.run else "waiting for"
        log.info(
            "started", f"{me.name} on {socket.address}, {where} {run.expected} clients; run folder "
            f"{folder}", address=socket.address, run_dir=str(folder),
        )  # fmt: skip
        loop(hub, run, asked)
        if run.error:
            raise run.error
        if run.pausing and run.stopped:
            return False
        if run.stopped:
            log.info("stopped", f"start again with run_dir = {str(folder)!r} to go on")
            return True
        summary = store.summary()
        store.event("finished", f"prompt {summary['prompt']}")
        command.write_json(json_path, "run", summary)
    return True


def _shown(stack: contextlib.ExitStack, store: Store, settings: ServerSettings, log: Log) -> None:
    """Where sums are shown beside the log, if anywhere.

    Raises:
        ConfigError: that is no place.
    """
    if settings.metrics_bind:
        exporter = Exporter(settings.metrics_bind, settings.rounds)
        stack.callback(exporter.close)
        store.on_event.append(exporter.on_event)
        log.info("metrics", f"for Prometheus on http://{exporter.address}/metrics")
    noted = {name: getattr(settings, name) for name in NOTED}
    stack.enter_context(tracked(log, settings.track, noted))


def loop(hub: Hub, run: Run, asked: Reload) -> None:
    """Move frames between the hub and the state machine until the run is over."""
    log = asked.log
    while not run.over:
        asked.look(run)
        out = hear(hub, run, 0.05, time.monotonic) + run.tick(time.monotonic())
        log.doing(run.doing)
        post(hub, run, out, time.monotonic)
    # Closing a socket under a peer that is busy could cost it the last frame: wait for goodbyes.
    if run.pausing and run.stopped:
        return  # they are not told, and come back
    present, until = set(run.everybody()), time.monotonic() + GOODBYE_SECONDS
    while present and time.monotonic() < until:
        for name, frame in hub.poll(0.05):
            if isinstance(frame.heard(), m.Leave):
                present.discard(name)
            elif isinstance(frame.message, m.Hello):  # came back just now
                post(hub, run, run.farewell(name), time.monotonic)


def warn(log: Log, settings: ServerSettings, clients: int) -> None:
    """Say what protection the run gives."""
    if not settings.facts.hides:
        log.error("protection", "NO PROTECTION: the server sees every client's update.")
        return
    if settings.selection == "secure":
        who = settings.helper or "an elected client"
        log.info(
            "protection", f"secure selection, scope {settings.selection_scope}: this server and "
            f"the helper ({who}) must not collude",
        )  # fmt: skip
    counts = {"samples": "image count", "bucket": "image count to a power of two"}
    shown = [counts[settings.weights]] if settings.weights in counts else []
    shown += ["test counts"] if settings.metrics == "rounds" else []
    if shown:
        log.warning(
            "protection", f"weights = {settings.weights!r}, metrics = {settings.metrics!r}: if "
            f"one client drops out between two rounds, their sums differ by its "
            f"{' and '.join(shown)}; 'uniform' and 'final' keep counts out of what can be compared",
        )  # fmt: skip
    if settings.dp_noise:
        noise = noise_of(settings, clients)
        log.info(
            "protection", f"client noise of {noise.multiplier:g} x dp_clip {noise.clip:g} in every "
            f"sum, if {noise.honest} clients add theirs; 'secure-fedprompt explain' prints epsilon",
        )  # fmt: skip
    t = quorum_of(settings, clients)
    text = settings.facts.standing(clients, t, settings.graph == "regular")
    log.info("protection", text)


def tell(log: Log, kind: str, value: Any, settings: ServerSettings, folder: Path) -> None:
    """One line per event."""
    if kind != "round":
        say = {**dict.fromkeys(TROUBLE, log.warning), "failed": log.error}.get(kind, log.info)
        say(kind, f"{kind} {value}")
        return
    metrics, seconds = value["metrics"], sum(value["seconds"].values())
    last = value["learning_round"] > settings.rounds
    best = folder / BEST if (folder / BEST).exists() and settings.metrics == "rounds" else None
    what = "final evaluation" if last else f"round {value['learning_round']}/{settings.rounds}"
    facts = {name: value[name] for name in FACTS}
    if value["outcome"] == "aborted":
        log.warning("round", f"{what} aborted: {value['reason']}", **facts)
        return
    accuracy = f"accuracy before {metrics['accuracy']:.1%}, " if "accuracy" in metrics else ""
    if "zero_shot" in metrics:
        accuracy += f"zero-shot {metrics['zero_shot']:.1%}, "
    dropped = ", ".join(f"{n} ({s})" for n, s in value["dropped"].items()) or "nobody"
    log.info(
        "round", f"{what}: {accuracy}{metrics['contributors']:.0f} clients in, {dropped} dropped, "
        f"{seconds:.1f} s", **facts,
    )  # fmt: skip
    if metrics.get("accuracy", 1.0) <= metrics.get("zero_shot", 0.0) and last:
        how = "worse" if metrics["accuracy"] < metrics["zero_shot"] else "no better"
        log.warning(
            "worse", f'the prompt is {how} than zero-shot ("a photo of a NAME.", nothing '
            'trained): train longer, with another lr, or from words (init = "a photo of a", '
            "n_ctx = 4)" + (f"; the best prompt is {best}" if best else ""),
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
