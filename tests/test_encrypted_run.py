"""Whole runs under bfv and ckks in memory: late and restarted clients, lost makers, restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import World
from rounds import names
from test_run import expected_prompt

from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import prompt_bytes
from secure_fedprompt.protocol.plan import NO_KEY


def world_of(folder: Path, protection: str = "bfv", n: int = 4, **changes: Any) -> World:
    world = World(folder, n, protection=protection, alive_seconds=12.0, **changes)
    for name in names(n):
        world.join(name)
    return world


def finals(world: World) -> list[bytes]:
    return [
        s.final.tobytes()
        for n, s in world.sessions.items()
        if s.final is not None and n not in world.lost
    ]


@pytest.mark.parametrize("protection", ["bfv", "ckks"])
def test_a_run_averages_as_under_masks_and_the_server_holds_no_prompt(
    tmp_path: Path, protection: str
) -> None:
    world = world_of(tmp_path, protection)
    world.pump()
    assert world.run.error is None
    assert not world.errors
    final = world.sessions["c001"].final
    assert final is not None
    assert np.allclose(final, expected_prompt(world.toys, 2), atol=1e-5)
    assert len(set(finals(world))) == 1
    history = world.sessions["c002"].history
    assert sorted(history) == [1, 2, 3]
    assert history[3]["accuracy"] == 1.0
    # Of the sums the server keeps the number of uploads, and prompts it cannot read.
    summary = world.store.summary()
    assert all(r["metrics"] == {"contributors": 4} for r in summary["rounds"])
    assert summary["accuracy_after"] is None
    world.store.close()
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert prompt_bytes(final) not in kept
    assert (tmp_path / "prompts" / "sealed-0002.safetensors").exists()
    assert world.run.state.prompt is not None
    assert (world.run.state.prompt == 0.5).all()  # the public start


def lose_before(world: World, who: str, kind: type, after: int) -> None:
    """Lose a client before its first frame of a kind in a round later than ``after``."""
    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if sender == who and isinstance(message, kind) and getattr(message, "round", 0) > after:
            world.lost.add(who)
            return []
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [m.CipherUpload, m.Opened, m.SealedPrompt])
@pytest.mark.parametrize("who", ["c001", "c003"])
def test_a_client_lost_at_any_message_costs_nothing(tmp_path: Path, who: str, kind: type) -> None:
    world = world_of(tmp_path)
    lose_before(world, who, kind, 0)
    world.pump()
    assert world.run.error is None
    rounds = world.store.summary()["rounds"]
    assert all(r["outcome"] == "done" for r in rounds)
    assert len(set(finals(world))) == 1


def test_a_maker_lost_before_it_grants_is_replaced(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    lose_before(world, "c001", m.KeyGrant, 0)
    world.pump()
    assert world.run.error is None
    rounds = world.store.summary()["rounds"]
    assert [r["outcome"] for r in rounds] == ["aborted", "done", "done", "done"]
    assert "key maker c001" in rounds[0]["reason"]
    assert (world.run.state.maker, world.run.state.election) == ("c002", 2)


def test_a_restarted_client_gets_the_key_again(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    key = world.run.state.key
    world.join("c003")  # a new process: no key, no prompt
    world.pump()
    assert world.run.error is None
    assert not world.errors
    assert world.run.state.key == key
    assert len(set(finals(world))) == 1
    assert len(finals(world)) == 4


def test_a_late_client_gets_key_and_prompt_from_the_maker(tmp_path: Path) -> None:
    world = World(tmp_path, protection="bfv", gather_seconds=20.0, alive_seconds=12.0)
    for name in names(3):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    world.join("c004")
    world.pump()
    assert world.run.error is None
    assert world.store.summary()["rounds"][-1]["cohort"] == list(names(4))
    assert len(set(finals(world))) == 1
    assert len(finals(world)) == 4


def test_a_restarted_maker_is_replaced_by_a_holder_and_the_prompt_survives(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    key = world.run.state.key
    world.join("c001")
    world.pump()
    assert world.run.error is None
    assert not world.errors
    assert (world.run.state.maker, world.run.state.election) == ("c002", 2)
    assert world.run.state.key not in (key, NO_KEY)
    assert len(set(finals(world))) == 1
    assert len(finals(world)) == 4


def test_a_configured_maker_makes_the_key(tmp_path: Path) -> None:
    world = world_of(tmp_path, key_maker="c003")
    world.pump()
    assert world.run.error is None
    assert world.run.state.maker == "c003"


def test_a_restarted_server_goes_on_with_sealed_prompt_and_key(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.CipherUpload) and message.round == 2)
    before = world.run.state
    world.store.close()
    world.queue.clear()
    world.clock += 100
    world.start_server()
    after = world.run.state
    assert before.sealed
    assert (after.sealed, after.key, after.maker, after.election) == (
        before.sealed, before.key, before.maker, before.election
    )  # fmt: skip
    for name in names(4):
        world.reconnect(name)
    world.pump()
    assert world.run.error is None
    assert not world.errors
    assert world.run.state.election == 1
    final = world.sessions["c001"].final
    assert final is not None
    assert np.allclose(final, expected_prompt(world.toys, 2), atol=1e-5)
    assert [(r["round"], r["learning_round"]) for r in world.store.summary()["rounds"]] == [
        (1, 1), (3, 2), (4, 3),
    ]  # fmt: skip


def test_a_client_withdraws_and_gets_the_key_again(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    session = world.sessions["c003"]
    world.pump(lambda w, message: isinstance(message, m.Plan) and message.plan.round == 2)
    session.party.keyring.cohort = None
    plan = next(
        x.message for _, r, x in world.queue if isinstance(x.message, m.Plan) and r == "c003"
    )
    with pytest.raises(errors.KeyMismatchError) as refused:
        session.on(plan)
    replies = session.withdraw(refused.value)
    assert isinstance(replies[0], m.Withdraw)
    world.forget("c003")
    for reply in replies:
        world.send("c003", reply)
    world.pump()
    assert world.run.error is None
    assert len(set(finals(world))) == 1
    assert len(finals(world)) == 4


def test_a_server_that_rolls_the_prompt_back_is_noticed(tmp_path: Path) -> None:
    import dataclasses

    from secure_fedprompt.protocol.expand import Purpose, digest

    world = world_of(tmp_path, rounds=3)
    world.pump(lambda w, message: isinstance(message, m.Plan) and message.plan.round == 2)
    session = world.sessions["c002"]
    plan = next(
        x.message for _, r, x in world.queue if isinstance(x.message, m.Plan) and r == "c002"
    )
    held = session.party.keyring.cohort
    assert held is not None
    other = held.seal_prompt(plan.plan.run, 2, bytes(40))  # a colluder's
    forged = dataclasses.replace(plan.plan, base_digest=digest(Purpose.BASE, other))
    with pytest.raises(errors.MismatchError, match="last sum"):
        session.on(m.Plan(forged, other))


def test_a_sealed_prompt_that_does_not_open_ends_our_part_in_the_round(tmp_path: Path) -> None:
    import dataclasses

    from secure_fedprompt.protocol.expand import Purpose, digest

    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.Plan) and message.plan.round == 2)
    session = world.sessions["c002"]
    plan = next(
        x.message for _, r, x in world.queue if isinstance(x.message, m.Plan) and r == "c002"
    )
    bad = bytes([plan.base[0] ^ 1]) + bytes(plan.base[1:])
    forged = dataclasses.replace(plan.plan, base_digest=digest(Purpose.BASE, bad))
    with pytest.raises(errors.SealError) as refused:
        session.on(m.Plan(forged, bad))
    assert isinstance(session.withdraw(refused.value)[0], m.Withdraw)


def restart(world: World) -> None:
    world.store.close()
    world.queue.clear()
    world.clock += 100
    world.start_server()
    for name in set(world.sessions) - world.lost:
        world.reconnect(name)


def finished_alike(world: World, clients: int) -> None:
    assert world.run.error is None
    assert not world.errors
    assert len(set(finals(world))) == 1
    assert len(finals(world)) == clients
    assert all(s.over for n, s in world.sessions.items() if n not in world.lost)


def test_two_makers_in_a_row_can_be_lost(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    world.join("c001")  # without a key: somebody else must make one
    lose_before(world, "c002", m.KeyGrant, 1)
    world.pump()
    assert world.run.state.maker == "c003"
    finished_alike(world, 3)


@pytest.mark.parametrize("kind", [m.KeyGrant, m.KeyBox, m.CipherUpload])
def test_a_server_restarted_while_a_new_key_spreads_goes_on(tmp_path: Path, kind: type) -> None:
    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    world.join("c001")
    world.pump(lambda w, message: isinstance(message, kind) and message.round == 2)
    restart(world)
    world.pump()
    finished_alike(world, 4)


def test_holders_that_go_silent_together_do_not_end_the_run(tmp_path: Path) -> None:
    world = World(tmp_path, n=7, protection="bfv", alive_seconds=12.0)
    for name in names(7):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    world.lost |= {"c001", "c002"}
    world.join("c006")
    world.pump()
    finished_alike(world, 5)


def test_a_reconnection_while_the_key_spreads_costs_no_deadline(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    world.join("c004")
    world.pump(lambda w, message: isinstance(message, m.KeyRequest))
    world.forget("c003")
    world.reconnect("c003")
    world.pump()
    assert world.clock < 50
    finished_alike(world, 4)


def test_a_client_restarted_after_its_upload_is_given_the_key_again(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    seen: list[str] = []

    def until(w: World, message: m.Message) -> bool:
        seen.append(type(message).__name__)
        return seen.count("CipherSum") == 1

    world.pump(until)
    world.join("c004")
    world.pump()
    finished_alike(world, 4)


def test_a_run_key_of_small_order_or_of_another_is_refused(tmp_path: Path) -> None:
    import dataclasses

    from rounds import identity

    from secure_fedprompt.protocol.expand import Purpose

    for number, forged in enumerate((bytes(32), None)):
        world = world_of(tmp_path / str(number))
        original = world.run.on

        def on(
            sender: str, message: m.Message, now: float,
            world: World = world, original: Any = original, forged: bytes | None = forged,
        ) -> Any:  # fmt: skip
            if sender == "c004" and isinstance(message, m.Ready):
                ready = world.run.clients["c001"].ready
                key = forged if forged is not None else ready.seal_key  # type: ignore[union-attr]
                message = dataclasses.replace(message, seal_key=key)
                body = message.body(world.roster.digest)
                signature = identity("c004").sign(Purpose.RUN_KEY, body)
                message = dataclasses.replace(message, signature=signature)
            return original(sender, message, now)

        world.run.on = on  # type: ignore[method-assign]
        world.pump()
        assert world.run.error is None
        assert set(world.errors) == {"c004"}


def test_who_comes_after_the_last_key_is_told_so(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump()
    final = world.run.farewell("c004")[0][1]
    world.join("c004")
    session = world.sessions["c004"]
    with pytest.raises(errors.RunFailedError, match="ended before this client could take part"):
        session.on(final)
    session.on(welcome_again(world))
    with pytest.raises(errors.RunFailedError, match="before this client was given its key"):
        session.on(final)


def welcome_again(world: World) -> m.Welcome:
    state, settings = world.run.state, world.settings.method_settings().to_bytes()
    return m.Welcome(state.run, state.server_nonce, state.commitments, settings, 0)


def test_figures_of_an_aborted_round_are_not_told(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.Opened) and message.round == 1)
    session = world.sessions["c001"]
    assert session.history == {}
    session.on(m.RoundEnd(session.run, 1, "aborted"))
    assert session.history == {}


def test_no_decrypted_number_reaches_the_server(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.Plan))
    session = world.sessions["c002"]
    world.pump(lambda w, message: isinstance(message, m.CipherUpload))
    error = errors.DecryptionError("decrypted sum counts 1234567 contributors")
    (withdrawal,) = session.withdraw(error)
    assert isinstance(withdrawal, m.Withdraw)
    assert (withdrawal.error, withdrawal.reason) == ("DecryptionError", "")
    assert session.leave(error).reason == ""
