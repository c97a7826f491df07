"""Append-only records on disk: what a client must not forget, one JSON line each.

Mode 0600, held by one process, synced before each return. A crash can leave one unfinished line at
the end, of a record whose call never returned; it is cut off. Any other damage is refused, since
what was forgotten would be done, or spent, again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from secure_fedprompt.host.files import lock, written
from secure_fedprompt.protocol.errors import ConfigError

T = TypeVar("T")
Decode = Callable[[bytes], T]  # raises ValueError, KeyError, TypeError or AttributeError


def parse(lines: Sequence[bytes], decode: Decode[T], what: str, remedy: str) -> tuple[list[T], int]:
    """Records, and the bytes that they take.

    A last line without its end is a record if it can be read as one: to count it is on the safe
    side, whoever lost its end.

    Args:
        what: the file, as the user reads of it; remedy: what helps if it is damaged.

    Raises:
        ConfigError: a line is no record.
    """
    found, size = list[T](), 0
    for number, line in enumerate(lines, start=1):
        try:
            found.append(decode(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise ConfigError(f"{what}, line {number} is damaged: {remedy}") from None
        size += len(line)
    return found, size


class RecordFile(Generic[T]):
    """The file, open to be written.

    Attributes:
        records: that were in it.

    Raises:
        ConfigError: it is in use, damaged, or cannot be written.
    """

    def __init__(self, path: Path, kind: str, decode: Decode[T], remedy: str) -> None:
        self._kind = kind
        with written(f"state_dir {path.parent}", "choose another"):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            self._file = os.fdopen(descriptor, "r+b")
            os.fchmod(descriptor, 0o600)
            self._sync_folder(path.parent)
        try:
            lock(
                descriptor,
                f"{kind} {path} is in use by another client process: stop it, or use another "
                "state_dir and key",
            )
            lines = self._file.readlines()
            self.records, size = parse(lines, decode, f"{kind} {path}", remedy)
            self._file.seek(size)
            self._file.truncate()
            if size and not b"".join(lines)[:size].endswith(b"\n"):
                self._write(b"\n")
        except ConfigError:
            self._file.close()
            raise

    def _sync_folder(self, folder: Path) -> None:
        """The file's name must last as well."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def append(self, line: bytes) -> None:
        """Add a record; durable on return.

        Raises:
            DiskError: the disk is full or broken; nothing was added.
        """
        self._write(line + b"\n")

    def _write(self, data: bytes) -> None:
        begin = self._file.tell()
        with written(self._kind):
            try:
                self._file.write(data)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.seek(begin)
                    self._file.truncate()
                raise

    def close(self) -> None:
        self._file.close()
