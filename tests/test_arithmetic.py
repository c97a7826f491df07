"""Ring, fixed point, key expansion and secret sharing against slow references."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rounds import CTX, entropy_from, make_plan, make_updates

from secure_fedprompt.protocol import errors, expand, fixedpoint, layout, ring, shamir
from secure_fedprompt.protocol.layout import TensorSpec

words = arrays(np.uint32, st.integers(0, 100), elements=st.integers(0, 2**32 - 1))


def pack_reference(values: np.ndarray, bits: int) -> bytes:
    """One big integer, value i at bit i * bits."""
    total = sum((int(v) % (1 << bits)) << (i * bits) for i, v in enumerate(values))
    return total.to_bytes(ring.packed_size(len(values), bits), "little")


@given(words, st.integers(8, 32))
def test_pack_equals_the_big_integer(values: np.ndarray, bits: int) -> None:
    packed = ring.pack(values, bits)
    assert packed == pack_reference(values, bits)
    back = ring.unpack(packed, len(values), bits)
    assert (back == values & np.uint32((1 << bits) - 1)).all()


@given(words.filter(len), st.integers(8, 31))
def test_unpack_refuses_wrong_sizes_and_spare_bits(values: np.ndarray, bits: int) -> None:
    packed = ring.pack(values, bits)
    with pytest.raises(errors.FieldError):
        ring.unpack(packed + b"\0", len(values), bits)
    if len(packed) * 8 > len(values) * bits:
        spoiled = packed[:-1] + bytes([packed[-1] | 0x80])
        with pytest.raises(errors.FieldError):
            ring.unpack(spoiled, len(values), bits)


@given(st.integers(8, 32), st.data())
def test_signed(bits: int, data: st.DataObject) -> None:
    value = data.draw(st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1))
    assert ring.signed(np.array([value % 2**32], np.uint32), bits)[0] == value


@given(st.integers(1, 3), st.integers(0, 3), st.integers(1, 140_000), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_add_masks_equals_whole_streams(plus: int, minus: int, count: int, threads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expand, "THREADS", threads)
        patch.setattr(expand, "_SHARE", 1 if threads > 1 else expand._SHARE)
        check_masks(plus, minus, count)


def check_masks(plus: int, minus: int, count: int) -> None:
    keys = [bytes([i]) * 32 for i in range(plus + minus)]
    fast = np.arange(count, dtype=np.uint32)
    slow = fast.copy()
    after = expand.add_masks(fast, keys[:plus], keys[plus:], 24)
    assert after == b"".join(expand.keystream(key, 4 * count + 24)[-24:] for key in keys)
    for i, key in enumerate(keys):
        mask = expand.expand(key, count)
        slow = slow + mask if i < plus else slow - mask
    assert (fast == slow).all()


def test_keystream_is_aes_256_ctr_nist_sp800_38a_f55() -> None:
    """The keystream under counter zero equals AES-ECB of counters, block by block."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.ciphers.modes import ECB

    key = bytes(range(32))
    block = Cipher(AES256(key), ECB()).encryptor()
    expected = b"".join(block.update(i.to_bytes(16, "big")) for i in range(5))
    assert expand.keystream(key, 80) == expected


def test_purposes_plans_and_contexts_separate_keys() -> None:
    secret = bytes(32)
    made = {
        expand.derive(secret, purpose, digest, *context)
        for purpose in expand.Purpose
        for digest in (bytes(32), b"\1" * 32)
        for context in ((b"ab", b"c"), (b"a", b"bc"), (b"abc",))
    }
    assert len(made) == len(expand.Purpose) * 2 * 3


@given(st.integers(0, shamir.PRIME - 1), st.integers(1, 9), st.data())
@settings(deadline=None)
def test_shamir_any_threshold_subset(secret: int, count: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, count))
    points = data.draw(st.lists(st.integers(1, 999), min_size=count, max_size=count, unique=True))
    raw = shamir.to_bytes(secret)
    split = shamir.split(raw, points, t, entropy_from("s"))
    shares = {p: shamir.to_int(share) for p, share in zip(points, split, strict=True)}
    some = data.draw(st.permutations(points))[:t]
    values = [shares[p] for p in some]
    assert shamir.combine(shamir.basis(some), values) == raw
    other = points[0]  # interpolation also gives every other share
    assert shamir.to_int(shamir.combine(shamir.basis(some, other), values)) == shares[other]


@given(
    st.lists(st.integers(0, 20_000), min_size=1, max_size=80, unique=True), st.integers(0, 20_000)
)
def test_the_lagrange_basis_is_what_its_definition_says(points: list[int], at: int) -> None:
    for i, found in enumerate(shamir.basis(points, at)):
        others = [x for j, x in enumerate(points) if j != i]
        top, bottom = math.prod(at - x for x in others), math.prod(points[i] - x for x in others)
        assert found * bottom % shamir.PRIME == top % shamir.PRIME


