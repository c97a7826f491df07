"""Time: a day without anybody, a thousand rounds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from federation import World
from rounds import names

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.transport import Frame

DAY = 86_400.0


def everybody(world: World) -> World:
    for name in names(world.n):
        world.join(name)
    return world


def up_to(world: World, learning_round: int) -> None:
    """Run until the first plan of this round is under way."""
    last: list[tuple[str, str, m.Message]] = []

    def seen(*frame: Any) -> Any:
        last[:] = [frame]
        return frame[2]

    world.tamper = seen
    world.pump(lambda w, x: isinstance(x, m.Plan) and x.plan.learning_round == learning_round)
    sender, recipient, message = last[0]
    world.queue.appendleft((sender, recipient, Frame.of(message)))  # where the pump stopped


def test_who_comes_back_after_a_day_goes_on(tmp_path: Path) -> None:
    """One is lost in the second round, in the fourth everybody is; a day later all are back, each
    with what its disk has kept."""
    world = World(tmp_path, 4, rounds=6, metrics="off", patience=2 * DAY, alive_seconds=30.0,
                  max_attempts=0)  # fmt: skip
    world.latest = 10 * DAY
    everybody(world)
    up_to(world, 2)
    world.lost.add("c003")
    world.lose("c003")
    up_to(world, 4)
    for name in names(4):
        world.lost.add(name)
        world.lose(name)
        world.forget(name)
    for _ in range(24):
        world.clock += DAY / 24
        world.post(world.run.tick(world.clock))
        assert not world.run.over, world.run.error
    everybody(world).pump()
    assert world.run.error is None, world.run.error
    assert not world.errors
    rows = [row for row in world.store.summary()["rounds"] if row["outcome"] == "done"]
    assert [row["learning_round"] for row in rows] == list(range(1, 7))
    there = ["c003" in set(row["cohort"]) - set(row["dropped"]) for row in rows]
    assert there == [True, False, False, True, True, True]


@pytest.mark.slow
@pytest.mark.skipif("LONG" not in os.environ, reason="minutes: LONG=1")
def test_a_thousand_rounds(tmp_path: Path) -> None:
    """Round numbers, journals and the store go on; what a round takes of the disk stays the same."""
    world = World(tmp_path, 4, rounds=1000, metrics="off")
    world.latest = 1e9
    up_to(everybody(world), 501)
    half = size(tmp_path)
    world.pump()
    assert world.run.error is None, world.run.error
    assert not world.errors
    done = [row["learning_round"] for row in world.store.summary()["rounds"]]
    assert done == list(range(1, 1001))
    assert size(tmp_path) - half < 1.1 * half


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
