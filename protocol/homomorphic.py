"""Additively homomorphic sums with Microsoft SEAL, through ``tenseal.sealapi``.

    bfv     exact integers (Fan and Vercauteren 2012): the recommended one
    ckks    approximate numbers (Cheon, Kim, Kim and Song 2017), rounded back to exact integers

Both encrypt the ring integers of ``fixedpoint`` and only ever add. Neither relinearisation nor
Galois keys exist, so one prime of 54 bits at degree 2048 is enough for 128-bit security
(HomomorphicEncryption.org standard, ternary secrets; SEAL checks it, level TC128). Clients share
one key and encrypt symmetrically: half of a fresh ciphertext is then a seed.

This module knows no key: it is all that the server uses. ``clients.cohort_key`` encrypts.
SEAL reads and writes files only. They are anonymous memory here (``memfd``), never on a disk, which
is why these protections need Linux.
"""

from __future__ import annotations

import functools
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secure_fedprompt.protocol.codec import U8, U16, U32
from secure_fedprompt.protocol.errors import (
    CiphertextError,
    ConfigError,
    KeyMismatchError,
    ParameterError,
    SecretKeyError,
)
from secure_fedprompt.protocol.protections import PROTECTIONS, facts_of

SCHEMES = tuple(row.name for row in PROTECTIONS.values() if row.encrypted)
SETS = {2048: 54, 4096: 60}  # degree: bits of the one prime; 54 and 109 keep 128-bit security,
#                              60 is SEAL's largest prime
NOISE_BOUND = 21  # SEAL samples encryption noise from a centred binomial distribution of 42 bits
NOISE_DEVIATION = math.sqrt(NOISE_BOUND / 2)
MAX_CLIENTS = 4096
VALUE_BITS = 31  # a sum's magnitude is below 2^31
_LARGEST = 1 << 24  # what is parsed at all to name a wrong context
Ciphertexts = tuple[bytes, ...]


@dataclass(frozen=True)
class Parameters:
    """A parameter set, as it stands in the plan.

    Attributes:
        degree: N of the ring Z_q[X] / (X^N + 1); 0 without homomorphic encryption.
        clients: most uploads in one sum.
        plain_bits: of the prime plaintext modulus, bfv only.
        scale_bits: log2 of the scale, ckks only.
        flood: asked statistical distance 2^-flood of the flooding, ckks only.
    """

    degree: U32
    clients: U16
    plain_bits: U8
    scale_bits: U8
    flood: U8


NONE = Parameters(0, 0, 0, 0, 0)


def choose(protection: str, clients: int, flood: int = 8) -> Parameters:
    """The smallest 128-bit parameter set for sums of 32-bit integers over ``clients`` uploads.

    Raises:
        ParameterError: none fits; says what is short by how much.
    """
    if not facts_of(protection).encrypted:
        return NONE
    if not 1 <= clients <= MAX_CLIENTS:
        raise ParameterError(f"a sum of {clients} uploads, must be 1 to {MAX_CLIENTS}")
    short = ""
    for degree, room in SETS.items():
        if not facts_of(protection).approximate:
            # Decryption is exact while clients * (noise + rounding) < q / (2 t).
            bits = min(60, room - 1 - math.ceil(math.log2(clients * (NOISE_BOUND + 1))))
            if bits > VALUE_BITS + 2:
                return Parameters(degree, clients, bits, 0, 0)
            short = f"{VALUE_BITS + 3 - bits} bits of plaintext are missing"
        else:
            # |coefficient| <= sqrt(2) * 2^31 * scale must stay below q / 2.
            scale = room - 2 - VALUE_BITS
            parameters = Parameters(degree, clients, 0, scale, flood)
            if (reached := flooding_bits(parameters)) >= flood:
                return parameters
            short = f"flooding reaches 2^-{reached:.1f} at most, not 2^-{flood}"
    raise ParameterError(
        f"no 128-bit {protection} set for {clients} clients up to degree {max(SETS)}: {short}; "
        "use bfv, fewer clients or a smaller flood_bits"
    )


