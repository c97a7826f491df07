"""Openings that were interrupted: what clients that come back still say, and what they must not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import World
from interrupted import spread, world_of
from rounds import identity, names
from test_openings import nth, restart
from test_sum_checked import signing

from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.rounds.encrypted import Sent, Signing, restored
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.terms import PlanInputs
from secure_fedprompt.protocol.transport import Frame

UPLOAD = m.MaskedUpload | m.CipherUpload
BOTH = pytest.mark.parametrize("protection", ["masks", "bfv"])


def outcomes(world: World) -> list[tuple[int, str]]:
    return [(r["learning_round"], r["outcome"]) for r in world.store.summary()["rounds"]]


def whole(world: World) -> None:
    """It ended well, at the first attempt of each round, and waited for nobody."""
    assert world.run.error is None, world.run.error
    assert not world.errors
    assert {outcome for _, outcome in outcomes(world)} == {"done"}
    assert world.clock <= 15


@BOTH
def test_a_list_is_judged_again_when_its_sum_is_opened(tmp_path: Path, protection: str) -> None:
    """Under masks run X gets signatures and perhaps, from others, its sum: run Y from that prompt has none without
    c004. Under bfv X has none yet, and Y from a prompt next to it opens one; then X goes on. Two sums would differ by
    c004's update."""
    common = {"protection": protection, "metrics": "off", "weights": "uniform"}
    x = World(tmp_path / "x", 4, alive_seconds=12.0, **common)
    x.withdraws = True
    spread(x)
    for name in names(4):
        x.join(name)
    x.pump(lambda w, message: isinstance(message, m.UnmaskRequest | m.CipherSum))
    y = World(tmp_path / "y", 4, alive_seconds=12.0, **common)
    y.journals, y.withdraws, y.clock = x.journals, True, 1000.0
    spread(y)
    if protection == "bfv":  # nothing is signed in X yet: what is near must be known again
        nudged = y.toys["c001"].initial() + np.float32(1e-7)
        for toy in y.toys.values():
            toy.initial = lambda: nudged
    y.start_server()
    for name in names(4):
        y.join(name)
    y.pump(nth(m.MaskedUpload if protection == "masks" else m.CipherUpload, 1, 4))
    y.lose("c004")
    y.lost.add("c004")
    y.pump()
    done = ("done" in {outcome for _, outcome in outcomes(y)}) is (protection == "bfv")
    assert done, outcomes(y)
    told: list[m.Message] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender:
            told.append(message)
        return message

    x.clock = 2000.0
    restart(x)
    for journal in x.journals.values():  # of new processes
        journal._notes.clear()
    x.tamper = tap
    for name in names(4):
        x.join(name)
    x.pump()
    refused = [t for t in told if isinstance(t, m.Withdraw)]
    if protection == "masks":
        assert x.run.error is None
        assert not refused
    else:
        assert "not by enough" in str(x.run.error) or "0 of 4" in str(x.run.error), x.run.error
        assert not [t for t in told if isinstance(t, m.Opened)]
        assert {t.error for t in refused} == {"IsolationError"}
        assert {t.reason for t in refused} == {errors.IsolationError.told}


@BOTH
def test_who_reconnects_after_its_signature_is_heard(tmp_path: Path, protection: str) -> None:
    """Two come back while the other two have not signed yet."""
    world = world_of(tmp_path, protection=protection, rounds=3)
    late: dict[str, m.Message] = {}

    def hold(sender: str, recipient: str, message: m.Message) -> m.Message:
        of = isinstance(message, m.Consistent) and message.round == 2 and sender in ("c003", "c004")
        if not of or sender in late:
            return message
        late[sender] = message
        return m.Alive()

    world.tamper = hold
    world.pump(lambda w, message: len(late) == 2 and isinstance(message, m.Alive))
    for name in ("c001", "c002"):
        world.lose(name)
        world.reconnect(name)
    accepted: list[m.Message] = []

    def until(w: World, message: m.Message) -> bool:
        accepted.extend([message] if isinstance(message, m.Accept) else [])
        return len(accepted) == 2 and isinstance(message, m.Alive)

    world.pump(until)
    for name, message in late.items():
        world.send(name, message)
    world.pump()
    whole(world)


