"""A round of Flower's simulation: in the clear, under our masks, and under its own SecAgg+.

The same numpy app in each (every client adds a number to an array), the same grid, the same Ray
workers; SecAgg+ runs on Flower's legacy API, the only one that has it. Seconds are a round's from
the strategy's point of view, bytes those of all messages and replies as Flower serialises them.
Training takes no time, so this is what protection and Flower cost. All of it, ours too, runs in an
environment made for it: this chapter needs ``--peers``.
"""

from __future__ import annotations

from secure_fedprompt.bench.chapter import Case, Chapter, Column


def always(case: Case) -> bool:
    return True


CHAPTER = Chapter(
    name="flower",
    title="Apps of Flower under our masks",
    about=__doc__,
    keys={"clients": "nodes", "values": "values"},
    columns=(
        Column("seconds", "seconds"), Column("megabytes", "MB"),
        Column("messages", "messages", 2), Column("first_round_s", "first round, s"),
    ),
    cases=lambda quick: [] if quick else [{"clients": 10, "values": 100_000}],
    measure=None,
    repeat=5,
    peers=dict.fromkeys(("bridge", "flower-clear", "flower-secagg"), always),
)  # fmt: skip
