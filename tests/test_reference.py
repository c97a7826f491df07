"""The round in straight lines, against plain sums and against the machines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import entropy_from, make_parties, make_plan, make_updates, own_words

from secure_fedprompt.memory import run_round
from secure_fedprompt.protocol import fixedpoint
from secure_fedprompt.protocol.reference import run_masks
from secure_fedprompt.server.rounds.base import Stage


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.data())
def test_the_reference_gives_the_plain_sum(n: int, data: st.DataObject) -> None:
    plan = make_plan(n, ring_bits=data.draw(st.sampled_from([16, 22, 32])), max_weight=1)
    words = {
        name: np.array([data.draw(st.integers(0, (1 << f.bits) - 1)) for f in plan.layout for _ in range(f.size)], np.uint32)
        for name in plan.cohort
    }  # fmt: skip
    up = data.draw(st.sets(st.sampled_from(plan.cohort), min_size=plan.threshold))
    back = data.draw(st.sets(st.sampled_from(sorted(up)), min_size=plan.threshold))
    total = run_masks(plan, words, up, back, entropy_from("reference"))
    bits = np.concatenate([np.full(f.size, f.bits) for f in plan.layout])
    expected = sum(words[name].astype(np.uint64) for name in up) % (
        np.uint64(1) << bits.astype(np.uint64)
    )
    assert (total % (np.uint64(1) << bits.astype(np.uint64)) == expected).all()


@pytest.mark.parametrize("gone", [set(), {"c002"}, {"c001", "c005"}])
def test_the_machines_give_the_references_sum(gone: set[str]) -> None:
    plan, parties = make_plan(7), make_parties(7)
    updates = make_updates(plan)
    drops = dict.fromkeys(gone, Stage.COLLECTING)
    outcome = run_round(plan, parties, updates, drops)
    assert outcome.round.stage is Stage.DONE
    assert outcome.round.integers is not None
    words = {name: own_words(plan, updates, name) for name in plan.cohort}
    up = set(plan.cohort) - gone
    total = run_masks(plan, words, up, up, entropy_from("reference"))
    assert (fixedpoint.to_integers(plan.layout, total) == outcome.round.integers).all()


def test_shares_below_the_threshold_give_nothing() -> None:
    plan = make_plan(5)
    words = {n: np.zeros(sum(f.size for f in plan.layout), np.uint32) for n in plan.cohort}
    everybody = set(plan.cohort)
    few = set(plan.cohort[: plan.threshold - 1])
    assert not run_masks(plan, words, everybody, everybody, entropy_from("x")).any()
    assert run_masks(plan, words, everybody, few, entropy_from("x")).any()
