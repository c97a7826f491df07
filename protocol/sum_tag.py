"""Keyed linear tags: clients check that a sum is the sum of what its members sent.

Clients share a key K that the server does not hold. The ring integers x_k of an upload, after
weighting, rounding and noise, are seen as rows X_k of m values. For each plan, K gives a in F_p^m,
b in F_p^rows and one offset for each member, p = 2^61 - 1, and

    t_k = b . (X_k a) + offset(k)     mod p, twice, independently.

The map is linear, so a sum S over the members L has the tag T = b . (S a) + sum of L's offsets.
Whoever does not hold K and wants (S', L', T') accepted in place of the true ones has to hit

    T' - T = b . ((S' - S) a)    if L' = L and S' != S: (S' - S) a = 0 for at most one a in p, and
                                 else the right side is uniform over b: at most 2/p;
    an offset that no T holds    if L' != L: uniform, so 1/p.

Offsets make each T uniform whatever S is, so one T per plan tells nothing of a and b, and two tags
make (2/p)^2 < 2^-119 a try. Linear hashing under a secret key is that of the MACs of SPDZ (Damgard
et al., CRYPTO 2012) and of VerSA (Hahn et al., IEEE TDSC 2021). See docs/sum-tags.md.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol import mersenne
from secure_fedprompt.protocol.errors import FieldError
from secure_fedprompt.protocol.expand import Purpose, derive, keystream
from secure_fedprompt.protocol.mersenne import Elements, P
from secure_fedprompt.protocol.ring import Integers

TAGS = 2
SIZE = 8 * TAGS  # bytes of a tag
ELEMENT = 16  # bytes of keystream for each element
MASK = ELEMENT * TAGS  # bytes of keystream that mask a tag
KEY = 32  # bytes of K under masks
_LIMB, _LIMBS = 21, 3  # bits, and how many hold an element
_MOST = 1 << 31  # magnitude of an integer: 31 + 21 bits, and 1,024 of them, are 2^62 at most
_WIDEST = 1 << 10
_CHUNK = 1 << 15  # values multiplied at a time, to stay in the cache


def width(size: int) -> int:
    """m, values of a row: the power of two from sqrt(size), 1,024 at most."""
    return min(1 << math.ceil(math.log2(max(1.0, math.sqrt(size)))), _WIDEST)


def to_bytes(tag: Elements) -> bytes:
    """16 bytes, little-endian."""
    return tag.astype("<u8").tobytes()


def from_bytes(data: bytes | memoryview) -> Elements:
    """Inverse of ``to_bytes``.

    Raises:
        FieldError: not two elements.
    """
    tag = np.frombuffer(data, "<u8").astype(np.uint64) if len(data) == SIZE else None
    if tag is None or (tag >= P).any():
        raise FieldError("a tag of a sum is two numbers below 2^61 - 1")
    return tag


def mask(drawn: bytes, plus: int) -> Elements:
    """What masks add to a tag, (tags,).

    Args:
        drawn: ``MASK`` bytes of each keystream, those behind the masks of the vector.
        plus: how many of them, the first, are added; the others are subtracted.
    """
    parts = mersenne.elements(drawn).reshape(-1, TAGS)
    minus = mersenne.negative(mersenne.total(parts[plus:]))
    return mersenne.add(mersenne.total(parts[:plus]), minus)


@dataclass(frozen=True, repr=False)
class TagKey:
    """What K gives for one plan.

    Attributes:
        across: a in 21-bit limbs, (limbs x tags, m).
        down: b, (rows, tags).
        offsets: (n, tags); places: by name.
    """

    across: NDArray[np.int64]
    down: Elements
    offsets: Elements
    places: Mapping[str, int]

    @classmethod
    def of(cls, secret: bytes, plan_digest: bytes, size: int, cohort: Sequence[str]) -> TagKey:
        """For vectors of ``size`` integers.

        Args:
            secret: K, 32 bytes or more.
            cohort: of the plan, whose digest binds it.
        """
        m = width(size)
        rows = -(-size // m)
        key = derive(secret, Purpose.SUM_TAG, plan_digest)
        drawn = mersenne.elements(keystream(key, ELEMENT * TAGS * (m + rows))).reshape(-1, TAGS)
        limbs = [
            (drawn[:m] >> np.uint64(_LIMB * i)) & np.uint64((1 << _LIMB) - 1) for i in range(_LIMBS)
        ]
        across = np.ascontiguousarray(np.concatenate(limbs, 1).T.astype(np.int64))
        own = derive(secret, Purpose.SUM_TAG_OFFSET, plan_digest)
        offsets = mersenne.elements(keystream(own, ELEMENT * TAGS * len(cohort)))
        places = {name: i for i, name in enumerate(cohort)}
        return cls(across, drawn[m:], offsets.reshape(-1, TAGS), places)

    def __repr__(self) -> str:
        return "TagKey(<private>)"

    def linear(self, integers: Integers) -> Elements:
        """b . (X a), (tags,).

        Raises:
            FieldError: an integer of more than 31 bits, or too many of them.
        """
        m, rows = self.across.shape[1], len(self.down)
        if len(integers) > m * rows:
            raise FieldError(f"{len(integers)} integers, the key is for {m * rows}")
        wide = integers.dtype != np.int32 and len(integers) > 0
        if wide and max(int(integers.max()), -int(integers.min())) > _MOST:
            raise FieldError("an integer of a sum is beyond 31 bits")
        products = np.empty((rows, _LIMBS * TAGS), np.int64)
        step = _CHUNK // m
        block = np.empty((step, m), np.int64)
        for at in range(0, rows, step):
            some = integers[at * m : (at + step) * m]
            block.reshape(-1)[: len(some)], block.reshape(-1)[len(some) :] = some, 0
            part = block[: min(step, rows - at)]
            # Not by matrix product: BLAS' threads would wait for more, and burn ten times its time.
            np.einsum("rm,km->rk", part, self.across, out=products[at : at + len(part)])
        limbs = mersenne.signed(products).reshape(rows, _LIMBS, TAGS)
        row = limbs[:, 0]
        for i in range(1, _LIMBS):
            row = mersenne.add(row, mersenne.rotated(limbs[:, i], _LIMB * i))
        return mersenne.total(mersenne.multiply(row, self.down))

    def tag(self, name: str, integers: Integers) -> Elements:
        """t_k of one member's upload, (tags,)."""
        return mersenne.add(self.linear(integers), self.offsets[self.places[name]])

    def holds(self, members: Sequence[str], integers: Integers, tag: Elements) -> bool:
        """Whether these integers are the sum of what these members of the cohort tagged.

        Nobody's sum is none: it needs no offset, so anybody could make its tag.
        """
        rows = {self.places[name] for name in members if name in self.places}
        if not members or len(rows) != len(members):
            return False
        try:
            linear = self.linear(integers)
        except FieldError:
            return False
        expected = mersenne.add(linear, mersenne.total(self.offsets[sorted(rows)]))
        return hmac.compare_digest(to_bytes(expected), to_bytes(tag))
