"""The server over a whole run, as a state machine without I/O.

    gathering -> starting -> round 1 .. R -> evaluation -> finished | failed

It admits clients, plans rounds, retries aborted ones with fresh keys, and averages. Everything
durable goes through the ``Ledger`` (the run store), and before a plan leaves, its round number is
stored: a restarted server never uses a round number twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol import shamir
from secure_fedprompt.protocol.averaging import Prompt, averaged, metrics_of
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    FieldError,
    OverflowPlanError,
    ProtocolError,
    RunFailedError,
    SecureFedPromptError,
    TooFewClientsError,
)
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.homomorphic import SCHEMES
from secure_fedprompt.protocol.keys import agree, verify
from secure_fedprompt.protocol.plan import NO_KEY
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.settings import ServerSettings
from secure_fedprompt.server.admission import admit
from secure_fedprompt.server.coordinator import Deadlines, Round, Stage
from secure_fedprompt.server.encrypted import EncryptedRound, make_round
from secure_fedprompt.server.planning import (
    Keying,
    RunState,
    check_roster,
    check_settings,
    elect,
    elect_helper,
    round_plan,
    upload_layout,
)
from secure_fedprompt.server.selection import Outbox

SAME_HELLO = 5.0  # seconds within which two greetings of one process count as one


class Ledger(Protocol):
    """The run store, as the state machine sees it."""

    def save(self, state: RunState) -> None: ...

    def round_over(
        self, round: Round, metrics: Mapping[str, float], prompt: Prompt | None
    ) -> None: ...

    def event(self, kind: str, text: str) -> None: ...


@dataclass
class Client:
    nonce: bytes
    seen: float
    joined: float
    welcomed: bool = False
    ready: m.Ready | None = None
    key: bytes = NO_KEY  # digest of the cohort key that it holds


@dataclass
class Run:
    """One run. Feed it ``on`` and ``tick``; it returns frames, and sets ``over`` at the end.

    Attributes:
        helpers: processes of role helper; they take part in no round, and in no count.
        error: why the run failed, or None.
    """

    settings: ServerSettings
    roster: Roster
    ledger: Ledger
    entropy: shamir.Entropy
    state: RunState
    began: float
    clients: dict[str, Client] = field(default_factory=dict)
    helpers: dict[str, Client] = field(default_factory=dict)
    current: Round | None = None
    error: SecureFedPromptError | None = None
    over: bool = False
    attempts: int = 0
    last_reason: str = ""

    def __post_init__(self) -> None:
        check_settings(self.settings)
        check_roster(self.settings, self.roster)
        self.expected = self.settings.clients or len(self.roster.with_role("client"))
        self.gather_until = self.began + self.settings.gather_seconds
        self.initial_from, self.initial_until = "", 0.0
        self.opening = True  # wait for everybody, also after a restart
        self.rejoin: dict[str, float] = {}
        self.asked: set[str] = set()  # for the starting prompt
        self.benched: set[str] = set()  # sit out the next attempt
        self.unfit: set[str] = set()  # whose cohort keys failed
        self.unhelpful: set[str] = set()  # who failed as helpers
        self.stranded_until = 0.0  # wait for somebody who can open the prompt
        self._probe = X25519PrivateKey.generate()

    # -- frames and time -------------------------------------------------------------------------

    def on(self, sender: str, message: m.Message, now: float) -> Outbox:
        """Take a frame of an authenticated roster member; one that breaks a rule is turned away."""
        if self.over:
            return []
        try:
            return self._take(sender, message, now)
        except SecureFedPromptError as error:
            self.ledger.event("fault", f"{sender}: {type(error).__name__}: {error}")
            return [(sender, _refused(error)), *self.gone(sender, now)]

    def _take(self, sender: str, message: m.Message, now: float) -> Outbox:
        if isinstance(message, m.Hello):
            return self._hello(sender, message, now)
        client = self.clients.get(sender) or self.helpers.get(sender)
        if client is None:
            if not isinstance(message, m.Alive) or now < self.rejoin.get(sender, 0.0):
                return []
            self.rejoin[sender] = now + SAME_HELLO
            return [(sender, m.Rejoin())]
        client.seen = now
        match message:
            case m.Alive():
                return []
            case m.Ready():
                return self._ready(sender, client, message, now)
            case m.Leave():
                self.ledger.event("left", f"{sender} left: {message.error}: {message.reason}")
                return self.gone(sender, now)
            case m.Initial():
                return self._initial(sender, message, now)
            case m.LogHead():
                identity, body = self.roster.by_name[sender].identity, message.body(sender)
                verify(identity, Purpose.LOG_HEAD, body, message.signature, sender)
                return []
        if self.current is None:
            return []
        out = self.current.on(sender, message, now)
        self._register(self.current)
        return self._after(out, now)

    def _register(self, current: Round) -> None:
        """Note a granted cohort key before any client is told of it."""
        state = self.state
        if not isinstance(current, EncryptedRound) or current.key in (NO_KEY, state.key):
            return
        state.key, state.keys = current.key, (*state.keys, current.key)
        self.ledger.save(state)

    def tick(self, now: float) -> Outbox:
        """Let time act: silent clients, deadlines, the start of the next round."""
        if self.over:
            return []
        out: Outbox = []
        for name, client in [*self.clients.items(), *self.helpers.items()]:
            if now - client.seen > self.settings.alive_seconds:
                self.ledger.event("lost", f"{name} has been silent for {now - client.seen:.0f} s")
                out += self.gone(name, now)
        if self.over:
            return out
        if self.current:
            return out + self._after(self.current.tick(now), now)
        if self.initial_from and now > self.initial_until:
            self.ledger.event("fault", f"{self.initial_from} sends no starting prompt")
            self.initial_from = ""
        return out + self._maybe_start(now)

    def gone(self, name: str, now: float) -> Outbox:
        """A client is no longer there; its current round goes on without it."""
        self.clients.pop(name, None)
        self.helpers.pop(name, None)
        if name == self.initial_from:
            self.initial_from = ""
        if not self.clients and not self.state.run:  # nobody is left who announced these
            self.state.model_fingerprint = self.state.classes_digest = b""
        return self._after(self.current.lost(name, now), now) if self.current else []

    def everybody(self) -> dict[str, Client]:
        """Clients and helpers that are there."""
        return {**self.clients, **self.helpers}

    def farewell(self, name: str) -> Outbox:
        """The last frame of a run that is over, for a client that missed it."""
        return self._finish_frames((name,))

    # -- admission -------------------------------------------------------------------------------

    def _hello(self, sender: str, hello: m.Hello, now: float) -> Outbox:
        try:
            admit(self.state, self.settings, self.roster, sender, hello)
        except SecureFedPromptError as error:
            self.ledger.event("refused", f"{sender} refused: {error}")
            return [(sender, _refused(error))]
        role = self.roster.by_name[sender].role
        present = self.clients if role == "client" else self.helpers
        before = present.get(sender)
        again = before and before.nonce == hello.nonce and now - before.joined < SAME_HELLO
        if again and not (self.current and self.current.involves(sender)):
            return [(sender, self._welcome(sender))] if self.state.run else []
        out = self.gone(sender, now) if before else []
        if self.over:
            return [*out, *self._finish_frames((sender,))]
        present[sender] = Client(hello.nonce, now, now)
        count = f"{len(self.clients)} of {self.expected}" if role == "client" else "as helper"
        self.ledger.event("joined", f"{sender} joined ({count})")
        if self.state.run:
            out.append((sender, self._welcome(sender)))
        return out + (self._maybe_start(now) if not self.current else [])

    def _welcome(self, name: str, *, need_initial: bool = False) -> m.Welcome:
        (self.clients.get(name) or self.helpers[name]).welcomed = True
        state, settings = self.state, self.settings.method_settings().to_bytes()
        return m.Welcome(state.run, state.server_nonce, state.nonces, settings, int(need_initial))

    def _ready(self, sender: str, client: Client, message: m.Ready, now: float) -> Outbox:
        if message.run != self.state.run or message.name != sender:
            raise FieldError("Ready for another run, or under another name")
        identity = self.roster.identity_of(sender, "client", "helper")
        body = message.body(self.roster.digest)
        verify(identity, Purpose.RUN_KEY, body, message.signature, sender)
        agree(self._probe, message.seal_key, sender)  # refuses points of small order
        others = (c.ready for name, c in self.everybody().items() if name != sender)
        if message.seal_key in {ready.seal_key for ready in others if ready}:
            raise AdvertMismatchError(f"run key of {sender} is another client's")
        client.ready, client.key = message, message.key
        return self._maybe_start(now) if not self.current else []

    def _initial(self, sender: str, message: m.Initial, now: float) -> Outbox:
        if self.state.prompt is not None or sender != self.initial_from:
            return []
        size = sum(tensor.size for tensor in message.tensors)
        try:
            upload_layout(self.settings, message.tensors, len(self.clients))
        except OverflowPlanError as error:  # the server's own settings
            return self._fail(RunFailedError(f"no round can be planned: {error}"))
        if message.run != self.state.run or len(message.vector) != 4 * size or not size:
            raise FieldError(f"initial prompt of {len(message.vector)} bytes for {size} values")
        prompt = np.frombuffer(message.vector, "<f4").astype(np.float32)
        if not np.isfinite(prompt).all():
            raise FieldError("initial prompt holds NaN or infinity")
        self.state.tensors, self.state.prompt = message.tensors, prompt
        self.initial_from = ""
        self.ledger.save(self.state)
        return []  # its Ready follows

    # -- rounds ----------------------------------------------------------------------------------

    def _maybe_start(self, now: float) -> Outbox:
        """Begin the run, ask for the initial prompt, or plan the next round, if it is time."""
        state = self.state
        present = sum(bool(c.ready) or not state.run for c in self.clients.values())
        if self.over:
            return []
        if self._complete():
            self.over = True
            return self._finish_frames()
        joined = max(self.settings.min_clients, min(self.expected, len(self.clients)))
        wanted = self.expected if self.opening or not state.run else joined
        waiting = present < wanted and now < self.gather_until
        if state.run and not waiting and self.initial_from:
            return []  # it has a deadline of its own
        if waiting and not (state.run and state.prompt is None):
            return []
        if present < self.settings.min_clients and not waiting:
            return self._fail(TooFewClientsError(
                f"{present} of at least {self.settings.min_clients} clients "
                f"({', '.join(sorted(self.clients)) or 'nobody'}) after "
                f"{now - self.began:.0f} s: start more clients, or raise gather_seconds"
            ))  # fmt: skip
        out: Outbox = []
        if not state.run:
            state.server_nonce = self.entropy(32)
            state.nonces = tuple(
                m.Nonce(name, client.nonce) for name, client in sorted(self.clients.items())
            )
            state.run = m.run_id(state.server_nonce, state.nonces)
            self.ledger.save(state)
            self.gather_until = now + self.settings.training_seconds  # to encode their images
            present, self.opening = 0, False
        if state.prompt is None and not self.initial_from:
            if not (candidates := set(self.clients) - self.asked):
                return self._fail(RunFailedError("no client sent a usable starting prompt"))
            self.initial_from = min(candidates)
            self.asked.add(self.initial_from)
            self.initial_until = now + self.settings.training_seconds
            out.append((self.initial_from, self._welcome(self.initial_from, need_initial=True)))
        for name, client in self.everybody().items():
            if not client.welcomed:
                out.append((name, self._welcome(name)))
        if state.prompt is None or present < self.settings.min_clients:
            return out
        try:
            return out + self._plan(now)
        except ProtocolError as error:
            return out + self._fail(RunFailedError(f"no round can be planned: {error}"))
        except RunFailedError as error:  # somebody who holds the cohort key may come back
            self.stranded_until = self.stranded_until or now + self.settings.gather_seconds
            return out if now < self.stranded_until else out + self._fail(error)

    def _complete(self) -> bool:
        last = self.settings.rounds + int(self.settings.metrics)
        return self.state.learning_round > last

    def _plan(self, now: float) -> Outbox:
        state, settings = self.state, self.settings
        assert state.prompt is not None
        ready = {name: client.ready for name, client in self.clients.items() if client.ready}
        rested = set(ready) - self.benched | {settings.helper} & set(ready)
        cohort = tuple(sorted(rested if len(rested) >= settings.min_clients else ready))
        self.opening = False
        able = {name: ready[name] for name in cohort}
        outside = {name: c.ready for name, c in self.helpers.items() if c.ready}
        helper = elect_helper(
            settings, state, {**outside, **able} if settings.helper else able, self.unhelpful
        )
        keying = Keying()
        if settings.protection in SCHEMES:
            held = {name: client.key for name, client in self.clients.items()}
            keying = elect(state, cohort, held, settings.key_maker, self.unfit)
        self.stranded_until = 0.0
        state.round += 1
        self.ledger.save(state)
        plan = round_plan(settings, self.roster, state, cohort, self.entropy, keying, helper)
        deadlines = Deadlines(settings.stage_seconds, settings.training_seconds)
        self.current = make_round(plan, state.base, self.roster, deadlines, able, self.entropy)
        return self.current.start(now)

    def _after(self, out: Outbox, now: float) -> Outbox:
        """After anything moved in the current round: settle it if it is over."""
        current = self.current
        if current is None or not current.over:
            return out
        self.current = None
        for name, fault in current.faults.items():
            self.ledger.event("fault", f"round {current.plan.round}: {name}: {fault}")
        self.benched = {current.suspect} & set(self.clients)
        if current.helper_failed:
            self.unhelpful.add(current.plan.selection.helper)
        if isinstance(current, EncryptedRound):
            self._note_holders(current)
        if current.stage is Stage.DONE:
            self._apply(current)
            self.attempts = 0
        else:
            self.attempts += 1
            self.last_reason = current.reason
            self.ledger.round_over(current, {}, None)
        state, settings = self.state, self.settings
        if self.attempts >= settings.max_attempts:
            return out + self._fail(RunFailedError(
                f"learning round {state.learning_round} aborted {self.attempts} times: "
                f"{self.last_reason}"
            ))  # fmt: skip
        short = sum(bool(c.ready) for c in self.clients.values()) < settings.min_clients
        self.gather_until = now + (settings.gather_seconds if short else 0)
        return out + self._maybe_start(now)

    def _note_holders(self, current: EncryptedRound) -> None:
        for name in current.plan.cohort:
            if client := self.clients.get(name):
                client.key = current.key if name in current.holders else client.key
                if name in current.faults:  # whatever went wrong there: it is given the key again
                    client.key = NO_KEY
        if current.burnt:
            self.state.key = NO_KEY
        if current.burnt or not current.keyed:
            self.unfit.add(current.plan.maker)

    def _apply(self, done: Round) -> None:
        state = self.state
        assert state.prompt is not None
        training, metrics = done.plan.training, dict[str, float]()
        if isinstance(done, EncryptedRound):  # all that is known of the sum
            metrics["contributors"] = len(done.plan.cohort) - len(done.dropped)
            state.sealed = done.sealed or state.sealed
        else:
            assert done.result is not None
            metrics = metrics_of(done.result)
            if training:
                state.prompt = averaged(state.prompt, done.plan.layout, done.result)
        state.learning_round += 1
        self.ledger.round_over(done, metrics, state.prompt)
        self.ledger.save(state)

    def _fail(self, error: SecureFedPromptError) -> Outbox:
        self.error, self.over = error, True
        self.ledger.event("failed", str(error))
        return self._finish_frames()

    def _finish_frames(self, names: Iterable[str] = ()) -> Outbox:
        """The last frame to these clients, or to all."""
        names = names or tuple(self.everybody())
        if not self.state.run:
            refusal = _refused(self.error or RunFailedError("the run is over"))
            return [(name, refusal) for name in names]
        finish = m.Finish(self.state.run, self.state.base, m.line(self.error or ""))
        return [(name, finish) for name in names]


def _refused(error: SecureFedPromptError) -> m.Refused:
    return m.Refused(type(error).__name__, m.line(error))
