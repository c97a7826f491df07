"""A federation in memory whose ends all keep audit logs, as their sockets would."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from federation import Toy, World
from rounds import identity, names

from secure_fedprompt.audit import summary
from secure_fedprompt.audit.findings import Level
from secure_fedprompt.audit.log import Log
from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.host.recorder import Recorder, link
from secure_fedprompt.protocol import fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.transport import Frame

Tap = Callable[[str, str, m.Message], m.Message]
WIDTH = 160  # values of an update: enough to test for uniformity


class Wide(Toy):
    """A toy with an update that statistics can look at."""

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("ctx", (10, WIDTH // 10)),)

    def initial(self) -> Prompt:
        return np.full(WIDTH, 0.5, np.float32)

    def run(self, work: Work) -> Update:
        counted = {field.name for field in work.plan.layout}
        values: dict[str, Any] = {
            k: np.float64(4) for k in ("seen", "correct", "loss") if k in counted
        }
        if work.plan.training:
            noise = np.random.default_rng([int(self.weight), work.plan.round]).normal(
                0, 0.01, WIDTH
            )
            values["ctx"] = (0.1 * (self.target - work.base) + noise).reshape(10, -1)
        return Update(values, 1.0 if work.plan.uniform else self.weight)


def untouched(sender: str, recipient: str, message: m.Message) -> m.Message:
    return message


def federate(
    folder: Path,
    tap: Tap = untouched,
    *,
    n: int = 4,
    mode: str = "full",
    until: Any = lambda world, message: False,
    start: float = 0.0,
    **changes: Any,
) -> tuple[World, dict[str, Path]]:
    """A run whose frames pass ``tap`` before they are recorded at both ends.

    Returns:
        the federation and each end's log folder.
    """
    world = World(folder / "run", n, **{"rounds": 2, "min_clients": 3, **changes})
    world.toys = {name: Wide(i / 10, 10.0 + i) for i, name in enumerate(names(n))}
    logs = {
        name: Recorder(folder / name / "audit", mode, 1 << 30, identity(name),
                       world.roster.by_name[name], world.roster)
        for name in ("server", *names(n))
    }  # fmt: skip

    def record(sender: str, recipient: str, message: m.Message) -> m.Message:
        ends = isinstance(message, m.RoundEnd | m.Finish)
        if ends and not sender:
            passed("server", recipient, logs["server"].head(message))
        message = tap(sender, recipient, message)
        passed(sender or "server", recipient or "server", message)
        if ends and not sender:
            passed(recipient, "server", logs[recipient].head(message))
        return message

    def passed(sender: str, recipient: str, message: m.Message) -> None:
        logs[sender].sent(recipient, Frame.of(message))
        logs[recipient].got(sender, Frame.of(message))

    world.tamper = record
    world.clock = start  # another one makes other nonces, hence another run
    world.start_server()
    for name in names(n):
        world.join(name)
    with contextlib.suppress(AssertionError):  # a spoilt run may come to a standstill
        world.pump(until)
    for log in logs.values():
        log.close()
    return world, {name: folder / name for name in logs}


def read(folders: dict[str, Path], *which: str) -> list[Log]:
    return [Log.read(folders[name]) for name in which]


VICTIM = "c002"


def audited(
    folder: Path, tap: Tap = untouched, *, peers: tuple[str, ...] = (VICTIM,), **changes: Any
) -> summary.Audit:
    """The server's log of a run, held against those of clients."""
    _, folders = federate(folder, tap, **changes)
    log, *others = read(folders, "server", *peers)
    return summary.audit(log, others, "", None)


def failures(result: summary.Audit) -> list[tuple[str, str]]:
    return [(f.check, f.text) for f in result.findings if f.level is Level.FAIL]


def words_of(plan: Any, message: m.MaskedUpload) -> np.ndarray:
    total = np.zeros(sum(f.size for f in plan.layout), np.uint32)
    fixedpoint.add_wire(plan.layout, message.vector, total)
    return total


class Spoiler:
    """Replaces the victim's masked upload."""

    def __init__(self, how: str) -> None:
        self.how, self.plan, self.first, self.masks = how, None, None, None

    def __call__(self, sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Plan):
            self.plan = message.plan
        if not isinstance(message, m.MaskedUpload) or not self.plan.training:
            return message
        rng = np.random.default_rng(self.plan.round)
        steps = rng.normal(0, 2.0**14, WIDTH + 7).astype(np.int64)  # an update in fixed point
        match self.how:
            case "unmasked" if sender == VICTIM:
                words = steps.astype(np.uint32)
            case "mask of two rounds" if sender == VICTIM:
                if self.masks is None:
                    self.masks = words_of(self.plan, message)
                    return message  # the first sum comes out right, or there would be no second
                words = self.masks + steps.astype(np.uint32)
            case "mask of two clients" if sender in ("c001", VICTIM):
                if self.masks is None:
                    self.masks = words_of(self.plan, message)
                words = self.masks + steps.astype(np.uint32) * np.uint32(sender == VICTIM)
            case "mask of far clients" if sender in ("c001", "c003"):
                if self.masks is None:
                    self.masks = words_of(self.plan, message)
                words = self.masks + steps.astype(np.uint32) * np.uint32(sender == "c003")
            case _:
                return message
        return dataclasses.replace(message, vector=fixedpoint.to_wire(self.plan.layout, words))


def relabel(folder: Path, old: bytes, new: bytes) -> None:
    """Rewrite records and the chain with them, as an owner could."""
    path, chain, lines = folder / "audit-0000.jsonl", bytes(32), []
    content = path.read_bytes()
    assert old in content
    for line in content.splitlines():
        text = line.partition(b"\t")[0].replace(old, new)
        chain = link(chain, text)
        lines.append(text + b"\t" + chain.hex().encode() + b"\n")
    path.write_bytes(b"".join(lines))


def copied(good: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    for name, folder in good.items():
        shutil.copytree(folder, tmp_path / name)
    return {name: tmp_path / name for name in good}
