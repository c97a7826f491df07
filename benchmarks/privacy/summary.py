"""Writes the tables of docs/results/privacy.md, and the README's picture, from figures on record:
benchmarks/results/privacy/*.json, of which each is written by the script that has its name.

    python benchmarks/privacy/summary.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plots

RESULTS = Path(__file__).parents[1] / "results" / "privacy"
PAGE = Path(__file__).parents[2] / "docs" / "results" / "privacy.md"
SETS = {"generated": "generated", "caltech101": "Caltech101"}
METHODS = {"PromptFL": "labels", "FedOTP": "labels_fedotp", "FedMGP": "labels_fedmgp"}
SKIPPED = "discriminator, on shadows"  # not an attack: what it learned of the adversary's own
Rows = list[dict[str, Any]]
Shown = Callable[[dict[str, float] | None], str]


def rows_of(name: str, data: str) -> Rows:
    """Figures on record; none if that was not run."""
    path = RESULTS / f"{name}_{data}.json"
    if not path.exists():
        return []
    rows: Rows = json.loads(path.read_text())["rows"]
    return [row for row in rows if row["attack"] != SKIPPED]


def strongest(rows: Rows, figure: str) -> dict[str, dict[str, Any]]:
    """The row of each view with the largest figure, in the order of the views."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        view = row["view"]
        if view not in best or row[figure]["value"] > best[view][figure]["value"]:
            best[view] = row
    return best


def shown(value: dict[str, float] | None) -> str:
    if value is None:
        return "not run"
    return f"{value['value']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def percents(value: dict[str, float] | None) -> str:
    if value is None:
        return "not run"
    middle, low, high = (
        f"{100 * value[key]:.{'0f' if value[key] > 0.095 else '2g'}}"
        for key in ("value", "low", "high")
    )
    return f"{middle}% ({low} to {high})"


def table(name: str, figures: dict[str, str], attacks: bool = True, show: Shown = shown) -> str:
    """A row for each view, on both sets."""
    sources = {words: rows_of(name, data) for data, words in SETS.items()}
    return beside(sources, figures, attacks, show)


def beside(
    sources: dict[str, Rows], figures: dict[str, str], attacks: bool = True, show: Shown = shown
) -> str:
    """A row for each view, with the figures of its strongest attack, which is named if asked.

    Args:
        sources: heading -> rows; one without rows is left out.
        figures: key -> column; the first one says which attack is the strongest.
        show: writes a figure with its interval.
    """
    first = next(iter(figures))
    found = {head: strongest(rows, first) for head, rows in sources.items() if rows}
    columns = [f"{head}: {words}" for head in found for words in figures.values()]
    lines = [f"| case | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for view in dict.fromkeys(view for best in found.values() for view in best):
        cells = []
        for best in found.values():
            row = best.get(view, {})
            cells += [show(row.get(key)) for key in figures]
            if attacks and row:
                cells[-len(figures)] += f", {row['attack']}"
        lines.append(f"| {view} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


RATES = {"auc": "AUC", "tpr_at_1_fpr": "TPR at 1% FPR"}
TABLES = {
    "labels": lambda: table("labels", {"auc": "AUC"}),
    "labels_methods": lambda: beside(
        {method: rows_of(name, "generated") for method, name in METHODS.items()}, {"auc": "AUC"}
    ),
    "subtraction": lambda: table(
        "subtraction", {"error": "error", "mean_error": "of the mean"}, False, percents
    ),
    "membership": lambda: table("membership", RATES),
    "membership_4_rounds": lambda: table("membership_4_rounds", RATES),
    "final_prompt": lambda: table("final_prompt", RATES),
    "crafted": lambda: table("crafted", RATES, attacks=False),
    "images": lambda: table(
        "images",
        {"found": "found", "blind found": "blind", "cosine": "cosine", "blind cosine": "blind"},
        attacks=False,
    ),
    "poisoned": lambda: table(
        "poisoned", {"accuracy": "accuracy", "success": "success of the trigger"}, attacks=False
    ),
}

PICTURE = (  # question, file, view
    ("which classes it holds: its update", "labels", "a client's, from its update in the clear"),
    ("which classes it holds: its update, epsilon 8", "labels",
     "a client's, from its update, dp epsilon 8"),
    ("which classes all hold: the sum", "labels", "the cohort's, from the sum of 4"),
    ("is this image in: its update", "membership", "update in the clear"),
    ("is this image in: its update, epsilon 8", "membership", "update in the clear, dp epsilon 8"),
    ("is this image in: the sum", "membership", "sum of 4 under masks: the average"),
    ("the server crafts the start: its update", "crafted",
     "start crafted: update in the clear"),
    ("the server crafts the start: the sum", "crafted", "start crafted: sum of 4"),
)  # fmt: skip


def draw() -> None:
    rows = []
    for question, name, view in PICTURE:
        for data, words in SETS.items():
            row = strongest(rows_of(name, data), "auc").get(view)
            if row is not None:
                rows.append({"question": question, "set": words, "auc": row["auc"]})
    label = "AUC of the strongest attack; 0.5 is guessing"
    plots.intervals(RESULTS / "summary.json", rows, "question", "set", {"auc": (label, 0.5)})


def written(page: str) -> str:
    """The page with all tables as the figures on record have them, between their marks."""
    for name, made in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{made()}\n{end}{rest.partition(end)[2]}"
    return page


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    draw()
    PAGE.write_text(written(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
