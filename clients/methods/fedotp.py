"""FedOTP: a global and a local prompt share an image's patches by optimal transport.

Li et al., "Global and Local Prompts Cooperation via Optimal Transport for Federated Learning"
(CVPR 2024). Both contexts are trained; the global one is aggregated with weights n_k / sum n, the
local one never leaves the client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import (
    Array,
    Batch,
    Method,
    Shared,
    initial_context,
    parameter,
    put,
)
from secure_fedprompt.clients.methods.transport import transported_similarity
from secure_fedprompt.protocol.settings import MethodSettings


class FedOTP(Method):
    """See the module; ``ctx`` (aggregated) and ``local`` are (1, n_ctx, W)."""

    name = "fedotp"
    needs = "patches"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        self.backbone, self.options = backbone, settings.fedotp
        start = initial_context(settings, backbone)[None]
        self.ctx = parameter(start, backbone)
        # Another start than the global prompt's: equal prompts would get equal gradients for ever.
        drawn = np.random.default_rng([settings.seed, 1]).standard_normal(start.shape)
        noise = drawn * backbone.word_scale
        local = noise if not settings.init else start + 0.5 * noise
        self.local = parameter(local.astype(np.float32), backbone)
        self.shared, self.own = {"ctx": self.ctx}, {"local": self.local}
        self.tokens = backbone.prompt_tokens(class_names, settings.n_ctx, settings.position)

    def adopt(self, tensors: Mapping[str, Array]) -> None:
        self.load(tensors)
        put(self.local, tensors["ctx"])

    def encode(self, ctx: Tensor) -> Tensor:
        """(G, C, E) class features of contexts (G, n_ctx, W)."""
        return self.backbone.text_features(ctx, self.tokens)

    def private_parts(self) -> tuple[dict[str, Shared], dict[str, nn.Parameter]]:
        if not self.facts.sampled:  # built on this method, with another loss
            return super().private_parts()
        return {"ctx": ((self.ctx,), self.encode), "local": ((self.local,), self.encode)}, {}

    def sample_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        text = torch.cat([outputs["ctx"], outputs["local"]], 1)  # (B, 2, C, E)
        logits = self.transported(torch.einsum("bme,bnce->bcmn", batch.images, text))
        return F.cross_entropy(logits, batch.labels, reduction="none")

    def logits(self, batch: Batch) -> Tensor:
        text = self.encode(torch.cat([self.ctx, self.local]))
        return self.transported(torch.einsum("bme,nce->bcmn", batch.images, text))

    def transported(self, similarity: Tensor) -> Tensor:
        """(B, C) logits from cosines (B, C, M, 2). An image's plan depends on no other image."""
        o = self.options
        return self.backbone.scale * transported_similarity(
            similarity, mode=o.transport, eps=o.eps, gamma=o.gamma, iterations=o.iterations
        )

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch.labels)
