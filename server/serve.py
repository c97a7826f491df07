"""Between a hub and the server's state machine: what both programs and memory do with frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.transport import Frame, Hub

Outbox = list[tuple[str, m.Message]]  # to whom, and what
Counter = Callable[[str, str, str, int], None]


class Machine(Protocol):
    """A run, or a single round."""

    @property
    def over(self) -> bool: ...

    def on(self, sender: str, message: m.Message, now: float) -> Outbox: ...

    def tick(self, now: float) -> Outbox: ...

    def gone(self, name: str, now: float) -> Outbox: ...


def hear(hub: Hub, machine: Machine, timeout: float, clock: Callable[[], float]) -> Outbox:
    """Take what arrives within ``timeout`` seconds."""
    return [
        out for name, frame in hub.poll(timeout) for out in machine.on(name, frame.heard(), clock())
    ]


def post(hub: Hub, machine: Machine, out: Outbox, clock: Callable[[], float]) -> None:
    """Send; who cannot be reached is gone."""
    waiting = list(out)
    while waiting:
        name, message = waiting.pop(0)
        if not hub.send(name, Frame.of(message)):
            waiting += machine.gone(name, clock())


class CountedHub:
    """A hub whose frames are counted; a ``transport.Hub``.

    Args:
        count: called for each frame with peer, "up" or "down", message type and bytes.
    """

    def __init__(self, hub: Hub, count: Counter) -> None:
        self._hub, self._count = hub, count

    def poll(self, timeout: float) -> Iterator[tuple[str, Frame]]:
        for name, frame in self._hub.poll(timeout):
            if frame.came:
                self._count(name, "up", type(frame.heard()).__name__, len(frame.data))
            yield name, frame

    def reaches(self, name: str) -> bool:
        return self._hub.reaches(name)

    def send(self, name: str, frame: Frame) -> bool:
        if not self._hub.send(name, frame):
            return False
        self._count(name, "down", type(frame.message).__name__, len(frame.data))
        return True
