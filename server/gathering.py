"""Who takes part in a run, and how it begins, as a state machine without I/O.

    gathering -> starting -> terms -> round 1 ..

Clients commit to nonces before they see any, one of them gives the starting prompt, and the terms
that follow from settings, roster, start and nonces are signed and never change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol import shamir
from secure_fedprompt.protocol.agreement_proof import lift
from secure_fedprompt.protocol.averaging import prompt_bytes
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    ConfigError,
    FieldError,
    MismatchError,
    RunFailedError,
    SecureFedPromptError,
    TermsError,
    TooFewClientsError,
)
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import Identity, verify
from secure_fedprompt.protocol.plan import MAX_GRAPHS
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.server.admission import admit
from secure_fedprompt.server.members import Client, RunStore
from secure_fedprompt.server.planning import RunState, check_tensors, terms_of
from secure_fedprompt.server.rounds.base import Round
from secure_fedprompt.server.serve import Outbox
from secure_fedprompt.server.settings import ServerSettings, check_roster, check_settings, fewest_of

ASKS = 5  # times that a client is asked for a starting prompt
SAME_HELLO = 5.0  # seconds within which two greetings of one process count as one


@dataclass
class Gathering(ABC):
    """The members of a run, up to the terms that they accept.

    Attributes:
        identity: the server's, which signs the terms.
        helpers: processes of role helper; they take part in no round, and in no count.
        current: the round under way, or None.
        error: why the run failed, or None. stopped: whether it is to be gone on with.
        pausing: end between two learning rounds, without a word to clients: they will come back.
    """

    settings: ServerSettings
    roster: Roster
    store: RunStore
    entropy: shamir.Entropy
    state: RunState
    began: float
    identity: Identity
    clients: dict[str, Client] = field(default_factory=dict)
    helpers: dict[str, Client] = field(default_factory=dict)
    current: Round | None = None
    error: SecureFedPromptError | None = None
    over: bool = False
    stopped: bool = False
    pausing: bool = False

    def __post_init__(self) -> None:
        check_settings(self.settings)
        check_roster(self.settings, self.roster)
        listed = len(self.roster.with_role("client"))
        self.expected = self.settings.clients or listed
        self.needed = max(self.settings.min_clients, fewest_of(self.settings, listed))
        if self.needed > self.expected:
            raise ConfigError(
                f"clients = {self.expected}: at least {self.needed} of the {listed} on the roster "
                "are needed (min_clients, and floor(2n/3) + 1 of the roster): take those who do "
                "not take part off it"
            )
        self.gather_until = self.began + self.settings.gather_seconds
        self.initial_from, self.initial_until = "", 0.0
        self.opening = True  # wait for everybody, also after a restart
        self.rejoin: dict[str, float] = {}
        self.asked = Counter[str]()  # for the starting prompt, and how often
        self.larger, self.declined = 0, ""  # a cohort that clients may accept, and why
        self.decliners: set[str] = set()  # of the last one
        self.started_from = ""  # whose starting prompt it is
        self.short_since: float | None = None  # too few clients are there for a round
        self.restarts = 0  # of the nonces
        self.unopened = Counter[str]()  # who did not open a nonce, and how often
        self.run_keys: dict[bytes, str] = {}  # who announced each of them first
        self.run_key_of: dict[str, bytes] = {}  # the last one: clients make one for each greeting

    @abstractmethod
    def gone(self, name: str, now: float) -> Outbox:
        """A client is no longer there."""

    @abstractmethod
    def _go_on(self, now: float) -> Outbox:
        """After the terms."""

    @abstractmethod
    def _back(self, name: str, now: float) -> Outbox:
        """A client has accepted the terms while a round is under way."""

    @abstractmethod
    def _remind(self, name: str) -> Outbox:
        """What a client that has accepted the terms may have missed."""

    def everybody(self) -> dict[str, Client]:
        """Clients and helpers that are there."""
        return {**self.clients, **self.helpers}

    def farewell(self, name: str) -> Outbox:
        """The last frame of a run that is over, for a client that missed it."""
        return self._finish_frames((name,))

    def _hello(self, sender: str, hello: m.Hello, now: float) -> Outbox:
        try:
            admit(self.state, self.settings, self.roster, sender, hello)
        except SecureFedPromptError as error:
            self.store.event("refused", f"{sender}: {error}")
            return [(sender, refused(error))]
        if self.unopened[sender] > 1 and not self.state.run:
            refusal = FieldError(f"{sender} opens no nonce: the run begins without it")
            return [(sender, refused(refusal))]
        role = self.roster.by_name[sender].role
        present = self.clients if role == "client" else self.helpers
        before = present.get(sender)
        again = (
            before and before.commitment == hello.commitment and now - before.joined < SAME_HELLO
        )
        if before and again and not (self.current and self.current.involves(sender)):
            before.told, before.informed = False, 0
            before.ready, before.accepted, before.contests = None, False, False
            return [(sender, self._welcome(sender))] if self.state.run else []
        out = self.gone(sender, now) if before else []
        if self.over:
            return [*out, *self._finish_frames((sender,))]
        present[sender] = Client(hello.commitment, now, now)
        here, most = len(self.clients), self.expected
        count = f"{here} of {most}" if here <= most else f"{here}, of whom a round takes {most}"
        self.store.event("joined", f"{sender} ({count if role == 'client' else 'helper'})")
        if self.state.run:
            out.append((sender, self._welcome(sender)))
        return out + (self._maybe_start(now) if not self.current else [])

    def _welcome(self, name: str, *, need_initial: bool = False) -> m.Welcome:
        (self.clients.get(name) or self.helpers[name]).welcomed = True
        state, settings = self.state, self.settings.method_settings().to_bytes()
        return m.Welcome(
            state.run, state.server_nonce, state.commitments, settings, int(need_initial)
        )

    def _ready(self, sender: str, client: Client, message: m.Ready, now: float) -> Outbox:
        state = self.state
        if message.run != self.state.run or message.name != sender:
            raise FieldError("Ready for another run, or under another name")
        identity = self.roster.identity_of(sender, "client", "helper")
        body = message.body(self.roster.digest)
        verify(identity, Purpose.RUN_KEY, body, message.signature, sender)
        lift(message.seal_key)  # refuses keys about which nothing could be proved
        if self.run_keys.get(message.seal_key, sender) != sender:
            raise AdvertMismatchError(f"run key of {sender} is another client's")
        if before := self.run_key_of.get(sender):
            del self.run_keys[before]
        self.run_keys[message.seal_key], self.run_key_of[sender] = sender, message.seal_key
        promised = m.Nonce(sender, client.commitment) in state.commitments
        if promised and m.commitment(sender, message.nonce) != client.commitment:
            self.unopened[sender] += 1
            raise FieldError(f"nonce of {sender} is not the one that it committed to")
        if state.terms is None and promised:
            state.opened[sender] = message.nonce
            self.store.save(state)
        client.ready, client.key = message, message.key
        if state.terms is not None:
            return self._tell_terms(sender, client) if self.current else self._maybe_start(now)
        return self._maybe_start(now)

    def _tell_terms(self, name: str, client: Client) -> Outbox:
        """Once for each connection; the answer is awaited."""
        state = self.state
        if client.told or state.terms is None or state.start is None:
            return []
        client.told = True
        message = m.Terms(
            state.run, state.terms, prompt_bytes(state.start), state.nonces,
            self.identity.sign(Purpose.TERMS, state.terms.digest),
        )  # fmt: skip
        return [(name, message)]

    def _answer(
        self, sender: str, client: Client, message: m.Accept | m.Contest, now: float
    ) -> Outbox:
        terms = self.state.terms
        if terms is None or (message.run, message.terms) != (self.state.run, terms.digest):
            return []
        again, client.accepted = client.accepted, isinstance(message, m.Accept)
        client.contests = not client.accepted
        out = self._remind(sender) if client.accepted and not again else []
        if self.current is None:
            return out + self._maybe_start(now)
        return out + (self._dismiss(sender, now) if client.contests else self._back(sender, now))

    def _dismiss(self, name: str, now: float) -> Outbox:
        error = MismatchError(
            f"starting prompt of {name} is not the run's: use the same weights and settings"
        )
        self.store.event("refused", f"{name}: {error}")
        return [(name, refused(error)), *self.gone(name, now)]

    def _initial(self, sender: str, message: m.Initial, now: float) -> Outbox:
        if self.state.prompt is not None or sender != self.initial_from:
            return []
        size = sum(tensor.size for tensor in message.tensors)
        if message.run != self.state.run or len(message.vector) != 4 * size or not size:
            raise FieldError(f"initial prompt of {len(message.vector)} bytes for {size} values")
        check_tensors(message.tensors)
        prompt = np.frombuffer(message.vector, "<f4").astype(np.float32)
        if not np.isfinite(prompt).all():
            raise FieldError("initial prompt holds NaN or infinity")
        self.state.tensors, self.state.prompt, self.state.start = message.tensors, prompt, prompt
        self.initial_from, self.started_from = "", sender
        self.store.save(self.state)
        return []  # its Ready follows

    def _maybe_start(self, now: float) -> Outbox:
        """Begin the run, ask for the initial prompt, make the terms, or plan the next round."""
        if self.over:
            return []
        if self.pausing and self.state.attempt == 0:
            self.over = self.stopped = True
            return []
        if self._complete():
            missing = self.opening and len(self.clients) < self.expected
            if missing and now < self.gather_until:
                return []  # started again at the very end: clients still wait for the last frame
            self.over = True
            return self._finish_frames()
        if not self.state.run:
            return self._gather(now)
        if self.state.terms is None:
            return self._prepare(now)
        return self._go_on(now)

    def _gather(self, now: float) -> Outbox:
        """Wait for clients, then begin the run with the nonces that they committed to."""
        state, present = self.state, len(self.clients)
        if present < self.expected and now < self.gather_until:
            return []
        if present < self.needed:
            return self._too_few(present, now)
        state.server_nonce = self.entropy(32)
        state.commitments = tuple(
            m.Nonce(name, client.commitment) for name, client in sorted(self.clients.items())
        )
        state.run = m.run_id(state.server_nonce, state.commitments)
        self.store.save(state)
        self.gather_until = now + self.settings.training_seconds  # to encode their images
        self.opening = False
        return self._prepare(now)

    def _prepare(self, now: float) -> Outbox:
        """Before the terms: nonces are opened, and one client sends the starting prompt."""
        state = self.state
        out: Outbox = []
        if state.prompt is None and not self.initial_from:
            candidates = [name for name in self.clients if self.asked[name] < ASKS]
            if not candidates:
                if self.opening and now < self.gather_until:
                    return out
                if len(self.clients) < self.needed:
                    return self._too_few(len(self.clients), now)
                return self._fail(RunFailedError("no client sent a usable starting prompt"))
            # Who was asked and lost its connection is asked again, after all the others.
            self.initial_from = min(candidates, key=lambda name: (self.asked[name], name))
            self.asked[self.initial_from] += 1
            self.initial_until = now + self.settings.training_seconds
            out.append((self.initial_from, self._welcome(self.initial_from, need_initial=True)))
        out += self._welcome_all()
        present = sum(bool(c.ready) for c in self.clients.values())
        if self.initial_from:
            return out  # it has a deadline of its own
        if present < self._wanted() and now < self.gather_until:
            return out
        committed = {nonce.name for nonce in state.commitments}
        missing = committed - set(state.opened)
        if missing and self.settings.graph == "regular":
            return out + self._commit_again(missing, now)
        if present < self.needed:
            return out + (self._too_few(present, now) if now >= self.gather_until else [])
        try:
            state.terms = terms_of(self.settings, self.roster, state)
        except TermsError as error:
            self.store.event(
                "fault", f"{self.started_from}: its starting prompt fits no round: {error}"
            )
            return out + self._start_anew(now)
        self.store.save(state)
        self.gather_until = max(self.gather_until, now + self.settings.stage_seconds)
        return out + self._go_on(now)

    def _wanted(self) -> int:
        """How many clients to wait for."""
        most = self.expected - len(self.state.excluded)
        return most if self.opening else min(most, len(self.clients))

    def _call(self, name: str, now: float) -> Outbox:
        """Ask for a greeting; one that crossed another is not believed, so it is asked again."""
        if now < self.rejoin.get(name, 0.0):
            return []
        self.rejoin[name] = now + SAME_HELLO
        return [(name, m.Rejoin())]

    def _welcome_all(self) -> Outbox:
        waiting = [name for name, client in self.everybody().items() if not client.welcomed]
        return [(name, self._welcome(name)) for name in waiting]

    def _commit_again(self, missing: set[str], now: float) -> Outbox:
        """A nonce that is not opened could have been any: all must draw new ones."""
        self.restarts += 1
        names = ", ".join(sorted(missing))
        self.unopened.update(missing)
        self.store.event("fault", f"{names} did not open a nonce: everybody draws new ones")
        if self.restarts >= MAX_GRAPHS:
            return self._fail(
                RunFailedError(f"nonces were not opened {self.restarts} times: {names}")
            )
        state, present = self.state, self.everybody()
        state.run, state.server_nonce, state.commitments, state.opened = b"", b"", (), {}
        state.tensors, state.prompt, state.start = (), None, None
        self.asked, self.initial_from, self.opening = Counter(), "", True
        self.gather_until = now + self.settings.gather_seconds
        self.clients, self.helpers = {}, {}
        self.store.save(state)
        return [(name, m.Rejoin()) for name in present]

    def _start_anew(self, now: float) -> Outbox:
        """The starting prompt is not usable: ask another client for it, without this one."""
        state = self.state
        state.tensors, state.prompt, state.start, state.terms = (), None, None, None
        for client in self.clients.values():
            client.told = client.accepted = client.contests = False
        name = self.started_from
        out = self._dismiss(name, now) if name in self.clients else []
        self.store.save(state)
        return out + self._prepare(now)

    def _too_few(self, present: int, now: float) -> Outbox:
        """Wait for more clients as long as patience lasts."""
        here = (
            f"{present} of at least {max(self.needed, self.larger)} clients "
            f"({', '.join(sorted(self.clients)) or 'nobody'})"
        )
        if self.short_since is None:
            self.short_since = now
            self.store.event(
                "waiting", f"for clients, {self.settings.patience:g} s at most: {here}"
            )
        if now < self.short_since + self.settings.patience:
            return []
        if present >= self.needed:  # but their policies want more
            text = f"{self.declined}: start more clients, or let their policies allow {present}"
            return self._fail(RunFailedError(text))
        return self._fail(TooFewClientsError(
            f"{here} after {now - self.began:.0f} s: start more clients, or raise gather_seconds "
            "or patience"
        ))  # fmt: skip

    def _complete(self) -> bool:
        last = self.settings.rounds + int(self.settings.metrics != "off")
        return self.state.learning_round > last

    def _fail(self, error: SecureFedPromptError) -> Outbox:
        self.error, self.over = error, True
        self.store.event("failed", str(error))
        return self._finish_frames()

    def _finish_frames(self, names: Iterable[str] = (), reason: str = "") -> Outbox:
        """The last frame to these clients, or to all."""
        names = names or tuple(self.everybody())
        if not self.state.run:
            refusal = refused(self.error or RunFailedError("the run is over"))
            return [(name, refusal) for name in names]
        finish = m.Finish(self.state.run, self.state.base, m.line(self.error or reason))
        return [(name, finish) for name in names]


def refused(error: SecureFedPromptError) -> m.Refused:
    return m.Refused(type(error).__name__, m.line(error))
