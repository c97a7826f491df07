"""``init``, ``join``, ``admit``: from nothing to files that a server and its sites can start with.

server's operator                        a site's
init       writes server.toml, keys and
           an invitation          ---->  join    makes keys and client.toml, and
admit      puts it on the roster  <----          an entry to send back
           roster.toml            ---->  check, and the two compare words by phone
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.commands.keys import rows_of, write_roster
from secure_fedprompt.host import command, files
from secure_fedprompt.host.files import make_key
from secure_fedprompt.protocol.errors import ConfigError, RosterError
from secure_fedprompt.protocol.keys import Member, spoken
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.protections import PROTECTIONS, default_threshold, facts_of
from secure_fedprompt.protocol.roster import Roster, member_to_toml
from secure_fedprompt.server.settings import ServerSettings, check_settings

PORT = 5570
INVITATION, ROSTER = "invitation.toml", "roster.toml"
PROPOSED = ("method", "protection", "rounds", "clients", "threshold")  # what an invitation says
FEW = 10  # sites that can be expected to be there all together
_SERVER = ("key", "roster", "bind", "run_dir", "clients", "threshold", "method", "protection",
           "rounds", "n_ctx", "init", "lr", "epochs", "batch_size", "metrics", "weights",
           "gather_seconds", "training_seconds")  # fmt: skip
_CLIENT = ("key", "roster", "server", "state_dir", "dataset", "class_list", "model", "pretrained",
           "device", "threads", "hold_seconds")  # fmt: skip
_PHONE = "say the words to each other by phone, not in the mail that brought the file"


class Invitation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a site needs to know before it has a roster. It is public, and binds nobody: a client
    judges the terms that the server signs, by its policy.

    Attributes:
        server: its address.
        member: its roster entry, the one table of [[member]].
    """

    server: str
    member: tuple[dict[str, str], ...]
    method: str
    protection: str
    rounds: int
    clients: int
    threshold: int = 0

    @property
    def quorum(self) -> int:
        """Fewest clients of a sum."""
        if self.threshold < 0:
            return self.clients
        return self.threshold or default_threshold(self.clients)


