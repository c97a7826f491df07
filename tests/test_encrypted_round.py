"""Rounds under bfv and ckks in memory: sums, dropouts, keys, and everything that is refused."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ciphered import BIG, SCHEMES, keyed
from rounds import (
    float_sum,
    identity,
    later,
    make_encrypted_plan,
    make_parties,
    make_updates,
)

from secure_fedprompt.clients.cohort_key import CohortKey, open_prompt
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.memory import NEXT_PROMPT, SimulatedRound, run_round
from secure_fedprompt.protocol import errors, homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.messages import CATALOGUE
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan
from secure_fedprompt.server.rounds.base import Deadlines, Stage
from secure_fedprompt.server.rounds.encrypted import EncryptedRound
from secure_fedprompt.server.rounds.start import make_round


def check(plan: RoundPlan, updates: dict[str, Any], outcome: SimulatedRound, who: Any) -> None:
    assert outcome.round.stage is Stage.DONE, outcome.round.reason
    opened = list(outcome.opened.values())
    assert all((o.integers == opened[0].integers).all() for o in opened)
    decoded = np.concatenate([opened[0].total[f.name].reshape(-1) for f in plan.layout])
    steps = np.concatenate([np.full(f.size, 2.0**-f.frac) for f in plan.layout])
    assert (np.abs(decoded - float_sum(plan, updates, who)) <= len(list(who)) * steps).all()
    assert outcome.round.result is None
    assert outcome.round.integers is None


@pytest.mark.parametrize("protection", SCHEMES)
@pytest.mark.parametrize("clients", [2, 3, 10])
def test_clients_open_the_sum_and_the_server_does_not(protection: str, clients: int) -> None:
    plan = make_encrypted_plan(clients, protection, tensors=BIG)
    updates = make_updates(plan)
    outcome = run_round(plan, make_parties(clients), updates)
    check(plan, updates, outcome, plan.cohort)
    assert len(outcome.opened) == clients
    assert isinstance(outcome.round, EncryptedRound)
    assert NEXT_PROMPT not in outcome.round.sealed


@pytest.mark.parametrize(
    ("stage", "inside"),
    [
        (Stage.COLLECTING, False),
        (Stage.CONSISTENCY, True),
        (Stage.OPENING, True),
        (Stage.REPORTING, True),
    ],
)
@pytest.mark.parametrize("who", ["c001", "c003"])
def test_a_dropout_at_any_stage_costs_nothing(stage: Stage, inside: bool, who: str) -> None:
    plan = make_encrypted_plan(5, "bfv")
    updates = make_updates(plan)
    outcome = run_round(plan, make_parties(5), updates, {who: stage})
    check(plan, updates, outcome, [n for n in plan.cohort if inside or n != who])
    assert outcome.round.dropped == ({} if inside else {who: "training"})


def test_a_maker_that_vanishes_aborts_the_round_by_name() -> None:
    plan = make_encrypted_plan(4, "bfv")
    outcome = run_round(plan, make_parties(4), make_updates(plan), {"c001": Stage.KEYING})
    assert outcome.round.stage is Stage.ABORTED
    assert "key maker c001" in outcome.round.reason


def test_too_few_uploads_abort() -> None:
    plan = make_encrypted_plan(4, "bfv")
    gone = {"c003": Stage.COLLECTING, "c004": Stage.COLLECTING}
    outcome = run_round(plan, make_parties(4), make_updates(plan), gone)
    assert outcome.round.stage is Stage.ABORTED
    assert not outcome.opened


def test_a_later_round_needs_no_keying_and_a_newcomer_gets_the_same_key() -> None:
    plan, parties = keyed(4)
    updates = make_updates(plan, 1)
    outcome = run_round(plan, parties, updates)
    check(plan, updates, outcome, plan.cohort)
    kinds = {type(CATALOGUE.decode(f)) for _, _, f in outcome.frames}
    assert not kinds & {m.KeyRequest, m.KeyGrant, m.KeyBox}
    parties["c003"] = make_parties(4, seed="again")["c003"]  # restarted: the key is gone
    third = later(plan, 3, grants=("c003",))
    outcome = run_round(third, parties, make_updates(plan, 2))
    check(third, make_updates(plan, 2), outcome, plan.cohort)
    assert {p.keyring.cohort.digest for p in parties.values() if p.keyring.cohort} == {plan.key}


def test_a_reelected_maker_makes_a_new_key_under_which_the_prompt_still_opens() -> None:
    plan, parties = keyed(4)
    old = parties["c002"].keyring.cohort
    assert old is not None
    box = old.seal_prompt(plan.run, 2, b"prompt")
    again = later(plan, 3, maker="c002", election=2, key=NO_KEY, grants=("c001", "c003", "c004"))
    outcome = run_round(again, parties, make_updates(again, 3))
    check(again, make_updates(again, 3), outcome, plan.cohort)
    new = parties["c001"].keyring.cohort
    assert new is not None
    assert new.digest != old.digest
    assert new._secret != old._secret
    assert open_prompt(new.prompt_key, plan.run, 2, box) == b"prompt"


def test_a_client_without_the_plans_key_says_so() -> None:
    plan, parties = keyed(4)
    parties["c002"] = make_parties(4, seed="again")["c002"]
    outcome = run_round(plan, parties, make_updates(plan, 1))
    assert isinstance(outcome.errors["c002"], errors.KeyMismatchError)
    assert outcome.round.stage is Stage.DONE
    assert outcome.round.dropped == {"c002": "training"}


def signed_upload(
    name: str, plan: RoundPlan, upload: m.CipherUpload, **changes: Any
) -> m.CipherUpload:
    made = dataclasses.replace(upload, **changes)
    return dataclasses.replace(made, signature=identity(name).sign(Purpose.UPLOAD, made.body(plan)))


def with_upload(
    change: Callable[[RoundPlan, m.CipherUpload], m.CipherUpload], clients: int = 4
) -> SimulatedRound:
    """A round in which c002's upload is altered on its way."""
    plan = make_encrypted_plan(clients, "bfv", tensors=BIG)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        altered = sender == "c002" and isinstance(message, m.CipherUpload)
        return change(plan, message) if altered else message  # type: ignore[arg-type]

    outcome = run_round(plan, make_parties(clients), make_updates(plan), tap=tap)
    check(plan, make_updates(plan), outcome, [n for n in plan.cohort if n != "c002"])
    return outcome


