"""Bytes <-> typed messages. The dataclass is the schema; there is exactly one encoding.

A frame is ``version (1) | type (1) | fields in order``, all little-endian:

    U8 U16 U32 U64 F64        fixed width
    Exact(n) bytes            n bytes, no prefix
    UpTo(n) Blob              u32 length, at most n; decoded as a view of the frame, not a copy
    Text(n) str               u16 length, UTF-8, at most n bytes, no control characters
    tuple[T, ...] + Many(n)   u32 count, at most n
    tuple[str, ...] + Roll(n) u32 length, at most n distinct ASCII names in order; see ``rolls``
    a frozen dataclass        its fields in order

Decoding consumes every byte or raises: there are no optional fields, no padding and no
second encoding of the same value, so a digest of the bytes is a digest of the message.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from secure_fedprompt.protocol import rolls
from secure_fedprompt.protocol.errors import (
    FieldError,
    TooLargeError,
    TrailingBytesError,
    TruncatedError,
    UnknownTypeError,
    UnknownVersionError,
)

VERSION = 13
MAX_FRAME = 1 << 28
T = TypeVar("T")


@dataclass(frozen=True)
class Number:
    format: str


@dataclass(frozen=True)
class Exact:
    size: int


@dataclass(frozen=True)
class UpTo:
    limit: int


@dataclass(frozen=True)
class Text:
    limit: int


@dataclass(frozen=True)
class Many:
    limit: int


@dataclass(frozen=True)
class Roll:
    limit: int


U8 = Annotated[int, Number("<B")]
U16 = Annotated[int, Number("<H")]
U32 = Annotated[int, Number("<I")]
U64 = Annotated[int, Number("<Q")]
F64 = Annotated[float, Number("<d")]
Digest = Annotated[bytes, Exact(32)]
PublicKey = Annotated[bytes, Exact(32)]
Signature = Annotated[bytes, Exact(64)]
RunId = Annotated[bytes, Exact(16)]
SumTag = Annotated[bytes, Exact(16)]
Blob = bytes | memoryview
Name = Annotated[str, Text(64)]
Line = Annotated[str, Text(512)]

Writer = Callable[[Any, list[bytes]], None]
Reader = Callable[["Cursor"], Any]


class Printable:
    """Base of what is sent: blobs print as their size."""

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, bytes | memoryview):
                value = f"<{len(value)} bytes>"
            elif isinstance(value, tuple) and len(value) > 4:
                value = f"<{len(value)} items>"
            shown.append(f"{field.name}={value}")
        return f"{type(self).__name__}({', '.join(shown)})"


class Cursor:
    """A read position in a frame; ``take`` never returns fewer bytes than asked for."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data).toreadonly()
        self.at = 0

    def take(self, size: int, what: str) -> memoryview:
        if self.at + size > len(self.data):
            left = len(self.data) - self.at
            raise TruncatedError(f"{what}: {size} bytes needed, {left} left")
        self.at += size
        return self.data[self.at - size : self.at]


def _number(where: str, kind: Number) -> tuple[Writer, Reader]:
    packer = struct.Struct(kind.format)

    def write(value: Any, out: list[bytes]) -> None:
        try:
            out.append(packer.pack(value))
        except struct.error:
            raise FieldError(f"{where}: {value!r} does not fit {kind.format}") from None

    def read(cursor: Cursor) -> Any:
        (value,) = packer.unpack(cursor.take(packer.size, where))
        if isinstance(value, float) and not math.isfinite(value):
            raise FieldError(f"{where}: {value} is not finite")
        return value

    return write, read


def _exact(where: str, size: int) -> tuple[Writer, Reader]:
    def write(value: bytes, out: list[bytes]) -> None:
        if len(value) != size:
            raise FieldError(f"{where}: {len(value)} bytes, must be {size}")
        out.append(value)

    return write, lambda cursor: bytes(cursor.take(size, where))