@pytest.mark.parametrize("lost", ["its signature", "the list", "nothing: it is slow"])
def test_who_is_there_is_asked_to_open_the_sum(tmp_path: Path, lost: str) -> None:
    """Under masks c004 signs, and dies as it is asked; c003, whose signature did not count, can
    do what it should have done."""
    world = world_of(tmp_path, rounds=3)
    held: list[m.Message] = []
    dead: list[str] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if getattr(message, "round", 0) != 2 or (dead and sender == "c004"):
            return message
        first = not held
        if isinstance(message, m.Consistent) and sender == "c003" and first and lost != "the list":
            held.append(message)
            return m.Alive()
        listed = isinstance(message, m.SurvivorList) and recipient == "c003"
        if listed and first and lost == "the list":
            held.append(message)
            return m.Alive()
        if isinstance(message, m.UnmaskRequest) and recipient == "c004" and not dead:
            dead.append("c004")
            world.lost.add("c004")
        return message

    world.tamper = tap
    world.pump(lambda w, message: bool(held))
    if lost != "nothing: it is slow":
        world.lose("c003")
        world.reconnect("c003")
    world.pump()
    assert world.run.error is None, world.run.error
    assert {outcome for _, outcome in outcomes(world)} == {"done"}
    assert world.clock < 120


def test_who_reconnects_before_it_signed_is_shown_the_list(tmp_path: Path) -> None:
    """One of four is gone; without this signature the attempt would be over. A second list is not
    signed."""
    world = world_of(tmp_path, rounds=3)
    world.pump(nth(m.MaskedUpload, 2, 4))
    world.lose("c004")
    world.lost.add("c004")
    late: dict[str, m.Message] = {}

    def hold(sender: str, recipient: str, message: m.Message) -> m.Message:
        of = isinstance(message, m.Consistent) and message.round == 2
        if not of or sender == "c001" or sender in late:
            return message
        late[sender] = message
        return m.Alive()

    world.tamper = hold
    world.pump(lambda w, message: len(late) == 2 and isinstance(message, m.Alive))
    session: Any = world.sessions["c001"]
    with pytest.raises(errors.SurvivorError, match="a second survivor list"):
        session.round.on(m.SurvivorList(session.run, 2, b"\x0f"))
    world.lose("c003")
    world.reconnect("c003")
    accepted: list[m.Message] = []

    def until(w: World, message: m.Message) -> bool:
        accepted.extend([message] if isinstance(message, m.Accept) else [])
        return bool(accepted) and isinstance(message, m.Alive)

    world.pump(until)
    world.send("c002", late["c002"])
    world.pump()
    assert world.run.error is None, world.run.error
    assert {outcome for _, outcome in outcomes(world)} == {"done"}


def test_a_signature_that_comes_too_late_costs_nothing(tmp_path: Path) -> None:
    """Two have lost the key, and the one that was slow has it."""
    world = world_of(tmp_path, protection="bfv", rounds=3, patience=4000.0)
    late: list[m.Message] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Consistent) and message.round == 2 and sender == "c003":
            late.append(message)
            return m.Alive() if len(late) == 1 else message
        return message

    world.tamper = tap
    world.pump(nth(m.SumSigned, 2, 1))
    for name in ("c001", "c002"):
        world.forget(name)
        world.lose(name)
        world.join(name)
    world.send("c003", late[0])
    world.pump()
    assert world.run.error is None, world.run.error
    assert world.clock < 200


def test_who_is_killed_after_its_signature_is_counted_with_it(tmp_path: Path) -> None:
    """And says, once it is asked to open the sum, that it cannot."""
    world = world_of(tmp_path, protection="bfv", rounds=3)
    world.pump(nth(m.Consistent, 2, 3))
    killed = min(world.run.current.answers)  # type: ignore[union-attr]
    world.lose(killed)
    world.join(killed)
    lost = next(name for name in names(4) if name not in world.run.current.answers)  # type: ignore[union-attr]
    world.forget(lost)
    world.reconnect(lost)
    world.pump()
    whole(world)
    faults = world.store.summary()["rounds"][1]["faults"]
    assert list(faults) == [killed]
    assert "KeyLostError" in faults[killed]


