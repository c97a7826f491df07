"""Optimal transport between the patches of an image and a few prompts, for FedOTP.

Li, Huang, Wang and Shi, "Global and Local Prompts Cooperation via Optimal Transport for Federated
Learning" (CVPR 2024), section 3. Patches i have mass 1/M each, prompts j a share of gamma; costs
are C = 1 - S for cosines S. With K = exp(-C / eps) the plan is diag(u) K diag(v) with

    unbalanced   u = min(1, (1/M) / (K v)),   v = (gamma/N) / (K^T u)   rows at most 1/M
    classical    u = (1/M) / (K v),           v = (1/N) / (K^T u)       Sinkhorn (Cuturi 2013)

iterated from u = v = 1. Everything is kept as logarithms in float32, since K underflows in half
precision at eps = 0.01 and in single precision below 0.01.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHECK = 5  # iterations between looks at the stopping test, on the CPU where a look is free


@torch.no_grad()
def transport_plan(
    similarity: Tensor,
    *,
    eps: float,
    gamma: float,
    mode: str = "unbalanced",
    iterations: int = 100,
    tolerance: float = 1e-4,
    early: bool | None = None,
) -> Tensor:
    """The plan of every problem in a batch, without gradient.

    Args:
        similarity: cosines (..., M, N).
        eps: entropic regularisation; gamma: share of the mass that is matched.
        mode: "unbalanced" or "classical".
        iterations: at most so many updates.
        tolerance: a problem whose log v moves by no more than this in an update is left as it is.
        early: stop once all problems are; default on the CPU only, where asking costs nothing, and
            not in a compiled graph, which cannot ask.

    Returns:
        (..., M, N), finite for every eps from 0.001 to 1.
    """
    *_, patches, prompts = similarity.shape
    capped = mode == "unbalanced"
    with torch.autocast(similarity.device.type, enabled=False):
        # One contiguous (..., M) array for each prompt: sums over prompts are then elementwise.
        kernel = ((similarity.float() - 1) / eps).movedim(-1, 0).contiguous()
        log_alpha = -math.log(patches)
        log_beta = math.log((gamma if capped else 1.0) / prompts)
        log_v = torch.zeros_like(kernel[..., :1])  # (N, ..., 1)
        log_u = torch.zeros_like(kernel[0])  # (..., M)
        done = torch.zeros_like(log_v[0], dtype=torch.bool)
        if early is None:
            early = similarity.device.type == "cpu" and not torch.compiler.is_compiling()
        for step in range(iterations):
            new_u = log_alpha - _log_sum(kernel + log_v)
            if capped:
                new_u = new_u.clamp(max=0)
            new_v = log_beta - torch.logsumexp(kernel + new_u, -1, keepdim=True)
            moved = (new_v - log_v).abs().amax(0)
            log_u = torch.where(done, log_u, new_u)
            log_v = torch.where(done, log_v, new_v)
            done = done | (moved <= tolerance)
            if early and step % _CHECK == _CHECK - 1 and bool(done.all()):
                break
        return (kernel + log_u + log_v).exp().movedim(0, -1)


def _log_sum(logs: Tensor) -> Tensor:
    """log of the sum of exponentials over the first, short dimension."""
    if len(logs) == 2:
        return torch.logaddexp(logs[0], logs[1])
    return torch.logsumexp(logs, 0)


def transported_similarity(similarity: Tensor, *, mode: str, **options: float) -> Tensor:
    """sum(T * S) over patches and prompts, (...,); the gradient reaches S alone.

    ``average`` is the plain mean of S.
    """
    if mode == "average":
        return similarity.mean((-2, -1))
    plan = transport_plan(similarity, mode=mode, **options)  # type: ignore[arg-type]
    return (plan.to(similarity.dtype) * similarity).sum((-2, -1))
