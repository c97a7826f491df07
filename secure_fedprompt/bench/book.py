"""The chapters of the book, and what is on record of them: one JSON file each."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secure_fedprompt.bench import machine
from secure_fedprompt.bench.chapter import Case, Chapter, Row
from secure_fedprompt.protocol.errors import ConfigError

FORMAT = "secure-fedprompt/bench/1"
MODULES = {
    "primitives": "primitives", "masking": "masking", "scale": "scale", "encryption": "encryption",
    "selection": "selection", "training": "training", "rounds": "rounds", "audit-log": "audit_log",
    "flower": "flower",
}  # fmt: skip
CHECKOUT = Path(__file__).parents[2]
OURS = "ours"


def chapter(name: str) -> Chapter:
    """A chapter by its name."""
    found: Chapter = importlib.import_module(f"secure_fedprompt.bench.{MODULES[name]}").CHAPTER
    return found


def benchmarks() -> Path | None:
    """The repository's folder of that name: peers and long experiments; None if only the package
    is installed."""
    folder = CHECKOUT / "benchmarks"
    return folder if (folder / "peers").is_dir() else None


class Record:
    """The rows of a chapter, in a file that is whole at any time.

    Raises:
        ConfigError: there is another file of that name.
    """

    def __init__(self, folder: Path, made: Chapter) -> None:
        self.path, self.chapter = folder / f"{made.name}.json", made
        self.content: dict[str, Any] = {
            "format": FORMAT, "chapter": made.name, "title": made.title,
            "command": f"secure-fedprompt bench --only {made.name}", "machines": {}, "rows": [],
        }  # fmt: skip
        if self.path.exists():
            self.content |= read(self.path)

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.content["rows"]
        return rows

    def row(self, case: Case, by: str) -> Row | None:
        """What is on record of a case."""
        return find(self.rows, case, by)

    def put(self, row: Row, about: Mapping[str, Any]) -> None:
        """Take in a row in the place of an older one, and write the file."""
        old = self.row(row["case"], row["by"])
        if old is not None:
            self.rows.remove(old)
        self.rows.append(row)
        self.rows.sort(key=lambda r: (_ordered(r["case"]), r["by"] != OURS, r["by"]))
        self.content["machines"][row["machine"]] = dict(about)
        used = {r["machine"] for r in self.rows}
        self.content["machines"] = {k: v for k, v in self.content["machines"].items() if k in used}
        self.write()

    def write(self) -> None:
        """Raises:
        ConfigError: it cannot be written.
        """
        partial = self.path.with_suffix(".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self.content, indent=1) + "\n")
            os.replace(partial, self.path)
        except OSError as error:
            raise ConfigError(f"--out: {self.path} cannot be written ({error.strerror})") from None


def _ordered(case: Case) -> list[str]:
    return [f"{value:020.4f}" if isinstance(value, int | float) else value
            for value in case.values()]  # fmt: skip


def find(rows: list[Row], case: Case, by: str) -> Row | None:
    """The row of a case, if it is there."""
    return next((r for r in rows if r["case"] == case and r["by"] == by), None)


def read(path: Path) -> dict[str, Any]:
    """A chapter's file.

    Raises:
        ConfigError: it is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(
            f"{path} is not of the form {FORMAT}: move it away, or give another --out"
        )
    return content


def figures(samples: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Samples as they are kept."""
    return {k: {**machine.spread(v), "count": len(v)} for k, v in samples.items()}
