""""""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from federation import World
from rounds import (
    names,
)


def world_of(folder: Path, n: int = 4, **changes: Any) -> World:
    world = World(folder, n, **{"alive_seconds": 12.0, **changes})
    world.withdraws = True
    for name in names(n):
        world.join(name)
    return world


def spread(world: World) -> None:
    start = np.random.default_rng(0).normal(0, 0.02, 10).astype(np.float32)
    for toy in world.toys.values():
        toy.initial = lambda: start


def second(tmp_path: Path, first: World, n: int = 5, **changes: Any) -> World:
    world = World(tmp_path / "second", n, **{"alive_seconds": 12.0, "max_attempts": 2, **changes})
    world.journals, world.withdraws, world.clock = first.journals, True, 1.0
    spread(world)
    world.start_server()
    return world
