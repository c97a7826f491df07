"""Li and Micciancio 2021: exact decryptions give the key away, what clients export does not."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import tenseal.sealapi as seal
from ciphers import key

from secure_fedprompt.clients.cohort_key import CohortKey
from secure_fedprompt.protocol.homomorphic import RunningSum, Scheme, choose


def residues(thing: Any, count: int) -> list[int]:
    words = thing.dyn_array()
    return [words[i] for i in range(count)]


def recover_key(held: CohortKey, exported: np.ndarray, ciphertext: bytes) -> list[int]:
    """The key that c0 + c1 s = Enc(exported) would have, in the transformed domain.

    Uses nothing but the exported numbers, the ciphertext and the public parameters.
    """
    scheme = held.scheme
    q = scheme.settings.coeff_modulus()[0].value()
    half, scale = scheme.slots // 2, 2.0**scheme.parameters.scale_bits
    plain = seal.Plaintext()
    encoder = seal.CKKSEncoder(scheme.context)
    encoder.encode((exported[:half] + 1j * exported[half:]).tolist(), scale, plain)
    message = residues(plain, scheme.slots)
    parsed = scheme.ciphertext(ciphertext)
    both = residues(parsed, 2 * scheme.slots)
    c0, c1 = both[: scheme.slots], both[scheme.slots :]
    return [
        (p - a) * pow(b, -1, q) % q if b else -1
        for p, a, b in zip(message, c0, c1, strict=True)
    ]  # fmt: skip


def exported_sum() -> tuple[CohortKey, bytes, np.ndarray, list[int]]:
    """An aggregate of three updates, with its ciphertext, and the true key for comparison."""
    held = CohortKey.make(Scheme("ckks", choose("ckks", 3)), os.urandom)
    rng = np.random.default_rng(5)
    total = RunningSum(held.scheme, 1)
    vectors = [rng.integers(-(2**20), 2**20, held.scheme.slots) for _ in range(3)]
    for vector in vectors:
        total.add(held.encrypt(vector))
    secret = held.scheme.read(seal.SecretKey(), held._secret)
    truth = residues(secret.data(), held.scheme.slots)
    return held, total.result()[0], np.sum(vectors, axis=0), truth


def hits(found: list[int], secret: list[int]) -> int:
    return sum(a == b for a, b in zip(found, secret, strict=True))


def test_exact_decryptions_give_the_key_away_and_what_is_exported_does_not() -> None:
    held, ciphertext, total, secret = exported_sum()
    slots = len(secret)
    raw = held._slots(ciphertext)
    assert hits(recover_key(held, raw, ciphertext), secret) == slots  # the attack works
    # Noise that clients add before encrypting is part of what is decrypted: it does not help.
    flooded = RunningSum(held.scheme, 1)
    rng = np.random.default_rng(6)
    for _ in range(3):
        plain = seal.Plaintext()
        values = rng.integers(-(2**20), 2**20, slots) + rng.uniform(-0.25, 0.25, slots)
        complex_ = (values[: slots // 2] + 1j * values[slots // 2 :]).tolist()
        held._encoder.encode(complex_, 2.0**held.scheme.parameters.scale_bits, plain)
        flooded.add([held.scheme.save(held._encryptor.encrypt_symmetric(plain))])
    (before,) = flooded.result()
    assert hits(recover_key(held, held._slots(before), before), secret) == slots
    # What leaves decrypt(): rounded, hence equal to the plain sum, which needs no key to know.
    exported = held.decrypt((ciphertext,), slots, bytes(32)).astype(float)
    assert (exported == total).all()
    assert hits(recover_key(held, exported, ciphertext), secret) < 5
    # Flooding alone, without rounding, hides it as well.
    flood = rng.uniform(-0.25, 0.25, slots)
    assert hits(recover_key(held, raw + flood, ciphertext), secret) < 5


def test_flooding_hides_on_which_side_of_a_rounding_an_off_grid_sum_lies() -> None:
    """Sums pushed to a half integer round by the sign of their noise; flooding decides instead."""
    held = key("ckks", 3)
    slots, half = held.scheme.slots, held.scheme.slots // 2
    signs_plain, signs_flooded, noise = [], [], []
    for i in range(8):
        plain = seal.Plaintext()
        values = np.full(slots, 0.5)
        complex_ = (values[:half] + 1j * values[half:]).tolist()
        held._encoder.encode(complex_, 2.0**held.scheme.parameters.scale_bits, plain)
        ciphertext = held.scheme.save(held._encryptor.encrypt_symmetric(plain))
        raw = held._slots(ciphertext)
        noise.append(raw > 0.5)
        signs_plain.append(np.rint(raw) == 1)
        signs_flooded.append(held.decrypt((ciphertext,), slots, bytes([i]) * 32) == 1)
    told = np.mean(np.concatenate(signs_plain) == np.concatenate(noise))
    guess = np.mean(np.concatenate(signs_flooded) == np.concatenate(noise))
    assert told > 0.99
    assert abs(guess - 0.5) < 5 / math.sqrt(8 * slots)


def test_flooding_is_the_same_for_all_clients_and_new_in_every_round() -> None:
    held = key("ckks", 3)
    plain = seal.Plaintext()
    half = held.scheme.slots // 2
    held._encoder.encode([0.5 + 0.5j] * half, 2.0**held.scheme.parameters.scale_bits, plain)
    box = (held.scheme.save(held._encryptor.encrypt_symmetric(plain)),)
    again = CohortKey.from_bytes(held.scheme, held.to_bytes(), held.digest)
    first = held.decrypt(box, 2 * half, b"a" * 32)
    assert (first == again.decrypt(box, 2 * half, b"a" * 32)).all()
    assert 0.4 < np.mean(first != held.decrypt(box, 2 * half, b"b" * 32)) < 0.6
