"""A federation in one process: the machines of the programs, joined by a queue instead of sockets.

``Network`` is the only driver: ``run_round`` runs a single round with it, ``simulate`` and the
tests whole runs. Time is a number, and jumps when everybody has spoken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from secure_fedprompt.clients.party import Party, Replies
from secure_fedprompt.clients.rounds.base import Awaiting, Opening, State
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import SecureFedPromptError
from secure_fedprompt.protocol.layout import Values
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.transport import Frame, Hub, Link
from secure_fedprompt.server.rounds.base import Deadlines, Round, Stage
from secure_fedprompt.server.rounds.start import make_round
from secure_fedprompt.server.serve import Machine, hear, post

NEXT_PROMPT = b"the next prompt: a whole run computes it"
SERVER = ""  # its name in a network
Tap = Callable[[str, str, m.Message], m.Message | None]
Handler = Callable[[m.Message], Replies]


class MemoryLink:
    """A member's end of a network; a ``transport.Link``."""

    connections = 1

    def __init__(self, network: Network, name: str) -> None:
        self._network, self.name = network, name

    def send(self, frame: Frame) -> None:
        self._network.queue.append((self.name, SERVER, frame))

    def receive(self, timeout: float) -> Frame | None:
        taken = self._network.take(self.name)
        return taken[1] if taken else None


class MemoryHub:
    """The server's end of a network; a ``transport.Hub``."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def poll(self, timeout: float) -> Iterator[tuple[str, Frame]]:
        """One frame at a time: what it sets off comes after those that are under way."""
        if (taken := self._network.take(SERVER)) is not None:
            yield taken

    def reaches(self, name: str) -> bool:
        return True

    def send(self, name: str, frame: Frame) -> bool:
        self._network.queue.append((SERVER, name, frame))
        return True


class Network:
    """Frames in the order in which they were sent, and who takes them.

    Args:
        tap: sees each frame before delivery; returns it, a replacement, or None to lose it.
        wait: called when all frames are delivered, with the time; returns the next one.

    Attributes:
        queue: frames under way as (sender, recipient, frame); the server's name is empty.
        hub: the server's end; another one around it may take its place.
        members: what takes each member's messages, and answers.
        clock: seconds.
        stopped: set to leave ``run`` before the end.
    """

    def __init__(
        self,
        tap: Callable[[str, str, Frame], Frame | None] = lambda sender, recipient, frame: frame,
        wait: Callable[[float], float] = lambda clock: clock + 1.0,
    ) -> None:
        self.queue: deque[tuple[str, str, Frame]] = deque()
        self.hub: Hub = MemoryHub(self)
        self.links: dict[str, Link] = {}
        self.members: dict[str, Handler] = {}
        self.clock, self.stopped = 0.0, False
        self._tap, self._wait = tap, wait

    def join(self, name: str, member: Handler) -> None:
        """Have a member take its frames."""
        self.links[name], self.members[name] = MemoryLink(self, name), member

    def send(self, name: str, message: m.Message) -> None:
        """Have a member send a message that answers none."""
        self.links[name].send(Frame.of(message))

    def take(self, recipient: str) -> tuple[str, Frame] | None:
        """The next frame with its sender, if it is this recipient's and not lost."""
        if not self.queue or self.queue[0][1] != recipient:
            return None
        sender, _, sent = self.queue.popleft()
        frame = self._tap(sender, recipient, sent)
        return None if frame is None else (sender, Frame.read(frame.data))

    def run(self, server: Machine) -> None:
        """Deliver frames until the server is done and all are delivered, or something stops it."""
        while (not server.over or self.queue) and not self.stopped:
            if not self.queue:
                self.clock = self._wait(self.clock)
                post(self.hub, server, server.tick(self.clock), self._now)
            elif (recipient := self.queue[0][1]) == SERVER:
                post(self.hub, server, hear(self.hub, server, 0.0, self._now), self._now)
            elif (frame := self.links[recipient].receive(0.0)) is not None:
                for reply in self.members[recipient](frame.opened()):
                    self.send(recipient, reply)

    def _now(self) -> float:
        return self.clock


