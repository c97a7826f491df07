"""What a method must not forget between rounds: its private part, in a file of the client's."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file

from secure_fedprompt.clients.methods.base import Method
from secure_fedprompt.host.files import write_tensors, written
from secure_fedprompt.protocol.errors import DataError


class Kept:
    """The private part of a method, by run.

    Args:
        folder: of the file, or None to keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._restored = folder, b""

    def path(self, run: bytes) -> Path | None:
        """Where it is, if it is kept."""
        return self._folder / f"private-{run.hex()[:8]}.safetensors" if self._folder else None

    def restore(self, method: Method, run: bytes) -> None:
        """Give back what was kept of this run before a restart, once.

        Raises:
            DataError: the file is of no use.
        """
        path = self.path(run)
        if self._restored == run or path is None or not path.exists():
            return
        try:
            method.restore(load_file(path))
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            line = str(error).splitlines()[0]
            raise DataError(f"{path} cannot be used: {line}; remove it to start afresh") from None
        self._restored = run

    def save(self, method: Method, run: bytes) -> None:
        """Keep it."""
        path, arrays = self.path(run), method.private()
        if path is None or not arrays:
            return
        with written(path):
            write_tensors(path, arrays, mode=0o600)
        self._restored = run
