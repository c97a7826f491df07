"""Images from prompt gradients: what does an update show of the pictures themselves?

    python benchmarks/privacy/images.py --json images.json
    python benchmarks/privacy/images.py --model local-dir:PATH --dataset caltech101.zip

The aim of MIP (arXiv 2403.07901), in two steps. The gradient of a prompt depends on an image
through its pooled feature alone, and the adversary has the model: it knows the Jacobian of all
class features, and searches for those features whose gradient is the update (relative error, Adam,
several starts). The prior is the space of its own images' features, in which an image is a class
mean and a few directions. Then it looks for pixels that have this feature (Adam, total variation).

The server chooses plain SGD at a low rate, so that one epoch's update is the gradient of all images
at the start; the adversary is told how many there are and their labels, which only helps it. "Usual
training" is five epochs with momentum, read the same way.

    cosine    between found and true feature, each less its class mean
    found     the true image is the nearest to the found feature among all images of its class
    blind     the same figures for guesses drawn from the prior: several images of a class are
              matched with their guesses as well as can be, and some fit by that alone
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plots
import torch
import torch.nn.functional as F
from federations import CONTEXT, Array, Index, Pool, parser, save, worded
from inference import interval
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from secure_fedprompt.protocol.settings import MethodSettings

FIGURES = ("cosine", "found", "blind cosine", "blind found")
USUAL = {"rounds": 1, "epochs": 5, "lr": 0.02, "clip": 4.0, "metrics": "off"}
GENTLE = USUAL | {"epochs": 1, "lr": 0.001, "momentum": 0.0, "weight_decay": 0.0}


@dataclass
class Adversary:
    """What it knows before it sees anything.

    Attributes:
        own: rows of its images. text: class features (C, E); slopes: of them, (C, E, d).
        means: of each class's image features; directions: (k, E), scaled by how far images go.
    """

    pool: Pool
    own: Index
    text: Tensor
    slopes: Tensor
    means: Tensor
    directions: Tensor

    @classmethod
    def prepare(
        cls, pool: Pool, settings: MethodSettings, prompt: Array, own: Index, k: int
    ) -> Any:
        method = pool.method(settings, prompt)
        (ctx,) = method.shared.values()
        text = method.encode(ctx)[0]  # type: ignore[attr-defined]
        flat = text.flatten()
        rows = [
            torch.autograd.grad(flat, ctx, basis, retain_graph=True, is_grads_batched=True)[0]
            for basis in torch.eye(len(flat), dtype=flat.dtype).split(256)
        ]
        images, labels = pool.features[0].images[own], pool.features[0].labels[own]
        means = torch.stack([images[labels == c].mean(0) for c in range(len(text))])
        _, sizes, right = torch.linalg.svd(images - means[labels], full_matrices=False)
        directions = right[:k] * (sizes[:k, None] / len(own) ** 0.5)
        slopes = torch.cat(rows).reshape(*text.shape, -1)
        return cls(pool, own, text.detach(), slopes, means, directions)

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of the mean loss, (S, d), for S guesses of features (S, B, E)."""
        scale = self.pool.backbone.scale
        wrong = torch.softmax(scale * images @ self.text.T, 2) - F.one_hot(labels, len(self.text))
        pull = torch.einsum("sbc,sbe->sce", wrong, images) * scale / len(labels)
        return torch.einsum("sce,ced->sd", pull, self.slopes)

    def search(self, seen: Array, labels: Tensor, starts: int, steps: int) -> Tensor:
        """Features (B, E) whose gradient is as close to what was seen as can be."""
        wanted = torch.from_numpy(seen).float()
        z = 0.3 * torch.randn(starts, len(labels), len(self.directions))
        z.requires_grad_()
        optimiser = torch.optim.Adam([z], lr=0.05)
        for _ in range(steps):
            optimiser.zero_grad()
            error = (self.gradient(self._features(z, labels), labels) - wanted).square().sum(1)
            loss = error / wanted.square().sum() + 1e-4 * z.square().mean((1, 2))
            loss.sum().backward()
            optimiser.step()
        return self._features(z.detach(), labels)[loss.argmin()]

    def guessed(self, labels: Tensor) -> Tensor:
        """Features (B, E) of images of these classes, by somebody who has seen nothing."""
        return self._features(torch.randn(1, len(labels), len(self.directions)), labels)[0]

    def _features(self, z: Tensor, labels: Tensor) -> Tensor:
        return F.normalize(self.means[labels] + z @ self.directions, dim=2)

    def centred(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.normalize(images - self.means[labels], dim=1)

    def pixels(self, feature: Tensor, size: int, steps: int) -> Tensor:
        """A picture (3, H, H) with this feature, as the tower takes it."""
        x = (0.1 * torch.randn(1, 3, size, size)).requires_grad_()
        optimiser = torch.optim.Adam([x], lr=0.05)
        model: Any = self.pool.backbone.model
        for _ in range(steps):
            optimiser.zero_grad()
            got = F.normalize(model.encode_image(x), dim=1)[0]
            rough = x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()
            (1 - got @ feature + 0.05 * rough + 0.005 * x.square().mean()).backward()
            optimiser.step()
        return x.detach()[0]


@dataclass(frozen=True)
class Case:
    """Clients hold ``images`` each, and the adversary sees their sum; or one's update, if there is
    one. ``usual`` training goes on for five epochs, at rates that learn something."""

    name: str
    clients: int
    images: int
    usual: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        protection = "none" if self.clients == 1 else "masks"
        return (USUAL if self.usual else GENTLE) | {"protection": protection}

    @property
    def steps(self) -> int:
        """Of all epochs: a client takes at most a quarter of its images at a time."""
        size = min(CONTEXT["batch_size"], max(1, self.images // 4))
        return int(self.settings["epochs"]) * -(-self.images // size)


def cases(names: Sequence[int], clients: int) -> list[Case]:
    many = {b: f"{b} image{'s' * (b > 1)}" for b in names}
    made = [Case(f"update in the clear, {words}", 1, b) for b, words in many.items()]
    made += [Case(f"sum of {clients}, {words} each", clients, b) for b, words in many.items()]
    most = max(names)
    return [*made, Case(f"update in the clear, {most} images, usual training", 1, most, True)]


def observed(pool: Pool, case: Case, held: Index, seed: int) -> Array:
    """The gradient that an update stands for, from the record of a run."""
    clients = max(3, case.clients)
    shares = np.array_split(held[: case.images * case.clients], case.clients)
    shares += [held[-1:]] * (clients - case.clients)
    with pool.federation({**CONTEXT, **case.settings}, shares, seed) as view:
        moved = view.update(1, "client000") if case.clients == 1 else view.average(1)
    return -moved / case.settings["lr"] / case.steps


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, default=16, help="federations of each kind")
    made.add_argument("--images", type=int, nargs="*", default=[1, 4, 16, 32])
    made.add_argument("--clients", type=int, default=4)
    made.add_argument("--directions", type=int, default=64)
    made.add_argument("--starts", type=int, default=4)
    made.add_argument("--steps", type=int, default=1500)
    made.add_argument("--shown", type=int, default=0, help="pictures to draw, from single images")
    args = made.parse_args()
    pool = Pool.load(args)
    mixed = np.random.default_rng(3).permutation(len(pool.sets[0].labels))
    theirs, own = np.sort(mixed[::2]), np.sort(mixed[1::2])
    with pool.federation({**CONTEXT, **GENTLE, "protection": "none"}, [theirs[:2]] * 3, 0) as view:
        adversary = Adversary.prepare(pool, view.settings, view.prompt(1), own, args.directions)
    every, labels = pool.features[0].images, pool.features[0].labels
    rows: list[dict[str, Any]] = []
    drawn = dict[str, list[Tensor]]()
    for case in cases(args.images, args.clients):
        begin, figures = time.monotonic(), list[tuple[float, ...]]()
        for seed in range(args.runs):
            torch.manual_seed(seed)
            held = np.random.default_rng([6, seed]).permutation(theirs)
            inside = held[: case.images * case.clients]
            seen = observed(pool, case, held, seed)
            found = adversary.search(seen, labels[inside], args.starts, args.steps)
            blind = adversary.guessed(labels[inside])
            both = (scored(adversary, x, inside, theirs, every, labels) for x in (found, blind))
            figures.append(sum(both, ()))
            if case.images == 1 and seed < args.shown:
                drawn.setdefault(case.name, []).append(found[0])
        values = np.array(figures)
        row: dict[str, Any] = {"view": case.name, "attack": "gradient matching"}
        row |= {key: interval(values[:, i]) for i, key in enumerate(FIGURES)}
        rows.append(row)
        seconds = (time.monotonic() - begin) / args.runs
        print(f"{case.name:46} {worded(row)}  {seconds:.1f} s", flush=True)
        save(args, rows)
    plots.intervals(args.json, rows, "view", "attack", {
        "cosine": ("cosine with the true feature", 0.0), "found": ("image found in its class", 0.0),
    })  # fmt: skip
    if args.shown and args.json:
        draw(args, pool, adversary, theirs, drawn)
    return 0


def scored(
    adversary: Adversary, found: Tensor, inside: Index, theirs: Index, every: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Mean cosine, and how many are found; guesses are matched with the true ones of their class as
    well as can be, which alone makes some of them fit."""
    of = labels[inside]
    right, guess = adversary.centred(every[inside], of), adversary.centred(found, of)
    cosines = (guess @ right.T).masked_fill(of[:, None] != of[None], -9.0).numpy()
    _, match = linear_sum_assignment(-cosines)
    hits = []
    for i, j in enumerate(match):
        same = theirs[(labels[theirs] == of[i]).numpy()]
        near = adversary.centred(every[same], labels[same]) @ guess[i]
        hits.append(float(same[int(near.argmax())] == inside[j]))
    at = np.arange(len(match)), match
    return float(cosines[at].mean()), float(np.mean(hits))


def draw(
    args: argparse.Namespace, pool: Pool, adversary: Adversary, theirs: Index,
    drawn: dict[str, list[Tensor]],
) -> None:  # fmt: skip
    """Pictures: the true one, what its exact feature gives, and what was found."""
    size = pool.backbone.test_transform(pool.sets[0].image(0)).shape[1]
    firsts = [int(np.random.default_rng([6, s]).permutation(theirs)[0]) for s in range(args.shown)]
    truth = [pool.backbone.test_transform(pool.sets[0].image(i)) for i in firsts]
    lines = {"the image": truth}
    exact = [pool.features[0].images[i] for i in firsts]
    for name, features in {"from its exact feature": exact, **drawn}.items():
        lines[name] = [adversary.pixels(f, size, 500) for f in features]
    plots.pictures(args.json.with_name(args.json.stem + "_shown.json"), lines)


if __name__ == "__main__":
    sys.exit(main())
