"""DP-FPL: a global prompt and a local one that learns in a low rank, where less noise is added.

Tran, Sun, Patterson and Milanova, "Privacy-Preserving Personalized Federated Prompt Learning for
Multimodal Large Language Models" (ICLR 2025). The context is global + local. In every step the
local one is factorised by one power iteration (Yu et al., "Large Scale Private Learning via
Low-rank Reparametrization", ICML 2021), local = U V + residual with orthonormal U (n, r) and V
(r, W), and moves by the gradients of U and V alone: for D, that of the context,

    P(D) = (D V') V + U (U' D) - U U' (D V') V,

the part of D in the tangent space of rank-r matrices at U V. P is symmetric and the residual stands
still, so a context that is P(local) plus a constant has that gradient. Noise on the gradients of U
and V, which the paper adds, is P of noise on D; and P knows only a prompt that was made with noise,
so DP-SGD may clip and noise D as everywhere and project what comes out.

Its code divides the gradient by ten, adds the last term, draws the power iteration's start anew in
every step, and clips the gradients of batches, which bounds no single image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.methods.base import Array, Batch, Shared, parameter, put
from secure_fedprompt.clients.methods.promptfl import PromptFL
from secure_fedprompt.protocol.settings import MethodSettings

_BESIDE_WORDS = 0.1  # of the words' scale: a start from words stays one


class DPFPL(PromptFL):
    """See the module; ``ctx`` (aggregated) and ``local`` are (1, n_ctx, W)."""

    name = "dpfpl"

    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None:
        super().__init__(settings, backbone, class_names)
        rng, (_, n_ctx, width) = np.random.default_rng([settings.seed, 1]), self.ctx.shape
        scale = backbone.word_scale * (_BESIDE_WORDS if settings.init else 1)
        drawn = (scale * rng.standard_normal(self.ctx.shape)).astype(np.float32)
        self.local = parameter(drawn, backbone)
        self.own = {"local": self.local}
        rank = min(settings.compare.rank, n_ctx)
        probe = rng.standard_normal((width, rank)).astype(np.float32)
        self._probe = torch.from_numpy(probe).to(backbone.device)

    def adopt(self, tensors: Mapping[str, Array]) -> None:
        self.load(tensors)
        put(self.local, np.zeros(self.local.shape, np.float32))

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Orthonormal U (n_ctx, r) and V (r, W) of the local context, where a step begins."""
        local = self.local[0]
        left, _ = torch.linalg.qr(local @ self._probe.to(local.dtype))
        right, _ = torch.linalg.qr(local.T @ left)
        return left, right.T

    @staticmethod
    def project(values: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """P of (..., n_ctx, W)."""
        inside = values @ right.T @ right
        return inside + left @ (left.T @ (values - inside))

    def context(self, ctx: Tensor, local: Tensor) -> Tensor:
        """(1, n_ctx, W): the sum, of which P(local) alone has a gradient."""
        low = self.project(local, *self.factors())
        return ctx + low + (local - low).detach()

    def encode_both(self, ctx: Tensor, local: Tensor) -> Tensor:
        return self.encode(self.context(ctx, local))

    def private_parts(self) -> tuple[dict[str, Shared], dict[str, nn.Parameter]]:
        return {"ctx": ((self.ctx, self.local), self.encode_both)}, {}

    def after_noise(self) -> None:
        assert self.local.grad is not None
        self.local.grad = self.project(self.local.grad, *self.factors())

    def logits(self, batch: Batch) -> Tensor:
        text = self.encode_both(self.ctx, self.local)[0]
        return self.backbone.scale * batch.images @ text.T
