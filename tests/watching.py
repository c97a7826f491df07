"""Runs under masks whose frames are watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from federation import World

from secure_fedprompt.protocol import messages as m


def world_of(folder: Path, n: int = 5, **changes: Any) -> World:
    return World(folder, n, **{"rounds": 3, "alive_seconds": 12.0, **changes})


def watched(world: World) -> list[tuple[str, str, m.Message]]:
    """All frames, as they pass."""
    seen: list[tuple[str, str, m.Message]] = []
    before = world.tamper

    def tamper(sender: str, recipient: str, message: m.Message) -> m.Message:
        message = before(sender, recipient, message)
        seen.append((sender, recipient, message))
        return message

    world.tamper = tamper
    return seen


def done(world: World) -> list[tuple[int, int]]:
    return [
        (r["round"], r["learning_round"])
        for r in world.store.summary()["rounds"] if r["outcome"] == "done"
    ]  # fmt: skip
