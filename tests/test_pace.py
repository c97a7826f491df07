"""When uploads leave: neither how long training takes nor that it failed may show."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from rounds import make_plan

from secure_fedprompt.pace import Pace
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.plan import RoundPlan

ALIVE = m.Alive()


def upload(plan: RoundPlan) -> m.MaskedUpload:
    return m.MaskedUpload(plan.run, plan.round, b"", bytes(16))


def leaves(pace: Pace, plan: RoundPlan, trained: float, failed: bool = False) -> float:
    """The first whole second in which an upload leaves that was ready at ``trained``."""
    pace.trained(plan, trained, failed=failed)
    sent = pace.due([upload(plan)], trained)
    for second in range(int(trained), 10_000):
        if sent:
            return second
        sent = pace.due([], second + 1.0)
    raise AssertionError("it never leaves")


def begun(after: float = 0.0, at_least: float = 0.0, **changes: Any) -> tuple[Pace, RoundPlan]:
    pace, plan = Pace(at_least), make_plan(4, rounds=9, **changes)
    pace.begin(plan, after, 0.0)
    return pace, plan


def test_without_a_hold_an_upload_leaves_when_it_is_ready() -> None:
    pace, plan = begun()
    assert leaves(pace, plan, 7.0) == 7.0


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize(("after", "at_least"), [(60.0, 0.0), (0.0, 60.0), (60.0, 5.0)])
def test_all_hold_to_the_longer_of_terms_and_settings(
    after: float, at_least: float, failed: bool
) -> None:
    pace, plan = begun(after, at_least)
    assert leaves(pace, plan, 7.0, failed) == 60.0


def test_a_failure_takes_as_long_as_training_did_now_and_then() -> None:
    """Always as long as the longest would be as plain as haste."""
    pace, plan = begun()
    for number, took in enumerate((40.0, 50.0, 60.0), 2):
        assert leaves(pace, plan, 100.0 * (number - 2) + took) == 100.0 * (number - 2) + took
        plan = dataclasses.replace(plan, round=number, learning_round=number)
        pace.begin(plan, 0.0, 100.0 * (number - 1))
    waits = set()
    for number in range(5, 105):
        plan = dataclasses.replace(plan, round=number, learning_round=number)
        pace.begin(plan, 0.0, 100.0)
        waits.add(leaves(pace, plan, 101.0, failed=True) - 100.0)
    assert waits == {40.0, 50.0, 60.0}


def test_a_failure_takes_as_long_as_training_took() -> None:
    pace, plan = begun()
    assert leaves(pace, plan, 40.0) == 40.0
    second = dataclasses.replace(plan, round=2, learning_round=2)
    pace.begin(second, 0.0, 100.0)
    assert leaves(pace, second, 101.0, failed=True) == 140.0
    third = dataclasses.replace(plan, round=3, learning_round=3)
    pace.begin(third, 0.0, 200.0)
    assert leaves(pace, third, 210.0) == 210.0  # who trains well is not held


def test_another_attempt_does_not_shorten_a_hold() -> None:
    pace, plan = begun()
    assert leaves(pace, plan, 40.0) == 40.0
    second = dataclasses.replace(plan, round=2, learning_round=2)
    pace.begin(second, 0.0, 100.0)
    pace.trained(second, 101.0, failed=True)
    assert pace.due([upload(second)], 101.0) == []
    again = dataclasses.replace(second, round=3, attempt=2)
    pace.begin(again, 0.0, 110.0)
    assert pace.due([upload(again), ALIVE], 111.0) == [ALIVE]
    assert pace.due([], 139.0) == []
    assert pace.due([], 140.0) == [upload(again)]  # and what the first attempt held is gone


def test_other_frames_are_never_held() -> None:
    pace, plan = begun(60.0)
    reveal = m.Reveal(plan.run, plan.round, b"")
    assert pace.due([reveal, upload(plan), ALIVE], 1.0) == [reveal, ALIVE]
