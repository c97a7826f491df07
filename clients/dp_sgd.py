"""DP-SGD on prompts with Opacus: per-sample gradients, secure noise, Poisson sampling.

Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016). One step: every image of the
client is taken with probability q; the gradients of the taken ones over *all* trained tensors are
clipped together to length C and summed; N(0, sigma^2 C^2) is added; the sum is divided by the
expected batch size, never by the actual one. An empty batch is a step of noise.

A shared context reaches the loss through class features that are the same for every image. They
are computed once and handed to each image as if they were its own, so that a backward pass leaves
each image's gradient with respect to them; one batched backward pass through the text tower then
gives every image's gradient of the context.

``secure_mode`` of Opacus needs a package that cannot be installed any more. Noise and sampling come
from a keystream seeded by the operating system instead, and every normal variate is half the sum of
four, which closes the floating-point attack of Mironov (CCS 2012) as Holohan and Braghin propose
(ESORICS 2021, section 5.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from opacus.optimizers import DPOptimizer
from scipy.special import ndtri
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secure_fedprompt.clients.methods.base import Batch, Method
from secure_fedprompt.protocol.expand import Stream
from secure_fedprompt.protocol.shamir import Entropy

CHUNK = 16  # images at a time in the batched backward pass
_GUARD = 4  # normal variates in one


class Draws:
    """Random numbers that neither a seed of numpy or PyTorch nor an observer of some determines."""

    def __init__(self, entropy: Entropy) -> None:
        self._stream = Stream(entropy(32))

    def uniform(self, count: int) -> NDArray[np.float64]:
        """In (0, 1), odd multiples of 2^-53."""
        words = self._stream.read(8 * count).view("<u8") >> np.uint64(12)
        values: NDArray[np.float64] = (words.astype(np.float64) + 0.5) * 2.0**-52
        return values

    def normal(self, shape: Sequence[int]) -> NDArray[np.float64]:
        """Standard normal, each half the sum of four by inversion."""
        count = int(np.prod(shape, dtype=np.int64))
        parts = ndtri(self.uniform(_GUARD * count)).reshape(_GUARD, count)
        values: NDArray[np.float64] = parts.sum(0).reshape(shape) / np.sqrt(_GUARD)
        return values

    def poisson(self, population: int, rate: float) -> NDArray[np.int64]:
        """Each of ``population`` with probability ``rate``, independently."""
        return np.flatnonzero(self.uniform(population) < rate)


class SharedText(nn.Module):
    """Features of contexts (G, n, W) under a frozen tower, one copy for each image.

    It owns the contexts and nothing of the tower, which is why Opacus accepts it.
    """

    def __init__(self, contexts: Sequence[nn.Parameter], encode: Callable[..., Tensor]) -> None:
        super().__init__()
        for i, context in enumerate(contexts):
            self.register_parameter(f"context{i}", context)
        self._encode = encode
        self.features: Tensor | None = None  # of the last forward pass, with its graph

    def forward(self, rows: Tensor) -> Tensor:
        """(B, G, C, E) for B rows."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no batched backward pass
            self.features = self._encode(*self.parameters(recurse=False))
        # The copies depend on ``rows`` so that hooks on this module see them as its output.
        copies = self.features.detach().expand(len(rows), *self.features.shape)
        return copies + rows.reshape(-1, 1, 1, 1)


class PerImage(nn.Module):
    """A parameter that acts on each image by itself: its copies' gradients are per image."""

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value

    def forward(self, rows: Tensor) -> Tensor:
        """(B, *shape) for B rows."""
        copies = self.value.detach().expand(len(rows), *self.value.shape)
        return copies + rows.reshape(-1, *[1] * self.value.ndim)


