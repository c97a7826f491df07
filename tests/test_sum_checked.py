"""A server that returns something else than the sum, under bfv and ckks: it worked, and is refused."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audited import VICTIM, audited, failures
from ciphered import BIG, keyed
from federation import World
from rich.console import Console
from rounds import identity, make_encrypted_plan, make_parties, make_updates, names

from secure_fedprompt import client
from secure_fedprompt.clients.file_journal import FileJournal
from secure_fedprompt.clients.rounds.encrypted import Opening, Sent, Signing
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.clients.session import Session
from secure_fedprompt.host.log import Log
from secure_fedprompt.memory import SimulatedRound, run_round
from secure_fedprompt.protocol import errors, homomorphic, mersenne, sum_tag
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.sum_tag import TagKey
from secure_fedprompt.server.opening import Pending
from secure_fedprompt.server.rounds.base import Stage
from secure_fedprompt.server.rounds.encrypted import EncryptedRound

Forge = Callable[[RoundPlan, dict[str, m.CipherUpload], Pending], dict[str, Any]]


def added(plan: RoundPlan, uploads: list[m.CipherUpload]) -> dict[str, Any]:
    """What a server makes of these uploads, and of their tags."""
    scheme = homomorphic.scheme(plan.protection, plan.parameters)
    total = homomorphic.RunningSum(scheme, len(uploads[0].ciphertexts))
    for upload in uploads:
        total.add(upload.ciphertexts)
    tags = mersenne.total(np.stack([sum_tag.from_bytes(u.tag) for u in uploads]))
    return {"ciphertexts": total.result(), "tag": sum_tag.to_bytes(tags)}


def one_for_all(
    plan: RoundPlan, uploads: dict[str, m.CipherUpload], honest: Pending
) -> dict[str, Any]:
    """One client's upload as often as there are clients: counters and bounds agree."""
    return added(plan, [uploads["c001"]] * len(honest.survivors))


Case = tuple[Forge, type[Exception]]
FORGED: dict[str, Case] = {
    "one upload in the place of all": (one_for_all, errors.SumError),
    "a single upload": (
        lambda plan, uploads, honest: added(plan, [uploads["c001"]]), errors.SumError),
    "a subset under the full list": (
        lambda plan, uploads, honest: added(
            plan, [u for name, u in uploads.items() if name != "c001"]), errors.SumError),
    "one of them twice": (
        lambda plan, uploads, honest: added(
            plan, [uploads[name] for name in ("c001", "c001", "c002", "c003")]), errors.SumError),
    "swapped ciphertexts": (
        lambda plan, uploads, honest: {"ciphertexts": honest.ciphertexts[::-1]}, errors.SumError),
    "another tag": (
        lambda plan, uploads, honest: {"tag": bytes(15) + b"\x01"}, errors.SumError),
    "a tag that is none": (lambda plan, uploads, honest: {"tag": b"\xff" * 16}, errors.FieldError),
    "a ciphertext too few": (
        lambda plan, uploads, honest: {"ciphertexts": honest.ciphertexts[:1]},
        errors.CiphertextError),
    "a cut ciphertext": (
        lambda plan, uploads, honest: {
            "ciphertexts": (honest.ciphertexts[0], honest.ciphertexts[1][:-9])},
        errors.CiphertextError),
}  # fmt: skip


def forged(
    monkeypatch: pytest.MonkeyPatch, protection: str, forge: Forge
) -> tuple[RoundPlan, SimulatedRound, dict[str, Any]]:
    """A round of a server that shows all clients the same forgery."""
    plan, parties = keyed(4, protection, tensors=BIG)
    uploads: dict[str, m.CipherUpload] = {}
    honest = EncryptedRound._summed

    def keep(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherUpload):
            uploads[sender] = message
        return message

    def summed(self: EncryptedRound, names: tuple[str, ...]) -> Pending:
        made = honest(self, names)
        return dataclasses.replace(made, **forge(plan, uploads, made))

    monkeypatch.setattr(EncryptedRound, "_summed", summed)
    updates = make_updates(plan, 1)
    return plan, run_round(plan, parties, updates, tap=keep), {"parties": parties, **updates}