def slot_noise(parameters: Parameters) -> float:
    """Standard deviation of a ckks slot's error, in integers, encryption and encoding together.

    Noise and rounding of n ciphertexts have variance n (10.5 + 1/12) per coefficient; a slot sums N
    of them, half into each of its two parts. Double precision adds less than 2^-19 (measured).
    """
    per_coefficient = parameters.clients * (NOISE_DEVIATION**2 + 1 / 12)
    noise = math.sqrt(per_coefficient * parameters.degree / 2)
    return noise * 2.0**-parameters.scale_bits + 2.0**-19


def flooding_bits(parameters: Parameters) -> float:
    """k of the flooding's statistical distance 2^-k for one value.

    Flooding is uniform in +-1/4. Shifting it by an error e changes it by a statistical distance of
    |e| / (2 * 1/4); E|e| = sqrt(2 / pi) times the deviation.
    """
    return -math.log2(2 * math.sqrt(2 / math.pi) * slot_noise(parameters))


def failure_bits(parameters: Parameters) -> float:
    """k such that a value is rounded to a wrong integer with probability below 2^-k.

    It takes an error of 1/4 beside the flooding's 1/4. Gaussian tail exp(-x^2 / 2); exact schemes
    have no failures at all.
    """
    if parameters.plain_bits:
        return math.inf
    return (0.25 / slot_noise(parameters)) ** 2 / (2 * math.log(2))


def fresh_size(parameters: Parameters) -> int:
    """Largest size in bytes of a fresh, seeded ciphertext (SEAL compresses it by a few percent)."""
    return 8 * parameters.degree + 512


def summed_size(parameters: Parameters) -> int:
    """Largest size in bytes of a sum."""
    return 2 * fresh_size(parameters)


class Scheme:
    """SEAL with one parameter set and no key.

    Attributes:
        slots: integers in one ciphertext.
        limit: largest magnitude of a slot's sum.
        context: the SEAL context.
        approximate: whether it computes with approximate numbers.
    """

    def __init__(self, protection: str, parameters: Parameters) -> None:
        """Raises ParameterError if the set is not one that ``choose`` would take."""
        if parameters != choose(protection, parameters.clients, parameters.flood):
            raise ParameterError(f"{protection} parameters {parameters} are not a set of ours")
        seal = sealapi()
        self.protection, self.parameters = protection, parameters
        self.approximate = facts_of(protection).approximate
        settings = seal.EncryptionParameters(getattr(seal.SCHEME_TYPE, protection.upper()))
        settings.set_poly_modulus_degree(parameters.degree)
        prime = SETS[parameters.degree]
        settings.set_coeff_modulus(seal.CoeffModulus.Create(parameters.degree, [prime]))
        self.slots, self.limit = parameters.degree, 1 << VALUE_BITS
        if not self.approximate:
            plain = seal.PlainModulus.Batching(parameters.degree, parameters.plain_bits)
            settings.set_plain_modulus(plain)
            self.limit = (plain.value() - 1) // 2
        self.context = seal.SEALContext(settings, False, seal.SEC_LEVEL_TYPE.TC128)
        if not self.context.parameters_set():
            raise ParameterError(f"SEAL refuses the set: {self.context.parameters_error_message()}")
        self.settings = settings
        self._memory = os.memfd_create("seal")  # anonymous, gone with its descriptor
        weakref.finalize(self, os.close, self._memory)
        self._path = f"/proc/self/fd/{self._memory}"
        self.public = self.save(settings)

    def save(self, thing: Any) -> bytes:
        """A SEAL object's bytes."""
        thing.save(self._path)
        return os.pread(self._memory, os.fstat(self._memory).st_size, 0)

    def read(self, thing: Any, data: bytes | memoryview) -> Any:
        """Parse bytes into an empty SEAL object of this context.

        Raises:
            CiphertextError: they are no such object, or of another parameter set.
        """
        os.ftruncate(self._memory, 0)
        os.pwrite(self._memory, data, 0)
        try:
            thing.load(self.context, self._path)
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            what = type(thing).__name__.lower()
            raise CiphertextError(
                f"{len(data)} bytes are no {what} of the plan's parameter set ({error})"
            ) from None
        finally:
            os.ftruncate(self._memory, 0)
        return thing

    def ciphertext(self, data: bytes | memoryview) -> Any:
        """A ciphertext of two polynomials, at the plan's scale.

        Raises:
            CiphertextError: anything else.
        """
        made = self.read(sealapi().Ciphertext(), data)
        scale = 2.0**self.parameters.scale_bits
        ntt = self.approximate
        if made.size() != 2 or made.is_ntt_form() != ntt or (ntt and made.scale != scale):
            raise CiphertextError(f"ciphertext of {made.size()} polynomials, or at another scale")
        if made.is_transparent():
            raise CiphertextError("ciphertext without a random part: it would encrypt nothing")
        return made

    def check_context(self, data: bytes | memoryview) -> None:
        """Refuse what is not exactly the public parameters of the plan.

        Raises:
            SecretKeyError: it holds a secret key, as a SEAL key or in a TenSEAL context.
            KeyMismatchError: other parameters, or something else.
        """
        if bytes(data) == self.public:
            return
        if len(data) <= _LARGEST and self._holds_secret(bytes(data)):
            raise SecretKeyError(
                "the context holds a secret key: it is burnt, the next attempt makes a new one"
            )
        raise KeyMismatchError(f"context of {len(data)} bytes is not the plan's parameter set")

    def _holds_secret(self, data: bytes) -> bool:
        import tenseal

        try:
            return bool(tenseal.context_from(data).is_private())
        except (RuntimeError, ValueError, IndexError, MemoryError):
            pass
        try:
            self.read(sealapi().SecretKey(), data)
        except CiphertextError:
            return False
        return True


