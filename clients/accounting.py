"""Epsilon of DP-SGD steps, by Opacus' accountants: how it is counted, not what happened."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from secure_fedprompt.protocol.errors import BudgetError

# Opacus' default orders end at 63, too low for small epsilons: it warns, and its PRV accountant,
# which bounds its grid with them, cannot be told others. So they are widened where both look.
ORDERS = [1 + x / 10.0 for x in range(1, 100)] + [*range(11, 64)] + [2**k for k in range(6, 13)]
_TOLERANCE = 0.005  # relative, of a noise multiplier that is searched for
_MAX_SIGMA = 64.0  # with more noise nothing is learned


@dataclass(frozen=True)
class Steps:
    """``count`` steps with noise multiplier ``sigma`` and sampling probability ``rate``."""

    sigma: float
    rate: float
    count: int


def epsilon(history: Sequence[Steps], delta: float, accountant: str = "prv") -> float:
    """Epsilon at ``delta`` of Poisson-subsampled Gaussian steps, add/remove one image.

    Args:
        accountant: "rdp" (Mironov, Talwar and Zhang 2019) or "prv" (Gopi, Lee and Wutschitz 2021),
            whose upper bound is taken.
    """
    from opacus.accountants import PRVAccountant, RDPAccountant

    if not history:
        return 0.0
    if any(step.sigma == 0 for step in history):
        return float("inf")
    counted: dict[tuple[float, float], int] = {}
    for step in history:
        key = step.sigma, step.rate
        counted[key] = counted.get(key, 0) + step.count
    chosen = RDPAccountant() if accountant == "rdp" else PRVAccountant()
    chosen.history = [(sigma, rate, count) for (sigma, rate), count in counted.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # logarithms of zero far out in a tail
        RDPAccountant.DEFAULT_ALPHAS = ORDERS
        return float(chosen.get_epsilon(delta))


def noise_for(
    target: float, delta: float, rate: float, count: int, before: Sequence[Steps], accountant: str
) -> float:
    """The smallest noise multiplier with which ``count`` more steps stay within ``target``.

    Raises:
        BudgetError: what was spent before leaves no room for any.
    """

    def within(sigma: float) -> bool:
        return epsilon([*before, Steps(sigma, rate, count)], delta, accountant) <= target

    low, high = 0.0, 0.5
    if accountant == "prv":  # slow, but never above the other: begin where that one ends
        high = noise_for(target, delta, rate, count, before, "rdp")
        low = 0.8 * high
    while not within(high):
        low, high = high, 2 * high
        if high > _MAX_SIGMA:
            spent = epsilon(before, delta, accountant)
            raise BudgetError(
                f"target_epsilon = {target:g}: epsilon {spent:.3g} at delta {delta:g} is spent "
                f"already, which leaves no room for {count} steps with a noise multiplier below "
                f"{_MAX_SIGMA:g}; raise it, or stop here"
            )
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


def steps_of(images: int, batch_size: int, epochs: int) -> tuple[float, int]:
    """Sampling probability and steps of one round over so many images."""
    rate = min(1.0, batch_size / images)
    return rate, max(1, round(epochs / rate))