UPLOADS: dict[str, tuple[Callable[[RoundPlan, m.CipherUpload], m.CipherUpload], str]] = {
    "truncated": (lambda p, u: signed_upload("c002", p, u, ciphertexts=(u.ciphertexts[0], u.ciphertexts[1][:-9])), "CiphertextError"),
    "altered": (lambda p, u: dataclasses.replace(u, ciphertexts=(bytes(u.ciphertexts[0])[:-1] + b"\0", u.ciphertexts[1])), "SignatureError"),
    "swapped in the upload": (lambda p, u: dataclasses.replace(u, ciphertexts=u.ciphertexts[::-1]), "SignatureError"),
    "too few": (lambda p, u: signed_upload("c002", p, u, ciphertexts=u.ciphertexts[:1]), "CiphertextError"),
    "too many": (lambda p, u: signed_upload("c002", p, u, ciphertexts=u.ciphertexts * 2), "CiphertextError"),
    "none": (lambda p, u: signed_upload("c002", p, u, ciphertexts=()), "CiphertextError"),
    "another key": (lambda p, u: signed_upload("c002", p, u, key=b"k" * 32), "KeyMismatchError"),
    "unsigned": (lambda p, u: dataclasses.replace(u, signature=bytes(64)), "SignatureError"),
    "signed by another": (lambda p, u: signed_upload("c003", p, u), "SignatureError"),
    "another set": (lambda p, u: signed_upload("c002", p, u, ciphertexts=CohortKey.make(
        homomorphic.Scheme("ckks", homomorphic.choose("ckks", 4)), os.urandom).encrypt(np.arange(2100))), "CiphertextError"),
}  # fmt: skip


@pytest.mark.parametrize("case", UPLOADS)
def test_bad_uploads_are_named_and_cost_only_their_sender(case: str) -> None:
    change, error = UPLOADS[case]
    outcome = with_upload(change)
    assert outcome.round.faults["c002"].startswith(error)


def test_an_upload_of_another_client_or_round_does_not_pass_as_ones_own() -> None:
    plan, parties = keyed(4)
    kept: dict[str, m.Message] = {}

    def record(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherUpload):
            kept[sender] = message
        return message

    run_round(plan, parties, make_updates(plan, 1), tap=record)
    third = later(plan, 3)

    def swap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c002" and isinstance(message, m.CipherUpload):
            return dataclasses.replace(kept["c003"], round=3)  # type: ignore[type-var]
        if sender == "c003" and isinstance(message, m.CipherUpload):
            return dataclasses.replace(kept["c003"], round=3)  # type: ignore[type-var]
        return message

    outcome = run_round(third, parties, make_updates(plan, 2), tap=swap)
    assert {n: f.split(":")[0] for n, f in outcome.round.faults.items()} == {
        "c002": "SignatureError", "c003": "SignatureError",
    }  # fmt: skip


