"""``secure-fedprompt runs`` and ``export``: what run folders hold, as a table, CSV or Parquet."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from secure_fedprompt import show
from secure_fedprompt.audit import summary as audits
from secure_fedprompt.audit.log import Log
from secure_fedprompt.commands.watch import Watched, look
from secure_fedprompt.host import command
from secure_fedprompt.protocol.errors import ConfigError, SecureFedPromptError
from secure_fedprompt.server.store import open_run

DEPTH = 3  # folders below the one that is named
WIDE = 1000  # columns that a row takes, at most: a narrower terminal wraps rows, not columns
COLUMNS = ("folder", "run", "method", "protection", "round", "learning_round", "outcome", "reason",
           "at", "cohort", "in_sum", "accuracy", "zero_shot", "loss", "bytes_up", "bytes_down",
           "seconds")  # fmt: skip
Row = dict[str, Any]


def runs(argv: list[str]) -> int:
    parser = command.parser(
        "secure-fedprompt runs",
        "List the run folders of a server: what ran, how far it came, how good the prompt is, and "
        "with --audit whether the log keeps every promise.",
        "  secure-fedprompt runs\n  secure-fedprompt runs runs/ --audit --json runs.json",
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER",
                        help="a run_dir, or a folder of some (default: runs)")  # fmt: skip
    parser.add_argument("--audit", action="store_true", help="audit each log; takes longer")
    args = parser.parse_args(argv)
    return command.guard(lambda: _runs(args.folder, args.audit, args.json), args)


def _runs(folder: Path, audit: bool, json_path: str | None) -> int:
    rows = [_line(path, audit) for path in run_folders(folder)]
    table = Table(box=None, pad_edge=False)
    for name in ("folder", "began", "method", "protection", "rounds", "accuracy", "zero-shot",
                 "up, a client", "state", *(["audit"] if audit else [])):  # fmt: skip
        table.add_column(name, no_wrap=True)
    for row in rows:
        accuracy, zero = (f"{x:.1%}" if x is not None else "" for x in
                          (row["accuracy"], row["zero_shot"]))  # fmt: skip
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["at"])) if row["at"] else ""
        table.add_row(
            row["folder"], began, row["method"], row["protection"],
            f"{row['rounds_done']} of {row['learning_rounds']}", accuracy, zero,
            show.size(row["bytes_up"]), row["state"], *([_short(row["verdict"])] if audit else []),
        )  # fmt: skip
    console = Console(highlight=False)
    console.width = WIDE
    console.print(table)
    command.write_json(json_path, "runs", {"run_folders": rows})
    return 0


def run_folders(folder: Path) -> list[Path]:
    """Those that hold a run, by name.

    Raises:
        ConfigError: there is none.
    """
    depths = ("/".join(["*"] * depth + ["run.sqlite"]) for depth in range(DEPTH + 1))
    found = sorted({path.parent for pattern in depths for path in folder.glob(pattern)})
    if not found:
        raise ConfigError(f"{folder} holds no run: name a server's run_dir, or a folder of some")
    return found


def _line(folder: Path, audit: bool) -> Row:
    """A run in one row."""
    state, run, began = _read(folder)
    rounds = state.summary["rounds"]
    done = [row for row in rounds if row["outcome"] == "done"]
    scores = [r["metrics"]["accuracy"] for r in done if "accuracy" in r["metrics"]]
    zero = [r["metrics"]["zero_shot"] for r in done if "zero_shot" in r["metrics"]]
    wanted = state.summary["learning_rounds"]
    return {
        "folder": str(folder),
        "run": run,
        "at": began,
        "method": state.summary["method"],
        "protection": state.summary["protection"],
        "learning_rounds": wanted,
        "rounds_done": sum(row["learning_round"] <= wanted for row in done),
        "accuracy": scores[-1] if scores else None,
        "zero_shot": zero[-1] if zero else None,
        "bytes_up": sum(map(_up, done)),
        "state": state.ended or "unfinished",
        "verdict": _verdict(folder, run) if audit else None,
    }


def _read(folder: Path) -> tuple[Watched, str, float]:
    """What ``watch`` sees, the run's id, and when something happened first.

    Raises:
        ConfigError: the folder's files are damaged.
    """
    with open_run(folder) as db:
        body = db.execute("SELECT body FROM state").fetchone()
        (began,) = db.execute("SELECT MIN(at) FROM events").fetchone()
        run = str(json.loads(body[0])["run"]) if body else ""
    return look(folder), run, float(began or 0.0)


def _up(row: Row) -> float:
    return float(sum(row["bytes"]["up"].values())) / max(1, len(row["cohort"]))


def _verdict(folder: Path, run: str) -> str:
    """What the audit of its log says, in its last line."""
    try:
        return audits.verdict(audits.audit(Log.read(folder), [], run, None))
    except SecureFedPromptError as error:
        return str(error)


def _short(verdict: str) -> str:
    """Of a verdict, what fits a table: its exceptions are told by ``secure-fedprompt audit``."""
    head = "NOT FINISHED; so far "
    so_far = " so far" if verdict.startswith(head) else ""
    if verdict.removeprefix(head).startswith("kept,"):
        return f"kept{so_far}"
    return verdict if verdict.startswith("NOT KEPT") else "not audited"


def export(argv: list[str]) -> int:
    parser = command.parser(
        "secure-fedprompt export",
        "Write the rounds of one or more run folders as a table, a row for each round: CSV, or "
        "Parquet (pip install 'secure-fedprompt[parquet]').",
        "  secure-fedprompt export runs/monday -o monday.csv\n"
        "  secure-fedprompt export runs/ -o all.parquet\n"
        "  secure-fedprompt export runs/monday -o -        # CSV to standard output",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run_dir, or some in one")
    parser.add_argument("-o", "--out", required=True, metavar="FILE",
                        help="ending in .csv or .parquet, or -")  # fmt: skip
    args = parser.parse_args(argv)
    return command.guard(lambda: _export(args.folder, args.out), args)


def _export(folder: Path, out: str) -> int:
    rows = [row for path in run_folders(folder) for row in _rounds(path)]
    if out == command.STDOUT:
        _csv(sys.stdout, rows)
        return 0
    path = Path(out)
    try:
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                _csv(file, rows)
        elif path.suffix == ".parquet":
            _parquet(path, rows)
        else:
            raise ConfigError(f"--out {out}: end it in .csv or .parquet, or give -")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    print(f"{out}: {len(rows)} rounds")
    return 0


def _rounds(folder: Path) -> Iterator[Row]:
    """A row for each round of a run, in the order of ``COLUMNS``."""
    state, run, _ = _read(folder)
    for r in state.summary["rounds"]:
        metrics, count = r["metrics"], max(1, len(r["cohort"]))
        values = (
            str(folder), run, state.summary["method"], state.summary["protection"], r["round"],
            r["learning_round"], r["outcome"], r["reason"], r["at"], len(r["cohort"]),
            len(r["cohort"]) - len(r["dropped"]) if r["outcome"] == "done" else 0,
            metrics.get("accuracy"), metrics.get("zero_shot"), metrics.get("loss"),
            *(sum(r["bytes"][way].values()) / count for way in ("up", "down")),
            sum(r["seconds"].values()),
        )  # fmt: skip
        yield dict(zip(COLUMNS, values, strict=True))


def _csv(file: Any, rows: Sequence[Row]) -> None:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _parquet(path: Path, rows: Sequence[Row]) -> None:
    """
    Raises:
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            "Parquet needs pyarrow: pip install 'secure-fedprompt[parquet]', or write .csv"
        ) from None
    table = pyarrow.table({name: [row[name] for row in rows] for name in COLUMNS})
    parquet.write_table(table, path)
