"""What every state of a client in a round has in common, and what it needs from outside."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.protocol import fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    ReplayError,
    SurvivorError,
    ThresholdError,
    UnexpectedMessageError,
)
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import Identity, verify
from secure_fedprompt.protocol.layout import CONTRIBUTORS, WEIGHT, Values, Vector
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.selection.task import Choice
from secure_fedprompt.protocol.shamir import Entropy

if TYPE_CHECKING:
    from secure_fedprompt.clients.cohort_key import CohortKey

Replies = list[m.Message]
Step = tuple["State", Replies]


class Journal(Protocol):
    """What a client must not forget. Every method returns only after the record is durable."""

    def begin_round(self, run: bytes, round: int) -> None:
        """Raises ReplayError unless (run, round) grows."""

    def claim_upload(self, run: bytes, round: int, update: bytes | None) -> None:
        """Raises UpdateReusedError if this round or this update (a digest) was uploaded before."""

    def record_survivors(self, run: bytes, round: int, survivors: tuple[str, ...]) -> None:
        """Store a survivor list before its signature leaves."""

    def survivor_lists(self, run: bytes) -> Iterable[tuple[str, ...]]:
        """All lists of this run so far."""

    def knows(self, run: bytes) -> bool:
        """Whether a round of this run was entered before."""


@dataclass
class Keyring:
    """Keys of one run: what others seal to this client, and the cohort key once it is held."""

    secret: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    cohort: CohortKey | None = None

    def __repr__(self) -> str:
        return "Keyring(<private>)"


@dataclass(frozen=True)
class Party:
    """Who the client is, for the whole run."""

    name: str
    identity: Identity
    roster: Roster
    policy: Policy
    journal: Journal
    entropy: Entropy
    keyring: Keyring = field(default_factory=Keyring)

    def ready(self, run: bytes) -> m.Ready:
        """The signed key of this run, and which cohort key is held."""
        held = self.keyring.cohort.digest if self.keyring.cohort else NO_KEY
        public = self.keyring.secret.public_key().public_bytes_raw()
        unsigned = m.Ready(run, self.name, public, held, bytes(64))
        signature = self.identity.sign(Purpose.RUN_KEY, unsigned.body(self.roster.digest))
        return m.Ready(run, self.name, public, held, signature)

    def check_run_key(self, plan: RoundPlan, ready: m.Ready, name: str) -> None:
        """Refuse another member's run key unless its identity signed it for this run.

        Raises:
            AdvertMismatchError, ReplayError, RosterError, SignatureError
        """
        if ready.name != name:
            raise AdvertMismatchError(f"run key of {ready.name!r} in place of {name!r}")
        if ready.run != plan.run:
            raise ReplayError(f"run key of {name} belongs to another run")
        identity = self.roster.identity_of(name, "client", "helper")
        body = ready.body(plan.roster_digest)
        verify(identity, Purpose.RUN_KEY, body, ready.signature, name)

    def check_head(self, head: m.LogHead) -> None:
        """Refuse a log head that the server's identity did not sign.

        Raises:
            SignatureError
        """
        server = self.roster.with_role("server")[0]
        body, name = head.body(server.name), server.name
        verify(server.identity, Purpose.LOG_HEAD, body, head.signature, name)


@dataclass(frozen=True, repr=False)
class State:
    party: Party
    plan: RoundPlan

    def on(self, message: m.Message) -> Step:
        """Take one message.

        Raises:
            ProtocolError: the message is refused; the state is unchanged.
        """
        run, round_ = getattr(message, "run", None), getattr(message, "round", None)
        kind, here = type(message).__name__, type(self).__name__
        if run != self.plan.run or (isinstance(round_, int) and round_ < self.plan.round):
            raise ReplayError(f"{kind} belongs to another run or an earlier round than {self}")
        if round_ != self.plan.round:
            raise UnexpectedMessageError(f"{kind} for round {round_} during {self}")
        handler = getattr(self, f"_on_{kind}", None)
        if handler is None:
            raise UnexpectedMessageError(f"{kind} is out of place in state {here} of {self}")
        step: Step = handler(message)
        return step

    def check_survivors(self, survivors: tuple[str, ...]) -> None:
        """Refuse a list that is not one of this cohort with us in it, or too short.

        Raises:
            SurvivorError, ThresholdError
        """
        plan, own = self.plan, self.party.name
        if list(survivors) != sorted(set(survivors)) or not set(survivors) <= set(plan.cohort):
            raise SurvivorError("survivor list is doubled, unsorted or from outside the cohort")
        if own not in survivors:
            raise SurvivorError(f"survivor list leaves out {own!r}, who uploaded")
        if len(survivors) < plan.quorum:
            raise ThresholdError(f"{len(survivors)} survivors, quorum is {plan.quorum}")

    def __repr__(self) -> str:
        return f"round {self.plan.round} of run {self.plan.run.hex()[:8]}"


@dataclass(frozen=True, repr=False)
class Ready(State):
    """The round waits for the local training to end, or for what a selection chose."""

    @property
    def choice(self) -> Choice | None:
        """Of server and helper, where they select, once they have."""
        return None

    def upload(self, values: Values, weight: float) -> Step:
        """Encode, protect and send a contribution, once.

        Args:
            values: update tensors and metric counters by field name; ``weight``,
                ``contributors`` and ``clipped`` are filled in.
            weight: n_k, or 1 under uniform weights.

        Raises:
            UpdateError: NaN, out of bounds, wrong shape; UpdateReusedError: sent before.
            UnexpectedMessageError: server and helper have not chosen yet.
        """
        plan, journal = self.plan, self.party.journal
        if plan.selecting and self.choice is None:
            raise UnexpectedMessageError("an upload before the selection")
        values = {**values, WEIGHT: np.float64(weight), CONTRIBUTORS: np.float64(1)}
        vector = fixedpoint.weighted(plan.layout, values, weight=weight, clip=plan.clip)
        journal.claim_upload(plan.run, plan.round, _fingerprint(plan, values))
        return self._send(vector)

    def _send(self, vector: Vector) -> Step:
        raise NotImplementedError


def _fingerprint(plan: RoundPlan, values: Values) -> bytes | None:
    """Digest of the update tensors, or None if the round carries counters only, or nothing that
    a second sum could tell more about: methods that share nothing upload zeros in every round."""
    updates = [field.name for field in plan.layout if field.update and np.any(values[field.name])]
    h = hashlib.sha256()
    for name in updates:
        h.update(np.ascontiguousarray(values[name], "<f4").data)
    return h.digest() if updates else None
