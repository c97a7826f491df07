"""Circuits, garbling and oblivious transfer, each against a slow reference, and what they refuse."""

from __future__ import annotations

import dataclasses
import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import entropy_from
from selecting import bits_of, shared

from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol.selection import circuits, garbled
from secure_fedprompt.protocol.selection.builder import FALSE, TRUE, Builder, Circuit
from secure_fedprompt.protocol.selection.parties import Evaluator, Frame, Garbler, together

few = settings(max_examples=25, deadline=None)


def best(keys: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-keys.astype(np.int64), axis=1, kind="stable")[:, :count]


# -- circuits in the clear -----------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
def test_compare_on_all_words(width: int) -> None:
    x, y = (v.reshape(-1, 1) for v in np.mgrid[: 1 << width, : 1 << width])
    found = circuits.compare(width).evaluate(bits_of(x, width), bits_of(y, width))
    assert np.array_equal(found[0], (x > y)[:, 0])


@pytest.mark.parametrize(("count", "width"), [(1, 2), (2, 2), (3, 2), (4, 2), (3, 3)])
def test_choices_on_all_keys(count: int, width: int) -> None:
    keys = np.array(list(itertools.product(range(1 << width), repeat=count)))
    given_ = shared(keys, width)
    for chosen in range(1, count + 1):
        order = best(keys, chosen)
        top = circuits.top_s(count, chosen, width).evaluate(*given_).reshape(chosen, count, -1)
        assert np.array_equal(top.sum(1), np.ones((chosen, len(keys))))
        assert np.array_equal(top.argmax(1).T, order)
        expected = np.zeros((len(keys), count), bool)
        np.put_along_axis(expected, order, True, axis=1)
        found = circuits.largest_k(count, chosen, width).evaluate(*given_).T
        assert np.array_equal(found, expected)
    first = circuits.argmax(count, width).evaluate(*given_)
    assert np.array_equal(first.sum(0), np.ones(len(keys)))
    assert np.array_equal(first.argmax(0), best(keys, 1)[:, 0])


@few
@given(st.data(), st.integers(1, 9))
def test_choices_on_words_with_ties_and_extremes(data: st.DataObject, count: int) -> None:
    word = st.one_of(
        st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1)
    )
    row = st.lists(word, min_size=count, max_size=count)
    keys = np.array(data.draw(st.lists(row, min_size=1, max_size=4)), np.int64)
    chosen = data.draw(st.integers(1, count))
    given_, order = shared(keys, 32), best(keys, chosen)
    top = circuits.top_s(count, chosen).evaluate(*given_).reshape(chosen, count, -1)
    assert np.array_equal(top.argmax(1).T, order)
    found = circuits.largest_k(count, chosen).evaluate(*given_).T
    assert found.sum() == chosen * len(keys)
    assert np.take_along_axis(found, order, axis=1).all()
    assert np.array_equal(circuits.argmax(count).evaluate(*given_).argmax(0), order[:, 0])


def test_more_than_there_are_cannot_be_chosen() -> None:
    for make in (circuits.top_s, circuits.largest_k):
        for chosen in (0, 4):
            with pytest.raises(errors.PlanError, match=f"{chosen} to be chosen of 3 keys"):
                make(3, chosen)


@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_counts_start_anywhere(start: int) -> None:
    builder = Builder(6, 0)
    wires, _ = builder.inputs()
    word = builder.count(wires, start)
    inputs = bits_of(np.arange(64).reshape(-1, 1), 6)
    found = builder.circuit("count", word).evaluate(inputs, np.zeros((0, 64), bool))
    values = (found * (1 << np.arange(len(found)))[:, None]).sum(0)
    assert np.array_equal(values, start + inputs.sum(0))


def test_costs_are_those_of_the_design() -> None:
    assert circuits.compare().ands == 32
    assert circuits.compare().size <= 1600
    assert str(circuits.top_s(5, 2)) == "top 2 of 5: 510 AND gates in 35 layers, 19040 bytes"
    assert 2 * circuits.fill_slots(10, 5, 20, 2, 3).size < 1_000_000  # text and visual


