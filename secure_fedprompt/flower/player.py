"""One client of a Flower app: a session that is played up to where it was, and then goes on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.clients.ledger import Ledger
from secure_fedprompt.clients.party import Keyring, Party, Replies
from secure_fedprompt.clients.session import Idle, Session
from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.flower.form import VALUES, Form
from secure_fedprompt.flower.kept import (
    Drawn,
    Part,
    PlayedJournal,
    PlayedLedger,
    Shelf,
    SimulatedJournal,
    Step,
    Tape,
    TapeError,
    check_said,
)
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.errors import (
    ConfigError,
    SecureFedPromptError,
    UpdateError,
)
from secure_fedprompt.protocol.keys import Identity
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.methods import FOREIGN
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.protocol.transport import Frame

PLAIN = bytes(32)  # there are no classes


class AppLearner:
    """The arrays of an app, as a session's ``Learner``; it is trained by who plays."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.start = np.zeros(0, np.float32)

    def tensors(self) -> tuple[TensorSpec, ...]:
        return self.form.tensors

    def initial(self) -> Prompt:
        """What the terms say: an app has no start of its own to compare it with."""
        return self.start

    def run(self, work: Work) -> Update:
        raise NotImplementedError


@dataclass
class AppWorkload:
    """A session's ``Workload``."""

    form: Form
    model_fingerprint: bytes
    classes_digest: bytes = PLAIN
    weight: float = 1.0
    resuming: bool = False

    def prepare(self, settings: MethodSettings) -> AppLearner:
        if settings.method not in FOREIGN:
            raise ConfigError(f"method = {settings.method!r}: a Flower app trains what it is")
        return AppLearner(self.form)


class AppSession(Session[AppLearner]):
    """A session that takes the start of a run from its terms, once and if they are accepted."""

    def _terms(self, message: m.Terms) -> Replies:
        if self.terms is not None or self._greeting or self.settings is None:
            return super()._terms(message)
        try:
            self.learner.start = self._floats(message.start)
            return super()._terms(message)
        finally:
            if self.terms is None:
                self.learner.start = np.zeros(0, np.float32)


@dataclass(frozen=True, repr=False)
class Member:
    """Who a client is.

    Attributes:
        exempt: simulation: all runs are one's own, whatever their bounds.
    """

    name: str
    identity: Identity
    roster: Roster
    policy: Policy
    accept: Collection[str] = ()
    exempt: bool = False


class Player:
    """Plays a tape, then goes on with it.

    Args:
        tape: of this client, or None to greet anew.

    Attributes:
        tape: to be kept before anything that was returned leaves.

    Raises:
        TapeError: it does not fit the journal: begin anew.
    """

    def __init__(
        self, member: Member, workload: AppWorkload, shelf: Shelf, ledger: Ledger, tape: Tape | None
    ) -> None:
        kept = tape or Tape(Part(len(shelf.records)))
        part = kept.joining
        kind = SimulatedJournal if member.exempt else PlayedJournal
        self._journal, self._drawn = kind(shelf, part), Drawn(part)
        self._shelf, self._ledger = shelf, PlayedLedger(ledger, part)
        keyring = Keyring(X25519PrivateKey.from_private_bytes(self._drawn(32)))
        party = Party(
            member.name, member.identity, member.roster, member.policy, self._journal, self._drawn,
            keyring, self._ledger,
        )  # fmt: skip
        self.session = AppSession(party, workload, "", member.accept, member.exempt)
        self.hello = self.session.hello()
        self.tape = kept
        for part in (kept.joining, kept.round) if kept.round else (kept.joining,):
            self._play(part)
        self._journal.live()
        self._ledger.live = True

    def _play(self, part: Part) -> None:
        if part is not self.tape.joining:
            self._begin(part)
        again = Part(part.records)
        for step in part.steps:
            again.say(self._take(step))
        check_said(again.said, part.said)
        self._drawn.check()

    def _begin(self, part: Part) -> None:
        self._journal.begin(part)
        self._drawn.begin(part)
        self._ledger.begin(part)
        made = (part.number, part.made) if part.number else None
        self.session.go_on(Idle(made, part.withdrawn, part.greetings, part.greeting))

    def _take(self, step: Step) -> list[bytes]:
        """What a step gives, as frames."""
        session = self.session
        if step.kind == "frame":
            message = Frame.read(step.data).opened()
            try:
                replies = session.on(message)
            except SecureFedPromptError as error:
                replies = session.withdraw(error)
        else:
            work = session.work
            if work is None:
                raise TapeError("there is nothing to train for")
            if step.kind == "failed":
                replies = session.failed(work, UpdateError("the app failed"))
            else:
                values = {VALUES: np.frombuffer(step.data, "<f4").astype(np.float64)}
                replies = session.trained(work, Update(values, step.weight))
        return [bytes(Frame.of(reply).data) for reply in replies]

    def _go(self, step: Step) -> list[bytes]:
        part = self.tape.round or self.tape.joining
        part.add(step)
        frames = self._take(step)
        part.say(frames)
        if (idle := self.session.idle) is not None:  # what the round needed is forgotten
            number, made = idle.made or (0, b"")
            self.tape.round = Part(
                len(self._shelf.records), made=made, number=number, withdrawn=idle.withdrawn,
                greetings=idle.greetings, greeting=idle.greeting,
            )  # fmt: skip
            self._begin(self.tape.round)
        return frames

    def hear(self, frame: bytes) -> list[bytes]:
        """Take a frame; returns those to send.

        Raises:
            SecureFedPromptError: this client leaves the run, or the server refused it.
        """
        return self._go(Step("frame", frame))

    def trained(self, delta: Prompt, weight: float) -> list[bytes]:
        """Send what training changed."""
        return self._go(Step("trained", delta.astype("<f4").tobytes(), weight))

    def failed(self) -> list[bytes]:
        """Training failed: what is sent looks like any other contribution."""
        return self._go(Step("failed"))
