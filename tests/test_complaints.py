"""Boxes that do not open: complaints, evidence, accusations, and who is excluded."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from federation import World
from rounds import (
    identity,
    make_encrypted_plan,
    make_parties,
    make_plan,
    make_updates,
    names,
    vouched,
)

from secure_fedprompt.clients.rounds import keying
from secure_fedprompt.clients.rounds import masks as masks_round
from secure_fedprompt.memory import run_round
from secure_fedprompt.protocol import errors, masking, merkle
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.agreement_proof import AgreementProof, check
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import unseal
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.server.rounds.base import Stage


class Spoiler:
    """Dealers that seal garbage for some, and sign it."""

    def __init__(self, victims: dict[str, tuple[int, ...]]) -> None:
        self.victims, self.plan, self.adverts = victims, None, b""

    def __call__(self, sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Plan):
            self.plan = message.plan
        if isinstance(message, m.Adverts):
            self.adverts = merkle.Tree([m.advert_leaf(a) for a in message.adverts]).root
        if not isinstance(message, m.Shares) or sender not in self.victims:
            return message
        boxes = bytearray(message.boxes)
        for i in self.victims[sender]:
            boxes[m.BOX * i] ^= 1
        made = dataclasses.replace(message, boxes=bytes(boxes))
        signature = identity(sender).sign(Purpose.BOXES, made.body(self.plan, self.adverts))
        return dataclasses.replace(made, signature=signature)


def test_a_dealer_of_bad_boxes_is_excluded_and_its_victims_are_not(tmp_path: Path) -> None:
    """Two clients that spoil boxes each round would be left alone with their target."""
    world = World(tmp_path, 10, alive_seconds=12.0)
    world.withdraws = True
    world.tamper = Spoiler({"c001": (0, 1), "c002": (0, 1)})
    for name in names(10):
        world.join(name)
    world.pump()
    assert world.run.error is None, world.run.error
    assert set(world.errors) == {"c001", "c002"}
    assert sorted(world.run.state.excluded) == ["c001", "c002"]
    rounds = [r for r in world.store.summary()["rounds"] if r["outcome"] == "done"]
    assert [r["cohort"] for r in rounds] == [list(names(10)[2:])] * 3
    aborted = [r["reason"] for r in world.store.summary()["rounds"] if r["outcome"] == "aborted"]
    assert all("sealed a box for" in reason for reason in aborted)
    world.join("c001")  # it is not admitted again
    assert world.run.over


def altered_inbox(plan: RoundPlan, victims: tuple[str, ...], dealer: str) -> Any:
    """A server that flips a bit in what a dealer sealed for some."""

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Inbox) and recipient in victims:
            boxes = bytearray(message.boxes)
            boxes[m.BOX * masking.neighbourhoods(plan).boxers(recipient).index(dealer)] ^= 1
            return dataclasses.replace(message, boxes=bytes(boxes))
        return message

    return tap


def test_a_server_that_alters_boxes_learns_no_key_by_it() -> None:
    """Complaints would open boxes of everybody else to it. The dealer signed another box."""
    plan = make_plan(7)  # quorum 5
    tap = altered_inbox(plan, ("c004", "c005"), "c006")
    outcome = run_round(plan, make_parties(7), make_updates(plan), tap=tap)
    kinds = [type(m.CATALOGUE.decode(f)) for _, _, f in outcome.frames]
    assert kinds.count(m.Complaint) == kinds.count(m.Evidence) == 2
    assert m.Accusation not in kinds
    assert set(outcome.errors) == {"c004", "c005"}
    assert all("was altered on its way" in str(e) for e in outcome.errors.values())
    assert outcome.round.stage is Stage.DONE  # the others went on
    assert not outcome.round.excluded


@pytest.mark.parametrize(
    "what", ["signature", "boxes of another round", "other adverts", "boxes for others"]
)
def test_evidence_must_be_what_the_dealer_signed_for_these_adverts(what: str) -> None:
    """A server that shows two clients different adverts, or old boxes, must not get a proof."""
    plan, parties = make_plan(5), make_parties(5)
    if what == "boxes of another round":
        kept: list[m.Shares] = []
        run_round(plan, parties, make_updates(plan), tap=lambda s, r, x: (
            kept.append(x) or x if isinstance(x, m.Shares) and s == "c001" else x))  # fmt: skip
        plan = dataclasses.replace(plan, round=2, learning_round=2, rounds=2, base_digest=b"2" * 32)
        vouched(parties, plan)

    flip = altered_inbox(plan, ("c005",), "c001")

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Evidence):
            match what:
                case "signature":
                    return dataclasses.replace(message, signature=bytes(64))
                case "other adverts":
                    dealt = m.Shares(plan.run, plan.round, message.boxes, bytes(64))
                    body = dealt.body(plan, b"a" * 32)
                    signature = identity("c001").sign(Purpose.BOXES, body)
                    return dataclasses.replace(message, signature=signature)
                case "boxes of another round":
                    old = kept[0]
                    return dataclasses.replace(message, boxes=old.boxes, signature=old.signature)
        if isinstance(message, m.Adverts) and what == "boxes for others" and recipient == "c001":
            fewer = tuple(a for a in message.adverts if a.name != "c002")  # places move by one
            return dataclasses.replace(message, adverts=fewer)
        return flip(sender, recipient, message)

    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    kinds = [type(m.CATALOGUE.decode(f)) for _, _, f in outcome.frames]
    assert m.Accusation not in kinds
    if what != "boxes for others":
        assert isinstance(outcome.errors["c005"], errors.SignatureError)


def test_a_dealer_that_signs_nothing_is_excluded() -> None:
    plan = make_plan(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Shares) and sender == "c002":
            boxes = bytes(len(message.boxes))
            return dataclasses.replace(message, boxes=boxes, signature=bytes(64))
        return message

    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert outcome.round.excluded == "c002"
    assert "c002 did not sign the boxes that it dealt" in outcome.round.reason


def test_who_complains_falsely_is_excluded_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = masks_round.unseal

    def unseal(key: bytes, box: bytes, context: bytes, sender: str) -> bytes:
        if sender == "c003" and context.endswith(b"c002"):
            raise errors.SealError("so it says")
        return plain(key, box, context, sender)

    monkeypatch.setattr(masks_round, "unseal", unseal)
    plan = make_plan(5)
    outcome = run_round(plan, make_parties(5), make_updates(plan))
    assert outcome.round.stage is Stage.ABORTED
    assert outcome.round.excluded == "c002"
    assert "c002 says falsely that a box of c003 is bad" in outcome.round.reason
    assert not any(isinstance(m.CATALOGUE.decode(f), m.SurvivorList) for _, _, f in outcome.frames)


def test_an_accusation_shows_one_agreement_and_no_key() -> None:
    """It opens the box of this dealer for this accuser, and the one the other way."""
    plan, parties = make_plan(7), make_parties(7)
    spoiler = Spoiler({"c001": (1,)})
    outcome = run_round(plan, parties, make_updates(plan), tap=spoiler)
    assert outcome.round.excluded == "c001"
    frames = [(s, m.CATALOGUE.decode(f)) for s, r, f in outcome.frames if not r]
    adverts = {s: x for s, x in frames if isinstance(x, m.Advert)}
    (accusation,) = [x for _, x in frames if isinstance(x, m.Accusation)]
    own, other = adverts["c007"].seal_key, adverts["c001"].seal_key
    context = accusation.body(plan, "c007")
    shared = check(accusation.proof, own, other, context)
    key = masking.seal_key(plan, "c002", "c007", shared)
    sent = {s: bytes(x.boxes) for s, x in frames if isinstance(x, m.Shares)}
    with pytest.raises(errors.SealError):  # a box of another dealer
        unseal(key, sent["c002"][m.BOX : 2 * m.BOX], masking.seal_context(plan, "c002", "c007"), "")
    for wrong in (
        accusation.body(plan, "c003"),
        accusation.body(dataclasses.replace(plan, round=2), "c007"),
        dataclasses.replace(accusation, dealer="c003").body(plan, "c007"),
    ):
        with pytest.raises(errors.SignatureError):
            check(accusation.proof, own, other, wrong)


@pytest.mark.parametrize("who", ["a peer that sent no box", "nobody"])
def test_a_complaint_about_nobody_costs_its_sender_alone(who: str) -> None:
    plan = make_plan(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c004" and isinstance(message, m.MaskedUpload):
            return m.Complaint(plan.run, plan.round, "c004" if "peer" in who else "c009")
        return message

    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.DONE
    assert outcome.round.dropped == {"c004": "training"}
    assert "who sent it no box" in outcome.round.faults["c004"]


def test_an_accusation_without_a_proof_excludes_its_sender() -> None:
    plan = make_plan(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c004" and isinstance(message, m.MaskedUpload):
            nothing = AgreementProof(bytes(32), bytes(32), bytes(32))
            return m.Accusation(plan.run, plan.round, "c005", nothing)
        return message

    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert outcome.round.excluded == "c004"


def test_a_maker_that_seals_garbage_is_excluded_and_nothing_is_opened_over_a_few(
    tmp_path: Path,
) -> None:
    """The maker gives the key to a mate and the target only; seven others would withdraw."""
    world = World(tmp_path, 10, protection="bfv", alive_seconds=12.0)
    world.withdraws = True
    sums: list[tuple[str, ...]] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherSum):
            sums.append(message.survivors)
        if not (isinstance(message, m.KeyGrant) and sender == "c001") or not world.run.current:
            return message
        plan, made = world.run.current.plan, []
        for grant in message.grants:
            garbage = dataclasses.replace(grant, box=os.urandom(len(grant.box)))
            body = garbage.body(plan, message.key)
            signature = identity("c001").sign(Purpose.KEY_GRANT, body)
            good = grant.recipient in ("c002", "c003")
            made.append(grant if good else dataclasses.replace(garbage, signature=signature))
        changed = dataclasses.replace(message, grants=tuple(made))
        signature = identity("c001").sign(Purpose.KEY_GRANT, changed.body(plan))
        return dataclasses.replace(changed, signature=signature)

    world.tamper = tap
    for name in names(10):
        world.join(name)
    world.pump()
    assert world.run.error is None, world.run.error
    assert set(world.errors) == {"c001"}
    assert world.run.state.excluded == ("c001",)
    assert "c001 sealed a box for" in world.store.summary()["rounds"][0]["reason"]
    assert set(sums) == {names(10)[1:]}


def test_no_sum_is_opened_over_a_few_even_if_most_withdraw() -> None:
    plan = make_encrypted_plan(10, "bfv")
    gone = dict.fromkeys(names(10)[3:], Stage.COLLECTING)
    outcome = run_round(plan, make_parties(10), make_updates(plan), gone)
    assert outcome.round.stage is Stage.ABORTED
    assert "3 of 10 clients answered while training, 7 are needed" in outcome.round.reason
    assert not outcome.opened


def test_a_false_complaint_about_a_grant_burns_the_key_and_excludes_the_accuser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = keying.unseal

    def unseal(key: bytes, box: bytes, context: bytes, sender: str) -> bytes:
        if context.endswith(b"c003"):
            raise errors.SealError("so it says")
        return plain(key, box, context, sender)

    monkeypatch.setattr(keying, "unseal", unseal)
    plan = make_encrypted_plan(4, "bfv")
    outcome = run_round(plan, make_parties(4), make_updates(plan))
    assert outcome.round.stage is Stage.ABORTED
    assert outcome.round.excluded == "c003"
    assert outcome.round.burnt  # type: ignore[attr-defined]  # the server could read the box


def test_each_grant_is_sealed_to_a_key_of_its_own_keying() -> None:
    plan = make_encrypted_plan(4, "bfv")
    asks: dict[str, bytes] = {}

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.KeyAsk):
            asks[f"{sender} {message.round}"] = message.seal_key
        return message

    parties = make_parties(4)
    run_round(plan, parties, make_updates(plan), {"c001": Stage.KEYING}, tap)
    again = dataclasses.replace(plan, round=2, attempt=2)
    run_round(again, parties, make_updates(plan), tap=tap)
    runs = {p.keyring.secret.public_key().public_bytes_raw() for p in parties.values()}
    assert len(set(asks.values())) == 6
    assert not runs & set(asks.values())
