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
from typing import TYPE_CHECKING, NoReturn, TypeVar

import numpy as np

from secure_fedprompt import narration
from secure_fedprompt.audit import private
from secure_fedprompt.clients.accounting import epsilon
from secure_fedprompt.clients.conversation import Conversation
from secure_fedprompt.clients.file_journal import FileJournal
from secure_fedprompt.clients.ledger import NAME, Ledger
from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.session import Session
from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.host import command
from secure_fedprompt.host.files import read_roster, whoami, written
from secure_fedprompt.host.log import Bars, Log
from secure_fedprompt.host.recorded import RecordedLink
from secure_fedprompt.host.recorder import recorder
from secure_fedprompt.host.tracking import tracked
from secure_fedprompt.pace import Pace
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    ConfigError,
    DataError,
    DiskError,
    RosterMismatchError,
    SecureFedPromptError,
    SumError,
    UpdateError,
)
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.transport import Link

if TYPE_CHECKING:
    from secure_fedprompt.clients.data.sets import ImageSet
    from secure_fedprompt.clients.learning import LocalLearner
    from secure_fedprompt.clients.settings import ClientSettings
    from secure_fedprompt.clients.training import LocalTrainer
    from secure_fedprompt.protocol.selection.shares import Keys

    Client = Session[LocalLearner]

EXAMPLES = """\
  python -m secure_fedprompt.client --config client.toml
  python -m secure_fedprompt.client --key alice.pem --roster roster.toml \\
      --server tcp://192.0.2.10:5570 --dataset photos/ --class-list classes.txt \\
      --model ViT-B-16 --pretrained openai --policy-min-cohort 5
  # test keys, roster, data, model and the server without joining a run
  secure-fedprompt check --config client.toml"""
AGAIN = 2.0  # seconds until a prompt that could not be written is tried again
T = TypeVar("T")


def main(argv: list[str] | None = None) -> int:
    from secure_fedprompt.clients.settings import ClientSettings

    parser = command.parser(
        "python -m secure_fedprompt.client",
        "Train prompts on private images and send them only under secure aggregation.",
        EXAMPLES,
    )
    command.add_flags(parser, ClientSettings)
    args = parser.parse_args(argv)
    body = lambda: take_part(command.load(ClientSettings, args), args.json)  # noqa: E731
    return command.guard(body, args)


def load_trainer(settings: ClientSettings, log: Log, bars: Bars) -> LocalTrainer:
    """Data and model, before anything is sent.

    Raises:
        DataError, ModelError
    """
    import torch

    from secure_fedprompt.clients.backbone import Backbone
    from secure_fedprompt.clients.data.loading import load_part
    from secure_fedprompt.clients.training import LocalTrainer

    if settings.compile and settings.dp.kind != "none":
        raise ConfigError("compile: steps of DP-SGD cannot be compiled: leave it out")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    train, test = readable(load_part(settings), log, settings.skip_unreadable, bars.on)
    if not len(train):
        raise DataError(f"data set {settings.dataset} has no training image that can be read")
    backbone = Backbone.load(
        settings.model, settings.pretrained, settings.device, settings.precision
    )
    have = len({*train.labels.tolist(), *test.labels.tolist()})
    log.info(
        "data", f"{len(train)} training and {len(test)} test images of {have} of "
        f"{len(train.class_names)} classes; model {settings.model} on {backbone.device}",
    )  # fmt: skip
    if train.note:
        log.info("data", f"data set {settings.dataset}: {train.note}")
    made = LocalTrainer(backbone, train, test, None, settings.augment, bars.on, dp=settings.dp)
    made.local_metrics, made.views = settings.local_metrics, settings.views
    made.compile = settings.compile
    return made


