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
    Array,
    Arrays,
    Batch,
    Method,
    Shared,
    array,
    initial_context,
    parameter,
    put,
)
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.settings import MethodSettings

_SAMPLED = ("promptfl", "coop", "fedper")  # whose loss of an image is this one


class PromptFL(Method):
    """See the module; ``ctx`` is (1, n_ctx, W)."""

    name = "promptfl"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        self.backbone = backbone
        self.ctx = parameter(initial_context(settings, backbone)[None], backbone)
        self.tokens = backbone.prompt_tokens(class_names, settings.n_ctx, settings.position)

    def parameters(self) -> list[nn.Parameter]:
        return [self.ctx]

    def uploaded(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("ctx", tuple(self.ctx.shape)),)

    def state(self) -> Arrays:
        return {"ctx": array(self.ctx)}

    def load(self, tensors: Mapping[str, Array]) -> None:
        put(self.ctx, tensors["ctx"])

    def encode(self, ctx: Tensor) -> Tensor:
        """(G, C, E) class features of contexts (G, n_ctx, W)."""
        return self.backbone.text_features(ctx, self.tokens)

    def private_parts(self) -> tuple[dict[str, Shared], dict[str, nn.Parameter]]:
        if self.name not in _SAMPLED:  # built on this method, with another loss
            return super().private_parts()
        return {"ctx": (self.ctx, self.encode)}, {}

    def sample_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        cosine = torch.einsum("be,bce->bc", batch.images, outputs["ctx"][:, 0])
        return F.cross_entropy(self.backbone.scale * cosine, batch.labels, reduction="none")

    def logits(self, batch: Batch) -> Tensor:
        text = self.encode(self.ctx)[0]  # (C, E)
        return self.backbone.scale * batch.images @ text.T

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch.labels)
