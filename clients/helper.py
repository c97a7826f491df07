"""The helper of a secure selection: it evaluates on labels and shares that mean nothing to it.

Sans-I/O, and the same whether an elected client or a process of its own plays it. It opens seeds
that clients sealed to it, and seals its shares of the outcomes to their owners; it never holds the
server's shares, the offset of the labels or what decodes an output. See docs/secure-selection.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from secure_fedprompt.clients.party import Party, Replies, refusal
from secure_fedprompt.clients.rounds.selecting import box_key
from secure_fedprompt.protocol import masking
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    FieldError,
    PolicyError,
    ProtocolError,
    ReplayError,
    RosterMismatchError,
    RunFailedError,
    SecureFedPromptError,
    UnexpectedMessageError,
)
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import seal, unseal
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.selection.parties import Evaluator
from secure_fedprompt.protocol.selection.shares import Keys, share_of
from secure_fedprompt.protocol.selection.task import Task, session_of
from secure_fedprompt.protocol.terms import RunTerms


@dataclass
class _Work:
    plan: RoundPlan
    evaluator: Evaluator
    owners: tuple[m.Ready, ...] = ()


class Helper:
    """Helps with one selection after another. ``on`` takes frames of the server."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self._work: _Work | None = None
        self._last: dict[bytes, int] = {}  # last round by run

    def on(self, message: m.Message) -> Replies:
        """Take one of ``messages.TO_HELPER``, or the end of a round.

        Raises:
            ProtocolError: the frame is refused, and the selection given up.
        """
        work, self._work = self._work, None  # kept only if all goes well
        if isinstance(message, m.HelperPlan):
            return self._begin(message)
        if work is None or not (isinstance(message, m.OfRound) and message.is_of(work.plan)):
            return []  # late: a frame may cross the end of its round
        match message:
            case m.HelperAnswer():
                work.evaluator.accept(message.answer)
                replies: Replies = []
            case m.HelperInputs():
                replies = [self._choose(work, message)]
            case m.HelperTables():
                return [self._outcome(work, message)]
            case _:
                raise UnexpectedMessageError(f"{type(message).__name__} is not for a helper")
        self._work = work
        return replies

    def end(self, run: bytes, round_: int) -> None:
        """A round is over: nothing of it is kept."""
        if self._work and (run, round_) == (self._work.plan.run, self._work.plan.round):
            self._work = None

    def reset(self) -> None:
        """Give up what is under way; rounds that were helped stay refused."""
        self._work = None

    def _begin(self, message: m.HelperPlan) -> Replies:
        party, plan = self.party, message.plan
        chosen = plan.selection
        plan.check()
        if not message.is_of(plan):
            raise UnexpectedMessageError("a plan of another round than its frame")
        for name in plan.cohort:
            party.roster.identity_of(name)
        if plan.roster_digest != party.roster.digest:
            raise RosterMismatchError(
                f"server's roster {plan.roster_digest.hex()[:16]} is not ours "
                f"{party.roster.digest.hex()[:16]}: copy the same roster file to every machine"
            )
        own = party.keyring.secret.public_key().public_bytes_raw()
        if not plan.selecting or (chosen.helper, chosen.helper_key) != (party.name, own):
            raise UnexpectedMessageError("a plan that does not name us as its helper")
        if len(plan.cohort) < party.policy.min_cohort:
            raise PolicyError(
                f"plan has a cohort of {len(plan.cohort)}, but policy.min_cohort is "
                f"{party.policy.min_cohort}"
            )
        if plan.round <= self._last.get(plan.run, 0):
            raise ReplayError(f"a second selection in round {plan.round} or an earlier one")
        self._last[plan.run] = plan.round
        self._work = _Work(plan, Evaluator(session_of(plan.digest), party.entropy))
        return [m.HelperOffer(plan.run, plan.round, self._work.evaluator.offer())]

    def _choose(self, work: _Work, message: m.HelperInputs) -> m.Message:
        plan = work.plan
        names = tuple(owner.name for owner in message.owners)
        if list(names) != sorted(set(names)) or not set(names) <= set(plan.cohort):
            raise AdvertMismatchError("owners are doubled, unsorted or from outside the cohort")
        if work.owners:
            raise UnexpectedMessageError("inputs of a selection, twice")
        if len(names) < plan.quorum:
            raise AdvertMismatchError(f"{len(names)} owners, quorum is {plan.quorum}")
        if len(message.boxes) != m.SEED_BOX * len(names):
            raise FieldError(f"{len(message.boxes)} bytes of boxes for {len(names)} owners")
        words, kept, refused = {}, [], []
        for i, owner in enumerate(message.owners):
            box = bytes(message.boxes[m.SEED_BOX * i : m.SEED_BOX * (i + 1)])
            try:
                words[owner.name] = self._open(plan, owner, box)
                kept.append(owner)
            except ProtocolError:
                refused.append(owner.name)
        if len(kept) < plan.quorum:
            raise AdvertMismatchError(f"shares of {', '.join(refused)} do not open")
        work.owners = tuple(kept)
        task = Task(plan.selection, tuple(words))
        choices = work.evaluator.choose(task.circuit, task.inputs(words))
        return m.HelperChoices(plan.run, plan.round, tuple(refused), choices)

    def _open(self, plan: RoundPlan, owner: m.Ready, box: bytes) -> Keys:
        """An owner's share of its keys, (modalities, groups)."""
        party, chosen = self.party, plan.selection
        party.check_run_key(plan, owner, owner.name)
        key = box_key(party, plan, owner, Purpose.SHARE_BOX)
        context = masking.seal_context(plan, owner.name, party.name)
        seed = unseal(key, box, context, owner.name)
        share = share_of(seed, plan.digest, chosen.modalities * chosen.groups)
        return share.reshape(chosen.modalities, chosen.groups)

    def _outcome(self, work: _Work, message: m.HelperTables) -> m.Message:
        plan, party = work.plan, self.party
        found = work.evaluator.evaluate(message.tables)
        outcomes = Task(plan.selection, tuple(o.name for o in work.owners)).outcomes(found)
        boxes = []
        for owner in work.owners:
            key = box_key(party, plan, owner, Purpose.OUTCOME_BOX)
            context = masking.seal_context(plan, party.name, owner.name)
            boxes.append(seal(key, outcomes[owner.name], context))
        return m.HelperOutcome(plan.run, plan.round, b"".join(boxes))


