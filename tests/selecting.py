"""A federation of fixed prompt groups and selection keys, and frames altered on their way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Self

import numpy as np
from federation import World
from rounds import names

from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.layout import FILLED, TensorSpec
from secure_fedprompt.protocol.selection import shares
from secure_fedprompt.protocol.settings import FedMGPSettings, MethodSettings

GROUPS, SLOTS, SHAPES = 4, 2, {"text": (3,), "visual": (5,)}
SECURE: dict[str, Any] = {
    "method": "fedmgp", "weights": "uniform", "selection": "secure", "rounds": 2, "metrics": "off",
    "fedmgp": FedMGPSettings(groups=GROUPS, slots=SLOTS),
}  # fmt: skip


class Grouped:
    """A workload of fixed groups and keys: round 1 sends the first groups."""

    model_fingerprint, classes_digest, weight = b"m" * 32, b"c" * 32, 1.0

    def __init__(self, seed: int, keys: np.ndarray | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.groups = {k: rng.uniform(-0.4, 0.4, (GROUPS, *s)) for k, s in SHAPES.items()}
        drawn = rng.integers(0, 2**32, (2, GROUPS)).astype(np.uint32)
        self.keys = drawn if keys is None else keys
        self.choices: list[Any] = []
        self.trained = 0

    def prepare(self, settings: MethodSettings) -> Self:
        self.settings = settings
        return self

    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(k, (SLOTS, *s)) for k, s in SHAPES.items())

    def initial(self) -> Prompt:
        return np.full(16, 0.25, np.float32)

    def run(self, work: Work) -> Any:
        if work.plan.selecting and work.choice is None:
            self.trained += 1
            return self.keys
        choice = work.choice or (np.arange(SLOTS),) * 2
        self.choices.append([c.tolist() for c in choice])
        values, at = {}, 0
        for (name, shape), chosen in zip(SHAPES.items(), choice, strict=True):
            size = SLOTS * int(np.prod(shape))
            base = work.base[at : at + size].reshape(SLOTS, *shape)
            at += size
            values[name] = np.zeros_like(base)
            sent = self.groups[name][chosen]
            values[name][: len(chosen)] = sent + 1e-3 * work.plan.round - base[: len(chosen)]
            if work.plan.selection.federation:
                values[FILLED + name] = (np.arange(SLOTS) < len(chosen)).astype(np.float64)
        return Update(values, 1.0)


def federate(folder: Path, n: int = 4, helpers: tuple[str, ...] = (), **changes: Any) -> World:
    world = World(folder, n, helpers=helpers, **{**SECURE, **changes})
    world.toys = {name: Grouped(i) for i, name in enumerate(names(n))}
    for name in (*names(n), *helpers):
        world.join(name)
    return world


def expected_choices(world: World, keep: int = 0, fillers: int = 3) -> dict[str, list[list[int]]]:
    """By the plain sort: each client's own best, or as many of them as are among the best of all,
    in slots that enough clients fill."""
    own = {name: shares.order(toy.keys) for name, toy in world.toys.items()}
    if not keep:
        return {name: best[:, :SLOTS].tolist() for name, best in own.items()}
    found: dict[str, list[list[int]]] = {name: [] for name in world.toys}
    for modality in range(2):
        flat = np.concatenate([toy.keys[modality] for toy in world.toys.values()])
        winners = shares.order(flat)[:keep] // GROUPS
        counts = [min(SLOTS, int((winners == i).sum())) for i in range(len(world.toys))]
        opened = sum(sum(c > k for c in counts) >= fillers for k in range(SLOTS))
        for name, count in zip(world.toys, counts, strict=True):
            found[name].append(own[name][modality][: min(count, opened)].tolist())
    return found


def slots_of(world: World, prompt: np.ndarray) -> dict[str, np.ndarray]:
    found, at = {}, 0
    for name, shape in SHAPES.items():
        size = SLOTS * int(np.prod(shape))
        found[name] = prompt[at : at + size].reshape(SLOTS, *shape)
        at += size
    return found


def rounds(world: World) -> list[dict[str, Any]]:
    return [value for kind, value in world.events if kind == "round"]


def altered(message: m.Message, **changes: Any) -> m.Message:
    return dataclasses.replace(message, **changes)  # type: ignore[type-var]


def flipped(data: bytes | memoryview, at: int = 0) -> bytes:
    data = bytes(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def tampered(folder: Path, tamper: Any, **changes: Any) -> World:
    """A federation whose frames are altered on their way."""
    world = World(folder, 4, **{**SECURE, **changes})
    world.tamper = tamper
    world.toys = {name: Grouped(i) for i, name in enumerate(names(4))}
    for name in names(4):
        world.join(name)
    world.pump()
    return world


def only(kind: type, change: Any, who: str = "") -> Any:
    """A tamperer of frames of one kind in the first attempt at the second round."""

    def tamper(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, kind) and message.round == 2 and (not who or recipient == who):  # type: ignore[attr-defined]
            return change(message)  # type: ignore[no-any-return]
        return message

    return tamper


def bits_of(words: np.ndarray, width: int) -> np.ndarray:
    """(batch, keys) to (keys * width, batch)."""
    table = words.astype(np.uint64)[..., None] >> np.arange(width, dtype=np.uint64) & np.uint64(1)
    return table.reshape(len(words), -1).T.astype(bool)


def shared(keys: np.ndarray, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Both parties' inputs for (batch, count) keys."""
    rng = np.random.default_rng(seed)
    theirs = rng.integers(0, 1 << width, keys.shape)
    return bits_of((keys - theirs) % (1 << width), width), bits_of(theirs, width)
