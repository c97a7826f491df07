"""FedPGP: a low-rank local correction of the global prompt, kept useful by a contrastive term.

Cui, Li, Wang and Shi, "Harmonizing Generalization and Personalization in Federated Prompt Learning"
(ICML 2024). ctx = global + U V. The contrastive term holds text features of the global prompt near
those of a fixed one (placeholder words and the name) and away from the personal ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import (
    Batch,
    parameter,
)
from secure_fedprompt.clients.methods.promptfl import PromptFL
from secure_fedprompt.protocol.settings import MethodSettings

_STD, _TEMPERATURE = 0.02, 0.5


class FedPGP(PromptFL):
    """``left`` (1, n_ctx, r) and ``right`` (1, r, W) stay with the client."""

    name = "fedpgp"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        super().__init__(settings, backbone, class_names)
        rank, (_, n_ctx, width) = settings.compare.rank, self.ctx.shape
        rng = np.random.default_rng([settings.seed, 2])
        left, right = (
            (_STD * rng.standard_normal(shape)).astype(np.float32)
            for shape in ((1, n_ctx, rank), (1, rank, width))
        )
        self.left, self.right = parameter(left, backbone), parameter(right, backbone)
        self.own = {"left": self.left, "right": self.right}
        self.contrast = settings.compare.contrast
        self._fixed = backbone.zero_shot_features(class_names, " ".join(["X"] * n_ctx))

    def _texts(self) -> Tensor:
        """Global and personal text features, (2, C, E)."""
        personal = self.ctx + self.left @ self.right
        return self.backbone.text_features(torch.cat([self.ctx, personal]), self.tokens)

    def logits(self, batch: Batch) -> Tensor:
        return self.backbone.scale * batch.images @ self._texts()[1].T

    def loss(self, batch: Batch) -> Tensor:
        shared, personal = self._texts()
        loss = F.cross_entropy(self.backbone.scale * batch.images @ personal.T, batch.labels)
        near, far = (shared * self._fixed).sum(-1), (shared * personal).sum(-1)
        return loss + self.contrast * F.softplus((far - near) / _TEMPERATURE).mean()
