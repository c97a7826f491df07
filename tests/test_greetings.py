"""Greetings: frames that cross them, clients that come back, and plans before and after."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
from federation import World
from rounds import names

from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import VERSION
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.gathering import ASKS


def test_a_client_stays_in_one_run_with_one_set_of_settings(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.Plan))
    session, state = world.sessions["c001"], world.run.state
    good = m.Welcome(
        state.run, state.server_nonce, state.commitments,
        world.settings.method_settings().to_bytes(), 0,
    )  # fmt: skip
    assert session.on(good) == [session.party.ready(state.run, session._nonce)]
    other = world.settings.method_settings()
    changed = msgspec.structs.replace(other, lr=0.7).to_bytes()
    with pytest.raises(errors.MismatchError, match="settings changed"):
        session.on(dataclasses.replace(good, settings=changed))
    nonces = (*state.commitments, m.Nonce("x", bytes(32)))
    with pytest.raises(errors.ReplayError, match="another run"):
        session.on(m.Welcome(m.run_id(bytes(32), nonces), bytes(32), nonces, good.settings, 0))


def test_frames_that_cross_a_greeting_are_of_the_past(tmp_path: Path) -> None:
    """A client that greets again before it has terms waits for a new welcome."""
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    terms: list[m.Terms] = []
    world.pump(lambda w, message: isinstance(message, m.Terms) and not terms.append(message))  # type: ignore[func-returns-value]
    session = world.sessions["c001"]
    session.hello()
    assert session.on(terms[0]) == []
    world.reconnect("c001")
    world.pump()
    assert world.run.error is None
    assert not world.errors


def test_a_plan_that_crosses_a_greeting_is_not_taken_up(tmp_path: Path) -> None:
    """The server counts on the client no more; what it is planned for comes after the welcome."""
    world = World(tmp_path, rounds=3)
    for name in names(4):
        world.join(name)
    plans: list[m.Plan] = []
    world.pump(lambda w, message: isinstance(message, m.Plan) and not plans.append(message))  # type: ignore[func-returns-value]
    session = world.sessions["c004"]
    world.reconnect("c004")
    assert session.on(plans[0]) == []
    world.pump()
    assert world.run.error is None
    assert not world.errors


def test_who_missed_a_round_is_called_until_it_greets_again(tmp_path: Path) -> None:
    """A client does not believe a Rejoin that crossed its greeting."""
    world = World(tmp_path, rounds=4, alive_seconds=12.0)
    for name in names(4):
        world.join(name)
    ignored: list[m.Rejoin] = []

    def tamper(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Rejoin) and recipient == "c004" and not ignored:
            ignored.append(message)
            return m.Alive()  # the client takes no notice of it
        return message

    world.tamper = tamper
    session = world.sessions["c004"]
    original = session.on
    session.on = lambda x: [] if isinstance(x, m.Alive) else original(x)
    done: set[int] = set()

    def until(world: World, message: m.Message) -> bool:
        if isinstance(message, m.Consistent) and message.round == 1 and 1 not in done:
            done.add(1)
            world.lost.add("c004")
            world.run.gone("c004", world.clock)
        if isinstance(message, m.MaskedUpload) and message.round == 2 and 2 not in done:
            done.add(2)
            world.reconnect("c004")
        return False

    world.pump(until)
    assert ignored
    assert world.run.error is None
    assert world.store.summary()["rounds"][-1]["cohort"] == list(names(4))


def test_learning_rounds_do_not_go_back_and_the_run_does_not_grow(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    plans: list[m.Plan] = []
    world.pump(lambda w, message: isinstance(message, m.Plan) and not plans.append(message))  # type: ignore[func-returns-value]
    session, plan = world.sessions["c001"], plans[0]
    session.on(plan)
    changed: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"rounds": 9}, errors.TermsError, "plan's rounds is 9, the terms say 2"),
        ({"learning_round": 4}, errors.TermsError, "learning round 4, the last is 3"),
        ({"attempt": 1}, errors.ReplayError, "not after learning round 1, attempt 1"),
    ]
    for changes, error, words in changed:
        with pytest.raises(error, match=words):
            session.on(m.Plan(dataclasses.replace(plan.plan, round=2, **changes), plan.base))


def test_a_client_that_is_still_encoding_is_not_planned_for(tmp_path: Path) -> None:
    """It says Alive but is not Ready: the round begins without it, and it joins a later one."""
    world = World(tmp_path)
    held: list[m.Message] = []
    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if sender == "c004" and isinstance(message, m.Ready) and now < 70:
            held.append(message)
            return []
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    for name in names(4):
        world.join(name)
    world.pump()
    assert held
    assert world.run.error is None
    assert world.store.summary()["rounds"][0]["cohort"] == ["c001", "c002", "c003"]
    assert not world.store.summary()["rounds"][0]["dropped"]


def test_all_are_asked_for_the_starting_prompt_before_anybody_is_again(tmp_path: Path) -> None:
    world = World(tmp_path, gather_seconds=2000.0)
    asked: list[str] = []
    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if isinstance(message, m.Initial):
            asked.append(sender)
            return []
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    for name in names(4):
        world.join(name)
    world.pump()
    assert asked == list(names(4)) * ASKS
    assert "no client sent a usable starting prompt" in str(world.run.error)


def test_greetings_of_one_process_are_counted_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.Welcome))
    twin = m.Hello(
        world.run.clients["c002"].commitment, "", b"m" * 32, b"c" * 32, world.roster.digest
    )
    ((_, welcome),) = world.run.on("c002", twin, world.clock)
    assert isinstance(welcome, m.Welcome)
    assert len(world.run.clients) == 4
    world.pump(lambda w, message: isinstance(message, m.Advert))
    assert world.run.current is not None
    assert "c002" in world.run.current.waiting
    world.run.on("c002", twin, world.clock)  # it greets again, so it has forgotten the round
    assert "c002" not in world.run.current.waiting
    assert len(world.run.on("c009", m.Alive(), world.clock)) == 1
    assert not world.run.on("c009", m.Alive(), world.clock)  # one Rejoin is enough


def test_another_release_is_named_before_it_takes_part(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.join("c001")
    frame = Frame.read(bytes((VERSION + 1,)) + Frame.of(m.Alive()).data[1:])
    for left in (frame.heard(), frame.heard(), m.Leave("Stopped", "")):  # it was never there
        assert world.run.on("c002", left, 0.0) == []
    said = [text for _, text in world.events if "c002" in text]
    assert len(said) == 1
    assert f"frame of wire version {VERSION + 1}, this program speaks {VERSION}" in said[0]
    world.join("c002")
    world.run.on("c002", world.sessions["c002"].hello(), 0.0)
    world.run.on("c002", m.Leave("Stopped", ""), 0.0)
    world.run.on("c002", frame.heard(), 0.0)
    assert len([text for _, text in world.events if "c002: Unknown" in text]) == 2


def test_who_greets_twice_is_planned_for_with_its_new_run_key(tmp_path: Path) -> None:
    """The maker's connection breaks as the last of the others accepts: its old key is no more."""
    world = World(tmp_path, 4, gather_seconds=60.0)
    world.withdraws = True
    for name in names(4):
        world.join(name)
    accepted: list[m.Message] = []

    def last(w: World, message: m.Message) -> bool:
        if isinstance(message, m.Accept):
            accepted.append(message)
        return len(accepted) == 4

    world.pump(last)
    (name,) = [n for n, c in world.run.clients.items() if not c.accepted]
    world.reconnect("c001")
    world.send(name, accepted[-1])  # was lost as the pump stopped, and crosses the greeting
    world.pump()
    assert not world.errors
    assert world.run.error is None
    assert world.run.state.excluded == ()
    assert all(not row["faults"] for row in world.store.summary()["rounds"])


