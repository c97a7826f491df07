"""The audit log: every frame that crosses a socket, hash-chained, in a bounded number of bytes.

A log is a folder of segments. ``audit-NNNN.jsonl`` holds one record per line, ``JSON TAB chain``,
where ``chain = BLAKE2b-256(chain of the record before | JSON)``, 32 zero bytes before the first.
``frames-NNNN.bin`` holds the frames of the same segment: in mode "full" all, else the signed heads
of the other ends. Records:

    open     a process began to write: format, name, role, mode, roster
    frame    way, peer, type, run, round, size, BLAKE2b-256 of the frame, offset if it is kept
    plan     the fields of a round plan, hex, when its first frame passes
    terms    those of a run's terms, likewise
    segment  first of every later segment: as open, with the chain before it
    dropped  segments up to this one were deleted to keep within the limit
    close    the process ended in order

Both ends sign the head of their chain in a ``LogHead`` at the end of each round, so whoever holds
the other end's log can tell if this one was rewritten afterwards. What is in a frame went over the
wire; keys never did.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from secure_fedprompt.host.files import lock, written
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import VERSION, encode_fields
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import Identity, Member
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.transport import Frame

FORMAT = f"secure-fedprompt/audit/2/{VERSION}"  # of records, and of frames
START = bytes(32)
MALFORMED = "malformed"
RECENT = 512  # frames that are kept once if they come again
Record = dict[str, Any]


def link(chain: bytes, text: bytes) -> bytes:
    """The chain after one more record."""
    return hashlib.blake2b(chain + text, digest_size=32).digest()


def frame_digest(frame: bytes | memoryview) -> str:
    return hashlib.blake2b(frame, digest_size=32).hexdigest()


def run_and_round(message: m.Message) -> tuple[bytes, int]:
    """What a message says it belongs to; empty and 0 if it does not."""
    if isinstance(message, m.OfRound):
        return message.run, message.round
    if isinstance(message, m.Plan):
        return message.plan.run, message.plan.round
    return getattr(message, "run", b""), 0


def recorder(
    folder: Path, mode: str, megabytes: int, identity: Identity, member: Member, roster: Roster
) -> Recorder | None:
    """The log that the settings ``audit`` and ``audit_mb`` ask for, below ``folder``."""
    if mode == "off":
        return None
    return Recorder(folder / "audit", mode, megabytes << 20, identity, member, roster)


class Recorder:
    """Appends to the log of one party.

    Args:
        folder: of the log; one that exists is continued.
        mode: "headers", or "full" to keep the frames as well.
        limit: bytes on disk; old segments go first. A frame beyond an eighth of it is not kept.
        identity, member, roster: whose log it is, and who the others are.
        now: seconds since 1970.

    Attributes:
        records, chain: how many there are, and the chain after the last.
        server: name of the server on the roster.

    Raises:
        ConfigError: the folder cannot be written, or holds a damaged log.
    """

    def __init__(
        self,
        folder: Path,
        mode: str,
        limit: int,
        identity: Identity,
        member: Member,
        roster: Roster,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self._full, self._now = folder, mode == "full", now
        self._limit, self._part = limit, limit // 8
        self._identity, self.name = identity, member.name
        self.server = roster.with_role("server")[0].name
        self.records, self.chain, self._segment = 0, START, 0
        self._places: OrderedDict[str, int] = OrderedDict()  # frames that this segment holds
        self._last: tuple[Any, str] = (None, "")  # a broadcast frame and its digest
        self._planned: tuple[tuple[bytes, int], set[bytes]] = (b"", 0), set()  # plans of a round
        self._termed = b""  # digest of the last terms
        self._whole = True  # no record is half written
        self._lines: BinaryIO | None = None
        self._frames: BinaryIO | None = None
        self._begun = 0  # bytes that the first record of the segment takes
        with _named(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder = os.open(folder, os.O_RDONLY)
        try:
            lock(
                self._folder,
                f"audit log {folder} is in use by another process: stop it, or use another folder",
            )
            with _named(folder):
                cut = self._resume()
        except ConfigError:
            os.close(self._folder)
            raise
        members = [
            {"name": x.name, "role": x.role, "identity": x.identity.hex()} for x in roster.members
        ]
        self._about: Record = {"format": FORMAT, "name": member.name, "role": member.role,
                               "mode": mode, "roster": members}  # fmt: skip
        self._write("open", cut=cut, **self._about)
        if not self._begun:
            self._begun = self._held()

    def got(self, peer: str, frame: Frame) -> None:
        """Append a frame that came from a peer."""
        self._record("in", peer, frame)

    def sent(self, peer: str, frame: Frame) -> None:
        """Append a frame that is about to be sent."""
        self._record("out", peer, frame)

    def _record(self, way: str, peer: str, whole: Frame) -> None:
        message, frame = whole.message, whole.data
        run, number = run_and_round(message) if message is not None else (b"", 0)
        kind = type(message).__name__ if message is not None else MALFORMED
        if frame is not self._last[0]:
            self._last = frame, frame_digest(frame)
        size, found = len(frame), self._last[1]
        fields: Record = {"way": way, "peer": peer, "type": kind, "run": run.hex(),
                          "round": number, "size": size, "digest": found}  # fmt: skip
        with _named(self.folder):
            kept = (self._full or isinstance(message, m.LogHead)) and size <= self._part
            self._make_room(size if kept and found not in self._places else 0)
            if kept:
                fields["offset"] = self._keep(found, frame)
        self._write("frame", **fields)
        plan = getattr(message, "plan", None)
        if plan is not None:
            if self._planned[0] != (run, number):
                self._planned = (run, number), set()
            if plan.digest not in self._planned[1]:
                self._planned[1].add(plan.digest)
                self._write("plan", plan=encode_fields(plan).hex())
        if isinstance(message, m.Terms) and message.terms.digest != self._termed:
            self._termed = message.terms.digest
            self._write("terms", terms=encode_fields(message.terms).hex())

    def head(self, message: m.RoundEnd | m.Finish) -> m.LogHead:
        """The signed head of the log at the end of a round, or of the run (round 0)."""
        number = message.round if isinstance(message, m.RoundEnd) else 0
        head = m.LogHead(message.run, number, self.records, self.chain, m.UNSIGNED)
        return m.signed(head, self._identity, Purpose.LOG_HEAD, self.name)

    def close(self) -> None:
        """End the log in order, unless a record was interrupted halfway."""
        if self._lines is not None and self._whole:
            self._write("close")
        try:
            with _named(self.folder):
                self._close_files()
        finally:
            os.close(self._folder)

    # -- writing ---------------------------------------------------------------------------------

    def _write(self, kind: str, **fields: Any) -> None:
        record = {"kind": kind, "n": self.records, "at": round(self._now(), 3), **fields}
        text = json.dumps(record, separators=(",", ":")).encode()
        chain = link(self.chain, text)
        assert self._lines is not None
        self._whole = False
        with _named(self.folder):
            self._lines.write(text + b"\t" + chain.hex().encode() + b"\n")
            self._lines.flush()
        self.chain, self.records, self._whole = chain, self.records + 1, True

    def _keep(self, found: str, frame: Any) -> int:
        """Where the frame is; a broadcast is kept once."""
        if found not in self._places:
            assert self._frames is not None
            self._places[found] = self._frames.tell()
            if len(self._places) > RECENT:  # a broadcast goes to all at once
                self._places.popitem(last=False)
            self._frames.write(frame)
            self._frames.flush()
        return self._places[found]

    def _make_room(self, size: int) -> None:
        if self._held() - self._begun + size <= self._part:
            return
        before = self.chain.hex()
        self._close_files()
        self._segment += 1
        self._open_files()
        self._write("segment", segment=self._segment, previous=before, **self._about)
        self._begun = self._held()
        files = {n: _sizes(self.folder, n) for n in segments(self.folder)}
        for number in sorted(files)[:-1]:
            if sum(files.values()) + self._part <= self._limit:
                break
            files.pop(number)
            self._write("dropped", segment=number)  # first: a file too many is no fault
            for path in _paths(self.folder, number):
                path.unlink(missing_ok=True)

    def _held(self) -> int:
        """Bytes in this segment."""
        assert self._lines is not None
        assert self._frames is not None
        return self._lines.tell() + self._frames.tell()

    def _open_files(self) -> None:
        lines, frames = _paths(self.folder, self._segment)
        self._lines, self._frames = _append(lines), _append(frames)
        self._places = OrderedDict()

    def _close_files(self) -> None:
        with ExitStack() as stack:  # both, whatever the first one says
            for file in (self._lines, self._frames):
                if file is not None:
                    stack.callback(file.close)
            self._lines = self._frames = None

    def _resume(self) -> int:
        """Go on where the folder's last segment ends; bytes of a torn last line that are cut."""
        numbers, data = segments(self.folder), b""
        while numbers:
            data = _paths(self.folder, numbers[-1])[0].read_bytes()
            if b"\n" in data or len(numbers) == 1:
                break
            for path in _paths(self.folder, numbers.pop()):  # killed while it began a segment
                path.unlink(missing_ok=True)
        self._segment = numbers[-1] if numbers else 0
        *lines, left = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            self._begun = self._begun or len(line) + 1
            text, _, chain = line.partition(b"\t")
            form = FORMAT
            try:
                record = json.loads(text)
                if record["kind"] == "segment":
                    self.chain = bytes.fromhex(record["previous"])
                form = str(record.get("format", FORMAT))
                self.chain, self.records = link(self.chain, text), int(record["n"]) + 1
                damaged = self.chain.hex().encode() != chain
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged = True
            if form != FORMAT:
                raise ConfigError(
                    f"audit log {self.folder} was begun by another release (format {form[:64]!a}, "
                    f"this is {FORMAT!r}): move the folder away and keep it, then start again"
                )
            if damaged:
                raise ConfigError(
                    f"audit log {_paths(self.folder, self._segment)[0]} is damaged at line "
                    f"{number}: move the folder away and keep it, then start again"
                )
        if left:
            os.truncate(_paths(self.folder, self._segment)[0], len(data) - len(left))
        self._open_files()
        return len(left)


def _named(folder: Path) -> AbstractContextManager[None]:
    return written(f"audit log {folder}", "free the disk, or set audit = 'off'")


def segments(folder: Path) -> list[int]:
    """Numbers of the segments that are there, in order."""
    found = (re.fullmatch(r"audit-([0-9]{4,9})\.jsonl", p.name) for p in folder.glob("audit-*"))
    numbers = (int(match[1]) for match in found if match)
    return sorted({n for n in numbers if _paths(folder, n)[0].is_file()})


def _paths(folder: Path, segment: int) -> tuple[Path, Path]:
    return folder / f"audit-{segment:04d}.jsonl", folder / f"frames-{segment:04d}.bin"


def _sizes(folder: Path, segment: int) -> int:
    return sum(path.stat().st_size for path in _paths(folder, segment) if path.exists())


def _append(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    file = os.fdopen(descriptor, "ab")
    file.seek(0, os.SEEK_END)
    return file