def init(argv: list[str]) -> int:
    parser = command.parser(
        "secure-fedprompt init",
        "Begin a federation: a key for the server, a commented server.toml, a roster, and an "
        "invitation to send to the sites. Asks for what is not given, if it is run at a terminal.",
        "  secure-fedprompt init --address tcp://192.0.2.10:5570 --clients 5\n"
        "  secure-fedprompt init --address tcp://fed.example.org:5570 --clients 8 --method fedmgp "
        "--out federation/",
    )
    parser.add_argument("--address", metavar="ADDRESS", help="under which sites reach the server")
    parser.add_argument("--clients", type=int, metavar="N", help="sites that will take part")
    parser.add_argument("--method", default="promptfl", metavar="NAME", help="of prompt learning")
    parser.add_argument("--protection", choices=PROTECTIONS, default="masks", help="of updates")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="learning rounds")
    parser.add_argument(
        "--missing", type=int, metavar="N",
        help="sites that a round goes on without. A site that misses one sum of two can be told by "
        f"their difference: with masks and up to {FEW} sites none by default, so that a round "
        "waits; else as many as the protocol can do without",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder for all")
    args = parser.parse_args(argv)
    return command.guard(lambda: _init(args), args)


def _init(args: argparse.Namespace) -> int:
    address = args.address or _asked("address", "address of the server, as sites see it")
    clients = args.clients or int(_asked("clients", "number of sites"))
    try:
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        port = parts.port or PORT
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != "tcp" or not parts.hostname:
        raise ConfigError(
            f"--address {address!r}: tcp://HOST:PORT, such as tcp://192.0.2.10:{PORT}"
        )
    if clients < 3:
        raise ConfigError(f"--clients {clients}: at least 3, or an update is a subtraction away")
    least = default_threshold(clients)
    missing = _missing(args.protection, clients) if args.missing is None else args.missing
    if not 0 <= missing <= clients - least:
        raise ConfigError(
            f"--missing {missing}: 0 to {clients - least} of {clients} sites, or two sums of one "
            "prompt could be opened"
        )
    values = {
        "key": "server.pem", "roster": ROSTER, "bind": f"tcp://0.0.0.0:{port}",
        "run_dir": "runs/{time}", "clients": clients, "method": args.method,
        "protection": args.protection, "rounds": args.rounds,
        "threshold": (clients - missing if missing < clients - least else 0) if missing else -1,
    }  # fmt: skip
    settings = command.build(ServerSettings, dict(values), "init")
    check_settings(settings)
    out: Path = args.out
    _new(out, "server.toml", ROSTER, INVITATION)
    member = make_key("server", "server", out)
    write_roster(out / ROSTER, Roster.of((member,)))
    (out / "server.toml").write_text(
        _commented(ServerSettings, _SERVER, settings, {k for k in values if values[k]})
    )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    lines = ["# An invitation to a federation: secure-fedprompt join invitation.toml --name YOURS",
             "# It is public. What it proposes binds nobody: a client judges the signed terms.",
             f'server = {json.dumps(f"tcp://{host}:{port}")}',
             *(f"{name} = {json.dumps(values[name])}" for name in PROPOSED)]  # fmt: skip
    (out / INVITATION).write_text("\n".join(lines) + "\n" + member_to_toml(member))
    print(f"settings      {out / 'server.toml'}  (every line is explained; edit it)")
    print(f"secret key    {out / 'server.pem'}  (mode 0600; stays on this machine)")
    print(f"roster        {out / ROSTER}  (the server; sites follow with 'admit')")
    print(f"invitation    {out / INVITATION}  (send it to the sites)")
    print(f"server's key  {spoken(member.identity)}  ({_PHONE})")
    effect = (
        f"a round goes on without {missing}, whose updates can be told by that"
        if missing
        else "no site can be told by its absence, and a round waits for who is missing"
    )
    print(f"quorum        {clients - missing} of {clients} sites: {effect} (--missing)")
    command.write_json(args.json, "init", {"members": rows_of((member,))})
    return 0


def join(argv: list[str]) -> int:
    parser = command.parser(
        "secure-fedprompt join",
        "Answer an invitation: make this site's key and a commented client.toml with its policy "
        "spelled out, and an entry to send back.",
        "  secure-fedprompt join invitation.toml --name alice --dataset scans/\n"
        "  secure-fedprompt join invitation.toml --name alice --dataset scans/ --model ViT-B-16 "
        "--pretrained openai --out alice/",
    )
    parser.add_argument(
        "invitation", metavar="INVITATION", help="the file of the server's operator"
    )
    parser.add_argument("--name", metavar="NAME", help="of this site, on the roster")
    parser.add_argument("--dataset", metavar="PATH", help="folder or zip file of CLASS/IMAGE")
    parser.add_argument("--model", metavar="NAME", help="bundled, local-dir:PATH, or open_clip's")
    parser.add_argument("--pretrained", metavar="TAG", help="of the model")
    parser.add_argument("--protection", choices=PROTECTIONS, default="masks",
                        help="that this site agrees to (default: masks)")  # fmt: skip
    parser.add_argument(
        "--missing", type=int, metavar="N",
        help="sites that this one lets a sum do without, as in 'init'; by default none, with masks "
        f"and up to {FEW} sites",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder for all")
    args = parser.parse_args(argv)
    return command.guard(lambda: _join(args), args)


def _join(args: argparse.Namespace) -> int:
    found, server = read_invitation(Path(args.invitation))
    if found.protection != args.protection:  # what a site allows is never a server's to write
        raise ConfigError(
            f"the invitation proposes {found.protection!r} ({facts_of(found.protection).title}), "
            f"this site agrees to {args.protection!r}: give --protection {found.protection} if you "
            "agree to that"
        )
    missing = found.clients - found.quorum
    allowed = args.missing
    if allowed is None:
        allowed = _missing(found.protection, found.clients)
    if missing > allowed:  # likewise: the invitation is not signed
        raise ConfigError(
            f"the invitation lets sums do without {missing} of {found.clients} sites, whose "
            f"updates can be told by that; this site agrees to {allowed}: give --missing {missing} "
            "if you agree to more"
        )
    name = args.name or _asked("name", "name of this site")
    dataset = args.dataset or _asked("dataset", "folder or zip file of images")
    if Path(dataset).exists():
        dataset = str(Path(dataset).absolute())
    values = {"key": f"{name}.pem", "roster": ROSTER, "server": found.server,
              "state_dir": "state", "dataset": dataset}  # fmt: skip
    values |= {k: getattr(args, k) for k in ("model", "pretrained") if getattr(args, k)}
    policy = {"protections": [found.protection], "methods": [found.method],
              "min_cohort": found.quorum,
              "min_survivors": found.quorum if missing else -1}  # fmt: skip
    settings = command.build(ClientSettings, {**values, "policy": dict(policy)}, "join")
    out: Path = args.out
    _new(out, "client.toml")
    member = make_key(name, "client", out)
    (out / "client.toml").write_text(
        _commented(ClientSettings, _CLIENT, settings, set(values))
        + "\n# What this site allows, whatever the server says.\n[policy]\n"
        + _commented(Policy, Policy.__struct_fields__, settings.policy, set(policy))
    )
    entry = out / f"{name}.entry.toml"
    print(f"settings      {out / 'client.toml'}  (every line is explained; read [policy])")
    print(f"secret key    {out / f'{name}.pem'}  (mode 0600; stays on this machine)")
    print(f"to send back  {entry}  (public)")
    print(f"our key       {spoken(member.identity)}")
    print(f"server's key  {spoken(server.identity)}  ({_PHONE})")
    print(
        f"proposed      {found.method} under {found.protection}, {found.rounds} rounds, "
        f"{found.clients} sites, of which {found.quorum} are in every sum"
    )
    print(f"next          put the {ROSTER} that comes back beside client.toml, then run "
          f"'secure-fedprompt check --config {out / 'client.toml'}'")  # fmt: skip
    command.write_json(args.json, "join", {"members": rows_of((member, server)),
                                           "entry": str(entry)})  # fmt: skip
    return 0


def read_invitation(path: Path) -> tuple[Invitation, Member]:
    """An invitation, and the server's entry, verified.

    Raises:
        ConfigError: it is none; says what is wrong.
    """
    try:
        text = path.read_text()
        found = msgspec.convert(tomllib.loads(text), Invitation)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"invitation {path} cannot be read: {error}") from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path} is no invitation: {error}") from None
    members = Roster.from_toml(text, str(path)).members
    if [member.role for member in members] != ["server"]:
        raise ConfigError(f"{path} is no invitation: it must name one member, the server")
    if found.clients < 3 or found.protection not in PROTECTIONS:
        raise ConfigError(
            f"{path} is no invitation: protection {found.protection!r}, {found.clients} clients"
        )
    if not default_threshold(found.clients) <= found.quorum <= found.clients:
        raise ConfigError(
            f"{path} is no invitation: threshold = {found.threshold} of {found.clients} clients"
        )
    return found, members[0]


