"""What a client knows of prompts that are nearly the same cannot be talked out of it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from federation import World
from interrupted import spread
from rounds import make_plan, names

from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import prompt_bytes
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.layout import METRICS
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.terms import PlanInputs

SETTINGS = {"alive_seconds": 12.0, "metrics": "off", "weights": "uniform", "rounds": 2}
N = 4


def uncounted() -> RoundPlan:
    """A plan whose sum holds nothing but the update."""
    plan = make_plan(4, max_weight=1)
    kept = tuple(field for field in plan.layout if field.name not in METRICS)
    return dataclasses.replace(plan, layout=kept)


def started(world: World, flat: bool) -> None:
    spread(world)
    if flat:
        for toy in world.toys.values():
            toy.initial = lambda: np.zeros(10, np.float32)


def beside(tmp_path: Path, flat: bool) -> World:
    """A run that opened the sum of four clients, and a second one from nearly the same start, in
    which all four have uploaded; their own start may be the same everywhere."""
    first = World(tmp_path / "first", N, **SETTINGS)
    started(first, flat)
    for name in names(N):
        first.join(name)
    first.pump()
    assert first.run.error is None
    world = World(tmp_path / "second", N, max_attempts=1, **SETTINGS)
    world.journals, world.ledgers = copy.deepcopy(first.journals), copy.deepcopy(first.ledgers)
    world.withdraws, world.clock = True, 1000.0
    started(world, flat)
    nudged = world.toys["c001"].initial() + np.float32(1e-7)
    for toy in world.toys.values():
        toy.initial = lambda: nudged
    world.start_server()
    for name in names(N):
        world.join(name)
    uploads: list[m.Message] = []

    def four(world: World, message: m.Message) -> bool:
        if isinstance(message, m.MaskedUpload):
            uploads.append(message)
        return len(uploads) == N

    world.pump(four)
    return world


def far_plan(world: World, plan: RoundPlan, number: int) -> tuple[RoundPlan, bytes]:
    """A later plan, from any other prompt."""
    data = prompt_bytes(np.full(10, 0.5, np.float32))
    inputs = PlanInputs.of(plan)
    assert world.run.state.terms is not None
    made = world.run.state.terms.plan(dataclasses.replace(
        inputs, round=number, attempt=1, learning_round=2, base_digest=digest(Purpose.BASE, data)
    ))  # fmt: skip
    return made, data


def greet_again(world: World, name: str) -> None:
    """The server lets a client greet anew in the middle of its round."""
    session, state = world.sessions[name], world.run.state
    session.on(m.Rejoin())
    settings = world.settings.method_settings().to_bytes()
    session.on(m.Welcome(state.run, state.server_nonce, state.commitments, settings, 0))
    assert state.terms is not None
    signature = world.run.identity.sign(Purpose.TERMS, state.terms.digest)
    start = prompt_bytes(state.start)
    session.on(m.Terms(state.run, state.terms, start, state.nonces, signature))


@pytest.mark.parametrize(("trick", "flat"), [(False, False), (True, False), (False, True)])
def test_a_plan_that_is_declined_makes_no_prompt_forgotten(
    tmp_path: Path, trick: bool, flat: bool
) -> None:
    """The server shows a far prompt in a plan that no policy allows, and then a list of the round
    before: with the sum of the first run it would single out c004."""
    world = beside(tmp_path, flat)
    plan = world.run.current.plan  # type: ignore[union-attr]
    if trick:
        later, data = far_plan(world, plan, 5000)
        for name in names(3):
            greet_again(world, name)
            session, kept = world.sessions[name], set(world.journals[name]._blobs)
            with pytest.raises(errors.PolicyError, match="attempt 5000") as error:
                session.on(m.Plan(later, data))
            session.withdraw(error.value)
            assert set(world.journals[name]._blobs) == kept  # nor does it fill a disk
    said: list[m.Message] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender:
            said.append(message)
        return message

    world.tamper = tap
    world.lose("c004")
    world.lost.add("c004")
    world.pump()
    assert not [x for x in said if isinstance(x, m.Consistent | m.Reveal)]
    assert [x.error for x in said if isinstance(x, m.Withdraw)][:3] == ["IsolationError"] * 3


def test_nearness_is_judged_whatever_came_in_between() -> None:
    """Lists that are signed after a prompt was seen count, prompts that are seen later change
    nothing, and as long as a prompt is not known every list may be of a near one."""
    journal, start = MemoryJournal(), np.linspace(-0.04, 0.04, 10).astype(np.float32)
    one = uncounted()
    other = dataclasses.replace(one, run=b"o" * 16, base_digest=b"o" * 32)
    far = dataclasses.replace(one, run=b"f" * 16, base_digest=b"f" * 32)
    for plan, shift in ((one, 0.0), (other, 1e-8), (far, 1.0)):
        journal.begin_round(plan)
        assert not journal.note_base(plan, [start + np.float32(shift)], 1e-6, b"b")
    journal.record_survivors(other, other.cohort[:3], b"")
    assert journal.near_lists(one) == [other.cohort[:3]]
    assert journal.near_lists(far) == []
    assert journal.note_base(one, [start], 0.0, b"c") == {b"b"}  # the wider tolerance stays
    journal._notes.clear()
    assert journal.near_lists(far) == [other.cohort[:3]]


def test_a_prompt_of_another_length_may_be_the_same_one() -> None:
    """To another method, or a part of it: FedPer sends half of PromptFL's context. Its lists count
    until the operator has given the word."""
    journal, start = MemoryJournal(), np.linspace(-0.04, 0.04, 10).astype(np.float32)
    one = uncounted()
    other = dataclasses.replace(one, run=b"o" * 16, base_digest=b"o" * 32)
    journal.begin_round(one)
    journal.note_base(one, [start], 1e-6, b"b")
    journal.record_survivors(one, one.cohort, b"")
    journal.begin_round(other)
    assert journal.note_base(other, [start[:5]], 1e-6, b"c") == {b"b"}
    assert journal.near_lists(other) == [one.cohort]
    longer = dataclasses.replace(one, round=2, learning_round=2, rounds=2, base_digest=b"l" * 32)
    assert not journal.note_base(longer, [np.append(start, 9)], 1e-6, b"b")  # of this run
    word = dataclasses.replace(other, run=b"w" * 16)
    assert not journal.note_base(word, [start[:5]], 1e-6, b"c", accepted=True)
    assert journal.near_lists(word) == []


@pytest.mark.parametrize("accepted", [False, True])
def test_what_no_prompt_changes_is_not_counted_over_other_clients(
    tmp_path: Path, accepted: bool
) -> None:
    """A second run from any start, without c004: of two sums of counts the difference is its own."""
    first = World(tmp_path / "first", N, **{**SETTINGS, "metrics": "final"})
    spread(first)
    for name in names(N):
        first.join(name)
    first.pump()
    assert first.run.error is None
    world = World(tmp_path / "second", N, **{**SETTINGS, "metrics": "final"}, max_attempts=2)
    world.journals, world.withdraws, world.clock = first.journals, False, 1000.0
    start = np.random.default_rng(9).normal(0, 0.02, 10).astype(np.float32)
    for toy in world.toys.values():
        toy.initial = lambda: start
    world.start_server()
    for name in names(3):
        world.join(name)
        if accepted:
            world.sessions[name].exempt = True
    world.pump()
    rows = world.store.summary()["rounds"]
    if accepted:
        assert world.run.error is None
        assert [row["outcome"] for row in rows] == ["done"] * 3
    else:
        assert {type(e) for e in world.errors.values()} == {errors.AcceptanceError}
        assert "whose counts of images beside this one's might single out" in str(world.errors)


def test_an_evaluation_alone_is_judged_by_other_runs_counts() -> None:
    """All took part in training, and the server leaves one out where it is counted."""
    journal = MemoryJournal()
    one = make_plan(4, max_weight=1)
    assert one.counting
    other = dataclasses.replace(one, run=b"o" * 16, base_digest=b"o" * 32)
    for plan, prompt in ((one, 0.0), (other, 1.0)):
        journal.begin_round(plan)
        journal.note_base(plan, [np.full(4, prompt, np.float32)], 1e-6, b"b")
        journal.record_survivors(plan, plan.cohort, b"")
    assert journal.near_lists(other) == [one.cohort]
    journal._notes.clear()
    journal.note_base(other, [np.ones(4, np.float32)], 1e-6, b"b", accepted=True)
    assert journal.near_lists(other) == []


def test_a_server_does_not_learn_what_was_trained_elsewhere(tmp_path: Path) -> None:
    """It shows a prompt of another run, or a guess of one, as the base of its own."""
    first = World(tmp_path / "first", N, lr=0.002, **SETTINGS)
    spread(first)
    for name in names(N):
        first.join(name)
    plans: list[RoundPlan] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        plans.extend([message.plan] if isinstance(message, m.Plan) else [])
        return message

    first.tamper = tap
    first.pump()
    elsewhere = first.journals["c001"].base(plans[-1])
    assert elsewhere is not None
    assert plans[-1].learning_round == 2
    world = World(tmp_path / "second", N, lr=0.05, **SETTINGS)
    world.journals, world.withdraws, world.clock = first.journals, True, 1000.0
    start = np.random.default_rng(9).normal(0, 0.02, 10).astype(np.float32)
    for toy in world.toys.values():
        toy.initial = lambda: start
    world.start_server()
    for name in names(N):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.Plan))
    data = prompt_bytes(elsewhere)
    inputs, terms = PlanInputs.of(world.run.current.plan), world.run.state.terms  # type: ignore[union-attr]
    assert terms is not None
    guess = terms.plan(dataclasses.replace(
        inputs, round=2, attempt=1, learning_round=2, base_digest=digest(Purpose.BASE, data)
    ))  # fmt: skip
    greet_again(world, "c002")
    session = world.sessions["c002"]
    with pytest.raises(errors.AcceptanceError, match=r"lr = 0.002 \(now 0.05\)") as error:
        session.on(m.Plan(guess, data))
    (withdrawn,) = session.withdraw(error.value)
    assert withdrawn == m.Withdraw(guess.run, 2, "AcceptanceError", errors.AcceptanceError.told)
    assert session.leave(error.value).reason == errors.AcceptanceError.told
