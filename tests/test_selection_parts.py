"""Oblivious transfer, keys, shares and layouts of the secure selection."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl import bindings
from selecting import shared

from secure_fedprompt.protocol import edwards, errors
from secure_fedprompt.protocol.codec import MAX_FRAME
from secure_fedprompt.protocol.expand import Purpose, tag
from secure_fedprompt.protocol.selection import circuits, oblivious_transfer, shares, task
from secure_fedprompt.protocol.selection.oblivious_transfer import KAPPA, BaseReceiver, BaseSender
from secure_fedprompt.protocol.selection.parties import Evaluator, Garbler

few = settings(max_examples=25, deadline=None)


# -- oblivious transfer --------------------------------------------------------------------------

IDENTITY = b"\x01" + bytes(31)
SMALL = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")  # order 8
NOT_CANONICAL = (2**255 - 19 + 1).to_bytes(32, "little")
OFF_CURVE = b"\x02" + bytes(31)


@pytest.mark.parametrize(
    "point", [IDENTITY, SMALL, NOT_CANONICAL, OFF_CURVE, bytes(32), b"\xff" * 32]
)
def test_unusable_points_are_refused(point: bytes) -> None:
    one, other = Garbler(bytes(32), os.urandom), Evaluator(bytes(32), os.urandom)
    with pytest.raises(errors.PointError, match="no point"):
        one.answer(dataclasses.replace(other.offer(), point=point))
    answer = one.answer(other.offer())
    points = bytes(answer.points)
    with pytest.raises(errors.PointError, match="answer 127"):
        other.accept(dataclasses.replace(answer, points=points[:-32] + point))
    with pytest.raises(errors.PointError, match="answer 3 of a transfer repeats"):
        other.accept(dataclasses.replace(
            answer, points=points[:96] + other.offer().point + points[128:]))  # fmt: skip
    with pytest.raises(errors.FieldError):
        other.accept(dataclasses.replace(answer, points=points[:-1]))
    other.accept(answer)


def test_base_transfers_give_the_chosen_key_and_hide_the_other() -> None:
    rng = np.random.default_rng(1)
    choices = rng.random(KAPPA) < 0.5
    sender = BaseSender(b"s" * 32, os.urandom)
    receiver = BaseReceiver(b"s" * 32, choices, sender.offer, os.urandom)
    pairs = sender.keys(receiver.answer)
    for choice, key, both in zip(choices, receiver.keys, pairs, strict=True):
        assert key == both[int(choice)]
        assert key != both[1 - int(choice)]
    assert len({k for p in pairs for k in p}) == 2 * KAPPA
    other = BaseReceiver(b"t" * 32, choices, sender.offer, os.urandom)
    assert all(
        k not in pair_ for k, pair_ in zip(other.keys, sender.keys(other.answer), strict=True)
    )


def test_scalars_are_never_zero() -> None:
    order = 2**252 + 27742317777372353535851937790883648493
    draws = iter([bytes(64), order.to_bytes(64, "little"), b"\x05" + bytes(63)])
    assert edwards.random_scalar(lambda size: next(draws)) == b"\x05" + bytes(31)
    with pytest.raises(errors.PointError, match="identity"):
        edwards.multiply(
            bytes(31) + b"\x00",
            bindings.crypto_scalarmult_ed25519_base_noclamp(b"\x05" + bytes(31)),
        )


def two_ends(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """An offset, and the receiver and sender of an extension, after their base transfers."""
    offset = rng.random(KAPPA) < 0.5
    keys = [(os.urandom(32), os.urandom(32)) for _ in range(KAPPA)]
    receiver = oblivious_transfer.CorrelatedReceiver(b"s" * 32, keys, os.urandom)
    chosen = [k[int(c)] for k, c in zip(keys, offset, strict=True)]
    return offset, receiver, oblivious_transfer.CorrelatedSender(b"s" * 32, offset, chosen)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_extended_transfers_are_correlated_by_the_offset(count: int) -> None:
    rng = np.random.default_rng(count)
    offset, receiver, sender = two_ends(rng)
    delta = np.packbits(offset, bitorder="little").view("<u8")
    earlier: set[bytes] = set()
    for _ in range(2):
        choices = rng.random(count) < 0.5
        columns, t = receiver.choose(choices)
        q = sender.extend(columns, count)
        assert np.array_equal(q ^ t, choices[:, None] * delta)
        new = {row.tobytes() for row in t}
        assert len(new) == count
        assert not new & earlier
        earlier = new


def extended(
    cheat: Any, count: int = 100, seed: int = 0
) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], Exception | None]:
    """An extension whose receiver alters its columns by ``cheat``; Delta and what the sender says."""
    rng = np.random.default_rng(seed)
    offset, receiver, sender = two_ends(rng)
    try:
        sender.extend(cheat(receiver, rng.random(count) < 0.5), count)
    except errors.ProtocolError as error:
        return offset, error
    return offset, None


def flipping(column: int) -> Any:
    """Another choice in one column, and everything else computed as a cheat would."""

    def cheat(receiver: Any, choices: Any) -> bytes:
        honest = oblivious_transfer._hashed

        def hashed(session: bytes, sent: bytes, packed: Any) -> Any:
            altered = np.frombuffer(sent, np.uint8).reshape(KAPPA, -1).copy()
            altered[column, 0] ^= 1
            columns.append(altered.tobytes())
            return honest(session, columns[0], packed)

        columns: list[bytes] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(oblivious_transfer, "_hashed", hashed)
            sent, _ = receiver.choose(choices)
        return columns[0] + sent[len(columns[0]) :]

    return cheat


def test_a_column_of_other_choices_passes_only_where_the_offset_is_guessed() -> None:
    """One of 128 columns: it passes if that bit of the offset is 0, and fails if it is 1."""
    for column in range(24):
        offset, error = extended(flipping(column), seed=column)
        assert (error is not None) == offset[column]
    assert isinstance(extended(lambda r, c: b"".join(r.choose(c)[:1])[:-1])[1], errors.FieldError)


@pytest.mark.parametrize("at", [0, -1, -17, -(129 * 16)])
def test_a_proof_of_other_hashes_is_refused(at: int) -> None:
    def cheat(receiver: Any, choices: Any) -> bytes:
        sent = bytearray(receiver.choose(choices)[0])
        sent[at] ^= 1
        return bytes(sent)

    assert isinstance(extended(cheat)[1], errors.SelectionError)


def ghash(key: bytes, data: bytes) -> bytes:
    """What of GHASH depends on the data, bit by bit (NIST SP 800-38D, 6.3 and 6.4)."""
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    h = int.from_bytes(encryptor.update(bytes(16)), "big")

    def times(x: int) -> int:
        z, v = 0, h
        for i in range(127, -1, -1):
            z ^= v if x >> i & 1 else 0
            v = v >> 1 ^ (0xE1 << 120 if v & 1 else 0)
        return z

    y = 0
    for at in range(0, len(data), 16):
        y = times(y ^ int.from_bytes(data[at : at + 16].ljust(16, b"\0"), "big"))
    return times(y).to_bytes(16, "big")  # the lengths' block


@few
@given(st.integers(1, 80), st.integers(0, 2**32))
def test_the_check_hashes_every_bit_linearly(size: int, seed: int) -> None:
    packed = np.random.default_rng(seed).integers(0, 256, (3, size), dtype=np.uint8)
    packed[2] = packed[0] ^ packed[1]
    found = oblivious_transfer._hashed(b"s" * 32, b"sent", packed)
    assert np.array_equal(found[2], found[0] ^ found[1])
    data = tag(Purpose.TRANSFER_CHECK) + b"s" * 32 + b"sent"
    key = hashlib.blake2b(data, digest_size=32).digest()
    assert found[0].tobytes() == ghash(key, packed[0].tobytes())
    assert not np.array_equal(oblivious_transfer._hashed(b"s" * 32, b"Sent", packed), found)


def test_random_choices_beside_the_true_ones_hide_them_in_the_check() -> None:
    """The same choices, keys and all else: what is sent of them differs."""
    keys = [(bytes(32), bytes(31) + b"1")] * KAPPA
    sent = [
        oblivious_transfer.CorrelatedReceiver(b"s" * 32, keys, os.urandom).choose(np.zeros(9, bool))
        for _ in range(2)
    ]
    assert sent[0][0][-16:] != sent[1][0][-16:]
    assert np.array_equal(sent[0][1], sent[1][1])


@few
@given(st.integers(1, 40), st.integers(0, 2**32))
def test_transposition_is_that_of_the_bits(size: int, seed: int) -> None:
    columns = np.random.default_rng(seed).integers(0, 256, (KAPPA, size), dtype=np.uint8)
    bits = np.unpackbits(columns, axis=1, bitorder="little").T
    expected = np.ascontiguousarray(np.packbits(bits, axis=1, bitorder="little")).view("<u8")
    assert np.array_equal(oblivious_transfer.rows(columns), expected)


# -- keys and shares -----------------------------------------------------------------------------


def test_keys_keep_the_order_of_the_scores_and_never_wrap() -> None:
    class Extreme:
        def __init__(self, noise: float) -> None:
            self.noise = noise

        def gumbel(self, size: tuple[int, ...]) -> np.ndarray:
            return np.full(size, self.noise)

        def integers(self, high: int, size: tuple[int, ...]) -> np.ndarray:
            return np.full(size, high - 1)

    similarity = np.array([-1.0, 0.0, 1e-6, 1.0])
    for tau in (1e-4, 1.0, 100.0):
        keys = [shares.integer_keys(similarity, tau, Extreme(n)) for n in (-99, 0, 99)]  # type: ignore[arg-type]
        flat = np.concatenate([k.astype(np.int64) for k in keys])
        gaps = np.diff(keys[1].astype(np.int64))
        assert (gaps >= (0 if tau > 50 else 1)).all()
        assert flat.min() >= 2**31 - 6 * 2**26
        assert flat.max() < 2**32
        assert (keys[0] < keys[1]).all()
        assert (keys[1] < keys[2]).all()


def test_equal_scores_are_chosen_equally_often() -> None:
    rng = np.random.default_rng(0)
    wins = np.zeros(3)
    for _ in range(6000):
        wins[shares.order(shares.integer_keys(np.full(3, 0.5), 1e-4, rng))[0]] += 1
    assert (abs(wins - 2000) < 5 * np.sqrt(6000 * 2 / 9)).all()


def test_not_a_number_has_no_key() -> None:
    with pytest.raises(errors.UpdateError, match="not finite"):
        shares.integer_keys(np.array([np.nan]), 1.0, np.random.default_rng(0))


def test_shares_add_up_and_one_alone_is_uniform() -> None:
    keys = np.arange(10_000, dtype=np.uint32).reshape(2, 5000)
    ours, seed = shares.split(keys, b"p" * 32, os.urandom)
    theirs = shares.share_of(seed, b"p" * 32, keys.size).reshape(keys.shape)
    assert np.array_equal(ours + theirs, keys)
    assert not np.array_equal(theirs, shares.share_of(seed, b"q" * 32, keys.size).reshape(2, -1))
    for share in (ours, theirs):
        counts = np.bincount(share.reshape(-1).view(np.uint8), minlength=256)
        assert ((counts - 156.25) ** 2 / 156.25).sum() < 400
    assert not np.array_equal(*ours - keys)  # text and visual have shares of their own


SELECT = task.Selection(1, 2, 4, 2, 0, 0, "h", bytes(32), bytes(64))


def filled(keys: np.ndarray, keep: int, slots: int, fillers: int) -> list[int]:
    """By counting: how many slots each owner fills, from (owners, groups) keys of one modality."""
    m = keys.shape[1]
    winners = shares.order(keys.reshape(-1))[:keep]
    own = [min(slots, sum(w // m == i for w in winners)) for i in range(len(keys))]
    opened = sum(sum(c > k for c in own) >= fillers for k in range(slots))
    return [min(c, opened) for c in own]


@pytest.mark.parametrize(("owners", "groups"), [(1, 2), (2, 2), (3, 1), (4, 1), (2, 3)])
def test_slots_are_filled_as_counted_on_all_keys(owners: int, groups: int) -> None:
    """Every outcome of two-bit keys; a slot of too few fillers stays closed to all of them."""
    count = owners * groups
    keys = np.array(list(itertools.product(range(3), repeat=count)), np.uint32)
    for chosen, slots in itertools.product(range(1, count + 1), range(1, groups + 1)):
        for fillers in range(1, owners + 1):
            circuit = circuits.fill_slots(owners, groups, chosen, slots, fillers, 2)
            found = circuit.evaluate(*shared(keys, 2)).reshape(owners, slots, -1)
            rows = [filled(k.reshape(owners, -1), chosen, slots, fillers) for k in keys]
            expected = np.array(rows)[:, :, None] > np.arange(slots)  # (batch, owners, slots)
            assert np.array_equal(found.transpose(2, 0, 1), expected)


def shares_of(
    selection: task.Selection, keys: np.ndarray, owners: tuple[str, ...]
) -> dict[str, bytes]:
    """What the outputs of the plain circuit give each owner."""
    work = task.Task(selection, owners)
    words = dict(zip(owners, keys.astype(np.uint32), strict=True))
    inputs = work.inputs(words)
    return work.outcomes(work.circuit.evaluate(inputs, np.zeros_like(inputs)))


@few
@given(st.data())
def test_every_mode_chooses_the_same(data: st.DataObject) -> None:
    """Circuit, opening and the plain sort, over m, s, K, clients, ties and extremes."""
    m, n = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    s, modalities = data.draw(st.integers(1, m)), data.draw(st.integers(1, 2))
    keep = data.draw(st.integers(1, n * m))
    word = st.one_of(st.sampled_from([0, 5, 2**32 - 1]), st.integers(0, 2**32 - 1))
    flat = data.draw(st.lists(word, min_size=n * m * modalities, max_size=n * m * modalities))
    keys = np.array(flat, np.uint32).reshape(n, modalities, m)
    owners = tuple(f"c{i}" for i in range(n))
    client = dataclasses.replace(SELECT, modalities=modalities, groups=m, slots=s)
    client.check(n)
    for name, own in zip(owners, keys, strict=True):
        bits = shares_of(client, keys, owners)[name]
        choice = task.open_outcome(client, bits, bytes(len(bits)), own)
        for found, expected in zip(choice, shares.order(own), strict=True):
            assert np.array_equal(found, expected[:s])
    fillers = data.draw(st.integers(1, n))
    federation = dataclasses.replace(client, scope=2, keep=keep, fillers=fillers)
    federation.check(n)
    outcomes = shares_of(federation, keys, owners)
    for modality in range(modalities):
        counts = filled(keys[:, modality], keep, s, fillers)
        for name, own, count in zip(owners, keys, counts, strict=True):
            choice = task.open_outcome(federation, bytes(len(outcomes[name])), outcomes[name], own)
            assert choice[modality].tolist() == shares.order(own[modality])[:count].tolist()


def test_an_outcome_that_cannot_be_is_refused() -> None:
    keys = np.array([[4, 3, 2, 1], [1, 2, 3, 4]], np.uint32)
    good = shares_of(SELECT, keys[None], ("o",))["o"]
    task.open_outcome(SELECT, good, bytes(2), keys)
    with pytest.raises(errors.FieldError, match="2 expected"):
        task.open_outcome(SELECT, good, bytes(3), keys)
    with pytest.raises(errors.GarblingError, match="not the order"):
        task.open_outcome(SELECT, good, b"\x01\x00", keys)
    with pytest.raises(errors.GarblingError, match="not the order"):
        task.open_outcome(SELECT, good, bytes(2), keys[::-1])
    wide = dataclasses.replace(SELECT, scope=2, keep=4, fillers=1)
    with pytest.raises(errors.GarblingError, match="skips a slot"):
        task.open_outcome(wide, b"\x02", b"\x00", keys)
    with pytest.raises(errors.GarblingError, match="padding"):
        task.open_outcome(dataclasses.replace(wide, modalities=1), b"\x04", b"\x00", keys[:1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"slots": 5}, "5 slots for 4 groups"), ({"slots": 0}, "0 slots"),
        ({"helper": ""}, "without a helper"), ({"scope": 3}, "scope 3"),
        ({"modalities": 3}, "3 modalities"), ({"scope": 2, "keep": 0}, "0 groups to keep"),
        ({"scope": 2, "keep": 1001}, "1001 groups to keep of 1000"), ({"scope": 0}, "without one"),
        ({"groups": 65}, "at most 64"), ({"groups": 64}, "too many to compare"),
        ({"scope": 2, "keep": 1, "fillers": 0}, "0 fillers"),
        ({"scope": 2, "keep": 1, "fillers": 251}, "251 fillers of a slot from 250"),
        ({"scope": 2, "groups": 5, "keep": 1, "fillers": 3}, "1250 groups in one selection"),
    ],
)  # fmt: skip
def test_selections_that_make_no_sense_are_refused(change: dict[str, int], says: str) -> None:
    with pytest.raises(errors.PlanError, match=says):
        dataclasses.replace(SELECT, **change).check(250)  # type: ignore[arg-type]


def test_the_largest_selection_that_is_allowed_fits_a_frame() -> None:
    """In scope client; scope federation is a hundredth of it."""
    for groups in (1, 2, 5, 30):
        for slots in {1, groups}:
            assert circuits.top_s(groups, slots).size <= task.most_bytes(groups)
    assert task.MAX_BYTES < MAX_FRAME * 3 // 4
    assert task.MAX_CANDIDATES * 8_000 < MAX_FRAME // 10
    assert circuits.fill_slots(20, 5, 40, 2, 3).size < 100 * 8_000
