"""Shamir secret sharing (Shamir 1979) over one 256-bit prime field.

Secrets and shares are 32 little-endian bytes below ``PRIME``. The points of the responders are
the same for every secret of a round, so one Lagrange basis reconstructs all of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from secure_fedprompt.protocol.errors import FieldError, ThresholdError

PRIME = 2**256 - 189
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


def split(secret: bytes, points: Sequence[int], threshold: int, entropy: Entropy) -> list[bytes]:
    """Shares of ``secret`` at ``points``: any ``threshold`` of them give it, fewer give nothing.

    Args:
        secret: a field element, 32 bytes.
        points: distinct, in 1..PRIME-1.
        threshold: number of coefficients, 1..len(points).
        entropy: source of ``32 * (threshold - 1)`` or a few more bytes.
    """
    if not 1 <= threshold <= len(points) or 0 in points or len(set(points)) != len(points):
        raise ThresholdError(f"threshold {threshold} with {len(points)} points cannot be shared")
    coefficients = [to_int(random_element(entropy)) for _ in range(threshold - 1)]
    coefficients.append(to_int(secret))
    return [to_bytes(_evaluate(coefficients, x)) for x in points]


def _evaluate(coefficients: Sequence[int], x: int) -> int:
    """Horner's rule, highest coefficient first. Points are small, so reducing every eighth step
    keeps the operands near 256 bits at less than half the time."""
    value = 0
    for step, coefficient in enumerate(coefficients):
        value = value * x + coefficient
        if not step % 8:
            value %= PRIME
    return value % PRIME


def basis(points: Sequence[int], at: int = 0) -> list[int]:
    """Lagrange coefficients of ``points`` for evaluation at ``at``: sum(l_i y_i) = f(at)."""
    result = []
    for i, xi in enumerate(points):
        top = bottom = 1
        for j, xj in enumerate(points):
            if i != j:
                top = top * (at - xj) % PRIME
                bottom = bottom * (xi - xj) % PRIME
        result.append(top * pow(bottom, -1, PRIME) % PRIME)
    return result


def combine(coefficients: Sequence[int], shares: Sequence[int]) -> bytes:
    """The value that ``basis`` coefficients and shares (as integers) give, as 32 bytes."""
    return to_bytes(sum(map(operator.mul, coefficients, shares)) % PRIME)
