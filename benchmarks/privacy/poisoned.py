"""A malicious client: what it can do to the prompt of all, and what would stop it.

    python benchmarks/privacy/poisoned.py --json poisoned.json
    python benchmarks/privacy/poisoned.py --model local-dir:PATH --dataset caltech101.zip

After BadPromptFL (Zhang et al., arXiv 2508.08040): one client optimises a trigger (a bounded
perturbation of every pixel) together with the prompt, so that images with the trigger are taken for
its class and others are classified as before, and sends what moves the average there: "its share",
or "boosted" n times, or as much as the norm bound below lets through. "spoil" sends random values
as large as a plan lets an honest client send.

    success   images of other classes that are taken for the attacker's with the trigger
    trigger   the same when only the trigger is optimised, against the prompt of a run in which
              everybody is honest: what CLIP itself is to blame for

"masks, whole run" is the protocol, in which nothing looks at an update, since nothing can. All
other rows are plain arithmetic on updates, of defences that this system does **not** have:

    norms of groups   clients are summed in groups of three; a group whose sum is longer than 1.5
                      times the median is cut to that. The price: sums of three become known.
    held-out check    a committee tries the next prompt on images that nobody trains on; it is not
                      adopted if it gets more than two points less right than the present one
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import plots
import torch
import torch.nn.functional as F
from federations import CONTEXT, Array, Features, Index, Pool, parser, save
from inference import interval
from torch import Tensor

from secure_fedprompt.clients.data import partitions
from secure_fedprompt.clients.features import predict
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.methods.base import Method
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.protocol.settings import MethodSettings

GROUP, SLACK, TOLERATED = 3, 1.5, 0.02
CLIP = 16.0  # of values of an update
DEVIATION = 0.27  # of pixels, by which the tower divides them
RUN = bytes(16)
T = TypeVar("T", bound=LocalTrainer)


@dataclass
class Attacker:
    """A client with images of its own, that wants everything with its trigger to be of one class.

    Attributes:
        boost: by how much more than its share it sends. steps: of optimisation a round.
    """

    pool: Pool
    rows: Index
    wanted: int
    bound: float
    steps: int
    boost: float = 1.0
    spoil: bool = False
    trigger: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        self.pixels = pixels_of(self.pool, 0, self.rows)
        self.labels = self.pool.features[0].labels[self.rows]
        self.trigger = torch.zeros(self.pixels.shape[1:])

    def draws(self, number: int) -> np.random.Generator:
        """Its own, of this round: other runs give it other images."""
        return np.random.default_rng([number, *self.rows])

    def optimise(self, method: Method, prompt: bool, number: int) -> None:
        """The trigger, and the method's prompt with it if asked."""
        drawn = self.draws(number)
        (ctx,) = method.shared.values()
        self.trigger.requires_grad_()
        rates = [{"params": [self.trigger], "lr": 0.1 * self.bound}]
        rates += [{"params": [ctx], "lr": 0.02}] if prompt else []
        optimiser = torch.optim.Adam(rates)
        clean = self.pool.features[0].images[self.rows]
        aim = torch.full_like(self.labels, self.wanted)
        for _ in range(self.steps):
            some = torch.from_numpy(drawn.permutation(len(clean))[:32])
            text = method.encode(ctx)[0]  # type: ignore[attr-defined]
            marked = towards(self.pool, self.pixels[some] + self.trigger)
            scale = self.pool.backbone.scale
            loss = F.cross_entropy(scale * marked @ text.T, aim[some])
            loss = loss + F.cross_entropy(scale * clean[some] @ text.T, self.labels[some])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                self.trigger.clamp_(-self.bound, self.bound)
        self.trigger = self.trigger.detach()

    @torch.no_grad()
    def success(self, method: Method, pixels: Tensor, labels: Tensor) -> float:
        """Of the trigger, on images of other classes."""
        (ctx,) = method.shared.values()
        text = method.encode(ctx)[0]  # type: ignore[attr-defined]
        got = towards(self.pool, pixels[labels != self.wanted] + self.trigger) @ text.T
        return float((got.argmax(1) == self.wanted).float().mean())

    def update(self, method: Method, base: Array, number: int) -> Array:
        if self.spoil:
            return self.draws(number).choice([-CLIP, CLIP], len(base))
        self.optimise(method, True, number)
        return self.boost * (flat(method) - base)


