"""The whole image tower and a linear head: federated learning as it was before prompts.

``finetune`` starts from the loaded tower and zero-shot text features, ``scratch`` from random
values. Averaged like any model (McMahan et al., AISTATS 2017); PromptFL compares its communication
with both. Every value of the tower is trained and uploaded, millions instead of thousands, so the
tower must be a small one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import Array, Batch, Method, array, parameter
from secure_fedprompt.protocol.errors import ModelError
from secure_fedprompt.protocol.plan import MAX_VALUES
from secure_fedprompt.protocol.settings import MethodSettings


class FineTuned(Method):
    """``tower`` (values,) is the image tower in the order of its parameters, ``head`` (C, E).

    Buffers, such as the statistics of batch norms, stay those of the loaded model.
    """

    name = "finetune"
    needs = "pixels"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        self.backbone = backbone
        self.visual = cast(nn.Module, backbone.model.visual)
        self.shapes = {name: p.shape for name, p in self.visual.named_parameters()}
        count = sum(math.prod(shape) for shape in self.shapes.values())
        texts = backbone.zero_shot_features(class_names)
        if count + texts.numel() > MAX_VALUES:
            raise ModelError(
                f"method {self.name!r} would upload {count:,} values of the image tower, at most "
                f"{MAX_VALUES:,} are possible: use a smaller model"
            )
        self.tower = parameter(self.first_tower(settings.seed), backbone)
        self.head = parameter(self.first_head(array(texts)), backbone)
        self.shared = {"tower": self.tower, "head": self.head}

    def first_tower(self, seed: int) -> Array:
        return np.concatenate([array(p).reshape(-1) for p in self.visual.parameters()])

    def first_head(self, texts: Array) -> Array:
        return texts

    def logits(self, batch: Batch) -> Tensor:
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = torch.functional.split(self.tower.to(self.backbone.dtype), sizes)
        values = {
            name: part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        with self.backbone.precision():
            images = torch.func.functional_call(self.visual, values, (batch.images,))
        images = F.normalize(images.to(self.backbone.dtype), dim=-1)
        return self.backbone.scale * images @ self.head.to(images.dtype).T


class Scratch(FineTuned):
    """Matrices N(0, 1 / inputs), norms 1, biases 0, embeddings N(0, 1 / width); the head 0."""

    name = "scratch"

    def first_tower(self, seed: int) -> Array:
        rng = np.random.default_rng([seed, 4])
        parts = []
        for name, shape in self.shapes.items():
            drawn = rng.standard_normal(shape)
            if len(shape) == 1 and name.endswith("bias"):
                drawn = np.zeros(shape)
            elif len(shape) == 1 and name.endswith("weight"):
                drawn = np.ones(shape)
            else:
                drawn /= math.sqrt(math.prod(shape[1:]) if len(shape) > 1 else shape[0])
            parts.append(drawn.astype(np.float32).reshape(-1))
        return np.concatenate(parts)

    def first_head(self, texts: Array) -> Array:
        return np.zeros_like(texts)