def with_grant(change: Callable[[RoundPlan, m.KeyGrant], m.KeyGrant]) -> SimulatedRound:
    plan = make_encrypted_plan(4, "bfv")

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        return change(plan, message) if isinstance(message, m.KeyGrant) else message

    outcome = run_round(plan, make_parties(4), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.ABORTED
    assert not any(isinstance(CATALOGUE.decode(f), m.KeyBox) for _, _, f in outcome.frames)
    return outcome


def signed_grant(plan: RoundPlan, grant: m.KeyGrant, **changes: Any) -> m.KeyGrant:
    made = dataclasses.replace(grant, **changes)
    return dataclasses.replace(
        made, signature=identity("c001").sign(Purpose.KEY_GRANT, made.body(plan))
    )


SECRET = homomorphic.Scheme("bfv", homomorphic.choose("bfv", 4))


GRANTS: dict[str, tuple[Callable[[RoundPlan, m.KeyGrant], m.KeyGrant], str]] = {
    "secret key in the context": (lambda p, g: signed_grant(p, g, context=CohortKey.make(SECRET, os.urandom)._secret), "SecretKeyError"),
    "another context": (lambda p, g: signed_grant(p, g, context=b"x"), "KeyMismatchError"),
    "altered context": (lambda p, g: dataclasses.replace(g, context=b"x"), "SignatureError"),
    "a recipient missing": (lambda p, g: signed_grant(p, g, grants=g.grants[1:]), "FieldError"),
    "a recipient twice": (lambda p, g: signed_grant(p, g, grants=(g.grants[0], *g.grants[:2])), "FieldError"),
    "no key": (lambda p, g: signed_grant(p, g, key=NO_KEY), "KeyMismatchError"),
    "another key in the grants": (lambda p, g: signed_grant(p, g, key=b"k" * 32), "SignatureError"),
    "unsigned": (lambda p, g: dataclasses.replace(g, signature=bytes(64)), "SignatureError"),
}  # fmt: skip


@pytest.mark.parametrize("case", GRANTS)
def test_bad_grants_abort_the_round_and_are_named(case: str) -> None:
    change, error = GRANTS[case]
    assert with_grant(change).round.faults["c001"].startswith(error)


def test_a_second_key_in_one_election_is_refused() -> None:
    plan, parties = keyed(4)
    parties["c003"] = make_parties(4, seed="again")["c003"]
    held = parties["c001"].keyring.cohort
    assert held is not None
    plan = dataclasses.replace(plan, grants=("c003",))

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if not isinstance(message, m.KeyGrant):
            return message
        (grant,) = message.grants
        body = grant.body(plan, b"k" * 32)
        grant = dataclasses.replace(grant, signature=identity("c001").sign(Purpose.KEY_GRANT, body))
        return signed_grant(plan, message, key=b"k" * 32, grants=(grant,))

    outcome = run_round(plan, parties, make_updates(plan, 1), tap=tap)
    assert outcome.round.faults["c001"].startswith("KeyMismatchError")
    assert plan.key.hex()[:16] in outcome.round.faults["c001"]


def test_a_key_that_the_server_was_shown_is_burnt() -> None:
    outcome = with_grant(GRANTS["secret key in the context"][0])
    assert isinstance(outcome.round, EncryptedRound)
    assert outcome.round.burnt
    assert not outcome.round.keyed


def test_a_client_that_withdraws_while_others_get_the_key_is_not_waited_for() -> None:
    plan, parties = keyed(5)
    parties["c003"] = make_parties(5, seed="again")["c003"]
    plan = dataclasses.replace(plan, grants=("c003",))
    run_keys = {name: party.ready(plan.run) for name, party in parties.items()}
    server = make_round(plan, b"", parties["c001"].roster, Deadlines(1, 900), run_keys)
    server.start(0.0)
    assert server.stage is Stage.ASKING
    _, (ask,) = start(parties["c003"], plan)
    ((maker, request),) = server.on("c003", ask, 0.0)
    assert maker == "c001"
    server.on("c002", m.Withdraw(plan.run, plan.round, "SealError", ""), 0.0)
    assert server.stage is Stage.KEYING
    assert "c002" in server.faults
    assert not server.involves("c002")
    assert server.gone("c004", 0.0) == []
    state, _ = start(parties["c001"], plan)
    _, replies = state.on(request)
    server.on("c001", replies[0], 0.0)
    assert server.stage is Stage.COLLECTING
    assert server.waiting == {"c001", "c003", "c005"}


def test_early_uploads_are_kept_only_from_holders() -> None:
    plan, parties = keyed(4)
    plan = dataclasses.replace(plan, grants=("c003",))
    run_keys = {name: party.ready(plan.run) for name, party in parties.items()}
    server = make_round(plan, b"", parties["c001"].roster, Deadlines(1, 900), run_keys)
    assert isinstance(server, EncryptedRound)
    server.start(0.0)
    _, (ask,) = start(make_parties(4, seed="again")["c003"], plan)
    server.on("c003", ask, 0.0)
    assert server.stage is Stage.KEYING
    upload = m.CipherUpload(plan.run, plan.round, plan.key, (b"x",), bytes(16), bytes(64))
    for sender, message in (
        ("c003", upload), ("outsider", upload), ("c002", dataclasses.replace(upload, round=1)),
    ):  # fmt: skip
        server.on(sender, message, 0.0)
    assert not server._early
    server.on("c002", upload, 0.0)
    assert set(server._early) == {"c002"}
