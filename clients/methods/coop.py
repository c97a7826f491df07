"""CoOp: every client trains a context of its own, nothing is shared (Zhou et al., IJCV 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import Array, Arrays, array, put
from secure_fedprompt.clients.methods.promptfl import PromptFL
from secure_fedprompt.protocol.settings import MethodSettings


class CoOp(PromptFL):
    """Uploads the start unchanged, so that it runs beside the federated methods."""

    name = "coop"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        super().__init__(settings, backbone, class_names)
        self._start = array(self.ctx)

    def state(self) -> Arrays:
        return {"ctx": self._start}

    def load(self, tensors: Mapping[str, Array]) -> None:
        self._start = np.array(tensors["ctx"])

    def private(self) -> Arrays:
        return {"own": array(self.ctx)}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        put(self.ctx, arrays["own"])
