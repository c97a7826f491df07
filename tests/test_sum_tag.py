"""Tags of sums: exact against Python's integers, linear, and not forged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_fedprompt.protocol import mersenne, sum_tag
from secure_fedprompt.protocol.errors import FieldError
from secure_fedprompt.protocol.expand import Purpose, derive, keystream
from secure_fedprompt.protocol.mersenne import P
from secure_fedprompt.protocol.sum_tag import TAGS, TagKey

K, PLAN = b"k" * 32, b"p" * 32
COHORT = ("a", "alice", "b", "c", "d")
EDGES = [0, 1, 2, (1 << 30) - 1, 1 << 31, (1 << 60) - 1, 1 << 60, P - 2, P - 1]
element = st.sampled_from(EDGES) | st.integers(0, P - 1)


def array(*values: int) -> mersenne.Elements:
    return np.array(values, np.uint64)


@settings(deadline=None)
@given(element, element, st.integers(1, 60), st.integers(0, (1 << 64) - 1))
def test_field_arithmetic_is_that_of_integers(x: int, y: int, places: int, any_word: int) -> None:
    a, b = array(x), array(y)
    assert int(mersenne.add(a, b)[0]) == (x + y) % P
    assert int(mersenne.multiply(a, b)[0]) == x * y % P
    assert int(mersenne.rotated(a, places)[0]) == (x << places) % P
    assert int(mersenne.reduced(array(any_word))[0]) == any_word % P
    assert int(mersenne.signed(np.array([-x]))[0]) == -x % P


@settings(deadline=None)
@given(st.lists(element, min_size=1, max_size=40), st.binary(min_size=16, max_size=16))
def test_sums_and_drawn_elements(values: list[int], data: bytes) -> None:
    assert int(mersenne.total(array(*values))) == sum(values) % P
    many = np.full((5000, 2), P - 1, np.uint64)
    assert mersenne.total(many).tolist() == [5000 * (P - 1) % P] * 2
    assert int(mersenne.elements(data)[0]) == int.from_bytes(data, "little") % P


def reference(secret: bytes, plan: bytes, name: str, integers: list[int]) -> list[int]:
    """t_k as it is written down, with Python's integers."""
    m = sum_tag.width(len(integers))
    rows = -(-len(integers) // m)
    stream = keystream(derive(secret, Purpose.SUM_TAG, plan), 16 * TAGS * (m + rows))
    drawn = [int.from_bytes(stream[i : i + 16], "little") % P for i in range(0, len(stream), 16)]
    stream = keystream(derive(secret, Purpose.SUM_TAG_OFFSET, plan), 16 * TAGS * len(COHORT))
    own = stream[16 * TAGS * COHORT.index(name) :]
    found = []
    for k in range(TAGS):
        a, b = drawn[k : TAGS * m : TAGS], drawn[TAGS * m + k :: TAGS]
        tag = int.from_bytes(own[16 * k : 16 * k + 16], "little")
        for i, x in enumerate(integers):
            tag += b[i // m] * x * a[i % m]
        found.append(tag % P)
    return found


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_tags_are_those_of_the_reference(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 300))
    edge = st.sampled_from([0, 1, -1, (1 << 31) - 1, -(1 << 31)])
    values = data.draw(st.lists(edge | st.integers(-(1 << 31), (1 << 31) - 1), min_size=size,
                                max_size=size))  # fmt: skip
    key = TagKey.of(K, PLAN, size, COHORT)
    tag = key.tag("alice", np.array(values, np.int64))
    assert tag.tolist() == reference(K, PLAN, "alice", values)


@pytest.mark.parametrize("worst", [(1 << 31) - 1, -(1 << 31)])
def test_the_largest_integers_stay_exact_at_the_widest_row(worst: int) -> None:
    """1,024 values of 31 bits in each row: where 64 bits have the least room."""
    size = 1 << 24
    assert sum_tag.width(size) == 1024
    key = TagKey.of(K, PLAN, size, COHORT)
    limb = (1 << 21) - 1
    key = TagKey(np.full_like(key.across, limb), key.down, np.zeros((0, 2), np.uint64), {})
    found = key.linear(np.full(size, worst, np.int64))
    a = sum(limb << 21 * i for i in range(3)) % P
    down = [sum(int(x) for x in key.down[:, k]) for k in range(TAGS)]
    assert found.tolist() == [d * a * 1024 * worst % P for d in down]


def sent(seed: int, names: str, size: int = 100) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.integers(-(1 << 20), 1 << 20, size) for n in names}


