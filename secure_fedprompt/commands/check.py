"""``secure-fedprompt check``: could this client join?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from secure_fedprompt.host import command
from secure_fedprompt.host.files import lock, whoami
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    ConfigError,
    MismatchError,
    SecureFedPromptError,
    UnreachableError,
)
from secure_fedprompt.protocol.settings import MethodSettings

if TYPE_CHECKING:
    from secure_fedprompt.clients.link import CurveLink
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


def _ask(
    link: CurveLink, settings: ClientSettings, trainer: LocalTrainer, roster_digest: bytes
) -> str:
    """Whether the server would have this client, and this client the server's terms.

    Raises:
        MismatchError, PolicyError: why not. UnreachableError: no answer.
    """
    link.send(m.Probe(
        settings.method, trainer.model_fingerprint, trainer.classes_digest, roster_digest,
    ))  # fmt: skip
    until = time.monotonic() + _ANSWER
    while not isinstance(found := link.receive(0.5), m.Probed):
        if time.monotonic() > until:
            raise UnreachableError(f"server {settings.server} does not answer: is it as new as we?")
    if found.error:
        raise MismatchError(f"the server would refuse us: {found.reason}")
    method = MethodSettings.from_bytes(found.settings)
    settings.policy.check_outline(method.method, found.protection, found.clients, found.quorum)
    return (
        f"{method.method} under {found.protection}, {found.clients} clients, quorum "
        f"{found.quorum}: roster, model, classes and policy fit"
    )


def _check(settings: ClientSettings, json_path: str | None, log: Log) -> int:
    from secure_fedprompt import client
    from secure_fedprompt.clients.link import CurveLink
    from secure_fedprompt.host.log import Bars

    results: dict[str, str] = {}
    failure: SecureFedPromptError | None = None

    def attempt(what: str, text: str) -> None:
        results[what] = "ok"
        log.info(what, f"ok      {what:7} {text}")

    def failed(what: str, error: SecureFedPromptError) -> None:
        nonlocal failure
        failure = failure or error
        results[what] = f"{type(error).__name__}: {error}"
        log.error(what, f"failed  {what:7} {error}", error=type(error).__name__)

    trainer: LocalTrainer | None = None
    try:
        with Bars(log) as bars:
            trainer = client.load_trainer(settings, log, bars)
        attempt("model", f"fingerprint {trainer.model_fingerprint.hex()[:16]}")
        attempt(
            "data",
            f"{sum(trainer.image_counts)} images opened, {len(trainer.class_names)} classes, "
            f"digest {trainer.classes_digest.hex()[:16]}",
        )
    except SecureFedPromptError as error:
        failed("data", error)
    try:
        identity, known, me, server = whoami(settings.key, settings.roster, "client")
        attempt("keys", f"{me.name}, roster digest {known.digest.hex()[:16]}")
    except SecureFedPromptError as error:
        failed("keys", error)
        command.write_json(json_path, "check", {"checks": results})
        return error.exit_code
    if _in_use(Path(settings.state_dir.replace("{name}", me.name)) / "journal.jsonl"):
        results["server"] = "not asked: this client runs"
        log.warning("server", f"not run server  {me.name} runs now: its connection would suffer")
        command.write_json(json_path, "check", {"checks": results})
        return failure.exit_code if failure else 0
    link = CurveLink(settings.server, server.curve, identity, min(settings.patience, 10.0))
    try:
        link.connect()
        attempt("server", f"{settings.server} answers and admits us")
        if trainer is not None:
            attempt("run", _ask(link, settings, trainer, known.digest))
    except SecureFedPromptError as error:
        failed("server", error)
    finally:
        link.close()
    command.write_json(json_path, "check", {"checks": results})
    return failure.exit_code if failure else 0