@pytest.mark.parametrize("protection", homomorphic.SCHEMES)
@pytest.mark.parametrize("what", FORGED)
def test_what_is_not_the_sum_is_refused(
    monkeypatch: pytest.MonkeyPatch, protection: str, what: str
) -> None:
    forge, expected = FORGED[what]
    plan, outcome, made = forged(monkeypatch, protection, forge)
    assert set(outcome.errors) == set(names(4))
    assert {type(error) for error in outcome.errors.values()} == {expected}
    assert not outcome.opened
    for victim in made["parties"].values() if expected is errors.SumError else ():
        assert victim.keyring.cohort is None
        later = dataclasses.replace(plan, round=9, learning_round=9, rounds=9)
        with pytest.raises(errors.SumError, match="over for this client"):
            start(victim, later)


def test_without_tags_one_upload_could_be_returned_as_the_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And its owner's update read by all: every other check of a client holds."""
    monkeypatch.setattr(TagKey, "holds", lambda *_: True)
    plan, outcome, made = forged(monkeypatch, "bfv", one_for_all)
    assert not outcome.errors
    found = outcome.opened["c002"]
    assert (found.integers % 4 == 0).all()
    values, weight = made["c001"]
    read = found.total["ctx"] / 4 / weight
    scaled = values["ctx"] * min(1.0, plan.clip / np.abs(values["ctx"]).max())
    assert np.abs(read - scaled).max() < 1e-4


def test_the_sum_of_another_round_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, parties = keyed(4)
    sums: list[Pending] = []
    honest = EncryptedRound._summed

    def summed(self: EncryptedRound, names: tuple[str, ...]) -> Pending:
        sums.append(honest(self, names))
        return dataclasses.replace(sums[0], plan=self.plan)

    monkeypatch.setattr(EncryptedRound, "_summed", summed)
    updates = make_updates(plan, 1)
    assert run_round(plan, parties, updates).round.stage is Stage.DONE
    base = (7).to_bytes(32, "little")
    again = dataclasses.replace(plan, round=3, learning_round=3, rounds=3, base_digest=base)
    outcome = run_round(again, parties, updates)
    assert {type(error) for error in outcome.errors.values()} == {errors.SumError}


@pytest.mark.parametrize("what", ["survivors", "ciphertexts", "tag"])
def test_who_is_shown_another_sum_than_the_rest_opens_none(what: str) -> None:
    """Its signature is on something else: it counts for nobody, and nobody's counts for it."""
    plan, parties = keyed(4)
    signed: list[m.SumSigned] = []
    changes = {"survivors": names(3), "ciphertexts": (), "tag": bytes(16)}

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherSum) and recipient == "c002":
            return dataclasses.replace(message, **{what: changes[what]})
        if isinstance(message, m.SumSigned):
            signed.append(message)
        return message

    outcome = run_round(plan, parties, make_updates(plan, 1), tap=tap)
    assert outcome.round.stage is Stage.DONE
    assert "SignatureError" in outcome.round.faults["c002"]
    assert set(outcome.opened) == {"c001", "c003", "c004"}
    assert {s.name for s in signed[0].signers} == {"c001", "c003", "c004"}


def signing(count: int = 4) -> tuple[RoundPlan, Signing, list[m.SumSigned], dict[str, Any]]:
    """A client that has signed a sum, and the quorum's signatures on it."""
    plan, parties = keyed(count)
    signed: list[m.SumSigned] = []
    sums: list[m.CipherSum] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message | None:
        if isinstance(message, m.CipherSum):
            sums.append(message)
        if isinstance(message, m.SumSigned):
            signed.append(message)
            return None if recipient == "c002" else message
        return message

    run_round(plan, parties, make_updates(plan, 1), tap=tap)
    key = parties["c002"].keyring.cohort
    assert key is not None
    return plan, Signing(parties["c002"], plan, key, sums[0].body(plan), sums[0]), signed, parties


