"""``secure-fedprompt check``: could this client join?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from secure_fedprompt.clients.accounting import Steps, steps_of
from secure_fedprompt.clients.ledger import NAME, Ledger
from secure_fedprompt.host import command
from secure_fedprompt.host.files import lock, whoami
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    ConfigError,
    MismatchError,
    ModelError,
    SecureFedPromptError,
    UnreachableError,
)
from secure_fedprompt.protocol.keys import Identity, spoken
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.protocol.transport import Frame, Link

if TYPE_CHECKING:
    from secure_fedprompt.clients.settings import ClientSettings
    from secure_fedprompt.clients.training import LocalTrainer
    from secure_fedprompt.host.log import Log

_ANSWER = 10.0  # seconds to wait for the server's


def check(argv: list[str]) -> int:
    from secure_fedprompt.clients.settings import ClientSettings
    from secure_fedprompt.host.log import Log

    parser = command.parser(
        "secure-fedprompt check",
        "Test a client's data (every image is opened), model, key, roster and connection, and ask "
        "the server whether it would have this client, without joining a run.",
        "  secure-fedprompt check --config client.toml",
    )
    command.add_flags(parser, ClientSettings)
    args = parser.parse_args(argv)

    def body() -> int:
        settings = command.load(ClientSettings, args)
        with Log("check", settings.log, settings.log_level) as log:
            return _check(settings, args.json, log)

    return command.guard(body, args)


def _in_use(journal: Path) -> bool:
    """Whether a client holds this file."""
    if not journal.exists():
        return False
    with journal.open("rb") as file:
        try:
            lock(file.fileno(), "")
        except ConfigError:
            return True
    return False


def _ask(link: Link, settings: ClientSettings, trainer: LocalTrainer, roster_digest: bytes) -> str:
    """Whether the server would have this client, and this client the server's terms.

    Raises:
        MismatchError, PolicyError: why not. UnreachableError: no answer.
    """
    link.send(Frame.of(m.Probe(
        settings.method, trainer.model_fingerprint, trainer.classes_digest, roster_digest,
    )))  # fmt: skip
    until, found = time.monotonic() + _ANSWER, None
    while not isinstance(found, m.Probed):
        frame = link.receive(0.5)
        found = frame.opened() if frame else None
        if found is None and time.monotonic() > until:
            raise UnreachableError(f"server {settings.server} does not answer: is it as new as we?")
    if found.error:
        raise MismatchError(f"the server would refuse us: {found.reason}")
    method = MethodSettings.from_bytes(found.settings)
    settings.policy.check_outline(
        method.method, found.protection, found.clients, found.quorum, found.clients
    )
    settings.policy.check_training(method, 1)  # how many rounds is in the terms
    if settings.dp.kind == "sample" and settings.dp.noise_multiplier:
        rate, steps = steps_of(trainer.image_counts[0], method.batch_size, method.epochs)
        trainer.ledger.check_room(Steps(settings.dp.noise_multiplier, rate, steps), settings.dp)
    fits = "roster, model, classes and policy fit" if found.compared else (
        "roster and policy fit; model and classes are compared once another client is there, or "
        "if the server's file names model_fingerprint and classes_digest"
    )  # fmt: skip
    return (
        f"{method.method} under {found.protection}, {found.clients} clients, quorum "
        f"{found.quorum}: {fits}"
    )


class _Results:
    """What came of each check; the first failure decides how the command ends."""

    def __init__(self, log: Log, json_path: str | None) -> None:
        self._log, self._json, self._checks = log, json_path, dict[str, str]()
        self._failure: SecureFedPromptError | None = None

    def ok(self, what: str, text: str) -> None:
        self._checks[what] = "ok"
        self._log.info(what, f"ok      {what:7} {text}")

    def failed(self, what: str, error: SecureFedPromptError) -> None:
        self._failure = self._failure or error
        self._checks[what] = f"{type(error).__name__}: {error}"
        self._log.error(what, f"failed  {what:7} {error}", error=type(error).__name__)

    def skipped(self, what: str, text: str) -> None:
        self._checks[what] = f"not run: {text}"
        self._log.warning(what, f"not run {what:7} {text}")

    def end(self) -> int:
        command.write_json(self._json, "check", {"checks": self._checks})
        return self._failure.exit_code if self._failure else 0


def _check(settings: ClientSettings, json_path: str | None, log: Log) -> int:
    results = _Results(log, json_path)
    trainer = _own(settings, log, results)
    try:
        identity, known, me, server = whoami(settings.key, settings.roster, "client")
        results.ok(
            "keys",
            f"{me.name}; {len(known.clients)} clients on the roster {spoken(known.digest)}: the "
            "other sites must see the same words",
        )
    except SecureFedPromptError as error:
        results.failed("keys", error)
        return results.end()
    state = Path(settings.state_dir.replace("{name}", me.name))
    try:
        ledger = Ledger.read(state / NAME) if (state / NAME).exists() else Ledger()
        ledger.check_bounded(settings.dp)
        if trainer is not None:
            trainer.ledger = ledger
        if settings.dp.kind == "sample":
            results.ok("dp", f"{len(ledger.entries)} rounds of training are on the ledger")
    except SecureFedPromptError as error:
        results.failed("dp", error)
    if _in_use(state / "journal.jsonl"):
        results.skipped("server", f"{me.name} runs now: its connection would suffer")
    else:
        _others(settings, results, trainer, (identity, known.digest, server.curve))
    return results.end()


def _own(settings: ClientSettings, log: Log, results: _Results) -> LocalTrainer | None:
    """Data and model."""
    from secure_fedprompt import client
    from secure_fedprompt.host.log import Bars

    try:
        with Bars(log) as bars:
            trainer = client.load_trainer(settings, log, bars)
    except SecureFedPromptError as error:
        results.failed("model" if isinstance(error, ModelError) else "data", error)
        return None
    results.ok("model", f"fingerprint {trainer.model_fingerprint.hex()[:16]}")
    results.ok(
        "data", f"{sum(trainer.image_counts)} images opened, {len(trainer.class_names)} classes, "
        f"digest {trainer.classes_digest.hex()[:16]}",
    )  # fmt: skip
    return trainer


def _others(
    settings: ClientSettings,
    results: _Results,
    trainer: LocalTrainer | None,
    who: tuple[Identity, bytes, bytes],
) -> None:
    """The server, and whether it would have us."""
    from secure_fedprompt.clients.link import CurveLink

    identity, roster_digest, curve = who
    asking = "server"
    link = CurveLink(settings.server, curve, identity, min(settings.patience, 10.0))
    try:
        link.connect()
        results.ok("server", f"{settings.server} answers and admits us")
        asking = "run"
        if trainer is not None:
            results.ok("run", _ask(link, settings, trainer, roster_digest))
    except SecureFedPromptError as error:
        results.failed(asking, error)
    finally:
        link.close()
