"""What this machine's arithmetic costs: the primitives that everything else is made of.

One thread. From these come the limits that are drawn into the curves: what a round would cost if
nothing were done but the arithmetic that the protocol asks for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from nacl.signing import VerifyKey

from secure_fedprompt.bench.chapter import Case, Chapter, Column, Row, Samples

BYTES = 1 << 18  # in the second-level cache, as where masks are made
SIDE = 512


def times(work: Callable[[], Any], count: int) -> float:
    """Microseconds of CPU for one of ``count``."""
    begin = time.process_time()
    for _ in range(count):
        work()
    return 1e6 * (time.process_time() - begin) / count


def one() -> dict[str, float]:
    """All of them, once."""
    agree, other = X25519PrivateKey.generate(), X25519PrivateKey.generate().public_key()
    sign = Ed25519PrivateKey.generate()
    public, signature = sign.public_key().public_bytes_raw(), sign.sign(b"x" * 64)
    a, b = (np.full(BYTES // 4, k, np.uint32) for k in (1, 2))
    stream = Cipher(AES256(bytes(32)), CTR(bytes(16))).encryptor()
    zeros, filled = bytes(BYTES), bytearray(BYTES)
    left = np.ones((SIDE, SIDE), np.float32)
    return {
        "x25519_us": times(lambda: agree.exchange(other), 200),
        "ed25519_sign_us": times(lambda: sign.sign(b"x" * 64), 200),
        "ed25519_verify_us": times(lambda: VerifyKey(public).verify(b"x" * 64, signature), 200),
        "aes_bytes_per_us": BYTES / times(lambda: stream.update_into(zeros, filled), 200),
        "add_bytes_per_us": BYTES / times(lambda: np.add(a, b, out=a), 200),
        "matmul_gflop_s": 2e-3 * SIDE**3 / times(lambda: left @ left, 20),
    }


def measure(case: Case, repeat: int) -> Samples:
    """After one that is not counted."""
    rows = [one() for _ in range(repeat + 1)][1:]
    return {name: [row[name] for row in rows] for name in rows[0]}


def known(rows: Sequence[Row]) -> Mapping[str, float]:
    """Medians by name, from the rows of this chapter; empty if it was not measured."""
    return {k: v["median"] for row in rows[:1] for k, v in row["figures"].items()}


CHAPTER = Chapter(
    name="primitives",
    title="What this machine's arithmetic costs",
    about=__doc__,
    keys={"threads": "threads"},
    columns=(
        Column("x25519_us", "X25519, us"), Column("ed25519_sign_us", "Ed25519 sign, us"),
        Column("ed25519_verify_us", "verify, us"),
        Column("aes_bytes_per_us", "AES-CTR, MB/s", 3, less=False),
        Column("add_bytes_per_us", "additions mod 2^32, MB/s", 3, less=False),
        Column("matmul_gflop_s", "float32 matmul, GFLOP/s", 3, less=False),
    ),
    cases=lambda quick: [{"threads": 1}],
    measure=measure,
)  # fmt: skip