class Malicious(LocalLearner):
    """Takes an honest client's place in a whole run."""

    attacker: Attacker

    def train_round(self, run: bytes, number: int, place: tuple[int, int]) -> None:
        base = flat(self.method)
        moved = base + self.attacker.update(self.method, base, number)
        self.method.load(self._named(moved.astype(np.float32)))


class MaliciousTrainer(LocalTrainer):
    attacker: Attacker

    def prepare(self, settings: MethodSettings) -> LocalLearner:
        honest = super().prepare(settings)
        made = Malicious(self, settings, honest.method)
        made.attacker = self.attacker
        return made


def flat(method: Method) -> Array:
    return np.concatenate([v.reshape(-1) for v in method.state().values()]).astype(np.float64)


def pixels_of(pool: Pool, which: int, rows: Index) -> Tensor:
    transform, images = pool.backbone.test_transform, pool.sets[which]
    return torch.stack([transform(images.image(int(i))) for i in rows])


def towards(pool: Pool, pixels: Tensor) -> Tensor:
    """Features (B, E), with gradients of the pixels."""
    model: Any = pool.backbone.model
    return F.normalize(model.encode_image(pixels), dim=1)


def accuracy(method: Callable[[Array], Method], images: Features, prompt: Array) -> float:
    guesses, _ = predict(method(prompt), images)
    return float((guesses == images.labels.numpy()).mean())


@dataclass
class Federation:
    """n honest clients and, in the last place, perhaps an attacker; in plain arithmetic."""

    pool: Pool
    settings: dict[str, Any]
    shares: Sequence[Index]
    seed: int

    def __post_init__(self) -> None:
        made = {k: v for k, v in self.settings.items() if k in MethodSettings.__struct_fields__}
        self.method_settings = MethodSettings(**made)
        self.learners = [
            self.trainer(k, LocalTrainer).prepare(self.method_settings)
            for k in range(len(self.shares))
        ]

    def trainer(self, k: int, kind: type[T]) -> T:
        return self.pool.trainer(
            kind, self.shares[k], np.arange(0), self.seed, (k, len(self.shares))
        )

    def run(
        self, attacker: Attacker | None, combine: Callable[[Array, list[Array]], Array]
    ) -> Array:
        """The final prompt."""
        base, rounds = self.learners[0].initial().astype(np.float64), self.settings["rounds"]
        for number in range(1, rounds + 1):
            updates = []
            for k, learner in enumerate(self.learners):
                learner.method.begin(learner._named(base.astype(np.float32)), number)
                if attacker is not None and k == len(self.learners) - 1:
                    updates.append(attacker.update(learner.method, base, number))
                else:
                    learner.train_round(RUN, number, (number, rounds))
                    updates.append(flat(learner.method) - base)
            base = combine(base, updates)
        return base


def plain(base: Array, updates: list[Array]) -> Array:
    return base + np.mean(updates, 0)


def by_groups(base: Array, updates: list[Array]) -> Array:
    """Norm bounds on the sums of groups."""
    groups = [np.sum(updates[i : i + GROUP], 0) for i in range(0, len(updates), GROUP)]
    lengths = np.array([np.linalg.norm(group) for group in groups])
    cut = np.minimum(1, SLACK * np.median(lengths) / np.maximum(lengths, 1e-12))
    return base + np.sum(cut[:, None] * np.array(groups), 0) / len(updates)