@given(st.data())
@settings(deadline=None)
def test_given_shares_are_kept_and_any_threshold_of_all_gives_the_secrets(
    data: st.DataObject,
) -> None:
    points = data.draw(st.lists(st.integers(1, 999), min_size=1, max_size=9, unique=True))
    t = data.draw(st.integers(1, len(points)))
    secrets = entropy_from("secrets")(31) + b"\0" + entropy_from("more")(31) + b"\0"
    taken = data.draw(st.permutations(points))[: data.draw(st.integers(0, t - 1))]
    given_ = {p: shamir.drawn(entropy_from(f"given {p}")(64)) for p in taken}
    split = shamir.split(secrets, points, t, entropy_from("s"), given_)
    shares = dict(zip(points, split, strict=True))
    assert given_.items() <= shares.items()
    some = data.draw(st.permutations(points))[:t]
    for at in (0, 32):
        values = [shamir.to_int(shares[p][at : at + 32]) for p in some]
        assert shamir.combine(shamir.basis(some), values) == secrets[at : at + 32]


def test_shares_that_are_not_given_are_fresh() -> None:
    """With the secret and less than t - 1 given shares the others are still anything."""
    given_ = {1: shamir.to_bytes(5)}
    one, two = (shamir.split(bytes(32), [1, 2, 3], 3, entropy_from(s), given_) for s in "ab")
    assert one[0] == two[0] == given_[1]
    assert one[1] != two[1]
    assert one[2] != two[2]


def test_drawn_elements_are_reduced() -> None:
    high = (shamir.PRIME + 7).to_bytes(32, "little")
    assert shamir.drawn(high + bytes(32)) == shamir.to_bytes(7) + bytes(32)


def test_shamir_fewer_shares_fit_every_secret() -> None:
    """t - 1 shares are consistent with any secret: there is a polynomial through both."""
    shares = [shamir.to_int(s) for s in shamir.split(bytes(32), [1, 2, 3], 3, entropy_from("x"))]
    for guess in (0, 1, shamir.PRIME - 1):
        points, values = [0, 1, 2], [guess, shares[0], shares[1]]
        third = shamir.to_int(shamir.combine(shamir.basis(points, 3), values))
        assert shamir.combine(shamir.basis([1, 2, 3]), [*shares[:2], third]) == shamir.to_bytes(
            guess
        )


def test_shamir_refuses_what_is_no_field_element() -> None:
    with pytest.raises(errors.FieldError):
        shamir.to_int(b"\xff" * 32)
    with pytest.raises(errors.ThresholdError):
        shamir.split(bytes(32), [1, 2], 3, entropy_from("x"))
    with pytest.raises(errors.ThresholdError):
        shamir.split(bytes(32), [0, 1], 1, entropy_from("x"))
    for given_ in ({1: bytes(32), 2: bytes(32)}, {4: bytes(32)}):  # as many as fix it; elsewhere
        with pytest.raises(errors.ThresholdError):
            shamir.split(bytes(32), [1, 2, 3], 2, entropy_from("x"), given_)
    with pytest.raises(errors.FieldError):
        shamir.split(bytes(32), [1, 2, 3], 2, entropy_from("x"), {1: b"\xff" * 32})


@given(st.integers(1, 500), st.floats(1e-3, 100), st.integers(1, 5000), st.integers(8, 32))
def test_sizing_never_overflows(n: int, clip: float, weight: int, bits: int) -> None:
    """Either refused, or the largest possible sum is read back exactly."""
    try:
        fields = fixedpoint.size_layout(
            CTX, n, clip=clip, max_weight=weight, max_seen=1000, ring_bits=bits, metrics=True
        )
    except errors.OverflowPlanError:
        return
    for field in fields:
        fixedpoint.check_fits(field, n)
        for sign in (1, -1):
            total = sign * n * fixedpoint.magnitude(field.bound, field.frac)
            assert ring.signed(np.array([total % 2**32], np.uint32), field.bits)[0] == total
        worse = dataclasses.replace(field, frac=field.frac + 1)
        if field.update and field.frac < fixedpoint.MAX_FRAC:
            with pytest.raises(errors.OverflowPlanError):
                fixedpoint.check_fits(worse, n)


@given(st.binary(min_size=32, max_size=32), st.floats(-1, 1))
def test_encoding_stays_within_its_magnitude_and_one_step(key: bytes, value: float) -> None:
    plan = make_plan(3, tensors=(TensorSpec("x", (64,)),), max_weight=7)
    vector = np.zeros(layout.total_size(plan.layout))
    vector[:64] = 7 * value
    vector[63] = 7.0
    field = plan.layout[0]
    integers = fixedpoint.to_integers(plan.layout, fixedpoint.encode(plan.layout, vector, key))
    assert np.abs(integers[:64]).max() <= fixedpoint.magnitude(field.bound, field.frac)
    assert np.abs(integers[:64] - np.ldexp(vector[:64], field.frac)).max() < 1


def test_counters_saturate_so_that_no_refusal_tells_the_server_where_they_lie() -> None:
    plan = make_plan(3)
    values, _ = make_updates(plan)["c001"]
    values |= {"seen": np.float64(101), "correct": np.float64(7)}
    full = {**values, "weight": np.float64(500), "contributors": np.float64(1)}
    fields = layout.unflatten(
        plan.layout, fixedpoint.weighted(plan.layout, full, weight=500, clip=1.0)
    )
    assert (fields["seen"], fields["correct"], fields["weight"]) == (100, 7, 64)
    assert np.allclose(fields["ctx"], 64 * np.clip(values["ctx"], -1, 1))


