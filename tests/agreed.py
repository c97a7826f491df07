"""Federations that agree on terms."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from federation import Toy, World
from rounds import identity, names

from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose


class Fixed(Toy):
    """Training that is a function of the prompt alone, as a full batch makes it."""

    def __init__(self, seed: int, images: float) -> None:
        super().__init__(0.0, images)
        self.update = np.random.default_rng(seed).uniform(-0.8, 0.8, 10)

    def run(self, work: Work) -> Update:
        counted = {field.name for field in work.plan.layout}
        values: dict[str, Any] = {
            k: np.float64(self.weight // 2) for k in ("seen", "correct", "loss") if k in counted
        }
        if work.plan.training:
            values |= {"ctx": self.update[:6].reshape(2, 3), "extra": self.update[6:]}
        return Update(values, 1.0 if work.plan.uniform else self.weight)


IMAGES = (7.0, 11.0, 12.0, 20.0, 33.0)


def federation(folder: Path, n: int = 5, **changes: Any) -> World:
    world = World(folder, n, **{"rounds": 40, **changes})
    world.toys = {name: Fixed(i, IMAGES[i % 5]) for i, name in enumerate(names(n))}
    return world


def everybody(world: World) -> World:
    for name in world.toys:
        world.join(name)
    world.pump()
    return world


def signed(message: m.Terms, **changes: Any) -> m.Terms:
    terms = dataclasses.replace(message.terms, **changes)
    signature = identity("server").sign(Purpose.TERMS, terms.digest)
    return dataclasses.replace(message, terms=terms, signature=signature)
