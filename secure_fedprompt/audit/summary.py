"""An audit as a whole: checks, findings and traffic by message type; as table, JSON or SARIF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from secure_fedprompt import __version__
from secure_fedprompt.audit.compare import check_log, check_pair
from secure_fedprompt.audit.fields import TYPES, expected_size, in_the_clear, protected
from secure_fedprompt.audit.findings import CHECKS, Finding, Level, collapsed, failed, noted, warned
from secure_fedprompt.audit.log import Log
from secure_fedprompt.audit.private import Private, check_private
from secure_fedprompt.audit.promises import check_pooled, check_promises, row_of
from secure_fedprompt.protocol.errors import ConfigError, SecureFedPromptError
from secure_fedprompt.protocol.roster import Roster

_SARIF = {Level.FAIL: "error", Level.OPEN: "warning", Level.WARN: "warning", Level.NOTE: "note"}
COLOURS = {Level.FAIL: "red", Level.OPEN: "yellow", Level.WARN: "yellow", Level.NOTE: "dim"}


@dataclass
class Traffic:
    """Frames of one type in one direction.

    Attributes:
        expected: bytes that the plans allow for, in rounds without dropouts; None if unknown.
        clear, hidden: fields in the clear, and protected ones with what protects them.
    """

    kind: str
    way: str
    frames: int = 0
    bytes: int = 0
    expected: int | None = 0
    clear: tuple[str, ...] = ()
    hidden: dict[str, str] = field(default_factory=dict)


@dataclass
class Audit:
    """What was checked, and what was found.

    Attributes:
        logs: owners of the logs, the audited one first.
        checks: "pass", "fail", "open", "warn" or "not run", by check.
    """

    run: str
    logs: list[str]
    protection: str
    traffic: list[Traffic]
    checks: dict[str, str]
    findings: list[Finding]

    @property
    def kept(self) -> bool:
        """Whether nothing failed."""
        return "fail" not in self.checks.values()

    @property
    def finished(self) -> bool:
        """Whether the record has an end."""
        return "open" not in self.checks.values()


def audit(
    log: Log,
    peers: Sequence[Log],
    run: str,
    private: Private | None,
    roster: Roster | None = None,
) -> Audit:
    """Check one run in one log, against the logs of other ends if they are given.

    Args:
        run: first digits of its id; empty for the last, and then no other run of the log may have
            broken its promises either.
        private: what a client alone knows, to look for it.
        roster: the federation's, from another source than the logs.

    Raises:
        ConfigError: the log does not hold the run.
    """
    runs, named = log.runs, bool(run)
    chosen = [r for r in runs if r.startswith(run)] if run else runs[-1:]
    if len(chosen) != 1:
        raise ConfigError(
            f"--run {run!r}: the log of {log.name or log.folder} holds "
            f"{', '.join(r[:8] for r in runs) or 'no run'}"
        )
    (run,) = chosen
    findings: list[Finding] = []
    whole = log.kept(run)
    ran = {"chain", "heads", "catalogue", "plans", "terms", "protection"}
    ran |= {"frames", "keys"} if whole else set()
    for one in (log, *peers):
        findings += check_log(one, run)
        if run in one.runs:
            findings += check_promises(one, run)
        else:
            findings.append(failed("cross-check", one.name, f"the log does not hold run {run[:8]}"))
    for server, other in _pairs([log, *peers]):
        findings += check_pair(server, other, run)
        ran.add("cross-check")
    if whole and any(f.check == "uniformity" and "tests of" in f.text for f in findings):
        ran.add("uniformity")
    findings += _against(roster, [log, *peers], run) if roster is not None else ()
    if not peers:
        text = "one log alone is internally consistent at best: --peer holds it against another end"
        findings.append(noted("cross-check", log.name, text))
    findings += check_pooled([log, *peers])
    for one in (log, *peers):
        findings += _other_runs(one, run, named)
    findings += row_of(log, run)
    if private is not None:
        ran.add("private values")
        for one in (log, *peers):
            findings += check_private(one, private)
    checks = {}
    for check in CHECKS:
        levels = {finding.level for finding in findings if finding.check == check}
        passed = "pass" if whole or check not in _BY_LABEL else "labels only"
        checks[check] = next(
            (str(level) for level in (Level.FAIL, Level.OPEN, Level.WARN) if level in levels),
            passed if check in ran else "not run",
        )
    order = list(Level)
    findings.sort(key=lambda finding: order.index(finding.level))
    plans = [plan for (of, _), plan in log.plans.items() if of == run]
    protection = plans[-1].protection if plans else ""
    return Audit(run, [x.name for x in (log, *peers)], protection, traffic(log, run), checks,
                 findings)  # fmt: skip


_BY_LABEL = ("catalogue", "plans", "terms", "protection")


def _other_runs(log: Log, run: str, named: bool) -> Iterator[Finding]:
    """Nothing that crossed the wire goes unmentioned: the log's other runs are judged as well."""
    for other in log.runs:
        if other == run:
            continue
        broken = [f for f in check_promises(log, other) if f.level is Level.FAIL]
        plans = [plan for (of, _), plan in log.plans.items() if of == other]
        under = f"under {plans[-1].protection}" if plans else "without a plan"
        where = f"{log.name}: run {other[:8]}"
        if not broken:
            yield noted("protection", where, f"another run of this log, {under}: kept, by itself")
            continue
        text = f"another run of this log, {under}: NOT KEPT ({broken[0].text})"
        yield (warned if named and plans else failed)("protection", where, text)


