"""Class inference: which classes does a client hold?

    python benchmarks/privacy/labels.py --json labels.json
    python benchmarks/privacy/labels.py --model local-dir:PATH --dataset caltech101.zip

Classes are dealt out so that no two clients share one. The adversary has a few images of every
class that no client holds. It loads a client's update, as the server's record shows it, into its
own model and ranks classes by how much more probable the update made them over all those images:
training on a class makes the model say it more often. Under encryption and masks the update is read
as if the bytes were bare; "average" is what the server learns legitimately, tried against each
client.
"""

from __future__ import annotations

import sys

import numpy as np
import plots
import torch
from federations import CONTEXT, Array, Pool, auc, parser, private, save

from secure_fedprompt.clients.data import partitions
from secure_fedprompt.clients.features import Features
from secure_fedprompt.clients.methods.base import Method
from secure_fedprompt.clients.settings import PrivacySettings


@torch.no_grad()
def said(method: Method, images: Features) -> Array:
    """Mean log-probability of each class over all images, (C,)."""
    found = [torch.log_softmax(method.logits(b).double(), 1) for b in images.batches(256)]
    return torch.cat(found).mean(0).cpu().numpy()


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, default=12, help="partitions, each with every protection")
    made.add_argument("--clients", type=int, default=4)
    made.add_argument("--epochs", type=int, default=5)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--epsilon", type=float, default=8.0, help="of the row with dp")
    args = made.parse_args()
    pool = Pool.load(args)
    labels, classes = pool.sets[0].labels, len(pool.sets[0].class_names)
    dp = private(args.epsilon, 1e-3, len(labels) // args.clients, args.epochs)
    cases = (("none", "clear", PrivacySettings()), ("masks", "masks", PrivacySettings()),
             ("bfv", "bfv", PrivacySettings()), ("ckks", "ckks", PrivacySettings()),
             ("none", f"clear, dp epsilon {args.epsilon:g}", dp))  # fmt: skip
    found: dict[str, list[float]] = {}

    def score(name: str, gained: Array, held: Array) -> None:
        found.setdefault(name, []).append(auc(gained[held], gained[~held]))

    for seed in range(args.runs):
        shares = partitions.pathological(labels, pool.sets[1].labels, args.clients, seed)
        for protection, name, kind in cases:
            settings = {**CONTEXT, "rounds": 1, "lr": args.lr, "epochs": args.epochs, "clip": 4.0,
                        "protection": protection, "metrics": "off"}  # fmt: skip
            rows = [share.train for share in shares]
            with pool.federation(settings, rows, seed, [kind] * args.clients) as view:
                base = view.prompt(1)
                before = said(pool.method(view.settings, base), pool.features[1])
                if protection == "masks":
                    shown = said(pool.method(view.settings, view.prompt(2)), pool.features[1])
                for k, share in enumerate(shares):
                    held = np.isin(np.arange(classes), labels[share.train])
                    prompt = base + view.update(1, f"client{k:03d}")
                    after = said(pool.method(view.settings, prompt), pool.features[1])
                    score(f"upload: {name}", np.nan_to_num(after - before), held)
                    if protection == "masks":
                        score(f"average of {args.clients}, masks", shown - before, held)
        print(f"run {seed + 1}/{args.runs}  " + "  ".join(
            f"{k} {np.mean(v):.3f}" for k, v in found.items()
        ), flush=True)  # fmt: skip
    rows_ = []
    for name, values in found.items():
        runs = (
            np.array(values).reshape(args.runs, -1).mean(1)
        )  # clients of a run are not independent
        rows_.append({"view": name, "attack": "more often said", "auc": interval(runs)})
    save(args, rows_)
    plots.intervals(args.json, rows_, "view", "attack", {"auc": ("AUC over classes", 0.5)})
    return 0


def interval(runs: Array) -> dict[str, float]:
    """Mean over runs with a 95% bootstrap interval."""
    rng = np.random.default_rng(0)
    again = [rng.choice(runs, len(runs)).mean() for _ in range(1000)]
    low, high = np.quantile(again, [0.025, 0.975])
    return {"value": float(runs.mean()), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    sys.exit(main())
