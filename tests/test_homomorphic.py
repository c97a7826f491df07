"""Homomorphic sums against integer and float references, the key-recovery attack, the packing."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import tenseal
import tenseal.sealapi as seal
from ciphers import key
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_fedprompt.clients.cohort_key import CohortKey, open_prompt
from secure_fedprompt.protocol import errors, fixedpoint, homomorphic
from secure_fedprompt.protocol.homomorphic import Parameters, RunningSum, Scheme, choose
from secure_fedprompt.protocol.layout import Layout, TensorSpec
from secure_fedprompt.protocol.packing import Packing


def layout_of(size: int, clients: int, ring_bits: int = 32) -> Layout:
    tensors = [TensorSpec("ctx", (size,))] if size else []
    return fixedpoint.size_layout(
        tensors, clients, clip=1.0, max_weight=1 if ring_bits < 32 else 64, max_seen=100,
        ring_bits=ring_bits, metrics=True,
    )  # fmt: skip


def random_integers(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    parts = []
    for field in layout:
        most = fixedpoint.magnitude(field.bound, field.frac)
        low = -most if field.update else 0
        parts.append(rng.integers(low, most + 1, field.size))
    return np.concatenate(parts)


@given(
    size=st.integers(0, 300),
    clients=st.integers(1, 200),
    ring_bits=st.sampled_from([20, 21, 22, 32]),
    limit_bits=st.integers(32, 46),
    extreme=st.sampled_from([-1, 0, 1]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_sums_of_packed_vectors_unpack_to_sums(
    size: int, clients: int, ring_bits: int, limit_bits: int, extreme: int, seed: int
) -> None:
    layout, rng = layout_of(size, clients, ring_bits), np.random.default_rng(seed)
    packing = Packing.of(layout, (1 << limit_bits) - 1, clients)
    vectors = [random_integers(layout, rng) for _ in range(clients)]
    if extreme:
        vectors = [np.full_like(v, extreme) * np.abs(v) for v in vectors]
    total = sum(packing.pack(v) for v in vectors)
    assert np.abs(total).max() <= (1 << limit_bits) - 1
    assert (packing.unpack(total) == sum(vectors)).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_packed_extremes_stay_within_a_slot(sign: int) -> None:
    for clients in (1, 10, 50, 100, 4096):
        limit = key("bfv", clients).scheme.limit
        layout = layout_of(8192, clients)
        packing = Packing.of(layout, limit, clients)
        most = [np.full(f.size, fixedpoint.magnitude(f.bound, f.frac)) for f in layout]
        one = np.concatenate(
            [m * (sign if f.update else 1) for m, f in zip(most, layout, strict=True)]
        )
        total = packing.pack(one) * clients
        assert np.abs(total).max() <= limit
        assert (packing.unpack(total) == one * clients).all()


def test_counters_cost_no_ciphertext_and_narrow_rings_share_slots() -> None:
    limit = key("bfv", 10).scheme.limit
    wide = Packing.of(layout_of(8192, 10), limit, 10)
    assert (wide.slots, wide.stack) == (8192, 1)
    narrow = Packing.of(layout_of(8192, 10, 22), limit, 10)
    assert (narrow.slots, narrow.stack) == (4096 + narrow.counters, 2)  # no room above two of 22


@pytest.mark.parametrize("protection", homomorphic.SCHEMES)
@pytest.mark.parametrize("clients", [1, 2, 10, 100])
def test_a_sum_is_the_integer_sum_bit_for_bit(protection: str, clients: int) -> None:
    held, rng = key(protection, clients), np.random.default_rng(clients)
    layout = layout_of(2100, clients)
    packing = Packing.of(layout, held.scheme.limit, clients)
    floats = [rng.normal(0, 0.4, 2100) for _ in range(clients)]
    vectors, truth = [], np.zeros(2100)
    for i, update in enumerate(floats):
        values = {"ctx": update, **dict.fromkeys(("seen", "correct", "loss"), np.float64(3))}
        values |= {"weight": np.float64(1 + i % 64), "contributors": np.float64(1)}
        weighted = fixedpoint.weighted(layout, values, weight=1 + i % 64, clip=1.0)
        words = fixedpoint.encode(layout, weighted, i.to_bytes(32, "little"))
        vectors.append(fixedpoint.to_integers(layout, words))
        truth += update / max(1.0, np.abs(update).max()) * (1 + i % 64)
    total = RunningSum(held.scheme, -(-packing.slots // held.scheme.slots))
    for vector in vectors:
        total.add(held.encrypt(packing.pack(vector)))
    slots = held.decrypt(total.result(), packing.slots, bytes(32))
    integers = packing.unpack(slots)
    assert (integers == sum(vectors)).all()
    decoded = fixedpoint.decode(layout, integers)[:2100]
    weight = sum(1 + i % 64 for i in range(clients))
    assert np.abs(decoded - truth).max() / weight <= 1e-5


@pytest.mark.parametrize("flood", [8, 14])
def test_ckks_errors_are_what_the_formula_says(flood: int) -> None:
    held = key("ckks", 100, flood)
    rng = np.random.default_rng(0)
    vectors = [rng.integers(-(2**24), 2**24, held.scheme.slots) for _ in range(100)]
    total = RunningSum(held.scheme, 1)
    for vector in vectors:
        total.add(held.encrypt(vector))
    error = held._slots(total.result()[0]) - sum(vectors)
    predicted = homomorphic.slot_noise(held.scheme.parameters)
    assert 0.8 < error.std() / predicted < 1.2
    assert np.abs(error).max() < homomorphic.slot_noise(held.scheme.parameters) * 7
    assert homomorphic.failure_bits(held.scheme.parameters) > 128
    assert homomorphic.flooding_bits(held.scheme.parameters) >= flood


def test_full_size_sums_fit_ckks() -> None:
    held = key("ckks", 2)
    for sign in (-1, 1):
        vector = np.full(held.scheme.slots, sign * (2**30 - 1))
        total = RunningSum(held.scheme, 1)
        total.add(held.encrypt(vector))
        total.add(held.encrypt(vector))
        assert (held.decrypt(total.result(), len(vector), bytes(32)) == 2 * vector).all()


def test_sets_are_the_largest_primes_of_128_bits() -> None:
    for degree, bits in homomorphic.SETS.items():
        assert bits <= seal.CoeffModulus.MaxBitCount(degree, seal.SEC_LEVEL_TYPE.TC128)
    too_much = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    too_much.set_poly_modulus_degree(2048)
    too_much.set_coeff_modulus(seal.CoeffModulus.Create(2048, [55]))
    refused = seal.SEALContext(too_much, False, seal.SEC_LEVEL_TYPE.TC128)
    assert not refused.parameters_set()


def test_choice_and_refusal() -> None:
    assert choose("masks", 10) == homomorphic.NONE
    assert choose("bfv", 10) == Parameters(2048, 10, 45, 0, 0)
    assert choose("ckks", 100).degree == 2048
    assert choose("ckks", 100, 14).degree == 4096
    with pytest.raises(errors.ParameterError, match=r"no 128-bit ckks set for 100 clients.*2\^-20"):
        choose("ckks", 100, 20)
    with pytest.raises(errors.ParameterError, match="not a set of ours"):
        Scheme("bfv", Parameters(2048, 10, 50, 0, 0))


def test_bfv_decrypts_at_its_bound_and_not_far_beyond() -> None:
    """Copies of one ciphertext add their noise up: as many as planned still decrypt, eight times as
    many do not. With a smaller noise bound in the choice the first half would fail."""
    parameters = choose("bfv", 100)
    held = CohortKey.make(Scheme("bfv", parameters), os.urandom)
    (one,) = held.encrypt(np.ones(held.scheme.slots, np.int64))
    evaluator = seal.Evaluator(held.scheme.context)

    def copies(count: int) -> np.ndarray:
        total = held.scheme.ciphertext(one)
        for _ in range(count - 1):
            evaluator.add_inplace(total, held.scheme.ciphertext(one))
        return held._slots(held.scheme.save(total))

    assert (copies(100) == 100).all()
    assert not (copies(800) == 800).all()


def upload(held: CohortKey, count: int = 10) -> tuple[bytes, ...]:
    return held.encrypt(np.arange(count, dtype=np.int64))


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda b: b[:-9],
    "empty": lambda b: b"",
    "noise": lambda b: os.urandom(len(b)),
    "header only": lambda b: b[:16],
    "a flipped size": lambda b: b[:8] + b"\xff" * 8 + b[16:],
}


@pytest.mark.parametrize("protection", homomorphic.SCHEMES)
@pytest.mark.parametrize("how", SPOILED)
def test_malformed_ciphertexts_are_named(protection: str, how: str) -> None:
    held = key(protection)
    total = RunningSum(held.scheme, 1)
    total.add(upload(held))
    before = total.result()
    with pytest.raises(errors.CiphertextError):
        total.add([SPOILED[how](upload(held)[0])])
    assert total.added == 1
    assert total.result() == before


def test_other_parameter_sets_counts_and_sizes_are_named() -> None:
    held = key("bfv", 100)
    total = RunningSum(held.scheme, 1)
    for other in (key("bfv", 10), key("ckks", 100), key("ckks", 100, 14)):
        with pytest.raises(errors.CiphertextError):
            total.add(upload(other))
    for count in (0, 2):
        with pytest.raises(errors.CiphertextError, match=f"{count} ciphertexts, the plan has 1"):
            total.add(upload(held) * count)
    with pytest.raises(errors.CiphertextError, match="at most"):
        total.add([bytes(40_000)])
    with pytest.raises(errors.CiphertextError):
        held.decrypt(upload(held) * 2, 10, bytes(32))


def test_ciphertexts_without_a_random_part_are_refused() -> None:
    held = key("bfv", 100)
    (fresh,) = upload(held)
    total = held.scheme.ciphertext(fresh)
    minus = seal.Ciphertext()
    seal.Evaluator(held.scheme.context).negate(total, minus)
    added = RunningSum(held.scheme, 1)
    added.add((fresh,))
    before = added.result()
    with pytest.raises(errors.CiphertextError):  # cancels the first one
        added.add((held.scheme.save(minus),))
    assert added.result() == before
    empty = seal.Ciphertext()
    empty.resize(held.scheme.context, 2)
    with pytest.raises(errors.CiphertextError, match="without a random part"):
        RunningSum(held.scheme, 1).add((held.scheme.save(empty),))


def test_an_upload_is_added_whole_or_not_at_all() -> None:
    held = key("bfv", 100)
    total = RunningSum(held.scheme, 2)
    good = held.encrypt(np.arange(3000, dtype=np.int64))
    total.add(good)
    with pytest.raises(errors.CiphertextError):
        total.add((good[0], good[1][:-5]))
    assert (held.decrypt(total.result(), 3000, bytes(32)) == np.arange(3000)).all()


def test_more_uploads_than_a_sum_can_hold_are_refused() -> None:
    held = key("bfv", 2)
    total = RunningSum(held.scheme, 1)
    for _ in range(2):
        total.add(upload(held))
    with pytest.raises(errors.CiphertextError, match="2 uploads"):
        total.add(upload(held))


def test_contexts_with_a_secret_key_are_refused_by_name() -> None:
    held = key("bfv")
    held.scheme.check_context(held.scheme.public)
    made = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        4096,
        coeff_mod_bit_sizes=[40, 40],
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
    )
    for bad in (made.serialize(save_secret_key=True), held._secret):
        with pytest.raises(errors.SecretKeyError, match="secret key"):
            held.scheme.check_context(bad)
    for bad in (b"", b"x" * 99, key("ckks").scheme.public, key("bfv", 10).scheme.public,
                bytes(1 << 25)):  # fmt: skip
        with pytest.raises(errors.KeyMismatchError):
            held.scheme.check_context(bad)


def test_keys_are_checked_against_what_was_announced() -> None:
    held = key("bfv")
    again = CohortKey.from_bytes(held.scheme, held.to_bytes(), held.digest)
    assert (again.decrypt(upload(held), 10, bytes(32)) == np.arange(10)).all()
    with pytest.raises(errors.KeyMismatchError, match="announced"):
        CohortKey.from_bytes(held.scheme, key("bfv", 10).prompt_key + held._secret, held.digest)
    with pytest.raises(errors.KeyMismatchError, match="parameter set"):
        CohortKey.from_bytes(held.scheme, key("ckks").to_bytes(), held.digest)
    assert repr(held) == "CohortKey(<private>)"


@pytest.mark.parametrize("protection", homomorphic.SCHEMES)
def test_a_wrong_key_gives_nothing_like_the_sum(protection: str) -> None:
    held = key(protection)
    other = CohortKey.make(held.scheme, os.urandom)
    vector = np.arange(held.scheme.slots, dtype=np.int64)
    got = other.decrypt(held.encrypt(vector), len(vector), bytes(32))
    assert np.count_nonzero(got == vector) < 5


def test_sealed_prompts_open_only_where_they_belong() -> None:
    held = key("bfv")
    box = held.seal_prompt(b"r" * 16, 3, b"prompt" * 9)
    assert box == held.seal_prompt(b"r" * 16, 3, b"prompt" * 9)
    assert b"prompt" not in box
    assert open_prompt(held.prompt_key, b"r" * 16, 3, box) == b"prompt" * 9
    for run, number, data in (
        (b"s" * 16, 3, box), (b"r" * 16, 4, box), (b"r" * 16, 3, box[:-1]),
        (b"r" * 16, 3, bytes([box[0] ^ 1]) + box[1:]),
    ):  # fmt: skip
        with pytest.raises(errors.SealError):
            open_prompt(held.prompt_key, run, number, data)
    with pytest.raises(errors.SealError):
        open_prompt(os.urandom(32), b"r" * 16, 3, box)


def test_keys_never_touch_the_disk() -> None:
    held = key("bfv")
    target = os.readlink(held.scheme._path)
    assert target.startswith("/memfd:")
    upload(held)
    assert os.fstat(held.scheme._memory).st_nlink == 0


def test_a_system_without_memory_files_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    homomorphic.sealapi.cache_clear()
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(errors.ConfigError, match="needs Linux.*use masks"):
        Scheme("bfv", choose("bfv", 3))
    homomorphic.sealapi.cache_clear()


def test_layout_without_updates_is_one_ciphertext() -> None:
    layout = layout_of(0, 4)
    packing = Packing.of(layout, key("bfv", 4).scheme.limit, 4)
    assert packing.slots == len(layout) < 2048
