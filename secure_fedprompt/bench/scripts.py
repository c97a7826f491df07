"""The long experiments of the repository: scripts that write figures of their own, as the table
``benchmarks/scripts.toml`` lists them.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secure_fedprompt.bench import book, machine
from secure_fedprompt.bench.peers import last_line
from secure_fedprompt.protocol.errors import ConfigError

NOTES = "scripts.json"  # in the folder of results: what ran, on what


@dataclass(frozen=True)
class Script:
    """A program of ``benchmarks``: see the table.

    Attributes:
        photos: data set and CLIP that it wants, or nothing.
    """

    name: str
    words: str
    hours: float
    photos: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        """Its figures, in the folder of results: a script in a folder has them in one as well."""
        return str(Path(self.words.split()[0]).parent / f"{self.name}.json")


def table() -> dict[str, Script]:
    """All of them; empty if only the package is installed."""
    folder = book.benchmarks()
    if folder is None:
        return {}
    content = tomllib.loads((folder / "scripts.toml").read_text())
    return {name: Script(name, row["words"], row["hours"], tuple(row.get("photos", ())))
            for name, row in content.items()}  # fmt: skip


def chosen(only: str) -> list[Script]:
    """Scripts by name.

    Raises:
        ConfigError: there is none of that name.
    """
    asked = [word.strip() for word in only.split(",") if word.strip()]
    known = table()
    if asked and not known:
        raise ConfigError("--scripts: they are in the repository, not in the package")
    if asked == ["all"]:
        return list(known.values())
    if unknown := [word for word in asked if word not in known]:
        raise ConfigError(f"--scripts {unknown[0]}: no such script; there are all, "
                          f"{', '.join(known)}")  # fmt: skip
    return [known[name] for name in asked]


@dataclass
class Running:
    """Runs scripts, and keeps what was run.

    Attributes:
        out: folder of results.
        photos: folder of data sets and models, if there is one.
        again: whether to run those that ran with this code as well.
        say: takes a line of progress.
    """

    out: Path
    photos: Path | None
    again: bool
    say: Callable[[str], None]

    def run(self, scripts: Sequence[Script]) -> list[str]:
        """Run them; one line for each that failed."""
        failed = list[str]()
        for script in scripts:
            if self._ran(script):
                self.say(f"{script.name}: ran with this code: kept")
            elif missing := self._missing(script):
                failed.append(f"{script.name}: --photos wants a folder with {missing}")
                self.say(f"{failed[-1]}: left out")
            elif said := self._one(script):
                failed.append(f"{script.name}: {said}")
                self.say(f"    FAILED: {said}")
        return failed

    def _missing(self, script: Script) -> str:
        gone = [x for x in script.photos if self.photos is None or not (self.photos / x).exists()]
        return " and ".join(gone)

    def _ran(self, script: Script) -> bool:
        noted = self._notes().get(script.name, {}).get("code") == self._code()
        return noted and (self.out / script.result).exists() and not self.again

    def _one(self, script: Script) -> str:
        """Run one; its last line, if it failed."""
        path = self.out / script.result
        first, *flags = shlex.split(script.words)
        words = [sys.executable, str(book.CHECKOUT / "benchmarks" / first), *flags]
        words += ["--json", str(path.absolute())]
        if script.photos and self.photos is not None:
            data, model = (str((self.photos / one).absolute()) for one in script.photos)
            words += ["--dataset", data, "--model", f"local-dir:{model}"]
        log = path.with_name(f"{path.name}.log")
        self.say(f"{script.name}: about {60 * script.hours:.0f} min; what it says is in {log}")
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        with log.open("w") as file:
            done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            return last_line(log.read_text())
        seconds = round(time.monotonic() - begin)
        log.unlink()
        self._note(script, {"seconds": seconds, "machine": machine.describe()})
        self.say(f"    {seconds} s")
        return ""

    @staticmethod
    def _code() -> str:
        return machine.code_of(book.CHECKOUT / "secure_fedprompt", book.CHECKOUT / "benchmarks")

    def _notes(self) -> dict[str, Any]:
        path = self.out / NOTES
        notes: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return notes

    def _note(self, script: Script, what: Mapping[str, Any]) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        notes = self._notes() | {script.name: {"code": self._code(), "at": at, **what}}
        (self.out / NOTES).write_text(json.dumps(dict(sorted(notes.items())), indent=1) + "\n")
