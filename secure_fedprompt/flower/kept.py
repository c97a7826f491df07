"""A client's session across calls that share no memory.

Flower calls a ClientApp once for each message, in whichever process. What goes on in between is
kept on a ``Tape``: what came, what training gave, and what was drawn. A session is a function of
these, so it is played again, up to where it was; nothing that it does on the way leaves, and its
journal's later records must be the ones that it writes again. Where they are not (a process was
killed in the middle), or the tape is lost, the client greets anew, as after any restart: its
journal alone decides what it may still do.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from secure_fedprompt.clients.file_journal import FileJournal
from secure_fedprompt.clients.journal import MemoryJournal, Record
from secure_fedprompt.clients.ledger import Ledger, Upload
from secure_fedprompt.protocol.averaging import Prompt, prompt_bytes
from secure_fedprompt.protocol.errors import BudgetError, FieldError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.plan import RoundPlan

MAX_PART = 1 << 30  # bytes


class TapeError(Exception):
    """What was kept is not how the journal says it went: begin anew."""


class Step(msgspec.Struct, array_like=True):
    """One thing that happened: a frame came, or training ended, well or not.

    Attributes:
        kind: "frame", "trained" or "failed".
        data: the frame, or float32 values. weight: of the update.
    """

    kind: str
    data: bytes = b""
    weight: float = 0.0


class Part(msgspec.Struct):
    """How a run was joined, or the round under way.

    Attributes:
        records: of the journal when it began. blobs: what it kept then and has changed since.
        drawn: random bytes. steps: so far. said: digest of the frames that were sent.
        spent: for each upload whether the budget was spent.
        made, number, withdrawn, greetings, greeting: what the session knew when it began; see
            ``session.Idle``.
    """

    records: int
    blobs: dict[str, bytes | None] = msgspec.field(default_factory=dict)
    drawn: bytes = b""
    steps: list[Step] = msgspec.field(default_factory=list)
    said: bytes = b""
    made: bytes = b""
    number: int = 0
    withdrawn: int = 0
    greetings: int = 0
    greeting: bool = False
    spent: list[bool] = msgspec.field(default_factory=list)

    def add(self, step: Step) -> None:
        """Note what happens.

        Raises:
            FieldError: it is more than a round can have.
        """
        if len(step.data) + sum(len(before.data) for before in self.steps) > MAX_PART:
            raise FieldError("the frames of this round are more than a round can have")
        self.steps.append(step)

    def say(self, frames: list[bytes]) -> None:
        """Note what is sent."""
        self.said = digest(Purpose.NODE, self.said, *frames)


class Tape(msgspec.Struct):
    """Secret: only ever beside the client's private data.

    Attributes:
        joining: up to the terms. round: since the last one ended, once there are terms.
    """

    joining: Part
    round: Part | None = None

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Tape:
        """Inverse of ``to_bytes``.

        Raises:
            TapeError
        """
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise TapeError(f"what was kept of a round cannot be read: {error}") from None


class Shelf(Protocol):
    """Where a journal is kept; ``records`` are all of them."""

    records: list[Record]

    def append(self, record: Record) -> None: ...

    def get(self, name: str) -> bytes | None: ...

    def put(self, name: str, data: bytes | None) -> None: ...


class MemoryShelf:
    """In memory, to be kept as bytes: for simulations."""

    def __init__(self, data: bytes = b"") -> None:
        lines, blobs = msgspec.msgpack.decode(data) if data else ([], {})
        self.records: list[Record] = [json.loads(line) for line in lines]
        self._blobs: dict[str, bytes] = blobs

    def to_bytes(self) -> bytes:
        lines = [json.dumps(record, separators=(",", ":")) for record in self.records]
        return msgspec.msgpack.encode((lines, self._blobs))

    def append(self, record: Record) -> None:
        self.records.append(record)

    def get(self, name: str) -> bytes | None:
        return self._blobs.get(name)

    def put(self, name: str, data: bytes | None) -> None:
        if data is None:
            self._blobs.pop(name, None)
        else:
            self._blobs[name] = data


class FileShelf(FileJournal):
    """The journal on the disk; its rules are applied by who plays."""

    def __init__(self, path: Path) -> None:
        self.records: list[Record] = []
        super().__init__(path)

    def _read(self, line: bytes) -> None:
        super()._read(line)
        self.records.append(json.loads(line))

    def append(self, record: Record) -> None:
        self._apply(record)
        self.records.append(record)

    def get(self, name: str) -> bytes | None:
        return self._get(name)

    def put(self, name: str, data: bytes | None) -> None:
        if data is None:
            self._drop(name)
        else:
            self._put(name, data)


class PlayedJournal(MemoryJournal):
    """The rules of a journal, played part by part; what follows ``live`` is durable.

    Raises:
        TapeError: it goes another way than the shelf says.
    """

    def __init__(self, shelf: Shelf, part: Part) -> None:
        super().__init__()
        self._shelf, self._live, self._at = shelf, False, 0
        self._parts: tuple[Part, ...] = ()
        self.begin(part)

    def begin(self, part: Part) -> None:
        """Go to where a part began."""
        if not self._at <= part.records <= len(self._shelf.records):
            raise TapeError("the journal has lost records")
        for record in self._shelf.records[self._at : part.records]:
            super()._apply(record)
        self._parts, self._at = (*self._parts, part), part.records
        self._now: dict[str, bytes | None] = {}  # written since

    def live(self) -> None:
        """What was played is all that was done."""
        if self._at != len(self._shelf.records):
            raise TapeError("the journal has records of a step that was not kept")
        self._live = True

    def _apply(self, record: Record) -> None:
        if self._live:
            super()._apply(record)
            self._shelf.append(record)
        elif self._shelf.records[self._at : self._at + 1] == [record]:
            super()._apply(record)
        else:
            raise TapeError("the journal tells another story than what was kept of the round")
        self._at += 1

    def _get(self, name: str) -> bytes | None:
        for kept in (self._now, self._parts[-1].blobs):
            if name in kept:
                return kept[name]
        return self._shelf.get(name)

    def _write(self, name: str, data: bytes | None) -> None:
        if self._live:
            for part in self._parts:
                part.blobs.setdefault(name, self._shelf.get(name))
            self._shelf.put(name, data)
        self._now[name] = data

    def _put(self, name: str, data: bytes) -> None:
        self._write(name, data)

    def _drop(self, name: str) -> None:
        self._write(name, None)


class SimulatedJournal(PlayedJournal):
    """Where all runs are one's own no prompt is compared with earlier ones, nor kept for longer
    than its round: what is kept crosses processes with every message."""

    def note_base(
        self,
        plan: RoundPlan,
        prompts: Sequence[Prompt],
        tolerance: float,
        bounds: bytes,
        *,
        wide: bool = False,
        accepted: bool = False,
    ) -> set[bytes]:
        self._put("base-now", plan.base_digest + prompt_bytes(prompts[0]))
        return set()

    def _near_to(self, run: str, base: str) -> set[str]:
        return {base} & set(self._bases)

    def counted_lists(self, run: bytes) -> list[tuple[str, ...]]:
        return []

    def base(self, plan: RoundPlan) -> Prompt | None:
        data = self._get("base-now") or b""
        return np.frombuffer(data[32:], "<f4") if data.startswith(plan.base_digest) else None


class PlayedLedger(Ledger):
    """Counts on the disk what is new, and nothing that is played again."""

    def __init__(self, durable: Ledger, part: Part) -> None:
        super().__init__()
        self._durable, self.live = durable, False
        self.begin(part)

    def begin(self, part: Part) -> None:
        self._part, self._at = part, 0

    def release(self, upload: Upload, limit: float, delta: float) -> None:
        if self.live:
            try:
                self._durable.release(upload, limit, delta)
            except BudgetError:
                self._part.spent.append(True)
                raise
            self._part.spent.append(False)
            return
        self._at += 1
        if self._part.spent[self._at - 1]:
            raise BudgetError("the budget was spent when this was sent")

    def rho(self, runs: Callable[[str], bool] = lambda run: True) -> float:
        """Nothing while it is played: terms that were accepted are not judged again."""
        return self._durable.rho(runs) if self.live else 0.0


class Drawn:
    """Random bytes: those of a part again, then fresh ones, which it keeps."""

    def __init__(self, part: Part, fresh: Callable[[int], bytes] = os.urandom) -> None:
        self._fresh = fresh
        self.begin(part)

    def begin(self, part: Part) -> None:
        self._part, self._at = part, 0

    def __call__(self, count: int) -> bytes:
        missing = self._at + count - len(self._part.drawn)
        if missing > 0:
            self._part.drawn += self._fresh(missing)
        drawn = self._part.drawn[self._at : self._at + count]
        self._at += count
        return drawn

    def check(self) -> None:
        """Raises TapeError if less was drawn than the part holds."""
        if self._at != len(self._part.drawn):
            raise TapeError("less was drawn than the last time")


def check_said(played: bytes, kept: bytes) -> None:
    """Raises TapeError if other frames were made than those that were sent."""
    if not hmac.compare_digest(played, kept):
        raise TapeError("other frames than those that were sent")
