"""PromptFL + FT: each client trains the final global prompt once more on its own images.

The personalisation baseline of the FedOTP and FedMGP papers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import Array, Arrays, array, put
from secure_fedprompt.clients.methods.promptfl import PromptFL
from secure_fedprompt.protocol.settings import MethodSettings


class PromptFLFineTuned(PromptFL):
    name = "promptfl-ft"
    fine_tunes = True

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        super().__init__(settings, backbone, class_names)
        self._tuned = False

    def load(self, tensors: Mapping[str, Array]) -> None:
        super().load(tensors)
        self._tuned = False

    def tuned(self) -> None:
        self._tuned = True

    def private(self) -> Arrays:
        return {"own": array(self.ctx)} if self._tuned else {}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        if arrays:
            put(self.ctx, arrays["own"])
            self._tuned = True
