"""PromptFL + FedProx: clients stay near the global prompt (Li et al., MLSys 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import Array, Batch, put
from secure_fedprompt.clients.methods.promptfl import PromptFL
from secure_fedprompt.protocol.settings import MethodSettings


class FedProx(PromptFL):
    """Adds mu / 2 |p - p_global|^2 to the loss, with its gradient."""

    name = "fedprox"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        super().__init__(settings, backbone, class_names)
        self.mu, self.anchor = settings.compare.prox_mu, self.ctx.detach().clone()

    def load(self, tensors: Mapping[str, Array]) -> None:
        super().load(tensors)
        put(self.anchor, tensors["ctx"])

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + self.mu / 2 * (self.ctx - self.anchor).square().sum()
