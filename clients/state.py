"""What every state of a client in a round has in common, and what it needs from outside."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.ledger import Ledger
from secure_fedprompt.protocol import fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.agreement_proof import NO_PROOF, prove
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    KeyInUseError,
    MismatchError,
    NotOnRosterError,
    ReplayError,
    RosterMismatchError,
    RunFailedError,
    SecureFedPromptError,
    SurvivorError,
    TermsError,
    ThresholdError,
    UnexpectedMessageError,
    UpdateError,
)
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.keys import Identity, verify
from secure_fedprompt.protocol.layout import CONTRIBUTORS, WEIGHT, Values, Vector, total_size
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan
from secure_fedprompt.protocol.policy import Policy, check_isolation
from secure_fedprompt.protocol.ring import Words
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.selection.task import Choice
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.protocol.terms import RunTerms, nonces_digest, tolerated

if TYPE_CHECKING:
    from secure_fedprompt.clients.cohort_key import CohortKey

_REFUSALS = (  # that a server may name
    KeyInUseError, MismatchError, NotOnRosterError, RosterMismatchError, RunFailedError,
)  # fmt: skip

Replies = list[m.Message]
Step = tuple["State", Replies]


def refusal(message: m.Refused) -> SecureFedPromptError:
    """The server's refusal as the error that it names."""
    known = {cls.__name__: cls for cls in _REFUSALS}
    return known.get(message.error, RunFailedError)(f"server refuses us: {message.reason}")


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
    journal: MemoryJournal
    entropy: Entropy
    keyring: Keyring = field(default_factory=Keyring)
    ledger: Ledger = field(default_factory=Ledger)

    @functools.cached_property
    def roster_clients(self) -> int:
        """How many clients are on this party's own roster."""
        return len(self.roster.with_role("client"))

    def ready(self, run: bytes, nonce: bytes = bytes(32)) -> m.Ready:
        """The signed key of this run, which cohort key is held, and the committed nonce."""
        held = self.keyring.cohort.digest if self.keyring.cohort else NO_KEY
        public = self.keyring.secret.public_key().public_bytes_raw()
        unsigned = m.Ready(run, self.name, public, held, nonce, bytes(64))
        signature = self.identity.sign(Purpose.RUN_KEY, unsigned.body(self.roster.digest))
        return replace(unsigned, signature=signature)

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

    def check_terms(self, message: m.Terms, commitments: tuple[m.Nonce, ...]) -> RunTerms:
        """Terms that the server signed for the nonces of this run.

        Args:
            commitments: of the Welcome.

        Raises:
            SignatureError, TermsError, RosterMismatchError
        """
        terms, server = message.terms, self.roster.with_role("server")[0]
        verify(server.identity, Purpose.TERMS, terms.digest, message.signature, server.name)
        committed = {n.name: n.nonce for n in commitments}
        names = [n.name for n in message.nonces]
        if names != sorted(set(names)) or any(
            committed.get(n.name) != m.commitment(n.name, n.nonce) for n in message.nonces
        ):
            raise TermsError("terms: a nonce is not the one that its client committed to")
        if terms.regular and set(names) != set(committed):
            raise TermsError("terms: nonces of a regular graph were left out")
        if terms.nonces != nonces_digest(message.nonces):
            raise TermsError("terms: digest of other nonces than those that were sent")
        if digest(Purpose.BASE, message.start) != terms.start:
            raise TermsError("terms: starting prompt is not the one that they name")
        if terms.roster_digest != self.roster.digest:
            raise RosterMismatchError(
                f"server's roster {terms.roster_digest.hex()[:16]} is not ours "
                f"{self.roster.digest.hex()[:16]}: copy the same roster file to every machine"
            )
        if terms.clients != self.roster_clients:
            raise TermsError(
                f"terms: {terms.clients} clients, the roster has {self.roster_clients}: any of "
                "them could be in a cohort"
            )
        terms.check()
        return terms

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
        """Refuse a list that is not one of this cohort with us in it, too short, or too near to
        lists whose sums may be open.

        Raises:
            SurvivorError, ThresholdError, PolicyError; IsolationError: see ``check_isolation``.
        """
        plan, own = self.plan, self.party.name
        if list(survivors) != sorted(set(survivors)) or not set(survivors) <= set(plan.cohort):
            raise SurvivorError("survivor list is doubled, unsorted or from outside the cohort")
        if own not in survivors:
            raise SurvivorError(f"survivor list leaves out {own!r}, who uploaded")
        if len(survivors) < plan.quorum:
            raise ThresholdError(f"{len(survivors)} survivors, quorum is {plan.quorum}")
        self.party.policy.check_survivors(survivors)
        c = tolerated(plan.protection, bool(plan.degree), plan.members, plan.quorum)
        check_isolation(survivors, self.party.journal.near_lists(plan), c)

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
class Ready(State):
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


def words_of(plan: RoundPlan, data: bytes) -> Words:
    """Encoded ring words, to be protected.

    Raises:
        UpdateError: not of this plan's size.
    """
    words = np.frombuffer(data, "<u4").astype(np.uint32)
    if len(words) != total_size(plan.layout):
        raise UpdateError(f"{len(words)} stored words, the plan has {total_size(plan.layout)}")
    return words
