"""A client's memory across crashes: which rounds it entered, uploaded and helped to open."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from secure_fedprompt.protocol.errors import ConfigError, ReplayError, UpdateReusedError
from secure_fedprompt.protocol.locking import lock

Record = dict[str, object]


class MemoryJournal:
    """The rules, without the disk: for simulations and tests."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._uploaded: set[tuple[str, int]] = set()
        self._updates: set[str] = set()
        self._survivors: dict[str, list[tuple[str, ...]]] = {}

    def begin_round(self, run: bytes, round: int) -> None:
        last = self._last.get(run.hex(), 0)
        if round <= last:
            raise ReplayError(
                f"round {round} of run {run.hex()[:8]} is not after round {last}, "
                "which this client has entered already"
            )
        self._apply({"event": "round", "run": run.hex(), "round": round})

    def claim_upload(self, run: bytes, round: int, update: bytes | None) -> None:
        if (run.hex(), round) in self._uploaded:
            raise UpdateReusedError(f"round {round} of run {run.hex()[:8]} was uploaded already")
        digest = update.hex() if update else ""
        if digest and digest in self._updates:
            raise UpdateReusedError("this very update was uploaded before: train again")
        self._apply({"event": "upload", "run": run.hex(), "round": round, "update": digest})

    def record_survivors(self, run: bytes, round: int, survivors: tuple[str, ...]) -> None:
        record = {"event": "survivors", "run": run.hex(), "round": round}
        self._apply({**record, "survivors": list(survivors)})

    def survivor_lists(self, run: bytes) -> Iterable[tuple[str, ...]]:
        return tuple(self._survivors.get(run.hex(), ()))

    def knows(self, run: bytes) -> bool:
        """Whether this client has entered a round of the run before."""
        return run.hex() in self._last

    def _apply(self, record: Record) -> None:
        run, number = str(record["run"]), int(str(record["round"]))
        match record["event"]:
            case "round":
                self._last[run] = number
            case "upload":
                self._uploaded.add((run, number))
                self._updates.add(str(record["update"]))
            case "survivors":
                names = record["survivors"]
                assert isinstance(names, list)
                self._survivors.setdefault(run, []).append(tuple(names))
            case event:
                raise ValueError(f"unknown event {event!r}")


class FileJournal(MemoryJournal):
    """The same rules over an append-only file of JSON lines, synced before each return.

    A crash can leave one unfinished line at the end, of a record whose call never returned; it is
    cut off. Any other damage is refused, since forgetting a round would break the promises.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(
                f"state_dir {path.parent} cannot be written ({error.strerror}): choose another"
            ) from None
        self._file = os.fdopen(descriptor, "r+b")
        try:
            lock(
                descriptor,
                f"journal {path} is in use by another client process: stop it, or use another "
                "state_dir and key",
            )
        except ConfigError:
            self._file.close()
            raise
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                super()._apply(json.loads(line))
            except (ValueError, KeyError, TypeError, AssertionError):
                self._file.close()
                raise ConfigError(
                    f"journal {path}, line {number} is damaged: restore it from a backup, or give "
                    "this client a new state_dir and a new key"
                ) from None
            whole += len(line)
        self._file.seek(whole)
        self._file.truncate()

    def _apply(self, record: Record) -> None:
        begin = self._file.tell()
        try:
            self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.seek(begin)
                self._file.truncate()
            raise ConfigError(
                f"journal cannot be written ({error.strerror}): free the disk"
            ) from None
        super()._apply(record)

    def close(self) -> None:
        self._file.close()
