"""Keys, roster, and the check before a deployment."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from secure_fedprompt.identity import whoami
from secure_fedprompt.protocol import command
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    ConfigError,
    KeyFileError,
    MismatchError,
    SecureFedPromptError,
    UnreachableError,
)
from secure_fedprompt.protocol.keys import ROLES, Identity, Member, fingerprint
from secure_fedprompt.protocol.locking import lock
from secure_fedprompt.protocol.roster import Roster, member_to_toml
from secure_fedprompt.protocol.settings import MethodSettings

if TYPE_CHECKING:
    from secure_fedprompt.client_settings import ClientSettings
    from secure_fedprompt.clients.link import CurveLink
    from secure_fedprompt.clients.training import LocalTrainer
    from secure_fedprompt.host.log import Log

_ANSWER = 10.0  # seconds to wait for the server's


def write_private(path: Path, data: bytes) -> None:
    """Create a file that only its owner can read; an existing one is never overwritten.

    Raises:
        KeyFileError: it exists.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise KeyFileError(f"{path} exists: remove it first, or choose another --out") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def make_key(name: str, role: str, folder: Path) -> Member:
    """Write ``NAME.pem`` (private) and ``NAME.entry.toml`` (public); returns the entry.

    Raises:
        KeyFileError: a key of that name exists. RosterError: the name is not allowed.
    """
    identity = Identity.generate()
    member = Member.of(identity, name, role)
    Roster.of((member,))
    folder.mkdir(parents=True, exist_ok=True)
    write_private(folder / f"{name}.pem", identity.to_pem())
    (folder / f"{name}.entry.toml").write_text(member_to_toml(member).lstrip())
    return member


def keygen(argv: list[str]) -> int:
    parser = command.parser(
        "secure-fedprompt keygen",
        "Make an identity: an Ed25519 signing key and a CurveZMQ key in NAME.pem (keep it secret), "
        "and NAME.entry.toml, the public roster entry to hand to the others.",
        "  secure-fedprompt keygen --name alice\n"
        "  secure-fedprompt keygen --name server --role server --out keys/",
    )
    parser.add_argument("--name", required=True, help="letters, digits, '.', '_', '-'")
    parser.add_argument("--role", choices=ROLES, default="client", help="what it is for")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder of both")
    args = parser.parse_args(argv)

    def body() -> int:
        member = make_key(args.name, args.role, args.out)
        key, entry = args.out / f"{args.name}.pem", args.out / f"{args.name}.entry.toml"
        print(f"secret key    {key}  (mode 0600; it has no password: guard the file)")
        print(f"roster entry  {entry}  (public; add it with 'secure-fedprompt roster add {entry}')")
        print(f"fingerprint   {fingerprint(member.identity)}")
        print(f"connects as   {fingerprint(member.curve)}")
        command.write_json(args.json, "keygen", {
            "name": args.name, "role": args.role, "key": str(key), "entry": str(entry),
            "fingerprint": fingerprint(member.identity), "connects_as": fingerprint(member.curve),
        })  # fmt: skip
        return 0

    return command.guard(body, args)


def roster(argv: list[str]) -> int:
    parser = command.parser(
        "secure-fedprompt roster",
        "Manage the public roster file. Every machine needs the same copy; compare fingerprints "
        "over another channel, since the roster is what everybody trusts.",
        "  secure-fedprompt roster add server.entry.toml alice.entry.toml --roster roster.toml\n"
        "  secure-fedprompt roster remove carol\n"
        "  secure-fedprompt roster list\n"
        "  secure-fedprompt roster check",
    )
    parser.add_argument("action", choices=("add", "remove", "list", "check"),
                        help="what to do with it")  # fmt: skip
    parser.add_argument(
        "entries", nargs="*", metavar="ENTRY", help="add: NAME.entry.toml files; remove: names"
    )
    parser.add_argument("--roster", default="roster.toml", metavar="FILE", help="the file")
    args = parser.parse_args(argv)
    return command.guard(lambda: _roster(args), args)


def _roster(args: argparse.Namespace) -> int:
    path = Path(args.roster)
    if args.action == "add":
        if not args.entries:
            raise ConfigError("roster add: name at least one NAME.entry.toml file")
        current = command.read_roster(args.roster) if path.exists() else Roster(())
        for entry in args.entries:
            for member in command.read_roster(entry).members:
                if member in current.members:
                    print(f"{member.name} is on {path} already, with this very key")
                else:
                    current = current.add(member)
        _write_roster(path, current)
    if args.action == "remove":
        known = command.read_roster(args.roster)
        for name in args.entries or [""]:
            if name not in known.by_name:
                on_it = ", ".join(known.by_name)
                raise ConfigError(f"roster remove: {name!r} is not on {path}, which has {on_it}")
        _write_roster(path, Roster.of(tuple(
            member for member in known.members if member.name not in args.entries
        )))  # fmt: skip
    current = command.read_roster(args.roster)
    if args.action == "check" and len(current.with_role("server")) != 1:
        count = len(current.with_role("server"))
        raise ConfigError(f"roster {path} names {count} servers: it must name one")
    for member in current.members:
        print(
            f"{member.name:20} {member.role:7} {fingerprint(member.identity)}  connects as "
            f"{fingerprint(member.curve)}"
        )
    digest = current.digest.hex()
    print(f"roster digest {digest[:16]}  ({len(current.members)} members, signatures good)")
    rows = [
        {
            "name": m.name,
            "role": m.role,
            "fingerprint": fingerprint(m.identity),
            "connects_as": fingerprint(m.curve),
        }
        for m in current.members
    ]
    command.write_json(args.json, "roster", {"roster_digest": digest, "members": rows})
    return 0


def _write_roster(path: Path, roster: Roster) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(roster.to_toml())
    partial.replace(path)


def check(argv: list[str]) -> int:
    from secure_fedprompt.client_settings import ClientSettings
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
