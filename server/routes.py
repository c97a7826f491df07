"""Which of a member's connections speaks for it: the last one, unless an earlier one lives on.

A connection that was lost leaves frames behind that are read after the next one's first. A copy of
the key on another machine goes on for ever. So frames of an earlier connection are dropped, and
when they keep coming, the later of the two processes is told to end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

SIGHTINGS = 4  # of an earlier connection, SPACING apart: more than it can have left behind
SPACING = 1.0  # seconds; a client is heard of every two
REMEMBERED = 16  # connections of one member


class Heard(Enum):
    """Where a frame comes from."""

    CURRENT = auto()
    NEW = auto()  # a new connection, the current one from here on
    STALE = auto()  # an earlier connection: to be dropped
    TWICE = auto()  # a process that has a rival of the same key; see ``Routes.settle``


@dataclass
class _Line:
    route: bytes
    earlier: deque[bytes] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    refused: bytes = b""
    sightings: int = 0
    at: float = 0.0


class Routes:
    """Connections by member, each known by its ZeroMQ routing id."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    def of(self, name: str) -> bytes | None:
        """The connection that frames to a member go to."""
        line = self._lines.get(name)
        return line.route if line else None

    def hear(self, name: str, route: bytes, now: float) -> Heard:
        """Note a frame from a connection."""
        line = self._lines.get(name)
        if line is None:
            self._lines[name] = _Line(route)
            return Heard.NEW
        if route == line.route:
            return Heard.CURRENT
        if route not in line.earlier:
            line.earlier.append(line.route)
            line.route, line.sightings, line.at = route, 0, now
            return Heard.NEW
        if route == line.refused:
            return Heard.STALE
        if now - line.at >= SPACING:
            line.sightings, line.at = line.sightings + 1, now
        return Heard.TWICE if line.sightings >= SIGHTINGS else Heard.STALE

    def settle(self, name: str, route: bytes) -> bytes:
        """Give a member to the connection that was heard twice; returns the one that it had."""
        line = self._lines[name]
        line.refused, line.route, line.sightings = line.route, route, 0
        line.earlier.append(line.refused)
        return line.refused
