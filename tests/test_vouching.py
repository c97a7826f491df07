"""Whose prompt it is that a client trains from, and with which key its sums are checked."""

from __future__ import annotations

import dataclasses

import pytest
from rounds import (
    identity,
    later,
    make_parties,
    make_plan,
    make_updates,
    names,
    vouched,
)

from secure_fedprompt.clients.sum_key import SumKey
from secure_fedprompt.memory import run_round
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.messages import CATALOGUE


@pytest.mark.parametrize("vouching", [0, 2, 3, 4])
def test_who_missed_a_sum_takes_a_prompt_from_c_plus_one_others(vouching: int) -> None:
    """Five clients, c = 2: three must vouch, or it waits for another round."""
    plan, parties = later(make_plan(5), 2), make_parties(5)
    for name in names(5)[:vouching]:
        vouched({name: parties[name]}, plan)
    outcome = run_round(plan, parties, make_updates(plan))
    enough = vouching >= 3
    refused = () if enough else names(5)[vouching:]
    assert set(outcome.errors) == set(refused)
    for error in outcome.errors.values():
        assert isinstance(error, errors.AdvertMismatchError)
        assert f"{vouching} clients vouch" in str(error)
        assert "needs 3" in str(error)
    for name in names(5)[vouching:] if enough else ():  # believed, and not vouched for
        assert parties[name].journal.made(plan.run, 2) == (plan.base_digest, False)


def test_who_believed_others_does_not_vouch_itself() -> None:
    plan, parties = later(make_plan(5), 2), make_parties(5)
    vouched({name: parties[name] for name in names(4)}, plan)
    parties["c005"].journal.note_made(plan.run, 2, plan.base_digest, own=False)
    outcome = run_round(plan, parties, make_updates(plan))
    assert not outcome.errors
    adverts = [x for s, _, f in outcome.frames if s and isinstance(x := CATALOGUE.decode(f), m.Advert)]  # fmt: skip
    assert {advert.name: advert.vouches for advert in adverts} == {
        **dict.fromkeys(names(4), 1), "c005": 0,
    }  # fmt: skip


def test_nobody_vouches_for_another_prompt_than_its_own() -> None:
    plan, parties = later(make_plan(5), 2), make_parties(5)
    other = dataclasses.replace(plan, base_digest=b"x" * 32)
    vouched(parties, other)
    outcome = run_round(plan, parties, make_updates(plan))
    adverts = [x for s, _, f in outcome.frames if s and isinstance(x := CATALOGUE.decode(f), m.Advert)]  # fmt: skip
    assert [advert.vouches for advert in adverts] == [0] * 5
    assert set(outcome.errors) == set(names(5))


@pytest.mark.parametrize("at_server", [True, False])
def test_a_client_vouches_once(monkeypatch: pytest.MonkeyPatch, at_server: bool) -> None:
    """Or c colluders would be as many as they like: 255 of one, and nobody else's."""
    plan, parties = later(make_plan(5), 2), make_parties(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Advert) and sender == "c005" and at_server:
            message = dataclasses.replace(message, vouches=255)
            return m.signed(message, identity("c005"), Purpose.ADVERT, plan)
        if isinstance(message, m.Adverts) and not at_server:
            many = dataclasses.replace(message.adverts[4], vouches=255)
            many = m.signed(many, identity("c005"), Purpose.ADVERT, plan)
            kept = message.adverts[4] if recipient == "c005" else many
            return dataclasses.replace(message, adverts=(*message.adverts[:4], kept))
        return message

    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    assert "0 clients vouch" in str(outcome.errors["c001"])
    if at_server:
        assert "c005 vouches 255 times" in outcome.round.faults["c005"]


@pytest.mark.parametrize("field", ["vouches", "key"])
def test_what_an_advert_says_of_prompt_and_key_is_signed(field: str) -> None:
    plan, parties = make_plan(5), make_parties(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Adverts) and recipient == "c001":
            first, second, *rest = message.adverts
            changed = dataclasses.replace(second, **{field: 0 if field == "vouches" else bytes(32)})
            return dataclasses.replace(message, adverts=(first, changed, *rest))
        return message

    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    assert isinstance(outcome.errors["c001"], errors.SignatureError)


def test_a_client_with_another_key_is_not_in_the_round() -> None:
    plan, parties = make_plan(5), make_parties(5)
    parties["c002"].keyring.sums = SumKey(b"x" * 32)
    outcome = run_round(plan, parties, make_updates(plan))
    assert isinstance(outcome.errors["c002"], errors.KeyMismatchError)
    assert set(outcome.opened) == set(names(5)) - {"c002"}


def test_a_quorum_has_said_which_key_it_is_before_it_is_used() -> None:
    """A server that lets another key pass, as its holder signed for it, splits nobody off."""
    plan, parties = make_plan(5), make_parties(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Adverts) and recipient == "c001":
            first, second, *rest = message.adverts
            other = dataclasses.replace(second, key=bytes(32))
            other = m.signed(other, identity(second.name), Purpose.ADVERT, plan)
            return dataclasses.replace(message, adverts=(first, other, *rest))
        return message

    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    assert "c002 holds another sum key" in str(outcome.errors["c001"])
    assert isinstance(outcome.errors["c001"], errors.AdvertMismatchError)
