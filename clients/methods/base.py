"""What a federated prompt method is, to the rest of the system.

Secure aggregation sees ``uploaded`` and the flat vector; training sees ``parameters`` and
``loss``; evaluation sees ``logits``. Nothing else knows which method runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.settings import MethodSettings

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Batch:
    """Labelled images as the method asked for them (``needs``).

    Attributes:
        images: pooled features (B, E) or pixels (B, 3, H, H).
        labels: (B,) class indices.
    """

    images: Tensor
    labels: Tensor


class Method(Protocol):
    """A prompt method on one client.

    Attributes:
        name: as in settings and plans.
        needs: "features" if the frozen pooled image feature is all it takes (then it is computed
            once and cached), else "pixels".
    """

    name: str
    needs: str

    def parameters(self) -> list[nn.Parameter]:
        """Everything that local training changes."""

    def uploaded(self) -> tuple[TensorSpec, ...]:
        """The tensors that are aggregated."""

    def state(self) -> Arrays:
        """Current values of the uploaded tensors, float32."""

    def load(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Start from an aggregate."""

    def loss(self, batch: Batch) -> Tensor:
        """Training loss, a scalar."""

    def logits(self, batch: Batch) -> Tensor:
        """(B, C) for prediction."""


def build(settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]) -> Method:
    """The method that the settings name.

    Raises:
        ConfigError: there is no such method.
    """
    from secure_fedprompt.clients.methods.promptfl import PromptFL

    methods = {PromptFL.name: PromptFL}
    if settings.method not in methods:
        raise ConfigError(f"method = {settings.method!r}: must be one of {', '.join(methods)}")
    return methods[settings.method](settings, backbone, class_names)
