"""PromptFL: one shared context, trained by every client and averaged.

Guo et al., "PromptFL: Let Federated Participants Cooperatively Learn Prompts Instead of Models"
(IEEE TMC 2024); the prompt is CoOp's (Zhou et al., IJCV 2022). Only the context is trained and
uploaded, n_ctx x W values, aggregated with weights n_k / sum n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import (
    Array,
    Arrays,
    Batch,
    Method,
    array,
    initial_context,
    parameter,
    put,
)
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.settings import MethodSettings


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

    def logits(self, batch: Batch) -> Tensor:
        text = self.backbone.text_features(self.ctx, self.tokens)[0]  # (C, E)
        return self.backbone.scale * batch.images @ text.T

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch.labels)
