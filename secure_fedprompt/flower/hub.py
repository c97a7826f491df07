"""A server's way to the nodes of a Flower grid: a ``transport.Hub``."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from secure_fedprompt.flower import wire
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    FieldError,
    LinkError,
    SecureFedPromptError,
)
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.transport import Frame

_PAUSE = 0.02  # seconds between looks


class GridHub:
    """Frames as Flower messages; a node is asked again only once it has answered.

    Attributes:
        nodes: by the name that its member signed for.
        refused: why a node is not one of them, by node.
    """

    def __init__(self, grid: Grid, kind: str, group: str = "") -> None:
        self._grid, self._kind, self.group = grid, kind, group
        self.roster: Roster | None = None
        self.nodes: dict[str, int] = {}
        self.refused: dict[int, str] = {}
        self._challenges: dict[int, bytes] = {}
        self._greeting: dict[int, dict[str, Any]] = {}  # nodes that are to greet
        self._lost = set[int]()  # until they do
        self._waiting: dict[int, deque[bytes]] = {}
        self._held: dict[int, deque[bytes]] = {}
        self._flying: dict[str, int] = {}  # message -> node

    @property
    def idle(self) -> bool:
        """Whether nothing can arrive, and nothing is to be sent."""
        return not self._flying and not self._greeting and not any(self._waiting.values())

    @property
    def pending(self) -> bool:
        """Whether nodes have yet to answer."""
        return bool(self._flying)

    # -- nodes -----------------------------------------------------------------------------------

    def ask(self, node: int, ask: str, **fields: Any) -> None:
        """Ask a node for something else than what a session does."""
        frames = [*self._held.pop(node, ()), *self._waiting.pop(node, ())]
        content = wire.record(ask=ask, frames=frames, **fields)
        message = Message(content, node, self._kind, group_id=self.group)
        (number,) = self._grid.push_messages([message])
        self._flying[number] = node

    def open(self, node: int, form: bytes, entries: list[bytes]) -> None:
        """Have a node greet, and prove whose it is, once it has answered what it was asked."""
        self.forget(node)
        self._greeting[node] = {"form": form, **({"members": entries} if entries else {})}

    def forget(self, node: int) -> None:
        """What was to be sent to a node is not."""
        self._waiting.pop(node, None)
        self._held.pop(node, None)

    def hold(self) -> None:
        """What waits goes with whatever is sent next: a round ends with frames that need no answer,
        and a message of its own costs a node a process."""
        for node, frames in self._waiting.items():
            self._held.setdefault(node, deque()).extend(frames)
        self._waiting.clear()

    def release(self) -> None:
        """Send what was held."""
        for node in list(self._held):
            self._waiting[node] = deque([*self._held.pop(node), *self._waiting.pop(node, ())])

    def answers(self) -> Iterator[tuple[int, Message]]:
        """What nodes have answered since."""
        for message in self._grid.pull_messages(list(self._flying)) if self._flying else ():
            node = self._flying.pop(message.metadata.reply_to_message_id, None)
            if node is not None:
                yield node, message

    def _name(self, node: int, fields: Mapping[str, Any]) -> str:
        """Whose a node is, if it just proved it.

        Raises:
            SecureFedPromptError: it is nobody's, or another node is.
        """
        challenge = self._challenges.pop(node, None)
        known = next((name for name, n in self.nodes.items() if n == node), "")
        if challenge is None:
            return known
        assert self.roster is not None
        name, signature = fields.get("name"), wire.blob(fields, "signature")
        if not isinstance(name, str):
            raise FieldError("record's name is no text")
        public, roster = self.roster.identity_of(name), self.roster.digest
        wire.check_bound(public, challenge, node, roster, signature, name)
        if self.nodes.get(name, node) != node:
            raise AdvertMismatchError(f"{name} is another node already")
        self.nodes[name] = node
        return name

    # -- a hub -----------------------------------------------------------------------------------

    def poll(self, timeout: float) -> Iterator[tuple[str, Frame]]:
        self.flush()
        until = time.monotonic() + timeout
        while True:
            found = False
            for node, message in self.answers():
                found = True
                yield from self._frames(node, message)
            if found or time.monotonic() >= until or not self._flying:
                return
            time.sleep(_PAUSE)

    def _frames(self, node: int, message: Message) -> Iterator[tuple[str, Frame]]:
        name = next((name for name, n in self.nodes.items() if n == node), "")
        try:
            if message.has_error():
                raise LinkError(f"node {node}: {message.error.reason or message.error.code}")
            fields = wire.fields_of(message)
            if fields is None:
                raise LinkError(f"node {node} answers in the clear: its ClientApp lacks the mod")
            name = self._name(node, fields)
            for data in wire.blobs(fields, "frames"):
                if name:
                    yield name, Frame.read(data)
        except (SecureFedPromptError, ValueError, TypeError) as fault:
            error = fault if isinstance(fault, SecureFedPromptError) else LinkError(str(fault))
            self._challenges.pop(node, None)
            self.forget(node)
            self._lost.add(node)
            self.refused[node] = m.line(error)
            if name:
                yield name, Frame(b"", None, error)

    def reaches(self, name: str) -> bool:
        return name in self.nodes and self.nodes[name] not in self._lost

    def send(self, name: str, frame: Frame) -> bool:
        if not self.reaches(name):
            return False
        self._waiting.setdefault(self.nodes[name], deque()).append(bytes(frame.data))
        return True

    def flush(self) -> None:
        """Send what waits, to nodes that have answered."""
        busy = set(self._flying.values())
        for node in [n for n in self._greeting if n not in busy]:
            self._challenges[node] = os.urandom(32)
            self._lost.discard(node)
            fields = self._greeting.pop(node)
            self.ask(node, wire.OPEN, challenge=self._challenges[node], **fields)
            busy.add(node)
        for node in [n for n, frames in self._waiting.items() if frames and n not in busy]:
            self.ask(node, wire.GO)
