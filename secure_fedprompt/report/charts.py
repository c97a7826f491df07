"""Charts as inline SVG: sharp on every screen and in print, coloured by the page's variables.

Each comes with the numbers as a table below it, for screen readers and for those who want them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 84, 12, 12, 36
CHARACTER = 11.5  # width of one, at most: the page's letters on a phone
SERIES = 6  # colours that the page defines: --s0 to --s5


def table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str) -> str:
    """A plain table; the first column is the row's heading. Columns of words are wrapped."""
    words = [any(_is_words(str(row[i])) for row in rows) for i in range(len(head))]
    kinds = [' class="words"' if wordy and i else "" for i, wordy in enumerate(words)]
    cells = "".join(
        f'<th scope="col"{kind}>{escape(text)}</th>' for kind, text in zip(kinds, head, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(str(first))}</th>'
        + "".join(
            f"<td{kind}>{escape(str(cell))}</td>"
            for kind, cell in zip(kinds[1:], rest, strict=True)
        )
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _is_words(text: str) -> bool:
    return bool(text) and not text[0].isdigit()


def ticks(top: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to at least ``top``."""
    if top <= 0:
        return [0.0, 1.0]
    rough = top / count
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step >= rough)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


class _Canvas:
    """Axes, and the mapping of values to places."""

    def __init__(self, labels: Sequence[str], values: Sequence[float], unit: str) -> None:
        self.labels, self.unit = labels, unit
        self.top = values[-1] or 1.0
        self.parts = [self._axis(value) for value in values]
        self.slot = (WIDTH - LEFT - RIGHT) / max(1, len(labels))
        self._name_rounds()

    def _name_rounds(self) -> None:
        """As many labels as fit on a phone, from the last one on."""
        free = float(WIDTH)
        for i in reversed(range(len(self.labels))):
            half = 0.5 * CHARACTER * len(self.labels[i])
            x = min(self.x(i), WIDTH - half)
            if x + half <= free:
                free = x - half - CHARACTER
                self.parts.append(
                    f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">'
                    f"{escape(self.labels[i])}</text>"
                )

    def x(self, i: int) -> float:
        return LEFT + self.slot * (i + 0.5)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / self.top

    def _axis(self, value: float) -> str:
        y = self.y(value)
        return (
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}{self.unit}</text>'
        )

    def done(self, title: str) -> str:
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
            f"<title>{escape(title)}</title>{''.join(self.parts)}</svg>"
        )


def line(
    title: str,
    labels: Sequence[str],
    values: Sequence[float | None],
    unit: str,
    level: tuple[str, float] | None = None,
) -> str:
    """One line with dots; a gap where a value is missing.

    Args:
        level: what it is to be compared with, as name and value: a dashed line.
    """
    known = [value for value in (*values, level and level[1]) if value is not None]
    canvas = _Canvas(labels, ticks(max(known, default=0.0)), unit)
    if level is not None:
        y = canvas.y(level[1])
        canvas.parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{WIDTH - RIGHT}" y="{y + 18:.1f}" text-anchor="end">'
            f"{escape(level[0])} {level[1]:.1f}{unit}</text>"
        )
    run: list[str] = []
    for i, value in enumerate([*values, None]):
        if value is None:
            if len(run) > 1:
                canvas.parts.append(f'<polyline class="l0" points="{" ".join(run)}"/>')
            run = []
            continue
        x, y = canvas.x(i), canvas.y(value)
        run.append(f"{x:.1f},{y:.1f}")
        tip = f"{escape(labels[i])}: {value:.4g}{unit}"
        canvas.parts.append(
            f'<circle class="f0" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{tip}</title></circle>'
        )
    return canvas.done(title)


def stacked(
    title: str, labels: Sequence[str], series: Mapping[str, Sequence[float]], unit: str
) -> str:
    """Stacked bars with a legend; what is beyond the sixth series is summed as "other"."""
    shown = dict(sorted(series.items(), key=lambda item: -sum(item[1])))
    if len(shown) > SERIES:
        names = list(shown)
        rest = [shown.pop(name) for name in names[SERIES - 1 :]]
        shown["other"] = [sum(column) for column in zip(*rest, strict=True)]
    totals = [sum(column) for column in zip(*shown.values(), strict=True)] or [0.0]
    canvas = _Canvas(labels, ticks(max(totals)), unit)
    floor = [0.0] * len(labels)
    for k, (name, values) in enumerate(shown.items()):
        for i, value in enumerate(values):
            if value <= 0:
                continue
            x, top = canvas.x(i) - 0.35 * canvas.slot, canvas.y(floor[i] + value)
            height, width = canvas.y(floor[i]) - top, 0.7 * canvas.slot
            tip = f"{escape(labels[i])}, {escape(name)}: {value:.4g}{unit}"
            canvas.parts.append(
                f'<rect class="f{k}" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{height:.1f}"><title>{tip}</title></rect>'
            )
            floor[i] += value
    keys = "".join(
        f'<li><span class="key b{k}" aria-hidden="true"></span>{escape(name)}</li>'
        for k, name in enumerate(shown)
    )
    return canvas.done(title) + f'<ul class="legend">{keys}</ul>'
