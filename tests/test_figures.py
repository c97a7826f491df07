"""Numbers in README and docs are those of the figures on record.

Tables between marks and numbers that link to a row are held against it in ``test_bench.py``; here
are tables that people arranged, and pages on which no measured number may stand without its row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_docs import ROOT

from secure_fedprompt.bench import pages

RESULTS = ROOT / "benchmarks" / "results"
ARRANGED = re.compile(r"<!-- figures: ([^>]+) -->\n\n((?:\|.*\n)+)")
CELL = re.compile(r"^\*{0,2}(\d+\.\d) ± (\d+\.\d)\*{0,2}$")
NAMES = {"promptfl, fine-tuned": "promptfl-ft", "fedamp (no protection)": "fedamp",
         "dp-fpl (without dp)": "dpfpl", "linear head": "linear"}  # fmt: skip
MEASURES = ("local", "base", "novel", "hm", "cm")
STRICT = ("README.md", "docs/results/performance.md")
UNIT = re.compile(r"\d(?:[\d,.]*\d)?\s?(?:ms|us|s|min|kB|MB|%|points|times)\b|AUC \d|\b0\.\d{2}\b")


def arranged() -> Iterator[tuple[Path, list[str], list[list[str]]]]:
    """Tables with the files that they are from, their rows as cells."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for files, table in ARRANGED.findall(page.read_text()):
            lines = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
            yield page, files.split(), lines


def bare(text: str) -> str:
    return re.sub(r"[\s,]+", "", text.lower())


def columns(head: list[str], files: list[str]) -> list[tuple[str, str, str]]:
    """File, split and measure of each column. "SET: SPLIT" begins the columns of another file."""
    found, sets, file = [], iter(files), ""
    for name in head[1:]:
        title = name.lower().replace("domain, dirichlet", "domain-dirichlet")
        if ": " in title and "published" not in title:
            file, title = next(sets), title.partition(": ")[2]
        split, _, measure = title.partition(", ")
        if split in MEASURES:
            found.append((file, "base/novel", split))
        else:
            found.append((file, split, measure or "local"))
    return found


def row_of(files: list[str], split: str, label: str) -> dict[str, Any]:
    wanted = NAMES.get(label.lower(), label)
    rows = [row for file in files for row in json.loads((RESULTS / file).read_text())["rows"]
            if row["split"] == split and bare(row["method"]) == bare(wanted)]  # fmt: skip
    assert len(rows) == 1, (files, split, label, len(rows))
    return rows[0]


def test_tables_that_people_arranged_are_the_figures_on_record() -> None:
    checked = 0
    for page, files, (head, _, *rows) in arranged():
        where = columns(head, files)
        for label, *cells in rows:
            for (file, split, measure), cell in zip(where, cells, strict=True):
                if match := CELL.match(cell):
                    row = row_of([file] if file else files, split, label)[measure]
                    said = (float(match[1]), float(match[2]))
                    kept = (100 * row["mean"], 100 * row["std"])
                    assert said == pytest.approx(kept, abs=0.0501), (page.name, label, split, cell)
                    checked += 1
                else:
                    assert "±" not in cell, cell
    assert checked > 250


def percent(figure: dict[str, float] | None) -> str:
    return "" if figure is None else f"{100 * figure['mean']:.1f} ± {100 * figure['std']:.1f}"


def epsilon_row(row: dict[str, Any], data: str) -> list[str]:
    free = "clip alone" if row["clip_alone"] else "without dp"
    epsilon = free if row["epsilon"] is None or row["clip_alone"] else f"{row['epsilon']:.3g}"
    start = f" (start {100 * row['zero_shot']['mean']:.1f})"
    return [data, row["kind"], epsilon, percent(row["accuracy"]) + start,
            percent(row["noise_alone"])]  # fmt: skip


def audit_row(row: dict[str, Any], _: str) -> list[str]:
    return [row["kind"], row["code"], f"{row['observations']:,}", f"{row['epsilon']:.2f}",
            f"{row['found']:.2f}", "flagged" if row["flagged"] else ""]  # fmt: skip


def overhead_row(row: dict[str, Any], _: str) -> list[str]:
    figures = (row[key] for key in ("kb_up", "kb_down", "seconds"))
    return [row["run"], *(f"{x:.1f}" for x in figures), f"{row['accuracy']:.1f}%"]


IN_ORDER = {  # page, how its head begins, rows, and the files that they are from
    "epsilon": ("differential-privacy.md", "| data | dp | epsilon |", epsilon_row, (
        "epsilon_generated", "epsilon_generated_clients", "epsilon_caltech101",
        "epsilon_caltech101_clients")),
    "audit": ("differential-privacy.md", "| unit | code |", audit_row, ("epsilon_audit",)),
    "overhead": ("results/privacy.md", "| protection, selection, dp |", overhead_row,
                 ("overhead_generated",)),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_ORDER)
def test_tables_in_the_order_of_a_file(name: str) -> None:
    page, head, made, files = IN_ORDER[name]
    text = (ROOT / "docs" / page).read_text()
    assert text.count(head) == 1
    lines = text[text.index(head) :].partition("\n\n")[0].splitlines()[2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    wanted = []
    for file in files:
        data = "Caltech101" if "caltech" in file else "generated"
        rows = json.loads((RESULTS / "privacy" / f"{file}.json").read_text())["rows"]
        wanted += [made(row, data) for row in rows]
    assert found == wanted


@pytest.mark.parametrize("name", STRICT)
def test_no_measured_number_stands_without_its_row(name: str) -> None:
    """But for code, and tables from figures on record."""
    text = (ROOT / name).read_text()
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(pages.BEGIN.pattern + r".*?" + re.escape(pages.END), "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "", text)
    text = re.sub(r"!?\[[^\]\[]*\]\([^)]*\)", "", text)
    found = [(line, match[0]) for line in text.splitlines() for match in UNIT.finditer(line)]
    assert not found