def test_a_sum_has_the_sum_of_its_members_tags_and_nothing_else_has_it() -> None:
    key, uploads = TagKey.of(K, PLAN, 100, COHORT), sent(0, "abcd")
    tag = mersenne.total(np.stack([key.tag(n, x) for n, x in uploads.items()]))
    total = np.sum(list(uploads.values()), 0)
    assert key.holds("abcd", total, tag)
    moved = total.copy()
    moved[17] += 1
    without = total - uploads["d"]
    for members, integers, what in (
        ("abcd", moved, "one value"),
        ("abcd", uploads["a"], "a single upload"),
        ("abcd", without, "a subset under the full list"),
        ("abc", total, "another list"),
        ("abc", without, "a subset under its own list"),
        ("abcd", -total, "the opposite"),
        ("abcdd", total, "a member twice"),
        ("abcx", total, "a stranger"),
        ("abcd", total[:-1], "a part"),
        ("abcd", total * 4096, "too large"),
    ):
        assert not key.holds(members, integers, tag), what
    one = key.tag("d", uploads["d"])
    assert key.holds("abc", without, mersenne.add(tag, np.uint64(P) - one))  # who has the tag
    doubled = mersenne.add(tag, one), total + uploads["d"]  # linear as well, and no sum of members
    assert not key.holds("abcdd", doubled[1], doubled[0])
    for other in (TagKey.of(K, b"q" * 32, 100, COHORT), TagKey.of(b"l" * 32, PLAN, 100, COHORT)):
        assert not other.holds("abcd", total, tag)
    for k in range(TAGS):  # both count
        wrong = tag.copy()
        wrong[k] ^= np.uint64(1)
        assert not key.holds("abcd", total, mersenne.reduced(wrong))


def test_a_tag_says_nothing_without_its_offset() -> None:
    """Equal uploads of two members, and of one in two rounds, have unrelated tags."""
    upload = sent(0, "a")["a"]
    keys = [TagKey.of(K, bytes((i,)) * 32, 100, COHORT) for i in range(200)]
    tags = np.array([k.tag(n, upload) for k in keys for n in "ab"], np.float64) / P
    assert len(np.unique(tags)) == tags.size
    assert abs(tags.mean() - 0.5) < 0.05
    assert abs(tags.std() - 12**-0.5) < 0.02


def test_tags_on_the_wire() -> None:
    key = TagKey.of(K, PLAN, 5, COHORT)
    tag = key.tag("a", np.arange(5))
    assert sum_tag.from_bytes(sum_tag.to_bytes(tag)).tolist() == tag.tolist()
    for data in (b"", bytes(15), bytes(17), P.to_bytes(8, "little") + bytes(8), b"\xff" * 16):
        with pytest.raises(FieldError):
            sum_tag.from_bytes(data)
    assert "private" in repr(key)
    assert str(int(key.down[0, 0])) not in repr(key)


def test_what_cannot_be_a_sum_is_refused() -> None:
    key = TagKey.of(K, PLAN, 4, COHORT)
    with pytest.raises(FieldError, match="5 integers, the key is for 4"):
        key.linear(np.zeros(5, np.int64))
    with pytest.raises(FieldError, match="beyond 31 bits"):
        key.linear(np.array([1 << 32, 0, 0, 0]))
