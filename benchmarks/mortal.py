"""A program of this package that kills itself (``kill -9``) at its n-th frame.

    python benchmarks/mortal.py 17 secure_fedprompt.client --config client.toml

Frames are counted as they are sent and as they arrive, heartbeats not. At an odd n it dies before
frame (n + 1) / 2 leaves, or is handled; at an even one after frame n / 2 has left, or has been
handled and the first answer has left.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Iterator
from typing import Any

from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.hub import CurveHub


class Fate:
    """Counts to n."""

    def __init__(self, n: int) -> None:
        self.left, self.before = (n + 1) // 2, n % 2 == 1

    def passed(self, frame: Frame | None, before: bool) -> None:
        if frame is None or isinstance(frame.message, m.Alive):
            return
        if before:
            self.left -= 1
        if self.left <= 0 and before == self.before:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    fate = Fate(int(sys.argv[1]))
    link_send, link_receive = CurveLink.send, CurveLink.receive
    hub_send, hub_poll = CurveHub.send, CurveHub.poll

    def send(self: CurveLink, frame: Frame) -> None:
        fate.passed(frame, before=True)
        link_send(self, frame)
        fate.passed(frame, before=False)

    def receive(self: CurveLink, timeout: float) -> Frame | None:
        frame = link_receive(self, timeout)
        fate.passed(frame, before=True)
        return frame

    def post(self: CurveHub, name: str, frame: Frame) -> bool:
        fate.passed(frame, before=True)
        left = hub_send(self, name, frame)
        fate.passed(frame, before=False)
        return left

    def poll(self: CurveHub, timeout: float) -> Iterator[Any]:
        for peer, frame in hub_poll(self, timeout):
            fate.passed(frame, before=True)
            yield peer, frame
            fate.passed(frame, before=False)

    CurveLink.send, CurveLink.receive = send, receive  # type: ignore[method-assign]
    CurveHub.send, CurveHub.poll = post, poll  # type: ignore[method-assign]
    module, sys.argv = sys.argv[2], [sys.argv[2], *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
