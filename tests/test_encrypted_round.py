"""Rounds under bfv and ckks in memory: sums, dropouts, keys, and everything that is refused."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
from rounds import (
    OPEN,
    float_sum,
    identity,
    later,
    make_encrypted_plan,
    make_parties,
    make_updates,
)

from secure_fedprompt.clients.cohort_key import CohortKey
from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.memory import NEXT_PROMPT, SimulatedRound, run_round
from secure_fedprompt.protocol import errors, homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.messages import CATALOGUE
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan
from secure_fedprompt.server.rounds.base import Deadlines, Stage
from secure_fedprompt.server.rounds.encrypted import EncryptedRound
from secure_fedprompt.server.rounds.start import make_round

SCHEMES = homomorphic.SCHEMES
BIG = (TensorSpec("ctx", (40, 60)),)


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
    [(Stage.COLLECTING, False), (Stage.OPENING, True), (Stage.REPORTING, True)],
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


def keyed(count: int, protection: str = "bfv") -> tuple[RoundPlan, dict[str, Party]]:
    """A plan of a later round, and clients that hold the key."""
    first = make_encrypted_plan(count, protection)
    parties = make_parties(count)
    outcome = run_round(first, parties, make_updates(first))
    assert isinstance(outcome.round, EncryptedRound)
    return later(first, key=outcome.round.key, grants=()), parties


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
    assert new.open_prompt(plan.run, 2, box) == b"prompt"


def test_a_client_without_the_plans_key_says_so() -> None:
    plan, parties = keyed(4)
    parties["c002"] = make_parties(4, seed="again")["c002"]
    outcome = run_round(plan, parties, make_updates(plan, 1))
    assert isinstance(outcome.errors["c002"], errors.KeyMismatchError)
    assert outcome.round.stage is Stage.DONE
    assert outcome.round.dropped == {"c002": "training"}


# -- the server refuses --------------------------------------------------------------------------


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
    upload = m.CipherUpload(plan.run, plan.round, plan.key, (b"x",), bytes(64))
    for sender, message in (
        ("c003", upload), ("outsider", upload), ("c002", dataclasses.replace(upload, round=1)),
    ):  # fmt: skip
        server.on(sender, message, 0.0)
    assert not server._early
    server.on("c002", upload, 0.0)
    assert set(server._early) == {"c002"}


# -- clients refuse ------------------------------------------------------------------------------


def replace_for(
    name: str, kind: type, **changes: Any
) -> Callable[[str, str, m.Message], m.Message]:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if recipient == name and isinstance(message, kind):
            made = {k: v(message) if callable(v) else v for k, v in changes.items()}
            return dataclasses.replace(message, **made)  # type: ignore[type-var]
        return message

    return tap


def spoil(box: Any) -> bytes:
    return bytes([box[0] ^ 1]) + bytes(box[1:])


CLIENTS: dict[str, tuple[str, type, dict[str, Any], type[Exception]]] = {
    "request for others": ("c001", m.KeyRequest, {"recipients": lambda r: (
        *r.recipients[:2], dataclasses.replace(r.recipients[2], name="c009"))}, errors.AdvertMismatchError),
    "request twice": ("c001", m.KeyRequest, {"recipients": lambda r: r.recipients[:1] * 2}, errors.AdvertMismatchError),
    "two equal run keys": ("c001", m.KeyRequest, {"recipients": lambda r: (
        *r.recipients[:2], dataclasses.replace(r.recipients[2], seal_key=r.recipients[0].seal_key))}, errors.AdvertMismatchError),
    "unsigned run key": ("c001", m.KeyRequest, {"recipients": lambda r: (
        *r.recipients[:2], dataclasses.replace(r.recipients[2], signature=bytes(64)))}, errors.SignatureError),
    "replaced run key": ("c001", m.KeyRequest, {"recipients": lambda r: (
        *r.recipients[:2], dataclasses.replace(r.recipients[2], seal_key=bytes(31) + b"\x09"))}, errors.SignatureError),
    "run key of another run": ("c001", m.KeyRequest, {"recipients": lambda r: (
        *r.recipients[:2], dataclasses.replace(r.recipients[2], run=b"x" * 16))}, errors.ReplayError),
    "box for another": ("c002", m.KeyBox, {"grant": lambda b: dataclasses.replace(b.grant, recipient="c003")}, errors.AdvertMismatchError),
    "altered box": ("c002", m.KeyBox, {"grant": lambda b: dataclasses.replace(b.grant, box=spoil(b.grant.box))}, errors.SignatureError),
    "another key digest": ("c002", m.KeyBox, {"key": b"k" * 32}, errors.SignatureError),
    "another maker key": ("c002", m.KeyBox, {"maker": lambda b: dataclasses.replace(b.maker, seal_key=bytes(31) + b"\x09")}, errors.SignatureError),
    "sum without us": ("c002", m.CipherSum, {"survivors": ("c001", "c003", "c004")}, errors.SurvivorError),
    "too few survivors": ("c002", m.CipherSum, {"survivors": ("c001", "c002")}, errors.ThresholdError),
    "wrong survivor count": ("c002", m.CipherSum, {"survivors": ("c001", "c002", "c003")}, errors.DecryptionError),
    "unsorted survivors": ("c002", m.CipherSum, {"survivors": ("c002", "c001", "c003", "c004")}, errors.SurvivorError),
    "swapped ciphertexts": ("c002", m.CipherSum, {"ciphertexts": lambda s: s.ciphertexts[::-1]}, errors.DecryptionError),
    "truncated sum": ("c002", m.CipherSum, {"ciphertexts": lambda s: s.ciphertexts[:1]}, errors.CiphertextError),
    "cut ciphertext": ("c002", m.CipherSum, {"ciphertexts": lambda s: (s.ciphertexts[0], s.ciphertexts[1][:-9])}, errors.CiphertextError),
    "request of an earlier round": ("c002", m.SealedRequest, {"round": 0}, errors.ReplayError),
}  # fmt: skip


@pytest.mark.parametrize("case", CLIENTS)
def test_clients_refuse_by_name(case: str) -> None:
    name, kind, changes, error = CLIENTS[case]
    plan = make_encrypted_plan(4, "bfv", tensors=BIG)
    if kind is m.SealedRequest:
        name = "c001"  # the first is asked
    outcome = run_round(
        plan, make_parties(4), make_updates(plan), tap=replace_for(name, kind, **changes)
    )
    assert isinstance(outcome.errors[name], error), outcome.errors


def test_a_client_whose_key_is_another_gets_no_prompt_and_is_noticed() -> None:
    plan, parties = keyed(4)
    held = parties["c003"].keyring.cohort
    assert held is not None
    wrong = CohortKey.make(held.scheme, os.urandom)
    wrong.digest = held.digest  # claims the right one
    parties["c003"].keyring.cohort = wrong
    outcome = run_round(plan, parties, make_updates(plan, 1))
    assert outcome.round.stage is Stage.ABORTED  # its upload poisons the sum, and nobody trusts it
    assert all(isinstance(e, errors.DecryptionError) for e in outcome.errors.values())


def test_clients_that_open_other_prompts_are_outvoted_and_named() -> None:
    plan = make_encrypted_plan(4, "bfv")

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Opened) and sender == "c001":
            return dataclasses.replace(message, sealed=b"x" * 32)
        return message

    outcome = run_round(plan, make_parties(4), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.DONE
    assert "another prompt" in outcome.round.faults["c001"]


def test_another_box_than_announced_is_refused_and_the_next_client_is_asked() -> None:
    plan = make_encrypted_plan(4, "bfv")

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.SealedPrompt) and sender == "c001":
            return dataclasses.replace(message, box=b"x")
        return message

    outcome = run_round(plan, make_parties(4), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.DONE
    assert outcome.round.faults["c001"].startswith("FieldError")


def test_plans_with_inconsistent_keying_are_refused() -> None:
    plan = make_encrypted_plan(4, "bfv")
    plan.check()
    wrong: list[dict[str, Any]] = [
        {"grants": ("c002",)},
        {"grants": ("c001", "c002", "c003", "c004")},
        {"grants": ("c003", "c002", "c004")},
        {"maker": "c009"},
        {"parameters": homomorphic.NONE},
        {"parameters": homomorphic.choose("ckks", 4)},
        {"parameters": homomorphic.choose("bfv", 3)},
        {"parameters": dataclasses.replace(plan.parameters, plain_bits=50)},
        {"protection": "masks"},
    ]
    for changes in wrong:
        with pytest.raises(errors.PlanError):
            dataclasses.replace(plan, **changes).check()


def test_policies_limit_schemes_survivors_and_makers() -> None:
    import msgspec

    plan = make_encrypted_plan(4, "bfv")
    cases = [
        ({"protections": ("masks",)}, "protections"),
        ({"min_survivors": 4}, "min_survivors"),
        ({"key_makers": ("c002", "c003")}, "key_makers"),
        ({"colluders": 2}, "colluders"),
    ]
    for change, words in cases:
        policy = msgspec.structs.replace(OPEN, **change)
        with pytest.raises(errors.PolicyError, match=words):
            policy.check_plan(plan, 4)


# -- what the server could do with what it saw -----------------------------------------------------


def every_byte(thing: Any, seen: set[int]) -> Iterator[bytes]:
    """All bytes that can be reached from an object of the server."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, bytes | memoryview | np.ndarray):
        yield bytes(thing)
    elif isinstance(thing, dict):
        for item in [*thing.keys(), *thing.values()]:
            yield from every_byte(item, seen)
    elif isinstance(thing, list | tuple | set | frozenset):
        for item in thing:
            yield from every_byte(item, seen)
    elif hasattr(thing, "__dict__"):
        yield from every_byte(vars(thing), seen)


