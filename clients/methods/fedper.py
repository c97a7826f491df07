"""PromptFL + FedPer: the first half of the context is shared, the rest stays with its client. Of a
context of one token nothing would be shared, so that is shared whole.

Arivazhagan et al., "Federated Learning with Personalization Layers" (2019), on context tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from secure_fedprompt.clients.methods.base import Array, Arrays, array, put
from secure_fedprompt.clients.methods.promptfl import PromptFL
from secure_fedprompt.protocol.layout import TensorSpec


class FedPer(PromptFL):
    name = "fedper"

    @property
    def kept(self) -> int:
        """Context tokens that are aggregated: half of them, rounded down, and one at least."""
        return max(1, self.ctx.shape[1] // 2)

    def uploaded(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("ctx", (1, self.kept, self.ctx.shape[2])),)

    def state(self) -> Arrays:
        return {"ctx": array(self.ctx)[:, : self.kept]}

    def load(self, tensors: Mapping[str, Array]) -> None:
        own = array(self.ctx)[:, self.kept :]
        put(self.ctx, np.concatenate([tensors["ctx"], own], 1))

    def private(self) -> Arrays:
        return {"own": array(self.ctx)[:, self.kept :].copy()}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        shared = array(self.ctx)[:, : self.kept]
        put(self.ctx, np.concatenate([shared, arrays["own"]], 1))