def test_a_sum_is_decrypted_for_a_quorum_of_its_members_alone() -> None:
    plan, state, (request, *_), parties = signing()
    one, two, three = request.signers
    other = m.Signed("c009", one.signature)
    forged_ = m.Signed(three.name, bytes(64))
    for signers, error in (
        ((one, two), errors.ThresholdError),
        ((), errors.ThresholdError),
        ((one, two, two), errors.SurvivorError),
        ((one, two, other), errors.SurvivorError),
        ((one, two, forged_), errors.SignatureError),
        ((one, two, m.Signed(three.name, two.signature)), errors.SignatureError),
    ):
        with pytest.raises(error):
            state.on(m.SumSigned(plan.run, plan.round, signers))
    elsewhere = dataclasses.replace(state.sum, tag=bytes(16))
    with pytest.raises(errors.SurvivorError, match="a second sum"):
        state.on(elsewhere)
    same, replies = state.on(state.sum)
    assert same is state
    assert replies == state.sign()[1]  # the same, again
    opened, _ = state.on(dataclasses.replace(state.sum, signers=request.signers))
    assert isinstance(opened, Opening)
    assert isinstance(state.on(request)[0], Opening)
    assert parties["c002"].keyring.cohort is not None


def test_who_signed_a_sum_signs_no_other_of_its_prompt() -> None:
    """A server that opens one with a client, and tells the rest that it was aborted, gets no
    second quorum: two of them share an honest client."""
    plan, _, _, parties = signing()
    for party in parties.values():
        again = dataclasses.replace(plan, round=plan.round + 1, attempt=plan.attempt + 1)
        with pytest.raises(errors.OpenedError, match="a second one could be subtracted"):
            start(party, again)


def test_who_comes_back_to_a_signed_sum_opens_it_and_no_other() -> None:
    plan, parties = keyed(4)
    sums, signed = list[m.CipherSum](), list[m.SumSigned]()

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message | None:
        if isinstance(message, m.SumSigned):
            signed.append(message)
        if isinstance(message, m.CipherSum):
            sums.append(message)
            return None if recipient == "c003" else message
        return message

    run_round(plan, parties, make_updates(plan, 1), tap=tap)
    party, key = parties["c003"], parties["c003"].keyring.cohort
    assert key is not None
    before = party.journal.opening(plan.run)
    forged_ = tuple(m.Signed(s.name, bytes(64)) for s in signed[0].signers)
    with pytest.raises(errors.SignatureError):
        Sent(party, plan, key).on(dataclasses.replace(sums[0], signers=forged_))
    assert party.journal.opening(plan.run) == before  # nor is it kept as if it were signed
    back, _ = Sent(party, plan, key).on(dataclasses.replace(sums[0], signers=signed[0].signers))
    assert isinstance(back, Opening)
    with pytest.raises(errors.OpenedError):
        start(party, dataclasses.replace(plan, round=plan.round + 1, attempt=plan.attempt + 1))


def test_signatures_are_waited_for_as_long_as_openings(tmp_path: Path) -> None:
    world = World(tmp_path, protection="bfv", alive_seconds=12.0, rounds=3)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.Consistent) and message.round == 2)
    world.lost |= {"c003", "c004"}
    begun = world.clock
    world.pump(lambda w, message: w.clock > begun + 25)
    assert world.run.current is not None
    assert world.run.current.stage is Stage.CONSISTENCY
    for name in ("c003", "c004"):
        world.reconnect(name)
    world.pump()
    assert world.run.error is None, world.run.error
    done = [(r["round"], r["learning_round"]) for r in world.store.summary()["rounds"]]
    assert done == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_client_that_left_over_a_sum_stays_away_when_it_is_started_again(tmp_path: Path) -> None:
    plan = make_encrypted_plan(4, "bfv")
    for last in (False, True):
        journal = FileJournal(tmp_path / "journal.jsonl")
        if last:
            with pytest.raises(errors.SumError, match="begin a new run"):
                journal.begin_round(plan)
        else:
            journal.distrust(plan.run)
        journal.begin_round(
            dataclasses.replace(plan, run=b"n" * 16, round=1 + last, attempt=1 + last)
        )
        journal.close()


