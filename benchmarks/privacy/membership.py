"""Membership inference: was an image in a client's training set?

    python benchmarks/privacy/membership.py --json membership.json
    python benchmarks/privacy/membership.py --model local-dir:PATH --dataset caltech101.zip

Many federations are run; in each, the target holds a random half of the candidates. The adversary
reads the target's update, or the average of all, from the server's record, and loads it into its
own copy of the model. Two attacks:

    loss    a member has a lower loss (Yeom et al., 2018)
    LiRA    online likelihood ratio of the logit-scaled confidence, with shadow models and a
            variance shared by candidates (Carlini et al., 2022); the federations are split in two
            halves, each the shadows of the other (leaving one out instead would pull the AUC
            below a half where there is nothing to find)

LiRA is given shadow federations from the same population as the target, other clients included:
more than a real adversary has. In the DP rows the target trains with DP-SGD and sends its update
*without* secure aggregation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import plots
from federations import CONTEXT, Array, Pool, View, bootstrap, losses, parser, private, save
from numpy.typing import NDArray

from secure_fedprompt.clients.settings import PrivacySettings

TARGET = "client000"


def lira(confidence: Array, member: NDArray[np.bool_]) -> Array:
    """Log-likelihood ratios; each half of the rows is attacked with the other half as shadows.

    Args:
        confidence: of each model on each candidate, (M, C); member: who trained on what.
    """
    scores = np.empty_like(confidence)
    for targets in (slice(0, None, 2), slice(1, None, 2)):
        shadows = slice(1 - (targets.start or 0), None, 2)
        inside = np.where(member[shadows], confidence[shadows], np.nan)
        outside = np.where(member[shadows], np.nan, confidence[shadows])
        log_p = []
        for group in (inside, outside):
            mean = np.nanmean(group, axis=0)
            variance = np.nanmean((group - mean) ** 2)  # one for all: few shadows per candidate
            log_p.append(-((confidence[targets] - mean) ** 2) / variance - np.log(variance))
        scores[targets] = log_p[0] - log_p[1]
    return scores


def prompts(view: View) -> dict[str, Array]:
    """What the adversary can load into its model, by the name of the view."""
    base = view.prompt(1)
    found = {"its upload": base + view.update(1, TARGET)}
    return found | {"the average": base + view.average(1)}


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, PrivacySettings, str]]:
    """Name in the table, protection, the target's dp, and the view."""
    none = PrivacySettings()
    yield "update in the clear", "none", none, "its upload"
    yield "masked upload, read as it is", "masks", none, "its upload"
    yield f"average of {args.clients} clients under masks", "masks", none, "the average"
    for epsilon in args.epsilons:
        dp = private(epsilon, args.delta, args.candidates // 2, args.epochs)
        yield f"update in the clear, dp epsilon {epsilon:g}", "none", dp, "its upload"


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--models", type=int, default=64, help="federations of each kind")
    made.add_argument("--clients", type=int, default=4)
    made.add_argument("--candidates", type=int, default=64, help="half of them are members")
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 2.0, 0.5])
    made.add_argument("--delta", type=float, default=1e-3)
    args = made.parse_args()
    pool = Pool.load(args)
    order = np.random.default_rng(0).permutation(len(pool.features[0]))
    candidates, rest = order[: args.candidates], order[args.candidates :]
    images, half = pool.features[0].subset(candidates), args.candidates // 2
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    rows = []
    for name, protection, dp, view_name in cases(args):
        key = protection, str(dp.noise_multiplier)
        if key not in seen:
            begin = time.monotonic()
            found: dict[str, list[tuple[Array, Array]]] = {}
            own = [dp, *[PrivacySettings()] * (args.clients - 1)]
            members = np.zeros((args.models, args.candidates), bool)
            settings = {**CONTEXT, "rounds": 1, "lr": args.lr, "epochs": args.epochs, "clip": 4.0,
                        "protection": protection, "metrics": "off"}  # fmt: skip
            for k in range(args.models):
                rng = np.random.default_rng([1, k])
                members[k, rng.permutation(args.candidates)[:half]] = True
                others = rng.permutation(rest)[: half * (args.clients - 1)]
                shares = [candidates[members[k]], *np.array_split(others, args.clients - 1)]
                with pool.federation(settings, shares, k, own) as view:
                    for what, prompt in prompts(view).items():
                        method = pool.method(view.settings, prompt)
                        found.setdefault(what, []).append(losses(method, images))
            seen[key] = {"members": members, "found": found, "s": time.monotonic() - begin}
        case = seen[key]
        loss, confidence = (np.array(x) for x in zip(*case["found"][view_name], strict=True))
        member = case["members"]
        for attack, scores in (("loss", -loss), ("LiRA", lira(confidence, member))):
            pairs = [(s[m], s[~m]) for s, m in zip(scores, member, strict=True)]
            row = {"view": name, "attack": attack, **bootstrap(pairs)}
            rows.append(row)
            print("  ".join([f"{name:45} {attack:5}", *(
                f"{k} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"
                for k, v in row.items() if isinstance(v, dict)
            )]), flush=True)  # fmt: skip
        print(f"  {case['s'] / args.models:.1f} s a federation", flush=True)
        save(args, rows)
    plots.intervals(args.json, rows, "view", "attack", {
        "auc": ("AUC", 0.5), "tpr_at_1_fpr": ("true positives at 1% false positives", 0.01),
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