def admit(argv: list[str]) -> int:
    parser = command.parser(
        "secure-fedprompt admit",
        "Put sites on the roster, and print what to compare by phone before the roster is sent.",
        "  secure-fedprompt admit alice.entry.toml bob.entry.toml\n"
        "  secure-fedprompt admit *.entry.toml --roster federation/roster.toml",
    )
    parser.add_argument("entries", nargs="+", metavar="ENTRY", help="NAME.entry.toml files")
    parser.add_argument("--roster", type=Path, default=Path(ROSTER), metavar="FILE", help="of init")
    args = parser.parse_args(argv)
    return command.guard(lambda: _admit(args), args)


def _admit(args: argparse.Namespace) -> int:
    path: Path = args.roster
    before = files.read_roster(str(path))
    if len(before.with_role("server")) != 1:
        raise RosterError(f"roster {path} names no server: 'secure-fedprompt init' makes one")
    after, new = before, list[Member]()
    for entry in args.entries:
        for member in files.read_roster(entry).members:
            if member.role == "server" and member not in before.members:
                raise RosterError(f"{entry} is the entry of a server: a roster names one")
            if member not in after.members:
                after = after.add(member)
                new.append(member)
    write_roster(path, after)
    for member in new:
        print(f"admitted      {member.name:20} {spoken(member.identity)}")
    print(
        f"              {_PHONE}; whoever hears other words: 'secure-fedprompt roster remove NAME'"
    )
    count = len(after.with_role("client"))
    print(f"roster        {path}  {count} clients, {spoken(after.digest)}")
    print("next          send it to every site: it must be the same everywhere")
    digest = after.digest.hex()
    command.write_json(
        args.json, "roster", {"roster_digest": digest, "members": rows_of(after.members)}
    )
    return 0


def _missing(protection: str, clients: int) -> int:
    """Sites that a sum does without, unless somebody says otherwise."""
    few = facts_of(protection).masked and clients <= FEW
    return 0 if few else clients - default_threshold(clients)


def _asked(flag: str, what: str) -> str:
    """What was not given as a flag.

    Raises:
        ConfigError: there is nobody to ask.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError(f"--{flag}: give it ({what}); it is asked for only at a terminal")
    answer = input(f"{what}: ").strip()
    if not answer or (flag == "clients" and not answer.isdecimal()):
        raise ConfigError(f"--{flag}: {answer!r} is none")
    return answer


def _new(folder: Path, *names: str) -> None:
    """Refuse to write over anything.

    Raises:
        ConfigError: naming the file.
    """
    for name in names:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} exists: remove it, or choose another --out")


def _commented(cls: type, names: Sequence[str], values: msgspec.Struct, given: set[str]) -> str:
    """TOML with a comment above each key; what is a default is commented out."""
    texts, lines = command.attribute_texts(cls), list[str]()
    for name in names:
        text = texts[name][0].upper() + texts[name][1:]
        lines += [f"# {line}" for line in textwrap.wrap(text, 94)]
        value = getattr(values, name)
        written = json.dumps(list(value) if isinstance(value, tuple) else value)
        lines += [f"{'' if name in given else '# '}{name} = {written}", ""]
    return "\n".join(lines)
