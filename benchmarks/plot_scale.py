"""A plot of ``scale.py``'s results: seconds of a round, and what one client costs, against n.

    pip install matplotlib
    python benchmarks/plot_scale.py benchmarks/results/scale.json

Writes NAME.svg beside NAME.json, with the fitted exponents in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LINES: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = [
    ("seconds of a round", "#3b6ea8", lambda row: float(row["wall_s"])),
    ("server CPU, s", "#c8702a", lambda row: float(row["server_cpu_s"])),
    ("a client alone, ms CPU", "#5a9a55", lambda row: 1e3 * float(row["client_cpu_s"]["median"])),
    ("its bytes beside vectors, kB", "#777777", lambda row: row["client_bytes_besides"] / 1e3),
]


def main() -> int:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "scale"
    import matplotlib.pyplot as plt

    path = Path(sys.argv[1])
    rows = json.loads(path.read_text())["rows"]
    n = np.array([row["clients"] for row in rows], float)
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for name, colour, of in LINES:
        values = np.array([of(row) for row in rows])
        power, log = np.polyfit(np.log(n), np.log(values), 1)
        axes.loglog(n, values, "o", color=colour)
        fit = np.exp(log) * n**power
        axes.loglog(n, fit, "-", color=colour, linewidth=1, label=f"{name}: n^{power:.2f}")
    axes.set_xlabel("clients")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
