"""Differential privacy of whole clients: noise shares in the ring, added before encryption.

The distributed discrete Gaussian mechanism (Kairouz, Liu and Steinke, ICML 2021): each client clips
its whole update to an L2 norm C, rounds it to the plan's grid so that the norm stays bounded
(conditional rounding, their section 4), and adds discrete Gaussian noise in integers. Nobody sees
less than the sum, whose noise has deviation z C even if only ``honest`` of the summed clients added
theirs. The guarantee: (epsilon, delta) for everything that is done with the sums of a run, if one
client's update is replaced by zero. No amplification by sampling is claimed.

Noise is sampled exactly (``discrete_gaussian``), so that no floating-point artefact reveals
anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from secure_fedprompt.protocol import fixedpoint
from secure_fedprompt.protocol.codec import F64, U16
from secure_fedprompt.protocol.discrete_gaussian import Integers, discrete_gaussian
from secure_fedprompt.protocol.errors import PlanError, UpdateError
from secure_fedprompt.protocol.expand import keystream
from secure_fedprompt.protocol.layout import Layout, Vector
from secure_fedprompt.protocol.ring import Words
from secure_fedprompt.protocol.shamir import Entropy

TAILS = 12.0  # deviations of a share that a field has room for beyond its values
_MAX_TRIES = 1000  # each rounding is kept with probability 1 - exp(-1/2) or more
_WORD = 8
_ORDERS = 1 + np.geomspace(1e-4, 1e7, 20_000)


@dataclass(frozen=True)
class Noise:
    """As in the plan; ``NONE`` without noise.

    Attributes:
        clip: C, largest L2 norm of an update over all tensors.
        multiplier: z; the sum's noise has deviation z C in each value.
        honest: summed clients that are sure to have added their share: the quorum less colluders.
    """

    clip: F64
    multiplier: F64
    honest: U16

    @property
    def used(self) -> bool:
        return self.honest != 0

    def check(self, quorum: int) -> None:
        """Refuse what contradicts itself.

        Raises:
            PlanError
        """
        if not self.used:
            if self != NONE:
                raise PlanError("fields of client noise without it")
            return
        if not (0 < self.clip < math.inf and 0 < self.multiplier < math.inf):
            raise PlanError(f"client noise of multiplier {self.multiplier} at clip {self.clip}")
        if self.honest > quorum:
            raise PlanError(f"noise relies on {self.honest} clients, the quorum is {quorum}")

    @property
    def room(self) -> float:
        """What a field's bound needs for the noise of one share."""
        if not self.used:
            return 0.0
        return TAILS * self.multiplier * self.clip / math.sqrt(self.honest)

    def variance(self, frac: int) -> int:
        """Of one share, in squared steps of 2^-frac; rounded up."""
        total = math.ldexp(self.multiplier * self.clip, frac) ** 2
        return max(1, math.ceil(total / self.honest))


NONE = Noise(0.0, 0.0, 0)


# -- a client's contribution -----------------------------------------------------------------------


def sensitivity(clip: float, frac: int, values: int) -> float:
    """Largest L2 norm, in steps, that conditional rounding leaves (their equation 13, beta =
    exp(-1/2))."""
    scaled, root = math.ldexp(clip, frac), math.sqrt(values)
    return math.sqrt(min((scaled + root) ** 2, scaled**2 + values / 4 + scaled + root / 2))


def conditionally_rounded(vector: Vector, frac: int, clip: float, entropy: Entropy) -> Integers:
    """Clip to L2 norm ``clip``, scale by 2^frac, round stochastically until the norm is bounded."""
    norm = float(np.linalg.norm(vector))
    scaled = np.ldexp(vector * min(1.0, clip / norm) if norm else vector, frac)
    bound = sensitivity(clip, frac, len(vector))
    for _ in range(_MAX_TRIES):
        draws = np.frombuffer(keystream(entropy(32), _WORD * len(vector)), "<u8")
        rounded: Integers = np.floor(scaled + (draws >> np.uint64(11)) * 2.0**-53).astype(np.int64)
        if float(np.square(rounded.astype(np.float64)).sum()) <= bound**2:
            return rounded
    raise UpdateError("an update could not be rounded within its norm")


def encode(
    layout: Layout, noise: Noise, vector: Vector, rounding_key: bytes, entropy: Entropy
) -> Words:
    """A ``fixedpoint.weighted`` vector as ring words, with this client's share of the noise.

    Without noise this is ``fixedpoint.encode``, and ``entropy`` is not used.
    """
    words = fixedpoint.encode(layout, vector, rounding_key)
    updates = [field for field in layout if field.update]
    if not noise.used or not updates:
        return words
    frac, size = updates[0].frac, sum(field.size for field in updates)
    rounded = conditionally_rounded(vector[:size], frac, noise.clip, entropy)
    share = discrete_gaussian(entropy(32), noise.variance(frac), size)
    words[:size] = (rounded + share).astype(np.uint32)
    return words


# -- accounting ------------------------------------------------------------------------------------


def concentrated(noise: Noise, layout: Layout, shares: int | None = None) -> float:
    """rho of one round under zero-concentrated DP (their proposition 14, with rho = eps^2 / 2).

    Args:
        shares: of the noise that count, each sized as the plan says; by default as many as the plan
            counts on.

    Returns:
        infinity without noise.
    """
    updates = [field for field in layout if field.update]
    values, n = sum(field.size for field in updates), noise.honest if shares is None else shares
    if not noise.used or n < 1:
        return math.inf
    if not values:
        return 0.0
    frac = updates[0].frac
    variance, delta = noise.variance(frac), sensitivity(noise.clip, frac, values)
    tau = 10 * sum(math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, n))
    eps = min(
        math.sqrt(delta**2 / (n * variance) + tau * values / 2),
        delta / math.sqrt(n * variance) + tau * math.sqrt(values),
    )
    return eps**2 / 2


def effective(noise: Noise, layout: Layout, shares: int | None = None) -> float:
    """The multiplier of a continuous Gaussian with the same rho: smaller on a coarse grid."""
    rho = concentrated(noise, layout, shares)
    return math.inf if not rho else 1 / math.sqrt(2 * rho)


def epsilon(rho: float, delta: float) -> float:
    """Epsilon at ``delta`` of a rho-zCDP mechanism (Canonne, Kamath and Steinke 2020, cor. 13).

    Any order gives a bound; the finest of a grid is taken, within 10^-5 of the best.
    """
    if not rho or math.isinf(rho):
        return rho
    bounds = rho * _ORDERS + np.log1p(-1 / _ORDERS)
    bounds -= (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1)
    return max(0.0, float(bounds.min()))
