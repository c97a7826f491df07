"""PromptFL: one shared context, trained by every client and averaged.

Guo et al., "PromptFL: Let Federated Participants Cooperatively Learn Prompts Instead of Models"
(IEEE TMC 2024); the prompt is CoOp's (Zhou et al., IJCV 2022). Only the context is trained and
uploaded, n_ctx x W values, aggregated with weights n_k / sum n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import Arrays, Batch
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.settings import MethodSettings

INIT_STD = 0.02


def initial_context(settings: MethodSettings, backbone: Backbone) -> NDArray[np.float32]:
    """(n_ctx, W): from words, or N(0, 0.02) drawn by numpy so that every machine gets the same.

    Raises:
        ConfigError: the words are not n_ctx tokens.
    """
    if not settings.init:
        rng = np.random.default_rng(settings.seed)
        shape = (settings.n_ctx, backbone.width)
        return (rng.standard_normal(shape) * INIT_STD).astype(np.float32)
    ids = backbone.words(settings.init)
    if len(ids) != settings.n_ctx:
        raise ConfigError(
            f"init = {settings.init!r} has {len(ids)} tokens, n_ctx is {settings.n_ctx}: "
            f"set n_ctx = {len(ids)}"
        )
    return backbone.embed(ids).float().cpu().numpy()


class PromptFL:
    """See the module; ``ctx`` is (1, n_ctx, W)."""

    name = "promptfl"
    needs = "features"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        self.backbone = backbone
        start = torch.from_numpy(initial_context(settings, backbone))[None]
        self.ctx = nn.Parameter(start.to(backbone.device))
        self.tokens = backbone.prompt_tokens(class_names, settings.n_ctx, settings.position)

    def parameters(self) -> list[nn.Parameter]:
        return [self.ctx]

    def uploaded(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("ctx", tuple(self.ctx.shape)),)

    def state(self) -> Arrays:
        return {"ctx": self.ctx.detach().float().cpu().numpy().copy()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        self.ctx.copy_(torch.from_numpy(np.array(tensors["ctx"])))

    def logits(self, batch: Batch) -> Tensor:
        text = self.backbone.text_features(self.ctx, self.tokens)[0]  # (C, E)
        return self.backbone.scale * batch.images @ text.T

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch.labels)
