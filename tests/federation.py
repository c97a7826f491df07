"""A federation in memory: a server, clients with a toy workload, and a queue between them."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from rounds import OPEN, entropy_from, identity, names, roster

from secure_fedprompt.clients.helper import HelperSession
from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.ledger import Ledger
from secure_fedprompt.clients.party import Party, Replies
from secure_fedprompt.clients.session import Session
from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.memory import Network
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.run import Run
from secure_fedprompt.server.serve import Outbox
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import Store


class Toy:
    """A workload without a model: pulls the prompt towards the client's own target."""

    model_fingerprint, classes_digest = b"m" * 32, b"c" * 32

    def __init__(self, target: float, weight: float) -> None:
        self.target, self.weight = target, weight

    def prepare(self, settings: MethodSettings) -> Self:
        self.settings = settings
        return self

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("ctx", (2, 3)), TensorSpec("extra", (4,)))

    def initial(self) -> Prompt:
        return np.full(10, 0.5, np.float32)

    def run(self, work: Work) -> Update:
        counted = {field.name for field in work.plan.layout}
        values: dict[str, Any] = {
            k: np.float64(4) for k in ("seen", "correct", "loss") if k in counted
        }
        if work.plan.training:
            step = 0.5 * (self.target - work.base) + 1e-6 * work.plan.round
            values |= {"ctx": step[:6].reshape(2, 3), "extra": step[6:]}
        return Update(values, self.weight)


STORES = dict[Path, Store]()  # that are open


class World:
    """A server and clients joined by a queue."""

    def __init__(
        self,
        folder: Path,
        n: int = 4,
        policy: Policy = OPEN,
        helpers: Sequence[str] = (),
        **changes: Any,
    ) -> None:
        given: dict[str, Any] = {"gather_seconds": 60.0, "patience": 1e-3, "training_seconds": 60.0, "rounds": 2,
                                 "weights": "samples", "metrics": "rounds", "max_attempts": 3}  # fmt: skip
        self.settings = ServerSettings(**{**given, **changes})
        self.roster, self.folder, self.n, self.policy = roster(n, *helpers), folder, n, policy
        self.lost, self.errors = set[str](), dict[str, Exception]()
        self.toys: dict[str, Any] = {n: Toy(i / 10, 10.0 + i) for i, n in enumerate(names(n))}
        self.sessions: dict[str, Any] = {}
        self.starts = Counter[str]()
        self.journals = {name: MemoryJournal() for name in (*names(n), *helpers)}
        self.ledgers = {name: Ledger() for name in self.journals}
        self.network = Network(self.tap, self.wait)
        self.latest = 20_000.0  # when a run that goes on is stuck, seconds
        self.withdraws = False  # whether clients withdraw from rounds, as the program does
        self.tamper: Any = lambda sender, recipient, message: message
        self.start_server()

    @property
    def clock(self) -> float:
        return self.network.clock

    @clock.setter
    def clock(self, now: float) -> None:
        self.network.clock = now

    @property
    def queue(self) -> deque[tuple[str, str, Frame]]:
        """Frames under way."""
        return self.network.queue

    def send(self, name: str, message: m.Message) -> None:
        """Have a client send this."""
        self.network.send(name, message)

    def lose(self, name: str) -> None:
        """The server loses a connection."""
        self.post(self.run.gone(name, self.clock))

    def forget(self, name: str) -> None:
        """Lose what is under way to and from a client."""
        kept = [frame for frame in self.queue if name not in frame[:2]]
        self.network.queue = deque(kept)

    def post(self, out: Outbox) -> None:
        """Have the server send these."""
        for name, message in out:
            self.network.hub.send(name, Frame.of(message))

    def start_server(self) -> None:
        if (before := STORES.pop(self.folder, None)) is not None:
            before.close()  # of a server that has ended, however it did
        self.store = Store(self.folder, self.settings)
        STORES[self.folder] = self.store
        self.events: list[tuple[str, Any]] = []
        self.store.on_event.append(lambda kind, value: self.events.append((kind, value)))
        state = self.store.load()
        self.run = Run(
            self.settings,
            self.roster,
            self.store,
            entropy_from(f"s{self.clock}"),
            state,
            self.clock,
            identity("server"),
        )

    def join(self, name: str, **hello: Any) -> None:
        self.starts[name] += 1
        entropy = entropy_from(f"{name} {self.clock} {self.starts[name]}")
        party = Party(
            name, identity(name), self.roster, self.policy, self.journals[name], entropy,
            ledger=self.ledgers.setdefault(name, Ledger()),
        )  # fmt: skip
        self.lost.discard(name)
        if name in self.sessions:  # frames of the old connection are gone
            self.forget(name)
        helps = name not in self.toys
        self.sessions[name] = HelperSession(party) if helps else Session(party, self.toys[name])
        message = dataclasses.replace(self.sessions[name].hello(), **hello)
        self.network.join(name, functools.partial(self.answer, name))
        self.network.send(name, message)

    def reconnect(self, name: str) -> None:
        """The same process connects again."""
        self.lost.discard(name)
        self.network.send(name, self.sessions[name].hello())

    def pump(self, until: Any = lambda world, message: False) -> None:
        """Deliver until the run is over, nothing moves, or ``until`` says stop."""
        self.idle, self.until, self.network.stopped = 0, until, False
        self.network.run(self.run)

    def tap(self, sender: str, recipient: str, frame: Frame) -> Frame | None:
        """Tamper with a frame, lose it, or stop at it."""
        message = self.tamper(sender, recipient, frame.opened())
        if not isinstance(message, m.Alive):
            self.idle = 0
        if self.until(self, message):
            self.network.stopped = True
            return None
        if sender in self.lost or recipient in self.lost:
            return None
        return Frame.of(message)

    def wait(self, clock: float) -> float:
        """All that are there say so; time passes."""
        self.idle += 1
        assert self.idle <= 50, "nothing moves any more"
        assert clock + 5 <= self.latest, "this goes on for ever"
        for name in set(self.sessions) - self.lost:
            self.network.send(name, m.Alive())
        return clock + 5

    def answer(self, name: str, message: m.Message) -> Replies:
        session = self.sessions[name]
        try:
            replies: Replies = session.on(message)
            while getattr(session, "work", None) is not None:
                replies += self._train(session, self.toys[name])
        except errors.SecureFedPromptError as error:
            replies = self._refusal(name, error)
        if getattr(session, "final", None) is not None:
            session.party.journal.finish(session.run)  # its prompt is saved
        return replies

    def _train(self, session: Any, toy: Any) -> list[m.Message]:
        work = session.work
        try:
            replies: list[m.Message] = session.trained(work, toy.run(work))
        except errors.UpdateError as error:
            replies = session.failed(work, error)
        return replies

    def _refusal(self, name: str, error: errors.SecureFedPromptError) -> list[m.Message]:
        if self.withdraws:
            try:
                replies: list[m.Message] = self.sessions[name].withdraw(error)
                return replies
            except errors.SecureFedPromptError as final:
                error = final
        self.errors[name] = error
        self.lost.add(name) if self.withdraws else None
        return [m.Leave(type(error).__name__, str(error)[:500])]
