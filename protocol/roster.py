"""The roster: the public keys of everybody who may take part, trusted on file.

The file is TOML with one ``[[member]]`` table per party; keys and signatures are base64.
"""

from __future__ import annotations

import base64
import binascii
import functools
import tomllib
from dataclasses import dataclass

from secure_fedprompt.protocol.codec import encode_fields
from secure_fedprompt.protocol.errors import RosterError, SignatureError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.keys import NAME, ROLES, Member

_HEADER = (
    "# Public keys of a secure-fedprompt federation. Not secret; keep it the same everywhere.\n"
)
_SIZES = {"identity": 32, "curve": 32, "signature": 64}


@dataclass(frozen=True)
class Roster:
    """Members sorted by name."""

    members: tuple[Member, ...]

    @functools.cached_property
    def digest(self) -> bytes:
        return digest(Purpose.ROSTER, *(encode_fields(member) for member in self.members))

    @functools.cached_property
    def by_name(self) -> dict[str, Member]:
        return {member.name: member for member in self.members}

    @functools.cached_property
    def clients(self) -> frozenset[str]:
        """Names of all clients."""
        return frozenset(member.name for member in self.with_role("client"))

    def identity_of(self, name: str, *roles: str) -> bytes:
        """The Ed25519 public key of a member, by default a client.

        Raises:
            RosterError: no such member in one of these roles.
        """
        roles, member = roles or ("client",), self.by_name.get(name)
        if member is None or member.role not in roles:
            raise RosterError(f"{name!r} is not a {' or '.join(roles)} on the roster")
        return member.identity

    def with_role(self, role: str) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == role)

    def add(self, member: Member) -> Roster:
        """A roster with one more member.

        Raises:
            RosterError: the name or a key is taken; SignatureError as RosterError: unsigned.
        """
        if member.name in self.by_name and member not in self.members:
            raise RosterError(
                f"{member.name} is on the roster with another key: if that is lost, take it off "
                f"first ('secure-fedprompt roster remove {member.name}')"
            )
        return Roster.of((*self.members, member))

    @classmethod
    def of(cls, members: tuple[Member, ...]) -> Roster:
        for member in members:
            if not NAME.fullmatch(member.name):
                raise RosterError(
                    f"name {member.name!r}: use 1 to 63 letters, digits, '.', '_' or '-'"
                )
            if member.role not in ROLES:
                raise RosterError(f"role {member.role!r} of {member.name} is not in {ROLES}")
            try:
                member.verify()
            except SignatureError as error:
                raise RosterError(f"{error}: ask {member.name} for its entry again") from None
        for what in ("name", "identity", "curve"):
            seen: dict[object, str] = {}
            for member in members:
                first = seen.setdefault(getattr(member, what), member.name)
                if first is not member.name or seen[getattr(member, what)] != member.name:
                    raise RosterError(f"{first} and {member.name} have the same {what}")
        if len({member.name for member in members}) != len(members):
            names = [member.name for member in members]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise RosterError(f"{', '.join(twice)} is on the roster twice")
        return cls(tuple(sorted(members, key=lambda member: member.name)))

    def to_toml(self) -> str:
        return _HEADER + "".join(member_to_toml(member) for member in self.members)

    @classmethod
    def from_toml(cls, text: str, where: str) -> Roster:
        """Parse and verify a roster file, or a single entry.

        Raises:
            RosterError: naming the file and the entry.
        """
        try:
            tables = tomllib.loads(text).get("member", [])
        except tomllib.TOMLDecodeError as error:
            raise RosterError(f"roster {where} is not TOML: {error}") from None
        if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            raise RosterError(f"roster {where}: entries must be [[member]] tables")
        try:
            return cls.of(tuple(_member(table) for table in tables))
        except RosterError as error:
            raise RosterError(f"roster {where}: {error}") from None


def member_to_toml(member: Member) -> str:
    lines = [f'name = "{member.name}"', f'role = "{member.role}"']
    lines += [f'{key} = "{base64.b64encode(getattr(member, key)).decode()}"' for key in _SIZES]
    return "\n[[member]]\n" + "\n".join(lines) + "\n"


def _member(table: dict[str, object]) -> Member:
    expected = {"name", "role", *_SIZES}
    if set(table) != expected:
        wrong = sorted(set(table) ^ expected)
        raise RosterError(f"entry {table.get('name')!r} lacks or does not know {wrong}")
    values: dict[str, bytes] = {}
    for key, size in _SIZES.items():
        try:
            values[key] = base64.b64decode(str(table[key]), validate=True)
        except (binascii.Error, ValueError):
            values[key] = b""
        if len(values[key]) != size:
            raise RosterError(f"{key} of {table['name']!r} is not {size} bytes in base64")
    return Member(str(table["name"]), str(table["role"]), **values)
