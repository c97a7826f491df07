"""Membership from the final prompt alone: the prompt that is published, no round of its making.

    python benchmarks/privacy/final_prompt.py --json final_prompt.json
    python benchmarks/privacy/final_prompt.py --model local-dir:PATH --dataset caltech101.zip

After PIPRA (Bian et al., AAAI 2026): the adversary tunes prompts on images of its own, whose
members it knows, and trains a discriminator on pairs of prompt and image: both are projected from
the model's own space, the projections by a contrastive loss as well, and the discriminator sees
them and their product. It has seen neither the target's images nor any prompt that was tuned on
them. Beside it the loss of the image under the prompt (Yeom et al., 2018), and how much lower that
is than the loss under "a photo of a".

Members are the images of all who took part; as many others are drawn from the same images: where
classes, or anything else, tell members from others, an attack finds that and no member.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
    auc,
    bootstrap,
    losses,
    parser,
    private,
    save,
    worded,
)
from torch import Tensor, nn

from secure_fedprompt.clients.methods.base import Method, build
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.protocol.settings import MethodSettings


class Discriminator(nn.Module):
    """(B, E) image features and (B, 2E) text features of their classes -> (B,) logits."""

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, hidden), nn.Linear(2 * width, hidden)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.judge = nn.Sequential(
            nn.Linear(3 * hidden + 1, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 1)
        )

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and cosines of the projections."""
        a, b = F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)
        cosine = (a * b).sum(1, keepdim=True)
        return self.judge(torch.cat([a, b, a * b, cosine], 1))[:, 0], cosine[:, 0]

    @torch.no_grad()
    def judged(self, of: Candidates) -> Array:
        return self.eval()(of.images, of.texts)[0].double().numpy()

    def loss(self, images: Tensor, texts: Tensor, member: Tensor) -> Tensor:
        """Members belong to their prompts, others do not: in the projections, and as judged."""
        logits, cosine = self(images, texts)
        pulled = F.binary_cross_entropy_with_logits(self.scale * cosine, member)
        return F.binary_cross_entropy_with_logits(logits, member) + pulled


@dataclass
class Candidates:
    """Images with one prompt: features (N, E), texts (N, 2E), who was trained on (N,), and two
    scores (N,): minus the loss, and by how much it is below that of the words alone."""

    images: Tensor
    texts: Tensor
    member: Tensor
    low: Array
    lowered: Array


@torch.no_grad()
def candidates(pool: Pool, prompted: Method, rows: Index, inside: Index) -> Candidates:
    """What the adversary's own copy of the model makes of a prompt and of images."""
    images = pool.features[0].subset(rows)
    words = build(MethodSettings(method="zeroshot"), pool.backbone, pool.sets[0].class_names)
    texts = [m.encode(m.ctx)[0][images.labels] for m in (prompted, words)]  # type: ignore[attr-defined]
    loss, before = (losses(m, images)[0] for m in (prompted, words))
    member = torch.from_numpy(np.isin(rows, inside).astype(np.float32))
    joined = torch.cat([texts[0], texts[0] - texts[1]], 1)
    return Candidates(images.images.float(), joined.float(), member, -loss, before - loss)


def trained(shadows: Sequence[Candidates], steps: int, seed: int) -> Discriminator:
    """On these prompts; as it was when it told those apart best that it did not see."""
    torch.manual_seed(seed)
    kept, left = shadows[: -len(shadows) // 5], shadows[-len(shadows) // 5 :]
    made = Discriminator(shadows[0].images.shape[1])
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-3, weight_decay=1e-2)
    best, state = 0.0, made.state_dict()
    order = np.random.default_rng(seed)
    for step in range(steps):
        one = kept[order.integers(len(kept))]
        optimiser.zero_grad()
        made.train().loss(one.images, one.texts, one.member).backward()
        optimiser.step()
        if step % 100 == 99:
            score = float(np.mean([auc(*split(made.judged(c), c.member)) for c in left]))
            if score > best:
                best, state = score, {k: v.clone() for k, v in made.state_dict().items()}
    made.load_state_dict(state)
    return made