def _prefixed(where: str, limit: int, width: Number) -> tuple[Writer, Reader]:
    write_size, read_size = _number(where, width)

    def write(value: bytes, out: list[bytes]) -> None:
        if len(value) > limit:
            raise TooLargeError(f"{where}: {len(value)} bytes, at most {limit}")
        write_size(len(value), out)
        out.append(value)

    def read(cursor: Cursor) -> memoryview:
        size = read_size(cursor)
        if size > limit:
            raise TooLargeError(f"{where}: {size} bytes announced, at most {limit}")
        return cursor.take(size, where)

    return write, read


def _text(where: str, limit: int) -> tuple[Writer, Reader]:
    write_bytes, read_bytes = _prefixed(where, limit, Number("<H"))

    def read(cursor: Cursor) -> str:
        try:
            value = str(read_bytes(cursor), "utf-8")
        except UnicodeDecodeError:
            raise FieldError(f"{where}: not UTF-8") from None
        if not value.isprintable():
            raise FieldError(f"{where}: holds control characters")
        return value

    @functools.lru_cache(maxsize=8192)  # the same few names again and again
    def encoded(value: str) -> bytes:
        if not value.isprintable():
            raise FieldError(f"{where}: holds control characters")
        out: list[bytes] = []
        write_bytes(value.encode(), out)
        return b"".join(out)

    return lambda value, out: out.append(encoded(value)), read


def _many(where: str, limit: int, item: tuple[Writer, Reader]) -> tuple[Writer, Reader]:
    write_count, read_count = _number(where, Number("<I"))
    write_item, read_item = item

    def write(values: tuple[Any, ...], out: list[bytes]) -> None:
        if len(values) > limit:
            raise TooLargeError(f"{where}: {len(values)} items, at most {limit}")
        write_count(len(values), out)
        for value in values:
            write_item(value, out)

    def read(cursor: Cursor) -> tuple[Any, ...]:
        count = read_count(cursor)
        if count > limit:
            raise TooLargeError(f"{where}: {count} items announced, at most {limit}")
        return tuple(read_item(cursor) for _ in range(count))

    return write, read


def _roll(where: str, limit: int) -> tuple[Writer, Reader]:
    write_bytes, read_bytes = _prefixed(where, limit * rolls.LONGEST, Number("<I"))

    def write(names: tuple[str, ...], out: list[bytes]) -> None:
        if len(names) > limit:
            raise TooLargeError(f"{where}: {len(names)} names, at most {limit}")
        write_bytes(rolls.pack(names, where), out)

    def read(cursor: Cursor) -> tuple[str, ...]:
        data = bytes(read_bytes(cursor))
        if (count := rolls.count(data)) > limit:
            raise TooLargeError(f"{where}: {count} names, at most {limit}")
        return rolls.unpack(data, where)

    return write, read


def _coder(annotation: Any, where: str) -> tuple[Writer, Reader]:
    kind = None
    if get_origin(annotation) is Annotated:
        annotation, kind = get_args(annotation)
    match kind:
        case Number():
            return _number(where, kind)
        case Exact(size):
            return _exact(where, size)
        case UpTo(limit):
            return _prefixed(where, limit, Number("<I"))
        case Text(limit):
            return _text(where, limit)
        case Roll(limit):
            return _roll(where, limit)
        case Many(limit):
            return _many(where, limit, _coder(get_args(annotation)[0], where))
    if is_dataclass(annotation):
        return _struct(typing.cast(type, annotation))
    raise TypeError(f"{where}: no wire form for {annotation!r}")


