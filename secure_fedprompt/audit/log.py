"""An audit log read back and verified, record by record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import decode_fields
from secure_fedprompt.protocol.errors import CodecError, ConfigError
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.recorder import (
    FORMAT,
    MALFORMED,
    START,
    Record,
    frame_digest,
    link,
    run_and_round,
    segments,
)


@dataclass(frozen=True)
class Entry:
    """A frame record.

    Attributes:
        n: number of the record; at: seconds since 1970.
        way: "in" or "out", as the log's owner saw it; peer: who it came from or went to.
        kind: message type; run: hex, empty if the message names none; round: 0 if it names none.
        size: bytes; digest: BLAKE2b-256, hex.
        place: segment and offset of the frame in the log, or None if it was not kept.
    """

    n: int
    at: float
    way: str
    peer: str
    kind: str
    run: str
    round: int
    size: int
    digest: str
    place: tuple[int, int] | None


@dataclass(frozen=True)
class Fault:
    """What is wrong with a log, and where.

    Attributes:
        where: file and line; record: its number, or -1.
    """

    where: str
    record: int
    what: str


@dataclass
class Log:
    """A log that was read to its end, whatever was found.

    Attributes:
        name, role, mode: of its owner, as the log says.
        roster: name -> (role, identity key in hex).
        entries: the frames, in order.
        faults: what contradicts the chain, with places.
        plans: by run (hex) and round.
        chains: chain before record n, for every n that is there, and after the last.
        first: number of the first record; above 0 if older segments were dropped.
        closed: whether the log ends with a closing record.
        opened: how often a process began to write.
    """

    folder: Path
    name: str = ""
    role: str = ""
    mode: str = ""
    roster: dict[str, tuple[str, str]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    plans: dict[tuple[str, int], RoundPlan] = field(default_factory=dict)
    chains: dict[int, str] = field(default_factory=dict)
    first: int = 0
    closed: bool = False
    opened: int = 0
    torn: bool = False

    @classmethod
    def read(cls, path: Path) -> Log:
        """Read the log in ``path`` or in its folder ``audit``.

        Raises:
            ConfigError: there is none, or it is of another format.
        """
        folder = path if segments(path) else path / "audit"
        numbers = segments(folder)
        if not numbers:
            raise ConfigError(
                f"{path} holds no audit log: name a run_dir, a state_dir or their folder 'audit', "
                "of a run with audit = 'headers' or 'full'"
            )
        log = cls(folder)
        _Reader(log).read(numbers)
        return log

    @property
    def runs(self) -> list[str]:
        """Runs that the frames name, in order."""
        return list(dict.fromkeys(entry.run for entry in self.entries if entry.run))

    def frame(self, entry: Entry) -> bytes | None:
        """The bytes of a frame, or None if they were not kept. They are as the file has them."""
        if entry.place is None:
            return None
        segment, offset = entry.place
        try:
            with (self.folder / f"frames-{segment:04d}.bin").open("rb") as file:
                file.seek(offset)
                return file.read(entry.size)
        except OSError:
            return b""

    def messages(self, run: str = "") -> Iterator[tuple[Entry, m.Message]]:
        """Kept frames that decode, of one run or of all."""
        for entry in self.entries:
            frame = self.frame(entry) if not run or entry.run == run else None
            if frame and entry.kind != MALFORMED:
                try:
                    yield entry, m.CATALOGUE.decode(frame)
                except CodecError:
                    continue

    def check_frames(self) -> None:
        """Hold every kept frame against its record; what differs goes to ``faults``."""
        for entry in self.entries:
            frame = self.frame(entry)
            if frame is None or entry.place is None:
                continue
            where = f"frames-{entry.place[0]:04d}.bin, byte {entry.place[1]}"
            if frame_digest(frame) != entry.digest:
                what = f"frame of record {entry.n} ({entry.kind}) is not the one recorded"
                self.faults.append(Fault(where, entry.n, what))
                continue
            says = entry.kind, entry.run, entry.round
            if (found := _described(frame)) != says:
                what = f"frame of record {entry.n} is {found}, the record says {says}"
                self.faults.append(Fault(where, entry.n, what))


def _described(frame: bytes) -> tuple[str, str, int]:
    """Type, run and round of a frame."""
    try:
        message: m.Message = m.CATALOGUE.decode(frame)
    except CodecError:
        return MALFORMED, "", 0
    run, number = run_and_round(message)
    return type(message).__name__, run.hex(), number


class _Reader:
    """Walks the lines of a log, and says where it stops making sense."""

    def __init__(self, log: Log) -> None:
        self.log, self.chain, self.next = log, START, 0
        self.dropped = -1  # segments up to this one

    def read(self, numbers: list[int]) -> None:
        log = self.log
        for segment in numbers:
            name = f"audit-{segment:04d}.jsonl"
            data = (log.folder / name).read_bytes()
            *lines, rest = data.split(b"\n")
            for number, line in enumerate(lines, start=1):
                self._line(line, segment, f"{name}, line {number}")
            log.torn = bool(rest)
            if rest and segment != numbers[-1]:
                log.faults.append(Fault(name, self.next, "the segment ends within a record"))
        log.chains[self.next] = self.chain.hex()
        missing = set(range(self.dropped + 1, numbers[-1])) - set(numbers)
        for segment in sorted(missing):
            what = f"segment {segment} is missing and no record says that it was dropped"
            log.faults.append(Fault(f"audit-{segment:04d}.jsonl", -1, what))

    def _line(self, line: bytes, segment: int, where: str) -> None:
        log = self.log
        text, _, stored = line.partition(b"\t")
        record = _parse(text)
        if record is None:
            log.faults.append(Fault(where, self.next, "not a record"))
            self.next += 1
            return
        n = record["n"]
        if record["kind"] == "segment" and not log.chains:  # earlier ones were dropped
            self.chain, self.next, log.first = bytes.fromhex(record["previous"]), n, n
        chain = link(self.chain, text)
        if n != self.next:
            what = (
                f"records {self.next} to {n - 1} are missing"
                if n > self.next
                else f"record {n} comes after record {self.next - 1}: moved or added"
            )
            log.faults.append(Fault(where, n, what))
        elif chain.hex().encode() != stored:
            log.faults.append(Fault(where, n, f"record {n} or its chain value was altered"))
        log.chains[n] = self.chain.hex()
        try:
            self.chain = bytes.fromhex(stored.decode())
        except ValueError:
            self.chain = chain
        self.next = n + 1
        try:
            self._take(record, segment)
        except (KeyError, TypeError, ValueError, CodecError) as error:
            log.faults.append(Fault(where, n, f"record {n} lacks or garbles the field {error}"))

    def _take(self, record: Record, segment: int) -> None:
        log = self.log
        log.closed = record["kind"] == "close"
        match record["kind"]:
            case "open" | "segment":
                if record["format"] != FORMAT:
                    raise ConfigError(
                        f"audit log {log.folder} is of format {record['format']!r}; this program "
                        f"reads {FORMAT!r}"
                    )
                log.name, log.role, log.mode = (str(record[k]) for k in ("name", "role", "mode"))
                log.roster = {
                    str(x["name"]): (str(x["role"]), str(x["identity"])) for x in record["roster"]
                }
                log.opened += record["kind"] == "open"
            case "frame":
                place = (segment, int(record["offset"])) if "offset" in record else None
                log.entries.append(Entry(
                    record["n"], float(record["at"]), str(record["way"]), str(record["peer"]),
                    str(record["type"]), str(record["run"]), int(record["round"]),
                    int(record["size"]), str(record["digest"]), place,
                ))  # fmt: skip
            case "plan":
                plan = decode_fields(RoundPlan, bytes.fromhex(record["plan"]))
                log.plans[plan.run.hex(), plan.round] = plan
            case "dropped":
                self.dropped = max(self.dropped, int(record["segment"]))


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    sound = isinstance(record, dict) and isinstance(record.get("n"), int) and "kind" in record
    return record if sound else None
