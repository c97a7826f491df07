"""Oblivious transfer: base OTs on Ed25519, extended to as many correlated OTs as a circuit needs.

Base: Chou and Orlandi, "The Simplest Protocol for Oblivious Transfer" (LATINCRYPT 2015), over the
prime-order subgroup. Extension: Ishai, Kilian, Nissim and Petrank (CRYPTO 2003) in the correlated
form: for choice bits r the receiver gets rows t_j and the sender q_j = t_j xor r_j Delta, where
Delta is the sender's choice in the base OTs. With the free-XOR offset as Delta these are wire
labels: q_j is the label of 0, t_j the active one. Rows are not hashed here; whoever uses them as
labels hashes them in every gate.

A receiver whose columns are not all of the same choice bits would learn a bit of Delta with each.
So it sends with them a random linear hash to 128 bits of every column t^i and of r, and the sender
holds hash(q^i) = hash(t^i) xor Delta_i hash(r) against them: the check of Keller, Orsini and Scholl
(CRYPTO 2015), column by column. The hash is drawn from all that was sent: that of two columns which
differ is the same with probability (n / 128 + 3) / 2^128 for n transfers. 256 transfers of random
choices, one block of the hash and more, hide r in it. What is left is to guess: c bits of Delta
pass with 2^-c.

Security: base transfers against semi-honest parties, in the random oracle model; no claim of
universal composability.
"""

from __future__ import annotations

import hashlib
import hmac

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nacl import bindings
from numpy.typing import NDArray

from secure_fedprompt.protocol.edwards import POINT, check_point, multiply, random_scalar
from secure_fedprompt.protocol.errors import FieldError, PointError, SelectionError
from secure_fedprompt.protocol.expand import Purpose, Stream, tag
from secure_fedprompt.protocol.shamir import Entropy

KAPPA = 128  # columns: the bits of a label
_ROW = KAPPA // 8
_HIDING = 2 * _ROW  # bytes of random choices beside the true ones: a whole block of the hash
_PROOF = (KAPPA + 1) * _ROW  # hashes of all columns, and of the choices
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

    def __init__(self, session: bytes, keys: list[tuple[bytes, bytes]], entropy: Entropy) -> None:
        self._streams = [(Stream(zero), Stream(one)) for zero, one in keys]
        self._session, self._entropy = session, entropy

    def choose(self, choices: Bits) -> tuple[bytes, Labels]:
        """The columns to send, with what they are checked by, and the rows t, (len(choices), 2)."""
        hiding = np.frombuffer(self._entropy(_HIDING), np.uint8)
        packed = np.append(np.packbits(choices, bitorder="little"), hiding)
        size = len(packed)
        zero = np.empty((KAPPA, size), np.uint8)
        columns = np.empty((KAPPA, size), np.uint8)
        for i, (first, second) in enumerate(self._streams):
            zero[i] = first.read(size)
            columns[i] = second.read(size)
        columns ^= zero
        columns ^= packed
        proof = _hashed(self._session, columns.tobytes(), np.vstack([zero, packed]))
        return columns.tobytes() + proof.tobytes(), rows(zero)[: len(choices)]


class CorrelatedSender:
    """Sender of the extension: columns in, labels of zero out."""

    def __init__(self, session: bytes, choices: Bits, keys: list[bytes]) -> None:
        self._streams = [Stream(key) for key in keys]
        self._session, self._choices = session, choices

    def extend(self, columns: bytes | memoryview, count: int) -> Labels:
        """The rows q, (count, 2).

        Raises:
            FieldError: the columns are not for ``count`` transfers. SelectionError: they are not
                all of the same choices; nothing more may be done in this session.
        """
        size = -(-count // 8) + _HIDING
        if len(columns) != KAPPA * size + _PROOF:
            raise FieldError(f"{len(columns)} bytes of columns, {KAPPA * size + _PROOF} expected")
        sent = bytes(columns[: KAPPA * size])
        theirs = np.frombuffer(sent, np.uint8).reshape(KAPPA, size)
        matrix = np.empty((KAPPA, size), np.uint8)
        for i, stream in enumerate(self._streams):
            matrix[i] = stream.read(size)
        matrix[self._choices] ^= theirs[self._choices]
        proof = np.frombuffer(columns[KAPPA * size :], np.uint8).reshape(KAPPA + 1, _ROW)
        expected = _hashed(self._session, sent, matrix)
        expected[self._choices] ^= proof[KAPPA]
        if not hmac.compare_digest(expected.tobytes(), proof[:KAPPA].tobytes()):
            raise SelectionError("columns of a transfer that are not of the same choices")
        return rows(matrix)[:count]


def _hashed(session: bytes, sent: bytes, packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Linear hashes of rows of packed bits, (rows, size) -> (rows, 16): GHASH, under a key that is
    drawn from all that was sent. A tag of AES-GCM is that and two constants, which the tag of
    zeros has as well; nothing is authenticated here, and the key is public."""
    key = hashlib.blake2b(tag(Purpose.TRANSFER_CHECK) + session + sent, digest_size=32).digest()
    cipher, nonce = AESGCM(key), bytes(12)
    tags = [cipher.encrypt(nonce, b"", row.tobytes()) for row in packed]
    found = np.frombuffer(b"".join(tags), np.uint8).reshape(-1, _ROW)
    zero = cipher.encrypt(nonce, b"", bytes(packed.shape[1]))
    return found ^ np.frombuffer(zero, np.uint8)


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
