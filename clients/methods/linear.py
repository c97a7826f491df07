"""A linear classifier on frozen image features: federated learning without prompts.

``linear`` starts from zero-shot text features and fine-tunes them; ``linear-scratch`` starts from
zeros. Averaged like any model (McMahan et al., AISTATS 2017).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import (
    Array,
    Batch,
    Method,
    array,
    parameter,
)
from secure_fedprompt.protocol.settings import MethodSettings


class LinearHead(Method):
    """``head`` is (C, E): its size grows with the classes, and so does the upload."""

    name = "linear"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        self.backbone = backbone
        self.head = parameter(self.start(backbone, class_names), backbone)
        self.shared = {"head": self.head}

    def start(self, backbone: Backbone, class_names: Sequence[str]) -> Array:
        return array(backbone.zero_shot_features(class_names))

    def logits(self, batch: Batch) -> Tensor:
        return self.backbone.scale * batch.images @ self.head.to(batch.images.dtype).T


class ScratchHead(LinearHead):
    name = "linear-scratch"

    def start(self, backbone: Backbone, class_names: Sequence[str]) -> Array:
        return np.zeros_like(super().start(backbone, class_names))
