"""The client program: ``python -m secure_fedprompt.client --config client.toml``."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from secure_fedprompt.audit import private
from secure_fedprompt.clients.accounting import epsilon
from secure_fedprompt.clients.journal import FileJournal
from secure_fedprompt.clients.ledger import NAME, Ledger
from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.clients.session import Session, Work
from secure_fedprompt.clients.state import Party
from secure_fedprompt.identity import whoami
from secure_fedprompt.pace import UPLOADS, Pace
from secure_fedprompt.protocol import client_noise, command
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import DataError, SecureFedPromptError, UpdateError
from secure_fedprompt.protocol.recorder import recorder

if TYPE_CHECKING:
    from secure_fedprompt.client_settings import ClientSettings
    from secure_fedprompt.clients.data.sets import ImageSet
    from secure_fedprompt.clients.training import LocalTrainer, Result, Values
    from secure_fedprompt.protocol.terms import RunTerms

EXAMPLES = """\
  python -m secure_fedprompt.client --config client.toml
  python -m secure_fedprompt.client --key alice.pem --roster roster.toml \\
      --server tcp://192.0.2.10:5570 --dataset photos/ --class-list classes.txt \\
      --model ViT-B-16 --pretrained openai --policy-min-cohort 5
  # test keys, roster, data, model and the server without joining a run
  secure-fedprompt check --config client.toml"""
ALIVE_SECONDS = 2.0
GREETING = 5.0  # seconds that an answer to Hello may take before a Rejoin is believed
T = TypeVar("T")


def main(argv: list[str] | None = None) -> int:
    from secure_fedprompt.client_settings import ClientSettings

    parser = command.parser(
        "python -m secure_fedprompt.client",
        "Train prompts on private images and send them only under secure aggregation.",
        EXAMPLES,
    )
    command.add_flags(parser, ClientSettings)
    args = parser.parse_args(argv)
    body = lambda: take_part(command.load(ClientSettings, args), args.json)  # noqa: E731
    return command.guard(body, args)


def load_trainer(settings: ClientSettings, console: Console, progress: Progress) -> LocalTrainer:
    """Data and model, before anything is sent.

    Raises:
        DataError, ModelError
    """
    import torch

    from secure_fedprompt.clients.backbone import Backbone
    from secure_fedprompt.clients.training import LocalTrainer, load_part

    if settings.threads:
        torch.set_num_threads(settings.threads)
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done, total=total)

    train, test = readable(load_part(settings), console, settings.skip_unreadable, report)
    if not len(train):
        raise DataError(f"data set {settings.dataset} has no training image that can be read")
    backbone = Backbone.load(
        settings.model, settings.pretrained, settings.device, settings.precision
    )
    console.print(
        f"{len(train)} training and {len(test)} test images, {len(train.class_names)} classes; "
        f"model {settings.model} on {backbone.device}"
    )
    if train.note:
        console.print(f"data set {settings.dataset}: {train.note}")
    seed = None if settings.seed < 0 else settings.seed
    return LocalTrainer(backbone, train, test, seed, settings.augment, report, dp=settings.dp)


def readable(
    sets: Sequence[ImageSet],
    console: Console,
    skip: bool,
    progress: Callable[[str, int, int], None],
) -> list[ImageSet]:
    """The images that can be read, after the names of all that cannot.

    Raises:
        DataError: there are some, and they are not to be skipped.
    """
    found = [images.unreadable(progress) for images in sets]
    texts = [text for bad in found for text in bad.values()]
    for text in texts:
        console.print(f"[yellow]unreadable[/] {escape(text)}", soft_wrap=True)
    if texts and not skip:
        raise DataError(
            f"{len(texts)} of {sum(map(len, sets))} images cannot be read, the first: {texts[0]}; "
            "all are named above, and --skip-unreadable leaves them out"
        )
    kept = ([i for i in range(len(images)) if i not in bad]
            for images, bad in zip(sets, found, strict=True))  # fmt: skip
    return [s.subset(np.array(rows, np.int64)) for s, rows in zip(sets, kept, strict=True)]


def take_part(settings: ClientSettings, json_path: str | None) -> int:
    """Join the server's run and stay to its end.

    Raises:
        SecureFedPromptError: refused, disconnected, or the run failed.
    """
    console = Console(highlight=False)
    identity, roster, me, server = whoami(settings.key, settings.roster, "client")
    state_dir = Path(settings.state_dir.replace("{name}", me.name))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with contextlib.ExitStack() as stack:
        journal = FileJournal(state_dir / "journal.jsonl")
        stack.callback(journal.close)
        ledger = Ledger(state_dir / NAME)
        stack.callback(ledger.close)
        ledger.check_bounded(settings.dp)
        log = recorder(state_dir, settings.audit, settings.audit_mb, identity, me, roster)
        if log is not None:
            stack.callback(log.close)
        link = CurveLink(
            settings.server, server.curve, identity, settings.patience, log,
            lambda text: console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True),
        )  # fmt: skip
        stack.callback(link.close)
        with Progress(*columns, console=console, transient=True) as progress:
            names = sorted(member.name for member in roster.with_role("client"))
            trainer = load_trainer(settings, console, progress)  # what is wrong here shows at once
            link.connect()
            console.print(f"[bold]{me.name}[/] connected to {settings.server}")
            trainer.seat = names.index(me.name), len(names)
            trainer.keep, trainer.hold_seconds = state_dir, settings.hold_seconds
            trainer.ledger = ledger
            party = Party(
                me.name, identity, roster, settings.policy, journal, os.urandom, ledger=ledger
            )
            session = Session(party, trainer, settings.method, settings.accept)
            record = state_dir if settings.private_record else None
            rounds = loop(link, session, trainer, console, record, settings.patience)
        path = save(session, trainer, state_dir)
        console.print(f"[green]run {session.run.hex()[:8]} is finished[/]; prompt in {path}")
        result = {"name": me.name, "run": session.run.hex(), "rounds": rounds, "prompt": str(path)}
        command.write_json(json_path, {**result, "history": session.history})
        if session.failed_because is not None:
            raise session.failed_because
    return 0


def loop(
    link: CurveLink,
    session: Session,
    trainer: LocalTrainer,
    console: Console,
    record: Path | None = None,
    patience: float = math.inf,
) -> int:
    """Move frames between socket and session; train in one worker thread. Returns rounds done.

    Args:
        record: folder for the private record, if one is kept.
        patience: seconds to wait for a round that the policy allows, after one that it does not.

    Raises:
        SecureFedPromptError: refused, disconnected, declined for too long, or the run failed.
    """
    connections, alive_at, greeted, rounds, told = 0, 0.0, 0.0, 0, 0
    pace, declined_at = Pace(trainer.hold_seconds), math.inf
    job: tuple[Work, Future[Result]] | None = None
    welcome: Future[list[m.Message]] | None = None
    with ThreadPoolExecutor(1) as pool:
        try:
            while not session.over:
                if link.connections != connections and welcome is None:
                    connections, greeted = link.connections, time.monotonic()
                    link.send(session.hello())
                if (now := time.monotonic()) - alive_at > ALIVE_SECONDS:
                    link.send(m.Alive())
                    alive_at = now
                message, replies = None, list[m.Message]()
                if welcome is None:
                    message = next_frame(link, 0.02 if job else 0.2, greeted)
                elif welcome.done():
                    replies, welcome = outcome(welcome), None
                else:
                    wait([welcome], 0.2)
                if isinstance(message, m.Welcome) and session.settings is None:
                    # Encodes all images; meanwhile the link is kept alive.
                    welcome = pool.submit(session.on, message)
                elif message is not None:
                    replies += react(session, message, console)
                    if isinstance(message, m.Plan) and session.terms is not None:
                        pace.begin(message.plan, session.terms.upload_after, time.monotonic())
                declined_at = min(declined_at, now) if session.declined else math.inf
                if session.declined and now - declined_at > patience:
                    raise session.declined
                told = tell_sums(console, session, told)
                if job is None and session.work is not None:
                    job = session.work, pool.submit(trained, trainer, session.work)
                if job is not None and job[1].done():
                    (work, future), job = job, None
                    sent = settle(session, trainer, console, record, pace, work, future)
                    replies += sent
                    rounds += any(isinstance(reply, UPLOADS) for reply in sent)
                for reply in pace.due(replies, time.monotonic()):
                    link.send(reply)
            link.send(m.Leave("Finished", ""))
        except SecureFedPromptError as error:
            link.send(session.leave(error))
            raise
        except KeyboardInterrupt:
            link.send(m.Leave("Stopped", ""))
            raise
        finally:
            trainer.cancelled.set()  # the pool waits for its thread
    return rounds


def trained(trainer: LocalTrainer, work: Work) -> Result:
    """Train, and count what was spent: an accountant takes longer than frames may wait."""
    result = trainer.run(work)
    if trainer.dp.kind == "sample":
        dp = trainer.dp
        trainer.spent = epsilon(trainer.ledger.history, dp.delta, dp.accountant)
    return result


def settle(
    session: Session,
    trainer: LocalTrainer,
    console: Console,
    record: Path | None,
    pace: Pace,
    work: Work,
    future: Future[Result],
) -> list[m.Message]:
    """What follows from training: an upload, or one that looks like it.

    Raises:
        SecureFedPromptError: training was cancelled.
    """
    try:
        result = outcome(future)
    except SecureFedPromptError as error:
        pace.trained(work.plan, time.monotonic(), failed=True)
        return fail(console, session, work, error, trainer)
    sent = session.trained(work, result)
    pace.trained(work.plan, time.monotonic())
    if sent and isinstance(result, tuple):
        uploaded(console, record, session, work, trainer, result)
    return sent


def fail(
    console: Console,
    session: Session,
    work: Work,
    error: SecureFedPromptError,
    trainer: LocalTrainer,
) -> list[m.Message]:
    """Training failed: told here, and to nobody else."""
    if trainer.cancelled.is_set():
        raise error
    console.print(
        f"[bold red]training failed[/]: {escape(str(error))}; a zero update is sent in its place, "
        "and the server is not told"
    )
    return session.failed(work, error)


def tell_terms(console: Console, terms: RunTerms) -> None:
    """What was agreed to."""
    counts = "" if terms.uniform else f", weights = {terms.weights}"
    counts += "" if terms.metrics != "rounds" else ", metrics in every round"
    console.print(
        f"terms {terms.digest.hex()[:16]} accepted: {terms.method.method} under "
        f"{terms.protection}, {terms.clients} clients, quorum {terms.quorum}, c = {terms.colluders}"
        f"{counts}"
    )
    if terms.noise.used:
        noise = terms.noise
        console.print(
            f"  every update's norm is clipped to {noise.clip:g}; a sum has noise of "
            f"{noise.multiplier:g} times that in each value, if {noise.honest} clients add theirs"
        )


def next_frame(link: CurveLink, timeout: float, greeted: float) -> m.Message | None:
    """The next frame, without a Rejoin that crossed our greeting."""
    message = link.receive(timeout)
    crossed = isinstance(message, m.Rejoin) and time.monotonic() - greeted < GREETING
    return None if crossed else message


def outcome(future: Future[T]) -> T:
    """The worker's result; whatever went wrong there is one line.

    Raises:
        SecureFedPromptError
    """
    try:
        return future.result()
    except SecureFedPromptError:
        raise
    except Exception as error:
        line = m.line(error) or type(error).__name__
        raise UpdateError(f"local training failed: {line}") from error


def react(session: Session, message: m.Message, console: Console) -> list[m.Message]:
    """The answer to a frame; an error of one round only ends our part in that round."""
    if isinstance(message, m.RoundEnd) and message.reason:
        console.print(f"[yellow]round {message.round} aborted[/]: {escape(message.reason)}")
    before = session.terms
    try:
        replies = session.on(message)
    except SecureFedPromptError as error:
        replies = session.withdraw(error)
        what = "declined this round" if session.declined is error else "withdrawn from this round"
        console.print(f"[yellow]{what}[/]: {escape(str(error))}; waiting for the next one")
    if session.terms is not before and session.terms is not None:
        tell_terms(console, session.terms)
    return replies


def uploaded(
    console: Console,
    record: Path | None,
    session: Session,
    work: Work,
    trainer: LocalTrainer,
    result: tuple[Values, float],
) -> None:
    """Tell about an upload, and keep what went into it if that is wanted."""
    tell(console, session, work, trainer, result[1])
    if record is not None:
        keep_private(record, session, work, trainer, result)


def tell(
    console: Console, session: Session, work: Work, trainer: LocalTrainer, weight: float
) -> None:
    plan = work.plan
    what = f"round {plan.learning_round}/{plan.rounds}" if plan.training else "final evaluation"
    shield = "UNPROTECTED" if plan.protection == "none" else f"under {plan.protection}"
    clipped = (
        f", [yellow]{trainer.clipped} values clipped to {plan.clip:g}[/]" if trainer.clipped else ""
    )
    if weight > plan.max_weight:
        console.print(
            f"[yellow]our {weight:g} images count as the plan's max_weight {plan.max_weight}[/]"
        )
    sent = f"update of norm {trainer.norms[-1]:.2g}" if plan.training else "counts"
    weighs = "" if plan.uniform else f" for {weight:g} images"
    console.print(f"{what}: {sent}{weighs} sent {shield}{clipped}")
    if trainer.dp.kind == "sample" and plan.training:
        console.print(
            f"  privacy: epsilon {trainer.spent:.4g} ({trainer.dp.accountant}) at delta "
            f"{trainer.dp.delta:g} spent so far, noise multiplier {trainer.sigma:.3g}"
        )
    if plan.noise.used:
        delta = session.party.policy.client_delta
        spent = client_noise.epsilon(session.party.ledger.rho(), delta)
        console.print(
            f"  privacy of this client as a whole: epsilon {spent:.3g} at delta {delta:g} spent so "
            f"far, norm clipped to {plan.noise.clip:g}"
        )


def keep_private(
    folder: Path, session: Session, work: Work, trainer: LocalTrainer, result: tuple[Values, float]
) -> None:
    """What went into an upload, for ``audit --secrets``."""
    path = folder / f"private-record-{session.run.hex()[:8]}.jsonl"
    values, weight = result
    if not path.exists():
        train, test = trainer.image_counts
        counts = {"training images": train, "test images": test}
        private.write_head(path, session.party.name, trainer.class_names, counts)
    tensors = {t.name: values[t.name] for t in trainer.tensors() if t.name in values}
    weighted = {f"weighted {k}": np.asarray(v) * weight for k, v in tensors.items()}
    counters = {k: v for k, v in values.items() if k not in tensors}
    prompt = {}
    if tensors:
        flat = np.concatenate([np.asarray(v).reshape(-1) for v in tensors.values()])
        prompt = {"local prompt": work.base + flat}
    found = {**tensors, **weighted, **counters, **prompt}
    private.write_round(path, work.plan.round, found)


def tell_sums(console: Console, session: Session, told: int) -> int:
    """What newly opened sums say: under encryption only clients can. Returns how many are told."""
    for number in sorted(session.history)[told:]:
        metrics = session.history[number]
        accuracy = f", accuracy before {metrics['accuracy']:.1%}" if "accuracy" in metrics else ""
        contributors = f"{metrics['contributors']:.0f} clients"
        console.print(f"round {number}: sum of {contributors} opened{accuracy}")
    return len(session.history)


def save(session: Session, trainer: LocalTrainer, folder: Path) -> Path:
    """Write the final global prompt beside the journal."""
    from secure_fedprompt.prompt_file import write_prompt

    assert session.final is not None
    trainer.finish(session.final, session.run)
    path = folder / f"prompt-{session.run.hex()[:8]}.safetensors"
    write_prompt(path, trainer)
    return path


if __name__ == "__main__":
    sys.exit(main())
