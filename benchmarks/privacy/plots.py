"""The plots of this folder. Needs matplotlib, which the package does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#3b6ea8", "#c8702a", "#5a9a55", "#8b5a99", "#777777", "#b03a4a")
Rows = Sequence[Mapping[str, Any]]


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "secure-fedprompt"  # the same bytes every time
    import matplotlib.pyplot as plt

    return plt


def intervals(
    json_path: Path | None, rows: Rows, group: str, by: str, figures: dict[str, tuple[str, float]]
) -> None:
    """A dot with its interval per row, one panel per figure, dashed where guessing would lie.

    Args:
        json_path: the plot goes beside it as .svg; None plots nothing.
        rows: each figure as {"value", "low", "high"}.
        group: key of the vertical axis; by: key that tells rows of one group apart.
        figures: key -> axis label and what guessing gives.
    """
    if json_path is None:
        return
    plt = _pyplot()
    names, kinds = (list(dict.fromkeys(row[key] for row in rows)) for key in (group, by))
    figure, panels = plt.subplots(
        1, len(figures), figsize=(4.6 * len(figures) + 2, 0.45 * len(names) + 1.4), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for (key, (label, chance)), panel in zip(figures.items(), panels[0], strict=True):
        for row in rows:
            i, value = kinds.index(row[by]), row[key]
            y = names.index(row[group]) + 0.18 * (i - (len(kinds) - 1) / 2)
            error = [[max(0, value["value"] - value["low"])],
                     [max(0, value["high"] - value["value"])]]  # fmt: skip
            first = row is next(r for r in rows if r[by] == row[by])
            panel.errorbar(value["value"], y, xerr=error, fmt="o", ms=4, capsize=2,
                           color=COLOURS[i], label=row[by] if first else None)  # fmt: skip
        panel.axvline(chance, color="#888888", ls="--", lw=1)
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(fontsize=8)
    _write(plt, figure, json_path)


def lines(
    json_path: Path | None, rows: Rows, x: str, y: str, by: str, labels: tuple[str, str]
) -> None:
    """Means with one standard deviation over a logarithmic axis; infinity is a dashed line."""
    if json_path is None or all(row[x] is None for row in rows):
        return
    plt = _pyplot()
    kinds = list(dict.fromkeys(row[by] for row in rows))
    figure, panel = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for colour, kind in zip(COLOURS, kinds, strict=False):
        own = [row for row in rows if row[by] == kind]
        finite = sorted((row for row in own if row[x] is not None), key=lambda row: row[x])
        panel.errorbar(
            [row[x] for row in finite], [row[y]["mean"] for row in finite],
            yerr=[row[y]["std"] for row in finite], marker="o", ms=4, capsize=2, color=colour,
            label=kind,
        )  # fmt: skip
        for row in own:
            if row[x] is None:
                panel.axhline(row[y]["mean"], color=colour, ls="--", lw=1)
    panel.set_xscale("log")
    panel.set_xlabel(labels[0])
    panel.set_ylabel(labels[1])
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    _write(plt, figure, json_path)


def bars(json_path: Path | None, rows: Rows, name: str, figures: dict[str, str]) -> None:
    """Horizontal bars, one panel per figure with an axis of its own."""
    if json_path is None:
        return
    plt = _pyplot()
    figure, panels = plt.subplots(
        1, len(figures), figsize=(3.2 * len(figures) + 3, 0.3 * len(rows) + 1), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for i, (panel, (key, label)) in enumerate(zip(panels[0], figures.items(), strict=True)):
        panel.barh(range(len(rows)), [row[key] for row in rows], color=COLOURS[i])
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(rows)), [row[name] for row in rows], fontsize=8)
    panels[0][0].invert_yaxis()
    _write(plt, figure, json_path)


def pictures(json_path: Path, lines: dict[str, list[Any]]) -> None:
    """Rows of pictures, (3, H, H) tensors each, every picture stretched to its own range."""
    plt = _pyplot()
    count = max(map(len, lines.values()))
    figure, panels = plt.subplots(
        len(lines), count, figsize=(1.1 * count + 2, 1.15 * len(lines)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for line, (name, shown) in zip(panels, lines.items(), strict=True):
        for panel, picture in zip(line, shown, strict=False):
            low, high = picture.min(), picture.max()
            panel.imshow(((picture - low) / (high - low)).permute(1, 2, 0).numpy())
        for panel in line:
            panel.set_xticks([])
            panel.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    _write(plt, figure, json_path)


def _write(plt: Any, figure: Any, json_path: Path) -> None:
    figure.savefig(json_path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
