"""What a method needs of images, computed once and kept on the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from secure_fedprompt.clients import vision
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data.sets import ImageSet
from secure_fedprompt.clients.methods.base import Batch, Method

_CHUNK = 256  # images at a time through the image tower


_PREDICT = {"features": 256, "patches": 64, "tokens": 64, "pixels": 64}  # images at a time


Progress = Callable[[str, int, int], None]
A = TypeVar("A")
B = TypeVar("B")


def at_once(read: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """Read files in threads: decoders and resizing let others run. In the order of ``items``."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(read, items))


class Features:
    """What a method needs of images, on the device: see ``Method.needs``.

    Raises:
        DataError: an image cannot be decoded.
    """

    def __init__(
        self, backbone: Backbone, images: ImageSet, needs: str, progress: Progress, what: str
    ) -> None:
        parts = []
        for start in range(0, len(images), _CHUNK):
            index = range(start, min(start + _CHUNK, len(images)))
            pixels = at_once(lambda i: backbone.test_transform(images.image(i)), index)
            parts.append(encode(backbone, torch.stack(pixels), needs))
            progress(what, index.stop, len(images))
        self.needs = needs
        empty = torch.zeros(0, dtype=backbone.dtype, device=backbone.device)
        self.images = torch.cat(parts) if parts else empty
        self.labels = torch.from_numpy(images.labels).to(backbone.device)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, images: torch.Tensor, labels: torch.Tensor, needs: str) -> Features:
        """What was computed before."""
        made = cls.__new__(cls)
        made.images, made.labels, made.needs = images, labels, needs
        return made

    def subset(self, index: NDArray[np.int64]) -> Features:
        """Some of the images, without computing anything again."""
        rows = torch.from_numpy(index)
        images = self.images[rows.to(self.images.device)]
        return self.of(images, self.labels[rows.to(self.labels.device)], self.needs)

    def batches(self, size: int, order: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        index = torch.from_numpy(np.arange(len(self)) if order is None else order)
        for start in range(0, len(index), size):
            rows = index[start : start + size].to(self.labels.device)
            yield Batch(self.images[rows.to(self.images.device)], self.labels[rows])


def encode(backbone: Backbone, pixels: torch.Tensor, needs: str) -> torch.Tensor:
    """What the frozen image tower gives a method."""
    match needs:
        case "patches":
            return vision.patch_features(backbone, pixels)
        case "tokens":
            return vision.image_tokens(backbone, pixels)
        case "pixels":
            return pixels.to(backbone.device, backbone.dtype)
    return backbone.image_features(pixels)


@torch.no_grad()
def predict(method: Method, images: Features) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Predicted labels and cross-entropy of every image, (N,) each."""
    guesses, losses = [], []
    for batch in images.batches(_PREDICT[images.needs]):
        logits = method.logits(batch).float()
        guesses.append(logits.argmax(1).cpu().numpy())
        losses.append(
            F.cross_entropy(logits, batch.labels, reduction="none").double().cpu().numpy()
        )
    if not guesses:
        return np.zeros(0, np.int64), np.zeros(0)
    return np.concatenate(guesses), np.concatenate(losses)
