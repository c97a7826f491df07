"""Auditing epsilon of DP-SGD from below, with a canary.

    python benchmarks/privacy/canaries.py --json canaries.json

The target trains many times, with a mislabelled image (the canary) or without it. The adversary
reads its update in the clear from the server's record and projects it on the canary's gradient. On
the first half of the runs it chooses a threshold, on the second half it counts: with probability
95% (Clopper and Pearson, both error rates), epsilon is at least ln((1 - FNR - delta) / FPR) or the
same with the rates exchanged. A bound above the accountant's epsilon would be a bug; one far below
it only says that this attack is not the worst. The last row has next to no noise: there the audit
must find what so many runs can show at most.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import plots
import torch
from federations import CONTEXT, NO_DP, Array, Pool, parser, private, save
from scipy.stats import beta

from secure_fedprompt.clients.ledger import Steps, epsilon, steps_of
from secure_fedprompt.clients.privacy_settings import PrivacySettings
from secure_fedprompt.clients.training import Features
from secure_fedprompt.protocol.settings import MethodSettings

TARGET = "client000"


def most(errors: int, runs: int, confidence: float = 0.975) -> float:
    """Clopper-Pearson upper bound of a rate."""
    return 1.0 if errors == runs else float(beta.ppf(confidence, errors + 1, runs - errors))


def bound(inside: Array, outside: Array, threshold: float, delta: float) -> float:
    """Epsilon that two error rates rule out below, with 95% confidence."""
    missed = most(int((inside <= threshold).sum()), len(inside))
    wrong = most(int((outside > threshold).sum()), len(outside))
    rates = ((1 - missed - delta) / wrong, (1 - wrong - delta) / missed)
    return float(np.log(max(1.0, *rates)))


def audited(inside: Array, outside: Array, delta: float) -> float:
    """The threshold is chosen on one half of the runs and judged on the other."""
    half = len(inside) // 2
    candidates = np.concatenate([inside[:half], outside[:half]])
    chosen = max(candidates, key=lambda t: bound(inside[:half], outside[:half], t, delta))
    return bound(inside[half:], outside[half:], float(chosen), delta)


def gradient(pool: Pool, settings: MethodSettings, base: Array, image: Features) -> Array:
    """Of one image's loss at the starting prompt, flat."""
    method = pool.method(settings, base)
    torch.autograd.backward(method.loss(next(image.batches(1))))
    parts = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
    return torch.cat(parts).double().cpu().numpy()


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, default=300, help="with the canary, and as many without")
    made.add_argument("--images", type=int, default=32, help="of the target")
    made.add_argument("--epochs", type=int, default=4)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--clip", type=float, default=0.1, help="max_grad_norm")
    made.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 2.0])
    made.add_argument("--delta", type=float, default=1e-3)
    args = made.parse_args()
    pool = Pool.load(args)
    rows = []
    for target in [*args.epsilons, None]:
        given = target or 8.0
        dp = private(given, args.delta, args.images, args.epochs)
        sigma = dp.noise_multiplier if target else 0.01
        dp = PrivacySettings(kind="sample", noise_multiplier=sigma, delta=args.delta,
                             max_grad_norm=args.clip)  # fmt: skip
        rate, steps = steps_of(args.images, CONTEXT["batch_size"], args.epochs)
        upper = epsilon([Steps(sigma, rate, steps)], args.delta, "prv") if target else None
        inside, outside = (scores(pool, args, dp, present) for present in (True, False))
        low = audited(inside, outside, args.delta)
        best = audited(np.ones(args.runs), np.zeros(args.runs), args.delta)
        rows.append({"noise": f"{sigma:.3g}", "epsilon": upper, "found": low, "findable": best,
                     "inside": inside.tolist(), "outside": outside.tolist()})  # fmt: skip
        said = f"{upper:.3g}" if upper else "none to speak of"
        print(f"noise {sigma:6.3g}  accountant {said}  audit >= {low:.2f}  "
              f"(at most {best:.2f} with so many runs)", flush=True)  # fmt: skip
        save(args, rows)
    shown = [
        {"noise": f"noise multiplier {row['noise']}", **{k: row[k] or 0.0 for k in
         ("epsilon", "found", "findable")}}
        for row in rows
    ]  # fmt: skip
    plots.bars(args.json, shown, "noise", {
        "epsilon": "accountant: at most (0: not bounded)", "found": "audit: at least",
        "findable": "most that so many runs could show",
    })  # fmt: skip
    return 0


def scores(pool: Pool, args: argparse.Namespace, dp: PrivacySettings, present: bool) -> Array:
    """Projection of the target's update on the canary's descent direction, one per run."""
    images, labels = pool.features[0], pool.sets[0].labels
    order = np.random.default_rng(0).permutation(len(labels))
    canary = order[:1]
    wrong = (labels[canary] + 1) % len(pool.sets[0].class_names)
    spoilt = images.subset(np.arange(len(images)))
    spoilt.labels = spoilt.labels.clone()
    spoilt.labels[torch.from_numpy(canary)] = torch.from_numpy(wrong)
    pool = Pool(pool.backbone, pool.sets, (spoilt, pool.features[1]))
    settings = {**CONTEXT, "rounds": 1, "lr": args.lr, "epochs": args.epochs, "clip": 4.0,
                "momentum": 0.0, "protection": "none", "metrics": "off"}  # fmt: skip
    own = order[1 : args.images + 1]
    if present:
        own = np.concatenate([canary, own[1:]])
    small = np.array_split(order[args.images + 1 : args.images + 5], 2)
    found, direction = [], None
    for k in range(args.runs):
        with pool.federation(settings, [own, *small], k, [dp, NO_DP, NO_DP]) as view:
            if direction is None:
                base = view.prompt(1)
                direction = -gradient(pool, view.settings, base, spoilt.subset(canary))
            found.append(float(view.update(1, TARGET) @ direction))
    return np.array(found)


if __name__ == "__main__":
    sys.exit(main())
