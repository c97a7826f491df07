"""Measures chapters case by case; each row is on record before the next case begins."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secure_fedprompt.bench import book, machine, peers
from secure_fedprompt.bench.book import OURS, Record
from secure_fedprompt.bench.chapter import Case, Chapter, Row, Samples
from secure_fedprompt.protocol.errors import ConfigError, SecureFedPromptError
from secure_fedprompt.protocol.messages import line

QUICK_REPEAT = 3


@dataclass(frozen=True)
class Job:
    """A case for one system."""

    chapter: Chapter
    case: Case
    by: str


@dataclass
class Runner:
    """What to measure, and where it goes.

    Attributes:
        out: folder of the records.
        quick: the small cases, few times.
        repeat: 0 for what each chapter says.
        peers: folder of their environments, or None to leave them out.
        again: whether to measure what is on record already.
        say: takes a line of progress.
    """

    out: Path
    quick: bool
    repeat: int
    peers: Path | None
    again: bool
    say: Callable[[str], None]

    def run(self, names: Sequence[str]) -> list[str]:
        """Measure what is not on record; one line for each case that failed."""
        self._about, failed = machine.describe(), list[str]()
        self._machine = machine.short(self._about)
        self._code = machine.code_of(book.CHECKOUT / "secure_fedprompt")
        chapters = [book.chapter(name) for name in names]
        records = {made.name: Record(self.out, made) for made in chapters}
        jobs = [job for made in chapters for job in self._jobs(made)]
        todo = [job for job in jobs if self.again or not self._kept(records, job)]
        if len(todo) < len(jobs):
            self.say(f"{len(jobs) - len(todo)} of {len(jobs)} cases are on record in {self.out}, "
                     "of this code on this machine: kept (--again measures them too)")  # fmt: skip
        for number, job in enumerate(todo, 1):
            name = f"[{number}/{len(todo)}] {job.chapter.name}: {self.words(job)}"
            left = self._left(records, todo[number - 1 :])
            self.say(f"{name} ...{left}")
            try:
                row = self._row(job)
            except SecureFedPromptError as error:
                failed.append(f"{job.chapter.name}, {self.words(job)}: {error}")
            except Exception as error:
                failed.append(f"{job.chapter.name}, {self.words(job)}: {line(error)}")
            else:
                records[job.chapter.name].put(row, self._about)
                self.say(f"    {shown(job.chapter, row)}   {row['seconds']:.1f} s")
                continue
            self.say(f"    FAILED: {failed[-1]}")
        return failed

    def _jobs(self, made: Chapter) -> Iterator[Job]:
        for case in made.cases(self.quick):
            if made.measure is not None:
                yield Job(made, case, OURS)
            if self.peers is not None:
                yield from (
                    Job(made, case, name) for name, runs in made.peers.items() if runs(case)
                )

    def _kept(self, records: dict[str, Record], job: Job) -> bool:
        row = records[job.chapter.name].row(job.case, job.by)
        return row is not None and row["machine"] == self._machine and (
            row["code"] == self._code or job.by != OURS) and (
            row["repeat"] >= self._times(job.chapter))  # fmt: skip

    def _times(self, made: Chapter) -> int:
        return self.repeat or (min(QUICK_REPEAT, made.repeat) if self.quick else made.repeat)

    def _left(self, records: dict[str, Record], todo: Sequence[Job]) -> str:
        """How long the rest will take, where each of it is on record from before."""
        rows = [records[job.chapter.name].row(job.case, job.by) for job in todo]
        seconds = [row["seconds"] * self._times(job.chapter) / row["repeat"]
                   for job, row in zip(todo, rows, strict=True) if row]  # fmt: skip
        return f" about {sum(seconds) / 60:.0f} min left" if len(seconds) == len(rows) else ""

    def _row(self, job: Job) -> Row:
        """Measure one.

        Raises:
            SecureFedPromptError: a peer cannot be had, or failed.
        """
        repeat, version, measure = self._times(job.chapter), "", job.chapter.measure
        if job.by != OURS:
            assert self.peers is not None
            python = peers.python_of(job.by, self.peers.absolute(), self.say)
            version = peers.version(job.by, python)

            def measure(case: Case, repeat: int) -> Samples:
                return peers.measure(job.by, python, case, repeat)

        assert measure is not None
        others, begin = machine.Others(), time.monotonic()
        samples = measure(job.case, repeat)
        return {
            "case": job.case, "by": job.by, "figures": book.figures(samples), "repeat": repeat,
            "seconds": round(time.monotonic() - begin, 2), "others": others.share(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": self._machine,
            "code": self._code, **({"version": version} if version else {}),
        }  # fmt: skip

    @staticmethod
    def words(job: Job) -> str:
        """A case, for people."""
        parts = [f"{job.chapter.keys.get(k, k)} {v:,}" if isinstance(v, int) else
                 f"{job.chapter.keys.get(k, k)} {v}" for k, v in job.case.items()]  # fmt: skip
        label = "" if job.by == OURS else f" by {peers.PEERS[job.by].label}"
        return ", ".join(parts) + label


def shown(made: Chapter, row: dict[str, Any]) -> str:
    """The figures of a row in one line."""
    return ", ".join(
        f"{column.heading} {digits(row['figures'][column.key]['median'], column.digits)}"
        for column in made.columns if column.key in row["figures"]
    )  # fmt: skip


def digits(value: float, count: int) -> str:
    """A number with so many significant digits, and commas."""
    if value == 0 or abs(value) >= 10 ** (count - 1):
        return f"{value:,.0f}"
    text = f"{value:.{count}g}"
    return text if "e" in text else f"{value:,.{max(0, count - 1 - _magnitude(value))}f}"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def names_of(only: str) -> list[str]:
    """Chapters by name, in the order of the book.

    Raises:
        ConfigError: there is none of that name.
    """
    if not only:
        return list(book.MODULES)
    asked = [word.strip() for word in only.split(",") if word.strip()]
    if unknown := [word for word in asked if word not in book.MODULES]:
        raise ConfigError(f"--only {unknown[0]}: no such chapter; there are "
                          f"{', '.join(book.MODULES)}")  # fmt: skip
    return [name for name in book.MODULES if name in asked]