def test_rounding_is_unbiased() -> None:
    plan = make_plan(1, tensors=(TensorSpec("x", (100_000,)),), max_weight=1)
    vector = np.zeros(layout.total_size(plan.layout))
    step = 2.0 ** -plan.layout[0].frac
    vector[:100_000] = 0.3 * step
    integers = fixedpoint.to_integers(
        plan.layout, fixedpoint.encode(plan.layout, vector, bytes(32))
    )[:100_000]
    assert set(np.unique(integers)) == {0, 1}
    assert abs(integers.mean() - 0.3) < 6 * np.sqrt(0.21 / 100_000)


def test_an_update_beyond_the_clip_is_scaled_down_and_counted() -> None:
    """As a whole: of values that are cut off one by one everybody would know what they are, and a
    sum in which all but one client's are is that client's."""
    plan = make_plan(3, max_weight=5)
    values, _ = make_updates(plan)["c001"]
    values["ctx"] = np.full((3, 5), 0.5)
    values["ctx"][0, :2] = [7.0, -9.0]
    full = {**values, "weight": np.float64(5), "contributors": np.float64(1)}
    fields = layout.unflatten(
        plan.layout, fixedpoint.weighted(plan.layout, full, weight=5, clip=1.0)
    )
    assert fields["clipped"] == 2
    assert np.allclose(fields["ctx"], 5 * values["ctx"] / 9.0, rtol=1e-12)
    assert fields["ctx"][0, 1] == -5.0


@given(
    arrays(np.float64, (3, 5), elements=st.floats(-1e30, 1e30)),
    st.floats(1e-3, 1e3),
)
def test_scaling_keeps_directions_and_bounds(ctx: np.ndarray, clip: float) -> None:
    plan = make_plan(3, max_weight=5)
    values, _ = make_updates(plan)["c001"]
    full = {**values, "ctx": ctx, "weight": np.float64(1), "contributors": np.float64(1)}
    fitting = tuple(dataclasses.replace(f, bound=5 * clip) if f.update else f for f in plan.layout)
    found = layout.unflatten(fitting, fixedpoint.weighted(fitting, full, weight=1, clip=clip))
    largest = np.abs(ctx).max()
    expected = ctx if largest <= clip else ctx * (clip / largest)
    assert np.allclose(found["ctx"], expected, rtol=1e-12, atol=0)
    assert np.abs(found["ctx"]).max() <= clip


@pytest.mark.parametrize(
    ("field", "value", "words_"),
    [
        ("ctx", np.full((3, 5), np.nan), "nan"),
        ("ctx", np.full((3, 5), np.inf), "inf"),
        ("ctx", np.zeros((3, 4)), "shape"),
    ],
)
def test_bad_updates_are_refused(field: str, value: np.ndarray, words_: str) -> None:
    plan = make_plan(3)
    values, weight = make_updates(plan)["c001"]
    full = {**values, "weight": np.float64(weight), "contributors": np.float64(1), field: value}
    with pytest.raises(errors.UpdateError, match=words_):
        fixedpoint.weighted(plan.layout, full, weight=weight, clip=1.0)
    del full["ctx"]
    with pytest.raises(errors.UpdateError, match="lacks the field 'ctx'"):
        fixedpoint.weighted(plan.layout, full, weight=weight, clip=1.0)


@given(st.integers(8, 32))
def test_wire_round_trip_at_every_width(bits: int) -> None:
    fields = tuple(
        dataclasses.replace(f, bits=bits) if f.update else f for f in make_plan(2).layout
    )
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 2**32, layout.total_size(fields), dtype=np.uint32)
    total = np.zeros_like(values)
    fixedpoint.add_wire(fields, fixedpoint.to_wire(fields, values), total)
    masks = np.concatenate([np.full(f.size, (1 << f.bits) - 1, np.uint32) for f in fields])
    assert (total == values & masks).all()


@given(
    st.integers(1, 5000), st.sampled_from([0.003, 0.5, 1.0, 7.0]), st.sampled_from([1, 64, 4096]),
    st.sampled_from([0.0, 3.5]),
)  # fmt: skip
@settings(max_examples=60)
def test_the_smallest_ring_is_fine_enough_and_no_smaller_one_is(
    clients: int, clip: float, weight: int, noise: float
) -> None:
    bits = fixedpoint.smallest_ring(clients, clip=clip, max_weight=weight, noise=noise)

    def steps(b: int) -> float:
        try:
            field = fixedpoint._sized("x", (1,), weight * clip + noise, b, clients, True)
        except errors.OverflowPlanError:
            return 0.0
        return clip * 2.0**field.frac

    enough = min(fixedpoint.FINE_STEPS, clip * 2.0**fixedpoint.MAX_FRAC)
    assert bits == 32 or steps(bits) >= enough
    assert bits == ring.MIN_BITS or steps(bits - 1) < enough
