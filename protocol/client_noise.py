"""Differential privacy of whole clients: noise shares in the ring, added before encryption.

The distributed discrete Gaussian mechanism (Kairouz, Liu and Steinke, ICML 2021): each client clips
its whole update to an L2 norm C, rounds it to the plan's grid so that the norm stays bounded
(conditional rounding, their section 4), and adds discrete Gaussian noise in integers. Nobody sees
less than the sum, whose noise has deviation z C even if only ``honest`` of the summed clients added
theirs. The guarantee: (epsilon, delta) for everything that is done with the sums of a run, if one
client's update is replaced by zero. No amplification by sampling is claimed.

Noise is sampled exactly, with integers only (Canonne, Kamath and Steinke, NeurIPS 2020, algorithms
1 to 3), so that no floating-point artefact reveals anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol import fixedpoint
from secure_fedprompt.protocol.codec import F64, U16
from secure_fedprompt.protocol.errors import PlanError, UpdateError
from secure_fedprompt.protocol.expand import Stream, keystream
from secure_fedprompt.protocol.layout import Layout, Vector
from secure_fedprompt.protocol.ring import Words

TAILS = 12.0  # deviations of a share that a field has room for beyond its values
_MAX_TRIES = 1000  # each rounding is kept with probability 1 - exp(-1/2) or more
_WORD = 8
_READ = 1 << 16
Entropy = Callable[[int], bytes]
Integers = NDArray[np.int64]


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


# -- sampling --------------------------------------------------------------------------------------


class Bits:
    """Uniform integers from a keystream."""

    def __init__(self, key: bytes) -> None:
        self._stream, self._data, self._at = Stream(key), b"", 0

    def below(self, bound: int) -> int:
        """Uniform in [0, bound), by rejection."""
        size = (bound.bit_length() + 7) // 8
        excess = 8 * size - bound.bit_length()
        while True:
            if self._at + size > len(self._data):
                self._data = self._data[self._at :] + self._stream.read(_READ).tobytes()
                self._at = 0
            value = int.from_bytes(self._data[self._at : self._at + size], "little") >> excess
            self._at += size
            if value < bound:
                return value


def bernoulli_exp(bits: Bits, top: int, bottom: int) -> bool:
    """True with probability exp(-top / bottom), exactly (algorithm 1)."""
    while top > bottom:
        if not bernoulli_exp(bits, 1, 1):
            return False
        top -= bottom
    k = 1
    while bits.below(bottom * k) < top:
        k += 1
    return k % 2 == 1


def discrete_laplace(bits: Bits, scale: int) -> int:
    """P(x) proportional to exp(-|x| / scale) (algorithm 2)."""
    while True:
        low = bits.below(scale)
        if not bernoulli_exp(bits, low, scale):
            continue
        high = 0
        while bernoulli_exp(bits, 1, 1):
            high += 1
        value, negative = low + scale * high, bits.below(2)
        if value or not negative:
            return -value if negative else value


def discrete_gaussian(bits: Bits, variance: int) -> int:
    """P(x) proportional to exp(-x^2 / (2 variance)) (algorithm 3)."""
    scale = math.isqrt(variance) + 1
    while True:
        value = discrete_laplace(bits, scale)
        top = (abs(value) * scale - variance) ** 2
        if bernoulli_exp(bits, top, 2 * variance * scale * scale):
            return value


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
    bits, variance = Bits(entropy(32)), noise.variance(frac)
    share = np.array([discrete_gaussian(bits, variance) for _ in range(size)], np.int64)
    words[:size] = (rounded + share).astype(np.uint32)
    return words


# -- accounting ------------------------------------------------------------------------------------


def concentrated(noise: Noise, layout: Layout) -> float:
    """rho of one round under zero-concentrated DP (their proposition 14, with rho = eps^2 / 2)."""
    updates = [field for field in layout if field.update]
    values, n = sum(field.size for field in updates), noise.honest
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


def effective(noise: Noise, layout: Layout) -> float:
    """The multiplier of a continuous Gaussian with the same rho: smaller on a coarse grid."""
    rho = concentrated(noise, layout)
    return math.inf if not rho else 1 / math.sqrt(2 * rho)


def epsilon(rho: float, delta: float) -> float:
    """Epsilon at ``delta`` of a rho-zCDP mechanism (Canonne, Kamath and Steinke 2020, cor. 13)."""
    if not rho:
        return 0.0
    orders = [1 + 2.0**k * j for k in range(-12, 14) for j in (1, 1.25, 1.5, 1.75)]
    bounds = [
        a * rho + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders
    ]
    return max(0.0, min(bounds))