@register_grad_sampler(SharedText)  # type: ignore[untyped-decorator]
def _text_gradients(
    module: SharedText, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    assert module.features is not None
    contexts, parts = list(module.parameters(recurse=False)), []
    for start in range(0, len(backprops), CHUNK):
        parts.append(
            torch.autograd.grad(
                module.features, contexts, backprops[start : start + CHUNK],
                is_grads_batched=True, retain_graph=True,
            )
        )  # fmt: skip
    module.features = None
    return {
        p: torch.cat(found) for p, found in zip(contexts, zip(*parts, strict=True), strict=True)
    }


@register_grad_sampler(PerImage)  # type: ignore[untyped-decorator]
def _image_gradients(
    module: PerImage, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    return {module.value: backprops}


class _Parts(nn.Module):
    """What a method trains, as Opacus sees it."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        shared, own = method.private_parts()
        self.shared = nn.ModuleDict({k: SharedText(*v) for k, v in shared.items()})
        self.own = nn.ModuleDict({k: PerImage(v) for k, v in own.items()})

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {k: part(rows) for k, part in [*self.shared.items(), *self.own.items()]}


class SecureOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with noise from ``Draws``; gradients are sums over images."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, draws: Draws, *, sigma: float, clip: float,
        expected: float,
    ) -> None:  # fmt: skip
        super().__init__(
            optimizer, noise_multiplier=sigma, max_grad_norm=clip, expected_batch_size=None,
            loss_reduction="sum",
        )  # fmt: skip
        self._draws, self._expected = draws, expected

    def add_noise(self) -> None:
        for p in self.params:
            if hasattr(p.summed_grad, "_processed"):
                raise ValueError("a gradient sum would be released twice: zero_grad between steps")
            scale = self.noise_multiplier * self.max_grad_norm
            noise = torch.from_numpy(scale * self._draws.normal(p.shape)).to(p.device)
            # Added in float64 and rounded once: in float32 the sum's own grid would show.
            noised = (p.summed_grad.double() + noise) / self._expected
            p.grad = noised.to(p.dtype).view_as(p)
            p.summed_grad._processed = True

    def scale_grad(self) -> None:
        """``add_noise`` has divided already, before rounding."""


class PrivateTraining:
    """One round of DP-SGD.

    Args:
        method: whose ``private_parts`` are trained.
        optimizer: over ``method.parameters()``, all of them.
        sigma: noise multiplier; clip: C; expected: batch size that divides.
    """

    def __init__(
        self, method: Method, optimizer: torch.optim.Optimizer, draws: Draws, *, sigma: float,
        clip: float, expected: float,
    ) -> None:  # fmt: skip
        self._method = method
        self._parts = GradSampleModule(_Parts(method), loss_reduction="sum")
        owned = {id(p) for p in self._parts.parameters()}
        if owned != {id(p) for p in method.parameters()}:
            raise AssertionError("a trained tensor is outside the clipped gradient")
        self._optimizer = SecureOptimizer(
            optimizer, draws, sigma=sigma, clip=clip, expected=expected
        )

    def step(self, batch: Batch) -> None:
        """Clip, add noise, and move; then terms of the loss that see no data."""
        self._optimizer.zero_grad()
        self.backward(batch)
        self._drop_broken()
        self._optimizer.pre_step()
        self._method.after_noise()
        free = self._method.data_free_loss()
        if free is not None:
            params = self._method.parameters()
            found = torch.autograd.grad(free, params, allow_unused=True)
            for p, gradient in zip(params, found, strict=True):
                if gradient is not None:
                    assert p.grad is not None
                    p.grad += gradient
        self._optimizer.original_optimizer.step()

    def _drop_broken(self) -> None:
        """An image whose gradient is not finite counts as absent: no clipping could bound it."""
        parts = [p.grad_sample.flatten(1) for p in self._method.parameters()]  # type: ignore[attr-defined]
        broken = ~torch.stack([part.isfinite().all(1) for part in parts]).all(0)
        for p in self._method.parameters():
            p.grad_sample[broken] = 0  # type: ignore[attr-defined]

    def backward(self, batch: Batch) -> None:
        """Leave every image's gradient in ``grad_sample`` of each parameter."""
        params = self._method.parameters()
        if not len(batch.labels):
            for p in params:
                p.grad_sample = p.new_zeros((0, *p.shape))  # type: ignore[attr-defined]
            return
        first = params[0]
        rows = torch.zeros(len(batch.labels), device=first.device, dtype=first.dtype)
        outputs: dict[str, Tensor] = self._parts(rows.requires_grad_())
        torch.autograd.backward(self._method.sample_losses(outputs, batch).sum())

    def close(self) -> None:
        """Take Opacus' hooks and attributes off the method's tensors."""
        hooks: Any = self._parts
        hooks.to_standard_module()
