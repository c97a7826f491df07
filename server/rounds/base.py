"""The server in one round, as a state machine without I/O: the clock is an argument.

    advertising -> sharing -> [selecting -> evaluating ->] collecting -> consistency -> unmasking
    -> done | aborted

Every call returns the frames to send. A stage ends when everybody it waits for has answered or
its deadline has passed; it goes on with whoever answered if they are a quorum, else the round
aborts with a reason. A client that breaks a rule is dropped from the round and named in
``faults``; it never stops the others.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

import numpy as np

from secure_fedprompt.protocol import layout
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import ProtocolError, UnexpectedMessageError
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.ring import Integers
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.server.opening import Pending
from secure_fedprompt.server.rounds.selecting import Selector
from secure_fedprompt.server.serve import Outbox


class Stage(StrEnum):
    ASKING = "asking"
    KEYING = "keying"
    ADVERTISING = "advertising"
    SHARING = "sharing"
    SELECTING = "selecting"
    EVALUATING = "evaluating"
    COLLECTING = "collecting"
    CONSISTENCY = "consistency"
    UNMASKING = "unmasking"
    OPENING = "opening"
    REPORTING = "reporting"
    DONE = "done"
    ABORTED = "aborted"


HELPED: dict[Stage, type[m.Message]] = {
    Stage.SELECTING: m.KeyShares,
    Stage.EVALUATING: m.HelperOutcome,
}
UPLOADING = {  # who leaves is not in the sum
    Stage.ADVERTISING, Stage.SHARING, Stage.SELECTING, Stage.EVALUATING, Stage.COLLECTING,
}  # fmt: skip
OUTCOME_ERRORS = ("SealError", "GarblingError", "FieldError")  # what a wrong outcome causes
BEFORE_OUTCOME = UPLOADING - {Stage.COLLECTING} | {Stage.ASKING, Stage.KEYING}
LONG_AGO = "before a restart"  # when who is missing was lost, where nothing else is known


@dataclass(frozen=True)
class Deadlines:
    """Seconds that a stage may take: ``training`` for the one in which clients train, ``stage`` for
    the others; an opening that lacks clients waits ``opening`` seconds for them to come back."""

    stage: float = 30.0
    training: float = 600.0
    opening: float = 0.0


@dataclass
class Round(ABC):
    """One round. ``start`` first; then ``on``, ``gone`` and ``tick`` until ``over``.

    Attributes:
        uploads: message that carries an update; awaited: messages of the protection's own stages;
        openings: stages from which on no other sum will be opened; asking: those in which every
            survivor is asked, again if it comes back.
        run_keys: the clients' signed keys of this run, where something is sealed to or by them.
        informed: clients that were sent the sum from which ``base`` follows, and need no copy.
        checked: who has said that a sum is right, by its learning round.
        entropy: source of random bytes.
        helper_failed: the round aborted for want of its helper, or of right outcomes; or the
            helper refused a client.
        result: decoded sum by field, once done. ``integers`` is the same as ring integers.
        reason: why the round aborted, else empty.
        dropped: clients of the cohort whose update is not in the sum, with the stage they left in.
        suspect: whose bad shares aborted the round, as far as can be told.
        excluded: who dealt a box that does not open, or said so falsely; else empty.
        pending: what a restarted server needs to finish the opening, once it has begun.
        faults: clients that broke a rule, with the error.
        seconds: by stage.
    """

    uploads: ClassVar[type[m.Message]]
    awaited: ClassVar[dict[Stage, type[m.Message]]]
    openings: ClassVar[frozenset[Stage]]
    asking: ClassVar[frozenset[Stage]]

    plan: RoundPlan
    base: bytes
    roster: Roster
    deadlines: Deadlines
    run_keys: Mapping[str, m.Ready] = field(default_factory=dict)
    entropy: Entropy = os.urandom
    informed: frozenset[str] = frozenset()
    checked: dict[int, tuple[str, ...]] = field(default_factory=dict)
    helper_failed: bool = False
    _outcome_refused: bool = False
    stage: Stage = Stage.ADVERTISING
    result: dict[str, layout.Vector] | None = None
    integers: Integers | None = None
    reason: str = ""
    suspect: str = ""
    excluded: str = ""
    pending: Pending | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    answers: dict[str, m.Message] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan.check()
        self._survivors: tuple[str, ...] = ()
        self._gone: set[str] = set()
        self._asked: set[str] = set()  # by this stage, on the connections that there are
        self._needed, self._open_until = self.plan.quorum, 0.0
        self._short = False  # whether an opening lacks clients, and waits for them to come back
        self._selector = self._make_selector()
        self._prepare()

    # -- what a protection adds ------------------------------------------------------------------

    @abstractmethod
    def _prepare(self) -> None:
        """Make what the round keeps."""

    @abstractmethod
    def start(self, now: float) -> Outbox:
        """Send the plan, and wait for the first answers."""

    @abstractmethod
    def _check(self, sender: str, message: m.Message) -> None:
        """Check a frame of the expected kind, and add an upload to the sum.

        Raises:
            ProtocolError: its sender is dropped.
        """

    @abstractmethod
    def _close_stage(self, names: tuple[str, ...], now: float) -> Outbox:
        """Enough clients have answered: open the next stage, or end."""

    @abstractmethod
    def reopen(self, pending: Pending, now: float) -> None:
        """Go on with an opening that a restart interrupted; ``back`` for each who returns."""

    @abstractmethod
    def _request(self, name: str) -> Outbox:
        """What a survivor needs to help in this stage."""

    def _is_dealer(self, dealer: str, recipient: str) -> bool:
        """Whether one client sealed something to another."""
        return False

    def _evidence(self, dealer: str) -> m.Evidence | None:
        """What a dealer signed, or None if it did not sign it."""
        return None

    def _box_is_bad(self, sender: str, accusation: m.Accusation) -> bool:
        """Whether a box does not open, as an accusation proves."""
        return False

    # -- frames and time -------------------------------------------------------------------------

    def _make_selector(self) -> Selector | None:
        return Selector(self.plan, self.run_keys, self.entropy) if self.plan.selecting else None

    @property
    def doing(self) -> str:
        """The stage as people call it: the one that waits for training is "training"."""
        return "training" if self._trains and self.plan.training else str(self.stage)

    @property
    def _trains(self) -> bool:
        return self.stage is (Stage.SELECTING if self._selector else Stage.COLLECTING)

    @property
    def over(self) -> bool:
        return self.stage in (Stage.DONE, Stage.ABORTED)

    def _plans(self) -> Outbox:
        """The plan, to everybody who takes part."""
        whole, brief = m.Plan(self.plan, self.base), m.Plan(self.plan, b"")
        out: Outbox = [(n, brief if n in self.informed else whole) for n in self.plan.cohort]
        return out + (self._selector.start() if self._selector else [])

    def _collect(self, names: tuple[str, ...], now: float) -> None:
        """Clients train now: wait for their uploads, or first for their selection keys."""
        self._begin(Stage.SELECTING if self._selector else Stage.COLLECTING, names, now)

    def on(self, sender: str, message: m.Message, now: float) -> Outbox:
        """Take a frame of an authenticated sender; a bad one drops the sender from the round."""
        ours = isinstance(message, m.OfRound) and message.is_of(self.plan)
        if not (ours and self.involves(sender)):
            return []  # late: a frame may cross the end of its round
        if isinstance(message, m.Complaint | m.Accusation):
            return self._judge(sender, message, now)
        if isinstance(message, m.FROM_HELPER):
            return self._help(sender, message, now)
        if isinstance(message, m.Withdraw):
            self.faults[sender] = f"withdrew: {message.error}: {message.reason}"
            if self.stage is Stage.COLLECTING and self._selector is not None:
                self._outcome_refused |= message.error in OUTCOME_ERRORS
            return self.gone(sender, now)
        if self.stage is Stage.EVALUATING:
            return []  # the helper's frames are above; what others sent is late
        if sender not in self.waiting:
            return self._unawaited(sender, message)
        if self._is_late(message):
            return []  # it was slow, or asked twice
        try:
            self._accept(sender, message)
        except ProtocolError as error:
            self.faults[sender] = f"{type(error).__name__}: {error}"
            return self.gone(sender, now)
        self.waiting.discard(sender)
        if self._short and self._suffices(now):
            self.waiting = set()
        return self._settle(now)

    def _judge(self, sender: str, message: m.Complaint | m.Accusation, now: float) -> Outbox:
        """A box did not open. With a proof the attempt ends, without its dealer or its accuser."""
        dealer = message.dealer
        if self.stage not in UPLOADING or not self._is_dealer(dealer, sender):
            self.faults[sender] = f"complains about {dealer!r}, who sent it no box"
            return self.gone(sender, now)
        if isinstance(message, m.Complaint):
            if (evidence := self._evidence(dealer)) is not None:
                return [(sender, evidence)]
            self.excluded, what = dealer, f"{dealer} did not sign the boxes that it dealt"
        elif self._box_is_bad(sender, message):
            self.excluded, what = dealer, f"{dealer} sealed a box for {sender} that does not open"
        else:
            self.excluded, what = sender, f"{sender} says falsely that a box of {dealer} is bad"
        self.faults[self.excluded] = f"SealError: {what}"
        return self._abort(f"SealError: {what}")

    def back(self, name: str, now: float) -> Outbox:
        """A client came back, with a new connection: what it has answered counts, and an opening
        asks it again."""
        if name not in self._survivors:
            return []
        self._gone.discard(name)
        if self.stage not in self.asking or name in self.answers:
            return []
        self.waiting.add(name)
        self._asked.add(name)
        return self._request(name)

    def involves(self, name: str) -> bool:
        """Whether the round still counts on a client or helper, in this stage or a later one."""
        if self.over or name in self._gone:
            return False
        return name in self.plan.cohort or (self._selector is not None and self._awaits(name))

    def _awaits(self, name: str) -> bool:
        """Whether the helper of this name still has to help."""
        return name == self.plan.selection.helper and self.stage in BEFORE_OUTCOME

    def _help(self, sender: str, message: m.Message, now: float) -> Outbox:
        """A frame of the helper; the round cannot do without a correct one."""
        if self._selector is None or not self._awaits(sender):
            return []
        try:
            out = self._selector.on(message)
        except ProtocolError as error:
            self.faults[sender] = f"{type(error).__name__}: {error}"
            return self.gone(sender, now)
        for name in self._selector.refused:
            if name not in self._gone:
                self.faults[name] = "SealError: the helper could not open its shares"
                self.helper_failed = True  # or says so: the next selection has another one
                out += self.gone(name, now)
        if self._selector.outcomes is not None:
            self.waiting = set()
        return out + self._settle(now)

    def _unawaited(self, sender: str, message: m.Message) -> Outbox:
        """A frame of this round from a client that has answered this stage."""
        return []

    def gone(self, sender: str, now: float) -> Outbox:
        """A client is gone for the rest of this round."""
        self._gone.add(sender)
        self.waiting.discard(sender)
        if self._selector is not None and self._awaits(sender) and not self.over:
            return self._without_helper()
        return self._settle(now)

    def _without_helper(self) -> Outbox:
        self.helper_failed = True
        return self._abort(f"helper {self.plan.selection.helper} failed while {self.stage}")

    def tick(self, now: float) -> Outbox:
        """Let the deadline act. ``deadline`` says when the next call is due."""
        if not self.over and now >= self.deadline:
            self.waiting = set()
        return self._settle(now)

    def _settle(self, now: float) -> Outbox:
        out: Outbox = []
        while not self.over and not self.waiting:
            out += self._advance(now)
        return out

    def _begin(self, stage: Stage, names: tuple[str, ...], now: float) -> None:
        self.stage, self.waiting, self.answers = stage, set(names) - self._gone, {}
        self._asked = set(self.waiting)
        limit = self.deadlines.training if self._trains else self.deadlines.stage
        self.began, self.deadline, self._short = now, now + limit, False
        if stage in self.openings:
            self._open_until = now + max(limit, self.deadlines.opening)

    def _accept(self, sender: str, message: m.Message) -> None:
        if not isinstance(message, self._expected()):
            raise UnexpectedMessageError(f"{type(message).__name__} while {self.stage}")
        if isinstance(message, m.KeyShares):
            assert self._selector is not None
            self._selector.share(sender, message)
        else:
            self._check(sender, message)
        # That an upload came is kept, not the vector.
        self.answers[sender] = m.Alive() if isinstance(message, self.uploads) else message

    @property
    def _answers_of(self) -> dict[Stage, type[m.Message]]:
        return {**HELPED, Stage.COLLECTING: self.uploads, **self.awaited}

    def _expected(self) -> type[m.Message]:
        return self._answers_of[self.stage]

    def _is_late(self, message: m.Message) -> bool:
        """Whether a frame answers a stage that is over."""
        order = list(Stage)
        before = order[: order.index(self.stage)]
        return any(type(message) is self._answers_of.get(stage) for stage in before)

    def _advance(self, now: float) -> Outbox:
        """Close the stage with who answered, and open the next."""
        self.seconds[self.doing] = now - self.began
        names = tuple(sorted(self.answers))
        if self.stage is Stage.EVALUATING:
            return self._hand_out(now)
        if self.stage in UPLOADING:
            for name in set(self.plan.cohort) - set(names) - set(self.dropped):
                self.dropped[name] = self.doing
        if not self._suffices(now):
            if self.stage in self.openings and now < self._open_until:
                return self._hope(now)
            return self._abort(
                f"{len(names)} of {len(self.plan.cohort)} clients answered while {self.doing}, "
                f"{self.plan.quorum} are needed"
            )
        if self.stage is Stage.SELECTING:
            assert self._selector is not None
            self._begin(Stage.EVALUATING, (self._selector.helper,), now)
            return self._selector.evaluate(names)
        try:
            return self._close_stage(names, now)
        except ProtocolError as error:
            return self._abort(f"{type(error).__name__}: {error}")

    def _suffices(self, now: float) -> bool:
        """Whether the stage can end with the answers that it has."""
        wanted = self._needed if now < self._open_until else self.plan.quorum
        return len(self.answers) >= (wanted if self.stage in self.openings else self.plan.quorum)

    def _hope(self, now: float) -> Outbox:
        """Wait for survivors to come back: nothing but this sum can be opened any more. Who is
        there, and was not asked yet, is asked now."""
        self.waiting = set(self._survivors) - set(self.answers)
        self.deadline, self._short = self._open_until, True
        present = sorted(self.waiting - self._gone - self._asked)
        self._asked |= set(present)
        return [frame for name in present for frame in self._request(name)]

    def _hand_out(self, now: float) -> Outbox:
        """The outcomes to their owners, who may upload now."""
        assert self._selector is not None
        outcomes = self._selector.outcomes
        if outcomes is None:
            return self._without_helper()
        self._begin(Stage.COLLECTING, tuple(name for name, _ in outcomes), now)
        return outcomes

    def _finish(self, total: layout.Vector, integers: Integers | None) -> Outbox:
        result = layout.unflatten(self.plan.layout, total)
        counted, weight = float(result[layout.CONTRIBUTORS]), float(result[layout.WEIGHT])
        expected = len(self.plan.cohort) - len(self.dropped)
        fills = [v for name, v in result.items() if name.startswith(layout.FILLED)]
        odd = any((v < 0).any() or (v > expected).any() for v in fills)
        if not np.isfinite(total).all() or round(counted) != expected or weight <= 0 or odd:
            return self._abort(
                f"the sum counts {counted:g} contributors of weight {weight:g}, "
                f"{expected} uploads were added"
            )
        self.result, self.integers, self.stage = result, integers, Stage.DONE
        return self._tell_all("")

    def _abort(self, reason: str) -> Outbox:
        self.helper_failed |= self._outcome_refused
        self.stage, self.reason = Stage.ABORTED, reason
        self.waiting = set()
        return self._tell_all(reason)

    def _tell_all(self, reason: str) -> Outbox:
        message = m.RoundEnd(self.plan.run, self.plan.round, m.line(reason))
        names = {*self.plan.cohort, self.plan.selection.helper} - {""}
        return [(name, message) for name in sorted(names)]
