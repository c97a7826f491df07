"""Shamir secret sharing (Shamir 1979) over one 256-bit prime field.

Secrets and shares are 32 little-endian bytes below ``PRIME``. The points of the responders are
the same for every secret of a round, so one Lagrange basis reconstructs all of them. Several
secrets can be shared side by side, at the same points.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType

from secure_fedprompt.protocol.errors import FieldError, ThresholdError

PRIME = 2**256 - 189
_LONG = 512  # bits that a product may have before it is reduced
Entropy = Callable[[int], bytes]


def to_int(data: bytes) -> int:
    value = int.from_bytes(data, "little")
    if len(data) != 32 or value >= PRIME:
        raise FieldError(f"share of {len(data)} bytes is not a field element")
    return value


def to_bytes(value: int) -> bytes:
    return value.to_bytes(32, "little")


def random_element(entropy: Entropy) -> bytes:
    """A uniform field element, by rejection."""
    while True:
        data = entropy(32)
        if int.from_bytes(data, "little") < PRIME:
            return data


def drawn(stream: bytes) -> bytes:
    """Field elements, each from 32 uniform bytes; their bias is below 2^-248."""
    words = (stream[at : at + 32] for at in range(0, len(stream), 32))
    return b"".join([to_bytes(int.from_bytes(word, "little") % PRIME) for word in words])


def split(
    secrets: bytes,
    points: Sequence[int],
    threshold: int,
    entropy: Entropy,
    given: Mapping[int, bytes] = MappingProxyType({}),
) -> list[bytes]:
    """Shares at ``points``: any ``threshold`` of them give the secrets, fewer give nothing.

    A polynomial is fixed by its value at 0 and threshold - 1 others. Some of those may be
    ``given``, if they are uniform: then they need not be sent to whoever can draw them as well.

    Args:
        secrets: field elements, 32 bytes each, side by side, as the shares will be.
        points: distinct, in 1..PRIME-1.
        threshold: number of coefficients, 1..len(points).
        entropy: source of what is not given, 32 bytes or a few more for each element.
        given: shares by point, less than ``threshold``.
    """
    if (
        not len(given) < threshold <= len(points)
        or 0 in points
        or len(set(points)) != len(points)
        or not given.keys() <= set(points)
    ):
        raise ThresholdError(
            f"threshold {threshold} with {len(points)} points, {len(given)} of them given, cannot "
            "be shared"
        )
    count, known = len(secrets) // 32, dict(given)
    for point in [p for p in points if p not in given][: threshold - 1 - len(given)]:
        known[point] = b"".join([random_element(entropy) for _ in range(count)])
    nodes = (0, *known)
    rows = map(_elements, (secrets, *known.values()))
    weighted = [[w * y % PRIME for y in row] for w, row in zip(_weights(nodes), rows, strict=True)]
    columns = list(zip(*weighted, strict=True))
    for point in points:
        if point not in known:
            products = _products(nodes, point)
            known[point] = b"".join([combine(products, column) for column in columns])
    return [known[point] for point in points]


def _elements(data: bytes) -> list[int]:
    return [to_int(data[at : at + 32]) for at in range(0, len(data), 32)]


def basis(points: Sequence[int], at: int = 0) -> list[int]:
    """Lagrange coefficients of ``points`` for evaluation at ``at``: sum(l_i y_i) = f(at)."""
    pairs = zip(_weights(tuple(points)), _products(points, at), strict=True)
    return [weight * product % PRIME for weight, product in pairs]


def _products(points: Sequence[int], at: int) -> list[int]:
    """prod(at - x_j), j != i."""
    offsets = [at - x for x in points]
    before = accumulate(offsets[:-1], _times, initial=1)
    behind = [*accumulate(offsets[:0:-1], _times, initial=1)][::-1]
    return [b * a % PRIME for b, a in zip(before, behind, strict=True)]


@functools.lru_cache(maxsize=8)
def _weights(points: tuple[int, ...]) -> list[int]:
    """1 / prod(x_i - x_j), j != i, by one inversion for all (Montgomery 1987, section 10.3)."""
    bottoms = [math.prod([x - other for other in points if other != x]) % PRIME for x in points]
    before = [*accumulate(bottoms, _times, initial=1)]
    inverse, weights = pow(before.pop(), -1, PRIME), []
    for bottom, product in zip(reversed(bottoms), reversed(before), strict=True):
        weights.append(inverse * product % PRIME)
        inverse = inverse * bottom % PRIME
    return weights[::-1]


def _times(a: int, b: int) -> int:
    """Points are small: most products need no reduction."""
    product = a * b
    return product if product.bit_length() < _LONG else product % PRIME


def combine(coefficients: Sequence[int], shares: Sequence[int]) -> bytes:
    """The value that ``basis`` coefficients and shares (as integers) give, as 32 bytes."""
    return to_bytes(sum(map(operator.mul, coefficients, shares)) % PRIME)