def test_a_run_that_ended_for_a_reason_may_go_on_with_what_was_trained(tmp_path: Path) -> None:
    """Or each end of it would have everybody train again, and spend budget on it."""
    world = World(tmp_path, 4)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.SurvivorList))
    plan, journal = world.run.current.plan, world.journals["c002"]  # type: ignore[union-attr]
    kept = journal.vector(plan)
    assert kept is not None
    with pytest.raises(errors.RunFailedError, match="too few"):
        world.sessions["c002"].on(m.Finish(plan.run, b"", "too few clients"))
    assert journal.vector(plan) == kept


def test_run_keys_of_earlier_greetings_are_forgotten(tmp_path: Path) -> None:
    world = World(tmp_path, 4, rounds=2, alive_seconds=12.0)
    world.withdraws = True
    for name in names(4):
        world.join(name)
    seen: list[bool] = []

    def announced(w: World, message: m.Message) -> bool:
        """One message after c001's run key."""
        after = bool(seen)
        seen.extend([True] if isinstance(message, m.Ready) and message.name == "c001" else [])
        return after

    for _ in range(8):
        seen.clear()
        world.pump(announced)
        world.reconnect("c001")
    world.pump()
    assert world.run.error is None
    of = world.run.run_key_of  # a frame of another client may be lost as the pump stops
    assert "c001" in of
    assert world.run.run_keys == {key: name for name, key in of.items()}
