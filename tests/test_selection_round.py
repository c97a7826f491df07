"""Secure selection inside rounds: the same choice as in the clear, whoever is lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
from federation import World
from rounds import names
from selecting import (
    SHAPES,
    SLOTS,
    altered,
    expected_choices,
    federate,
    flipped,
    rounds,
    slots_of,
)  # fmt: skip

from secure_fedprompt.audit.sums import _filled
from secure_fedprompt.protocol import errors, fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.layout import total_size, unflatten
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.server.settings import ServerSettings, fillers_of


@pytest.mark.parametrize("protection", ["masks", "bfv", "ckks", "none"])
@pytest.mark.parametrize(("scope", "keep"), [("client", 0), ("federation", 8)])
def test_the_circuit_chooses_what_the_plain_sort_does_and_slots_are_its_means(
    tmp_path: Path, protection: str, scope: str, keep: int
) -> None:
    world = federate(tmp_path, protection=protection, selection_scope=scope, selection_keep=keep)
    world.pump()
    if keep:  # clients fill different numbers of slots
        shown = [len(c) for choice in expected_choices(world, keep).values() for c in choice]
        assert len(set(shown)) > 1
    assert not world.errors
    assert world.run.error is None
    expected = expected_choices(world, keep)
    assert {name: toy.choices[1] for name, toy in world.toys.items()} == expected
    first = {
        k: np.mean([t.groups[k][:SLOTS] for t in world.toys.values()], 0) + 1e-3 for k in SHAPES
    }
    final = slots_of(world, world.sessions["c001"].final)
    for i, name in enumerate(SHAPES):
        for slot in range(SLOTS):
            sent = [
                world.toys[c].groups[name][expected[c][i][slot]] + 2e-3
                for c in world.toys if len(expected[c][i]) > slot
            ]  # fmt: skip
            mean = np.mean(sent, 0) if sent else first[name][slot]
            assert np.allclose(final[name][slot], mean, atol=1e-5)


def test_a_slot_that_nobody_fills_keeps_its_value(tmp_path: Path) -> None:
    world = federate(tmp_path, selection_scope="federation", selection_keep=1, selection_fillers=1)
    world.pump()
    first = {
        k: np.mean([t.groups[k][:SLOTS] for t in world.toys.values()], 0) + 1e-3 for k in SHAPES
    }
    final = slots_of(world, world.sessions["c002"].final)
    expected = expected_choices(world, 1, 1)
    for i, name in enumerate(SHAPES):
        assert np.allclose(final[name][1], first[name][1], atol=1e-5)
        (owner, group), = ((c, e[i][0]) for c, e in expected.items() if e[i])  # fmt: skip
        assert np.allclose(final[name][0], world.toys[owner].groups[name][group] + 2e-3, atol=1e-5)


def test_a_slot_of_too_few_fillers_is_closed_to_all(tmp_path: Path) -> None:
    """Two of four clients hold all of the largest keys: with three fillers asked, nobody sends."""
    world = federate(tmp_path, selection_scope="federation", selection_keep=4)
    for name, toy in world.toys.items():
        toy.keys[:] = 2**31 + toy.keys // 2 if name in ("c001", "c003") else toy.keys // 2
    world.pump()
    assert all(toy.choices[1] == [[], []] for toy in world.toys.values())
    final, shown = world.sessions["c002"].final, rounds(world)
    first = [t.groups[k][:SLOTS] for k in SHAPES for t in world.toys.values()]
    mean = np.concatenate([np.mean(first[:4], 0).reshape(-1), np.mean(first[4:], 0).reshape(-1)])
    assert np.allclose(final, mean + 1e-3, atol=1e-5)
    assert shown[1]["outcome"] == "done"


@pytest.mark.parametrize(
    ("protection", "cheat"), [("masks", True), ("masks", False), ("bfv", True)]
)
def test_a_closed_slot_that_was_opened_ends_the_run(
    tmp_path: Path, protection: str, cheat: bool
) -> None:
    """The server flips a bit of an outcome: its owner's group alone would be the mean of a slot."""
    world = federate(
        tmp_path, selection_scope="federation", selection_keep=4, protection=protection
    )
    for name, toy in world.toys.items():
        toy.keys[:] = 2**31 + toy.keys // 2 if name in ("c001", "c003") else toy.keys // 2
    said, left, plans = list[str](), dict[str, str](), dict[int, RoundPlan]()

    def flip(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Plan):
            plans[message.plan.round] = message.plan
        if isinstance(message, m.OpenedSum) and message.round == 2:
            plan = plans[2]
            words = np.zeros(total_size(plan.layout), np.uint32)
            fixedpoint.add_wire(plan.layout, message.vector, words)
            integers = fixedpoint.to_integers(plan.layout, words)
            total = unflatten(plan.layout, fixedpoint.decode(plan.layout, integers))
            said.extend(finding.text for finding in _filled("", plan, message, total))
        if isinstance(message, m.Leave) and sender not in left:
            left[sender] = message.reason
        opens = cheat and isinstance(message, m.Outcome) and recipient == "c003"
        return altered(message, share=flipped(message.share)) if opens else message

    world.tamper = flip
    world.pump()
    assert set(world.errors) == (set(names(4)) if cheat else set())
    for name, error in world.errors.items():
        assert isinstance(error, errors.SumError)
        assert "1 filled slot 0 of 'text', which opens for 3" in left[name]
        with pytest.raises(errors.SumError):
            world.journals[name].check_trust(world.run.state.run)
    if protection == "masks":
        assert bool(said) == cheat
        assert all("a slot of 'text' is the mean of 1" in text for text in said)