class HelperSession:
    """A helper over a whole run, as a state machine without I/O.

    Attributes:
        run: its id, once welcomed; over: whether it has ended; helped: selections so far.
    """

    def __init__(self, party: Party) -> None:
        self.party, self.run, self.over, self.helped = party, b"", False, 0
        self._helper, self._nonce, self._opened = Helper(party), party.entropy(32), False
        self._commitments: tuple[m.Nonce, ...] = ()
        self._terms: RunTerms | None = None

    def hello(self) -> m.Hello:
        """The first frame of each connection."""
        if self._opened and self._terms is None:  # it is known: the next run needs another
            self._nonce, self._opened, self.run = self.party.entropy(32), False, b""
        committed = m.commitment(self.party.name, self._nonce)
        return m.Hello(committed, "", bytes(32), bytes(32), self.party.roster.digest)

    def on(self, message: m.Message) -> Replies:
        """Take one frame. One that breaks a rule only ends our part in its round.

        Raises:
            SecureFedPromptError: refused, or the run failed.
        """
        match message:
            case m.Rejoin():
                return [self.hello()]
            case m.LogHead():
                self.party.check_head(message)
            case m.Refused():
                raise refusal(message)
            case m.Welcome():
                self._welcome(message)
                return [self.party.ready(self.run, self._nonce)]
            case m.Terms() if message.run == self.run:
                self._terms = self.party.check_terms(message, self._commitments)
                return [m.Accept(self.run, self._terms.digest)]
            case m.RoundEnd():
                self._helper.end(message.run, message.round)
            case m.Finish() if not self.run:
                raise RunFailedError("the run ended before this helper could take part")
            case m.Finish() if message.run == self.run:
                self.over = True
                if message.reason:
                    raise RunFailedError(f"server ended the run: {message.reason}")
                return [m.Leave("Finished", "")]
            case m.HelperPlan() | m.HelperAnswer() | m.HelperInputs() | m.HelperTables():
                if message.run != self.run or self._terms is None:
                    return []
                try:
                    if isinstance(message, m.HelperPlan):
                        self._terms.admit(message.plan)
                    replies = self._helper.on(message)
                except SecureFedPromptError as error:
                    kind = type(error).__name__
                    return [m.Withdraw(message.run, message.round, kind, m.line(error))]
                self.helped += sum(isinstance(reply, m.HelperOutcome) for reply in replies)
                return replies
        return []

    def _welcome(self, message: m.Welcome) -> None:
        if message.run != m.run_id(message.server_nonce, message.commitments):
            raise ReplayError("run id is not the digest of the run's nonces")
        if self.run not in (b"", message.run):
            raise ReplayError("welcome to another run: start this helper again to join it")
        self.run, self._commitments, self._opened = message.run, message.commitments, True
