"""Points and scalars of the prime-order subgroup of Ed25519, as libsodium computes with them."""

from __future__ import annotations

from nacl import bindings, exceptions

from secure_fedprompt.protocol.errors import PointError
from secure_fedprompt.protocol.shamir import Entropy

POINT = 32


def random_scalar(entropy: Entropy) -> bytes:
    """Uniform in [1, L), L the order of the group."""
    while True:
        scalar: bytes = bindings.crypto_core_ed25519_scalar_reduce(entropy(64))
        if any(scalar):
            return scalar


def check_point(point: bytes, who: str) -> bytes:
    """Refuse what is not a point of the prime-order subgroup, or is the identity.

    Raises:
        PointError
    """
    if len(point) != POINT or not bindings.crypto_core_ed25519_is_valid_point(point):
        raise PointError(f"{who} is no point of the Ed25519 group")
    return point


def multiply(scalar: bytes, point: bytes) -> bytes:
    """
    Raises:
        PointError: the product is the identity.
    """
    try:
        found: bytes = bindings.crypto_scalarmult_ed25519_noclamp(scalar, point)
    except exceptions.RuntimeError:
        raise PointError("a point multiplies to the identity") from None
    return found
