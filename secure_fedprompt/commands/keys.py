"""Keys, roster, and the check before a deployment."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from secure_fedprompt.host import command, files
from secure_fedprompt.host.files import make_key
from secure_fedprompt.protocol.errors import (
    ConfigError,
)
from secure_fedprompt.protocol.keys import ROLES, Member, fingerprint, spoken
from secure_fedprompt.protocol.roster import Roster


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
        print(f"fingerprint   {fingerprint(member.identity)}  {spoken(member.identity)}")
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
        current = files.read_roster(args.roster) if path.exists() else Roster(())
        for entry in args.entries:
            for member in files.read_roster(entry).members:
                if member in current.members:
                    print(f"{member.name} is on {path} already, with this very key")
                else:
                    current = current.add(member)
        write_roster(path, current)
    if args.action == "remove":
        known = files.read_roster(args.roster)
        for name in args.entries or [""]:
            if name not in known.by_name:
                on_it = ", ".join(known.by_name)
                raise ConfigError(f"roster remove: {name!r} is not on {path}, which has {on_it}")
        write_roster(path, Roster.of(tuple(
            member for member in known.members if member.name not in args.entries
        )))  # fmt: skip
    current = files.read_roster(args.roster)
    if args.action == "check" and len(current.with_role("server")) != 1:
        count = len(current.with_role("server"))
        raise ConfigError(f"roster {path} names {count} servers: it must name one")
    for member in current.members:
        print(
            f"{member.name:20} {member.role:7} {fingerprint(member.identity)}  connects as "
            f"{fingerprint(member.curve)}  {spoken(member.identity)}"
        )
    digest = current.digest.hex()
    found = f"{len(current.members)} members, signatures good"
    print(f"roster digest {digest[:16]}  ({found})  {spoken(current.digest)}")
    command.write_json(
        args.json, "roster", {"roster_digest": digest, "members": rows_of(current.members)}
    )
    return 0


def rows_of(members: Sequence[Member]) -> list[dict[str, str]]:
    """Roster entries as JSON shows them."""
    return [
        {
            "name": m.name,
            "role": m.role,
            "fingerprint": fingerprint(m.identity),
            "connects_as": fingerprint(m.curve),
            "spoken": spoken(m.identity),
        }
        for m in members
    ]


def write_roster(path: Path, roster: Roster) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(roster.to_toml())
    partial.replace(path)
