"""How long a server waits, and for whom."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import World
from rounds import names

from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m


def test_too_few_clients_before_the_deadline(tmp_path: Path) -> None:
    world = World(tmp_path, gather_seconds=20.0)
    world.join("c001")
    world.join("c002")
    world.pump()
    with pytest.raises(errors.TooFewClientsError, match=r"2 of at least 3 clients \(c001, c002\)"):
        raise world.run.error or AssertionError
    assert isinstance(world.errors["c001"], errors.RunFailedError)


def test_a_server_waits_for_a_quorum_as_long_as_its_patience_lasts(tmp_path: Path) -> None:
    for third_comes in (True, False):
        folder = tmp_path / str(third_comes)
        folder.mkdir()
        world = World(folder, gather_seconds=20.0, patience=150.0)
        world.join("c001")
        world.join("c002")
        world.pump(until=lambda w, message: w.clock > 100)
        assert not world.run.over
        said = [text for kind, text in world.events if kind == "waiting"]
        assert said == ["for clients, 150 s at most: 2 of at least 3 clients (c001, c002)"]
        if third_comes:
            world.join("c003")
        world.pump()
        assert (world.run.error is None) is third_comes
        assert world.run.short_since is None or not third_comes
    assert 170 <= world.clock <= 185


def test_the_stage_is_called_training_only_where_somebody_trains(tmp_path: Path) -> None:
    world = World(tmp_path, 3)
    for name in names(3):
        world.join(name)
    world.pump()
    stages = [list(r["seconds"]) for r in world.store.summary()["rounds"]]
    assert [("training" in s, "collecting" in s) for s in stages] == [
        (True, False), (True, False), (False, True),
    ]  # fmt: skip


def test_every_shortage_has_the_whole_patience(tmp_path: Path) -> None:
    world = World(tmp_path, 3, gather_seconds=20.0, patience=150.0, alive_seconds=12.0, rounds=4)
    for name in names(3):
        world.join(name)
    for number in (2, 3):
        world.pump(lambda w, message, n=number: w.run.state.learning_round == n)
        world.lost.add("c003")
        until = world.clock + 120
        world.pump(lambda w, message, t=until: w.clock > t)
        world.join("c003")
    world.pump()
    assert world.run.error is None
    assert [kind for kind, _ in world.events].count("waiting") == 2


def test_an_opening_waits_as_long_for_those_without_whom_it_cannot_end(tmp_path: Path) -> None:
    for patience in (1.0, 150.0):
        folder = tmp_path / str(patience)
        folder.mkdir()
        world = World(
            folder, 3, gather_seconds=20.0, patience=patience, stage_seconds=10.0,
            alive_seconds=12.0,
        )  # fmt: skip
        for name in names(3):
            world.join(name)

        def lose(
            sender: str, recipient: str, message: m.Message, world: World = world
        ) -> m.Message:
            if isinstance(message, m.UnmaskRequest) and recipient == "c003":
                world.lost.add("c003")
            return message

        world.tamper = lose
        world.pump(lambda w, message: w.clock > 100)
        world.tamper = lambda sender, recipient, message: message
        world.reconnect("c003")
        world.pump()
        assert (world.run.error is None) is (patience > 100)


def test_it_waits_as_long_in_the_middle_of_a_run(tmp_path: Path) -> None:
    world = World(tmp_path, 3, gather_seconds=20.0, patience=200.0, alive_seconds=12.0, rounds=3)
    for name in names(3):
        world.join(name)
    world.pump(until=lambda w, message: w.run.state.learning_round == 2)
    world.lost.add("c003")
    world.pump(until=lambda w, message: w.clock > 150)
    assert not world.run.over
    assert [kind for kind, _ in world.events].count("waiting") == 1
    world.join("c003")
    world.pump()
    assert world.run.error is None
    assert world.run.state.learning_round == 5


def test_fewer_than_expected_go_on_after_the_deadline(tmp_path: Path) -> None:
    world = World(tmp_path, gather_seconds=20.0)
    for name in names(3):
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert world.run.state.commitments[-1].name == "c003"
