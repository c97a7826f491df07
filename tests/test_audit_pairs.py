"""Two logs of one run whose programs were killed again and again: frames that look alike are matched
so that each connection lost nothing but its end, if that can be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from secure_fedprompt.audit import compare
from secure_fedprompt.audit.findings import Level
from secure_fedprompt.audit.log import Entry

RUN = "ab" * 16
FRAMES = st.lists(st.tuples(st.lists(st.sampled_from("WTP"), max_size=4), st.integers(0, 4)),
                  max_size=6)  # fmt: skip


def entry(
    n: int, way: str, peer: str, kind: str, run: str = RUN, digest: str = "", round: int = 0
) -> Entry:
    return Entry(n, float(n), way, peer, kind, run, round, 10, digest or kind, None)


@given(FRAMES)
def test_a_story_is_found_where_there_is_one(connections: list[tuple[list[str], int]]) -> None:
    sent = [(c, entry(0, "out", "bob", kind)) for c, (kinds, _) in enumerate(connections)
            for kind in kinds]  # fmt: skip
    got = [(0, entry(0, "in", "server", kind)) for kinds, count in connections
           for kind in kinds[:count]]  # fmt: skip
    rows = compare._prefixes(sent, got)
    assert rows is not None
    assert [sent[i][1].kind for i in sorted(rows)] == [e.kind for _, e in got]
    for connection in {c for c, _ in sent}:
        own = [i for i, (c, _) in enumerate(sent) if c == connection]
        arrived = [i in rows for i in own]
        assert arrived == sorted(arrived, reverse=True), "something in the middle is missing"


@given(FRAMES, st.data())
def test_no_story_is_told_of_what_was_not_sent(
    connections: list[tuple[list[str], int]], data: Any
) -> None:
    """Held against all stories: every number of frames of every connection."""
    sent = [(c, entry(0, "out", "bob", kind)) for c, (kinds, _) in enumerate(connections[:4])
            for kind in kinds]  # fmt: skip
    heard = data.draw(st.lists(st.sampled_from("WTP"), max_size=6))
    stories = [[]]
    for kinds, _ in connections[:4]:
        stories = [s + kinds[:n] for s in stories for n in range(len(kinds) + 1)]
    found = compare._prefixes(sent, [(0, entry(0, "in", "server", kind)) for kind in heard])
    assert (found is not None) is (heard in stories)


def log(name: str, role: str, entries: list[Entry]) -> Any:
    return SimpleNamespace(name=name, role=role, entries=entries)


def levels(server: list[Entry], bob: list[Entry]) -> set[Level]:
    ends = log("server", "server", server), log("bob", "client", bob)
    both = [*compare._cross_check(*ends, RUN), *compare._cross_check(*reversed(ends), RUN)]
    return {finding.level for finding in both}


def test_a_server_that_is_killed_after_its_greeting_hides_nothing() -> None:
    """Bob greets three times in the same words: the first welcome is lost, with the server."""
    server = [entry(1, "in", "bob", "Hello", ""), entry(2, "out", "bob", "Welcome"),
              entry(3, "in", "bob", "Hello", ""), entry(4, "out", "bob", "Welcome"),
              entry(5, "out", "bob", "Terms"), entry(6, "in", "bob", "Hello", ""),
              entry(7, "out", "bob", "Welcome"), entry(8, "out", "bob", "Terms")]  # fmt: skip
    bob = [entry(1, "out", "server", "Hello", ""), entry(2, "out", "server", "Hello", ""),
           entry(3, "in", "server", "Welcome"), entry(4, "out", "server", "Hello", ""),
           entry(5, "in", "server", "Welcome"), entry(6, "in", "server", "Terms")]  # fmt: skip
    assert levels(server, bob) == {Level.WARN}
    assert levels(server, bob[:2] + bob[3:]) == {Level.WARN}  # another one may be lost as well
    assert Level.FAIL in levels(server, [e for e in bob if e.n not in (3, 5)])  # Terms, unwelcome
    assert Level.FAIL in levels(server, [e for e in bob if e.n != 4])  # a Hello that bob hides


def test_the_next_plan_does_not_wait_for_a_signed_head() -> None:
    """It crossed bob's head of round 1; then the server was killed. An upload is waited for."""
    for kind, expected in (("LogHead", {Level.WARN}), ("MaskedUpload", {Level.FAIL})):
        server = [entry(1, "in", "bob", "Hello", ""), entry(2, "out", "bob", "RoundEnd", round=1),
                  entry(3, "out", "bob", "Plan", round=2)]  # fmt: skip
        bob = [entry(1, "out", "server", "Hello", ""),
               entry(2, "in", "server", "RoundEnd", round=1),
               entry(3, "out", "server", kind, round=1),
               entry(4, "in", "server", "Plan", round=2)]  # fmt: skip
        assert levels(server, bob) == expected
        later = entry(4, "out", "bob", "Plan", round=3), entry(5, "in", "server", "Plan", round=3)
        assert levels([*server, later[0]], [*bob, later[1]]) == {Level.FAIL}  # nor for two