@dataclass
class SimulatedRound:
    """What a simulated round did.

    Attributes:
        round: the server's side, with result, faults and dropouts.
        frames: every delivered frame as (sender, recipient, bytes).
        errors: what clients refused, by name.
        opened: what clients decrypted, under ``bfv`` and ``ckks``.
    """

    round: Round
    frames: list[tuple[str, str, bytes | memoryview]] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)
    opened: dict[str, Opening] = field(default_factory=dict)


def run_round(
    plan: RoundPlan,
    parties: Mapping[str, Party],
    updates: Mapping[str, tuple[Values, float]],
    dropouts: Mapping[str, Stage] | None = None,
    tap: Tap = lambda sender, recipient, message: message,
) -> SimulatedRound:
    """Run one round to its end.

    Args:
        plan: of the round; its cohort are the keys of ``parties``.
        parties: the clients, with their entropy and journals.
        updates: per client the values and the weight it uploads.
        dropouts: clients that vanish, with the stage in which their message never arrives.
        tap: sees each message before delivery; returns it, a replacement, or None to lose it.

    Returns:
        the server's round, all frames and the clients' errors.
    """
    vanish = dict(dropouts or {})
    any_party = next(iter(parties.values()))
    run_keys = {name: party.ready(plan.run) for name, party in parties.items()}
    server = make_round(plan, b"", any_party.roster, Deadlines(stage=1, training=1), run_keys)
    outcome = SimulatedRound(server)

    def tapped(sender: str, recipient: str, frame: Frame) -> Frame | None:
        if sender and vanish.get(sender) == server.stage:
            return None
        message = tap(sender, recipient, frame.opened())
        if message is None:
            return None
        frame = Frame.of(message)
        outcome.frames.append((sender, recipient, frame.data))
        return frame

    network = Network(tapped, lambda clock: server.deadline)
    clients = {name: RoundClient(party, updates[name]) for name, party in parties.items()}

    def member(name: str) -> Handler:
        def on(message: m.Message) -> Replies:
            try:
                return clients[name].on(message)
            except SecureFedPromptError as error:
                outcome.errors.setdefault(name, error)
                post(network.hub, server, server.gone(name, network.clock), lambda: network.clock)
                return []

        return on

    for name in parties:
        network.join(name, member(name))
    post(network.hub, server, server.start(network.clock), lambda: network.clock)
    network.run(server)
    outcome.opened = {name: c.opened for name, c in clients.items() if c.opened is not None}
    return outcome


class RoundClient:
    """A client in a single round, which has its update at hand.

    Attributes:
        opened: what it decrypted, or None.
    """

    def __init__(self, party: Party, update: tuple[Values, float]) -> None:
        self.party, self.update = party, update
        self.state: State | None = None
        self.opened: Opening | None = None

    def on(self, message: m.Message) -> Replies:
        """Take one frame.

        Raises:
            SecureFedPromptError: this client refuses.
        """
        if isinstance(message, m.RoundEnd):
            return []
        if isinstance(message, m.Plan):
            plan = message.plan  # there is no prompt here: what it is told apart by will do
            prompt = np.frombuffer(plan.base_digest, np.uint8).astype(np.float32)
            self.party.journal.note_base(plan, [prompt], 0.0, b"")
            self.state, replies = start(self.party, plan)
        else:
            assert self.state is not None
            self.state, replies = self.state.on(message)
        if isinstance(state := self.state, Awaiting):
            self.state, uploads = state.upload(*self.update)
            replies = replies + uploads
        if isinstance(state, Opening):
            self.opened = state
            self.state, replies = state.report(NEXT_PROMPT if state.plan.training else b"")
        return replies
