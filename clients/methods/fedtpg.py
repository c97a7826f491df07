"""FedTPG: a small network writes the context from the names of the classes.

Qiu et al., "Federated Text-driven Prompt Generation for Vision-Language Models" (ICLR 2024).
Queries cross-attend to text features of the bare class names; what comes out are context vectors.
The network is averaged, so it also serves classes that no client has. About 4.2 million values at
width 512: the first method here whose upload is not a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import Batch, Method, parameter
from secure_fedprompt.protocol.settings import MethodSettings

HEADS, _INNER, _QUERY_STD = 4, 4, 0.02


class FedTPG(Method):
    """One block: norms of queries and names, attention of four heads with an output projection,
    and a gated perceptron (GEGLU) around which alone there is a residual. Linear maps have biases.
    """

    name = "fedtpg"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        self.backbone, width = backbone, backbone.width
        self.names = backbone.zero_shot_features(class_names, "")  # (C, E)
        embedding, inner = self.names.shape[1], _INNER * width
        linear = {
            "to_query": (width, width), "to_key": (embedding, width),
            "to_value": (embedding, width), "out": (width, width),
            "gated": (width, 2 * inner), "down": (inner, width),
        }  # fmt: skip
        rng = np.random.default_rng([settings.seed, 3])
        values = {
            "queries": _QUERY_STD * rng.standard_normal((settings.compare.queries, width)),
            **{name: rng.uniform(-1, 1, s) / np.sqrt(s[0]) for name, s in linear.items()},
            **{f"{name}.bias": np.zeros(shape[1]) for name, shape in linear.items()},
        }
        for norm, size in (("query", width), ("name", embedding), ("mixed", width)):
            values |= {f"{norm}.scale": np.ones(size), f"{norm}.shift": np.zeros(size)}
        self.shared = {k: parameter(v.astype(np.float32), backbone) for k, v in values.items()}
        self.tokens = backbone.prompt_tokens(class_names, settings.compare.queries)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.shared[name] + self.shared[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale, shift = self.shared[f"{name}.scale"], self.shared[f"{name}.shift"]
        return F.layer_norm(x, x.shape[-1:], scale, shift)

    def context(self) -> Tensor:
        """(1, queries, W)."""
        queries = self.shared["queries"]
        names = self._norm("name", self.names.to(queries.dtype))
        query = self._linear("to_query", self._norm("query", queries))
        q, k, v = (
            x.reshape(len(x), HEADS, -1).transpose(0, 1)
            for x in (query, self._linear("to_key", names), self._linear("to_value", names))
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = self._linear("out", mixed.transpose(0, 1).reshape(query.shape))
        value, gate = self._linear("gated", self._norm("mixed", mixed)).chunk(2, -1)
        return (mixed + self._linear("down", value * F.gelu(gate)))[None]

    def logits(self, batch: Batch) -> Tensor:
        text = self.backbone.text_features(self.context(), self.tokens)[0]
        return self.backbone.scale * batch.images @ text.T
