"""What the server does with clients that break the rules: it names them and goes on, or aborts."""

from __future__ import annotations

import dataclasses

import pytest
from rounds import make_parties, make_plan, make_updates, plain_sum

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.server.coordinator import Stage
from secure_fedprompt.simulate import Outcome, run_round


def spoil_reveals(n: int, liars: set[str], drops: dict[str, Stage] | None = None) -> Outcome:
    plan = make_plan(n)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Reveal) and sender in liars:
            spoiled = bytearray(message.shares)
            for at in range(0, len(spoiled), 32):
                spoiled[at] ^= 1
            return dataclasses.replace(message, shares=bytes(spoiled))
        return message

    return run_round(plan, make_parties(n), make_updates(plan), drops, tap)


@pytest.mark.parametrize("liar", ["c001", "c005", "c007"])
def test_a_bad_share_is_caught_its_sender_named_and_the_sum_still_right(liar: str) -> None:
    outcome = spoil_reveals(10, {liar}, {"c003": Stage.COLLECTING})
    assert outcome.round.stage is Stage.DONE, outcome.round.reason
    assert set(outcome.round.faults) == {liar}
    plan = make_plan(10)
    alive = [name for name in plan.cohort if name != "c003"]
    assert outcome.round.integers is not None
    assert (outcome.round.integers == plain_sum(plan, make_updates(plan), alive)).all()


def test_a_bad_share_beyond_the_threshold_is_not_used() -> None:
    outcome = spoil_reveals(10, {"c010"})
    assert outcome.round.stage is Stage.DONE
    plan = make_plan(10)
    assert outcome.round.integers is not None
    assert (outcome.round.integers == plain_sum(plan, make_updates(plan), plan.cohort)).all()


def test_two_liars_are_both_named() -> None:
    outcome = spoil_reveals(12, {"c002", "c007"})
    assert outcome.round.stage is Stage.DONE
    assert set(outcome.round.faults) == {"c002", "c007"}


def test_at_the_bare_threshold_a_bad_share_aborts_with_the_suspects() -> None:
    drops = {"c004": Stage.UNMASKING}
    outcome = spoil_reveals(4, {"c002"}, drops)
    assert outcome.round.stage is Stage.ABORTED
    assert "BadShareError" in outcome.round.reason
    assert "c002" in outcome.round.reason
    assert outcome.round.result is None


@pytest.mark.parametrize(
    ("kind", "change", "stage"),
    [
        (m.Advert, {"signature": bytes(64)}, "advertising"),
        (m.Advert, {"name": "c002"}, "advertising"),
        (m.Advert, {"round": 7}, "advertising"),
        (m.Shares, {"boxes": b"short"}, "sharing"),
        (m.MaskedUpload, {"vector": b"short"}, "collecting"),
        (m.Consistent, {"signature": bytes(64)}, ""),
        (m.Reveal, {"shares": b"short"}, ""),
    ],
)
def test_a_client_that_breaks_a_rule_is_named_and_the_others_finish(
    kind: type, change: dict[str, object], stage: str
) -> None:
    plan = make_plan(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c001" and isinstance(message, kind):
            return dataclasses.replace(message, **change)  # type: ignore[type-var]
        return message

    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.DONE, outcome.round.reason
    assert set(outcome.round.faults) == {"c001"}
    assert outcome.round.dropped == ({"c001": stage} if stage else {})
    alive = plan.cohort[1:] if stage else plan.cohort
    assert outcome.round.integers is not None
    assert (outcome.round.integers == plain_sum(plan, make_updates(plan), alive)).all()


def test_a_wrong_kind_of_message_is_a_fault() -> None:
    plan = make_plan(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c001" and isinstance(message, m.MaskedUpload):
            return m.PlainUpload(message.run, message.round, message.vector)
        return message

    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert "PlainUpload while collecting" in outcome.round.faults["c001"]
    assert outcome.round.stage is Stage.DONE


def test_a_contributor_count_that_does_not_fit_aborts() -> None:
    """A malicious ring vector that fakes its count is noticed as an accident would be."""
    plan = make_plan(4, protection="none")

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c001" and isinstance(message, m.PlainUpload):
            return dataclasses.replace(message, vector=bytes(len(message.vector)))
        return message

    outcome = run_round(plan, make_parties(4), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.ABORTED
    assert "counts 3 contributors" in outcome.round.reason
