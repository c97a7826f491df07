"""What the programs need of a network: whole frames, in order or lost, from a proven sender.

Sockets (``clients.link``, ``server.hub``), memory (``secure_fedprompt.memory``) and any other
transport implement ``Link`` and ``Hub``; what watches frames, as the audit log does
(``host.recorded``), is itself a link or a hub around another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import CodecError, SecureFedPromptError


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Frame:
    """One frame, and what it holds.

    Attributes:
        data: its bytes.
        message: what it holds, or None.
        error: why it holds none, or what happened instead of a frame.
    """

    data: bytes | memoryview
    message: m.Message | None = None
    error: SecureFedPromptError | None = None

    @classmethod
    def of(cls, message: m.Message) -> Frame:
        """The frame of a message.

        Raises:
            CodecError: it has none.
        """
        return cls(m.CATALOGUE.encode(message), message)

    @classmethod
    def read(cls, data: bytes | memoryview) -> Frame:
        """A frame as it came."""
        try:
            return cls(data, m.CATALOGUE.decode(data))
        except CodecError as error:
            return cls(data, None, error)

    @property
    def came(self) -> bool:
        """Whether bytes crossed the link: what happened instead of a frame has none."""
        return self.message is not None or isinstance(self.error, CodecError)

    def opened(self) -> m.Message:
        """The message.

        Raises:
            SecureFedPromptError: there is none, and why.
        """
        if self.message is None:
            assert self.error is not None
            raise self.error
        return self.message

    def heard(self) -> m.Message:
        """The message as a server takes it: who sends what is none has left."""
        if self.message is not None:
            return self.message
        what = "malformed frame: " if isinstance(self.error, CodecError) else ""
        return m.Leave(type(self.error).__name__, m.line(f"{what}{self.error}"))


class Link(Protocol):
    """A client's, or helper's, way to the server."""

    @property
    def connections(self) -> int:
        """How many were made so far; it grows when the link was lost and came back."""

    def send(self, frame: Frame) -> None:
        """Queue a frame; while the link is down it is dropped."""

    def receive(self, timeout: float) -> Frame | None:
        """The next frame, or None after ``timeout`` seconds.

        Raises:
            LinkError: there is no connection any more, or there cannot be one.
        """


class Hub(Protocol):
    """The server's way to the members, each under the name that its key proved."""

    def poll(self, timeout: float) -> Iterator[tuple[str, Frame]]:
        """Frames that arrive within ``timeout`` seconds, with their senders."""

    def reaches(self, name: str) -> bool:
        """Whether a frame to this member would be sent."""

    def send(self, name: str, frame: Frame) -> bool:
        """Queue a frame; False if the member is not connected or does not keep up."""
