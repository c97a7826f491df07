"""Vectors over Z_2^b, b from 8 to 32, held as uint32 words and packed to b bits on the wire.

All sums run modulo 2^32. Since 2^b divides 2^32, reducing only when packing gives the same
result modulo 2^b, so one word type serves every width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol.errors import FieldError

Words = NDArray[np.uint32]
Integers = NDArray[np.integer[Any]]  # signed ones, of 32 bits or more
MIN_BITS, MAX_BITS = 8, 32
_GROUP = 32  # 32 values of b bits fill exactly b words


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` values at ``bits`` bits, rounded up to a byte."""
    return (count * bits + 7) // 8


def pack(words: Words, bits: int) -> bytes:
    """The low ``bits`` bits of every word, least significant bit first."""
    if bits == 32:
        return words.astype("<u4", copy=False).tobytes()
    groups = -(-len(words) // _GROUP)
    low = np.zeros(groups * _GROUP, np.uint32)
    np.bitwise_and(words, np.uint32((1 << bits) - 1), out=low[: len(words)])
    columns = np.ascontiguousarray(low.reshape(groups, _GROUP).T)
    packed = np.zeros((bits, groups), "<u4")
    for i in range(_GROUP):
        word, shift = divmod(i * bits, 32)
        packed[word] |= columns[i] << np.uint32(shift)
        if shift + bits > 32:
            packed[word + 1] |= columns[i] >> np.uint32(32 - shift)
    return packed.T.tobytes()[: packed_size(len(words), bits)]


def unpack(data: bytes | memoryview, count: int, bits: int) -> Words:
    """Inverse of ``pack``.

    Raises:
        FieldError: wrong length, or bits set behind the last value.
    """
    if len(data) != packed_size(count, bits):
        raise FieldError(f"{len(data)} packed bytes, {packed_size(count, bits)} expected")
    if bits == 32:
        return np.frombuffer(data, "<u4").astype(np.uint32, copy=False)
    spare = len(data) * 8 - count * bits
    if spare and data[-1] >> (8 - spare):
        raise FieldError("bits set behind the last packed value")
    groups = -(-count // _GROUP)
    padded = np.zeros(groups * bits * 4, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    packed = np.ascontiguousarray(padded.view("<u4").reshape(groups, bits).T)
    columns = np.empty((_GROUP, groups), np.uint32)
    for i in range(_GROUP):
        word, shift = divmod(i * bits, 32)
        columns[i] = packed[word] >> np.uint32(shift)
        if shift + bits > 32:
            columns[i] |= packed[word + 1] << np.uint32(32 - shift)
    columns &= np.uint32((1 << bits) - 1)
    return np.ascontiguousarray(columns.T).reshape(-1)[:count]


def signed(words: Words, bits: int) -> NDArray[np.int32]:
    """Residues modulo 2^bits as integers in [-2^(bits-1), 2^(bits-1))."""
    up = np.uint32(32 - bits)
    return words.view(np.int32) if bits == 32 else (words << up).view(np.int32) >> np.int32(up)
