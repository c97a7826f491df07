"""Arithmetic in F_p, p = 2^61 - 1, on arrays of uint64: what tags of sums are made of.

2^61 = 1 mod p, so a shift is a rotation of 61 bits, and a reduction an addition.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

P = (1 << 61) - 1
_BITS, _P = np.uint64(61), np.uint64(P)
_LOW31, _LOW30 = np.uint64((1 << 31) - 1), np.uint64((1 << 30) - 1)
Elements = NDArray[np.uint64]


def reduced(values: Elements) -> Elements:
    """Any uint64 modulo p."""
    folded = (values & _P) + (values >> _BITS)
    return np.asarray(folded - _P * (folded >= _P))


def elements(data: bytes) -> Elements:
    """One element from each 16 bytes, little-endian: uniform but for 2^-67."""
    words = np.frombuffer(data, "<u8").reshape(-1, 2)
    return add(rotated(reduced(words[:, 1]), 3), reduced(words[:, 0]))  # 2^64 = 2^3


def signed(values: NDArray[np.int64]) -> Elements:
    """Integers of magnitude up to 2^62."""
    return reduced(np.where(values < 0, values + 4 * P, values).astype(np.uint64))


def rotated(values: Elements, places: int) -> Elements:
    """``2^places`` times elements, 0 < places < 61."""
    shift = np.uint64(places)
    return ((values << shift) & _P) | (values >> (_BITS - shift))


def add(one: Elements, other: Elements) -> Elements:
    return reduced(one + other)


def negative(values: Elements) -> Elements:
    return reduced(_P - values)


def multiply(one: Elements, other: Elements) -> Elements:
    """Element by element; the partial products of 31-bit halves stay below 2^64 in sum."""
    a1, a0 = one >> np.uint64(31), one & _LOW31
    b1, b0 = other >> np.uint64(31), other & _LOW31
    middle = a1 * b0 + a0 * b1  # below 2^62; times 2^31
    high = np.uint64(2) * (a1 * b1)  # 2^62 = 2
    return reduced(
        high + (middle >> np.uint64(30)) + ((middle & _LOW30) << np.uint64(31)) + a0 * b0
    )


def total(values: Elements) -> Elements:
    """Sum over the first axis, of fewer than 2^32 elements."""
    half = np.uint64(32)
    high = (values >> half).sum(0, dtype=np.uint64)
    low = (values & np.uint64((1 << 32) - 1)).sum(0, dtype=np.uint64)
    return add(rotated(reduced(high), 32), reduced(low))