def _pairs(logs: Sequence[Log]) -> list[tuple[Log, Log]]:
    """The server's log with each of the others.

    Raises:
        ConfigError: two logs of one owner, or none of the server.
    """
    names = [log.name for log in logs]
    if len(set(names)) < len(names):
        raise ConfigError(f"--peer: two logs of one owner ({', '.join(names)})")
    servers = [log for log in logs if log.role == "server"]
    if len(logs) > 1 and len(servers) != 1:
        raise ConfigError(
            f"--peer: {', '.join(names)} do not talk to each other; one log must be the server's"
        )
    return [(server, log) for server in servers for log in logs if log is not server]


def _against(roster: Roster, logs: Sequence[Log], run: str) -> list[Finding]:
    """The rosters that the logs name, against one that the auditor trusts."""
    trusted = {x.name: (x.role, x.identity.hex()) for x in roster.members}
    text = "its roster is not the one that was given"
    return [failed("heads", log.name, text) for log in logs if log.rosters.get(run) != trusted]


def traffic(log: Log, run: str) -> list[Traffic]:
    """Frames of a run, and of no run, by type and direction; the largest first."""
    rows: dict[tuple[str, str], Traffic] = {}
    for entry in log.entries:
        if entry.run not in ("", run):
            continue
        row = rows.setdefault((entry.kind, entry.way), Traffic(entry.kind, entry.way))
        row.frames += 1
        row.bytes += entry.size
        plan = log.plans.get((run, entry.round))
        client = entry.peer if log.role == "server" else log.name
        expected = None
        if entry.kind in TYPES:
            try:
                expected = expected_size(TYPES[entry.kind], plan, client)
            except SecureFedPromptError:  # no TenSEAL here
                expected = None
        unknown = row.expected is None or expected is None
        row.expected = None if unknown else (row.expected or 0) + (expected or 0)
    some = next((plan for (of, _), plan in log.plans.items() if of == run), None)
    for entry, message in log.messages():
        if entry.run in ("", run):
            row = rows[entry.kind, entry.way]
            plan = log.plans.get((run, entry.round)) or some
            row.hidden = row.hidden | protected(message, plan)
            row.clear = tuple(n for n in in_the_clear(message, plan) if n not in row.hidden)
    return sorted(rows.values(), key=lambda row: -row.bytes)


# -- shown -----------------------------------------------------------------------------------------


def show(console: Console, result: Audit) -> None:
    """Tables for people."""
    table = Table(title=f"run {result.run[:8]} in the log of {result.logs[0]}")
    for name in ("message", "way", "frames", "bytes", "without dropouts", "difference"):
        table.add_column(name, justify="left" if name in ("message", "way") else "right")
    for row in result.traffic:
        expected = "" if row.expected is None else f"{row.expected:,}"
        apart = "" if row.expected is None else f"{row.bytes - row.expected:+,}"
        counts = f"{row.frames:,}", f"{row.bytes:,}", expected, apart
        table.add_row(row.kind, row.way, *counts)
    console.print(table)
    text = "by the plan: sizes in rounds without dropouts, ciphertexts before compression"
    console.print(text, style="dim", soft_wrap=True)
    for row in sorted({row.kind: row for row in result.traffic}.values(), key=lambda r: r.kind):
        hidden = "".join(f"; [green]{k}[/] under {v}" for k, v in row.hidden.items())
        clear = f"in the clear {', '.join(row.clear) or 'nothing'}"
        if row.clear or row.hidden:
            console.print(f"[bold]{row.kind}[/]: {clear}{hidden}", soft_wrap=True)
    for check, state in result.checks.items():
        colour = {"pass": "green", "fail": "red", "open": "yellow", "warn": "yellow"}.get(
            state, "dim"
        )
        console.print(f"[{colour}]{state:8}[/] {check:15} {CHECKS[check]}", soft_wrap=True)
    for finding in collapsed(result.findings):
        colour = COLOURS[finding.level]
        where = f"{finding.where}: " if finding.where else ""
        console.print(
            f"[{colour}]{finding.level}[/] {escape(f'[{finding.check}] {where}{finding.text}')}",
            soft_wrap=True,
        )
    colour = "red" if not result.kept else "green" if result.finished else "yellow"
    console.print(verdict(result), style=f"bold {colour}", soft_wrap=True)


def verdict(result: Audit) -> str:
    """One sentence."""
    if not result.kept:
        broken = ", ".join(check for check, state in result.checks.items() if state == "fail")
        return f"NOT KEPT: {broken}"
    alone = "; internally consistent only, since no other end's log was given"
    others = f"; in agreement with {', '.join(result.logs[1:])}"
    labels = "labels only" in result.checks.values()
    seen = ", by the frames' labels only" if labels else ""
    so_far = "" if result.finished else "NOT FINISHED; so far "
    return (
        f"{so_far}kept, as far as this log shows{seen}: the promises of {result.protection}"
        f"{others if len(result.logs) > 1 else alone}"
    )


def as_json(result: Audit) -> dict[str, Any]:
    """Everything, for programs, in the form "audit-result"."""
    rows = [asdict(row) for row in result.traffic]
    traffic = [{"type": row.pop("kind"), "direction": row.pop("way"), **row} for row in rows]
    judged = {"verdict": verdict(result), "kept": result.kept, "finished": result.finished}
    return {**judged, **asdict(result), "traffic": traffic}


def as_sarif(result: Audit) -> dict[str, Any]:
    """SARIF 2.1.0: one rule per check, one result per failure or warning."""
    rules = [
        {"id": check, "shortDescription": {"text": text}} for check, text in CHECKS.items()
    ]  # fmt: skip
    results = [
        {
            "ruleId": finding.check,
            "level": _SARIF[finding.level],
            "message": {"text": finding.text},
            "locations": [
                {"logicalLocations": [{"fullyQualifiedName": finding.where or result.run[:8]}]}
            ],
        }
        for finding in result.findings
    ]
    driver = {"name": "secure-fedprompt", "version": __version__, "rules": rules}
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
