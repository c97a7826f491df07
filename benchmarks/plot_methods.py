"""Plots and one Markdown table from the results of ``methods.py``.

    pip install matplotlib
    python benchmarks/plot_methods.py benchmarks/results/methods_caltech101.json \\
        benchmarks/results/methods_cifar10.json benchmarks/results/ablation.json \\
        benchmarks/results/scopes.json

Writes NAME.svg beside every NAME.json (bars with one standard deviation over seeds), and prints
the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FIGURES = {"local": "Local", "base": "Base", "novel": "Novel", "hm": "HM", "cm": "CM"}
COLOURS = ("#3b6ea8", "#c8702a", "#5a9a55", "#8b5a99", "#777777")


def table(content: dict[str, Any]) -> str:
    """Rows by split, as Markdown."""
    lines: list[str] = []
    for split in dict.fromkeys(row["split"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["split"] == split]
        shown = [name for name in FIGURES if name in rows[0]]
        lines += ["", f"| {split} | " + " | ".join(FIGURES[n] for n in shown) + " | s a run |"]
        lines += ["|---" * (len(shown) + 2) + "|"]
        for row in rows:
            cells = [f"{100 * row[n]['mean']:.1f} ± {100 * row[n]['std']:.1f}" for n in shown]
            lines.append(f"| {row['method']} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def plot(content: dict[str, Any], path: Path) -> None:
    """Grouped bars, one panel for each split."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "secure-fedprompt"  # the same bytes every time
    import matplotlib.pyplot as plt

    splits = list(dict.fromkeys(row["split"] for row in content["rows"]))
    figure, panels = plt.subplots(
        len(splits), 1, figsize=(9, 3.2 * len(splits)), squeeze=False, layout="constrained"
    )
    for split, (panel,) in zip(splits, panels, strict=True):
        rows = [row for row in content["rows"] if row["split"] == split]
        shown = [name for name in FIGURES if name in rows[0]]
        width = 0.8 / len(shown)
        for i, name in enumerate(shown):
            at = [k + (i - (len(shown) - 1) / 2) * width for k in range(len(rows))]
            mean, spread = ([100 * row[name][key] for row in rows] for key in ("mean", "std"))
            panel.bar(at, mean, width, yerr=spread, capsize=2, label=FIGURES[name],
                      color=COLOURS[i])  # fmt: skip
        names = [row["method"].replace(" ", "\n") for row in rows]
        panel.set_xticks(range(len(rows)), names, fontsize=8)
        panel.set_ylabel("accuracy, %")
        panel.set_ylim(0, 115)
        panel.set_title(f"{content['protocol']['dataset']}, {split}", fontsize=10)
        panel.legend(fontsize=8, ncols=len(shown), loc="upper center")
        panel.grid(axis="y", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args().results:
        content = json.loads(path.read_text())
        print(f"\n{path.name}: {json.dumps(content['protocol'])}")
        print(table(content))
        plot(content, path.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
