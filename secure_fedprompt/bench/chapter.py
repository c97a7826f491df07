"""What a chapter of the book is: cases, how one is measured, and how its figures are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Case = dict[str, Any]
"""What tells one row from another: names and numbers, as JSON has them."""
Samples = Mapping[str, Sequence[float]]
"""By figure, one value for each repetition."""
Row = dict[str, Any]
"""A case with its figures: ``case``, ``figures`` (name -> min, median, max, count), and how it was
measured: ``repeat``, ``others``, ``at``, ``machine``, ``code``."""


@dataclass(frozen=True)
class Column:
    """A figure as a table shows it.

    Attributes:
        digits: significant ones.
        less: whether less of it is better; None where neither is.
    """

    key: str
    heading: str
    digits: int = 3
    less: bool | None = True


@dataclass(frozen=True)
class Curve:
    """How a figure grows: a power law through the rows of one family.

    Attributes:
        x: key of the case that varies.
        y: figure.
        among: what the rows of the family have in common.
        limit: what it would cost if nothing were done but the arithmetic that the protocol asks
            for, in the figure's unit, from a case and the machine's primitives (``primitives.py``).
    """

    name: str
    x: str
    y: str
    among: Case
    limit: Callable[[Case, Mapping[str, float]], float] | None = None


@dataclass(frozen=True)
class Chapter:
    """One kind of work, in many sizes.

    Attributes:
        about: what exactly is measured, for the book.
        keys: of a case, in the order of the table, with their headings.
        cases: all of them, or the quick ones.
        measure: a case, so many times; None if that takes a peer's environment.
        peers: whose names are in ``peers.PEERS``, and which cases each of them runs.
    """

    name: str
    title: str
    about: str
    keys: Mapping[str, str]
    columns: tuple[Column, ...]
    cases: Callable[[bool], list[Case]]
    measure: Callable[[Case, int], Samples] | None
    repeat: int = 5
    curves: tuple[Curve, ...] = ()
    peers: Mapping[str, Callable[[Case], bool]] = field(default_factory=dict)