def split(scores: Array, member: Tensor) -> tuple[Array, Array]:
    inside = member.numpy() > 0
    return scores[inside], scores[~inside]


@dataclass(frozen=True)
class Case:
    """A prompt that is published.

    Attributes:
        alone: one client's prompt, not the cohort's. changes: of the settings.
    """

    name: str
    protection: str
    alone: bool
    dp: PrivacySettings
    changes: dict[str, Any]


def cases(args: argparse.Namespace, images: int) -> Iterator[Case]:
    long = {"n_ctx": 16, "init": "", "epochs": 3 * args.epochs}
    yield Case("one client, 16 random tokens, long", "none", True, NO_DP, long)
    yield Case("one client", "none", True, NO_DP, {})
    yield Case(f"{args.clients} clients, masks", "masks", False, NO_DP, {})
    for epsilon in args.epsilons:
        dp = private(epsilon, args.delta, images, args.epochs, args.rounds)
        name = f"{args.clients} clients, masks, dp epsilon {epsilon:g}"
        yield Case(name, "masks", False, dp, {})


def published(pool: Pool, case: Case, args: argparse.Namespace, of: Index, seed: int) -> Candidates:
    """One federation whose members are a random half of ``of``."""
    inside, outside = np.array_split(np.random.default_rng([4, seed]).permutation(of), 2)
    shares = np.array_split(inside, args.clients)
    if case.alone:  # the others only make up the cohort
        shares[1:] = [share[:2] for share in shares[1:]]
    settings = {**CONTEXT, "rounds": 1 if case.alone else args.rounds, "lr": args.lr,
                "epochs": args.epochs, "clip": 16.0, "protection": case.protection,
                "metrics": "off", **case.changes}  # fmt: skip
    with pool.federation(settings, shares, seed, [case.dp] * len(shares)) as view:
        if not case.alone:
            return candidates(
                pool, pool.method(view.settings, view.prompt(args.rounds + 1)), of, inside
            )
        prompt = view.prompt(1) + view.update(1, "client000")
        return candidates(
            pool,
            pool.method(view.settings, prompt),
            np.append(shares[0], outside[: len(shares[0])]),
            inside,
        )


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, default=24, help="federations that are attacked")
    made.add_argument("--shadows", type=int, default=48, help="the adversary's")
    made.add_argument("--clients", type=int, default=4)
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--steps", type=int, default=4000, help="of the discriminator")
    made.add_argument("--epsilons", type=float, nargs="*", default=[8.0])
    made.add_argument("--delta", type=float, default=1e-3)
    args = made.parse_args()
    pool = Pool.load(args)
    mixed = np.random.default_rng(3).permutation(len(pool.sets[0].labels))
    theirs, own = np.sort(mixed[::2]), np.sort(mixed[1::2])
    rows: list[dict[str, Any]] = []
    for case in cases(args, len(theirs) // 2 // args.clients):
        begin = time.monotonic()
        shadows = [published(pool, case, args, own, 1000 + k) for k in range(args.shadows)]
        judge = trained(shadows, args.steps, 0)
        targets = [published(pool, case, args, theirs, k) for k in range(args.runs)]
        for attack, scores in (
            ("loss", [t.low for t in targets]),
            ("loss below the words' own", [t.lowered for t in targets]),
            ("discriminator", [judge.judged(t) for t in targets]),
            ("discriminator, on shadows", [judge.judged(s) for s in shadows]),
        ):
            whose = shadows if attack.endswith("shadows") else targets
            pairs = [split(s, t.member) for s, t in zip(scores, whose, strict=True)]
            row = {"view": case.name, "attack": attack, **bootstrap(pairs)}
            rows.append(row)
            print(f"{case.name:40} {attack:26}  {worded(row)}", flush=True)
        count = args.shadows + args.runs
        print(f"  {(time.monotonic() - begin) / count:.1f} s a federation", flush=True)
        save(args, rows)
    plots.intervals(args.json, rows, "view", "attack", {
        "auc": ("AUC", 0.5), "tpr_at_1_fpr": ("true positives at 1% false positives", 0.01),
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
