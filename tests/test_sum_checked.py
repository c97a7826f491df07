"""A server that returns something else than the sum, under bfv and ckks: it worked, and is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audited import VICTIM, audited, failures
from ciphered import keyed
from federation import World
from rounds import identity, make_updates, names

from secure_fedprompt.clients.journal import FileJournal
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.memory import SimulatedRound, run_round
from secure_fedprompt.protocol import errors, homomorphic, mersenne, sum_tag
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.sum_tag import TagKey
from secure_fedprompt.server.rounds.base import Stage

Forge = Callable[[RoundPlan, dict[str, m.CipherUpload], m.CipherSum], dict[str, Any]]


def added(plan: RoundPlan, uploads: list[m.CipherUpload]) -> dict[str, Any]:
    """What a server makes of these uploads, and of their tags."""
    scheme = homomorphic.scheme(plan.protection, plan.parameters)
    total = homomorphic.RunningSum(scheme, len(uploads[0].ciphertexts))
    for upload in uploads:
        total.add(upload.ciphertexts)
    tags = mersenne.total(np.stack([sum_tag.from_bytes(u.tag) for u in uploads]))
    return {"ciphertexts": total.result(), "tag": sum_tag.to_bytes(tags)}


def one_for_all(
    plan: RoundPlan, uploads: dict[str, m.CipherUpload], honest: m.CipherSum
) -> dict[str, Any]:
    """One client's upload as often as there are clients: counters and bounds agree."""
    return added(plan, [uploads["c001"]] * len(honest.survivors))


FORGED: dict[str, Forge] = {
    "one upload in the place of all": one_for_all,
    "a single upload": lambda plan, uploads, honest: added(plan, [uploads["c001"]]),
    "a subset under the full list": lambda plan, uploads, honest: added(
        plan, [u for name, u in uploads.items() if name != "c001"]
    ),
    "the full sum under another list": lambda plan, uploads, honest: {
        "survivors": tuple(n for n in honest.survivors if n != "c001")
    },
    "one of them twice": lambda plan, uploads, honest: added(
        plan, [uploads[name] for name in ("c001", "c001", "c002", "c003")]
    ),
    "another tag": lambda plan, uploads, honest: {"tag": bytes(15) + b"\x01"},
    "a tag that is none": lambda plan, uploads, honest: {"tag": b"\xff" * 16},
}


def forged(
    protection: str, forge: Forge, victim: str = "c002"
) -> tuple[RoundPlan, SimulatedRound, dict[str, Any]]:
    plan, parties = keyed(4, protection)
    uploads: dict[str, m.CipherUpload] = {}

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherUpload):
            uploads[sender] = message
        if isinstance(message, m.CipherSum) and recipient == victim:
            return dataclasses.replace(message, **forge(plan, uploads, message))
        return message

    updates = make_updates(plan, 1)
    return plan, run_round(plan, parties, updates, tap=tap), {"parties": parties, **updates}


@pytest.mark.parametrize("protection", homomorphic.SCHEMES)
@pytest.mark.parametrize("what", FORGED)
def test_what_is_not_the_sum_is_refused(protection: str, what: str) -> None:
    plan, outcome, made = forged(protection, FORGED[what])
    expected = errors.FieldError if what == "a tag that is none" else errors.SumError
    assert isinstance(outcome.errors["c002"], expected), outcome.errors
    assert "c002" not in outcome.opened
    assert set(outcome.opened) == {"c001", "c003", "c004"}  # theirs was the sum
    if expected is errors.SumError:
        victim = made["parties"]["c002"]
        assert victim.keyring.cohort is None
        later = dataclasses.replace(plan, round=9, learning_round=9, rounds=9)
        with pytest.raises(errors.SumError, match="over for this client"):
            start(victim, later)


def test_without_tags_one_upload_could_be_returned_as_the_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And its owner's update read by all: every other check of a client holds."""
    monkeypatch.setattr(TagKey, "holds", lambda *_: True)
    plan, outcome, made = forged("bfv", one_for_all)
    assert not outcome.errors
    found = outcome.opened["c002"]
    assert (found.integers % 4 == 0).all()
    values, weight = made["c001"]
    read = found.total["ctx"] / 4 / weight
    assert np.abs(read - np.clip(values["ctx"], -plan.clip, plan.clip)).max() < 1e-4


def test_the_sum_of_another_round_is_refused() -> None:
    plan, parties = keyed(4)
    sums: list[m.CipherSum] = []

    def keep(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherSum):
            sums.append(message)
        return message

    def replay(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherSum) and recipient == "c003":
            return dataclasses.replace(sums[0], round=message.round)
        return message

    updates = make_updates(plan, 1)
    assert run_round(plan, parties, updates, tap=keep).round.stage is Stage.DONE
    base = (7).to_bytes(32, "little")
    again = dataclasses.replace(plan, round=3, learning_round=3, rounds=3, base_digest=base)
    outcome = run_round(again, parties, updates, tap=replay)
    assert isinstance(outcome.errors["c003"], errors.SumError)


def test_a_forged_sum_ends_the_run_at_its_victim_and_the_server_is_told_nothing(
    tmp_path: Path,
) -> None:
    """The others, whom the server gave the sum, go on; the victim stays away, restarted as well."""
    world = World(tmp_path / "run", 5, protection="bfv", alive_seconds=12.0, rounds=3)
    world.withdraws = True
    world.journals["c002"] = FileJournal(tmp_path / "journal.jsonl")
    left: list[m.Leave] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherSum) and recipient == "c002" and message.round == 2:
            return dataclasses.replace(message, survivors=message.survivors[:4])
        if isinstance(message, m.Leave) and sender == "c002":
            left.append(world.sessions["c002"].leave(world.errors["c002"]))
        return message

    world.tamper = tap
    for name in names(5):
        world.join(name)
    world.pump(lambda w, message: "c002" in w.errors and isinstance(message, m.Plan))
    assert isinstance(world.errors["c002"], errors.SumError)
    world.journals["c002"].close()
    world.journals["c002"] = FileJournal(tmp_path / "journal.jsonl")
    world.errors.clear()
    world.join("c002")
    world.pump()
    world.journals["c002"].close()
    assert isinstance(world.errors["c002"], errors.SumError)
    assert "over for this client" in str(world.errors["c002"])
    assert world.run.error is None
    assert sum(s.final is not None for s in world.sessions.values()) == 4
    assert left
    assert all((leave.error, leave.reason) == ("Stopped", "") for leave in left)


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
