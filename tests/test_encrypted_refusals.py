"""What clients under bfv and ckks refuse, and that the server cannot decrypt."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
from ciphered import BIG, SCHEMES, keyed
from rounds import (
    OPEN,
    float_sum,
    make_encrypted_plan,
    make_parties,
    make_updates,
)

from secure_fedprompt.clients.cohort_key import CohortKey
from secure_fedprompt.memory import run_round
from secure_fedprompt.protocol import errors, homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.messages import CATALOGUE
from secure_fedprompt.server.rounds.base import Stage


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
    "too few signers": ("c002", m.SumSigned, {"signers": lambda s: s.signers[:2]}, errors.ThresholdError),
    "a signer twice": ("c002", m.SumSigned, {"signers": lambda s: s.signers[:2] * 2}, errors.SurvivorError),
    "an unsigned sum": ("c002", m.SumSigned, {"signers": lambda s: (
        *s.signers[:2], dataclasses.replace(s.signers[2], signature=bytes(64)))}, errors.SignatureError),
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
    assert all(isinstance(e, errors.SumError) for e in outcome.errors.values())


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
