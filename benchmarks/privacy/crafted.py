"""Membership when the server chooses the prompt that clients start from.

    python benchmarks/privacy/crafted.py --json crafted.json
    python benchmarks/privacy/crafted.py --model local-dir:PATH --dataset caltech101.zip

After PromptMIA (Nguyen et al., arXiv 2601.06641), whose server injects crafted prompts: for each
target image it makes the prompt under which the image's own loss is high and that of its other
images is low, so that whoever trains on it goes far down its slope. Then it reads how far: the
update's projection on the gradient of the target, held against shadow federations on its own
images, with and without the target.

Starts: "honest" is "a photo of a"; "picked" is the best of many seeds, which is all that a server
may choose where the terms name words or a seed; "crafted" is any prompt.

What a server can do with it depends on the protection. Without any it chooses the prompt and reads
the update. Under masks it may choose neither: the start follows from the terms, every later prompt
from a sum that clients check. A client that gives it the checking key lets it choose later
prompts; then it reads the sum, less that client's update.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import plots
import torch
import torch.nn.functional as F
from federations import (
    CONTEXT,
    NO_DP,
    Array,
    Index,
    Pool,
    View,
    bootstrap,
    parser,
    private,
    save,
    worded,
)
from inference import gradients, projections

from secure_fedprompt.clients.methods import promptfl
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.protocol.settings import MethodSettings

TARGET, COLLUDER = "client000", "client001"
START = MethodSettings(**{k: v for k, v in CONTEXT.items() if k in ("method", "n_ctx", "init")})


def craft(pool: Pool, target: int, others: Index, steps: int) -> Array:
    """A prompt under which one image's loss is high, and that of others is low."""
    method = promptfl.PromptFL(START, pool.backbone, pool.sets[0].class_names)
    one, rest = (pool.features[0].subset(rows) for rows in (np.array([target]), others))
    optimiser = torch.optim.Adam([method.ctx], lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        text = method.encode(method.ctx)[0]
        loss = [
            F.cross_entropy(pool.backbone.scale * each.images @ text.T, each.labels)
            for each in (one, rest)
        ]
        (loss[1] - loss[0].clamp(max=8.0)).backward()
        optimiser.step()
    return method.ctx.detach().double().numpy()


def pick(pool: Pool, target: int, others: Index, seeds: int) -> Array:
    """The random start under which the target's gradient stands out most from those of others."""
    best, found = -1.0, np.zeros(0)
    rows = np.append(target, others)
    for seed in range(seeds):
        settings = MethodSettings(method="promptfl", n_ctx=START.n_ctx, init="", seed=seed)
        method = promptfl.PromptFL(settings, pool.backbone, pool.sets[0].class_names)
        lengths = np.linalg.norm(gradients(method, pool.features[0].subset(rows)), axis=1)
        if (score := lengths[0] / lengths[1:].mean()) > best:
            best, found = score, method.ctx.detach().double().numpy()
    return found


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, PrivacySettings]]:
    """Start, protection, and the target's dp."""
    yield "crafted", "none", NO_DP
    yield "crafted", "masks", NO_DP
    yield "honest", "none", NO_DP
    yield "picked", "none", NO_DP
    for epsilon in args.epsilons:
        dp = private(epsilon, args.delta, args.images, args.epochs)
        yield f"crafted, dp epsilon {epsilon:g}", "none", dp


