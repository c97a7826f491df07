"""What the server does with clients that break the rules: it names them and goes on, or aborts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from rounds import identity, make_parties, make_plan, make_updates, plain_sum, roster

from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.memory import SimulatedRound, run_round
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.server.rounds.base import Deadlines, Stage
from secure_fedprompt.server.rounds.masks import MaskedRound


def spoil_reveals(n: int, liars: set[str], drops: dict[str, Stage] | None = None) -> SimulatedRound:
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
        (m.Advert, {"mask_key": bytes(32)}, "advertising"),
        (m.Advert, {"seal_key": b"\x01" + bytes(31)}, "advertising"),
        (m.Shares, {"boxes": b"short"}, "sharing"),
        (m.Shares, {"boxes": bytes(5 * m.BOX)}, "sharing"),
        (m.MaskedUpload, {"vector": b"short"}, "training"),
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


def test_frames_that_cross_the_end_of_their_round_are_ignored() -> None:
    plan = make_plan(4)
    server = MaskedRound(dataclasses.replace(plan, round=2), b"", roster(4), Deadlines(1, 1))
    server.start(0.0)
    assert server.on("c001", m.MaskedUpload(plan.run, 1, b"", bytes(16)), 0.0) == []
    assert server.waiting == set(plan.cohort)
    assert not server.faults


def test_a_client_that_withdraws_is_dropped_with_its_reason() -> None:
    plan = make_plan(4)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c004" and isinstance(message, m.Shares):
            return m.Withdraw(plan.run, plan.round, "SealError", "sealed shares from c002")
        return message

    outcome = run_round(plan, make_parties(4), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.DONE
    assert outcome.round.faults == {"c004": "withdrew: SealError: sealed shares from c002"}


def test_a_lost_client_is_not_waited_for_again() -> None:
    """c004 answers and is then gone: the next stage begins without it."""
    plan = make_plan(4)
    server = MaskedRound(plan, b"", roster(4), Deadlines(1, 1))
    server.start(0.0)
    states = {}
    for name, party in make_parties(4).items():
        states[name], (advert,) = start(party, plan)
        if name == "c003":
            server.gone("c004", 0.0)
        server.on(name, advert, 0.0)
    assert server.stage is Stage.SHARING
    assert server.waiting == {"c001", "c002", "c003"}


def test_a_dealer_of_bad_shares_is_named() -> None:
    """c002 commits to another seed than it shares: every reconstruction fails, and it is named."""
    plan = make_plan(6)
    parties = make_parties(6)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Advert) and sender == "c002":
            forged = dataclasses.replace(message, commitment=b"\5" * 32)
            signature = identity("c002").sign(Purpose.ADVERT, forged.body(plan))
            return dataclasses.replace(forged, signature=signature)
        if isinstance(message, m.Adverts) and recipient == "c002":  # it plays along
            adverts = tuple(own if a.name == "c002" else a for a in message.adverts)
            return dataclasses.replace(message, adverts=adverts)
        return message

    _, (own,) = start(make_parties(6)["c002"], plan)
    assert isinstance(own, m.Advert)
    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.ABORTED
    assert "BadShareError" in outcome.round.reason or "SignatureError" in str(outcome.round.faults)
    assert "c002" in outcome.round.faults


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


@pytest.mark.parametrize("doubled", ["its own", "another's"])
def test_a_key_that_is_used_twice_costs_its_sender_the_round(doubled: str) -> None:
    plan, first = make_plan(5), dict[str, m.Advert]()

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Advert):
            first.setdefault(sender, message)
            if sender == "c005":
                own = message.seal_key if doubled == "its own" else first["c001"].mask_key
                return dataclasses.replace(message, mask_key=own)
        return message

    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.DONE
    assert "c005: another name, or keys used twice" in outcome.round.faults["c005"]


def test_who_comes_back_is_asked_only_while_the_sum_is_opened() -> None:
    plan, asked = make_plan(5), dict[Stage, list[object]]()

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c005" and isinstance(message, m.Consistent | m.Reveal):
            return m.Alive()
        return message

    rounds: list[MaskedRound] = []
    real = MaskedRound._begin

    def begin(self: MaskedRound, stage: Stage, names: tuple[str, ...], now: float) -> None:
        real(self, stage, names, now)
        if stage in (Stage.SHARING, Stage.COLLECTING):
            rounds.append(self)
            asked[stage] = self.back("c005", now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedRound, "_begin", begin)
        run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert asked == {Stage.SHARING: [], Stage.COLLECTING: []}


def test_infinity_in_the_clear_costs_its_sender_the_round() -> None:
    plan = make_plan(4, protection="none", quorum=1, threshold=1)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c002" and isinstance(message, m.PlainUpload):
            vector = np.frombuffer(bytes(message.vector), "<f8").copy()
            vector[0] = np.inf
            return dataclasses.replace(message, vector=vector.tobytes())
        return message

    outcome = run_round(plan, make_parties(4), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.DONE, outcome.round.reason
    assert outcome.round.faults == {"c002": "FieldError: upload holds NaN or infinity"}
    assert outcome.round.integers is None
