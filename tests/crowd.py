"""Clients over real sockets in threads of a test, with a toy workload; and one that is hostile."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from rounds import OPEN

from secure_fedprompt.clients.conversation import Conversation
from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.session import Session
from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.host import files
from secure_fedprompt.protocol import chunks
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.errors import SecureFedPromptError
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.protocol.transport import Frame

DIM = 40_000  # an upload crosses in several chunks


class Toy:
    """A workload without a model."""

    model_fingerprint, classes_digest = b"m" * 32, b"c" * 32
    weight, resuming = 1.0, False

    def prepare(self, settings: MethodSettings) -> Self:
        return self

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("ctx", (DIM,)),)

    def initial(self) -> Prompt:
        return np.zeros(DIM, np.float32)

    def run(self, work: Work) -> Update:
        return Update({"ctx": np.full(DIM, 1e-3)} if work.plan.training else {}, 1.0)


class Member:
    """One client: ``step`` again and again, until it is ``over``.

    Args:
        folder: that ``demo_files.write_files`` wrote.
        tap: makes of each frame that is to be sent the chunks that are sent.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        address: str,
        tap: Callable[[m.Message], Iterable[bytes]] | None = None,
    ) -> None:
        self.name, self.tap, self.over = name, tap, False
        self.roster = files.read_roster(str(folder / "roster.toml"))
        self.identity = files.read_identity(str(folder / name / f"{name}.pem"))
        self.journal = MemoryJournal()
        server = self.roster.with_role("server")[0]
        self.link = CurveLink(address, server.curve, self.identity, 600.0)
        self.workload: Any = Toy()
        self.errors: list[str] = []
        self.again = False  # to greet anew, as a process that was started again does
        self.late: dict[str, float] = {}  # seconds to wait with a round that lacks this client
        self._due: tuple[float, m.Message] | None = None
        self.begin()

    def begin(self) -> None:
        """A session, as a process that was started again has."""
        party = Party(self.name, self.identity, self.roster, OPEN, self.journal, os.urandom)
        self.session: Any = Session(party, self.workload)
        self.talk = Conversation(self, self.session.hello)

    @property
    def connections(self) -> int:
        return self.link.connections

    def receive(self, timeout: float) -> Frame | None:
        return self.link.receive(timeout)

    def send(self, frame: Frame) -> None:
        if self.tap is None or frame.message is None:
            self.link.send(frame)
            return
        for chunk in self.tap(frame.message):
            self.raw(chunk)

    def raw(self, chunk: bytes) -> None:
        self.link._socket.send(chunk)
        self.link._quota.said(None)

    def _next(self) -> m.Message | None:
        """What came, unless it is to wait."""
        if self._due is not None:
            due, message = self._due
            self._due = None if time.monotonic() >= due else self._due
            return message if self._due is None else None
        came = self.talk.receive(0.005)
        if isinstance(came, m.Plan) and (missing := self.late.keys() - set(came.plan.cohort)):
            self._due = time.monotonic() + max(self.late[name] for name in missing), came
            return None
        return came

    def step(self) -> None:
        if self.again:
            self.again = False
            self.begin()
        self.talk.greet()
        self.talk.live()
        if (message := self._next()) is None:
            return
        try:
            self.talk.send(self.session.on(message))
            if (work := self.session.work) is not None:
                self.talk.send(self.session.trained(work, self.session.learner.run(work)))
        except SecureFedPromptError as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            try:
                self.talk.send(self.session.withdraw(error))
            except SecureFedPromptError:
                time.sleep(0.2)
                self.begin()  # and greets again
        if self.session.over:
            self.over = True
            self.link.send(Frame.of(m.Leave("Finished", "")))


class Crowd:
    """Members in one thread; a context manager."""

    def __init__(self, members: Iterable[Member]) -> None:
        self.members, self._stop = list(members), threading.Event()
        self.failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and not all(member.over for member in self.members):
                for member in self.members:
                    if not member.over:
                        member.step()
        except BaseException as error:
            self.failed.append(error)
        finally:
            for member in self.members:
                member.link.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *what: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(IndexError):
            raise self.failed[0]


def whole(message: m.Message) -> list[bytes]:
    """The chunks of an honest frame."""
    return list(chunks.split(m.CATALOGUE.encode(message)))
