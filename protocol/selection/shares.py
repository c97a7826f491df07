"""Selection keys as integers, and their additive shares.

FedMGP draws s of m groups without replacement from softmax(similarity / tau). Taking the s largest
of similarity + tau x Gumbel noise, in order, is the same draw (Kool, van Hoof and Welling, ICML
2019). Every mode compares the same integers: 26 bits behind the point, 32 in all, unsigned.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol.errors import UpdateError
from secure_fedprompt.protocol.expand import Purpose, derive, expand
from secure_fedprompt.protocol.selection.circuits import WIDTH
from secure_fedprompt.protocol.shamir import Entropy

SCALE = 1 << 26
RANGE = 1 << 31  # keys stand for [-32, 32)
GUMBEL = (-4.0, 30.0)  # beyond with probability below 2e-24 and 1e-13
_TIE_BITS = 3
Keys = NDArray[np.uint32]
Bits = NDArray[np.bool_]


def integer_keys(
    similarity: NDArray[np.float64], tau: float, rng: np.random.Generator, *, paired: bool = False
) -> Keys:
    """Keys of groups, larger is chosen sooner.

    Args:
        similarity: any shape, in [-1, 1].
        tau: temperature. Above 1 everything is divided by it, which leaves the order.
        rng: of the Gumbel noise, and of the lowest bits, which break ties.
        paired: whether modalities, the first axis, share their noise.

    Raises:
        UpdateError: a similarity is not a number.
    """
    if not np.isfinite(similarity).all():
        raise UpdateError("a prompt is not finite, so it has no similarity: lower the lr")
    drawn = (1, *similarity.shape[1:]) if paired else similarity.shape
    noise = np.clip(rng.gumbel(size=drawn), *GUMBEL)
    value = (np.clip(similarity, -1, 1) + tau * noise) / max(1.0, tau)
    grid = np.floor(value * (SCALE >> _TIE_BITS)).astype(np.int64) << _TIE_BITS
    grid += rng.integers(1 << _TIE_BITS, size=grid.shape)
    return (grid + RANGE).astype(np.uint32)


def order(keys: Keys) -> NDArray[np.int64]:
    """Positions from the largest key, equal ones in order: the plain reference. Last axis."""
    positions: NDArray[np.int64] = np.argsort(-keys.astype(np.int64), axis=-1, kind="stable")
    return positions


def split(keys: Keys, plan_digest: bytes, entropy: Entropy) -> tuple[Keys, bytes]:
    """The server's share, and the seed of the helper's: their sum modulo 2^32 is the key."""
    seed = entropy(32)
    return keys - share_of(seed, plan_digest, keys.size).reshape(keys.shape), seed


def share_of(seed: bytes, plan_digest: bytes, count: int) -> Keys:
    """The share that a seed stands for."""
    return expand(derive(seed, Purpose.SHARE, plan_digest), count)


def to_bits(words: Keys) -> Bits:
    """Circuit inputs of a batch: (batch, keys) words to (keys * 32, batch) bits, low bit first."""
    bits = np.unpackbits(
        np.ascontiguousarray(words.astype("<u4")).view(np.uint8), axis=1, bitorder="little"
    )
    return np.ascontiguousarray(bits.reshape(len(words), words.shape[1] * WIDTH).T).astype(bool)
