"""Rounds that a client's policy forbids: it waits for another one, and the server for its clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from federation import World
from rounds import OPEN, names

from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.policy import Policy


def policy(**changes: Any) -> Policy:
    return Policy(**{**{f: getattr(OPEN, f) for f in OPEN.__struct_fields__}, **changes})


def federation(folder: Path, policy: Policy, **changes: Any) -> World:
    world = World(folder, 5, policy, **{"weights": "uniform", "metrics": "final", **changes})
    world.withdraws = True
    for name in names(5):
        world.join(name)
    return world


def second_round(world: World, message: m.Message) -> bool:
    return isinstance(message, m.Plan) and message.plan.learning_round == 2


def loses(world: World, name: str) -> None:
    world.lost.add(name)
    world.lose(name)


def test_clients_wait_for_the_one_that_is_missing(tmp_path: Path) -> None:
    world = federation(tmp_path, policy(min_cohort=5), max_attempts=2)  # of which it costs none
    world.pump(second_round)
    loses(world, "c005")
    declined: list[str] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Withdraw):
            declined.append(message.error)
        return message

    world.tamper = tap
    world.pump(lambda w, message: len(declined) >= 4 and not w.run.current)
    assert set(declined) == {"PolicyError"}
    assert not world.errors
    assert isinstance(world.sessions["c001"].declined, errors.PolicyError)
    before, begun = len(declined), world.run.state.round
    world.pump(lambda w, message: w.clock > world.run.gather_until - 20)
    assert (len(declined), world.run.state.round) == (before, begun)  # and asks nobody meanwhile
    world.join("c005")
    world.pump()
    assert world.run.error is None
    assert world.run.state.learning_round == 4
    assert world.sessions["c001"].declined is None
    assert not world.errors


def test_a_server_whose_clients_all_decline_says_why(tmp_path: Path) -> None:
    world = federation(tmp_path, policy(min_cohort=5), gather_seconds=100.0)
    world.pump(second_round)
    loses(world, "c005")
    world.pump()
    told = str(world.run.error)
    assert isinstance(world.run.error, errors.RunFailedError)
    assert "c001, c002, c003, c004 would not take part (c001 withdrew: PolicyError: " in told
    assert "a cohort of 4, but policy.min_cohort is 5)" in told
    assert "start more clients, or let their policies allow 4" in told


def test_one_strict_client_costs_the_others_nothing(tmp_path: Path) -> None:
    world = federation(tmp_path, OPEN)
    strict = world.sessions["c001"].party
    object.__setattr__(strict, "policy", policy(min_cohort=5))
    world.pump(second_round)
    loses(world, "c005")
    world.run.needed = 3
    world.pump()
    assert isinstance(world.sessions["c001"].declined, errors.PolicyError)
    assert isinstance(
        world.run.error, errors.RunFailedError
    )  # four of five are a quorum, three not
    assert "(c001 withdrew: PolicyError" in str(world.run.error)


@pytest.mark.parametrize(
    ("limit", "says"),
    [({"min_survivors": 5}, "the server plans quorum 4, but policy.min_survivors is 5"),
     ({"min_cohort": 6}, "the server plans cohorts of 5 at most, but policy.min_cohort is 6")],
)  # fmt: skip
def test_what_no_round_could_keep_is_refused_with_the_terms(
    tmp_path: Path, limit: dict[str, int], says: str
) -> None:
    world = federation(tmp_path, policy(**limit))
    world.pump()
    assert {str(error) for error in world.errors.values()} == {says}
    assert world.run.state.round == 0
    error = world.errors["c001"]
    assert world.sessions["c001"].leave(error) == m.Leave("PolicyError", says)  # the server says it


@pytest.mark.parametrize("error", [errors.TermsError("x"), errors.ReplayError("x")])
def test_other_refusals_end_the_run_for_a_client(
    tmp_path: Path, error: errors.SecureFedPromptError
) -> None:
    world = federation(tmp_path, OPEN)
    world.pump(second_round)
    with pytest.raises(type(error)):
        world.sessions["c001"].withdraw(error)
