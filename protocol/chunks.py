"""Frames <-> the small messages that cross a socket.

A socket allocates what a message announces, also before it knows who sends. So no message is larger
than a chunk, and whoever is not on the roster can make a server hold one chunk for each connection.
A chunk begins with a byte of flags: FIRST and LAST of its frame.
"""

from __future__ import annotations

from collections.abc import Iterator

from secure_fedprompt.protocol.codec import MAX_FRAME
from secure_fedprompt.protocol.errors import FieldError, TooLargeError

CHUNK = 1 << 16  # bytes of a frame in one message
LIMIT = CHUNK + 1 + 64  # of a message as it is on the wire: flags, and what CURVE adds
QUEUE = 2 * (MAX_FRAME // CHUNK)  # messages that a socket queues for a peer
FIRST, LAST = 1, 2


def split(frame: bytes | memoryview) -> Iterator[bytes]:
    """The chunks of a frame, in order."""
    view = memoryview(frame)
    for at in range(0, max(len(view), 1), CHUNK):
        flags = FIRST * (at == 0) + LAST * (at + CHUNK >= len(view))
        yield b"".join((bytes((flags,)), view[at : at + CHUNK]))


class Assembler:
    """Frames of one peer. A frame that a lost connection cut is forgotten when the next begins."""

    def __init__(self) -> None:
        self._parts: bytearray | None = None

    def add(self, chunk: memoryview) -> bytes | memoryview | None:
        """The frame that ends with this chunk, or None.

        Raises:
            FieldError: it is no chunk. TooLargeError: the frame is.
        """
        if not len(chunk) or chunk[0] > FIRST + LAST or len(chunk) > CHUNK + 1:
            self._parts = None
            raise FieldError(f"{len(chunk)} bytes are no chunk of a frame")
        flags, data = chunk[0], chunk[1:]
        if flags == FIRST + LAST:
            self._parts = None
            return data
        if flags & FIRST:
            self._parts = bytearray()
        if self._parts is None:
            return None  # the rest of a frame that began on another connection
        if len(self._parts) + len(data) > MAX_FRAME:
            self._parts = None
            raise TooLargeError(f"frame of more than {MAX_FRAME} bytes")
        self._parts += data
        if not flags & LAST:
            return None
        frame, self._parts = bytes(self._parts), None
        return frame
