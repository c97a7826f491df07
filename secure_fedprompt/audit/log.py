"""An audit log read back and verified, record by record."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from secure_fedprompt.audit import records
from secure_fedprompt.host.recorder import (
    MALFORMED,
    START,
    frame_digest,
    link,
    run_and_round,
    segments,
)
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import decode_fields
from secure_fedprompt.protocol.errors import CodecError, ConfigError, SecureFedPromptError
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.terms import RunTerms


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
        name, role: of its owner, as the log says; modes: that it was written in.
        roster: name -> (role, identity key in hex), the last one; rosters: by run, the last one.
        members: by run, who was on its roster at some time; by "", of the whole log.
        steps: run, and number of the record, where a run went on with another roster.
        renewed: run, number of the record, and who had another key from there on, with the old one.
        terms: by run, each with the number of its record.
        entries: the frames, in order.
        faults: what contradicts the chain, with places.
        plans: by run (hex) and round, sound ones only; conflicts: rounds with a second, other one.
        chains: chain before record n, for every n that is there, and after the last.
        first: number of the first record; above 0 if older segments were dropped.
        closed: whether the log ends with a closing record.
        opened: how often a process began to write; cut: bytes of torn lines that were removed then.
        torn: whether the last line is unfinished.
    """

    folder: Path
    name: str = ""
    role: str = ""
    modes: set[str] = field(default_factory=set)
    roster: dict[str, tuple[str, str]] = field(default_factory=dict)
    rosters: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    members: dict[str, dict[str, tuple[str, str]]] = field(default_factory=lambda: {"": {}})
    steps: list[tuple[str, int]] = field(default_factory=list)
    renewed: list[tuple[str, int, str, str]] = field(default_factory=list)
    terms: dict[str, list[tuple[int, RunTerms]]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    plans: dict[tuple[str, int], RoundPlan] = field(default_factory=dict)
    chains: dict[int, str] = field(default_factory=dict)
    first: int = 0
    closed: bool = False
    conflicts: list[tuple[str, int]] = field(default_factory=list)
    opened: int = 0
    cut: int = 0
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

    def kept(self, run: str) -> bool:
        """Whether the log holds every frame of a run, and any at all."""
        frames = [entry for entry in self.entries if entry.run == run]
        return bool(frames) and all(entry.place is not None for entry in frames)

    @property
    def runs(self) -> list[str]:
        """Runs that the frames name, in order."""
        return list(dict.fromkeys(entry.run for entry in self.entries if entry.run))

    def frame(self, entry: Entry) -> bytes | None:
        """The bytes of a frame, or None if they were not kept. They are as the file has them."""
        if entry.place is None:
            return None
        segment, offset = entry.place
        return _content(self.folder / f"frames-{segment:04d}.bin", offset, entry.size)

    def identity(self, run: str, name: str, number: int) -> str:
        """Whose key a member of a run had when a record was written, in hex; empty if none."""
        for of, since, who, before in self.renewed:
            if (of, who) == (run, name) and number < since:
                return before
        return self.members.get(run, {}).get(name, ("", ""))[1]

    def messages(self, run: str = "", kind: str = "") -> Iterator[tuple[Entry, m.Message]]:
        """Kept frames that decode, of one run and one type, or of all."""
        for entry in self.entries:
            wanted = (not run or entry.run == run) and (not kind or entry.kind == kind)
            frame = self.frame(entry) if wanted else None
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
            *lines, rest = _content(log.folder / name).split(b"\n")
            for number, line in enumerate(lines, start=1):
                self._line(line, segment, number, f"{name}, line {number}")
            log.torn = bool(rest)
            if rest and segment != numbers[-1]:
                self._fault(name, self.next, "the segment ends within a record")
        log.chains[self.next] = self.chain.hex()
        if not log.name:
            self._fault("audit-*.jsonl", -1, "no record says whose log this is")
        for before, after in itertools.pairwise([self.dropped, *numbers]):
            if after > max(before, self.dropped) + 1:
                what = f"segments {max(before, self.dropped) + 1} to {after - 1} are missing"
                self._fault(f"audit-{after:04d}.jsonl", -1, what)

    def _fault(self, where: str, record: int, what: str) -> None:
        self.log.faults.append(Fault(where, record, what))

    def _line(self, line: bytes, segment: int, number: int, where: str) -> None:
        log = self.log
        text, _, stored = line.partition(b"\t")
        record = records.parse(text)
        if record is None:
            self._fault(where, self.next, "not a record")
            self.next += 1
            return
        n = record.n
        first = isinstance(record, records.Segment)
        if isinstance(record, records.Segment) and not log.chains and segment:
            self.chain, self.next, log.first = bytes.fromhex(record.previous), n, n
        if first != (number == 1 and segment > 0):
            self._fault(where, n, "a segment begins here that should not, or none where it should")
        if n != self.next:
            what = (
                f"records {self.next} to {n - 1} are missing"
                if n > self.next
                else f"record {n} comes after record {self.next - 1}: moved or added"
            )
            self._fault(where, n, what)
        elif link(self.chain, text).hex().encode() != stored:
            self._fault(where, n, f"record {n} or its chain value was altered")
        log.chains[n] = self.chain.hex()
        self.chain = _chain(stored) or link(self.chain, text)
        self.next = n + 1
        self._take(record, segment, where)

    def _take(self, record: records.Record, segment: int, where: str) -> None:
        log = self.log
        log.closed = isinstance(record, records.Close)
        match record:
            case records.Open() | records.Segment():
                self._owner(record, where)
                if isinstance(record, records.Open):
                    log.opened += 1
                    log.cut += record.cut
                elif record.segment != segment:
                    self._fault(where, record.n, f"segment {record.segment} in another's file")
            case records.Frame():
                if record.run:
                    self._roster(record, where)
                place = None if record.offset is None else (segment, record.offset)
                log.entries.append(Entry(
                    record.n, record.at, record.way, record.peer, record.type, record.run,
                    record.round, record.size, record.digest, place,
                ))  # fmt: skip
            case records.Plan():
                self._plan(record, where)
            case records.Terms():
                self._terms(record, where)
            case records.Dropped():
                self.dropped = max(self.dropped, record.segment)

    def _roster(self, record: records.Frame, where: str) -> None:
        """A run may go on with more members, or fewer, or with new keys of some."""
        log = self.log
        before = log.rosters.get(record.run)
        if before == log.roster:
            return
        log.rosters[record.run] = log.roster
        known = log.members.setdefault(record.run, {})
        for name in sorted(set(known) & set(log.roster)):
            if known[name] != log.roster[name]:
                log.renewed.append((record.run, record.n, name, known[name][1]))
        known.update(log.roster)
        if before is not None:
            log.steps.append((record.run, record.n))

    def _terms(self, record: records.Terms, where: str) -> None:
        try:
            terms = decode_fields(RunTerms, bytes.fromhex(record.terms))
        except (SecureFedPromptError, ValueError) as error:
            self._fault(where, record.n, f"record {record.n} holds no terms: {error}")
            return
        self.log.terms.setdefault(terms.run.hex(), []).append((record.n, terms))

    def _owner(self, record: records.Open | records.Segment, where: str) -> None:
        log = self.log
        roster = {party.name: (party.role, party.identity) for party in record.roster}
        if log.name and (record.name, record.role) != (log.name, log.role):
            self._fault(where, record.n, "the log changes its owner")
        elif record.name not in roster or roster[record.name][0] != record.role:
            self._fault(where, record.n, f"{record.name} is not a {record.role} on its own roster")
        log.name, log.role, log.roster = record.name, record.role, roster
        log.members[""].update(roster)
        log.modes.add(record.mode)

    def _plan(self, record: records.Plan, where: str) -> None:
        log = self.log
        try:
            plan = decode_fields(RoundPlan, bytes.fromhex(record.plan))
            plan.check()
        except (SecureFedPromptError, ValueError) as error:
            self._fault(where, record.n, f"record {record.n} is no sound plan: {error}")
            return
        key = plan.run.hex(), plan.round
        if key in log.plans and log.plans[key].digest != plan.digest:
            log.conflicts.append(key)
        log.plans.setdefault(key, plan)


def _chain(stored: bytes) -> bytes:
    """A chain value, or none."""
    try:
        value = bytes.fromhex(stored.decode())
    except ValueError:
        return b""
    return value if len(value) == 32 else b""


def _content(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """Bytes of a plain file; nothing if it is something else, or not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return b""
        file.seek(offset)
        return file.read(size)
