"""A proof of an agreement: it is the one that X25519 gives, and nothing else passes."""

from __future__ import annotations

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl import bindings
from rounds import entropy_from

from secure_fedprompt.protocol.agreement_proof import FIELD, ORDER, check, lift, prove
from secure_fedprompt.protocol.errors import PointError, SignatureError

KEY = st.binary(min_size=32, max_size=32)
LOW = (
    0,
    1,
    FIELD - 1,
    FIELD,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
)


def public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


@given(KEY, KEY)
@settings(max_examples=60, deadline=None)
def test_the_proved_agreement_is_that_of_x25519(one: bytes, two: bytes) -> None:
    proof = prove(one, public(two), b"context", entropy_from("p"))
    expected = X25519PrivateKey.from_private_bytes(one).exchange(
        X25519PublicKey.from_public_bytes(public(two))
    )
    assert check(proof, public(one), public(two), b"context") == expected
    back = prove(two, public(one), b"context", entropy_from("q"))
    assert check(back, public(two), public(one), b"context") == expected


@given(KEY, KEY, KEY, st.sampled_from(["point", "challenge", "response"]), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_nothing_else_passes(one: bytes, two: bytes, three: bytes, field: str, bit: int) -> None:
    a, b, c = map(public, (one, two, three))
    proof = prove(one, b, b"context", entropy_from("p"))
    raw = bytearray(getattr(proof, field))
    raw[bit // 8] ^= 1 << bit % 8
    bent = dataclasses.replace(proof, **{field: bytes(raw)})
    cases = [(bent, a, b, b"context"), (proof, a, b, b"other")]
    if c not in (a, b):
        cases += [(proof, c, b, b"context"), (proof, a, c, b"context")]
    if a != b:
        cases.append((proof, b, a, b"context"))
    for case in cases:
        with pytest.raises(SignatureError):
            check(*case)


def test_an_agreement_of_ones_choice_cannot_be_proved() -> None:
    """The prover knows everything but the other's secret: its own key, and any point it likes."""
    one, b = bytes(range(32)), public(bytes(range(1, 33)))
    honest = prove(one, b, b"context", entropy_from("p"))
    for k in (2, 3, 5):
        scaled = bindings.crypto_scalarmult_ed25519_noclamp(k.to_bytes(32, "little"), honest.point)
        with pytest.raises(SignatureError):
            check(dataclasses.replace(honest, point=scaled), public(one), b, b"context")


@pytest.mark.parametrize("u", LOW)
def test_keys_of_small_order_are_refused(u: int) -> None:
    key = u.to_bytes(32, "little")
    with pytest.raises(PointError):
        lift(key)
    with pytest.raises(PointError):
        prove(bytes(range(32)), key, b"", entropy_from("p"))


def test_keys_outside_of_the_prime_order_group_are_refused() -> None:
    """An honest key plus a point of order two agrees like the honest one, and proves nothing."""
    honest = bindings.crypto_scalarmult_ed25519_base_noclamp((7).to_bytes(32, "little"))
    y = int.from_bytes(honest, "little") & (2**255 - 1)
    other = (FIELD - y) % FIELD  # (x, y) + (0, -1) = (-x, -y)
    u = (1 + other) * pow(1 - other, -1, FIELD) % FIELD
    with pytest.raises(PointError):
        lift(u.to_bytes(32, "little"))
    assert ORDER * 8 < 2**256


def test_two_proofs_of_one_agreement_share_nothing() -> None:
    one, b = bytes(range(32)), public(bytes(range(1, 33)))
    first = prove(one, b, b"context", entropy_from("p"))
    second = prove(one, b, b"context", entropy_from("q"))
    assert first.point == second.point
    assert first.challenge != second.challenge
    assert first.response != second.response