def test_who_is_lost_after_its_outcome_is_no_cheat(tmp_path: Path) -> None:
    """Three would have filled the slots, which are the means of two then."""
    world = federate(tmp_path, selection_scope="federation", selection_keep=6)
    for name, toy in world.toys.items():
        toy.keys[:] = toy.keys // 2 if name == "c004" else 2**31 + toy.keys // 2

    def lose(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Outcome) and recipient == "c003":
            world.lost.add("c003")
        return message

    world.tamper = lose
    world.pump()
    assert world.run.error is None
    assert not world.errors
    assert rounds(world)[-1]["cohort"] == list(names(4))
    assert list(rounds(world)[-1]["dropped"]) == ["c003"]


# -- who is lost ---------------------------------------------------------------------------------


@pytest.mark.parametrize("protection", ["masks", "bfv"])
@pytest.mark.parametrize("kind", [*m.TO_HELPER, *m.FROM_HELPER])
def test_a_helper_lost_at_any_message_is_replaced(
    tmp_path: Path, kind: type, protection: str
) -> None:
    world = federate(tmp_path, 5, protection=protection)
    world.pump(until=lambda w, message: isinstance(message, kind))
    world.lost.add("c001")
    world.pump()
    assert world.run.error is None
    aborted = [r for r in rounds(world) if r["outcome"] == "aborted"]
    assert len(aborted) == 1
    assert "helper c001 failed" in aborted[0]["reason"]
    expected = expected_choices(world)
    for name in names(5)[1:]:
        assert world.toys[name].choices[-1] == expected[name]
    assert world.toys["c002"].trained == 1  # what was trained is kept, its keys are shared anew


@pytest.mark.parametrize("protection", ["masks", "bfv", "none"])
@pytest.mark.parametrize("kind", [m.KeyShares, m.HelperChoices, m.Outcome])
def test_a_client_lost_around_the_selection_costs_nothing(
    tmp_path: Path, kind: type, protection: str
) -> None:
    world = federate(tmp_path, 5, protection=protection)

    def lose(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, kind):
            world.lost.add("c005")
        return message

    world.tamper = lose
    world.pump()
    assert world.run.error is None
    assert [r["outcome"] for r in rounds(world)] == ["done", "done"]
    assert list(rounds(world)[1]["dropped"]) == ["c005"]
    expected = expected_choices(world)
    assert all(world.toys[name].choices[-1] == expected[name] for name in names(4))


def test_a_helper_process_of_its_own_helps_and_takes_part_in_no_sum(tmp_path: Path) -> None:
    world = federate(tmp_path, helpers=("notary",), helper="notary")
    world.pump()
    assert world.run.error is None
    assert world.sessions["notary"].helped == 1
    assert world.sessions["notary"].over
    assert [r["metrics"]["contributors"] for r in rounds(world)] == [4, 4]


def test_a_helper_process_can_reconnect_between_rounds(tmp_path: Path) -> None:
    world = federate(tmp_path, helpers=("notary",), helper="notary", rounds=3)
    world.pump(until=lambda w, message: isinstance(message, m.Outcome))
    world.join("notary")  # restarted: another run key
    world.pump()
    assert world.run.error is None
    assert world.sessions["notary"].helped >= 1


def test_without_its_configured_helper_the_run_waits_and_then_says_so(tmp_path: Path) -> None:
    world = federate(tmp_path, helpers=("notary",), helper="notary")
    world.lost.add("notary")
    world.pump()
    assert "helper 'notary' is not there: start it" in str(world.run.error)
    assert len(rounds(world)) == 1


def test_a_helper_lost_in_every_attempt_ends_the_run_with_a_reason(tmp_path: Path) -> None:
    world = federate(tmp_path, helpers=("notary",), helper="notary", max_attempts=2)

    def lose(w: World, message: m.Message) -> bool:
        if isinstance(message, m.HelperInputs):
            w.join("notary")
        return False

    world.pump(until=lose)
    assert "aborted 2 times: helper notary failed" in str(world.run.error)


def test_fillers_that_pool_theirs_have_two_others_beside_them(tmp_path: Path) -> None:
    """Who claims the largest keys chooses who else fills a slot."""
    for n, c in ((4, 1), (10, 3)):
        settings = ServerSettings(selection="secure", selection_scope="federation")
        assert fillers_of(settings, n) == c + 2
        assert fillers_of(msgspec.structs.replace(settings, selection_fillers=7), n) == 7
    world = federate(tmp_path, 10, selection_scope="federation", selection_keep=3)
    plans: list[RoundPlan] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        plans.extend([message.plan] if isinstance(message, m.Plan) else [])
        return message

    world.tamper = tap
    world.pump()
    plan = plans[-1]
    assert plan.selection.fillers == 5
    policy = Policy(selections=("secure-federation",))
    policy.check_plan(plan, 10)
    less = dataclasses.replace(plan, selection=dataclasses.replace(plan.selection, fillers=4))
    with pytest.raises(errors.PolicyError, match="4 fillers of a slot, of whom 3 could collude"):
        policy.check_plan(less, 10)
    msgspec.structs.replace(policy, colluders=2).check_plan(less, 10)
