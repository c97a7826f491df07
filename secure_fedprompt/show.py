"""How a finished run is shown: the table of rounds, and what the server saw."""

from __future__ import annotations

import itertools
from typing import Any

from rich.console import Console
from rich.table import Table

from secure_fedprompt.protocol.protections import facts_of

Summary = dict[str, Any]
FEW = 5  # names


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count:.0f} B" if count < 1000 else f"{count / 1000:.1f} kB"


def add_history(summary: Summary, history: dict[str, dict[str, float]]) -> None:
    """Fill in what only clients know under encryption: the metrics that they decrypted.

    Args:
        history: metrics by learning round, as a client's ``--json`` writes them.
    """
    for r in summary["rounds"]:
        if r["outcome"] == "done":
            r["metrics"] |= history.get(str(r["learning_round"]), {})
    scores = [r["metrics"]["accuracy"] for r in summary["rounds"] if "accuracy" in r["metrics"]]
    if scores:
        summary |= {"accuracy_before": scores[0], "accuracy_after": scores[-1]}
    zero = [r["metrics"]["zero_shot"] for r in summary["rounds"] if "zero_shot" in r["metrics"]]
    if zero:
        summary["zero_shot"] = zero[0]


def rounds_table(summary: Summary) -> Table:
    """Per round: accuracy before and after, clients, bytes per client, seconds by stage."""
    table = Table(title=f"{summary['method']} under {summary['protection']}; bytes are per client")
    timed = any(r["seconds"] for r in summary["rounds"])
    names = ("round", "before", "after", "in", "dropped", "up", "down")
    for name in (*names, *(["seconds by stage"] if timed else [])):
        table.add_column(
            name, justify="left" if name in ("dropped", "seconds by stage") else "right"
        )
    rows = summary["rounds"]
    accuracy = {r["learning_round"]: r["metrics"].get("accuracy") for r in rows if r["metrics"]}
    for r in rows:
        n, clients = r["learning_round"], max(len(r["cohort"]), 1)
        label = str(n) if n <= summary["learning_rounds"] else "final"
        if r["outcome"] != "done":
            table.add_row(label, "", "", "0", f"aborted: {r['reason']}", "", "")
            continue
        stages = ", ".join(f"{k} {v:.1f}" for k, v in r["seconds"].items() if v >= 0.05)
        table.add_row(
            label,
            _percent(accuracy.get(n)),
            _percent(accuracy.get(n + 1)),
            str(len(r["cohort"]) - len(r["dropped"])),
            ", ".join(r["dropped"]) or "-",
            size(sum(r["bytes"]["up"].values()) / clients),
            size(sum(r["bytes"]["down"].values()) / clients),
            *([stages or "below 0.05"] if timed else []),
        )
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def what_the_server_saw(summary: Summary) -> str:
    """One honest sentence."""
    facts = facts_of(summary["protection"])
    rows = [r for r in summary["rounds"] if r["outcome"] == "done"]
    fewest = min((len(r["cohort"]) - len(r["dropped"]) for r in rows), default=0)
    trained = [r for r in rows if r["learning_round"] <= summary["learning_rounds"]]
    lists = [set(r["cohort"]) - set(r["dropped"]) for r in trained]
    told = set().union(*(now ^ then for now, then in itertools.pairwise(lists)))
    absent = ""
    if told and facts.masked:
        who = ", ".join(sorted(told)) if len(told) <= FEW else f"{len(told)} clients"
        absent = (
            f"; but {who} {'was' if len(told) == 1 else 'were'} in one of two successive sums "
            'only, whose difference tells of that update ("What remains" in docs/terms.md)'
        )
    return facts.seen(len(rows), fewest) + absent


def show_run(console: Console, summary: Summary) -> None:
    console.print(rounds_table(summary))
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    zero, against = summary.get("zero_shot"), ""
    if zero is not None and after is not None:
        against = f", zero-shot {zero:.1%} ({100 * (after - zero):+.1f} points)"
    if (
        before is not None
        and len([r for r in summary["rounds"] if "accuracy" in r["metrics"]]) == 1
    ):
        console.print(
            f"accuracy of the global prompt {after:.1%}{against} (counted once, at the end)"
        )
    elif before is not None:
        change = f" ({100 * (after - before):+.1f} points)"
        console.print(
            f"accuracy of the global prompt {before:.1%} -> {after:.1%}{against or change}"
        )
    console.print(what_the_server_saw(summary), soft_wrap=True)
