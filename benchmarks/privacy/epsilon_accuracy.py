"""Accuracy of the global prompt against epsilon, for both kinds of differential privacy.

    python benchmarks/privacy/epsilon_accuracy.py --json epsilon.json
    python benchmarks/privacy/epsilon_accuracy.py --model local-dir:PATH --dataset caltech101.zip

sample: few clients, DP-SGD at each of them, one image more or less. client: many clients with few
images, noise shared among them in the ring, one client more or less; epsilon is for all sums of the
run. Both under masks; accuracy is that of the last global prompt in the server's record, over all
test images. Client rows count on the noise of a quorum less the colluders of the README's table.

"clip alone" is dp with next to no noise, which tells what clipping does. "noise alone" is the run
in which no image is ever taken (sample), or no client trains (client): what the prompt does by its
noise, and what the other figures must be held against.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any
from unittest import mock

import numpy as np
import plots
from federations import CONTEXT, NO_DP, Pool, View, parser, private, save

from secure_fedprompt.clients.data import partitions
from secure_fedprompt.clients.dp_sgd import Draws
from secure_fedprompt.clients.features import predict
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.protocol import client_noise

HARDLY = 1e-3  # noise multiplier


def accuracy(pool: Pool, view: View, learning_round: int) -> float:
    method = pool.method(view.settings, view.prompt(learning_round))
    guesses, _ = predict(method, pool.features[1])
    return float((guesses == pool.sets[1].labels).mean())


def epsilon_of(view: View, delta: float) -> float | None:
    """Of all sums of the run, by the noise in the plans on record; None without noise."""
    rho = sum(client_noise.concentrated(p.noise, p.layout) for p, _ in view.plans.values()
              if p.noise.used)  # fmt: skip
    return client_noise.epsilon(rho, delta) if rho else None


def blind(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Runs in which nothing is learned."""
    if kind == "sample":
        return mock.patch.object(Draws, "poisson", return_value=np.arange(0))
    return mock.patch.object(LocalTrainer, "_train", return_value=None)


def mean(values: list[float]) -> dict[str, float]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": spread}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--first-seed", type=int, default=0, help="to choose settings on others")
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

    def measure(
        kind: str, epsilon: float | None, settings: dict[str, Any], n: int, dp: PrivacySettings
    ) -> None:
        begin, ends, starts = time.monotonic(), list[float](), list[float]()
        alone = list[float]()
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            shares = [s.train for s in partitions.iid(*labels, n, seed)]
            smallest = min(map(len, shares))
            if kind == "sample" and epsilon is not None:
                dp = private(epsilon, args.delta, smallest, args.epochs, args.rounds)
            with pool.federation({**base, **settings}, shares, seed, [dp] * n) as view:
                starts.append(accuracy(pool, view, 1))
                ends.append(accuracy(pool, view, args.rounds + 1))
                noisy = epsilon is not None or settings.get("dp_noise", 0) > HARDLY
                found = epsilon_of(view, args.delta) if kind == "client" and noisy else epsilon
            if noisy:
                with blind(kind), pool.federation(
                    {**base, **settings}, shares, seed, [dp] * n
                ) as view:  # fmt: skip
                    alone.append(accuracy(pool, view, args.rounds + 1))
        clipped = dp.noise_multiplier == HARDLY or settings.get("dp_noise") == HARDLY
        row = {"kind": f"{kind}, {n} clients", "epsilon": found, "clip_alone": clipped,
               "accuracy": mean(ends), "noise_alone": mean(alone) if alone else None,
               "zero_shot": mean(starts), "images": smallest, **settings}  # fmt: skip
        rows.append(row)
        only = "clip alone, " if clipped else ""
        only += f"noise alone {100 * np.mean(alone):.1f}, " if alone else ""
        print(f"{row['kind']:20} epsilon {found or float('inf'):6.3g}  "
              f"{100 * row['accuracy']['mean']:.1f} +- {100 * row['accuracy']['std']:.1f}  "
              f"({only}start {100 * row['zero_shot']['mean']:.1f})  "
              f"{(time.monotonic() - begin) / args.seeds:.0f} s a run", flush=True)  # fmt: skip
        save(args, rows)
        axis = f"epsilon at delta {args.delta:g} (dashed: without noise)"
        shown = [row for row in rows if not row["clip_alone"]]
        plots.lines(args.json, shown, "epsilon", "accuracy", "kind", (axis, "accuracy"))

    clip = PrivacySettings(kind="sample", noise_multiplier=HARDLY, delta=args.delta)
    rows_of = [(None, NO_DP), (None, clip)]
    rows_of += [(target, NO_DP) for target in sorted(args.epsilons, reverse=True)]
    for target, dp in rows_of if "sample" in args.kinds else ():
        lr = args.lr if dp is NO_DP and target is None else args.dp_lr
        measure("sample", target, {"lr": lr, "clip": 4.0}, args.clients, dp)
    for z in [0.0, HARDLY, *args.noises] if "client" in args.kinds else ():
        settings = {"lr": args.lr, "clip": 4.0}
        if z:
            settings |= {"dp_noise": z, "dp_clip": args.dp_clip, "clip": args.dp_clip}
        measure("client", None, settings, args.many, NO_DP)
    return 0


if __name__ == "__main__":
    sys.exit(main())
