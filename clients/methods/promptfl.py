"""PromptFL: one shared context, trained by every client and averaged.

Guo et al., "PromptFL: Let Federated Participants Cooperatively Learn Prompts Instead of Models"
(IEEE TMC 2024); the prompt is CoOp's (Zhou et al., IJCV 2022). Only the context is trained and
uploaded, n_ctx x W values, aggregated with weights n_k / sum n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import (
    Batch,
    Method,
    Shared,
    initial_context,
    parameter,
)
from secure_fedprompt.protocol.settings import MethodSettings


class PromptFL(Method):
    """See the module; ``ctx`` is (1, n_ctx, W)."""

    name = "promptfl"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        self.backbone = backbone
        self.ctx = parameter(initial_context(settings, backbone)[None], backbone)
        self.shared = {"ctx": self.ctx}
        self.tokens = backbone.prompt_tokens(class_names, settings.n_ctx, settings.position)

    def encode(self, ctx: Tensor) -> Tensor:
        """(G, C, E) class features of contexts (G, n_ctx, W)."""
        return self.backbone.text_features(ctx, self.tokens)

    def private_parts(self) -> tuple[dict[str, Shared], dict[str, nn.Parameter]]:
        if not self.facts.sampled:  # built on this method, with another loss
            return super().private_parts()
        return {"ctx": ((self.ctx,), self.encode)}, {}

    def sample_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        cosine = torch.einsum("be,bce->bc", batch.images, outputs["ctx"][:, 0])
        return F.cross_entropy(self.backbone.scale * cosine, batch.labels, reduction="none")

    def logits(self, batch: Batch) -> Tensor:
        text = self.encode(self.ctx)[0]  # (C, E)
        return self.backbone.scale * batch.images @ text.T
