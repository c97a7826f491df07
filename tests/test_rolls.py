"""Lists of names and trees over them: one encoding, and no proof of what is not there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import make_plan

from secure_fedprompt.protocol import codec, masking, merkle, rolls
from secure_fedprompt.protocol.errors import AdvertMismatchError, FieldError, TooLargeError
from secure_fedprompt.protocol.expand import Purpose, derive, keystream

printable = st.characters(min_codepoint=0x21, max_codepoint=0x7E)
name = st.text(printable, min_size=1, max_size=64) | st.text("ab.", min_size=1, max_size=6)


@given(st.sets(name, max_size=40))
def test_a_roll_comes_back(names: set[str]) -> None:
    ordered = tuple(sorted(names))
    data = rolls.pack(ordered)
    assert rolls.unpack(data) == ordered
    assert rolls.unpack.__wrapped__(data) == ordered
    assert all(len(one) <= rolls.LONGEST for one in (rolls.pack((n,)) for n in ordered))


@given(st.binary(max_size=60))
def test_bytes_are_one_roll_or_none(data: bytes) -> None:
    try:
        names = rolls.unpack(data)
    except FieldError:
        return
    assert rolls.pack(names) == data
    assert list(names) == sorted(set(names))


@given(st.lists(name, min_size=1, max_size=10), st.data())
def test_altered_rolls_are_others_or_none(names: list[str], data: st.DataObject) -> None:
    ordered = tuple(sorted(set(names)))
    raw = bytearray(rolls.pack(ordered))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert rolls.unpack(bytes(raw)) != ordered
    except FieldError:
        pass


@pytest.mark.parametrize(
    "names", [("b", "a"), ("a", "a"), ("",), ("a b",), ("ä",), ("x" * 65,), ("a\n",)]
)
def test_what_is_no_roll_is_not_sent(names: tuple[str, ...]) -> None:
    with pytest.raises(FieldError, match="no name, doubled, or not in order"):
        rolls.pack(names)


@pytest.mark.parametrize(
    "data",
    [b"a", b"\0", b"\0a", b"\0\xe1\0\xe1", b"\0\xe2\0\xe1", b"\1\xe1", b"\0a\xe2\1\xe2",
     b"\0\xe1\0\xe2x", b"\0" + b"a" * 64 + b"\xe1", b"\0\xe1\x01\xe1\x01\xe1"],
)  # fmt: skip
def test_what_is_no_roll_is_not_taken(data: bytes) -> None:
    with pytest.raises(FieldError):
        rolls.unpack(data)


@pytest.mark.parametrize("byte", [b"0", b"a", b"\0", b"\xe1", b"\0a"])
def test_a_megabyte_of_nonsense_is_refused_in_one_pass(byte: bytes) -> None:
    with pytest.raises(FieldError):  # looking for an end from each byte would take hours
        rolls.unpack(byte * (1 << 20))


def test_a_roll_that_is_too_long_is_counted_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, read = codec._roll("names", 2)
    data = rolls.pack(("a", "b", "c"))
    monkeypatch.setattr(rolls, "unpack", lambda *_: 1 / 0)
    with pytest.raises(TooLargeError, match="3 names, at most 2"):
        read(codec.Cursor(len(data).to_bytes(4, "little") + data))


def test_numbered_names_take_little_more_than_two_bytes() -> None:
    assert len(rolls.pack(tuple(f"c{i:04d}" for i in range(10_000)))) < 21_200


# -- trees -----------------------------------------------------------------------------------------


def reference(leaves: list[bytes]) -> bytes:
    """The root, level by level."""
    if len(leaves) == 1:
        return leaves[0]
    paired = [
        merkle._node(*leaves[i : i + 2]) if i + 1 < len(leaves) else leaves[i]
        for i in range(0, len(leaves), 2)
    ]
    return reference(paired)


def leaves_of(count: int) -> list[bytes]:
    return [merkle.leaf(bytes([i])) if i % 3 else merkle.ABSENT for i in range(count)]


@given(st.integers(1, 70), st.data())
@settings(max_examples=60)
def test_some_leaves_and_a_proof_give_the_root(count: int, data: st.DataObject) -> None:
    leaves = leaves_of(count)
    tree = merkle.Tree(leaves)
    assert tree.root == reference(leaves)
    places = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    proof, known = tree.proof(places), {i: leaves[i] for i in places}
    assert merkle.fold(count, known, proof) == tree.root
    for spoiled in (proof[:-1], (*proof, bytes(32))):
        if spoiled != proof:
            with pytest.raises(AdvertMismatchError, match="do not prove"):
                merkle.fold(count, known, spoiled)
    other = data.draw(st.sampled_from(sorted(places)))
    for lie in (merkle.leaf(b"another"), merkle.ABSENT):
        if lie != leaves[other]:
            assert merkle.fold(count, {**known, other: lie}, proof) != tree.root


def test_nothing_else_is_an_absent_leaf() -> None:
    assert merkle.leaf(b"") != merkle.ABSENT
    assert merkle._node(merkle.ABSENT, merkle.ABSENT) not in (merkle.ABSENT, merkle.leaf(b""))


@pytest.mark.parametrize("place", [0, 7, 1021])
def test_neighbours_share_their_path(place: int) -> None:
    tree = merkle.Tree(leaves_of(200) * 5 + leaves_of(24))
    run = [(place + step) % 1024 for step in range(53)]
    assert len(tree.proof(run)) <= 2 * 10 + 2


# -- graphs ----------------------------------------------------------------------------------------


def test_a_graph_is_a_ring_over_the_order_of_its_stream() -> None:
    plan = make_plan(41, degree=12, graph_seed=b"\7" * 32, quorum=28, threshold=8)
    stream = keystream(derive(plan.graph_seed, Purpose.GRAPH, plan.run), 16 * 41)
    order = sorted(range(41), key=lambda i: (stream[16 * i : 16 * i + 16], i))
    graph = masking.neighbourhoods(plan)
    assert graph.ring == tuple(plan.cohort[i] for i in order)
    for place, client in enumerate(order):
        one = plan.cohort[client]
        assert graph.place(one) == place
        near = sorted(plan.cohort[order[(place + s) % 41]] for s in range(-6, 7))
        assert graph[one] == tuple(near)
        assert np.array_equal(
            sorted(map(graph.place, near)), sorted((place + s) % 41 for s in range(-6, 7))
        )
    assert "zed" not in graph
    assert masking.neighbourhoods(make_plan(3))["c002"] == ("c001", "c002", "c003")
