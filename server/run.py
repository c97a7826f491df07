"""The server over a whole run, as a state machine without I/O.

    gathering -> starting -> terms -> round 1 .. R -> evaluation -> finished | failed

Clients commit to nonces before they see any, one of them gives the starting prompt, and the terms
that follow from settings, roster, start and nonces are signed and never change. The run admits
clients, plans rounds, retries aborted ones with fresh keys, and averages. Everything durable goes
through the ``Ledger`` (the run store), and before a plan leaves, its round number is stored: a
restarted server never uses a round number twice. Nor does it give up a sum that is being opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol import shamir
from secure_fedprompt.protocol.agreement_proof import lift
from secure_fedprompt.protocol.averaging import Prompt, averaged, metrics_of, prompt_bytes
from secure_fedprompt.protocol.codec import decode_fields, encode_fields
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    ConfigError,
    FieldError,
    MismatchError,
    PlanError,
    PolicyError,
    ProtocolError,
    RunFailedError,
    SecureFedPromptError,
    TermsError,
    TooFewClientsError,
)
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import Identity, verify
from secure_fedprompt.protocol.plan import MAX_ATTEMPTS, NO_KEY, RoundPlan
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.server.admission import admit, check
from secure_fedprompt.server.opening import Pending
from secure_fedprompt.server.planning import (
    Keying,
    RunState,
    check_roster,
    check_settings,
    check_tensors,
    elect,
    elect_helper,
    fewest_of,
    quorum_of,
    round_plan,
    terms_of,
)
from secure_fedprompt.server.rounds.base import Deadlines, Round, Stage
from secure_fedprompt.server.rounds.encrypted import EncryptedRound
from secure_fedprompt.server.rounds.start import make_round
from secure_fedprompt.server.serve import Outbox
from secure_fedprompt.server.settings import ServerSettings

POLICY = f"withdrew: {PolicyError.__name__}: "  # how the fault of who declined begins
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
    commitment: bytes
    seen: float
    joined: float
    welcomed: bool = False
    ready: m.Ready | None = None
    told: bool = False  # the terms
    accepted: bool = False
    contests: bool = False
    missed: bool = False  # a learning round went by without it
    called: bool = False  # to greet again
    key: bytes = NO_KEY  # digest of the cohort key that it holds


@dataclass
class Run:
    """One run. Feed it ``on`` and ``tick``; it returns frames, and sets ``over`` at the end.

    Attributes:
        identity: the server's, which signs the terms.
        helpers: processes of role helper; they take part in no round, and in no count.
        error: why the run failed, or None. stopped: whether it is to be gone on with.
    """

    settings: ServerSettings
    roster: Roster
    ledger: Ledger
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
    attempts: int = 0
    last_reason: str = ""

    def __post_init__(self) -> None:
        check_settings(self.settings)
        check_roster(self.settings, self.roster)
        self.expected = self.settings.clients or len(self.roster.with_role("client"))
        quorum = fewest_of(self.settings, len(self.roster.with_role("client")))
        self.needed = max(self.settings.min_clients, quorum)
        listed = len(self.roster.with_role("client"))
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
        self.asked: set[str] = set()  # for the starting prompt
        self.larger, self.declined = 0, ""  # a cohort that clients may accept, and why
        self.started_from = ""  # whose starting prompt it is
        self.answer_until = 0.0  # for clients to judge the terms
        self.benched: set[str] = set()  # sit out the next attempt
        self.unfit: set[str] = set()  # whose cohort keys failed
        self.unhelpful: set[str] = set()  # who failed as helpers
        self.stranded_until = 0.0  # wait for somebody who can open the prompt
        self.short_since: float | None = None  # too few clients are there for a round
        self.restarts = 0  # of the nonces
        self.unopened = Counter[str]()  # who did not open a nonce, and how often
        self.run_keys: dict[bytes, str] = {}  # who announced each of them first
        self._resume()

    def _resume(self) -> None:
        """After a restart: terms of a changed roster, and an opening that was interrupted."""
        state = self.state
        if state.terms is None:
            return
        if state.terms.roster_digest != self.roster.digest:
            grown = terms_of(self.settings, self.roster, state)
            try:
                grown.succeed(state.terms)
            except TermsError as error:
                raise ConfigError(
                    f"this run cannot go on with the changed roster: {error}"
                ) from None
            self.ledger.event(
                "roster", f"changed: {grown.clients} clients, quorum {grown.quorum}, "
                f"c = {grown.colluders}; clients need the same roster file and a restart",
            )  # fmt: skip
            if state.attempt:  # one prompt, two rosters: each could open a sum of it
                raise ConfigError(
                    f"learning round {state.learning_round} has begun with the old roster: start "
                    "once more with that file and --stop-after "
                    f"{state.learning_round}, then change it"
                )
            state.terms = grown
            self.ledger.save(state)
        if state.pending:
            pending = decode_fields(Pending, state.pending)
            self.current = self._make_round(pending.plan, {})
            self.current.reopen(pending, self.began)

    def _make_round(self, plan: RoundPlan, ready: Mapping[str, m.Ready]) -> Round:
        assert self.state.terms is not None
        terms, opening = self.state.terms, self._longest
        deadlines = Deadlines(terms.stage_seconds, terms.training_seconds, opening)
        return make_round(plan, self.state.base, self.roster, deadlines, ready, self.entropy)

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
        if isinstance(message, m.Probe):
            return [(sender, self._probed(sender, message))]
        client = self.clients.get(sender) or self.helpers.get(sender)
        if client is None:
            return self._call(sender, now) if isinstance(message, m.Alive) else []
        client.seen = now
        match message:
            case m.Alive():
                return self._call(sender, now) if client.called else []
            case m.Ready():
                return self._ready(sender, client, message, now)
            case m.Leave():
                self.ledger.event("left", f"{sender}: {_why(message)}")
                return self.gone(sender, now)
            case m.Initial():
                return self._initial(sender, message, now)
            case m.Accept() | m.Contest():
                return self._answer(sender, client, message, now)
            case m.LogHead():
                identity, body = self.roster.by_name[sender].identity, message.body(sender)
                verify(identity, Purpose.LOG_HEAD, body, message.signature, sender)
                return []
        if self.current is None:
            return []
        out = self.current.on(sender, message, now)
        self._register(self.current)
        return self._after(out, now)

    def _probed(self, sender: str, probe: m.Probe) -> m.Probed:
        """Whether a client could join: nothing changes by it."""
        error, reason = "", ""
        try:
            check(self.state, self.settings, self.roster, sender, probe)
        except SecureFedPromptError as refusal:
            error, reason = type(refusal).__name__, m.line(refusal)
        clients = len(self.roster.with_role("client"))
        pinned = self.settings.model_fingerprint and self.settings.classes_digest
        compared = bool(self.state.model_fingerprint or pinned)
        return m.Probed(
            error, reason, self.settings.method_settings().to_bytes(), self.settings.protection,
            clients, quorum_of(self.settings, clients), int(compared),
        )  # fmt: skip

    def _register(self, current: Round) -> None:
        """Note a granted cohort key before any client is told of it."""
        state = self.state
        if current.pending is not None and not state.pending:
            state.pending = encode_fields(current.pending)  # before anybody is asked to open it
            self.ledger.save(state)
        if not isinstance(current, EncryptedRound) or current.key in (NO_KEY, state.key):
            return
        if current.burnt:
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
                self.ledger.event("lost", f"{name}, silent for {now - client.seen:.0f} s")
                out += self.gone(name, now)
        if self.over:
            return out
        if self.current:
            moved = self.current.tick(now)
            self._register(self.current)
            return out + self._after(moved, now)
        if self.initial_from and now > self.initial_until:
            self.ledger.event("fault", f"{self.initial_from} sends no starting prompt")
            self.initial_from = ""
        return out + self._maybe_start(now)

    def gone(self, name: str, now: float) -> Outbox:
        """A client is no longer there; its current round goes on without it."""
        left = self.clients.pop(name, None)
        self.helpers.pop(name, None)
        if name == self.initial_from:
            self.initial_from = ""
        if not self.clients and not self.state.run:  # nobody is left who announced these
            self.state.model_fingerprint = self.state.classes_digest = b""
            self.state.announced_by = ""
        if self.current is None:
            short = sum(c.accepted for c in self.clients.values()) < self.needed
            if left and left.accepted and short:  # it may come back
                self.gather_until = max(self.gather_until, now + self.settings.gather_seconds)
            return []
        out = self.current.gone(name, now)
        self._register(self.current)
        return self._after(out, now)

    def everybody(self) -> dict[str, Client]:
        """Clients and helpers that are there."""
        return {**self.clients, **self.helpers}

    @property
    def doing(self) -> str:
        """What the run waits for, in words."""
        current, here = self.current, len(self.clients)
        if current is None:
            names = f" ({', '.join(self.clients)})" if here else ""
            return f"waiting for clients: {here} of {self.expected}{names}"
        last = current.plan.learning_round > current.plan.rounds
        what = "final evaluation" if last else (
            f"round {current.plan.learning_round}/{current.plan.rounds}"
        )  # fmt: skip
        many = len(current.answers) + len(current.waiting)
        return f"{what}: {current.doing}, {len(current.answers)} of {many} answered"

    def farewell(self, name: str) -> Outbox:
        """The last frame of a run that is over, for a client that missed it."""
        return self._finish_frames((name,))

    # -- admission -------------------------------------------------------------------------------

    def _hello(self, sender: str, hello: m.Hello, now: float) -> Outbox:
        try:
            admit(self.state, self.settings, self.roster, sender, hello)
        except SecureFedPromptError as error:
            self.ledger.event("refused", f"{sender}: {error}")
            return [(sender, _refused(error))]
        if self.unopened[sender] > 1 and not self.state.run:
            refusal = FieldError(f"{sender} opens no nonce: the run begins without it")
            return [(sender, _refused(refusal))]
        role = self.roster.by_name[sender].role
        present = self.clients if role == "client" else self.helpers
        before = present.get(sender)
        again = (
            before and before.commitment == hello.commitment and now - before.joined < SAME_HELLO
        )
        if before and again and not (self.current and self.current.involves(sender)):
            before.told = False
            return [(sender, self._welcome(sender))] if self.state.run else []
        out = self.gone(sender, now) if before else []
        if self.over:
            return [*out, *self._finish_frames((sender,))]
        present[sender] = Client(hello.commitment, now, now)
        here, most = len(self.clients), self.expected
        count = f"{here} of {most}" if here <= most else f"{here}, of whom a round takes {most}"
        self.ledger.event("joined", f"{sender} ({count if role == 'client' else 'helper'})")
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
        if self.run_keys.setdefault(message.seal_key, sender) != sender:
            raise AdvertMismatchError(f"run key of {sender} is another client's")
        promised = m.Nonce(sender, client.commitment) in state.commitments
        if promised and m.commitment(sender, message.nonce) != client.commitment:
            self.unopened[sender] += 1
            raise FieldError(f"nonce of {sender} is not the one that it committed to")
        if state.terms is None and promised:
            state.opened[sender] = message.nonce
            self.ledger.save(state)
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
        client.accepted = isinstance(message, m.Accept)
        client.contests = not client.accepted
        if self.current is not None:
            if client.contests:
                return self._dismiss(sender, now)
            out = self.current.back(sender, now)
            return self._after(out, now)
        return self._maybe_start(now)

    def _dismiss(self, name: str, now: float) -> Outbox:
        error = MismatchError(
            f"starting prompt of {name} is not the run's: use the same weights and settings"
        )
        self.ledger.event("refused", f"{name}: {error}")
        return [(name, _refused(error)), *self.gone(name, now)]

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
        self.ledger.save(self.state)
        return []  # its Ready follows

    # -- rounds ----------------------------------------------------------------------------------

    def _maybe_start(self, now: float) -> Outbox:
        """Begin the run, ask for the initial prompt, make the terms, or plan the next round."""
        if self.over:
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
        self.ledger.save(state)
        self.gather_until = now + self.settings.training_seconds  # to encode their images
        self.opening = False
        return self._prepare(now)

    def _prepare(self, now: float) -> Outbox:
        """Before the terms: nonces are opened, and one client sends the starting prompt."""
        state = self.state
        out: Outbox = []
        if state.prompt is None and not self.initial_from:
            if not (candidates := set(self.clients) - self.asked):
                if self.opening and now < self.gather_until:
                    return out
                return self._fail(RunFailedError("no client sent a usable starting prompt"))
            self.initial_from = min(candidates)
            self.asked.add(self.initial_from)
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
            self.ledger.event(
                "fault", f"{self.started_from}: its starting prompt fits no round: {error}"
            )
            return out + self._start_anew(now)
        self.ledger.save(state)
        self.gather_until = max(self.gather_until, now + self.settings.stage_seconds)
        return out + self._go_on(now)

    def _wanted(self) -> int:
        """How many clients to wait for."""
        most = self.expected - len(self.state.excluded)
        return most if self.opening else min(most, len(self.clients))

    def _call_back(self, now: float) -> Outbox:
        """Who missed a learning round takes part again after a new greeting: clients believe no
        server that learning rounds were skipped while they were there."""
        missed = [name for name, client in self.clients.items() if client.missed]
        for name in missed:
            before = self.clients[name]
            self.clients[name] = Client(before.commitment, now, -1e9, welcomed=True, called=True)
            self.rejoin.pop(name, None)
        if missed:
            self.gather_until = max(self.gather_until, now + self.settings.stage_seconds)
        return [frame for name in missed for frame in self._call(name, now)]

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
        self.ledger.event("fault", f"{names} did not open a nonce: everybody draws new ones")
        if self.restarts >= MAX_ATTEMPTS:
            return self._fail(
                RunFailedError(f"nonces were not opened {self.restarts} times: {names}")
            )
        state, present = self.state, self.everybody()
        state.run, state.server_nonce, state.commitments, state.opened = b"", b"", (), {}
        state.tensors, state.prompt, state.start = (), None, None
        self.asked, self.initial_from, self.opening = set(), "", True
        self.gather_until = now + self.settings.gather_seconds
        self.clients, self.helpers = {}, {}
        self.ledger.save(state)
        return [(name, m.Rejoin()) for name in present]

    def _start_anew(self, now: float) -> Outbox:
        """The starting prompt is not usable: ask another client for it, without this one."""
        state = self.state
        state.tensors, state.prompt, state.start, state.terms = (), None, None, None
        for client in self.clients.values():
            client.told = client.accepted = client.contests = False
        name = self.started_from
        out = self._dismiss(name, now) if name in self.clients else []
        self.ledger.save(state)
        return out + self._prepare(now)

    def _too_few(self, present: int, now: float) -> Outbox:
        """Wait for more clients as long as patience lasts."""
        here = (
            f"{present} of at least {max(self.needed, self.larger)} clients "
            f"({', '.join(sorted(self.clients)) or 'nobody'})"
        )
        if self.short_since is None:
            self.short_since = now
            self.ledger.event(
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

    @property
    def _longest(self) -> float:
        """Seconds to wait for those without whom nothing goes on."""
        return max(self.settings.gather_seconds, self.settings.patience)

    def _go_on(self, now: float) -> Outbox:
        """After the terms: wait for those who should take part, then plan."""
        state = self.state
        out = self._welcome_all()
        for name, client in self.everybody().items():
            if client.ready and not client.told:  # the first of a phase sets its deadline
                self.answer_until = self.answer_until or now + self.settings.stage_seconds
                out += self._tell_terms(name, client)
        waiting = [c for c in self.clients.values() if c.told and not (c.accepted or c.contests)]
        if waiting and now < self.answer_until:
            return out
        contesting = [name for name, c in self.clients.items() if c.contests]
        if contesting:
            accepted = sum(c.accepted for c in self.clients.values())
            many = len(contesting) > self.expected - self.needed  # more than could be dishonest
            if state.round == 0 and many and len(contesting) >= accepted:
                names = ", ".join(contesting)
                text = f"{self.started_from}: its starting prompt is not what {names} compute"
                self.ledger.event("fault", text)
                return out + self._start_anew(now)
            for name in contesting:
                out += self._dismiss(name, now)
            return out + (self._maybe_start(now) if self.current is None else [])
        if self.settings.stop_after and state.attempt == 0 and (
            state.learning_round > self.settings.stop_after
        ):  # fmt: skip
            self.over = self.stopped = True
            text = f"after learning round {state.learning_round - 1}, as it was asked to"
            self.ledger.event("stopped", text)
            return out + self._finish_frames(
                reason=f"the server stopped {text}: start it again to go on"
            )
        out += self._call_back(now)
        present = sum(c.accepted for c in self.clients.values())
        if present < max(self.needed, self._wanted(), self.larger) and now < self.gather_until:
            return out
        if present < max(self.needed, self.larger):
            return out + self._too_few(present, now)
        self.short_since = None
        try:
            return out + self._plan(now)
        except ProtocolError as error:
            return out + self._fail(RunFailedError(f"no round can be planned: {error}"))
        except RunFailedError as error:  # somebody who holds the cohort key may come back
            self.stranded_until = self.stranded_until or now + self._longest
            return out if now < self.stranded_until else out + self._fail(error)

    def _complete(self) -> bool:
        last = self.settings.rounds + int(self.settings.metrics != "off")
        return self.state.learning_round > last

    def _plan(self, now: float) -> Outbox:
        state, settings = self.state, self.settings
        assert state.prompt is not None
        ready = {n: c.ready for n, c in self.clients.items() if c.ready and c.accepted}
        rested = set(ready) - self.benched | {settings.helper} & set(ready)
        cohort = tuple(sorted(rested if len(rested) >= self.needed else ready))[: self.expected]
        self.opening = False
        able = {name: ready[name] for name in cohort}
        outside = {name: c.ready for name, c in self.helpers.items() if c.ready}
        helper = elect_helper(
            settings, state, {**outside, **able} if settings.helper else able, self.unhelpful
        )
        keying = Keying()
        if settings.facts.encrypted:
            held = {name: client.key for name, client in self.clients.items()}
            keying = elect(state, cohort, held, settings.key_maker, self.unfit)
        self.stranded_until = 0.0
        self.answer_until = 0.0
        if state.attempt >= MAX_ATTEMPTS:
            raise PlanError(
                f"learning round {state.learning_round} was tried {state.attempt} times, clients "
                "allow no more"
            )
        state.round, state.attempt = state.round + 1, state.attempt + 1
        self.ledger.save(state)
        plan = round_plan(state, cohort, keying, helper)
        self.current = self._make_round(plan, able)
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
        if current.excluded:
            self.state.excluded = (*self.state.excluded, current.excluded)
            self.ledger.event("excluded", f"{current.excluded}: {current.reason}")
        if current.helper_failed:
            self.unhelpful.add(current.plan.selection.helper)
        if isinstance(current, EncryptedRound):
            self._note_holders(current)
        if current.stage is Stage.DONE:
            self._apply(current)
            self.attempts = 0
        else:
            self.attempts += not current.excluded
            self.last_reason = current.reason
            self.ledger.round_over(current, {}, None)
        self._note_declined(current)
        state, settings = self.state, self.settings
        if current.excluded:
            self.ledger.save(state)
            error = RunFailedError(f"excluded from this run: {current.reason}")
            out = [*out, (current.excluded, _refused(error)), *self.gone(current.excluded, now)]
        if current.stage is not Stage.DONE and current.pending is not None:
            return out + self._fail(RunFailedError(
                f"the sum of learning round {state.learning_round} was opened by some clients and "
                f"not by enough ({current.reason}): no other sum of it may be opened, so start a "
                "new run"
            ))  # fmt: skip
        if self.attempts >= settings.max_attempts:
            return out + self._fail(RunFailedError(
                f"learning round {state.learning_round} aborted {self.attempts} times: "
                f"{self.last_reason}{self._unwilling(current)}"
            ))  # fmt: skip
        short = sum(c.accepted for c in self.clients.values()) < max(self.needed, self.larger)
        self.gather_until = now + (settings.gather_seconds if short else 0)
        return out + self._maybe_start(now)

    def _unwilling(self, current: Round) -> str:
        """Who declined the last attempt, and why, if somebody did."""
        declined = {name: fault for name, fault in current.faults.items() if POLICY in fault}
        if not declined:
            return ""
        name, fault = min(declined.items())
        return f"; {', '.join(sorted(declined))} would not take part ({name} {fault})"

    def _note_declined(self, current: Round) -> None:
        """A round that clients' policies forbid is not planned again: more clients are needed."""
        declined = sum(POLICY in fault for fault in current.faults.values())
        size = len(current.plan.cohort)
        enough = size - declined >= current.plan.quorum
        if current.stage is Stage.DONE or enough or size >= self.expected:
            self.larger = 0
            return
        self.larger = size + 1
        self.declined = self._unwilling(current).removeprefix("; ")
        self.attempts = 0

    def _note_holders(self, current: EncryptedRound) -> None:
        for name in current.plan.cohort:
            if client := self.clients.get(name):
                client.key = current.key if name in current.holders else client.key
                # Whatever went wrong there: it is given the key again, unless it kept another.
                if name in current.faults and name not in current.refusals:
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
        state.learning_round, state.attempt, state.pending = state.learning_round + 1, 0, b""
        for name, client in self.clients.items():
            committed = m.Nonce(name, client.commitment) in state.commitments
            client.missed = client.missed or (committed and name not in done.plan.cohort)
        self.ledger.save(state)  # first: a round that is not on record is better than one twice
        self.ledger.round_over(done, metrics, state.prompt)

    def _fail(self, error: SecureFedPromptError) -> Outbox:
        self.error, self.over = error, True
        self.ledger.event("failed", str(error))
        return self._finish_frames()

    def _finish_frames(self, names: Iterable[str] = (), reason: str = "") -> Outbox:
        """The last frame to these clients, or to all."""
        names = names or tuple(self.everybody())
        if not self.state.run:
            refusal = _refused(self.error or RunFailedError("the run is over"))
            return [(name, refusal) for name in names]
        finish = m.Finish(self.state.run, self.state.base, m.line(self.error or reason))
        return [(name, finish) for name in names]


def _why(leave: m.Leave) -> str:
    """What a client said as it left. Most reasons it keeps to itself."""
    if leave.error == "Stopped" and not leave.reason:
        return "stopped, and did not say why: its own log does"
    return f"{leave.error}: {leave.reason}" if leave.reason else leave.error


def _refused(error: SecureFedPromptError) -> m.Refused:
    return m.Refused(type(error).__name__, m.line(error))