def readable(
    sets: Sequence[ImageSet],
    log: Log,
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
        log.warning("unreadable", f"unreadable: {text}")
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
    loaded: list[LocalTrainer] = []  # what outlives a change of the roster
    with Log("client", settings.log, settings.log_level) as log:
        while True:
            try:
                return _take_part(settings, json_path, log, loaded)
            except _RosterChanged:
                log.info("roster", f"going on with the changed {settings.roster}")


class _RosterChanged(Exception):
    """Our roster file is another one by now: begin again with it."""


def _await_roster(settings: ClientSettings, known: Roster, log: Log, why: Exception) -> NoReturn:
    """Wait for the roster file to change, as the server's has.

    Raises:
        _RosterChanged: it did. RosterMismatchError: it did not, as long as patience lasts.
    """
    log.warning(
        "roster", f"{why}; the run goes on for this client once {settings.roster} is the same, "
        f"within {settings.patience:g} s",
    )  # fmt: skip
    until = time.monotonic() + settings.patience
    while time.monotonic() < until:
        with contextlib.suppress(SecureFedPromptError):  # half written
            if read_roster(settings.roster).digest != known.digest:
                raise _RosterChanged
        time.sleep(0.5)
    raise why


def _take_part(
    settings: ClientSettings, json_path: str | None, log: Log, loaded: list[LocalTrainer]
) -> int:
    identity, roster, me, server = whoami(settings.key, settings.roster, "client")
    log.name = me.name
    state_dir = Path(settings.state_dir.replace("{name}", me.name))
    from secure_fedprompt.clients.training import client_seed

    with contextlib.ExitStack() as stack:
        stack.enter_context(tracked(log, settings.track, {"model": settings.model}))
        journal = FileJournal(state_dir / "journal.jsonl")
        stack.callback(journal.close)
        ledger = Ledger(state_dir / NAME)
        stack.callback(ledger.close)
        ledger.check_bounded(settings.dp)
        frames = recorder(state_dir, settings.audit, settings.audit_mb, identity, me, roster)
        if frames is not None:
            stack.callback(frames.close)
        link = CurveLink(
            settings.server, server.curve, identity, settings.patience,
            lambda text: log.warning("link", text),
        )  # fmt: skip
        stack.callback(link.close)
        with Bars(log) as bars:
            names = sorted(member.name for member in roster.with_role("client"))
            going_on = bool(loaded)
            if not going_on:
                loaded.append(load_trainer(settings, log, bars))  # what is wrong shows at once
            (trainer,) = loaded
            trainer.cancelled.clear()
            link.connect()
            log.info("connected", f"{me.name} connected to {settings.server}")
            if settings.seed >= 0:
                trainer.seed = client_seed(settings.seed, me.name)
            trainer.seat = names.index(me.name), len(names)
            trainer.keep, trainer.hold_seconds = state_dir, settings.hold_seconds
            trainer.start_prompt = Path(settings.start_prompt) if settings.start_prompt else None
            trainer.ledger = ledger
            party = Party(
                me.name, identity, roster, settings.policy, journal, os.urandom, ledger=ledger
            )
            session = Session(party, trainer, settings.method, settings.accept)
            watched = RecordedLink(link, frames) if frames else link
            try:
                _stay(watched, session, trainer, log, settings, state_dir)
            except RosterMismatchError as error:
                if not (going_on or session.terms is not None):
                    raise
                _await_roster(settings, roster, log, error)
        path, run = save(session, state_dir, log, settings.patience), session.run.hex()
        rounds = len({u.learning_round for u in ledger.uploads if u.run == run})
        words = f"run {run[:8]} is finished; prompt in {path}"
        log.info("finished", words, run=run, rounds=rounds, prompt=str(path))
        narration.unverified(log, session)
        command.write_json(json_path, "client", {
            "name": me.name, "run": run, "rounds_done": rounds, "prompt": str(path),
            "verified": session.verified, "opened": session.history,
        })  # fmt: skip
        if session.failed_because is not None:
            raise session.failed_because
    return 0


def _stay(
    link: Link,
    session: Client,
    trainer: LocalTrainer,
    log: Log,
    settings: ClientSettings,
    state_dir: Path,
) -> None:
    """Take part to the end of the run; a base that no sum must follow any more is kept."""
    try:
        loop(
            link, session, trainer, log, state_dir if settings.private_record else None,
            settings.patience,
        )  # fmt: skip
    except SumError:
        keep_base(session, state_dir, log, settings.patience)
        raise


def loop(
    link: Link,
    session: Client,
    trainer: LocalTrainer,
    log: Log,
    record: Path | None = None,
    patience: float = math.inf,
) -> None:
    """Move frames between socket and session; train in one worker thread.

    Args:
        record: folder for the private record, if one is kept.
        patience: seconds to wait for a round that the policy allows, after one that it does not.

    Raises:
        SecureFedPromptError: refused, disconnected, declined for too long, or the run failed.
    """
    server, told = Conversation(link, session.hello), 0
    pace, declined_at = Pace(trainer.hold_seconds), math.inf
    job: tuple[Work, Future[Update | Keys]] | None = None
    welcome: Future[list[m.Message]] | None = None
    with ThreadPoolExecutor(1) as pool:
        try:
            while not session.over:
                if welcome is None:
                    server.greet()
                server.live()
                message, replies = None, list[m.Message]()
                if welcome is None:
                    message = server.receive(0.02 if job else 0.2)
                elif welcome.done():
                    replies, welcome = outcome(welcome), None
                else:
                    wait([welcome], 0.2)
                if isinstance(message, m.Welcome) and session.settings is None:
                    # Encodes all images; meanwhile the link is kept alive.
                    welcome = pool.submit(session.on, message)
                elif message is not None:
                    replies += react(session, message, log)
                    if isinstance(message, m.Plan) and session.terms is not None:
                        pace.begin(message.plan, session.terms.upload_after, time.monotonic())
                now = time.monotonic()
                declined_at = min(declined_at, now) if session.declined else math.inf
                if session.declined and now - declined_at > patience:
                    raise session.declined
                told = narration.sums(log, session, told)
                if job is None and session.work is not None:
                    job = session.work, pool.submit(trained, session.learner, session.work, log)
                if job is not None and job[1].done():
                    (work, future), job = job, None
                    replies += settle(session, trainer, log, record, pace, work, future)
                server.send(pace.due(replies, time.monotonic()))
            server.send([m.Leave("Finished", "")])
        except SecureFedPromptError as error:
            server.send([session.leave(error)])
            raise
        except KeyboardInterrupt:
            server.send([m.Leave("Stopped", "")])
            raise
        finally:
            trainer.cancelled.set()  # the pool waits for its thread


def trained(learner: LocalLearner, work: Work, log: Log) -> Update | Keys:
    """Train, and count what was spent: an accountant takes longer than frames may wait."""
    narration.begun(log, work)
    begin = time.monotonic()
    result, client = learner.run(work), learner.client
    before = learner.seconds if work.choice is not None else 0.0  # work for the keys
    learner.seconds = before + time.monotonic() - begin
    if client.dp.kind == "sample":
        learner.spent = epsilon(client.ledger.history, client.dp.delta, client.dp.accountant)
    return result


def settle(
    session: Client,
    trainer: LocalTrainer,
    log: Log,
    record: Path | None,
    pace: Pace,
    work: Work,
    future: Future[Update | Keys],
) -> list[m.Message]:
    """What follows from training: an upload, or one that looks like it.

    Raises:
        SecureFedPromptError: training was cancelled.
    """
    try:
        result = outcome(future)
    except SecureFedPromptError as error:
        pace.trained(work.plan, time.monotonic(), failed=True)
        return fail(log, session, work, error, trainer)
    sent = session.trained(work, result)
    pace.trained(work.plan, time.monotonic())
    if sent and isinstance(result, Update):
        narration.sent(log, session, work, result.weight)
        if record is not None:
            keep_private(record, session, work, result)
    return sent


def fail(
    log: Log,
    session: Client,
    work: Work,
    error: SecureFedPromptError,
    trainer: LocalTrainer,
) -> list[m.Message]:
    """Training failed: told here, and to nobody else."""
    if trainer.cancelled.is_set():
        raise error
    words = (
        f"training failed: {error}; a zero update is sent in its place, and the server is not told"
    )
    log.error("failed", words, error=type(error).__name__)
    return session.failed(work, error)


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


def react(session: Client, message: m.Message, log: Log) -> list[m.Message]:
    """The answer to a frame; an error of one round only ends our part in that round."""
    if isinstance(message, m.RoundEnd) and message.reason:
        words = f"round {message.round} aborted: {message.reason}"
        log.warning("aborted", words, round=message.round)
    before = session.terms
    try:
        replies = session.on(message)
    except SecureFedPromptError as error:
        replies = session.withdraw(error)
        what = "declined this round" if session.declined is error else "withdrawn from this round"
        words = f"{what}: {error}; waiting for the next one"
        log.warning("withdrawn", words, error=type(error).__name__)
    if session.terms is not before and session.terms is not None:
        narration.terms(log, session.terms)
    return replies


def keep_private(folder: Path, session: Client, work: Work, update: Update) -> None:
    """What went into an upload, for ``audit --secrets``."""
    path = folder / f"private-record-{session.run.hex()[:8]}.jsonl"
    values, learner = update.values, session.learner
    tensors = {t.name: values[t.name] for t in learner.tensors() if t.name in values}
    weighted = {f"weighted {k}": np.asarray(v) * update.weight for k, v in tensors.items()}
    counters = {k: v for k, v in values.items() if k not in tensors}
    prompt = {}
    if tensors:
        flat = np.concatenate([np.asarray(v).reshape(-1) for v in tensors.values()])
        prompt = {"local prompt": work.base + flat}
    with written(path):
        if not path.exists():
            train, test = learner.client.image_counts
            counts = {"training images": train, "test images": test}
            private.write_head(path, session.party.name, learner.client.class_names, counts)
        private.write_round(path, work.plan.round, {**tensors, **weighted, **counters, **prompt})


def keep_base(session: Client, folder: Path, log: Log, patience: float) -> None:
    """After a sum that was none: what the sums before it gave is not lost."""
    if session.base is not None:
        session.final = session.base
        path = save(session, folder, log, patience)
        log.warning("kept", f"the prompt of the rounds before is in {path}")


def save(session: Client, folder: Path, log: Log, patience: float) -> Path:
    """Write the final global prompt beside the journal; a disk that is full is waited for.

    Raises:
        DiskError: it stayed full for ``patience`` seconds.
    """
    from secure_fedprompt.prompt_file import write_prompt

    assert session.final is not None
    path = folder / f"prompt-{session.run.hex()[:8]}.safetensors"
    until, told = time.monotonic() + patience, False
    while True:
        try:
            session.learner.finish(session.final, session.run)
            write_prompt(path, session.learner)
            session.party.journal.finish(session.run)  # last: until then it is asked for again
            return path
        except DiskError as error:
            if time.monotonic() > until:
                raise
            if not told:
                log.error("disk", f"{error}; it is held, and tried again for {patience:g} s")
            told = True
            time.sleep(AGAIN)


if __name__ == "__main__":
    sys.exit(main())