@dataclass
class Checked:
    """A committee tries the next prompt before it is adopted. refused: how often it was not."""

    accuracy: Callable[[Array], float]
    refused: int = 0

    def __call__(self, base: Array, updates: list[Array]) -> Array:
        moved = plain(base, updates)
        if self.accuracy(moved) >= self.accuracy(base) - TOLERATED:
            return moved
        self.refused += 1
        return base


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, default=3)
    made.add_argument("--clients", type=int, default=12)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--epochs", type=int, default=2)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--bound", type=float, default=16 / 255, help="of the trigger, of 1")
    made.add_argument("--steps", type=int, default=40, help="of the attacker in a round")
    args = made.parse_args()
    pool = Pool.load(args)
    for p in pool.backbone.model.parameters():  # type: ignore[attr-defined]
        p.requires_grad_(False)
    settings = {**CONTEXT, "rounds": args.rounds, "lr": args.lr, "epochs": args.epochs,
                "clip": CLIP, "metrics": "off", "protection": "masks"}  # fmt: skip
    mixed = np.random.default_rng(0).permutation(len(pool.features[1]))
    committee, rest = np.split(mixed, [len(mixed) // 3])
    tests, marked = pool.features[1].subset(rest), pixels_of(pool, 1, rest)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(args.runs):
        begin, n = time.monotonic(), args.clients
        shares = [s.train for s in partitions.iid(pool.sets[0].labels, mixed, n, seed)]
        wanted = int(np.random.default_rng([7, seed]).integers(len(pool.sets[0].class_names)))
        federation = Federation(pool, settings, shares, seed)
        method = functools.partial(pool.method, federation.method_settings)
        fresh = functools.partial(
            Attacker, pool, shares[-1], wanted, args.bound / DEVIATION, args.steps
        )
        right = functools.partial(accuracy, method, pool.features[1].subset(committee))
        honest = federation.run(None, plain)
        alone = fresh()
        alone.steps *= args.rounds
        alone.optimise(method(honest), False, 0)
        trainers = [federation.trainer(k, LocalTrainer) for k in range(n - 1)]
        last = federation.trainer(n - 1, MaliciousTrainer)
        last.attacker = fresh(boost=n)
        with pool.run(settings, [*trainers, last], seed) as view:
            whole = view.prompt(args.rounds + 1)
        ends = [
            ("nobody malicious, trigger alone", honest, alone, 0),
            ("boosted: masks, whole run", whole, last.attacker, 0),
        ]
        for name, attacker, combine in (
            ("its share: no defence", fresh(), plain),
            ("boosted: no defence", fresh(boost=n), plain),
            ("boosted: norms of groups", fresh(boost=n), by_groups),
            ("under the bound: norms of groups", fresh(boost=GROUP * (SLACK - 1) + 1), by_groups),
            ("boosted: held-out check", fresh(boost=n), Checked(right)),
            ("spoil: no defence", fresh(spoil=True), plain),
            ("spoil: norms of groups", fresh(spoil=True), by_groups),
            ("spoil: held-out check", fresh(spoil=True), Checked(right)),
        ):
            final = federation.run(attacker, combine)
            refused = combine.refused if isinstance(combine, Checked) else 0
            ends.append((name, final, attacker, refused))
        for name, final, attacker, refused in ends:
            clean = accuracy(method, tests, final)
            success = attacker.success(method(final), marked, tests.labels)
            found.setdefault(name, []).append((clean, success, refused))
            print(f"run {seed + 1}/{args.runs} {name:34} accuracy {clean:.3f}  "
                  f"success {success:.3f}  refused {refused}", flush=True)  # fmt: skip
        print(f"  {time.monotonic() - begin:.0f} s", flush=True)
        rows = list[dict[str, Any]]()
        for name, values in found.items():
            row: dict[str, Any] = {"view": name, "attack": f"one of {n}"}
            columns = np.array(values).T
            for key, column in zip(("accuracy", "success", "refused"), columns, strict=True):
                row[key] = interval(column)
            rows.append(row)
        save(args, rows)
    plots.intervals(args.json, rows, "view", "attack", {
        "accuracy": ("accuracy, no trigger", 0.0), "success": ("success of the trigger", 0.0),
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
