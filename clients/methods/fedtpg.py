"""FedTPG: a small network writes the context from the names of the classes.

Qiu et al., "Federated Text-driven Prompt Generation for Vision-Language Models" (ICLR 2024).
Queries cross-attend to zero-shot text features of the classes; the outputs are context vectors.
The network is averaged, so it also serves classes that no client has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import (
    Batch,
    Method,
    parameter,
)
from secure_fedprompt.protocol.settings import MethodSettings


class FedTPG(Method):
    """Single-head attention with a residual two-layer perceptron; no dropout, no bias."""

    name = "fedtpg"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        self.backbone, width = backbone, backbone.width
        self.names = backbone.zero_shot_features(class_names)  # (C, E)
        embedding = self.names.shape[1]
        shapes = {
            "queries": (settings.compare.queries, width), "to_key": (embedding, width),
            "to_value": (embedding, width), "to_query": (width, width),
            "inner": (width, 2 * width), "outer": (2 * width, width),
        }  # fmt: skip
        rng = np.random.default_rng([settings.seed, 3])
        self.shared = {
            name: parameter(
                (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32), backbone
            )
            for name, shape in shapes.items()
        }
        self.tokens = backbone.prompt_tokens(class_names, settings.compare.queries)

    def context(self) -> Tensor:
        """(1, queries, W), at the scale of token embeddings."""
        w = self.shared
        names = self.names.to(w["queries"].dtype)
        query = w["queries"] @ w["to_query"]
        near = F.softmax(query @ (names @ w["to_key"]).T / query.shape[-1] ** 0.5, -1)
        mixed = w["queries"] + near @ (names @ w["to_value"])
        mixed = mixed + F.gelu(mixed @ w["inner"]) @ w["outer"]
        return 0.02 * F.layer_norm(mixed, mixed.shape[-1:])[None]

    def logits(self, batch: Batch) -> Tensor:
        text = self.backbone.text_features(self.context(), self.tokens)[0]
        return self.backbone.scale * batch.images @ text.T
