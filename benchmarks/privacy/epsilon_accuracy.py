"""Accuracy of the global prompt against epsilon, for both kinds of differential privacy.

    python benchmarks/privacy/epsilon_accuracy.py --json epsilon.json
    python benchmarks/privacy/epsilon_accuracy.py --model local-dir:PATH --dataset caltech101.zip

sample: few clients, DP-SGD at each of them, one image more or less. client: many clients with few
images, noise shared among them in the ring, one client more or less; epsilon is for all sums of the
run. Both under masks; accuracy is that of the last global prompt in the server's record, over all
test images. No client colludes in the client rows (``dp_colluders = 0``).
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import plots
from federations import CONTEXT, NO_DP, Pool, View, parser, private, save

from secure_fedprompt.clients.data import partitions
from secure_fedprompt.clients.training import predict
from secure_fedprompt.protocol import client_noise


def accuracy(pool: Pool, view: View, learning_round: int) -> float:
    method = pool.method(view.settings, view.prompt(learning_round))
    guesses, _ = predict(method, pool.features[1])
    return float((guesses == pool.sets[1].labels).mean())


def epsilon_of(view: View, delta: float) -> float | None:
    """Of all sums of the run, by the noise in the plans on record; None without noise."""
    rho = sum(client_noise.concentrated(p.noise, p.layout) for p, _ in view.plans.values()
              if p.noise.used)  # fmt: skip
    return client_noise.epsilon(rho, delta) if rho else None


def mean(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--kinds", nargs="*", choices=("sample", "client"),
                      default=["sample", "client"])  # fmt: skip
    made.add_argument("--clients", type=int, default=4, help="of the sample rows")
    made.add_argument("--many", type=int, default=50, help="clients of the client rows")
    made.add_argument("--rounds", type=int, default=4)
    made.add_argument("--epochs", type=int, default=4)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--dp-lr", type=float, default=0.02, help="of DP-SGD")
    made.add_argument("--epsilons", type=float, nargs="*", default=[0.5, 1, 2, 4, 8, 16])
    made.add_argument("--noises", type=float, nargs="*", default=[0.25, 0.5, 1, 2, 4],
                      help="z of the client rows")  # fmt: skip
    made.add_argument("--dp-clip", type=float, default=0.5, help="of a client's update")
    made.add_argument(
        "--start", choices=("words", "random"), default="words",
        help="of the context: a photo of a, or 16 random tokens",
    )  # fmt: skip
    made.add_argument("--delta", type=float, default=1e-3)
    args = made.parse_args()
    pool = Pool.load(args)
    labels = pool.sets[0].labels, pool.sets[1].labels
    base = {**CONTEXT, "rounds": args.rounds, "epochs": args.epochs, "metrics": "off",
            "protection": "masks"}  # fmt: skip
    if args.start == "random":
        base |= {"n_ctx": 16, "init": ""}
    rows: list[dict[str, Any]] = []

    def measure(kind: str, epsilon: float | None, settings: dict[str, Any], n: int) -> None:
        begin, ends, starts = time.monotonic(), list[float](), list[float]()
        for seed in range(args.seeds):
            shares = [s.train for s in partitions.iid(*labels, n, seed)]
            smallest = min(map(len, shares))
            dp = NO_DP
            if kind == "sample" and epsilon is not None:
                dp = private(epsilon, args.delta, smallest, args.epochs, args.rounds)
            with pool.federation({**base, **settings}, shares, seed, [dp] * n) as view:
                starts.append(accuracy(pool, view, 1))
                ends.append(accuracy(pool, view, args.rounds + 1))
                epsilon = epsilon_of(view, args.delta) if kind == "client" else epsilon
        row = {"kind": f"{kind}, {n} clients", "epsilon": epsilon, "accuracy": mean(ends),
               "zero_shot": mean(starts), "images": smallest, **settings}  # fmt: skip
        rows.append(row)
        print(f"{row['kind']:20} epsilon {epsilon or float('inf'):6.3g}  "
              f"{100 * row['accuracy']['mean']:.1f} +- {100 * row['accuracy']['std']:.1f}  "
              f"(start {100 * row['zero_shot']['mean']:.1f})  "
              f"{(time.monotonic() - begin) / args.seeds:.0f} s a run", flush=True)  # fmt: skip
        save(args, rows)
        axis = f"epsilon at delta {args.delta:g} (dashed: without noise)"
        plots.lines(args.json, rows, "epsilon", "accuracy", "kind", (axis, "accuracy"))

    for target in [None, *sorted(args.epsilons, reverse=True)] if "sample" in args.kinds else ():
        lr = args.lr if target is None else args.dp_lr
        measure("sample", target, {"lr": lr, "clip": 4.0}, args.clients)
    for z in [0.0, *args.noises] if "client" in args.kinds else ():
        settings = {"lr": args.lr, "clip": 4.0}
        if z:
            settings |= {"dp_noise": z, "dp_clip": args.dp_clip, "clip": args.dp_clip}
        measure("client", None, settings, args.many)
    return 0


if __name__ == "__main__":
    sys.exit(main())
