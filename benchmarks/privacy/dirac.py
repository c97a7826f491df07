"""Canaries in gradient space, through the code that clients run.

Every image of a client has a gradient of its own: one coordinate, longer than the clip. Beside
them lie as many coordinates that belong to no image. Clipping, sampling, noise, division and the
optimiser's step are those of ``LocalTrainer``; the adversary sees the prompt after every step,
which is what the accountants assume. A coordinate then holds what one image adds, and nothing else:
as many observations "with" and "without" as there are coordinates.

Whole clients likewise: the update of each is one coordinate, longer than the clip, and the
adversary sees the sum, of which it takes away what its colluders put in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tradeoff import Claim

from secure_fedprompt.clients.features import Features
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.methods.base import Array as Tensors
from secure_fedprompt.clients.methods.base import Batch, Method
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.clients.work import Work
from secure_fedprompt.protocol import client_noise, fixedpoint
from secure_fedprompt.protocol.client_noise import Noise
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.settings import MethodSettings

Array = NDArray[np.float64]
LONG = 100.0  # a gradient's length, far beyond any clip


class Dirac(Method):
    """Image i pulls coordinate i of two tensors, one of each kind that DP-SGD knows.

    Their gradients are clipped together, so that both hold 1 / sqrt(2) of the clip.
    """

    name = "dirac"

    def __init__(self, size: int) -> None:
        self.both, self.alone = (nn.Parameter(torch.zeros(size)) for _ in range(2))
        self.shared = {"both": self.both, "own": self.alone}

    def uploaded(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("own", (len(self.alone),)),)

    def state(self) -> dict[str, Tensors]:
        return {"own": self.alone.detach().numpy().copy()}

    def load(self, tensors: Mapping[str, Tensors]) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.zero_()

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    logits = loss

    def private_parts(self) -> Any:
        return {"shared": ((self.both,), lambda p: p.reshape(1, 1, -1))}, {"own": self.alone}

    def sample_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        rows = torch.arange(len(batch.labels))
        shared = outputs["shared"].flatten(1)[rows, batch.labels]
        return -LONG * (shared + outputs["own"][rows, batch.labels])


def observe_images(
    images: int, batch: int, epochs: int, sigma: float, clip: float, runs: int
) -> tuple[Array, Array]:
    """What single steps of private training show, in units of the clip.

    Returns:
        (runs x images, steps) with an image, and as many without.
    """
    method = Dirac(2 * images)
    labels = torch.arange(images)
    features = Features.of(labels.reshape(-1, 1).float(), labels, method.needs)
    seen: list[Array] = []

    def watch(what: str, done: int, total: int) -> None:
        seen.append(np.stack([p.detach().double().numpy() for p in method.parameters()]))

    held: Any = _Held(images)
    backbone: Any = SimpleNamespace(fingerprint=b"", check_class_names=lambda names: None)
    dp = PrivacySettings(kind="sample", noise_multiplier=sigma, max_grad_norm=clip)
    trainer = LocalTrainer(
        backbone, held, held, progress=watch, features=(features, features), dp=dp
    )
    settings = MethodSettings(
        lr=1.0, momentum=0.0, weight_decay=0.0, batch_size=batch, epochs=epochs
    )
    learner = LocalLearner(trainer, settings, method)
    found = []
    for number in range(1, runs + 1):
        plan: Any = SimpleNamespace(
            run=bytes(16), round=number, learning_round=number, rounds=runs, training=True,
            layout=(), selecting=False, clip=1.0, uniform=1,
            selection=SimpleNamespace(federation=False),
        )  # fmt: skip
        learner.run(Work(plan, np.zeros(2 * images, np.float32)))
        steps = np.diff(np.stack([np.zeros((2, 2 * images)), *seen]), axis=0)
        found.append(steps.sum(1).T * batch / clip / np.sqrt(2))  # both tensors, un-averaged
        seen.clear()
    made = np.stack(found)
    return tuple(made[:, part].reshape(-1, made.shape[2]) for part in _halves(images))  # type: ignore[return-value]


class _Held:
    """Stands for a set of images whose features are known."""

    class_names = ("a", "b")

    def __init__(self, images: int) -> None:
        self._images = images

    def __len__(self) -> int:
        return self._images


def _halves(size: int) -> tuple[slice, slice]:
    return slice(0, size), slice(size, 2 * size)


def observe_clients(
    quorum: int, colluders: int, noise: Noise, runs: int, rounds: int
) -> tuple[Array, Array]:
    """What sums over a quorum show, in units of the clip.

    Returns:
        (runs x honest clients, rounds) with a client's update, and as many without.
    """
    honest = quorum - colluders
    layout = fixedpoint.size_layout(
        (TensorSpec("own", (2 * honest,)),), quorum, clip=LONG, max_weight=1, max_seen=1,
        ring_bits=32, metrics=False, noise=noise.room,
    )  # fmt: skip
    sums = np.array([_summed(layout, noise, honest, colluders) for _ in range(runs * rounds)])
    made = sums.reshape(runs, rounds, 2 * honest).transpose(0, 2, 1) / noise.clip
    return tuple(made[:, part].reshape(-1, rounds) for part in _halves(honest))  # type: ignore[return-value]


def _summed(layout: Any, noise: Noise, honest: int, colluders: int) -> Array:
    """One sum, less what the colluders put in."""
    uploads = []
    for k in range(honest + colluders):
        vector = np.zeros(2 * honest + 2)
        if k < honest:
            vector[k] = LONG
        vector[-2:] = 1
        uploads.append(client_noise.encode(layout, noise, vector, os.urandom(32), os.urandom))
    total = np.sum(uploads, 0, dtype=np.uint32) - np.sum(uploads[honest:], 0, dtype=np.uint32)
    return fixedpoint.decode(layout, fixedpoint.to_integers(layout, total))[: 2 * honest]


def scores(claim: Claim, seen: Sequence[Array]) -> tuple[Array, Array]:
    """The best test: likelihood ratios over all steps."""
    inside, outside = (claim.loss(part).sum(1) for part in seen)
    return inside, outside
