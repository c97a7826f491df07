"""What every state of a client in a round has in common, and what it needs from outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from secure_fedprompt.clients.party import Party, Replies
from secure_fedprompt.protocol import fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.agreement_proof import NO_PROOF, prove
from secure_fedprompt.protocol.errors import (
    ReplayError,
    SumError,
    SurvivorError,
    ThresholdError,
    UnexpectedMessageError,
    UpdateError,
)
from secure_fedprompt.protocol.layout import (
    CONTRIBUTORS,
    FILLED,
    WEIGHT,
    Values,
    Vector,
    total_size,
)
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.policy import check_isolation
from secure_fedprompt.protocol.ring import Integers, Words
from secure_fedprompt.protocol.selection.task import Choice

Step = tuple["State", Replies]
Takes = Mapping[type[m.Message], Callable[[Any, Any], Step]]


@dataclass(frozen=True, repr=False)
class State:
    """One state; ``takes`` says which messages it understands, and what takes each."""

    takes: ClassVar[Takes] = {}

    party: Party
    plan: RoundPlan

    def on(self, message: m.Message) -> Step:
        """Take one message.

        Raises:
            ProtocolError: the message is refused; the state is unchanged.
        """
        kind, here = type(message).__name__, type(self).__name__
        if not isinstance(message, m.OfRound):
            raise UnexpectedMessageError(f"{kind} during {self}")
        if message.run != self.plan.run or message.round < self.plan.round:
            raise ReplayError(f"{kind} belongs to another run or an earlier round than {self}")
        if not message.is_of(self.plan):
            raise UnexpectedMessageError(f"{kind} for round {message.round} during {self}")
        handler = self.takes.get(type(message))
        if handler is None:
            raise UnexpectedMessageError(f"{kind} is out of place in state {here} of {self}")
        return handler(self, message)

    def check_survivors(self, survivors: tuple[str, ...]) -> None:
        """Refuse a list of members of this cohort that is without us, too short, or too near to
        lists whose sums may be open.

        Raises:
            SurvivorError, ThresholdError; IsolationError: see ``check_isolation``.
        """
        plan, own = self.plan, self.party.name
        if own not in survivors:
            raise SurvivorError(f"survivor list leaves out {own!r}, who uploaded")
        if len(survivors) < plan.quorum:
            raise ThresholdError(f"{len(survivors)} survivors, quorum is {plan.quorum}")
        check_isolation(survivors, self.party.journal.near_lists(plan), plan.colluders)

    def reveal(self, survivors: tuple[str, ...]) -> None:
        """Note, before it is done, that this sum is opened with our help. Since its list was signed
        another of nearly the same prompt may have been opened: it is judged once more.

        Raises:
            See ``check_survivors``; OpenedError: another sum of this learning round was opened.
        """
        if not self.party.journal.revealed(self.plan):
            self.check_survivors(survivors)
            self.party.journal.record_reveal(self.plan)

    def distrusted(self, what: str) -> SumError:
        """The end of the run for this client: what came back is no sum. The key that it was to be
        checked with is not used again, and no other is taken: see ``journal.begin_round``."""
        party, plan = self.party, self.plan
        party.keyring.drop()
        party.journal.distrust(plan.run)
        return SumError(
            f"what came back in round {plan.round} is {what}; this client has left the run for good"
        )

    def not_the_sum(self, members: Sequence[str]) -> SumError:
        """The same, for a sum whose tag does not hold."""
        return self.distrusted(
            f"not the sum of what {len(members)} clients tagged: the server returned something "
            "else, or one of them sent something else"
        )

    def check_fillers(self, members: Sequence[str], total: Mapping[str, Vector]) -> None:
        """Leave the run if a slot that the selection kept closed was filled all the same: its mean
        is of the few who did, hence server or helper had one open it. Who was lost may have filled
        it too.

        Raises:
            SumError: naming the slot.
        """
        fewest = self.plan.selection.fillers - (len(self.plan.cohort) - len(members))
        for name in (name for name in total if name.startswith(FILLED)):
            for slot, count in enumerate(total[name]):
                if 0 < round(count) < fewest:
                    raise self.distrusted(
                        f"a sum in which {count:.0f} filled slot {slot} of "
                        f"{name.removeprefix(FILLED)!r}, which opens for "
                        f"{self.plan.selection.fillers}: server, helper or a client cheated"
                    )

    def __repr__(self) -> str:
        return f"round {self.plan.round} of run {self.plan.run.hex()[:8]}"


@dataclass(frozen=True, repr=False)
class Complained(State):
    """A box did not open: this attempt is over for us, and should be for everybody."""

    dealer: str

    @classmethod
    def of(cls, party: Party, plan: RoundPlan, dealer: str, secret: bytes, peer: bytes) -> Step:
        """Accuse a dealer, and show what its key ``peer`` and our key ``secret`` agree on."""
        accusation = m.Accusation(plan.run, plan.round, dealer, NO_PROOF)
        proof = prove(secret, peer, accusation.body(plan, party.name), party.entropy)
        return cls(party, plan, dealer), [replace(accusation, proof=proof)]

    def on(self, message: m.Message) -> Step:
        return self, []


@dataclass(frozen=True, repr=False)
class Awaiting(State):
    """The round waits for the local training to end, or for what a selection chose."""

    @property
    def choice(self) -> Choice | None:
        """Of server and helper, where they select, once they have."""
        return None

    def upload(self, values: Values, weight: float) -> Step:
        """Encode, protect and send a contribution, once: ``send(encode(...))``."""
        return self.send(self.encode(values, weight))

    def encode(self, values: Values, weight: float) -> bytes:
        """A contribution as it will be protected: ring words, with noise if the plan adds any.

        Args:
            values: update tensors and metric counters by field name; ``weight``,
                ``contributors`` and ``clipped`` are filled in.
            weight: n_k, or 1 under uniform weights.

        Raises:
            UpdateError: NaN, or a wrong shape.
        """
        plan = self.plan
        if plan.bucket:
            weight = 2.0 ** math.floor(math.log2(max(weight, 1)))
        values = {**values, WEIGHT: np.float64(weight), CONTRIBUTORS: np.float64(1)}
        vector = fixedpoint.weighted(plan.layout, values, weight=weight, clip=plan.clip)
        return self._encode(vector)

    def send(self, data: bytes) -> Step:
        """Protect and send what ``encode`` gave, in this round or in an aborted attempt at it.

        Raises:
            UpdateReusedError: something was sent in this round.
            UnexpectedMessageError: server and helper have not chosen yet.
        """
        if self.plan.selecting and self.choice is None:
            raise UnexpectedMessageError("an upload before the selection")
        self.party.journal.claim_upload(self.plan.run, self.plan.round)
        return self._send(data)

    def _encode(self, vector: Vector) -> bytes:
        raise NotImplementedError

    def _send(self, data: bytes) -> Step:
        raise NotImplementedError


def check_signers(signers: Sequence[m.Signed], asked: Collection[str], needed: int) -> None:
    """Refuse signers of a survivor list that are too few of those who were asked for.

    Raises:
        SurvivorError, ThresholdError
    """
    names = [signed.name for signed in signers]
    if len(set(names)) != len(names) or not set(names) <= set(asked):
        raise SurvivorError("survivor list is signed twice by one client, or by one not asked for")
    if len(names) < needed:
        raise ThresholdError(f"{len(names)} signed the survivor list, {needed} are needed")


def words_of(plan: RoundPlan, data: bytes) -> Words:
    """Encoded ring words, to be protected.

    Raises:
        UpdateError: not of this plan's size.
    """
    words = np.frombuffer(data, "<u4").astype(np.uint32)
    if len(words) != total_size(plan.layout):
        raise UpdateError(f"{len(words)} stored words, the plan has {total_size(plan.layout)}")
    return words


@dataclass(frozen=True, repr=False)
class Opening(State):
    """The sum is open: the caller makes the next prompt of it.

    Attributes:
        integers: the sum; total: the same as decoded fields.
    """

    integers: Integers
    total: dict[str, Vector]

    def report(self, prompt: bytes) -> Step:
        """Go on with the next global prompt, float32 little-endian; empty after the last round."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Done(State):
    """Nothing secret is left."""

    def _on_round_end(self, message: m.RoundEnd) -> Step:
        return self, []

    takes: ClassVar[Takes] = {m.RoundEnd: _on_round_end}
