"""The oracle: whatever clients drop out, the sum is the plain integer sum, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import make_parties, make_plan, make_updates, plain_sum

from secure_fedprompt.memory import SimulatedRound, run_round
from secure_fedprompt.protocol import masking
from secure_fedprompt.protocol.errors import PlanError
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.server.rounds.base import Stage


def called(stage: Stage) -> str:
    """The stage as people call it."""
    return "training" if stage is Stage.COLLECTING else str(stage)


STAGES = (Stage.ADVERTISING, Stage.SHARING, Stage.COLLECTING, Stage.CONSISTENCY, Stage.UNMASKING)
BEFORE_UPLOAD = set(STAGES[:3])
Pattern = tuple[Stage | None, ...]


def check(plan: RoundPlan, pattern: Pattern, seed: int = 0) -> SimulatedRound:
    """Run a round with these dropouts and hold it against the plain sum."""
    updates = make_updates(plan, seed)
    drops = {name: stage for name, stage in zip(plan.cohort, pattern, strict=True) if stage}
    outcome = run_round(plan, make_parties(len(pattern)), updates, drops)
    gone = 0
    for stage in STAGES:  # a quorum must be left after every stage
        gone += sum(s is stage for s in pattern)
        if len(pattern) - gone < plan.quorum:
            assert outcome.round.stage is Stage.ABORTED
            assert called(stage) in outcome.round.reason
            assert outcome.round.result is None
            return outcome
    assert outcome.round.stage is Stage.DONE, outcome.round.reason
    assert not outcome.errors
    assert not outcome.round.faults
    survivors = [n for n, s in zip(plan.cohort, pattern, strict=True) if s not in BEFORE_UPLOAD]
    expected = plain_sum(plan, updates, survivors)
    assert outcome.round.integers is not None
    assert (outcome.round.integers == expected).all()
    assert set(outcome.round.dropped) == set(plan.cohort) - set(survivors)
    return outcome


@pytest.mark.parametrize("n", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_dropout_pattern(n: int) -> None:
    plan = make_plan(n)
    for pattern in itertools.product((None, *STAGES), repeat=n):
        check(plan, pattern)


@pytest.mark.parametrize("n", [4, 5, 6])
def test_one_assignment_of_each_multiset_of_stages(n: int) -> None:
    plan, rng = make_plan(n), np.random.default_rng(n)
    for chosen in itertools.combinations_with_replacement((None, *STAGES), n):
        if sum(stage is not None for stage in chosen) <= n - plan.quorum + 1:
            check(plan, tuple(chosen[i] for i in rng.permutation(n)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 6])
def test_the_full_walk(n: int) -> None:
    plan = make_plan(n)
    for pattern in itertools.product((None, *STAGES), repeat=n):
        if sum(stage is not None for stage in pattern) <= n - plan.quorum + 1:
            check(plan, pattern)


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_larger_cohorts(data: st.DataObject) -> None:
    n = data.draw(st.integers(7, 16))
    bits, weight = data.draw(st.sampled_from([(32, 64), (24, 1), (22, 1), (31, 8)]))
    plan = make_plan(n, ring_bits=bits, max_weight=weight)
    pattern = data.draw(st.lists(st.sampled_from((None, *STAGES)), min_size=n, max_size=n))
    few = data.draw(st.integers(0, n - plan.quorum + 1))
    kept = [s if sum(x is not None for x in pattern[:i]) < few else None
            for i, s in enumerate(pattern)]  # fmt: skip
    check(plan, tuple(kept), data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("drop", [0, 2])
def test_regular_graph(drop: int) -> None:
    n = 40
    plan = make_plan(n, degree=12, graph_seed=b"\7" * 32, quorum=27, threshold=8)
    near = masking.neighbourhoods(plan)
    assert {len(peers) for peers in near.values()} == {13}
    assert all(name in near[peer] for name, peers in near.items() for peer in peers)
    pattern = [Stage.COLLECTING] * drop + [None] * (n - drop)
    updates = make_updates(plan)
    drops = {name: s for name, s in zip(plan.cohort, pattern, strict=True) if s}
    outcome = run_round(plan, make_parties(n), updates, drops)
    assert outcome.round.stage is Stage.DONE, outcome.round.reason
    survivors = [name for name in plan.cohort if name not in drops]
    assert outcome.round.integers is not None
    assert (outcome.round.integers == plain_sum(plan, updates, survivors)).all()


def test_degree_grows_with_what_it_must_tolerate() -> None:
    easy, _ = masking.choose_degree(1000, dropout=0.05, corruption=0.05)
    hard, t = masking.choose_degree(1000, dropout=0.1, corruption=0.1)
    assert easy < hard < 150
    assert hard // 2 < t <= hard
    with pytest.raises(PlanError, match="complete"):
        masking.choose_degree(10, dropout=0.3, corruption=0.3)


def test_masks_among_dropped_peers_are_never_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    from secure_fedprompt.server.rounds import unmasking as aggregate

    made: list[tuple[str, str]] = []
    real = masking.pair_key

    def spy(plan: RoundPlan, one: str, other: str, shared: bytes) -> bytes:
        made.append((one, other))
        return real(plan, one, other, shared)

    plan = make_plan(7)
    monkeypatch.setattr(aggregate.masking, "pair_key", spy)
    drops = {"c002": Stage.COLLECTING, "c005": Stage.COLLECTING}
    outcome = run_round(plan, make_parties(7), make_updates(plan), drops)
    assert outcome.round.stage is Stage.DONE
    server_made = made[-10:]  # two dropped clients, five survivors each
    assert {one for one, _ in server_made} == set(drops)
    assert not {other for _, other in server_made} & set(drops)


def test_without_protection_the_float_sum_is_exact() -> None:
    plan = make_plan(4, protection="none")
    updates = make_updates(plan)
    outcome = run_round(plan, make_parties(4), updates)
    result = outcome.round.result
    assert result is not None
    expected = sum(np.clip(v["ctx"], -1, 1) * w for v, w in updates.values())
    assert np.allclose(result["ctx"], expected, rtol=0, atol=1e-12)


def test_masked_equals_plain_within_the_rounding_bound() -> None:
    updates = make_updates(make_plan(5))
    results = []
    for protection in ("masks", "none"):
        plan = make_plan(5, protection=protection)
        result = run_round(plan, make_parties(5), updates).round.result
        assert result is not None
        results.append(result["ctx"])
    assert 0 < np.abs(results[0] - results[1]).max() <= 5 * 2.0 ** -make_plan(5).layout[0].frac


def test_bit_packed_uploads_are_smaller() -> None:
    tensors = (TensorSpec("ctx", (1, 16, 512)),)
    sizes = []
    for bits in (32, 22):
        plan = make_plan(10, tensors=tensors, ring_bits=bits, max_weight=1)
        outcome = run_round(plan, make_parties(10), make_updates(plan))
        assert outcome.round.stage is Stage.DONE
        up = sum(len(frame) for _, recipient, frame in outcome.frames if not recipient)
        sizes.append(up / 10 / 8192)
    assert sizes[0] <= 4.2
    assert sizes[1] <= 3.1
