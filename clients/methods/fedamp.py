"""PromptFL + FedAMP: every client is drawn to those whose prompts are like its own.

Huang et al., "Personalized Cross-Silo Federated Learning on Non-IID Data" (AAAI 2021). Client i
trains its own prompt p_i with + lambda / 2 |p - u_i|^2, where

    u_i = (1 - sum_j xi_ij) p_i + sum_j xi_ij p_j
    xi_ij = alpha / (n - 1) exp(-|p_i - p_j|^2 / sigma)

needs every pair's distance, so everybody must see everybody's prompt. No secure sum can hide them,
hence only ``protection = "none"`` is allowed. Each client fills a row of its own in the upload and
says so in ``present``; row over presence in the mean is its prompt, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import Array, Arrays, Batch, array, put
from secure_fedprompt.clients.methods.promptfl import PromptFL
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.selection.task import Choice
from secure_fedprompt.protocol.settings import MethodSettings


class FedAMP(PromptFL):
    """See the module.

    Attributes:
        rows: (n, n_ctx, W) and present: (n,), as aggregated: weighted, zero where nobody sat.
        anchor: u_i, (1, n_ctx, W).
    """

    name = "fedamp"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        super().__init__(settings, backbone, class_names)
        self.options, self.anchor = settings.compare, self.ctx.detach().clone()
        self.sit(0, 1)

    def sit(self, seat: int, seats: int) -> None:
        self.seat = seat
        self.rows = np.zeros((seats, *self.ctx.shape[1:]), np.float32)
        self.present = np.zeros(seats, np.float32)

    def uploaded(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("rows", self.rows.shape), TensorSpec("present", self.present.shape))

    def state(self) -> Arrays:
        return {"rows": self.rows.copy(), "present": self.present.copy()}

    def load(self, tensors: Mapping[str, Array]) -> None:
        self.rows, self.present = tensors["rows"].copy(), tensors["present"].copy()

    def begin(self, tensors: Mapping[str, Array], learning_round: int) -> None:
        self.load(tensors)
        put(self.anchor, self.drawn_to())

    def adopt(self, tensors: Mapping[str, Array]) -> None:
        """Without a seat: the mean of the clients' prompts."""
        self.load(tensors)
        if len(prompts := self.prompts()):
            put(self.ctx, prompts.mean(0, keepdims=True))

    def prompts(self) -> Array:
        """(n', n_ctx, W): of the clients in the aggregate."""
        sat = self.present > 0
        return (self.rows[sat] / self.present[sat, None, None]).astype(np.float32)

    def drawn_to(self) -> Array:
        """u_i from the aggregate and the own prompt; that alone if there is nobody else."""
        o, own = self.options, array(self.ctx)
        others = self.present.copy()
        others[self.seat] = 0
        sat = others > 0
        if not sat.any():
            return own
        prompts = self.rows[sat] / self.present[sat, None, None]
        distances = np.square(prompts - own).sum((1, 2))
        weights = o.amp_alpha / sat.sum() * np.exp(-distances / o.amp_sigma)
        drawn = (1 - weights.sum()) * own + np.tensordot(weights, prompts, 1)
        anchor: Array = np.asarray(drawn, np.float32)
        return anchor

    def contribution(self, rng: np.random.Generator, choice: Choice | None = None) -> Arrays:
        rows, present = np.zeros_like(self.rows), np.zeros_like(self.present)
        rows[self.seat], present[self.seat] = array(self.ctx)[0], 1
        return {"rows": rows, "present": present}

    def private(self) -> Arrays:
        return {"own": array(self.ctx)}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        put(self.ctx, arrays["own"])

    def loss(self, batch: Batch) -> Tensor:
        pull = (self.ctx - self.anchor).square().sum()
        return super().loss(batch) + self.options.amp_lambda / 2 * pull
