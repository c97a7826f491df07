"""One client's update, from the sums of two rounds of which it missed the second.

    python benchmarks/privacy/subtraction.py --json subtraction.json
    python benchmarks/privacy/subtraction.py --model local-dir:PATH --dataset caltech101.zip

The server adds up all clients in one round and all but one in the next, scales the second sum by
the two rounds' learning rates, and subtracts. What is left is the update of who was missing, and
what the others' updates changed by since the prompt moved. Beside it the guess that everybody has:
the mean. Errors are relative, norms of differences by the update's norm, for the client of a run
that is told best.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plots
from federations import CONTEXT, Array, Pool, View, parser, save, worded
from inference import interval

from secure_fedprompt.protocol.schedule import rate

ALL = 1 << 16  # as large as a batch may be: clients take a quarter of their images at a time
PLAIN = {"momentum": 0.0, "weight_decay": 0.0}


@dataclass(frozen=True)
class Case:
    """What the server asks for, and after which round a client is missing."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: int = 2
    after: int = 1


def cases() -> Iterator[Case]:
    for batch, words in ((1, "batches of one"), (ALL, "four batches")):
        for lr in (1e-5, 1e-4, 3e-4, 1e-3, 1e-2):
            settings = {**PLAIN, "lr": lr, "batch_size": batch}
            yield Case(f"lr {lr:g}, no momentum, {words}", settings)
    for name, changes in (("no momentum", PLAIN), ("momentum 0.9", {})):
        cosine = {"schedule": "cosine", "lr": 1e-3, **changes}
        yield Case(f"lr 0.001 to 0 (cosine), {name}, the last of 10 rounds", cosine, 10, 9)
    for after in (1, 9):
        yield Case(f"defaults, round {after + 1} of 10", {"lr": 1e-3, "batch_size": 32}, 10, after)


def told(view: View, case: Case, clients: int) -> dict[str, float]:
    """Errors for the client that the two sums tell best."""
    names = [f"client{k:03d}" for k in range(clients)]
    now, then = (
        np.stack([view.update(number, name) for name in names])
        for number in (case.after, case.after + 1)
    )
    s = view.settings
    slower = np.divide(
        *(rate(s, case.after + k, case.rounds, s.epochs - 1) for k in (0, 1))
    )  # fmt: skip
    size = np.linalg.norm(now, axis=1)
    others = then.sum(0) - then
    left: Array = now.sum(0) - slower * others - now
    errors = np.linalg.norm(left, axis=1) / size
    best = int(errors.argmin())
    mean = np.linalg.norm(now.mean(0) - now, axis=1) / size
    start = view.prompt(1).std()
    moved = np.abs(view.average(case.after)).max() / start
    return {"error": errors[best], "mean_error": mean[best], "moved": moved}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, default=8, help="federations of each case")
    made.add_argument("--clients", type=int, default=4)
    made.add_argument("--images", type=int, default=16, help="of each client")
    args: argparse.Namespace = made.parse_args()
    pool = Pool.load(args)
    rows: list[dict[str, Any]] = []
    for case in cases():
        found: dict[str, list[float]] = {"error": [], "mean_error": [], "moved": []}
        for seed in range(args.runs):
            drawn = np.random.default_rng([5, seed]).permutation(len(pool.sets[0].labels))
            shares = np.array_split(drawn[: args.clients * args.images], args.clients)
            settings = {**CONTEXT, "seed": 0, "epochs": 1, "clip": 1.0, "protection": "none",
                        "metrics": "off", "rounds": case.rounds, **case.settings}  # fmt: skip
            with pool.federation(settings, shares, seed) as view:
                for key, value in told(view, case, args.clients).items():
                    found[key].append(float(value))
        row: dict[str, Any] = {key: interval(np.array(values)) for key, values in found.items()}
        rows.append({"view": case.name, "attack": "subtraction", **row})
        print(f"{case.name:60} {worded(row)}", flush=True)
        save(args, rows)
    plots.intervals(args.json, rows, "view", "attack", {"error": ("relative error", 1.0)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
