"""A proof of what two X25519 keys agree on, without either secret key.

Who was sealed a box that does not open must be able to show it to a third party. Showing the secret
key would open every box that was ever sealed to it; this shows the one agreement, and that it is
the right one: a Chaum-Pedersen proof of equal discrete logarithms ("Wallet Databases with
Observers", CRYPTO 1992, section 3.2), made non-interactive by Fiat and Shamir, over the Edwards
form of the curve (RFC 7748, section 4.1), which libsodium computes with.

An X25519 key fixes its Edwards point but for the sign. Both points are taken with sign 0, and the
prover's scalar with the sign that fits: then the agreed point is right but for its sign, and the
agreement, its u-coordinate, is right.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from nacl import bindings, exceptions

from secure_fedprompt.protocol.codec import Digest
from secure_fedprompt.protocol.edwards import check_point, multiply, random_scalar
from secure_fedprompt.protocol.errors import PointError, SignatureError
from secure_fedprompt.protocol.expand import Purpose, tag
from secure_fedprompt.protocol.shamir import Entropy

FIELD = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493


@dataclass(frozen=True)
class AgreementProof:
    """``point``: the agreement, as an Edwards point; ``challenge`` and ``response`` prove it."""

    point: Digest
    challenge: Digest
    response: Digest


NO_PROOF = AgreementProof(bytes(32), bytes(32), bytes(32))


def prove(secret: bytes, peer: bytes, context: bytes, entropy: Entropy) -> AgreementProof:
    """What the owner of ``secret`` and ``peer`` agree on.

    Args:
        secret: 32 bytes of an X25519 private key; peer: the other's public key.
        context: what the proof is about; a proof is worth nothing elsewhere.

    Raises:
        PointError: ``peer`` is no key that an honest party has.
    """
    x = _clamped(secret)
    own = bindings.crypto_scalarmult_ed25519_base_noclamp(_bytes(x))
    if own[31] & 0x80:
        x = ORDER - x
        own = bindings.crypto_scalarmult_ed25519_base_noclamp(_bytes(x))
    other = lift(peer)
    point = multiply(_bytes(x), other)
    nonce = random_scalar(entropy)
    first = bindings.crypto_scalarmult_ed25519_base_noclamp(nonce)
    challenge = _challenge(context, own, other, point, first, multiply(nonce, other))
    product = bindings.crypto_core_ed25519_scalar_mul(challenge, _bytes(x))
    response = bindings.crypto_core_ed25519_scalar_add(nonce, product)
    return AgreementProof(point, challenge, response)


def check(proof: AgreementProof, public: bytes, peer: bytes, context: bytes) -> bytes:
    """The agreement of two X25519 public keys, as ``X25519PrivateKey.exchange`` gives it.

    Args:
        public: of the prover; peer: of the other.

    Raises:
        PointError: ``peer`` is no key that an honest party has.
        SignatureError: the proof is wrong, or about something else.
    """
    other = lift(peer)
    try:
        own, point = lift(public), check_point(bytes(proof.point), "an agreement")
        for scalar in (proof.challenge, proof.response):
            if int.from_bytes(scalar, "little") >= ORDER:
                raise PointError("a scalar of a proof is not reduced")
        back = bindings.crypto_core_ed25519_scalar_negate(proof.challenge)
        first = _sum(
            bindings.crypto_scalarmult_ed25519_base_noclamp(proof.response), multiply(back, own)
        )
        second = _sum(multiply(proof.response, other), multiply(back, point))
        fits = _challenge(context, own, other, point, first, second) == proof.challenge
    except (PointError, exceptions.RuntimeError):
        fits = False
    if not fits:
        raise SignatureError("proof of an agreement does not verify")
    y = int.from_bytes(proof.point, "little") & (2**255 - 1)
    u = (1 + y) * pow(1 - y, -1, FIELD) % FIELD
    return u.to_bytes(32, "little")


def _challenge(context: bytes, *points: bytes) -> bytes:
    data = tag(Purpose.AGREEMENT) + len(context).to_bytes(8, "little") + context + b"".join(points)
    reduced: bytes = bindings.crypto_core_ed25519_scalar_reduce(hashlib.sha512(data).digest())
    return reduced


def _clamped(secret: bytes) -> int:
    raw = bytearray(secret)
    raw[0] &= 248
    raw[31] = raw[31] & 127 | 64
    return int.from_bytes(raw, "little") % ORDER


def _bytes(scalar: int) -> bytes:
    return scalar.to_bytes(32, "little")


def lift(public: bytes) -> bytes:
    """The Edwards point with sign 0 of an X25519 public key.

    Raises:
        PointError: no honest party has such a key.
    """
    u = int.from_bytes(public, "little") & (2**255 - 1)
    if len(public) != 32 or (u + 1) % FIELD == 0:
        raise PointError("a public key is no point of the curve")
    y = (u - 1) * pow(u + 1, -1, FIELD) % FIELD
    return check_point(_bytes(y), "a public key")


def _sum(one: bytes, other: bytes) -> bytes:
    found: bytes = bindings.crypto_core_ed25519_add(one, other)
    return found
