"""Files that programs share: keys, rosters, locks; and who a program is by them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import save

from secure_fedprompt.protocol.errors import (
    ConfigError,
    DiskError,
    KeyFileError,
    RosterError,
)
from secure_fedprompt.protocol.keys import Identity, Member, fingerprint
from secure_fedprompt.protocol.roster import Roster, member_to_toml

PR_SET_DUMPABLE = 4  # linux/prctl.h


def leave_no_dump() -> None:
    """No core dump of this process; on Linux, no look into its memory by others of its user."""
    with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def read_identity(path: str) -> Identity:
    """A key file. From here on the process has secrets in memory, and leaves no core dump.

    Raises:
        KeyFileError: missing, open to others, or malformed.
    """
    leave_no_dump()
    try:
        with open(path, "rb") as file:
            return Identity.from_pem(file.read(), path, os.fstat(file.fileno()).st_mode)
    except FileNotFoundError:
        raise KeyFileError(
            f"key = {path!r}: no such file; make one with 'secure-fedprompt keygen --name NAME'"
        ) from None
    except OSError as error:
        raise KeyFileError(f"key = {path!r}: {error.strerror}") from None


def read_roster(path: str) -> Roster:
    """A roster file, every entry verified.

    Raises:
        RosterError: missing or invalid.
    """
    try:
        return Roster.from_toml(Path(path).read_text(), path)
    except FileNotFoundError:
        raise RosterError(
            f"roster = {path!r}: no such file; who runs the server sends it ('secure-fedprompt "
            "admit', or 'roster add', writes it)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RosterError(f"roster = {path!r} cannot be read: {error}") from None


def member_of(identity: Identity, roster: Roster, roles: Sequence[str]) -> Member:
    """The roster entry that belongs to a key.

    Raises:
        RosterError: there is none, or it has another role.
    """
    for member in roster.members:
        if member.identity == identity.public() and member.curve == identity.curve_public():
            if member.role not in roles:
                raise RosterError(
                    f"{member.name} is a {member.role} on the roster, not a {roles[0]}"
                )
            return member
    raise RosterError(
        f"our key {fingerprint(identity.public())} is not on the roster: add its entry with "
        "'secure-fedprompt roster add'"
    )


def whoami(key: str, roster_file: str, role: str) -> tuple[Identity, Roster, Member, Member]:
    """Own key, roster, own entry and the server's.

    Raises:
        KeyFileError, RosterError
    """
    identity = read_identity(key)
    roster = read_roster(roster_file)
    me = member_of(identity, roster, (role,))
    servers = roster.with_role("server")
    if len(servers) != 1:
        raise RosterError(f"roster {roster_file} names {len(servers)} servers, must be one")
    return identity, roster, me, servers[0]


def lock(descriptor: int, in_use: str) -> None:
    """Hold an open file or folder until it is closed; where the system has such locks.

    Raises:
        ConfigError: another process holds it; ``in_use`` is what the user reads.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(in_use) from None


@contextlib.contextmanager
def written(what: object, remedy: str = "free the disk") -> Iterator[None]:
    """Turns what the disk refuses into one line.

    Raises:
        DiskError: naming ``what`` and the reason.
    """
    try:
        yield
    except (OSError, sqlite3.Error, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if type(error) is sqlite3.DatabaseError:  # none, or a damaged one
            remedy = "restore it from a copy"
        raise DiskError(f"{what} cannot be written ({why}): {remedy}") from None


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file; what is there afterwards is the old content or the new one."""
    partial = path.with_suffix(".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)  # or a power cut could bring the old one back
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None,
    mode: int = 0o644,
) -> None:  # fmt: skip
    """The same for a safetensors file."""
    write_durably(path, save(dict(tensors), dict(metadata) if metadata else None), mode)


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


def replace_private(path: Path, data: bytes) -> None:
    """Replace a file that only its owner can read; afterwards it is the old one or the new one.

    Raises:
        DiskError: it cannot be written.
    """
    with written(path):
        write_durably(path, data, 0o600)


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