def test_who_reconnects_after_its_upload_signs_the_sum(tmp_path: Path) -> None:
    world = world_of(tmp_path, protection="bfv", rounds=3)
    world.pump(nth(m.CipherUpload, 2, 4))
    here = sorted(world.run.current.answers)[:2]  # type: ignore[union-attr]
    world.lost.add("c004")
    for name in here:
        world.forget(name)
        world.lose(name)
        (world.reconnect if name == here[0] else world.join)(name)
    world.pump(lambda w, message: w.clock > 1 or isinstance(message, m.Opened))
    world.lose("c004")
    world.pump()
    assert world.run.error is None, world.run.error
    assert outcomes(world) == [(number, "done") for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("kind", [m.CipherSum, m.SumSigned])
def test_who_is_asked_twice_may_answer_twice(tmp_path: Path, kind: type[m.Message]) -> None:
    """A frame that came too late was sent again, and both arrive."""
    world = world_of(tmp_path, protection="bfv", rounds=3)

    def again(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, kind) and not sender:
            twice = message
            if isinstance(message, m.SumSigned):  # then it is the sum that is sent again
                twice = world.run.current._sum_frame()  # type: ignore[union-attr, attr-defined]
            world.network.hub.send(recipient, Frame.of(twice))
        return message

    world.tamper = again if kind is m.SumSigned else once(again)
    world.pump()
    whole(world)
    assert not any(row["faults"] for row in world.store.summary()["rounds"])


def once(tap: Callable[..., m.Message]) -> Callable[..., m.Message]:
    """Of each frame the copy is not copied."""
    seen = set[tuple[str, bytes]]()

    def of(sender: str, recipient: str, message: m.Message) -> m.Message:
        name = recipient, m.CATALOGUE.encode(message)
        if sender or name in seen:
            return message
        seen.add(name)
        return tap(sender, recipient, message)

    return of


def test_one_client_alone_does_not_say_what_a_sum_opens_to(tmp_path: Path) -> None:
    """Nor do two that disagree, when the others cannot open it; nobody waits for hours."""
    world = world_of(tmp_path, protection="bfv", rounds=3, patience=4000.0)
    world.pump(nth(m.SumSigned, 2, 3))
    for name in ("c003", "c004"):
        world.join(name)

    def lie(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Opened) and sender == "c001":
            return dataclasses.replace(message, sealed=b"x" * 32)
        return message

    world.tamper = lie
    world.pump()
    assert "2 different prompts" in str(world.run.error)
    assert world.clock < 15


@BOTH
def test_who_distrusts_a_run_says_nothing_in_it_any_more(tmp_path: Path, protection: str) -> None:
    world = world_of(tmp_path, protection=protection, rounds=3)
    world.pump(lambda w, x: isinstance(x, m.UnmaskRequest | m.CipherSum) and x.round == 2)
    current: Any = world.run.current
    plan, session = current.plan, world.sessions["c002"]
    if protection == "masks":
        wrong: m.Message = m.OpenedSum(plan.run, plan.round, b"x" * 8, bytes(16), b"\x0f")
    else:
        bad = dataclasses.replace(current._sum_frame(), tag=bytes(16))
        signatures = [identity(n).sign(Purpose.SUM, bad.body(plan)) for n in names(3)]
        signers = tuple(m.Signed(n, s) for n, s in zip(names(3), signatures, strict=True))
        wrong = dataclasses.replace(bad, signers=signers)
    with pytest.raises(errors.SumError):
        session.on(wrong)
    assert world.journals["c002"].opening(plan.run) is None
    said: list[str] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c002" and not isinstance(message, m.Alive):
            said.append(type(message).__name__)
        return message

    world.tamper = tap
    world.join("c002")
    world.pump(lambda w, message: "Leave" in said)
    assert said == ["Hello", "Leave"]
    assert isinstance(world.errors["c002"], errors.SumError)


def test_a_lost_request_for_the_sealed_prompt_is_sent_again(tmp_path: Path) -> None:
    world = world_of(tmp_path, protection="bfv", rounds=3, patience=4000.0)
    world.pump(nth(m.SealedRequest, 2, 1))
    for number in range(2, 5):  # of all four
        world.pump(nth(m.SealedRequest, 2, 1))
        assert world.clock <= 30 * number
    world.pump()
    assert world.run.error is None, world.run.error
    assert world.clock < 200


def test_and_not_for_ever(tmp_path: Path) -> None:
    world = world_of(tmp_path, protection="bfv", rounds=3, patience=300.0, gather_seconds=20.0)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        return m.Alive() if isinstance(message, m.SealedPrompt) else message

    world.tamper = tap
    world.pump()
    assert "nobody who opened the sum sent the sealed prompt" in str(world.run.error)
    assert 300 <= world.clock < 600


@BOTH
def test_a_plan_that_is_refused_makes_nothing_forgotten(tmp_path: Path, protection: str) -> None:
    world = world_of(tmp_path, protection=protection, rounds=3)
    world.pump(nth(m.MaskedUpload if protection == "masks" else m.CipherUpload, 2, 4))
    current: Any = world.run.current
    plan, journal, session = current.plan, world.journals["c002"], world.sessions["c002"]
    kept = journal.vector(plan), journal.opening(plan.run)
    assert kept[0] is not None
    terms = world.run.state.terms
    assert terms is not None
    later = dataclasses.replace(PlanInputs.of(plan), learning_round=3)
    session._made = 3, bytes(current.base)
    with pytest.raises(errors.ReplayError, match="is not after round 2"):
        session.on(m.Plan(terms.plan(later), current.base))
    assert (journal.vector(plan), journal.opening(plan.run)) == kept


def test_a_client_killed_after_it_signed_signs_no_other_sum_and_opens_none() -> None:
    plan, state, (request, *_), parties = signing()
    assert state.sum is not None
    kept = parties["c002"].journal.opening(plan.run)
    assert kept == state.to_bytes()
    again = restored(parties["c002"], kept)
    for changed in ({"tag": bytes(16)}, {"survivors": names(3)},
                    {"ciphertexts": state.sum.ciphertexts[::-1] * 2}):  # fmt: skip
        with pytest.raises(errors.SurvivorError, match="a second sum"):
            again.on(dataclasses.replace(state.sum, **changed))
    shown, replies = again.on(state.sum)
    assert replies == state.sign()[1]
    for before, message in ((again, request), (shown, request),
                            (again, dataclasses.replace(state.sum, signers=request.signers))):  # fmt: skip
        after, (told,) = before.on(message)
        assert isinstance(after, Signing)
        assert isinstance(told, m.Withdraw)
        assert told.error == "KeyLostError"


def test_a_client_killed_before_it_signed_signs_one_sum() -> None:
    plan, signed_, (request, *_), parties = signing()
    sum_ = signed_.sum
    assert sum_ is not None
    party = dataclasses.replace(parties["c003"], journal=MemoryJournal())  # nothing was shown yet
    party.journal.begin_round(plan)
    kept = Sent(party, plan, None).to_bytes()
    for signers, error in (((), errors.ThresholdError),
                           (request.signers[:1] * 3, errors.SurvivorError)):  # fmt: skip
        state, replies = restored(party, kept).on(sum_)
        assert [type(reply) for reply in replies] == [m.Consistent]
        with pytest.raises(error):
            state.on(m.SumSigned(plan.run, plan.round, signers))
    opening = party.journal.opening(plan.run)
    assert opening is not None
    with pytest.raises(errors.SurvivorError, match="a second sum"):
        restored(party, opening).on(dataclasses.replace(sum_, tag=bytes(16)))
    again = dataclasses.replace(plan, round=plan.round + 1, attempt=plan.attempt + 1)
    with pytest.raises(errors.OpenedError, match="a second one could be subtracted"):
        start(party, again)
    with pytest.raises(errors.OpenedError, match="was opened in round"):  # nor of another attempt
        Sent(party, dataclasses.replace(plan, round=9), None).on(dataclasses.replace(sum_, round=9))