@functools.cache
def _struct(cls: type[Any]) -> tuple[Writer, Reader]:
    hints = get_type_hints(cls, include_extras=True)
    parts = [(f.name, *_coder(hints[f.name], f"{cls.__name__}.{f.name}")) for f in fields(cls)]

    def write(value: Any, out: list[bytes]) -> None:
        for name, put, _ in parts:
            put(getattr(value, name), out)

    readers = _grouped(
        cls.__name__, [(hints[f.name], parts[i][2]) for i, f in enumerate(fields(cls))]
    )

    def read(cursor: Cursor) -> Any:
        values: list[Any] = []
        for get in readers:
            values += get(cursor)
        return cls(*values)

    return write, read


def _grouped(
    where: str, parts: list[tuple[Any, Reader]]
) -> list[Callable[[Cursor], Sequence[Any]]]:
    """Readers of one or more fields each: neighbours of fixed width are unpacked at once."""
    result: list[Callable[[Cursor], Sequence[Any]]] = []
    for fixed, run in itertools.groupby(parts, key=lambda part: _format(part[0]) != ""):
        members = list(run)
        if fixed:
            packer = struct.Struct("<" + "".join(_format(hint) for hint, _ in members))
            result.append(lambda c, p=packer: p.unpack(c.take(p.size, where)))  # type: ignore[misc]
        else:
            result += [lambda c, get=get: (get(c),) for _, get in members]  # type: ignore[misc]
    return result


def _format(annotation: Any) -> str:
    """The struct code of a field of fixed width, or "" (floats are checked one by one)."""
    kind = get_args(annotation)[1] if get_origin(annotation) is Annotated else None
    match kind:
        case Number(form) if form != "<d":
            return form[1:]
        case Exact(size):
            return f"{size}s"
    return ""


def _coder_of(value: object) -> Writer:
    return _struct(typing.cast(Any, type(value)))[0]


def encode_fields(value: object) -> bytes:
    """Canonical bytes of a dataclass, without version and type: the form that digests use."""
    out: list[bytes] = []
    _coder_of(value)(value, out)
    return b"".join(out)


def decode_fields(cls: type[T], data: bytes | memoryview) -> T:
    """Inverse of ``encode_fields``.

    Raises:
        CodecError: bytes are missing, left over, or out of a field's domain.
    """
    cursor = Cursor(data)
    value: T = _struct(typing.cast(Any, cls))[1](cursor)
    if cursor.at != len(cursor.data):
        left = len(cursor.data) - cursor.at
        raise TrailingBytesError(f"{cls.__name__}: {left} bytes after the last field")
    return value


class Catalogue:
    """The closed list of message types of one version of the protocol."""

    def __init__(self, *types: type) -> None:
        self.types = dict(enumerate(types, start=1))
        self._codes = {cls: code for code, cls in self.types.items()}
        self._last: tuple[object, bytes] = (None, b"")

    def encode(self, message: object) -> bytes:
        """A message as its frame. A broadcast, the same object again, is encoded once."""
        last, frame = self._last
        if message is last:
            return frame
        out = [bytes((VERSION, self._codes[type(message)]))]
        _coder_of(message)(message, out)
        frame = b"".join(out)
        if len(frame) > MAX_FRAME:
            raise TooLargeError(
                f"{type(message).__name__}: {len(frame)} bytes, at most {MAX_FRAME}"
            )
        self._last = message, frame
        return frame

    def decode(self, frame: bytes | memoryview) -> Any:
        """A frame as its message.

        Raises:
            CodecError: see the subclasses; every malformed frame has one.
        """
        if len(frame) > MAX_FRAME:
            raise TooLargeError(f"frame of {len(frame)} bytes, at most {MAX_FRAME}")
        if len(frame) < 2:
            raise TruncatedError(f"frame of {len(frame)} bytes has no header")
        version, code = frame[0], frame[1]
        if version != VERSION:
            raise UnknownVersionError(
                f"frame of wire version {version}, this program speaks {VERSION}: install the same "
                "release of secure-fedprompt at both ends"
            )
        if code not in self.types:
            raise UnknownTypeError(f"message type {code} is not in the catalogue")
        return decode_fields(self.types[code], memoryview(frame)[2:])
