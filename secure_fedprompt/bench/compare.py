"""What got worse since figures that were on record before, by more than the spread of both."""

from __future__ import annotations

from typing import Any

from secure_fedprompt.bench.book import find
from secure_fedprompt.bench.chapter import Chapter, Row
from secure_fedprompt.bench.runner import digits

Content = dict[str, Any]


def compare(made: Chapter, old: Content, new: Content) -> tuple[list[str], list[str]]:
    """Lines of what got worse, and of what got better. Rows that only one of them has, and figures
    of which neither more nor less is better, are left out.

    A figure got worse if even its best repetition is worse than the worst one before; bytes, which
    do not vary, by any.
    """
    worse, better = list[str](), list[str]()
    for row in new["rows"]:
        before = find(old["rows"], row["case"], row["by"])
        if before is None:
            continue
        for column in made.columns:
            pair = before["figures"].get(column.key), row["figures"].get(column.key)
            if column.less is None or pair[0] is None or pair[1] is None:
                continue
            was, now = pair
            if apart(was, now, column.less):
                worse.append(worded(made, row, column.heading, was, now, column.digits))
            elif apart(now, was, column.less):
                better.append(worded(made, row, column.heading, was, now, column.digits))
    return worse, better


def apart(was: dict[str, float], now: dict[str, float], less: bool) -> bool:
    """Whether ``now`` is worse whichever repetitions are held against each other."""
    return now["min"] > was["max"] if less else now["max"] < was["min"]


def worded(
    made: Chapter, row: Row, heading: str, was: dict[str, float], now: dict[str, float], count: int
) -> str:
    case = ", ".join(f"{made.keys.get(k, k)} {v}" for k, v in row["case"].items())
    change = f"{now['median'] / was['median']:.2f} times" if was["median"] else "from nothing"
    return (f"{made.name}, {case} ({row['by']}): {heading} {spread(was, count)} -> "
            f"{spread(now, count)}, {change}")  # fmt: skip


def spread(figure: dict[str, float], count: int) -> str:
    """A figure as tables have it: median, and the range where there is one."""
    low, middle, high = (digits(figure[k], count) for k in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


def machines(old: Content, new: Content) -> bool:
    """Whether all rows were measured on machines that the older record knows."""
    return all(row["machine"] in old["machines"] for row in new["rows"])
