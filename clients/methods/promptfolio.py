"""PromptFolio: text features mix a global and a local prompt.

Pan, Huang and Shi, "Federated Learning from Vision-Language Foundation Models: Theoretical Analysis
and Method" (NeurIPS 2024). The mix is (1 - theta) global + theta local, of normalised features, and
is not normalised again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import Batch
from secure_fedprompt.clients.methods.fedotp import FedOTP
from secure_fedprompt.protocol.settings import MethodSettings


class PromptFolio(FedOTP):
    """The two prompts of FedOTP, joined by a mean of pooled features instead of transport."""

    name = "promptfolio"
    needs = "features"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        super().__init__(settings, backbone, class_names)
        self.theta = settings.compare.theta

    def logits(self, batch: Batch) -> Tensor:
        both = self.backbone.text_features(torch.cat([self.ctx, self.local]), self.tokens)
        text = (1 - self.theta) * both[0] + self.theta * both[1]
        return self.backbone.scale * batch.images @ text.T
