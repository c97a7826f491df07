"""The key that all clients of a run share, and what they do with it.

Made by one client, sealed to each of the others, never seen by the server and never on a disk but
for its ``prompt_key``, which opens nothing but global prompts: their owner has those on its disk as
well. One shared key means: whoever holds it opens every upload. The server must not get one, so no
client may collude with it.

CKKS decryption is approximate, and an exact decrypted value together with its ciphertext is a
linear equation in the key (Li and Micciancio, "On the Security of Homomorphic Encryption on
Approximate Numbers", Eurocrypt 2021). Noise added before encrypting does not help: it is part of
what is decrypted, and the equation holds with it. So nothing but integers leaves ``decrypt``: the
slots are flooded with noise after decryption (Li, Micciancio, Schultz and Sorrell, Crypto 2022),
drawn alike by all clients from the shared key, and rounded. Honest uploads are integers, so the
result is their exact sum but for ``failure_bits``, and says nothing about the noise. Should an
upload or a sum lie off the integers, the flooding keeps what a rounding tells about the noise
within a statistical distance of ``2^-flooding_bits`` for each value.
"""

from __future__ import annotations

import hmac
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from numpy.typing import NDArray

from secure_fedprompt.protocol.errors import CiphertextError, KeyMismatchError, SealError
from secure_fedprompt.protocol.expand import Purpose, derive, digest, keystream
from secure_fedprompt.protocol.homomorphic import Ciphertexts, Scheme, sealapi, summed_size
from secure_fedprompt.protocol.layout import total_size
from secure_fedprompt.protocol.packing import Integers
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.protocol.sum_tag import TagKey

FLOOD = 0.25  # half width of the flooding, in integers


