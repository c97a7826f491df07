"""How much a peer may send: honest ones never notice, floods end at once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from federation import World
from rounds import make_encrypted_plan, make_plan, names
from selecting import SECURE, Grouped

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import MAX_FRAME
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.quota import RATE, RECORD, Quota, need

BURST = 12_000
SETTINGS: dict[str, dict[str, Any]] = {
    "masks": {},
    "none": {"protection": "none"},
    "bfv": {"protection": "bfv"},
    "ckks": {"protection": "ckks"},
    "selection": SECURE,
    "selection in the federation": {**SECURE, "selection_scope": "federation"},
}


class Metered(World):
    """A world whose ends count what comes, with little to spare.

    Attributes:
        spent: in all, by receiving and sending end.
    """

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.quotas: dict[tuple[str, str], Quota] = {}
        self.spent = Counter[tuple[str, str]]()
        super().__init__(folder, **changes)

    def quota(self, at: str, peer: str) -> Quota:
        return self.quotas.setdefault((at, peer), Quota(BURST, self.clock))

    def tap(self, sender: str, recipient: str, frame: Any) -> Any:
        kept = super().tap(sender, recipient, frame)
        if kept is not None:
            self.quota(sender, recipient).said(kept.message)
            taken = self.quota(recipient, sender)
            size = len(kept.data) + RECORD
            assert taken.spend(size, self.clock), f"{sender or 'server'}: {kept.message}"
            taken.came(kept.message, kept.data)
            self.spent[recipient, sender] += size
        return kept


@pytest.mark.parametrize("kind", SETTINGS)
def test_honest_ends_stay_within_it(tmp_path: Path, kind: str) -> None:
    world = Metered(tmp_path, **{**SETTINGS[kind], "rounds": 12})
    if world.settings.selection == "secure":
        world.toys = {name: Grouped(i) for i, name in enumerate(names(4))}
    for name in names(4):
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert max(world.spent.values()) > 1.5 * BURST  # or it would show nothing


def test_it_grows_with_what_is_sent_and_no_faster() -> None:
    """An upload of 100,000 values takes 400 kB under masks, and a sum of ciphertexts 4 MB."""
    tensors = (TensorSpec("ctx", (100_000,)),)
    assert 800_000 < need(make_plan(10, tensors=tensors)) < 1_800_000
    assert 800_000 < need(make_plan(400, tensors=tensors)) < 3_500_000
    assert 4_000_000 < need(make_encrypted_plan(10, "bfv", tensors=tensors)) < 10_000_000
    granted = 15_100 * 100  # bytes of a cohort key for a hundred, measured
    assert need(make_encrypted_plan(100, "bfv")) > 2 * granted


def test_a_flood_ends_and_time_gives_little_back() -> None:
    quota, alive = Quota(BURST, 0.0), RECORD + 20
    sent = 0
    while quota.spend(alive, 1.0):
        sent += 1
    assert sent <= (BURST + RATE) // alive
    assert not quota.spend(alive, 1.1)
    assert quota.spend(alive, 1.5)
    assert quota.spend(BURST, 1e9)
    assert not quota.spend(BURST, 1e9)  # at rest it does not grow beyond what is spent at once
    assert not quota.spend(1, 0.0)  # nor by a clock that is set back


def test_what_the_peer_says_gives_it_nothing() -> None:
    quota, plan = Quota(BURST, 0.0), make_plan(4)
    assert quota.spend(BURST, 0.0)
    for number in range(1, 50):
        frame = m.Plan(dataclasses.replace(plan, round=number), b"")
        quota.came(frame, m.CATALOGUE.encode(frame))
        assert not quota.spend(1, 0.0)
        quota.said(m.LogHead(plan.run, number, 1, bytes(32), bytes(64)))  # follows each RoundEnd
        assert not quota.spend(1, 0.0)
    quota.said(m.Withdraw(plan.run, 5, "PolicyError", ""))
    assert quota.spend(need(plan), 0.0)
    for number in (5, 4, 1):  # once for each round, in order
        quota.said(m.Withdraw(plan.run, number, "PolicyError", ""))
        assert not quota.spend(1, 0.0)


def test_terms_that_every_connection_brings_are_counted_once() -> None:
    quota, terms = Quota(BURST, 0.0), m.Terms.__new__(m.Terms)
    frame = bytes(BURST // 4)
    for _ in range(20):
        assert quota.spend(len(frame), 0.0)
        quota.came(terms, frame)
    taken = 0
    while quota.spend(len(frame), 0.0):  # others are not
        taken += 1
        quota.came(terms, frame[:-1] + bytes((taken,)))
    assert taken == 3


def test_what_earlier_rounds_left_does_not_pile_up() -> None:
    quota, plan = Quota(BURST, 0.0), make_plan(4)
    for number in range(1, 100):
        quota.said(m.Plan(dataclasses.replace(plan, round=number), b""))
    assert not quota.spend(BURST + 2 * need(plan) + 1, 0.0)
    assert quota.spend(BURST + 2 * need(plan), 0.0)


def test_who_is_asked_for_the_start_may_send_one() -> None:
    quota = Quota(BURST, 0.0)
    quota.said(m.Welcome(bytes(16), bytes(32), (), b"{}", 0))
    assert not quota.spend(MAX_FRAME, 0.0)
    quota.said(m.Welcome(bytes(16), bytes(32), (), b"{}", 1))
    assert quota.spend(MAX_FRAME, 0.0)
