"""Reconstruction: how close does the server's record come to a client's update?

    python benchmarks/privacy/reconstruction.py --json reconstruction.json
    python benchmarks/privacy/reconstruction.py --model local-dir:PATH --dataset caltech101.zip

The same federation, with the same seeds, is run under each protection. What the unprotected run's
record shows is the truth; a guess is scored by its cosine with it and by its error relative to its
length (1 is as bad as guessing zero). Guesses: the upload's bytes read as if they were bare, the
round's average, and, as a limit that no secure sum can escape, the sum less the updates of all
other clients, who collude.
"""

from __future__ import annotations

import sys

import numpy as np
import plots
from federations import CONTEXT, Array, Pool, parser, save

from secure_fedprompt.clients.data import partitions


def scored(truth: Array, guess: Array) -> tuple[float, float]:
    """Cosine and relative error."""
    guess = np.nan_to_num(guess)
    lengths = np.linalg.norm(truth) * max(np.linalg.norm(guess), 1e-300)
    error = np.linalg.norm(guess - truth) / np.linalg.norm(truth)
    return float(truth @ guess / lengths), float(error)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, default=5)
    made.add_argument("--clients", type=int, default=4)
    made.add_argument("--epochs", type=int, default=5)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--rounds", type=int, default=2)
    args = made.parse_args()
    pool = Pool.load(args)
    names = [f"client{k:03d}" for k in range(args.clients)]
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(args.runs):
        labels = pool.sets[0].labels, pool.sets[1].labels
        shares = [s.train for s in partitions.dirichlet(*labels, args.clients, seed, 0.3)]
        truth: dict[tuple[int, str], Array] = {}
        for protection in ("none", "masks", "bfv", "ckks"):
            settings = {**CONTEXT, "rounds": args.rounds, "lr": args.lr, "epochs": args.epochs,
                        "clip": 4.0, "protection": protection, "metrics": "off"}  # fmt: skip
            with pool.federation(settings, shares, seed) as view:
                for number in range(1, args.rounds + 1):
                    uploads = {name: view.update(number, name) for name in names}
                    if protection == "none":
                        truth |= {(number, name): u for name, u in uploads.items()}
                    for name in names:
                        own = truth[number, name]
                        guesses = {f"upload: {protection}": uploads[name]}
                        if protection in ("none", "masks"):
                            average = view.average(number)
                            rest = sum(truth[number, x] for x in names if x != name)
                            total = average * args.clients
                            guesses[f"average: {protection}"] = average
                            guesses[f"all others collude: {protection}"] = total - rest
                        for what, guess in guesses.items():
                            found.setdefault(what, []).append(scored(own, guess))
        print(f"run {seed + 1}/{args.runs}", flush=True)
    rows = []
    for what, values in found.items():
        row: dict[str, object] = {"guess": what, "kind": "median and range"}
        for i, key in enumerate(("cosine", "relative_error")):
            column = np.array([value[i] for value in values])
            row[key] = {"value": float(np.median(column)), "low": float(column.min()),
                        "high": float(column.max())}  # fmt: skip
        rows.append(row)
        print(f"{what:28} " + "  ".join(
            f"{k} {v['value']:.3g} [{v['low']:.3g}, {v['high']:.3g}]"
            for k, v in row.items() if isinstance(v, dict)
        ))  # fmt: skip
    save(args, rows)
    plots.intervals(args.json, rows, "guess", "kind", {"cosine": ("cosine with the update", 0.0)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
