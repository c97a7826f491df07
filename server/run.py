"""The server over a whole run, as a state machine without I/O.

    gathering -> starting -> terms -> round 1 .. R -> evaluation -> finished | failed

Clients commit to nonces before they see any, one of them gives the starting prompt, and the terms
that follow from settings, roster, start and nonces are signed and never change. The run admits
clients, plans rounds, retries aborted ones with fresh keys, and averages. Everything durable goes
through the ``RunStore`` (the run store), and before a plan leaves, its round number is stored: a
restarted server never uses a round number twice. Nor does it give up a sum that is being opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import decode_fields, encode_fields
from secure_fedprompt.protocol.errors import (
    DiskError,
    PlanError,
    PolicyError,
    ProtocolError,
    RunFailedError,
    SecureFedPromptError,
    UnknownVersionError,
)
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import verify
from secure_fedprompt.protocol.methods import method_facts
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan
from secure_fedprompt.server.admission import probed
from secure_fedprompt.server.gathering import Gathering, refused
from secure_fedprompt.server.members import Client
from secure_fedprompt.server.opening import Pending
from secure_fedprompt.server.planning import Keying, elect, elect_helper, grown_terms, round_plan
from secure_fedprompt.server.results import apply, check_vouchers, remind, survivors
from secure_fedprompt.server.rounds.base import Deadlines, Round, Stage
from secure_fedprompt.server.rounds.keying import KeyedRound
from secure_fedprompt.server.rounds.start import make_round
from secure_fedprompt.server.serve import Outbox

MAX_ROUNDS = 1 << 32
AT_ONCE = 2  # aborted attempts in a row that are tried again at once
MAX_REST = 60.0  # seconds before later ones
POLICY = f"withdrew: {PolicyError.__name__}: "  # how the fault of who declined begins


@dataclass
class Run(Gathering):
    """One run. Feed it ``on`` and ``tick``; it returns frames, and sets ``over`` at the end.

    Attributes:
        attempts: at the learning round under way, in a row; last_reason: why the last one failed.
        until: plan no later learning round before the caller says so.
    """

    attempts: int = 0
    last_reason: str = ""
    until: int = MAX_ROUNDS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.answer_until = 0.0  # for clients to judge the terms
        self.rest_until = 0.0  # before another attempt
        self.benched: set[str] = set()  # sit out the next attempt
        self.unfit: set[str] = set()  # whose cohort keys failed
        self.unhelpful: set[str] = set()  # who failed as helpers
        self.stranded_until = 0.0  # wait for somebody who can open the prompt
        self._stored: Pending | None = None
        self._strangers = set[str]()  # members whose program is another release
        self._resume()

    def _resume(self) -> None:
        """After a restart: terms of a changed roster, and an opening that was interrupted."""
        state = self.state
        if state.terms is None:
            return
        if state.terms.roster_digest != self.roster.digest:
            grown = grown_terms(self.settings, self.roster, state)
            check_vouchers(state, grown, [c.name for c in self.roster.with_role("client")])
            self.store.event(
                "roster", f"changed: {grown.clients} clients, quorum {grown.quorum}, "
                f"c = {grown.colluders}; clients need the same roster file",
            )  # fmt: skip
            state.terms = grown
            self.store.save(state)
        if state.pending:
            pending = decode_fields(Pending, state.pending)
            self.current = self._make_round(pending.plan, {})
            self.current.reopen(pending, self.began)
            self._stored = self.current.pending

    def _make_round(self, plan: RoundPlan, ready: Mapping[str, m.Ready]) -> Round:
        assert self.state.terms is not None
        terms, opening = self.state.terms, self._longest
        deadlines = Deadlines(terms.stage_seconds, terms.training_seconds, opening)
        made = make_round(plan, self.state.base, self.roster, deadlines, ready, self.entropy)
        if terms.facts.masked and method_facts(plan.method).chained:
            now = self.state.learning_round
            made.informed = frozenset(n for n, c in self.clients.items() if c.informed == now)
        return made

    # -- frames and time -------------------------------------------------------------------------

    def on(self, sender: str, message: m.Message, now: float) -> Outbox:
        """Take a frame of an authenticated roster member; one that breaks a rule is turned away."""
        if self.over:
            return []
        try:
            return self._take(sender, message, now)
        except DiskError:
            raise  # not the sender's doing
        except SecureFedPromptError as error:
            self.store.event("fault", f"{sender}: {type(error).__name__}: {error}")
            return [(sender, refused(error)), *self.gone(sender, now)]

    def _take(self, sender: str, message: m.Message, now: float) -> Outbox:
        if isinstance(message, m.Hello):
            self._strangers.discard(sender)
            return self._hello(sender, message, now)
        if isinstance(message, m.Probe):
            return [(sender, probed(self.state, self.settings, self.roster, sender, message))]
        client = self.clients.get(sender) or self.helpers.get(sender)
        if client is None:
            if isinstance(message, m.Leave):
                self._note_stranger(sender, message)
            return self._call(sender, now) if isinstance(message, m.Alive) else []
        client.seen = now
        match message:
            case m.Alive():
                return self._call(sender, now) if client.called else []
            case m.Ready():
                return self._ready(sender, client, message, now)
            case m.Leave():
                self.store.event("left", f"{sender}: {_why(message)}")
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

    def _note_stranger(self, sender: str, leave: m.Leave) -> None:
        """Name a member whose program is another release once, however much it sends."""
        if leave.error == UnknownVersionError.__name__ and sender not in self._strangers:
            self._strangers.add(sender)
            self.store.event("left", f"{sender}: {_why(leave)}")

    def _register(self, current: Round) -> None:
        """Note a granted key before any client is told of it."""
        state = self.state
        if current.pending is not None and current.pending is not self._stored:
            state.pending = encode_fields(current.pending)  # before anybody is asked to open it
            self._stored = current.pending
            self.store.save(state)
        if not isinstance(current, KeyedRound) or current.key in (NO_KEY, state.key):
            return
        if current.burnt:
            return
        state.key, state.keys = current.key, (*state.keys, current.key)
        self.store.save(state)

    def tick(self, now: float) -> Outbox:
        """Let time act: silent clients, deadlines, the start of the next round."""
        if self.over:
            return []
        out: Outbox = []
        for name, client in [*self.clients.items(), *self.helpers.items()]:
            if now - client.seen > self.settings.alive_seconds:
                self.store.event("lost", f"{name}, silent for {now - client.seen:.0f} s")
                out += self.gone(name, now)
        if self.over:
            return out
        if self.current:
            moved = self.current.tick(now)
            self._register(self.current)
            return out + self._after(moved, now)
        if self.initial_from and now > self.initial_until:
            self.store.event("fault", f"{self.initial_from} sends no starting prompt")
            self.initial_from = ""
        return out + self._maybe_start(now)

    def gone(self, name: str, now: float) -> Outbox:
        """A client is no longer there; its current round goes on without it."""
        left = self.clients.pop(name, None)
        self.helpers.pop(name, None)
        if name in self.decliners:  # the others may do
            self.larger, self.decliners = 0, set()
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

    def _back(self, name: str, now: float) -> Outbox:
        assert self.current is not None
        return self._after(self.current.back(name, now), now)

    def _remind(self, name: str) -> Outbox:
        return remind(self.state, name)

    # -- rounds ----------------------------------------------------------------------------------

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
                self.store.event("fault", text)
                return out + self._start_anew(now)
            for name in contesting:
                out += self._dismiss(name, now)
            return out + (self._maybe_start(now) if self.current is None else [])
        if self.settings.stop_after and state.attempt == 0 and (
            state.learning_round > self.settings.stop_after
        ):  # fmt: skip
            self.over = self.stopped = True
            text = f"after learning round {state.learning_round - 1}, as it was asked to"
            self.store.event("stopped", text)
            return out + self._finish_frames(
                reason=f"the server stopped {text}: start it again to go on"
            )
        if state.learning_round > self.until or now < self.rest_until:
            return out
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
        if settings.facts.keyed:
            held = {name: client.key for name, client in self.clients.items()}
            keying = elect(state, cohort, held, settings.key_maker, self.unfit)
        self.stranded_until = 0.0
        self.answer_until = 0.0
        assert state.terms is not None
        if state.attempt >= state.terms.attempts:
            raise PlanError(
                f"learning round {state.learning_round} was tried {state.attempt} times, clients "
                f"allow no more; the last time: {self.last_reason}"
            )
        state.round, state.attempt = state.round + 1, state.attempt + 1
        self.store.save(state)
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
            self.store.event("fault", f"round {current.plan.round}: {name}: {fault}")
        self.benched = {current.suspect} & set(self.clients)
        if current.excluded:
            self.state.key = NO_KEY  # who is out holds the old one
            self.state.excluded = (*self.state.excluded, current.excluded)
            self.store.event("excluded", f"{current.excluded}: {current.reason}")
        if current.helper_failed:
            self.unhelpful.add(current.plan.selection.helper)
        if isinstance(current, KeyedRound):
            self._note_holders(current)
        if current.stage is Stage.DONE:
            self._apply(current)
            self.attempts = 0
        else:
            self.attempts += not current.excluded
            self.last_reason = current.reason
            self.store.round_over(current, {}, self.state)
        self._note_declined(current)
        state, settings = self.state, self.settings
        if current.excluded:
            self.store.save(state)
            error = RunFailedError(f"excluded from this run: {current.reason}")
            out = [*out, (current.excluded, refused(error)), *self.gone(current.excluded, now)]
        if current.stage is not Stage.DONE and current.pending is not None:
            return out + self._fail(RunFailedError(
                f"the sum of learning round {state.learning_round} was signed or opened by some "
                f"clients and not by enough ({current.reason}): no other sum of it may be opened, "
                "so start a new run"
            ))  # fmt: skip
        if settings.max_attempts and self.attempts >= settings.max_attempts:
            return out + self._fail(RunFailedError(
                f"learning round {state.learning_round} aborted {self.attempts} times: "
                f"{self.last_reason}{self._unwilling(current)}"
            ))  # fmt: skip
        short = sum(c.accepted for c in self.clients.values()) < max(self.needed, self.larger)
        self.gather_until = now + (settings.gather_seconds if short else 0)
        if self.attempts > AT_ONCE:  # what fails again and again may need time
            self.rest_until = now + min(MAX_REST, 2.0 ** min(self.attempts, 16))
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
        declined = {name for name, fault in current.faults.items() if POLICY in fault}
        self.decliners = declined & self.clients.keys()
        size = len(current.plan.cohort)
        enough = size - len(declined) >= current.plan.quorum or not self.decliners
        if current.stage is Stage.DONE or enough or size >= self.expected:
            self.larger = 0
            return
        self.larger = size + 1
        self.declined = self._unwilling(current).removeprefix("; ")
        self.attempts = 0

    def _note_holders(self, current: KeyedRound) -> None:
        for name in current.plan.cohort:
            if client := self.clients.get(name):
                client.key = current.key if name in current.holders else client.key
                # Whatever went wrong there: it is given the key again, unless it kept another.
                if name in current.faults and name not in current.refusals:
                    client.key = NO_KEY
        if current.burnt:
            self.state.key = NO_KEY  # nor does it say that its holders can open the prompt
            self.state.keys = tuple(key for key in self.state.keys if key != current.key)
        if current.burnt or not (current.keyed or current.unasked):
            self.unfit.add(current.plan.maker)
        if current.stage is Stage.DONE:
            self.unfit.clear()

    def _apply(self, done: Round) -> None:
        state, metrics = self.state, apply(self.state, done)
        for name in set(survivors(done)) & set(self.clients):
            self.clients[name].informed = state.learning_round
        for name, client in self.clients.items():
            committed = m.Nonce(name, client.commitment) in state.commitments
            client.missed = client.missed or (committed and name not in done.plan.cohort)
        self.store.round_over(done, metrics, state)


def _why(leave: m.Leave) -> str:
    """What a client said as it left. Most reasons it keeps to itself."""
    if leave.error == "Stopped" and not leave.reason:
        return "stopped, and did not say why: its own log does"
    return f"{leave.error}: {leave.reason}" if leave.reason else leave.error
