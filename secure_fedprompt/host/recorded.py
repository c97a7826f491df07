"""A link or hub whose every frame goes into the audit log, and heads at the end of each round.

Frames are recorded before they are sent, or a kill in between would hide one.
"""

from __future__ import annotations

from collections.abc import Iterator

from secure_fedprompt.host.recorder import Recorder
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.transport import Frame, Hub, Link


class RecordedLink:
    """A link to the server that the recorder watches; a ``transport.Link``."""

    def __init__(self, link: Link, recorder: Recorder) -> None:
        self._link, self._recorder = link, recorder

    @property
    def connections(self) -> int:
        return self._link.connections

    def send(self, frame: Frame) -> None:
        self._recorder.sent(self._recorder.server, frame)
        self._link.send(frame)

    def receive(self, timeout: float) -> Frame | None:
        frame = self._link.receive(timeout)
        if frame is None:
            return None
        self._recorder.got(self._recorder.server, frame)
        if isinstance(frame.message, m.RoundEnd | m.Finish):
            self.send(Frame.of(self._recorder.head(frame.message)))
        return frame


class RecordedHub:
    """A hub that the recorder watches; a ``transport.Hub``."""

    def __init__(self, hub: Hub, recorder: Recorder) -> None:
        self._hub, self._recorder = hub, recorder

    def poll(self, timeout: float) -> Iterator[tuple[str, Frame]]:
        for name, frame in self._hub.poll(timeout):
            if frame.came:
                self._recorder.got(name, frame)
            yield name, frame

    def reaches(self, name: str) -> bool:
        return self._hub.reaches(name)

    def send(self, name: str, frame: Frame) -> bool:
        if not self.reaches(name):
            return False
        if isinstance(frame.message, m.RoundEnd | m.Finish):
            self.send(name, Frame.of(self._recorder.head(frame.message)))
        self._recorder.sent(name, frame)
        return self._hub.send(name, frame)
