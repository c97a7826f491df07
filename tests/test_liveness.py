"""Clients that play by no rules must not keep the others from their rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federation import World
from rounds import identity, names

from secure_fedprompt.clients.cohort_key import CohortKey
from secure_fedprompt.clients.rounds import encrypted, keying
from secure_fedprompt.clients.rounds.start import BEGIN
from secure_fedprompt.clients.session import Session
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan
from secure_fedprompt.server.settings import ServerSettings, fewest_of, quorum_of


def everybody(world: World) -> World:
    world.withdraws = True
    for name in world.toys:
        world.join(name)
    return world


def bend(world: World, change: Callable[[str, m.Message], m.Message | None]) -> None:
    """What clients send reaches the server changed, or not at all."""
    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        changed = change(sender, message)
        return [] if changed is None else original(sender, changed, now)

    world.run.on = on  # type: ignore[method-assign]


# -- before the first round ------------------------------------------------------------------------


def test_a_regular_graph_needs_as_many_clients_as_one_can_be_planned_for(tmp_path: Path) -> None:
    settings = ServerSettings(graph="regular")
    fewest = fewest_of(settings, 60)
    assert quorum_of(settings, 60) < fewest < 60
    world = World(tmp_path, 60, graph="regular", rounds=2, alive_seconds=1e9, gather_seconds=10.0)
    assert world.run.needed == fewest
    everybody(world)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd))
    world.lose("c007")
    world.lost.add("c007")
    world.pump()
    assert world.run.error is None, world.run.error
    assert len(world.store.summary()["rounds"][-1]["cohort"]) == 59


def test_who_opens_another_nonce_twice_is_not_waited_for(tmp_path: Path) -> None:
    world = World(tmp_path, 60, graph="regular", rounds=1, alive_seconds=1e9, gather_seconds=10.0)

    def other(sender: str, message: m.Message) -> m.Message:
        if sender == "c020" and isinstance(message, m.Ready):
            message = dataclasses.replace(message, nonce=bytes(32))
            body = message.body(world.roster.digest)
            signature = identity(sender).sign(Purpose.RUN_KEY, body)
            return dataclasses.replace(message, signature=signature)
        return message

    bend(everybody(world), other)
    world.pump()
    assert world.run.error is None, world.run.error
    assert "c020" not in {nonce.name for nonce in world.run.state.commitments}
    assert len(world.store.summary()["rounds"][0]["cohort"]) == 59


def test_greeting_again_and_again_puts_off_no_deadline(tmp_path: Path) -> None:
    """Two of seven never accept the terms; whenever time passes, one of them greets once more."""
    world = everybody(World(tmp_path, 7, alive_seconds=1e9))
    bad, plans = ("c006", "c007"), list[float]()
    bend(world, lambda s, message: None if s in bad and isinstance(message, m.Accept) else message)

    def until(w: World, message: m.Message) -> bool:
        if isinstance(message, m.Plan):
            plans.append(w.clock)
        return bool(plans) or w.clock > stop

    for turn in range(60):
        stop = world.clock + 20.0
        world.pump(until)
        if plans:
            break
        world.reconnect(bad[turn % 2])
    settings = world.settings
    assert plans
    assert plans[0] <= settings.gather_seconds + 2 * settings.stage_seconds


def test_one_client_cannot_take_the_run_key_of_another_that_is_away(tmp_path: Path) -> None:
    world = everybody(World(tmp_path, 5, alive_seconds=12.0, rounds=3))
    world.pump(lambda w, message: isinstance(message, m.RoundEnd))
    key = world.run.clients["c001"].ready.seal_key  # type: ignore[union-attr]
    world.run.gone("c001", world.clock)
    stolen = dataclasses.replace(
        world.run.clients["c005"].ready, seal_key=key  # type: ignore[type-var]
    )  # fmt: skip
    signature = identity("c005").sign(Purpose.RUN_KEY, stolen.body(world.roster.digest))
    world.send("c005", dataclasses.replace(stolen, signature=signature))
    world.reconnect("c001")
    world.pump()
    assert world.run.error is None, world.run.error
    assert set(world.errors) == {"c005"}
    assert "run key of c005 is another client's" in str(world.errors["c005"])


def test_clients_that_leave_between_rounds_may_come_back(tmp_path: Path) -> None:
    """Two of four agree to the terms and are gone before the first plan."""
    world = everybody(World(tmp_path, 4, alive_seconds=1e9, gather_seconds=60.0))
    seen: list[str] = []

    def until(w: World, message: m.Message) -> bool:
        seen.append(type(message).__name__)
        return seen.count("Accept") == 3

    world.pump(until)
    world.clock += 61.0  # the time to gather is over
    left = [name for name, client in world.run.clients.items() if client.accepted]
    assert left
    for name in left:
        world.run.gone(name, world.clock)
        world.lost.add(name)
    world.pump(lambda w, message: w.clock > 75.0)
    assert not world.run.over
    for name in left:
        world.join(name)
    world.pump()
    assert world.run.error is None, world.run.error


# -- the cohort key --------------------------------------------------------------------------------


def test_two_that_ask_with_one_key_cost_no_honest_maker_its_place(tmp_path: Path) -> None:
    world = everybody(World(tmp_path, 7, protection="bfv", alive_seconds=12.0))
    keys: list[bytes] = []

    def same(sender: str, message: m.Message) -> m.Message:
        if sender in ("c006", "c007") and isinstance(message, m.KeyAsk):
            keys.append(message.seal_key)
            message = dataclasses.replace(message, seal_key=keys[0])
            assert world.run.current
            body = message.body(world.run.current.plan)
            signature = identity(sender).sign(Purpose.KEY_ASK, body)
            return dataclasses.replace(message, signature=signature)
        return message

    bend(world, same)
    world.pump()
    assert world.run.error is None, world.run.error
    faults = str([r["faults"] for r in world.store.summary()["rounds"]])
    assert "asks with the key of another client" in faults
    assert not set(world.errors) & set(names(5))


def test_a_maker_cannot_take_the_prompt_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """c001, the maker, restarts; c002 grants a key under which the prompt is lost and goes on."""
    plain, opened, makers = encrypted.begin, Session._open, list[str]()

    def begin(party: Any, plan: RoundPlan) -> Any:
        state, replies = plain(party, plan)
        if plan.key == NO_KEY and isinstance(state, keying.Granting):
            makers.append(party.name)
            if party.name == "c002":
                key = CohortKey.make(state.key.scheme, party.entropy)
                state = dataclasses.replace(state, key=key)
        return state, replies

    def open_(self: Session, plan: Any) -> bytes:
        try:
            return opened(self, plan)
        except errors.SealError:
            if self.party.name != "c002":
                raise
            return self._made[1]  # as it computed it

    monkeypatch.setitem(BEGIN, "bfv", begin)
    monkeypatch.setattr(Session, "_open", open_)
    world = everybody(World(tmp_path, 5, protection="bfv", rounds=4, alive_seconds=12.0))
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 2)
    world.join("c001")
    world.pump()
    assert world.run.error is None, world.run.error
    aborted = [r for r in world.store.summary()["rounds"] if r["outcome"] == "aborted"]
    assert aborted
    assert makers == ["c001", "c002", "c003"]
    others = ("c001", "c003", "c004", "c005")
    assert len({world.sessions[name].final.tobytes() for name in others}) == 1
    assert not set(world.errors) & set(others)


# -- deadlines and ends ----------------------------------------------------------------------------


def test_who_is_refused_for_its_nonce_may_not_try_for_ever(tmp_path: Path) -> None:
    world = World(tmp_path, 60, graph="regular", rounds=1, alive_seconds=1e9, gather_seconds=10.0)

    def other(sender: str, message: m.Message) -> m.Message:
        if sender == "c020" and isinstance(message, m.Ready):
            message = dataclasses.replace(message, nonce=bytes(32))
            body = message.body(world.roster.digest)
            signature = identity(sender).sign(Purpose.RUN_KEY, body)
            return dataclasses.replace(message, signature=signature)
        return message

    told: list[str] = []

    def until(w: World, message: m.Message) -> bool:
        if isinstance(message, m.Refused):
            told.append(message.reason)
        return isinstance(message, m.Refused)

    bend(everybody(world), other)
    for _ in range(6):
        world.pump(until)
        if world.run.over or "opens no nonce" in told[-1]:
            break
        world.join("c020")  # a new process, that means no better
    assert "opens no nonce" in told[-1]
    world.pump()
    assert world.run.error is None, world.run.error


def test_two_that_contest_do_not_throw_away_a_start_that_others_are_judging(tmp_path: Path) -> None:
    world = everybody(World(tmp_path, 7, alive_seconds=1e9))
    slow, bad = ("c003", "c004", "c005"), ("c006", "c007")

    def change(sender: str, message: m.Message) -> m.Message | None:
        if not isinstance(message, m.Accept) or sender not in slow + bad:
            return message
        if sender in bad:
            return m.Contest(message.run, message.terms)
        return message if world.run.clients.keys().isdisjoint(bad) else None

    bend(world, change)
    run: list[bytes] = []

    def until(w: World, message: m.Message) -> bool:
        if isinstance(message, m.Terms):
            run.append(bytes(message.run))
        return isinstance(message, m.Refused)

    world.pump(until)
    assert world.clock >= world.settings.stage_seconds  # the deadline decided, not the answers
    assert world.run.clients.keys().isdisjoint(bad)
    assert world.run.state.run == run[0]
    assert not any("is not what" in str(v) for k, v in world.events if k == "fault")


def test_a_sum_that_too_few_could_open_is_not_begun(tmp_path: Path) -> None:
    """Two who uploaded leave while the fourth still trains: another attempt may do better."""
    world = everybody(World(tmp_path, 4, protection="bfv", rounds=1, alive_seconds=1e9))
    late: list[m.Message] = []

    def change(sender: str, message: m.Message) -> m.Message | None:
        if sender == "c004" and isinstance(message, m.CipherUpload) and not late:
            late.append(message)
            return None
        return message

    bend(world, change)
    sent: list[m.Message] = []

    def until(w: World, message: m.Message) -> bool:
        if isinstance(message, m.CipherUpload):
            sent.append(message)
        return bool(late) and len(sent) == 4 and not w.queue

    world.pump(until)
    while world.queue:
        world.pump(lambda w, message: not w.queue)
    for name in ("c002", "c003"):
        world.lose(name)
        world.lost.add(name)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd))
    first = world.store.summary()["rounds"][0]
    assert first["outcome"] == "aborted"
    assert "of those who uploaded are still there" in first["reason"]
    for name in ("c002", "c003"):
        world.reconnect(name)
    world.pump()
    assert world.run.error is None, world.run.error


def test_a_server_killed_at_the_very_end_gives_everybody_the_last_frame(tmp_path: Path) -> None:
    world = everybody(World(tmp_path, 4, rounds=1, alive_seconds=1e9))
    world.pump(lambda w, message: isinstance(message, m.Finish))
    world.store.close()
    world.queue.clear()
    (tmp_path / "summary.json").unlink(missing_ok=True)
    world.start_server()
    for name in names(4):
        world.reconnect(name)
    world.pump()
    assert world.run.error is None
    assert all(world.sessions[name].final is not None for name in names(4))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("protection", ["masks", "bfv"])
def test_who_declines_and_leaves_does_not_keep_the_others_from_a_round(
    tmp_path: Path, protection: str, later: bool
) -> None:
    """A quorum was too few for it; it is not there any more, and enough others are."""
    world = World(
        tmp_path, 4, protection=protection, alive_seconds=12.0, max_attempts=0, gather_seconds=20.0
    )
    world.withdraws = True
    for name in names(3):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.Plan) and message.plan.round == 1)
    world.queue.clear()
    world.send("c001", m.Withdraw(world.run.state.run, 1, "PolicyError", "too few"))
    if later:
        world.pump(lambda w, message: w.run.larger > 0)
        world.queue.clear()
        world.lose("c001")
    else:
        world.send("c001", m.Leave("Stopped", ""))
        world.pump(lambda w, message: isinstance(message, m.Alive))
    world.lost.add("c001")
    for name in ("c002", "c003"):
        world.reconnect(name)
    world.join("c004")
    world.pump()
    assert world.run.error is None, world.run.error
    assert world.store.summary()["rounds"][-1]["cohort"] == ["c002", "c003", "c004"]


@pytest.mark.parametrize("protection", ["masks", "bfv"])
def test_a_run_key_that_was_seen_is_of_no_use_after_a_restart(
    tmp_path: Path, protection: str
) -> None:
    """c004 announces as its own what the maker announced before; the maker has made another."""
    world = everybody(World(tmp_path, 4, protection=protection, alive_seconds=12.0, rounds=3))
    boxes: list[m.KeyBox] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.KeyBox):
            boxes.append(message)
        if boxes and sender == "c004" and isinstance(message, m.Ready):
            copied = dataclasses.replace(message, seal_key=boxes[0].maker.seal_key)
            return m.signed(copied, identity("c004"), Purpose.RUN_KEY, world.roster.digest)
        return message

    world.tamper = tap
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    assert boxes[0].maker.name == "c001"
    world.store.close()
    world.queue.clear()
    world.start_server()
    for name in ("c004", "c001", "c002", "c003"):
        world.reconnect(name)
    world.pump()
    assert world.run.error is None, world.run.error
    assert set(world.errors) <= {"c004"}
    assert world.sessions["c001"].final is not None