class CohortKey:
    """A secret SEAL key and a key that seals the global prompt between rounds.

    Attributes:
        digest: what uploads and grants name the key by.
    """

    def __init__(self, scheme: Scheme, secret: bytes, prompt_key: bytes) -> None:
        """Raises KeyMismatchError if ``secret`` is no key of the scheme's parameter set."""
        seal = sealapi()
        try:
            key = scheme.read(seal.SecretKey(), secret)
        except CiphertextError:
            raise KeyMismatchError("granted key is not of the plan's parameter set") from None
        self.scheme, self._secret, self.prompt_key = scheme, secret, prompt_key
        self.digest = digest(Purpose.COHORT_KEY, secret, prompt_key)
        self._encryptor = seal.Encryptor(scheme.context, key)
        self._decryptor = seal.Decryptor(scheme.context, key)
        encoder = seal.CKKSEncoder if scheme.approximate else seal.BatchEncoder
        self._encoder = encoder(scheme.context)

    def __repr__(self) -> str:
        return "CohortKey(<private>)"

    @classmethod
    def make(cls, scheme: Scheme, entropy: Entropy, prompt_key: bytes = b"") -> CohortKey:
        """A fresh key; SEAL draws it from the operating system. ``prompt_key`` lives on in it."""
        secret = scheme.save(sealapi().KeyGenerator(scheme.context).secret_key())
        return cls(scheme, secret, prompt_key or entropy(32))

    @classmethod
    def from_bytes(cls, scheme: Scheme, data: bytes, expected: bytes) -> CohortKey:
        """The key in a grant.

        Raises:
            KeyMismatchError: it is not the one that its maker signed for.
        """
        key = cls(scheme, data[32:], data[:32])
        if not hmac.compare_digest(key.digest, expected):
            raise KeyMismatchError("granted key is not the one that its maker announced")
        return key

    @property
    def public(self) -> bytes:
        """SEAL parameters."""
        return self.scheme.public

    def to_bytes(self) -> bytes:
        """Secret: only ever sealed."""
        return self.prompt_key + self._secret

    def tags(self, plan: RoundPlan) -> TagKey:
        """What tags uploads under a plan, and checks their sums."""
        return TagKey.of(self.to_bytes(), plan.digest, total_size(plan.layout), plan.cohort)

    # -- vectors ---------------------------------------------------------------------------------

    def encrypt(self, slots: Integers) -> Ciphertexts:
        """Seeded ciphertexts of packed integers, ``scheme.slots`` in each."""
        size = self.scheme.slots
        plain = sealapi().Plaintext()
        result = []
        for at in range(0, len(slots), size):
            self._encode(slots[at : at + size], plain)
            result.append(self.scheme.save(self._encryptor.encrypt_symmetric(plain)))
        return tuple(result)

    def decrypt(self, ciphertexts: Ciphertexts, count: int, flood: bytes) -> Integers:
        """The ``count`` integers of a sum.

        Args:
            ciphertexts: from ``RunningSum.result``.
            count: slots that the packing uses.
            flood: context of the flooding's stream, the plan's digest.

        Raises:
            CiphertextError: malformed, or too few or too many.
        """
        size = self.scheme.slots
        if len(ciphertexts) != -(-count // size):
            raise CiphertextError(f"sum of {len(ciphertexts)} ciphertexts for {count} slots")
        if any(len(data) > summed_size(self.scheme.parameters) for data in ciphertexts):
            raise CiphertextError("ciphertext of the sum is too large")
        parts = [self._slots(data) for data in ciphertexts]
        raw = np.concatenate(parts)[:count]
        if not self.scheme.approximate:
            return raw.astype(np.int64)
        key = derive(digest(Purpose.FLOOD, self._secret), Purpose.FLOOD, flood)
        draws = np.frombuffer(keystream(key, 8 * count), "<u8") / 2.0**64
        integers = np.rint(np.nan_to_num(raw) + FLOOD * (2 * draws - 1))
        limit = float(self.scheme.limit)
        clipped: Integers = np.clip(integers, -limit, limit).astype(np.int64)
        return clipped

    def _encode(self, slots: Integers, plain: Any) -> None:
        if not self.scheme.approximate:
            self._encoder.encode(slots.tolist(), plain)
            return
        half = self.scheme.slots // 2
        values = np.zeros(2 * half)
        values[: len(slots)] = slots
        scale = 2.0**self.scheme.parameters.scale_bits
        self._encoder.encode((values[:half] + 1j * values[half:]).tolist(), scale, plain)

    def _slots(self, data: bytes | memoryview) -> NDArray[Any]:
        """Decrypted slots of one ciphertext; for ckks exact enough to give the key away."""
        plain = sealapi().Plaintext()
        self._decryptor.decrypt(self.scheme.ciphertext(data), plain)
        if not self.scheme.approximate:
            return np.array(self._encoder.decode_int64(plain), np.int64)
        values = np.array(self._encoder.decode_complex(plain))
        return np.concatenate([values.real, values.imag])

    # -- the prompt between rounds ---------------------------------------------------------------

    def seal_prompt(self, run: bytes, learning_round: int, prompt: bytes) -> bytes:
        """The prompt that ``learning_round`` starts from. Deterministic (AES-SIV, RFC 5297):
        clients that computed the same prompt make the same box, which the server can compare."""
        return _prompt_cipher(self.prompt_key, run, learning_round).encrypt(prompt, None)


def open_prompt(prompt_key: bytes, run: bytes, learning_round: int, box: bytes) -> bytes:
    """Inverse of ``CohortKey.seal_prompt``.

    Raises:
        SealError: altered, or of another round or key.
    """
    try:
        return _prompt_cipher(prompt_key, run, learning_round).decrypt(box, None)
    except (InvalidTag, ValueError):
        raise SealError(f"sealed prompt of learning round {learning_round} does not open") from None


def _prompt_cipher(prompt_key: bytes, run: bytes, learning_round: int) -> AESSIV:
    context = run, learning_round.to_bytes(4, "little")
    halves = [derive(prompt_key, Purpose.PROMPT_SEAL, bytes((i,)), *context) for i in (0, 1)]
    return AESSIV(b"".join(halves))
