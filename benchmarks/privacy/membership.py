"""Membership inference: was an image in a client's training set?

    python benchmarks/privacy/membership.py --json membership.json
    python benchmarks/privacy/membership.py --model local-dir:PATH --dataset caltech101.zip

Many federations are run; in each, the target holds a random half of the candidates, in every round.
The adversary takes from the server's record, round by round, the target's update, or the average of
all, or what is left of it when the adversary is a client who takes its own update away. Attacks:

    loss         a member has a lower loss under the last prompt (Yeom et al., 2018)
    LiRA         likelihood ratios of the logit-scaled confidence under the last prompt, with shadow
                 federations (Carlini et al., 2022)
    projection   the same of the updates, each projected on the gradient that the candidate has at
                 the round's start, summed over rounds
    both         the same of confidence and projection together

The shadows are federations from the same population as the target's, other clients included: more
than a real adversary has. In the DP rows the target trains with DP-SGD; epsilon is for all rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import plots
from federations import (
    CONTEXT,
    NO_DP,
    Array,
    Features,
    Pool,
    View,
    bootstrap,
    losses,
    parser,
    private,
    save,
    worded,
)
from inference import gradients, likelihood_ratios, projections

from secure_fedprompt.clients.settings import PrivacySettings

TARGET, ATTACKER = "client000", "client001"
UPLOAD, AVERAGE, REST = "its upload", "the average", "the average less one's own"


def updates(view: View, own: dict[int, Array], clients: int, number: int) -> dict[str, Array]:
    """What each adversary knows of a round, by name of the view.

    Args:
        own: updates of the adversary who is a client, by round; none if it needs not be one.
    """
    if not own:
        return {UPLOAD: view.update(number, TARGET)}
    average = view.average(number)
    return {AVERAGE: average, REST: (clients * average - own[number]) / (clients - 1)}


def figures(
    pool: Pool, images: Features, view: View, moved: dict[int, dict[str, Array]]
) -> dict[str, tuple[Array, Array]]:
    """Last losses (C,), with confidences and projections (C, 2), by name of the view."""
    last, down = dict[str, tuple[Array, Array]](), dict[str, Array]()
    for number, by_view in moved.items():
        base = view.prompt(number)
        slopes = gradients(pool.method(view.settings, base), images)
        for name, update in by_view.items():
            last[name] = losses(pool.method(view.settings, base + update), images)
            down[name] = down.get(name, 0.0) + projections(update, slopes)
    return {name: (loss, np.stack([sure, down[name]], 1)) for name, (loss, sure) in last.items()}


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, PrivacySettings]]:
    """Name of the case, protection, and the target's dp."""
    yield "update in the clear", "none", NO_DP
    yield f"sum of {args.clients} under masks", "masks", NO_DP
    for epsilon in args.epsilons:
        dp = private(epsilon, args.delta, args.candidates // 2, args.epochs, args.rounds)
        yield f"update in the clear, dp epsilon {epsilon:g}", "none", dp


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--models", type=int, default=64, help="federations of each kind")
    made.add_argument("--clients", type=int, default=4)
    made.add_argument("--candidates", type=int, default=64, help="half of them are members")
    made.add_argument("--rounds", type=int, default=1)
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 1.0])
    made.add_argument("--delta", type=float, default=1e-3)
    args = made.parse_args()
    pool = Pool.load(args)
    order = np.random.default_rng(0).permutation(len(pool.features[0]))
    candidates, rest = order[: args.candidates], order[args.candidates :]
    images, half = pool.features[0].subset(candidates), args.candidates // 2
    rows = list[dict[str, Any]]()
    for name, protection, dp in cases(args):
        begin, member = time.monotonic(), np.zeros((args.models, args.candidates), bool)
        found: dict[str, list[tuple[Array, Array]]] = {}
        settings = {**CONTEXT, "rounds": args.rounds, "lr": args.lr, "epochs": args.epochs,
                    "clip": 4.0, "metrics": "off"}  # fmt: skip
        for k in range(args.models):
            rng = np.random.default_rng([1, k])
            member[k, rng.permutation(args.candidates)[:half]] = True
            if k % 2:
                member[k] = ~member[k - 1]
            others = rng.permutation(rest)[: half * (args.clients - 1)]
            shares = [candidates[member[k]], *np.array_split(others, args.clients - 1)]
            kinds, numbers = [dp, *[NO_DP] * (args.clients - 1)], range(1, args.rounds + 1)
            own = dict[int, Array]()
            if protection != "none":  # the attacker knows its own update: here from a bare run
                with pool.federation({**settings, "protection": "none"}, shares, k, kinds) as bare:
                    own = {number: bare.update(number, ATTACKER) for number in numbers}
            with pool.federation({**settings, "protection": protection}, shares, k, kinds) as view:
                moved = {number: updates(view, own, args.clients, number) for number in numbers}
                for what, seen in figures(pool, images, view, moved).items():
                    found.setdefault(what, []).append(seen)
        for what, each in found.items():
            last, seen = (np.array(x) for x in zip(*each, strict=True))
            attacks = {
                "loss": -last,
                "LiRA": likelihood_ratios(seen[:, :, :1], member),
                "projection": likelihood_ratios(seen[:, :, 1:], member),
                "both": likelihood_ratios(seen, member),
            }
            shown = name if what == UPLOAD else f"{name}: {what}"
            for attack, scores in attacks.items():
                pairs = [(s[m], s[~m]) for s, m in zip(scores, member, strict=True)]
                row = {"view": shown, "attack": attack, **bootstrap(pairs)}
                rows.append(row)
                print(f"{shown:52} {attack:10}  {worded(row)}", flush=True)
        print(f"  {(time.monotonic() - begin) / args.models:.1f} s a federation", flush=True)
        save(args, rows)
    plots.intervals(args.json, rows, "view", "attack", {
        "auc": ("AUC", 0.5), "tpr_at_1_fpr": ("true positives at 1% false positives", 0.01),
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
