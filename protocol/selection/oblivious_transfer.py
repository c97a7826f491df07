"""Oblivious transfer: base OTs on Ed25519, extended to as many correlated OTs as a circuit needs.

Base: Chou and Orlandi, "The Simplest Protocol for Oblivious Transfer" (LATINCRYPT 2015), over the
prime-order subgroup. Extension: Ishai, Kilian, Nissim and Petrank (CRYPTO 2003) in the correlated
form: for choice bits r the receiver gets rows t_j and the sender q_j = t_j xor r_j Delta, where
Delta is the sender's choice in the base OTs. With the free-XOR offset as Delta these are wire
labels: q_j is the label of 0, t_j the active one. Rows are not hashed here; whoever uses them as
labels hashes them in every gate.

Security: against semi-honest parties, in the random oracle model; no claim of universal
composability. A malicious receiver could learn Delta by inconsistent columns.
"""

from __future__ import annotations

import hashlib

import numpy as np
from nacl import bindings
from numpy.typing import NDArray

from secure_fedprompt.protocol.edwards import POINT, check_point, multiply, random_scalar
from secure_fedprompt.protocol.errors import FieldError, PointError
from secure_fedprompt.protocol.expand import Purpose, Stream, tag
from secure_fedprompt.protocol.shamir import Entropy

KAPPA = 128  # columns: the bits of a label
Labels = NDArray[np.uint64]  # (..., 2)
Bits = NDArray[np.bool_]


def _key(session: bytes, i: int, a: bytes, b: bytes, point: bytes) -> bytes:
    data = b"".join((tag(Purpose.BASE_TRANSFER), session, i.to_bytes(2, "little"), a, b, point))
    return hashlib.blake2b(data, digest_size=32).digest()


class BaseSender:
    """Offers two keys in each of 128 transfers; it is the receiver of the extension."""

    def __init__(self, session: bytes, entropy: Entropy) -> None:
        self._session, self._scalar = session, random_scalar(entropy)
        self.offer: bytes = bindings.crypto_scalarmult_ed25519_base_noclamp(self._scalar)

    def keys(self, answer: bytes) -> list[tuple[bytes, bytes]]:
        """Both keys of each transfer.

        Args:
            answer: 128 points.

        Raises:
            PointError, FieldError
        """
        if len(answer) != POINT * KAPPA:
            raise FieldError(f"{len(answer)} bytes of points, {POINT * KAPPA} expected")
        square, found = multiply(self._scalar, self.offer), []
        for i in range(KAPPA):
            b = check_point(answer[POINT * i : POINT * (i + 1)], f"answer {i} of a transfer")
            if b == self.offer:
                raise PointError(f"answer {i} of a transfer repeats the offer")
            first = multiply(self._scalar, b)
            second = bindings.crypto_core_ed25519_sub(first, square)  # a (B - A)
            pair = (_key(self._session, i, self.offer, b, point) for point in (first, second))
            found.append((next(pair), next(pair)))
        return found


class BaseReceiver:
    """Chooses one key of each transfer; it is the sender of the extension."""

    def __init__(self, session: bytes, choices: Bits, offer: bytes, entropy: Entropy) -> None:
        check_point(offer, "offer of a transfer")
        points, self.keys = [], list[bytes]()
        for i, choice in enumerate(choices):
            scalar = random_scalar(entropy)
            b = bindings.crypto_scalarmult_ed25519_base_noclamp(scalar)
            if choice:
                b = bindings.crypto_core_ed25519_add(b, offer)
            points.append(b)
            self.keys.append(_key(session, i, offer, b, multiply(scalar, offer)))
        self.answer = b"".join(points)


class CorrelatedReceiver:
    """Receiver of the extension: choice bits in, active labels out."""

    def __init__(self, keys: list[tuple[bytes, bytes]]) -> None:
        self._streams = [(Stream(zero), Stream(one)) for zero, one in keys]

    def choose(self, choices: Bits) -> tuple[bytes, Labels]:
        """The columns to send and the rows t, (len(choices), 2)."""
        packed = np.packbits(choices, bitorder="little")
        size = len(packed)
        zero = np.empty((KAPPA, size), np.uint8)
        columns = np.empty((KAPPA, size), np.uint8)
        for i, (first, second) in enumerate(self._streams):
            zero[i] = first.read(size)
            columns[i] = second.read(size)
        columns ^= zero
        columns ^= packed
        return columns.tobytes(), rows(zero)[: len(choices)]


class CorrelatedSender:
    """Sender of the extension: columns in, labels of zero out."""

    def __init__(self, choices: Bits, keys: list[bytes]) -> None:
        self._streams = [Stream(key) for key in keys]
        self._choices = choices

    def extend(self, columns: bytes | memoryview, count: int) -> Labels:
        """The rows q, (count, 2).

        Raises:
            FieldError: the columns are not for ``count`` transfers.
        """
        size = -(-count // 8)
        if len(columns) != KAPPA * size:
            raise FieldError(f"{len(columns)} bytes of columns, {KAPPA * size} expected")
        theirs = np.frombuffer(columns, np.uint8).reshape(KAPPA, size)
        matrix = np.empty((KAPPA, size), np.uint8)
        for i, stream in enumerate(self._streams):
            matrix[i] = stream.read(size)
        matrix[self._choices] ^= theirs[self._choices]
        return rows(matrix)[:count]


def rows(columns: NDArray[np.uint8]) -> Labels:
    """Transpose 128 columns of packed bits to one label for each bit position.

    Blocks of 8 x 8 bits are transposed inside 64-bit words (Warren, Hacker's Delight, 7-3).

    Args:
        columns: (128, size).

    Returns:
        (8 * size, 2).
    """
    size = columns.shape[1]
    labels = np.empty((size, 8, KAPPA // 8), np.uint8)
    for start in range(0, size, _BLOCK):  # a block stays in the first-level cache
        part = columns[:, start : start + _BLOCK].reshape(KAPPA // 8, 8, -1).transpose(2, 0, 1)
        x = np.ascontiguousarray(part).view("<u8")[..., 0]  # (block, 16)
        for shift, mask in _SWAPS:
            t = x >> shift
            t ^= x
            t &= mask
            x ^= t
            t <<= shift
            x ^= t
        byte = x.view(np.uint8).reshape(-1, KAPPA // 8, 8)
        labels[start : start + _BLOCK] = byte.transpose(0, 2, 1)
    return labels.view("<u8").reshape(8 * size, 2).astype(np.uint64, copy=False)


_BLOCK = 1024
_SWAPS = tuple(
    (np.uint64(shift), np.uint64(mask))
    for shift, mask in (
        (7, 0x00AA00AA00AA00AA),
        (14, 0x0000CCCC0000CCCC),
        (28, 0x00000000F0F0F0F0),
    )
)
