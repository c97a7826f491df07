"""``secure-fedprompt audit`` and ``audit-diff``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from secure_fedprompt.audit import summary
from secure_fedprompt.audit.findings import noted
from secure_fedprompt.audit.log import Log
from secure_fedprompt.audit.private import Private
from secure_fedprompt.host import command, files
from secure_fedprompt.protocol.errors import (
    AuditError,
    SecureFedPromptError,
    UnfinishedLogError,
)

EXAMPLES = """\
  secure-fedprompt audit runs/monday                                  # the server's log
  secure-fedprompt audit state/alice --peer runs/monday               # hold both ends together
  secure-fedprompt audit state/alice --secrets state/alice/private-record-1a2b3c4d.jsonl
  secure-fedprompt audit runs/monday --format sarif > audit.sarif"""


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(
        "secure-fedprompt audit",
        "Check the audit log of a server, client or helper: its hash chain, the signed heads that "
        "others hold, every message against the catalogue and the plan, protected payloads, and "
        "whether the run kept the promises of its row in 'who learns what'. The exit code is 0 "
        "only if nothing failed, and 13 if nothing failed so far but the log has no end. Whole "
        "payloads are only there with audit = 'full'.",
        EXAMPLES,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run_dir or state_dir")
    parser.add_argument(
        "--peer", type=Path, action="append", default=[], metavar="RUN",
        help="log of another end of the same run; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--roster", metavar="FILE",
        help="the federation's roster, from a source that you trust: the logs' keys must be its",
    )  # fmt: skip
    parser.add_argument(
        "--run", default="", metavar="ID",
        help="judge this run, and only mention others of the log; by default the last is judged in "
        "full, and no other may have broken its promises",
    )  # fmt: skip
    parser.add_argument(
        "--secrets", type=Path, metavar="FILE",
        help="a client's private record (private_record = true): look for its values on the wire",
    )  # fmt: skip
    parser.add_argument("--format", choices=("table", "json", "sarif"), default="table",
                        help="of what is printed")  # fmt: skip
    args = parser.parse_args(argv)
    return command.guard(lambda: _audit(args), args)


def _audit(args: argparse.Namespace) -> int:
    private = Private.read(args.secrets) if args.secrets else None
    roster = files.read_roster(args.roster) if args.roster else None
    with _judged():
        log, *peers = [Log.read(path) for path in (args.run_dir, *args.peer)]
        result = summary.audit(log, peers, args.run, private, roster)
        _print(args.format, result)
    command.write_json(args.json, "audit-result", summary.as_json(result))
    first = next(iter(result.findings), noted("chain", "", "nothing to say"))
    if not result.kept:
        raise AuditError(f"[{first.check}] {first.where}: {first.text}")
    if not result.finished:
        raise UnfinishedLogError(f"{first.where}: {first.text}; kept so far")
    return 0


@contextlib.contextmanager
def _judged() -> Iterator[None]:
    """Whatever a crafted log provokes is one line, and no acquittal."""
    try:
        yield
    except SecureFedPromptError:
        raise
    except Exception as error:
        raise AuditError(f"a log could not be judged: {type(error).__name__}: {error}") from error


def _print(form: str, result: summary.Audit) -> None:
    if form == "table":
        summary.show(Console(highlight=False), result)
        return
    if form == "json":
        print(command.as_json("audit-result", summary.as_json(result)), end="")
        return
    json.dump(summary.as_sarif(result), sys.stdout, indent=1, default=str)
    print()


def audit_diff(argv: list[str] | None = None) -> int:
    parser = command.parser(
        "secure-fedprompt audit-diff",
        "Two audit logs side by side: what each sends, how much, and which checks differ. The "
        "exit code is 0 if both keep their promises.",
        "  secure-fedprompt audit-diff runs/monday runs/tuesday\n"
        "  secure-fedprompt audit-diff runs/masks runs/bfv --format json",
    )
    parser.add_argument("first", type=Path, metavar="A", help="run_dir or state_dir")
    parser.add_argument("second", type=Path, metavar="B", help="the same of the other run")
    parser.add_argument("--format", choices=("table", "json"), default="table",
                        help="of what is printed")  # fmt: skip
    args = parser.parse_args(argv)
    return command.guard(lambda: _diff(args), args)


def _diff(args: argparse.Namespace) -> int:
    with _judged():
        logs = [Log.read(path) for path in (args.first, args.second)]
        results = [summary.audit(log, [], "", None) for log in logs]
    rows = compare(results)
    if args.format == "json":
        print(command.as_json("audit-diff", rows), end="")
    else:
        table = Table(title=" | ".join(f"{r.protection}, run {r.run[:8]}" for r in results))
        for name in ("message", "way", "A frames", "bytes", "B frames", "bytes", "B - A"):
            table.add_column(name, justify="left" if name in ("message", "way") else "right")
        for row in rows["traffic"]:
            (a, b), apart = row["bytes"], row["bytes"][1] - row["bytes"][0]
            counts = [f"{n:,}" for n in (row["frames"][0], a, row["frames"][1], b)]
            table.add_row(row["type"], row["direction"], *counts, f"{apart:+,}")
        console = Console(highlight=False)
        console.print(table)
        for check, (one, two) in rows["checks"].items():
            console.print(f"{check:15} {one:8} {two:8}" + (" <-" if one != two else ""))
    command.write_json(args.json, "audit-diff", rows)
    if not all(result.kept for result in results):
        raise AuditError("; ".join(summary.verdict(r) for r in results if not r.kept))
    return 0


def compare(results: Sequence[summary.Audit]) -> dict[str, Any]:
    """Two audits, field by field."""
    keys = dict.fromkeys((row.kind, row.way) for r in results for row in r.traffic)
    found = [{(row.kind, row.way): row for row in r.traffic} for r in results]
    traffic = [
        {
            "type": kind, "direction": way,
            "frames": [f[kind, way].frames if (kind, way) in f else 0 for f in found],
            "bytes": [f[kind, way].bytes if (kind, way) in f else 0 for f in found],
        }
        for kind, way in keys
    ]  # fmt: skip
    checks = {k: [r.checks[k] for r in results] for k in results[0].checks}
    return {"traffic": traffic, "checks": checks, "runs": [r.run for r in results],
            "protections": [r.protection for r in results]}  # fmt: skip
