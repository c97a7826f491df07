"""Rolls: distinct names in order, front-coded. Ten thousand numbered names take 21 kB.

Each name is what it shares with the one before (one byte, how many characters) and the rest of it,
whose last byte has its high bit set (Witten, Moffat and Bell, "Managing Gigabytes", section 4.1).
The names of members are ASCII. A roll has one encoding: a name that shares more than it says, or
does not come after the one before, is refused.
"""

from __future__ import annotations

import functools
import itertools
import re

from secure_fedprompt.protocol.errors import FieldError

LONGEST = 65  # bytes of one name
_TOKEN = re.compile(rb"([\x00-\x3f])([\x21-\x7e]{0,63}[\xa1-\xfe])")  # looks no further
_NAME = 64  # characters at most
_CHARACTERS = re.compile(r"[\x21-\x7e]{1,64}")
_LAST = 0x80
_ASCII = bytes(range(_LAST))
_LOW = bytes(i & ~_LAST for i in range(256))


_RECENT: dict[tuple[str, ...], bytes] = {}  # the last few long rolls: plans repeat them
_FEW, _LONG = 8, 64


def pack(names: tuple[str, ...], where: str = "roll") -> bytes:
    """Names as bytes.

    Raises:
        FieldError: they are not distinct, in order, and of 1 to 64 printable ASCII characters.
    """
    known = _RECENT.get(names) if len(names) >= _LONG else None
    return known or _remember(names, _pack(names, where))


def _remember(names: tuple[str, ...], data: bytes) -> bytes:
    if len(names) >= _LONG:
        if len(_RECENT) >= _FEW:
            _RECENT.clear()
        _RECENT[names] = data
    return data


def _pack(names: tuple[str, ...], where: str) -> bytes:
    out, before = bytearray(), ""
    for name in names:
        if name <= before or not _CHARACTERS.fullmatch(name):
            raise FieldError(f"{where}: {name!r} is no name, doubled, or not in order")
        shared = len(name) - 1
        if name[:shared] != before[:shared] or len(before) < shared:  # numbered ones mostly do
            shared = _shared(before, name)
        out.append(shared)
        out += name[shared:].encode("ascii")
        out[-1] |= _LAST
        before = name
    return bytes(out)


def _shared(one: str, other: str) -> int:
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def count(data: bytes) -> int:
    """How many names there are, if it is a roll: bytes that end one."""
    return len(data.translate(None, _ASCII))


@functools.lru_cache(maxsize=_FEW)
def unpack(data: bytes, where: str = "roll") -> tuple[str, ...]:
    """Inverse of ``pack``.

    Raises:
        FieldError: the bytes are no roll, or not the one encoding of it.
    """
    names, before = list[bytes](), b""
    if len(data) > LONGEST * count(data):  # before anything is looked for
        raise FieldError(f"{where}: {len(data)} bytes cannot be {count(data)} names")
    tokens = _TOKEN.findall(data)
    if (size := sum(map(len, itertools.chain.from_iterable(tokens)))) != len(data):
        raise FieldError(f"{where}: {len(data) - size} of {len(data)} bytes are no names")
    for head, tail in tokens:
        shared, rest = head[0], tail.translate(_LOW)
        if shared > len(before) or rest[:1] <= before[shared : shared + 1]:
            raise FieldError(f"{where}: {rest!r} does not follow {before!r}")
        before = before[:shared] + rest
        names.append(before)
    if max(map(len, names), default=0) > _NAME:
        raise FieldError(f"{where}: a name of more than {_NAME} characters")
    roll = tuple(b"\0".join(names).decode("ascii").split("\0")) if names else ()
    _remember(roll, data)  # the one encoding
    return roll
