"""A client over a whole run, as a state machine without I/O.

``on(message)`` returns frames to send. When a round is ready for an update, ``work`` holds its
plan and the global prompt; the caller trains and hands the result to ``trained``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np

from secure_fedprompt.clients.cohort_key import open_prompt
from secure_fedprompt.clients.helper import Helper
from secure_fedprompt.clients.joining import Joining
from secure_fedprompt.clients.party import Replies, refusal
from secure_fedprompt.clients.rounds.base import Awaiting, Opening, State
from secure_fedprompt.clients.rounds.encrypted import Reported, Sent, restored
from secure_fedprompt.clients.rounds.selecting import share_keys
from secure_fedprompt.clients.rounds.start import begin, check
from secure_fedprompt.clients.rounds.unmasking import Agreed, InSum
from secure_fedprompt.clients.work import (
    L_co,
    Made,
    Place,
    Update,
    Work,
    choice_bytes,
    nothing,
    place_of,
)
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt, averaged, metrics_of, prompt_bytes
from secure_fedprompt.protocol.codec import decode_fields
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    CodecError,
    FieldError,
    HomomorphicError,
    IsolationError,
    MismatchError,
    PolicyError,
    ReplayError,
    RunFailedError,
    SealError,
    SecureFedPromptError,
    SelectionError,
    SignatureError,
    SurvivorError,
    UnexpectedMessageError,
    UpdateError,
)
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.methods import method_facts
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.policy import check_isolation
from secure_fedprompt.protocol.selection.shares import Keys
from secure_fedprompt.protocol.terms import RunTerms

MAX_WITHDRAWN = 3  # rounds in a row
ROUND_ERRORS = (  # a peer's doing
    SealError, AdvertMismatchError, SurvivorError, SignatureError, HomomorphicError, SelectionError,
)  # fmt: skip
SEAL_BYTES = 16  # that sealing a prompt adds
_NUDGE = 1e-3  # where the server chooses prompts: of the largest change of a value in a round
_SPREAD = 0.02  # deviation of an initial prompt, where it is all the same (FedMGP's slots)
_NEAR = 1e-4  # prompts that differ by less, in initial standard deviations, count as one


@dataclass(frozen=True, repr=False)
class Idle:
    """What a session knows between two rounds, and its journal does not.

    Attributes:
        made: the next learning round, and the prompt that it begins from, if we computed it.
        withdrawn: rounds in a row that we left. greetings: since the last plan; greeting: whether
            the last one has not been answered.
    """

    made: tuple[int, bytes] | None
    withdrawn: int
    greetings: int
    greeting: bool


@dataclass(eq=False, repr=False)
class Session(Joining[L_co]):
    """One client in one run.

    Attributes:
        work: the round to train for, or None. base: the global prompt that it begins from, opened.
        final: the last global prompt, once the run has ended well; verified: whether it follows
            from sums that were, by this client or c + 1 others.
        history: aggregate metrics by learning round, of sums that this client checked.
        declined: why the last plan was refused, until another one is taken up.
        failed_because: the first reason why training failed, for this client's own user.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._greetings = -1  # since the last plan of this process, but for the first
        self._planned = False
        self._parked: State | None = None  # an opening that a reconnection interrupted
        self._resumed = False  # whether the round under way is such an opening
        self._kept: Made | None = None  # of training, for another attempt
        self._failing: Place | None = None  # where training failed
        self.round: State | None = None
        self.work: Work | None = None
        self.history: dict[int, dict[str, float]] = {}
        self._entered: RoundPlan | None = None  # the round that we could withdraw from
        self._raw = b""  # the global prompt of the plan, as it came
        self.base: Prompt | None = None
        self._opened: tuple[int, dict[str, float]] | None = None  # until the round is over
        self._made: tuple[int, bytes] | None = None  # the next prompt, as we computed it
        self._withdrawn = 0
        self._refused = 0, 0  # learning round, and outcomes that were refused in it
        self.declined: PolicyError | None = None  # why the last plan was, and none followed
        self._helper = Helper(self.party)
        self.final: Prompt | None = None
        self.verified = self.over = False
        self.failed_because: SecureFedPromptError | None = None  # told to nobody but our user

    def hello(self) -> m.Hello:
        """The first frame of each connection. What is under way is given up, but for openings."""
        if isinstance(self.round, InSum | Sent | Reported):
            self._parked = self.round
        self.round = self.work = self._entered = None
        self._resumed = False
        self._greetings += 1
        self._helper.reset()
        return super().hello()

    def on(self, message: m.Message) -> Replies:
        """Take one frame.

        Raises:
            SecureFedPromptError: this client refuses, or the server refused it; it must leave.
        """
        match message:
            case m.Refused():
                raise refusal(message)
            case m.Welcome():
                return self._welcome(message)
            case m.Terms():
                return self._terms(message)
            case m.Finish():
                return self._finish(message)
            case m.Plan():
                return self._plan(message)
            case m.Rejoin():
                return [self.hello()]
            case m.LogHead():
                self.party.check_head(message)
                return []
            case m.HelperPlan() | m.HelperAnswer() | m.HelperInputs() | m.HelperTables():
                return self._help(message)
            case m.RoundEnd():
                self._helper.end(message.run, message.round)
                if self.round and message.is_of(self.round.plan):
                    self.round = self.work = self._entered = None
                    self._conclude(done=not message.reason)
                return []
            case (
                m.SurvivorList() | m.UnmaskRequest() | m.OpenedSum() | m.CipherSum()
                | m.SumSigned() | m.SealedRequest()
            ) if self.round is None or self._resumed:  # fmt: skip
                return self._resume(message)
        if self.round is None:
            return []  # a frame of a round that a reconnection ended
        self.round, replies = self.round.on(message)
        return self._ready(replies)

    def trained(self, work: Work, result: Update | Keys) -> Replies:
        """Send the result of ``work``, an update or selection keys.

        If its round has ended, it is kept for another attempt. An update that cannot be sent
        becomes a zero one.
        """
        plan, state = work.plan, self.round
        if not isinstance(result, Update) or not plan.selecting:
            self._kept = Made(place_of(plan), result)
        if not isinstance(state, Awaiting) or state.plan is not plan:
            now = self.work  # of another attempt, perhaps: it need not train again
            if (
                now is None
                or not isinstance(state, Awaiting)
                or place_of(now.plan) != place_of(plan)
            ):
                return []
            self.work = None
            return self._again(state, now)
        self.work = None
        if not isinstance(result, Update):
            self.round, replies = share_keys(state, result)
            return replies
        try:
            if self._failing != place_of(plan):
                self.party.count(plan)
            data = state.encode(*result)
        except UpdateError as error:
            self.failed_because = self.failed_because or error
            data = state.encode(*nothing(work, self.workload.weight))
        self._withdrawn = 0
        self.party.journal.keep_vector(plan, choice_bytes(work.choice) + data)
        self.round, replies = state.send(data)
        return replies

    def failed(self, work: Work, error: SecureFedPromptError) -> Replies:
        """Training failed: what is sent looks like any other contribution, and holds nothing.

        The server must not learn of it, since it chose what was trained.
        """
        self.failed_because = self.failed_because or error
        plan = work.plan
        self._failing = place_of(plan)
        if plan.selecting and work.choice is None:
            shape = plan.selection.modalities, plan.selection.groups
            drawn = self.party.entropy(4 * shape[0] * shape[1])
            return self.trained(work, np.frombuffer(drawn, "<u4").astype(np.uint32).reshape(shape))
        return self.trained(work, nothing(work, self.workload.weight))

    def _help(self, message: m.Message) -> Replies:
        """A frame for the helper that this client was elected to be."""
        if self.round is None:
            return []  # of a round that a reconnection or withdrawal ended
        if isinstance(message, m.HelperPlan) and message.plan.digest != self.round.plan.digest:
            raise UnexpectedMessageError("a selection of another round than this client's")
        return self._helper.on(message)

    @property
    def idle(self) -> Idle | None:
        """What is to be remembered between two rounds; None while something is under way."""
        if self.round is not None or self._parked is not None or self.terms is None:
            return None
        return Idle(self._made, self._withdrawn, self._greetings, self._greeting)

    def go_on(self, idle: Idle) -> None:
        """Be where another session of this client was between two rounds of this run, whose terms
        were accepted here again. The journal must be as it was then."""
        self._made, self._withdrawn = idle.made, idle.withdrawn
        self._greetings, self._greeting, self._planned = idle.greetings, idle.greeting, True
        self.party.keyring.sums = None
        self.party.recall(self.run)

    def withdraw(self, error: SecureFedPromptError) -> Replies:
        """Leave the current round, not the run: a round that this client's policy forbids is
        declined, and the next one awaited.

        Raises:
            SecureFedPromptError: ``error`` itself, if it concerns more than a round, or is the
                third in a row.
        """
        plan, self._entered, self.round, self.work = self._entered, None, None, None
        if plan is not None and isinstance(error, PolicyError):  # another cohort may do
            self.declined = error
            return [m.Withdraw(plan.run, plan.round, type(error).__name__, m.told(error))]
        self._withdrawn += 1
        if plan is not None and isinstance(error, SelectionError):  # each tells the server a bit
            number, before = self._refused
            again = before if number == plan.learning_round else 0
            self._refused = plan.learning_round, again + 1
            self._withdrawn = max(self._withdrawn, again + 1)
        if not isinstance(error, ROUND_ERRORS) or plan is None or self._withdrawn >= MAX_WITHDRAWN:
            raise error
        return [m.Withdraw(plan.run, plan.round, type(error).__name__, m.told(error))]

    def _plan(self, message: m.Plan) -> Replies:
        plan, terms = message.plan, self.terms
        if self._greeting:
            return []  # crossed our greeting
        if plan.run != self.run:
            raise UnexpectedMessageError("plan of a run that did not welcome us")
        if terms is None:
            raise UnexpectedMessageError("a plan before the terms of its run")
        terms.admit(plan)
        raw = bytes(message.base)
        if not raw and terms.facts.masked:
            if self._made is None or self._made[0] != plan.learning_round:
                return [self.hello()]  # we missed the sum that it follows from: ask for the whole
            raw = self._made[1]
        if digest(Purpose.BASE, raw) != plan.base_digest:
            raise MismatchError("global prompt is not the one that the plan names")
        before, late = self.party.journal.progress(plan.run), self.party.policy.allow_late_join
        if plan.learning_round > before + 1 and not (late and self._away):
            raise ReplayError(
                f"plan is for learning round {plan.learning_round} after {before}, and this client "
                "was never away"
            )
        if plan.learning_round == 1 and plan.base_digest != terms.start:
            raise MismatchError("starting prompt is not the one of the terms")
        self.work, self._entered = None, plan
        self._conclude(done=plan.learning_round > before)  # if its end was lost
        self._raw = raw
        check(self.party, plan)
        self._check_everybody(plan, terms)
        if not (plan.encrypted and plan.learning_round > 1):
            self._prompt(plan, self._raw)  # refused before anything is done
        if plan.learning_round == 1:
            self._check_cohort(plan, terms)
        self.round, replies = begin(self.party, plan)
        if plan.learning_round > before:
            self._parked = self._kept = None
        self.declined = None
        self._greetings, self._planned, self._resumed = 0, True, False
        return self._ready(replies)

    def _check_everybody(self, plan: RoundPlan, terms: RunTerms) -> None:
        """Who asks for everybody in every sum asks its operator before others are everybody: from
        one round to the next, or where a prompt was given, which sums of another run may have made.
        """
        if self.party.policy.min_survivors < 0 and plan.telling and self.settings is not None:
            signed = self.party.journal.signed_lists(None if self.settings.start else plan.run)
            if any(set(names) != set(plan.cohort) for names in signed):
                self._ask(terms, "of other clients, whose sums beside this one's single out")

    def _check_cohort(self, plan: RoundPlan, terms: RunTerms) -> None:
        """Decline a cohort whose sum would single somebody out; where the server chose the start,
        and only earlier runs say so, its operator may know better."""
        try:
            self.party.check_cohort(plan)
        except PolicyError:
            if not method_facts(plan.method).own_start:
                self._ask(terms, "of other clients, whose sums beside this one's might single out")
            raise
        if terms.counts:
            try:
                counted = self.party.journal.counted_lists(plan.run)
                check_isolation(plan.cohort, counted, plan.colluders)
            except IsolationError:
                what = "of other clients, whose counts of images beside this one's might single out"
                self._ask(terms, f"{what} (metrics = 'off' and weights = 'uniform' count none)")

    @property
    def _away(self) -> bool:
        """Whether rounds may have passed without this client: it came late, or came back."""
        if not self._planned and self.party.journal.knows(self.run):
            return True  # another process
        committed = m.Nonce(self.party.name, m.commitment(self.party.name, self._nonce))
        return self._greetings > 0 or committed not in self._commitments

    def _resume(self, message: m.OfRound) -> Replies:
        """Help to finish an opening that a lost connection or a crash interrupted."""
        state = self.round or self._parked
        data = self.party.journal.opening(self.run) if self.run else None
        if data and self.terms is not None and not isinstance(state, Sent):
            read = restored if self.terms.facts.encrypted else Agreed.from_bytes
            with contextlib.suppress(CodecError):  # another release's: others have to do without us
                kept = read(self.party, data)
                if message.is_of(kept.plan):
                    self._entered = kept.plan  # what this refuses concerns a round
                    state = kept if self._remembers(kept) else state
        if state is None or not message.is_of(state.plan) or type(message) not in state.takes:
            return []
        self._entered = state.plan
        self.round, replies = state.on(message)
        self._parked = None
        self._resumed = True  # the request may have crossed our greeting, and come once more
        return self._ready(replies)

    def _remembers(self, kept: State) -> bool:
        """Whether this process knows what a state from the disk needs to be gone on with: to judge
        a sum, the prompts near the one that it is of."""
        if isinstance(kept, Reported):
            return True
        base = self.party.journal.base(kept.plan)
        if base is not None:
            self._prompt(kept.plan, prompt_bytes(base))
        return base is not None

    def _conclude(self, *, done: bool) -> None:
        """Keep what was opened if its round counts, else forget it."""
        if self._opened and done:
            self.history[self._opened[0]] = self._opened[1]
        self._opened = None

    def _prompt(self, plan: RoundPlan, data: bytes) -> Prompt:
        """The global prompt in the clear, checked as far as it can be, and remembered."""
        base = self._floats(data)
        made, _ = self.party.journal.made(self.run, plan.learning_round)
        if made and made != digest(Purpose.BASE, data):
            raise MismatchError("global prompt is not the one that the last sum gives")
        start, terms = self.learner.initial(), self.terms
        assert terms is not None
        prompts = [base, start] if plan.learning_round == 1 else [base]
        tolerance, wide = _NEAR * (float(start.std()) or _SPREAD), False
        facts = method_facts(plan.method)
        if not facts.own_start:  # the server's: a nudge of it may be any
            tolerance = max(tolerance, _NUDGE * terms.clip)
            first = plan.learning_round == 1 or not facts.chained
            wide = first and not self._accepted(terms)
        accepted = self._accepted(terms)
        if self.party.journal.note_base(
            plan, prompts, tolerance, terms.bounds, wide=wide, accepted=accepted
        ):
            self._ask(terms, f"from nearly the same prompt{self._changed(terms, None)}")
        return base

    def _open(self, plan: RoundPlan) -> bytes:
        """The plan's global prompt, unsealed if clients sealed it."""
        if not plan.encrypted or plan.learning_round == 1:
            return self._raw
        key = self.party.prompt_key(plan.run)
        try:
            prompt = open_prompt(key, plan.run, plan.learning_round, self._raw)
        except SealError:
            if self.party.name in plan.grants:  # what was granted is of no use
                self.party.keyring.cohort = None
            raise
        self.party.keep_prompt_key(plan.run)
        return prompt

    def _ready(self, replies: Replies) -> Replies:
        """Take up what the new state asks the caller or us to do."""
        state = self.round
        if isinstance(state, Awaiting) and self.work is None:
            plan = state.plan
            if state.choice is None:
                self.base = self._prompt(plan, self._open(plan))
            assert self.base is not None
            replies = replies + self._again(state, Work(plan, self.base, state.choice))
        if isinstance(state, Opening):
            plan = state.plan
            self._opened = plan.learning_round, metrics_of(state.total)
            data = b""
            if plan.training and method_facts(plan.method).chained:
                base = self.party.journal.base(plan) if self.base is None else self.base
                assert base is not None  # kept before the round began
                data = prompt_bytes(averaged(base, plan.layout, state.total))
                self._made = now, _ = plan.learning_round + 1, data
                made = digest(Purpose.BASE, data)
                self.party.journal.note_made(self.run, now, made, own=True)
            self.round, more = state.report(data)
            replies = replies + more
        return replies

    def _again(self, state: Awaiting, work: Work) -> Replies:
        """What was made for an aborted attempt is sent again, bit by bit; else there is work."""
        plan, waits = work.plan, work.plan.selecting and work.choice is None
        kept = self._kept.result if self._kept and self._kept.place == place_of(plan) else None
        if waits and kept is not None and not isinstance(kept, Update):
            self.round, replies = share_keys(state, kept)
            return replies
        stored = None if waits else self.party.journal.vector(plan)
        chosen = choice_bytes(work.choice)
        if stored is not None and stored.startswith(chosen):
            self._withdrawn = 0
            self.round, replies = state.send(stored[len(chosen) :])
            return replies
        self.work = work
        if not waits and self._failing == place_of(plan):
            return self.trained(work, nothing(work, self.workload.weight))
        if not waits and isinstance(kept, Update):
            return self.trained(work, kept)
        return []

    def _finish(self, message: m.Finish) -> Replies:
        if not self.run:
            raise RunFailedError("the run ended before this client could take part")
        if message.run != self.run:
            return []
        self._conclude(done=not message.reason)
        if message.reason:
            self.over = True  # it may be started again: what was trained for it is kept
            raise RunFailedError(f"server ended the run: {message.reason}")
        size, data = sum(t.size for t in self.learner.tensors()), bytes(message.vector)
        agreed = self.party.journal.terms_of(self.run)
        terms = decode_fields(RunTerms, agreed) if agreed else None
        sealed = terms.facts.encrypted if terms else len(data) == 4 * size + SEAL_BYTES
        key = self.party.prompt_key(self.run)
        if sealed and not (terms and key):
            self.over = True
            self.party.journal.finish(self.run)
            raise RunFailedError(
                "the run ended before this client was given its key: copy the prompt from another "
                "client"
            )
        if terms and sealed:  # it would be the start of the round after the last
            data = open_prompt(key, self.run, terms.rounds + 1, data)
        if len(data) != 4 * size:
            raise FieldError(f"final prompt of {len(data)} bytes, {4 * size} expected")
        final = np.frombuffer(data, "<f4").astype(np.float32)
        if not np.isfinite(final).all():
            raise FieldError("final prompt holds NaN or infinity")
        made = self.party.last_prompt(self.run)
        if made and made != digest(Purpose.BASE, data):
            raise MismatchError("final prompt is not the one that the last sum gives")
        self.over, self.final, self.verified = True, final, bool(made)
        return []
