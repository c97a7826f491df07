"""What an adversary makes of numbers: likelihood ratios, regression, candidates' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from federations import Array
from numpy.typing import NDArray

from secure_fedprompt.clients.features import Features
from secure_fedprompt.clients.methods.base import Batch, Method

Members = NDArray[np.bool_]


def likelihood_ratios(seen: Array, member: Members) -> Array:
    """Log-likelihood ratios of "member" against "not", online (Carlini et al., 2022, section V).

    Normal, with means of each candidate's own, and one covariance for all candidates: there are
    few shadows of each. Two models are attacked at a time, with all others as their shadows. They
    complement each other, so that of every candidate as many shadows are left with it as without;
    leaving out one alone would pull the AUC below a half where there is nothing to find.

    Args:
        seen: K figures of each model on each candidate, (M, C, K).
        member: which model was trained on which candidate, (M, C); model 2j + 1 on those that
            model 2j was not.

    Returns:
        (M, C)
    """
    scores = np.empty(member.shape)
    for first in range(0, len(member), 2):
        targets = slice(first, first + 2)
        shadows = np.delete(np.arange(len(member)), targets)
        inside = member[shadows][:, :, None]
        log_p = []
        for group in (inside, ~inside):
            own = np.where(group, seen[shadows], np.nan)
            mean = np.nanmean(own, axis=0)
            rest = (own - mean)[group[:, :, 0]]
            covariance = rest.T @ rest / len(rest)
            away = seen[targets] - mean
            distance = np.einsum("mck,kl,mcl->mc", away, np.linalg.inv(covariance), away)
            log_p.append(-distance - np.linalg.slogdet(covariance)[1])
        scores[targets] = log_p[0] - log_p[1]
    return scores


def projections(update: Array, gradients: Array) -> Array:
    """How far an update goes down each candidate's own slope, (C,), lengths of slopes apart."""
    lengths = np.linalg.norm(gradients, axis=1)
    return -(gradients @ update) / np.maximum(lengths, 1e-12)


def gradients(method: Method, images: Features) -> Array:
    """Of each image's loss at the prompt that the method holds, (C, d) in the upload's order."""
    loss = F.cross_entropy(
        method.logits(Batch(images.images, images.labels)), images.labels, reduction="none"
    )
    wanted = list(method.shared.values())
    rows = torch.eye(len(loss), dtype=loss.dtype, device=loss.device)
    found = torch.autograd.grad(loss, wanted, rows, is_grads_batched=True)
    return torch.cat([g.flatten(1) for g in found], 1).double().cpu().numpy()


class Regression:
    """Ridge regression; its strength has the least error on shadows that are left out.

    Args:
        x: (N, d) what is seen of each shadow; y: (N, C) what is true of it.
    """

    def __init__(
        self, x: Array, y: Array, strengths: Sequence[float] = tuple(np.logspace(-6, 3, 28))
    ):
        self._at, self._mean = x.mean(0), y.mean(0)
        left, sizes, right = np.linalg.svd(x - self._at, full_matrices=False)
        rotated = left.T @ (y - self._mean)
        best = np.inf
        for strength in strengths:
            kept = sizes**2 / (sizes**2 + strength * (sizes**2).mean())
            leverage = 1 / len(x) + (left**2) @ kept
            missed = (y - self._mean - left @ (kept[:, None] * rotated)) / (1 - leverage)[:, None]
            if (missed**2).mean() < best:
                best = (missed**2).mean()
                inverse = np.divide(kept, sizes, out=np.zeros_like(sizes), where=sizes > 0)
                self._weights = right.T @ (inverse[:, None] * rotated)

    def __call__(self, x: Array) -> Array:
        return (x - self._at) @ self._weights + self._mean


def interval(runs: Array) -> dict[str, float]:
    """Mean over runs with a 95% bootstrap interval."""
    rng = np.random.default_rng(0)
    again = [rng.choice(runs, len(runs)).mean() for _ in range(1000)]
    low, high = np.quantile(again, [0.025, 0.975])
    return {"value": float(runs.mean()), "low": float(low), "high": float(high)}
