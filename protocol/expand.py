"""Domain separation and key material: one place that forms tags, keys and keystreams.

Every key is ``HKDF-SHA256(secret, info = Purpose | plan digest | context)``. The plan digest
fixes run, round, cohort, threshold and layout, so a key of one round, pair, plan or purpose
never fits another. Keystreams are AES-256-CTR under such a key, which is used once, from
counter zero.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from secure_fedprompt.protocol.ring import Words

TAG = b"secure-fedprompt/v1/"
_CHUNK = 1 << 16  # words; keystream and accumulator chunks stay in the second-level cache
_ZEROS = bytes(4 * _CHUNK)
_COUNTER = bytes(16)
THREADS = 2
_SHARE = 1 << 23  # words of masks that are worth a thread: 10 ms
_Masks = tuple[CipherContext, Any]  # a keystream, and whether it is added or subtracted


class Purpose(IntEnum):
    """What a key or digest is for. Values are on the wire of no message, but in every hash."""

    RUN_ID = 1
    ROSTER = 2
    ROSTER_ENTRY = 3
    PLAN = 4
    ADVERT = 5
    SURVIVORS = 7
    SELF_MASK = 8
    PAIR_MASK = 9
    SELF_COMMITMENT = 10
    SHARE_SEAL = 11
    GRAPH = 12
    SETTINGS = 13
    BASE = 14
    CLASSES = 15
    COHORT_KEY = 16
    RUN_KEY = 17
    KEY_GRANT = 18
    UPLOAD = 19
    PROMPT_SEAL = 20
    FLOOD = 21
    BASE_TRANSFER = 22
    GARBLING = 23
    SELECTION = 24
    SHARE_BOX = 25
    SHARE = 26
    OUTCOME_BOX = 27
    LOG_HEAD = 28
    TERMS = 29
    BOUNDS = 30
    NONCE = 31
    NONCES = 32
    BOXES = 33
    KEY_ASK = 34
    AGREEMENT = 35
    SUM_TAG = 36
    SUM_TAG_OFFSET = 37
    SUM = 38
    SUM_KEY = 39
    MERKLE_LEAF = 40
    MERKLE_NODE = 41
    DRAWN_SHARE = 42
    NODE = 43
    FORM = 44
    TRANSFER_CHECK = 45


_TAGS = {purpose: TAG + purpose.name.lower().encode() + b"\0" for purpose in Purpose}


def tag(purpose: Purpose) -> bytes:
    """The prefix of everything that is hashed or signed for one purpose."""
    return _TAGS[purpose]


def digest(purpose: Purpose, *parts: bytes | memoryview) -> bytes:
    """SHA-256 over the purpose and length-prefixed parts; 32 bytes."""
    h = hashlib.sha256(tag(purpose))
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


def derive(
    secret: bytes, purpose: Purpose, plan_digest: bytes, *context: bytes, size: int = 32
) -> bytes:
    """A key of ``size`` bytes for one purpose under one plan, by HKDF-SHA256 (RFC 5869)."""
    info = b"".join((tag(purpose), plan_digest, *(bytes((len(c),)) + c for c in context)))
    return HKDF(hashes.SHA256(), size, salt=None, info=info).derive(secret)


def _stream(key: bytes) -> CipherContext:
    return Cipher(AES256(key), CTR(_COUNTER)).encryptor()


def keystream(key: bytes, size: int) -> bytes:
    """``size`` bytes of AES-256-CTR keystream from counter zero."""
    return _stream(key).update(bytes(size))


class Stream:
    """The same keystream, read on from where the last call ended."""

    def __init__(self, key: bytes) -> None:
        self._context = _stream(key)

    def read(self, size: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._context.update(bytes(size)), np.uint8)


def expand(key: bytes, count: int) -> Words:
    """The first ``count`` little-endian words of the keystream: the reference for ``add_masks``."""
    return np.frombuffer(keystream(key, 4 * count), "<u4").astype(np.uint32)


def add_masks(total: Words, plus: list[bytes], minus: list[bytes], after: int = 0) -> bytes:
    """``total += sum expand(plus) - sum expand(minus)`` modulo 2^32, in place.

    Much of it is shared between threads: AES and numpy let others run.

    Returns:
        the next ``after`` bytes of each keystream, in the order of the keys.
    """
    streams: list[_Masks] = [(_stream(key), np.add) for key in plus]
    streams += [(_stream(key), np.subtract) for key in minus]
    shares = min(THREADS, len(streams) * len(total) // _SHARE)
    if shares < 2:
        return _add_masks(total, streams, after)
    cuts = [len(streams) * i // shares for i in range(shares + 1)]
    parts = [np.zeros_like(total) for _ in range(shares)]
    with ThreadPoolExecutor(shares) as pool:
        some = (streams[a:b] for a, b in itertools.pairwise(cuts))
        read = list(pool.map(_add_masks, parts, some, itertools.repeat(after)))
    for part in parts:
        np.add(total, part, out=total)
    return b"".join(read)


def _add_masks(total: Words, streams: Sequence[_Masks], after: int) -> bytes:
    """The same, chunk by chunk over all streams, so that ``total`` is read and written once."""
    buffer = bytearray(4 * min(_CHUNK, len(total)) + 16)
    zeros = memoryview(_ZEROS)
    words = np.frombuffer(buffer, "<u4", offset=0, count=min(_CHUNK, len(total)))
    for start in range(0, len(total), _CHUNK):
        part = total[start : start + _CHUNK]
        for stream, combine in streams:
            stream.update_into(zeros[: 4 * len(part)], buffer)
            combine(part, words[: len(part)], out=part)
    return b"".join([stream.update(zeros[:after]) for stream, _ in streams])
