"""Exact discrete Gaussian noise, many values at a time.

Canonne, Kamath and Steinke (NeurIPS 2020, algorithms 2 and 3): a discrete Laplace value is drawn
and kept with a probability that makes it Gaussian. Every choice is a coin that shows heads with
probability exp(-a / b) for integers a and b. Theirs are made of integers; here a coin compares a
uniform real number U in [0, 1) with exp(-a / b), which is the same coin. 64 bits of U are read and
exp(-a / b) is computed in float64, whose error is far below ``SLACK``. Where U is further from it
than that, the outcome is certain. Else, about once in 2^34 coins, U is read on and exp(-a / b)
computed to as many digits as it takes. No outcome depends on a rounding error, so no floating-point
artefact reveals anything (Mironov, CCS 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol.expand import Stream

SLACK = 2.0**-36  # relative; float64 computes the probabilities below to 2^-39 or better
_MOST = 2048.0  # exponents beyond it are left to exact arithmetic
_CHUNK = 1 << 14  # candidates at a time, to stay in the cache
_WORD = 64
Integers = NDArray[np.int64]
Exponent = Callable[[int], tuple[int, int]]  # position -> a, b


class Uniform:
    """Uniform numbers from a keystream."""

    def __init__(self, key: bytes) -> None:
        self._stream = Stream(key)

    def words(self, count: int) -> NDArray[np.uint64]:
        """In [0, 2^64)."""
        return self._stream.read(8 * count).view("<u8").astype(np.uint64)

    def bits(self, count: int) -> NDArray[np.bool_]:
        return (self._stream.read(count) & np.uint8(1)).astype(np.bool_)

    def below(self, bound: int, count: int) -> Integers:
        """In [0, bound), by rejection; ``bound`` at most 2^62."""
        shift = np.uint64(_WORD - max(1, (bound - 1).bit_length()))
        found = np.empty(0, np.int64)
        while len(found) < count:
            drawn = (self.words(count - len(found)) >> shift).astype(np.int64)
            found = np.concatenate([found, drawn[drawn < bound]])
        return found

    def coins(self, exponents: NDArray[np.float64], exact: Exponent) -> NDArray[np.bool_]:
        """True with probability exp(-a / b) each, exactly.

        Args:
            exponents: a / b in float64, at least 0.
            exact: the integers a and b of a position.
        """
        drawn = self.words(len(exponents))
        there, level = drawn.astype(np.float64), np.ldexp(np.exp(-exponents), _WORD)
        margin = level * SLACK + 4
        heads: NDArray[np.bool_] = there < level
        unsure = (np.abs(there - level) <= margin) | (exponents > _MOST)
        for at in np.flatnonzero(unsure):
            heads[at] = self._decide(int(drawn[at]), *exact(int(at)))
        return heads

    def _decide(self, word: int, top: int, bottom: int) -> bool:
        """Whether U < exp(-top / bottom), where ``word`` are the first 64 bits of U."""
        size = _WORD
        while True:
            digits = size // 3 + 10 + len(str(top // bottom))
            context = Context(prec=digits, Emin=MIN_EMIN, Emax=MAX_EMAX)
            level = context.exp(context.divide(Decimal(-top), Decimal(bottom)))
            level = context.multiply(level, Decimal(1 << size))
            # Three roundings; that of the exponent counts as often as the exponent is large: a
            # relative error below 10^(-8 - size // 3).
            near, margin = int(level), int(level) // 10 ** (8 + size // 3) + 2
            if word + margin <= near:
                return True
            if word >= near + margin:
                return False
            word, size = word << _WORD | int(self.words(1)[0]), size + _WORD


def discrete_laplace(source: Uniform, scale: int, candidates: int) -> Integers:
    """P(x) proportional to exp(-|x| / scale), from so many candidates (algorithm 2).

    Returns:
        those that were kept, more than a third of them.
    """
    low = source.below(scale, candidates)
    low = low[source.coins(low / scale, lambda at, drawn=low: (int(drawn[at]), scale))]  # type: ignore[misc]
    high, going = np.zeros(len(low), np.int64), np.arange(len(low))
    while len(going):
        going = going[source.coins(np.ones(len(going)), lambda at: (1, 1))]
        high[going] += 1
    values, negative = low + scale * high, source.bits(len(low))
    values[negative] *= -1
    kept: Integers = values[(values != 0) | ~negative]
    return kept


def discrete_gaussian(key: bytes, variance: int, count: int) -> Integers:
    """P(x) proportional to exp(-x^2 / (2 variance)), ``count`` of them (algorithm 3).

    Args:
        key: 32 secret bytes, used once.
        variance: 1 to 2^56.
    """
    source, found, missing = Uniform(key), list[Integers](), count
    scale = math.isqrt(variance) + 1
    middle, bottom = variance / scale, 2 * variance * scale * scale
    while missing > 0:
        values = discrete_laplace(source, scale, min(_CHUNK, 3 * missing + 8))
        exponents = np.square(np.abs(values) - middle) / (2.0 * variance)

        def exact(at: int, drawn: Integers = values) -> tuple[int, int]:
            return (abs(int(drawn[at])) * scale - variance) ** 2, bottom

        kept = values[source.coins(exponents, exact)][:missing]
        found.append(kept)
        missing -= len(kept)
    return np.concatenate(found) if found else np.empty(0, np.int64)
