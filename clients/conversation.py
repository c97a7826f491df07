"""A member's side of a link: it greets on each connection, and says now and then that it lives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.transport import Frame, Link

ALIVE_SECONDS = 2.0
GREETING = 5.0  # seconds that an answer to Hello may take before a Rejoin is believed


class Conversation:
    """Messages with the server.

    Args:
        link: to it.
        hello: makes the first frame of each connection.
    """

    def __init__(
        self, link: Link, hello: Callable[[], m.Hello], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link, self._hello, self._clock = link, hello, clock
        self._connections, self._greeted, self._alive = 0, 0.0, -ALIVE_SECONDS

    def greet(self) -> None:
        """Greet, if the connection is a new one."""
        if self._link.connections != self._connections:
            self._connections, self._greeted = self._link.connections, self._clock()
            self.send([self._hello()])

    def live(self) -> None:
        """Say that we live, if it was said long ago."""
        if self._clock() - self._alive > ALIVE_SECONDS:
            self._alive = self._clock()
            self.send([m.Alive()])

    def receive(self, timeout: float) -> m.Message | None:
        """The next message, without a Rejoin that crossed our greeting.

        Raises:
            CodecError: the server sent something else. LinkError: there is no connection.
        """
        frame = self._link.receive(timeout)
        message = frame.opened() if frame else None
        crossed = isinstance(message, m.Rejoin) and self._clock() - self._greeted < GREETING
        return None if crossed else message

    def send(self, messages: Iterable[m.Message]) -> None:
        for message in messages:
            self._link.send(Frame.of(message))
