"""A client's journal on the disk.

Records are JSON lines; vectors, frames, bases and the key of sums are files beside them, mode 0600.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from secure_fedprompt.clients.journal import MemoryJournal, Record
from secure_fedprompt.clients.record_file import RecordFile
from secure_fedprompt.host.files import replace_private, written
from secure_fedprompt.protocol.errors import ConfigError


class FileJournal(MemoryJournal):
    """The same rules over a ``RecordFile``.

    Raises:
        ConfigError: it is in use, damaged, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._folder = path.parent
        remedy = "restore it from a backup, or give this client a new state_dir and a new key"
        self._file = RecordFile(path, "journal", self._read, remedy)

    def _read(self, line: bytes) -> None:
        super()._apply(json.loads(line))

    def _apply(self, record: Record) -> None:
        self._file.append(json.dumps(record, separators=(",", ":")).encode())
        super()._apply(record)

    def _path(self, name: str) -> Path:
        if not re.fullmatch(r"[a-z]+-[0-9a-f]{32}", name):
            raise ConfigError(f"journal names a file {name!r}: it is damaged")
        return self._folder / "kept" / name

    def _put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with written(path.parent):
            path.parent.mkdir(exist_ok=True, mode=0o700)
        replace_private(path, data)

    def _get(self, name: str) -> bytes | None:
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self._path(name)} cannot be read ({error.strerror})") from None

    def _drop(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()