def test_a_forged_sum_ends_the_run_and_the_server_is_told_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, 5, protection="bfv", alive_seconds=12.0, rounds=3)
    world.withdraws = True
    honest = EncryptedRound._summed

    def summed(self: EncryptedRound, names: tuple[str, ...]) -> Pending:
        made = honest(self, names)
        return dataclasses.replace(made, tag=bytes(16)) if self.plan.round == 2 else made

    monkeypatch.setattr(EncryptedRound, "_summed", summed)
    for name in names(5):
        world.join(name)
    world.pump()
    assert isinstance(world.run.error, errors.RunFailedError)
    assert {type(error) for error in world.errors.values()} == {errors.SumError}
    assert set(world.errors) == set(names(5))
    for name in names(5):
        left = world.sessions[name].leave(world.errors[name])
        assert (left.error, left.reason) == ("Stopped", "")


def test_the_prompt_of_the_rounds_before_a_wrong_sum_is_not_lost(
    bundled: Any, tmp_path: Path
) -> None:
    from secure_fedprompt.clients.data import sets
    from secure_fedprompt.clients.training import LocalTrainer
    from secure_fedprompt.prompt_file import read_prompt
    from secure_fedprompt.protocol.settings import MethodSettings

    train, test = sets.generated_sets(3, ["sketch"], 4, 2, 0)
    trainer = LocalTrainer(bundled, train, test, 0)
    session = Session(make_parties(3)["c001"], trainer)
    log = Log("client", console=Console(file=io.StringIO()))
    client.keep_base(session, tmp_path, log, 0.0)  # nothing was opened: nothing is written
    assert not list(tmp_path.iterdir())
    session._learner = trainer.prepare(MethodSettings(n_ctx=4, init="a photo of a"))
    session.run, session.base = b"r" * 16, session.learner.initial() + np.float32(1)
    client.keep_base(session, tmp_path, log, 0.0)
    (path,) = tmp_path.glob("prompt-*.safetensors")
    assert np.array_equal(read_prompt(path).tensors["ctx"].reshape(-1), session.base)


def test_a_tag_is_under_its_senders_signature() -> None:
    plan, parties = keyed(4)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherUpload) and sender == "c004":
            return dataclasses.replace(message, tag=bytes(16))
        return message

    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    assert "SignatureError" in outcome.round.faults["c004"]
    assert outcome.round.stage is Stage.DONE


def test_the_server_refuses_a_tag_that_is_none_and_counts_none_of_it() -> None:
    plan, parties = keyed(4)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherUpload) and sender == "c004":
            message = dataclasses.replace(message, tag=b"\xff" * 16)
            return m.signed(message, identity("c004"), Purpose.UPLOAD, plan)
        return message

    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.DONE
    assert "FieldError: a tag of a sum" in outcome.round.faults["c004"]
    assert not outcome.errors


@pytest.mark.parametrize("what", ["tag", "survivors"])
def test_a_sum_whose_tag_is_not_that_of_its_uploads_shows(tmp_path: Path, what: str) -> None:
    """A server that returns something else would have to alter one of them, or both."""

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherSum) and recipient == VICTIM and message.round == 2:
            changed = bytes(16) if what == "tag" else message.survivors[:3]
            return dataclasses.replace(message, **{what: changed})
        return message

    text = f"the tag of the sum to {VICTIM} is not that of its members' uploads"
    options: dict[str, Any] = {"protection": "bfv", "peers": (), "max_attempts": 1}
    assert ("protection", text) in failures(audited(tmp_path / "bad", tap, **options))
    good = failures(audited(tmp_path / "good", **options))
    assert not [found for _, found in good if "tag of the sum" in found]
