"""What a hub hears over real sockets."""

from __future__ import annotations

import time

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.server.hub import CurveHub

PATIENCE = 20.0


def collect(hub: CurveHub, count: int) -> list[tuple[str, m.Message]]:
    """The next messages with their senders: so many, or those of PATIENCE seconds."""
    got: list[tuple[str, m.Message]] = []
    deadline = time.monotonic() + PATIENCE
    while len(got) < count and time.monotonic() < deadline:
        got += [(name, frame.heard()) for name, frame in hub.poll(0.05)]
    return got