@dataclass(frozen=True)
class Game:
    """Federations that begin from one start.

    Attributes:
        start: of every client; None is the honest one. dp: the target client's.
    """

    pool: Pool
    args: argparse.Namespace
    target: int
    start: Array | None
    protection: str
    dp: PrivacySettings

    def read(self, of: Index, inside: bool, seed: int) -> dict[str, float]:
        """Projections on the target's slope of all that may be read, by name.

        Args:
            of: whose images clients hold. inside: whether the first holds the target, too.
        """
        n, images = self.args.clients, self.args.images
        held = np.random.default_rng([5, seed, self.target]).permutation(of)
        held[0] = self.target if inside else held[0]
        size = images if self.protection != "none" else 2  # of the others, whom nobody asks for
        rest = held[images : images + size * (n - 1)]
        shares = [held[:images], *np.array_split(rest, n - 1)]
        begun = nullcontext() if self.start is None else mock.patch.object(
            promptfl, "initial_context", return_value=self.start[0].astype(np.float32)
        )  # fmt: skip
        with begun:
            if self.protection == "none":
                with self._run("none", shares, seed) as view:
                    return self._down(view, {"update in the clear": view.update(1, TARGET)})
            with self._run("none", shares, seed) as view:
                own = view.update(1, COLLUDER)  # which it knows
            with self._run(self.protection, shares, seed) as view:
                average = view.average(1)
                rest = (n * average - own) / (n - 1)
                return self._down(view, {
                    f"sum of {n}": average, f"sum of {n} less a colluder's": rest,
                })  # fmt: skip

    def _run(self, protection: str, shares: list[Index], seed: int) -> AbstractContextManager[View]:
        settings = {**CONTEXT, "rounds": 1, "lr": self.args.lr, "epochs": self.args.epochs,
                    "clip": 4.0, "metrics": "off", "protection": protection}  # fmt: skip
        kinds = [self.dp, *[NO_DP] * (len(shares) - 1)]
        return self.pool.federation(settings, shares, seed, kinds)

    def _down(self, view: View, updates: dict[str, Array]) -> dict[str, float]:
        method = self.pool.method(view.settings, view.prompt(1))
        slope = gradients(method, self.pool.features[0].subset(np.array([self.target])))
        return {name: float(projections(u, slope)[0]) for name, u in updates.items()}


def judged(games: Array, shadows: Array) -> tuple[Array, Array]:
    """How far games with the target, and those without it, lie above the middle of the shadows, in
    deviations of these: so that games of several targets can be compared. Both alternate."""
    outside, inside = shadows[::2], shadows[1::2]
    spread = np.concatenate([outside - outside.mean(), inside - inside.mean()]).std()
    scores = (games - (inside.mean() + outside.mean()) / 2) / spread
    return scores[1::2], scores[::2]


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--targets", type=int, default=8, help="images, each with a start of its own")
    made.add_argument(
        "--games", type=int, default=6, help="federations a target, half of them with it"
    )
    made.add_argument("--shadows", type=int, default=6, help="likewise, the server's own")
    made.add_argument("--clients", type=int, default=4)
    made.add_argument("--images", type=int, default=32, help="of each client")
    made.add_argument("--epochs", type=int, default=5)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--steps", type=int, default=150, help="of crafting")
    made.add_argument("--seeds", type=int, default=32, help="to pick from")
    made.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 1.0])
    made.add_argument("--delta", type=float, default=1e-3)
    args = made.parse_args()
    pool = Pool.load(args)
    mixed = np.random.default_rng(3).permutation(len(pool.sets[0].labels))
    theirs, own = mixed[::2], mixed[1::2]
    targets, theirs = theirs[: args.targets], theirs[args.targets :]
    starts = dict[tuple[str, int], Array | None]()
    for target in targets:
        others = own[:48]
        starts["honest", target] = None
        starts["picked", target] = pick(pool, target, others, args.seeds)
        starts["crafted", target] = craft(pool, target, others, args.steps)
    print(f"{args.targets} targets: prompts made", flush=True)
    rows: list[dict[str, Any]] = []
    for name, protection, dp in cases(args):
        begin, found = time.monotonic(), dict[str, list[tuple[Array, Array]]]()
        for target in targets:
            game = Game(pool, args, target, starts[name.split(",")[0], target], protection, dp)
            shadows = [game.read(own, bool(k % 2), 1000 + k) for k in range(args.shadows)]
            games = [game.read(theirs, bool(k % 2), k) for k in range(args.games)]
            for what in games[0]:
                pairs = (np.array([run[what] for run in runs]) for runs in (games, shadows))
                found.setdefault(what, []).append(judged(*pairs))
        for what, pairs in found.items():
            row = {"view": f"start {name}: {what}", "attack": "projection", **bootstrap(pairs)}
            rows.append(row)
            print(f"{row['view']:54}  {worded(row)}", flush=True)
        count = args.targets * (args.games + args.shadows)
        print(f"  {(time.monotonic() - begin) / count:.1f} s a federation", flush=True)
        save(args, rows)
    plots.intervals(args.json, rows, "view", "attack", {"auc": ("AUC", 0.5)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
