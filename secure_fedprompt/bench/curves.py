"""How figures grow: power laws with their exponents, and what the arithmetic alone would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secure_fedprompt.bench.book import OURS
from secure_fedprompt.bench.chapter import Chapter, Curve, Row

COLOURS = ("#3b6ea8", "#c8702a", "#777777")


def members(curve: Curve, rows: Sequence[Row]) -> list[Row]:
    """Our rows of a curve's family, by x."""
    family = [
        row for row in rows
        if row["by"] == OURS and curve.y in row["figures"]
        and all(row["case"].get(k) == v for k, v in curve.among.items())
    ]  # fmt: skip
    return sorted(family, key=lambda row: row["case"][curve.x])


def fit(curve: Curve, rows: Sequence[Row], known: Mapping[str, float]) -> dict[str, Any] | None:
    """The power law through the medians, by least squares of logarithms; None for less than three
    points. Its standard error is of the exponent."""
    found = members(curve, rows)
    if len(found) < 3:
        return None
    x = np.array([row["case"][curve.x] for row in found], float)
    y = np.array([row["figures"][curve.y]["median"] for row in found])
    logs = np.stack([np.log(x), np.ones(len(x))], 1)
    (power, factor), *_ = np.linalg.lstsq(logs, np.log(y), rcond=None)
    rest = np.log(y) - logs @ np.array([power, factor])
    error = np.sqrt(
        (rest**2).sum() / max(1, len(x) - 2) / ((np.log(x) - np.log(x).mean()) ** 2).sum()
    )
    limits = [curve.limit(row["case"], known) for row in found] if curve.limit and known else []
    return {
        "curve": curve.name, "x": curve.x, "y": curve.y, "among": curve.among,
        "exponent": round(float(power), 3), "error": round(float(error), 3),
        "factor": float(np.exp(factor)), "at": x.tolist(), "limit": limits,
    }  # fmt: skip


def draw(made: Chapter, content: Mapping[str, Any], path: Path) -> bool:
    """All curves of a chapter as one SVG; False without matplotlib, or without curves."""
    fits = content.get("fits", [])
    if not fits:
        return False
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = made.name  # the same bytes every time
    import matplotlib.pyplot as plt

    by_name = {curve.name: curve for curve in made.curves}
    figure, panels = plt.subplots(
        1, len(fits), figsize=(3.6 * len(fits), 3.4), squeeze=False, layout="constrained"
    )
    for found, axes in zip(fits, panels[0], strict=True):
        _panel(axes, made, by_name[found["curve"]], found, content["rows"])
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def _panel(
    axes: Any, made: Chapter, curve: Curve, found: Mapping[str, Any], rows: Sequence[Row]
) -> None:
    family = members(curve, rows)
    x = np.array([row["case"][curve.x] for row in family], float)
    low, middle, high = (np.array([row["figures"][curve.y][k] for row in family])
                         for k in ("min", "median", "max"))  # fmt: skip
    axes.errorbar(x, middle, [middle - low, high - middle], fmt="o", ms=4, color=COLOURS[0],
                  capsize=2)  # fmt: skip
    label = f"x^{found['exponent']:.2f} ± {found['error']:.2f}"
    axes.plot(x, found["factor"] * x ** found["exponent"], color=COLOURS[0], lw=1, label=label)
    if found["limit"]:
        axes.plot(x, found["limit"], "--", color=COLOURS[1], lw=1, label="arithmetic alone")
    axes.set(xscale="log", yscale="log", title=curve.name, xlabel=made.keys[curve.x])
    axes.set_ylabel(next(c.heading for c in made.columns if c.key == curve.y))
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7)
