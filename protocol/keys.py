"""Identities, key files, agreement and sealing.

An identity is an Ed25519 signing key and an X25519 key for CurveZMQ, stored together as two
unencrypted PKCS#8 blocks in one PEM file that only its owner may read. The public half is a
roster entry, which the identity signs so that name, role and both keys belong together.
Primitives come from ``cryptography`` and PyNaCl; nothing here prints key material.
"""

from __future__ import annotations

import functools
import hashlib
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from secure_fedprompt.protocol.codec import Name, PublicKey, Signature, Text, encode_fields
from secure_fedprompt.protocol.errors import KeyFileError, SealError, SignatureError
from secure_fedprompt.protocol.expand import Purpose, tag

ROLES = ("client", "server", "helper")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_NONCE = bytes(12)
_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aiou"
_BLOCK = re.compile(rb"-----BEGIN PRIVATE KEY-----.+?-----END PRIVATE KEY-----\n?", re.S)


@dataclass(frozen=True, repr=False)
class Identity:
    """The private half. ``repr`` shows nothing of it."""

    signing: Ed25519PrivateKey
    curve: X25519PrivateKey

    def __repr__(self) -> str:
        return "Identity(<private>)"

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    def sign(self, purpose: Purpose, body: bytes) -> bytes:
        return self.signing.sign(tag(purpose) + body)

    def public(self) -> bytes:
        return self.signing.public_key().public_bytes_raw()

    def curve_public(self) -> bytes:
        return self.curve.public_key().public_bytes_raw()

    def to_pem(self) -> bytes:
        form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return self.signing.private_bytes(*form) + self.curve.private_bytes(*form)

    @classmethod
    def from_pem(cls, data: bytes, where: str, mode: int) -> Identity:
        """Parse a key file.

        Args:
            data: content of the file.
            where: its path, for the error.
            mode: ``st_mode`` of the file; group and others may have no rights.
        """
        if b"PRIVATE KEY" not in data:
            raise KeyFileError(
                f"key file {where} holds no private key: name NAME.pem, not the public entry"
            )
        if stat.S_IMODE(mode) & 0o077:
            raise KeyFileError(
                f"key file {where} is open to others (mode {stat.S_IMODE(mode):04o}): "
                f"run 'chmod 600 {where}', and make a new key if others could have read it"
            )
        try:
            keys = [load_pem_private_key(block, None) for block in _BLOCK.findall(data)]
        except (ValueError, TypeError) as error:
            raise KeyFileError(f"key file {where} cannot be read: {error}") from None
        match keys:
            case [Ed25519PrivateKey() as signing, X25519PrivateKey() as curve]:
                return cls(signing, curve)
        raise KeyFileError(
            f"key file {where} does not hold one Ed25519 and one X25519 key: "
            "make one with 'secure-fedprompt keygen --name NAME'"
        )


def fingerprint(public: bytes) -> str:
    """A public key as people read it to each other: 64 bits of its SHA-256, in hex."""
    text = hashlib.sha256(public).hexdigest()[:16]
    return " ".join(text[i : i + 4] for i in range(0, 16, 4))


def spoken(public: bytes) -> str:
    """80 bits of a public key's SHA-256 as five words that can be said on a phone: each is 16 bits
    as consonant, vowel, consonant, vowel, consonant (proquints, Wilkerson 2009, arXiv 0901.4016).
    """
    value = hashlib.sha256(public).digest()[:10]
    words = (int.from_bytes(value[at : at + 2], "big") for at in range(0, 10, 2))
    return "-".join(
        _CONSONANTS[w >> 12] + _VOWELS[w >> 10 & 3] + _CONSONANTS[w >> 6 & 15]
        + _VOWELS[w >> 4 & 3] + _CONSONANTS[w & 15]
        for w in words
    )  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A roster entry: who may take part, under which keys. ``signature`` is by ``identity``."""

    name: Name
    role: Annotated[str, Text(16)]
    identity: PublicKey
    curve: PublicKey
    signature: Signature

    def _body(self) -> bytes:
        return encode_fields(_Binding(self.name, self.role, self.identity, self.curve))

    @classmethod
    def of(cls, identity: Identity, name: str, role: str) -> Member:
        public, curve = identity.public(), identity.curve_public()
        body = encode_fields(_Binding(name, role, public, curve))
        return cls(name, role, public, curve, identity.sign(Purpose.ROSTER_ENTRY, body))

    def verify(self) -> None:
        verify(self.identity, Purpose.ROSTER_ENTRY, self._body(), self.signature, self.name)


@dataclass(frozen=True)
class _Binding:
    name: Name
    role: Annotated[str, Text(16)]
    identity: PublicKey
    curve: PublicKey


def verify(public: bytes, purpose: Purpose, body: bytes, signature: bytes, who: str) -> None:
    """Check an Ed25519 signature.

    Raises:
        SignatureError: naming the signer and the purpose.
    """
    try:
        _verified(public, tag(purpose) + body, signature)
    except (BadSignatureError, ValueError):
        what = purpose.name.lower().replace("_", " ")
        raise SignatureError(f"signature of {who} on its {what} does not verify") from None


def _check(public: bytes, message: bytes, signature: bytes) -> None:
    """PyNaCl's check takes a little over half of OpenSSL's time."""
    VerifyKey(public).verify(message, signature)


_verified: Callable[[bytes, bytes, bytes], None] = _check


def remember_signatures(count: int = 1 << 15) -> None:
    """Check no good signature twice in this process: for many parties in one."""
    global _verified
    _verified = functools.lru_cache(maxsize=count)(_check)


@functools.lru_cache(maxsize=1024)
def _public_key(public: bytes) -> X25519PublicKey:
    return X25519PublicKey.from_public_bytes(public)


def agree(secret: X25519PrivateKey, public: bytes, who: str) -> bytes:
    """X25519; a peer key of small order is refused.

    Raises:
        SealError: naming the peer.
    """
    try:
        return secret.exchange(_public_key(public))
    except ValueError:
        raise SealError(f"public key of {who} is not a usable curve point") from None


def seal(key: bytes, plain: bytes, associated: bytes) -> bytes:
    """AES-256-GCM under a key that is derived for this one message (hence the fixed nonce)."""
    return AESGCM(key).encrypt(_NONCE, plain, associated)


def unseal(key: bytes, box: bytes, associated: bytes, who: str) -> bytes:
    """Inverse of ``seal``.

    Raises:
        SealError: the box was altered, or sealed for another sender, recipient or round.
    """
    try:
        return AESGCM(key).decrypt(_NONCE, box, associated)
    except (InvalidTag, ValueError):
        raise SealError(f"box sealed by {who} does not open") from None