class RunningSum:
    """Running sum of uploads. Single uploads are added and forgotten.

    Attributes:
        added: uploads in the sum.
    """

    def __init__(self, scheme: Scheme, count: int) -> None:
        """``count`` ciphertexts make an upload."""
        self.scheme, self.count, self.added = scheme, count, 0
        self._evaluator = sealapi().Evaluator(scheme.context)
        self._total: list[Any] = []

    def add(self, ciphertexts: Sequence[bytes | memoryview]) -> None:
        """Add one client's upload, all of it or nothing.

        Raises:
            CiphertextError: wrong count or size, another parameter set, or too many uploads.
        """
        parameters = self.scheme.parameters
        if len(ciphertexts) != self.count:
            raise CiphertextError(f"{len(ciphertexts)} ciphertexts, the plan has {self.count}")
        if self.added == parameters.clients:
            raise CiphertextError(f"more than the {parameters.clients} uploads that a sum can hold")
        largest = max(len(data) for data in ciphertexts)
        if largest > fresh_size(parameters):
            raise CiphertextError(
                f"ciphertext of {largest} bytes, a fresh one has at most {fresh_size(parameters)}"
            )
        fresh = [self.scheme.ciphertext(data) for data in ciphertexts]
        if self._total:
            try:
                for total, one in zip(self._total, fresh, strict=True):
                    self._evaluator.add_inplace(one, total)
            except (RuntimeError, ValueError) as error:
                raise CiphertextError(f"ciphertext cannot be added ({error})") from None
        self._total = fresh
        self.added += 1

    def result(self) -> Ciphertexts:
        """The encrypted sum."""
        return tuple(self.scheme.save(total) for total in self._total)


@functools.cache
def sealapi() -> Any:
    """The SEAL bindings.

    Raises:
        ConfigError: this system lacks them, or has no memory files.
    """
    if not hasattr(os, "memfd_create"):
        raise ConfigError(
            "protection bfv or ckks needs Linux: elsewhere SEAL would write keys to disk; use masks"
        )
    try:
        import tenseal.sealapi
    except ImportError as error:
        raise ConfigError(f"protection bfv or ckks needs TenSEAL ({error}): use masks") from None
    return tenseal.sealapi


@functools.lru_cache(maxsize=4)
def scheme(protection: str, parameters: Parameters) -> Scheme:
    """The shared ``Scheme`` of a parameter set (making one takes milliseconds)."""
    return Scheme(protection, parameters)
