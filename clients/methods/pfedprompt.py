"""pFedPrompt: a global prompt, and a local cache of training features that votes beside it.

Guo, Guo and Wang, "pFedPrompt: Learning Personalized Prompt for Vision-Language Models in Federated
Learning" (WWW 2023). The cache adds sharpened similarities to the client's own training images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import Batch
from secure_fedprompt.clients.methods.promptfl import PromptFL
from secure_fedprompt.protocol.settings import MethodSettings


class PFedPrompt(PromptFL):
    """The cache is made of the client's images, never trained and never sent."""

    name = "pfedprompt"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        super().__init__(settings, backbone, class_names)
        self.options, self.classes = settings.compare, len(class_names)
        self.keys = self.votes = torch.zeros(0)

    def observe(self, images: Tensor, labels: Tensor) -> None:
        self.keys, self.votes = images, F.one_hot(labels, self.classes).to(images.dtype)

    def logits(self, batch: Batch) -> Tensor:
        logits = super().logits(batch)
        if not len(self.keys):
            return logits
        near = torch.exp(self.options.cache_sharpness * (batch.images @ self.keys.T - 1))
        return logits + self.options.cache_weight * near @ self.votes

    def loss(self, batch: Batch) -> Tensor:
        """Of the prompt alone: a training image would find itself in the cache."""
        return F.cross_entropy(PromptFL.logits(self, batch), batch.labels)
