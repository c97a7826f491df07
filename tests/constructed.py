"""A world in which it is known what a prompt must learn.

Text features are a class's own direction plus what is linear in the context: a shift of all classes,
or a turn of each towards the next class or the one before. Images are the class's direction shifted,
or turned. Whoever finds the same is right everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secure_fedprompt.clients.methods.base import Batch, Method, build
from secure_fedprompt.clients.steps import Steps
from secure_fedprompt.protocol.settings import MethodSettings

CLASSES, SIZE = 6, 24
NAMES = tuple(f"class {i}" for i in range(CLASSES))


class Plain:
    """A stand-in for a CLIP, in as far as methods ask for one."""

    device, dtype, width, word_scale = torch.device("cpu"), torch.float32, 32, 0.02
    scale = torch.tensor(20.0)

    def __init__(self, turning: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.names = torch.linalg.qr(draw(SIZE, SIZE))[0][:CLASSES]  # orthonormal
        self.reads = draw(self.width, SIZE) / 4 * (not turning)
        self.turns = draw(self.width, 2) / 4 * turning

    def words(self, text: str) -> list[int]:
        return list(range(len(text.split())))

    def embed(self, ids: Sequence[int]) -> Tensor:
        return torch.zeros(len(ids), self.width)

    def prompt_tokens(self, names: Sequence[str], n_ctx: int, *_: Any, **__: Any) -> list[int]:
        return [NAMES.index(name) for name in names]

    def text_features(self, ctx: Tensor, tokens: list[int]) -> Tensor:
        """(G, C, E) of contexts (G, n_ctx, W)."""
        shift, turn = ctx.sum(1) @ self.reads, ctx.sum(1) @ self.turns  # (G, E), (G, 2)
        turned = torch.stack([self.turned(1), self.turned(-1)])[:, tokens] - self.names[tokens]
        moved = torch.einsum("gt,tce->gce", turn, turned)
        return F.normalize(self.names[tokens] + shift[:, None] + moved, dim=-1)

    def turned(self, steps: int) -> Tensor:
        """(C, E) directions of the classes so many further on."""
        return self.names.roll(-steps, 0)

    def zero_shot_features(self, names: Sequence[str], template: str = "") -> Tensor:
        return self.names[[NAMES.index(name) for name in names]]

    def images(self, labels: Tensor, shift: Tensor, seed: int, noise: float = 0.05) -> Tensor:
        """(B, E); ``shift`` (E,) of all, or (C, E) of each class."""
        shift = shift[labels] if shift.ndim == 2 else shift
        drawn = torch.randn(len(labels), SIZE, generator=torch.Generator().manual_seed(seed))
        return F.normalize(self.names[labels] + shift + noise * drawn, dim=-1)


def method_of(name: str, world: Plain, **changes: Any) -> Method:
    given: dict[str, Any] = {"method": name, "n_ctx": 2, **changes}
    return build(MethodSettings(**given), world, NAMES)  # type: ignore[arg-type]


def federate(methods: Sequence[Method], data: Sequence[Batch], rounds: int, lr: float) -> None:
    """Plain federated averaging of what methods upload, each trained on its own images."""
    mean = methods[0].state()
    for number in range(1, rounds + 1):
        sent = []
        for k, (method, batch) in enumerate(zip(methods, data, strict=True)):
            method.begin(mean, number)
            steps = Steps(method, lr=lr, momentum=0.9, weight_decay=0.0)
            for _ in range(20):
                steps.take(batch)
            sent.append(method.contribution(np.random.default_rng([number, k])))
        mean = {key: np.mean([s[key] for s in sent], 0) for key in mean}
    for method in methods:
        method.begin(mean, rounds + 1)


@torch.no_grad()
def right(method: Method, batch: Batch) -> float:
    """Share of right answers among all classes."""
    return float((method.logits(batch).argmax(1) == batch.labels).float().mean())