# -- garbled evaluation --------------------------------------------------------------------------


@st.composite
def random_circuits(draw: st.DrawFn) -> Circuit:
    """Any gates over any wires; every wire is an output, plain and inverted."""
    builder = Builder(draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    wires = [*builder.inputs()[0], *builder.inputs()[1], FALSE, TRUE]
    for _ in range(draw(st.integers(0, 25))):
        a, b = (draw(st.sampled_from(wires)) ^ draw(st.integers(0, 1)) for _ in range(2))
        wires.append(builder.land(a, b) if draw(st.booleans()) else builder.xor(a, b))
    return builder.circuit("random", [*wires, *(w ^ 1 for w in wires)])


@settings(max_examples=40, deadline=None)
@given(random_circuits(), st.integers(1, 5), st.integers(0, 2**32))
def test_garbled_circuits_agree_with_booleans_at_every_gate(
    circuit: Circuit, batch: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ours = rng.random((circuit.garbler_bits, batch)) < 0.5
    theirs = rng.random((circuit.evaluator_bits, batch)) < 0.5
    read = entropy_from(str(seed))
    delta = np.frombuffer(read(16), "<u8").copy()
    delta[0] |= 1
    size = circuit.garbler_bits + circuit.evaluator_bits
    zeros = np.frombuffer(read(size * batch * 16), "<u8").reshape(size, batch, 2)
    hash_ = garbled.Hash(bytes(32))
    tables, checks, decode = garbled.garble(circuit, hash_, 3, delta, zeros)
    active = zeros ^ (np.concatenate([ours, theirs])[..., None] * delta)
    colours = garbled.evaluate(circuit, hash_, 3, tables, checks, active)
    assert np.array_equal(colours ^ decode, circuit.evaluate(ours, theirs))
    assert np.array_equal(circuit.evaluate(ours, theirs)[len(colours) // 2 :],
                          ~circuit.evaluate(ours, theirs)[: len(colours) // 2])  # fmt: skip


def slow_gate(hash_: garbled.Hash, delta: np.ndarray, a0: np.ndarray, b0: np.ndarray,
              first: int, execution: int) -> tuple[list[bytes], bytes]:  # fmt: skip
    """One half-gates AND as in the paper (Zahur, Rosulek and Evans 2015, Figure 2)."""

    def h(label: np.ndarray, gate: int) -> np.ndarray:
        return hash_(label.reshape(1, 1, 2), np.array([[[gate, execution]]], np.uint64))[0, 0]

    zero = np.zeros(2, np.uint64)
    pa, pb = int(a0[0] & np.uint64(1)), int(b0[0] & np.uint64(1))
    tg = h(a0, first) ^ h(a0 ^ delta, first) ^ (delta if pb else zero)
    wg = h(a0, first) ^ (tg if pa else zero)
    te = h(b0, first + 1) ^ h(b0 ^ delta, first + 1) ^ a0
    we = h(b0, first + 1) ^ (te ^ a0 if pb else zero)
    return [tg.tobytes(), te.tobytes()], (wg ^ we).tobytes()


def test_tables_are_those_of_the_paper_gate_by_gate() -> None:
    builder = Builder(1, 2)
    (a,), (b, c) = builder.inputs()
    circuit = builder.circuit("two gates", [builder.land(builder.land(a, b), c)])
    rng = np.random.default_rng(0)
    zeros = rng.integers(0, 2**63, (3, 2, 2)).astype(np.uint64)
    delta = rng.integers(0, 2**63, 2).astype(np.uint64) | np.array([1, 0], np.uint64)
    hash_ = garbled.Hash(b"s" * 32)
    tables, _, _ = garbled.garble(circuit, hash_, 7, delta, zeros)
    rows = np.frombuffer(tables, "V16").reshape(2, 2, 2)  # gate, half, batch
    for k in range(2):
        expected, label = slow_gate(hash_, delta, zeros[0, k], zeros[1, k], 2 * k, 7)
        assert [r.tobytes() for r in rows[0, :, k]] == expected
        inner = np.frombuffer(label, "<u8")
        expected, _ = slow_gate(hash_, delta, inner, zeros[2, k], 4 + 2 * k, 7)
        assert [r.tobytes() for r in rows[1, :, k]] == expected


def test_the_hash_is_that_of_the_paper() -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    from secure_fedprompt.protocol.expand import Purpose, digest

    def pi(block: bytes) -> bytes:
        key = algorithms.AES128(digest(Purpose.GARBLING, b"x" * 32)[:16])
        return Cipher(key, modes.ECB()).encryptor().update(block)

    def xor(a: bytes, b: bytes) -> bytes:
        return bytes(i ^ j for i, j in zip(a, b, strict=True))

    x, i = bytes(range(16)), (5).to_bytes(8, "little") + (9).to_bytes(8, "little")
    label, tweak = (np.frombuffer(v, "<u8").reshape(1, 2) for v in (x, i))
    found = garbled.Hash(b"x" * 32)(label.astype(np.uint64), tweak.astype(np.uint64))
    assert found.tobytes() == xor(pi(xor(pi(x), i)), pi(x))


@few
@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_two_parties_find_what_one_would(count: int, batch: int, data: st.DataObject) -> None:
    keys = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2**32, (batch, count))
    chosen = data.draw(st.integers(1, count))
    for circuit in (circuits.top_s(count, chosen), circuits.largest_k(count, chosen)):
        inputs = shared(keys, 32)
        found = together(circuit, *inputs, os.urandom)
        assert np.array_equal(found, circuit.evaluate(*inputs))


def pair(seed: str = "", circuit: Circuit | None = None) -> tuple[Garbler, Evaluator]:
    one, other = (
        kind(b"s" * 32, entropy_from(kind.__name__ + seed)) for kind in (Garbler, Evaluator)
    )
    other.accept(one.answer(other.offer()))  # type: ignore[attr-defined]
    return one, other  # type: ignore[return-value]


def test_several_executions_share_a_session_and_no_tweak(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    plain = garbled.Hash.__call__

    def spy(self: garbled.Hash, labels: np.ndarray, tweaks: np.ndarray) -> np.ndarray:
        if labels.ndim == 4 or (labels.ndim == 3 and tweaks.ndim == 2):  # garbler's gates, checks
            seen.extend(map(tuple, tweaks.reshape(-1, 2).tolist()))
        return plain(self, labels, tweaks)

    one, other = pair()
    circuit = circuits.top_s(3, 2)
    inputs = shared(np.array([[3, 1, 2], [7, 7, 9]]), 32)
    monkeypatch.setattr(garbled.Hash, "__call__", spy)
    frames = []
    for _ in range(2):
        frame, ours = one.garble(circuit, inputs[0], other.choose(circuit, inputs[1]))
        frames.append(frame)
        monkeypatch.setattr(garbled.Hash, "__call__", plain)
        assert np.array_equal(ours ^ other.evaluate(frame), circuit.evaluate(*inputs))
        monkeypatch.setattr(garbled.Hash, "__call__", spy)
    assert len(seen) == len(set(seen)) == 2 * 2 * (2 * circuit.ands + len(circuit.outputs))
    assert frames[0].seed != frames[1].seed
    first, second = (np.frombuffer(f.tables, "V16") for f in frames)
    assert not set(first.tolist()) & set(second.tolist())


def test_the_evaluator_never_holds_both_labels_of_a_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[np.ndarray] = []
    plain = garbled.Labelling.outputs

    def spy(self: garbled.Labelling) -> np.ndarray:
        held.append(self.labels)
        return plain(self)

    one, other = pair()
    circuit = circuits.largest_k(6, 2)
    inputs = shared(np.arange(12).reshape(2, 6), 32)
    frame, _ = one.garble(circuit, inputs[0], other.choose(circuit, inputs[1]))
    monkeypatch.setattr(garbled.Labelling, "outputs", spy)
    other.evaluate(frame)
    rows = {label.tobytes() for label in held[0].reshape(-1, 2)}
    for data in (frame.tables, frame.checks, frame.seed):  # aligned, as they are used
        rows |= {bytes(data[i : i + 16]) for i in range(0, len(data) - 15, 16)}
    offset = one._delta
    assert offset.tobytes() not in rows
    others = {(np.frombuffer(row, "<u8") ^ offset).tobytes() for row in rows}
    assert not rows & others


# -- what is refused -----------------------------------------------------------------------------


def test_altered_swapped_and_cut_tables_are_refused() -> None:
    one, other = pair()
    circuit = circuits.compare(8)
    ours, theirs = bits_of(np.array([[200], [3]]), 8), bits_of(np.array([[100], [3]]), 8)
    choices = other.choose(circuit, theirs)
    frame, _ = one.garble(circuit, ours, choices)
    tables = bytes(frame.tables)
    rng, caught, tries = np.random.default_rng(0), 0, 64
    for _ in range(tries):
        at = int(rng.integers(len(tables)))
        altered = tables[:at] + bytes([tables[at] ^ 1]) + tables[at + 1 :]
        try:
            other.evaluate(dataclasses.replace(frame, tables=altered))
        except errors.GarblingError:
            caught += 1
        else:  # the row was not one of those in use; the evaluation is over, so start anew
            one, other = pair()
            frame, _ = one.garble(circuit, ours, other.choose(circuit, theirs))
            tables = bytes(frame.tables)
    assert caught > tries // 8
    gate = 2 * 2 * 16
    swapped = tables[gate : 2 * gate] + tables[:gate] + tables[2 * gate :]
    with pytest.raises(errors.GarblingError, match="altered"):
        other.evaluate(dataclasses.replace(frame, tables=swapped))
    with pytest.raises(errors.GarblingError, match="do not fit"):
        other.evaluate(dataclasses.replace(frame, tables=tables[:-16]))
    with pytest.raises(errors.GarblingError, match="altered"):
        other.evaluate(dataclasses.replace(frame, seed=bytes(32)))
    other.evaluate(frame)  # nothing was lost
    with pytest.raises(errors.TweakError, match="execution 0, this is 1"):
        other.evaluate(frame)


def test_frames_of_another_session_or_moment_are_refused() -> None:
    one, other = pair()
    circuit = circuits.compare(4)
    zero = np.zeros((4, 1), bool)
    choices = other.choose(circuit, zero)
    with pytest.raises(errors.SessionError, match="Choices of session"):
        one.garble(circuit, zero, dataclasses.replace(choices, session=bytes(32)))
    with pytest.raises(errors.TweakError):
        one.garble(circuit, zero, dataclasses.replace(choices, execution=1))
    with pytest.raises(errors.FieldError, match="bytes of columns"):
        one.garble(circuit, zero, dataclasses.replace(choices, columns=b""))
    with pytest.raises(errors.FieldError, match="inputs of shape"):
        one.garble(circuit, zero[:3], choices)


def test_session_set_up_happens_once() -> None:
    one, other = pair()
    with pytest.raises(errors.SelectionError, match="second offer"):
        one.answer(other.offer())
    fresh = Garbler(b"s" * 32, os.urandom)
    with pytest.raises(errors.SelectionError, match="second answer"):
        other.accept(fresh.answer(other.offer()))
    with pytest.raises(errors.SelectionError, match="no execution"):
        other.evaluate(dataclasses.replace(
            another_frame(), session=b"s" * 32))  # fmt: skip
    with pytest.raises(errors.SelectionError, match="no base transfers"):
        Evaluator(b"s" * 32, os.urandom).choose(circuits.compare(1), np.zeros((1, 1), bool))
    with pytest.raises(errors.SessionError):
        Garbler(b"t" * 32, os.urandom).answer(other.offer())


def another_frame() -> Frame:
    one, other = pair("another")
    circuit, zero = circuits.compare(1), np.zeros((1, 1), bool)
    return one.garble(circuit, zero, other.choose(circuit, zero))[0]


def test_tables_of_another_pair_of_parties_are_refused() -> None:
    _, other = pair()
    circuit, zero = circuits.compare(1), np.zeros((1, 1), bool)
    other.choose(circuit, zero)
    with pytest.raises(errors.GarblingError):
        other.evaluate(another_frame())  # type: ignore[arg-type]
