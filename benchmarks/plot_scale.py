"""A plot of ``scale.py``'s results: what a round costs against clients, values and dropout.

    pip install matplotlib
    python benchmarks/plot_scale.py benchmarks/results/scale.json

Reads NAME_dim.json and NAME_dropout.json beside NAME.json too, and writes NAME.svg, with the fitted
exponents in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Line = tuple[str, str, Callable[[Row], float]]


def everybody(row: Row) -> float:
    return float(row["server_cpu_s"] + row["clients_cpu_s"])


CPU: list[Line] = [
    ("all parties, s CPU", "#3b6ea8", everybody),
    ("Flower's SecAgg+, s CPU", "#a03050", lambda row: everybody(row["flower"])),
]
LINES: list[Line] = [
    ("seconds of a round", "#222222", lambda row: float(row["wall_s"])),
    *CPU,
    ("server, s CPU", "#c8702a", lambda row: float(row["server_cpu_s"])),
    ("a client alone, ms CPU", "#5a9a55", lambda row: 1e3 * float(row["client_cpu_s"]["median"])),
    ("its bytes beside vectors, kB", "#777777", lambda row: row["client_bytes_besides"] / 1e3),
]
PANELS = (("", "clients", LINES), ("_dim", "dim", CPU), ("_dropout", "dropout", CPU))
LABELS = {"clients": "clients", "dim": "values, 100 clients", "dropout": "dropped, 100 clients"}


def panel(axes: Any, rows: list[Row], key: str, lines: list[Line]) -> None:
    for name, colour, of in lines:
        used = [row for row in rows if "Flower" not in name or "flower" in row]
        x = np.array([row[key] for row in used], float)
        values = np.array([of(row) for row in used])
        if key != "clients":  # no power law
            axes.plot(x, values, "o-", color=colour, linewidth=1, label=name)
            continue
        power, log = np.polyfit(np.log(x), np.log(values), 1)
        axes.loglog(x, values, "o", color=colour)
        fit = np.exp(log) * x**power
        axes.loglog(x, fit, "-", color=colour, linewidth=1, label=f"{name}: x^{power:.2f}")
    axes.set_yscale("log")
    if key == "dim":
        axes.set_xscale("log")
    axes.set_xlabel(LABELS[key])
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7)


def main() -> int:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "scale"
    import matplotlib.pyplot as plt

    path = Path(sys.argv[1])
    figure, many = plt.subplots(1, 3, figsize=(13, 4.4), width_ratios=(1.4, 1, 1))
    for axes, (suffix, key, lines) in zip(many, PANELS, strict=True):
        rows = json.loads(path.with_name(path.stem + suffix + ".json").read_text())["rows"]
        panel(axes, rows, key, lines)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
