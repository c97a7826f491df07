"""Class inference: which classes does a client hold, and which does the whole cohort hold?

    python benchmarks/privacy/labels.py --json labels.json
    python benchmarks/privacy/labels.py --model local-dir:PATH --dataset caltech101.zip
    python benchmarks/privacy/labels.py --method fedmgp --shadows 24 --epsilons

One client's classes: they are dealt out so that no two clients share one. The cohort's: half of all
classes, drawn anew for each federation, are dealt out to all clients at random. The adversary
has images of its own of every class, which no client holds, and attacks the first round twice:

    more often said   training on a class makes the model say it more often: by how much more over
                      the adversary's images, with no shadows
    regression        the adversary runs shadow federations on its own images, with classes that it
                      draws, and regresses what is held on the update (ridge, its strength chosen on
                      shadows that are left out)

A masked or encrypted upload is not attacked here: see ``reconstruction.py``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plots
import torch
from federations import CONTEXT, NO_DP, Array, Index, Pool, View, auc, parser, private, save
from inference import Regression, interval

from secure_fedprompt.clients.data import partitions
from secure_fedprompt.clients.features import Features
from secure_fedprompt.clients.methods.base import Method
from secure_fedprompt.clients.settings import PrivacySettings


@torch.no_grad()
def said(method: Method, images: Features) -> Array:
    """Mean log-probability of each class over all images, (C,)."""
    found = [torch.log_softmax(method.logits(b).double(), 1) for b in images.batches(256)]
    return torch.cat(found).mean(0).cpu().numpy()


@dataclass(frozen=True)
class Case:
    """A question, and how the federation is protected.

    Attributes:
        cohort: the question is about the average, else about each client's update.
    """

    name: str
    protection: str
    cohort: bool
    dp: PrivacySettings

    def shares(self, labels: Array, rows: Index, clients: int, seed: int) -> list[Index]:
        """Who holds which of these rows of the training images."""
        if not self.cohort:
            dealt = partitions.pathological(labels[rows], labels[:0], clients, seed)
            return [rows[share.train] for share in dealt]
        rng, classes = np.random.default_rng([2, seed]), np.unique(labels)
        kept = np.isin(labels[rows], rng.permutation(classes)[: len(classes) // 2])
        return np.array_split(rng.permutation(rows[kept]), clients)

    def seen(
        self, view: View, labels: Array, shares: Sequence[Index]
    ) -> Iterator[tuple[Array, Any]]:
        """What is attacked, (d,), with the classes that are truly held."""
        if self.cohort:
            yield view.average(1), np.unique(labels[np.concatenate(shares)])
        else:
            for k, share in enumerate(shares):
                yield view.update(1, f"client{k:03d}"), np.unique(labels[share])


def cases(args: argparse.Namespace, images: int) -> Iterator[Case]:
    yield Case("a client's, from its update in the clear", "none", False, NO_DP)
    for epsilon in args.epsilons:
        dp = private(epsilon, args.delta, images // args.clients, args.epochs)
        yield Case(f"a client's, from its update, dp epsilon {epsilon:g}", "none", False, dp)
    yield Case(f"the cohort's, from the sum of {args.clients}", "masks", True, NO_DP)
    for epsilon in args.epsilons:
        dp = private(epsilon, args.delta, images // 2 // args.clients, args.epochs)
        yield Case(f"the cohort's, from the sum, dp epsilon {epsilon:g}", "masks", True, dp)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--method", default="promptfl", help="or fedotp, fedmgp")
    made.add_argument("--runs", type=int, default=16, help="federations that are attacked")
    made.add_argument(
        "--shadows",
        type=int,
        default=48,
        help="the adversary's federations; for the cohort, one for each client of these",
    )
    made.add_argument("--clients", type=int, default=4)
    made.add_argument("--epochs", type=int, default=5)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--epsilons", type=float, nargs="*", default=[8.0])
    made.add_argument("--delta", type=float, default=1e-3)
    args = made.parse_args()
    pool = Pool.load(args, args.method)
    labels = pool.sets[0].labels
    classes = np.arange(len(pool.sets[0].class_names))
    mixed = np.random.default_rng(3).permutation(len(labels))
    theirs, own = np.sort(mixed[::2]), np.sort(mixed[1::2])
    rows: list[dict[str, Any]] = []
    for case in cases(args, len(theirs)):
        begin = time.monotonic()

        def runs(case: Case, of: Index, seeds: range) -> Iterator[list[tuple[Array, Array, Array]]]:
            settings = {**CONTEXT, "method": args.method, "seed": 0, "rounds": 1, "lr": args.lr,
                        "epochs": args.epochs, "clip": 4.0, "protection": case.protection,
                        "metrics": "off"}  # fmt: skip
            for seed in seeds:
                shares = case.shares(labels, of, args.clients, seed)
                with pool.federation(settings, shares, seed, [case.dp] * len(shares)) as view:
                    base = view.prompt(1)
                    before = said(pool.method(view.settings), pool.features[0].subset(own))
                    found = []
                    for update, held in case.seen(view, labels, shares):
                        method = pool.method(view.settings, base + update)
                        gained = said(method, pool.features[0].subset(own)) - before
                        found.append((update, gained, np.isin(classes, held)))
                    yield found

        shadows = args.shadows * (args.clients if case.cohort else 1)
        known = [one for found in runs(case, own, range(1000, 1000 + shadows)) for one in found]
        guess = Regression(
            np.array([u for u, _, _ in known]), np.array([h for _, _, h in known], float)
        )
        by_run: dict[str, list[float]] = {"more often said": [], "regression": []}
        for found in runs(case, theirs, range(args.runs)):
            ranked = {
                "more often said": [(gained, held) for _, gained, held in found],
                "regression": [(guess(update), held) for update, _, held in found],
            }
            for attack, pairs in ranked.items():  # clients of a run are not independent
                by_run[attack].append(float(np.mean([auc(s[h], s[~h]) for s, h in pairs])))
        for attack, values in by_run.items():
            row = {"view": case.name, "attack": attack, "auc": interval(np.array(values))}
            rows.append(row)
            print(f"{case.name:50} {attack:16} AUC {row['auc']['value']:.3f} "
                  f"[{row['auc']['low']:.3f}, {row['auc']['high']:.3f}]", flush=True)  # fmt: skip
        print(
            f"  {(time.monotonic() - begin) / (shadows + args.runs):.1f} s a federation", flush=True
        )
        save(args, rows)
    plots.intervals(args.json, rows, "view", "attack", {"auc": ("AUC over classes", 0.5)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