@pytest.mark.parametrize("protection", SCHEMES)
def test_the_server_cannot_decrypt_with_every_byte_it_saw(protection: str) -> None:
    plan = make_encrypted_plan(4, protection)
    parties, updates = make_parties(4), make_updates(plan)
    outcome = run_round(plan, parties, updates)
    held = parties["c001"].keyring.cohort
    assert held is not None
    seen = (
        b"".join(f for s, r, f in outcome.frames if not s or not r)
        + repr(vars(outcome.round)).encode()
    )
    secret = held.scheme.read(seal.SecretKey(), held._secret)
    inner = secret.data()
    raw = inner.dyn_array()
    words = b"".join(raw[i].to_bytes(8, "little") for i in range(4))
    assert any(words)
    for needle in (held._secret[200:232], held._secret, held.prompt_key, words):
        assert needle not in seen
    outcome.round.leak = [held._secret]  # type: ignore[attr-defined]
    assert held._secret in b"".join(every_byte(outcome.round, set()))  # the search looks there
    # Nor does any piece of any frame parse as a key.
    for _, _, frame in outcome.frames:
        message = CATALOGUE.decode(frame)
        blobs = [b for b in vars(message).values() if isinstance(b, bytes | memoryview)]
        if isinstance(message, m.KeyBox):
            blobs.append(message.grant.box)
        if isinstance(message, m.CipherUpload | m.CipherSum):
            blobs += message.ciphertexts
        for blob in blobs:
            with pytest.raises(errors.CiphertextError):
                held.scheme.read(seal.SecretKey(), bytes(blob))
    # With the key, the same bytes are readable: the search could have found something.
    upload = next(
        CATALOGUE.decode(f) for s, r, f in outcome.frames
        if s == "c002" and isinstance(CATALOGUE.decode(f), m.CipherUpload)
    )  # fmt: skip
    opened = held.decrypt(tuple(map(bytes, upload.ciphertexts)), 15, plan.digest)
    weighted = float_sum(plan, updates, ["c002"])[:15]
    low = opened if protection == "ckks" else ((opened + 2**31) & (2**32 - 1)) - 2**31
    assert np.abs(low / 2.0 ** plan.layout[0].frac - weighted).max() <= 2.0 ** -plan.layout[0].frac


def test_ciphertexts_of_equal_updates_are_unrelated() -> None:
    plan, parties = keyed(3)
    updates = {name: make_updates(plan, 9)["c001"] for name in plan.cohort}
    outcome = run_round(plan, parties, updates)
    uploads = [
        CATALOGUE.decode(f) for s, r, f in outcome.frames
        if not r and isinstance(CATALOGUE.decode(f), m.CipherUpload)
    ]  # fmt: skip
    held = parties["c001"].keyring.cohort
    assert held is not None
    parsed = [held.scheme.ciphertext(u.ciphertexts[0]) for u in uploads]
    both = [p.dyn_array() for p in parsed]
    q = held.scheme.settings.coeff_modulus()[0].value()
    for a, b in ((0, 1), (1, 2)):
        difference = np.array([(both[a][i] - both[b][i]) % q for i in range(4096)], np.uint64)
        counts = np.bincount((difference >> np.uint64(46)).astype(int), minlength=256)
        assert ((counts - 16) ** 2 / 16).sum() < 400  # uniform residues, mean 255
