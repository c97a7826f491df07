"""Who a client is, for the whole run."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.ledger import Ledger, Upload
from secure_fedprompt.clients.sum_key import SumKey
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import decode_fields
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    FloodError,
    IsolationError,
    KeyInUseError,
    MismatchError,
    NotOnRosterError,
    PolicyError,
    ReplayError,
    RosterMismatchError,
    RunFailedError,
    SecureFedPromptError,
    TermsError,
)
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.keys import Identity, verify
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan
from secure_fedprompt.protocol.policy import Policy, check_isolation
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.protocol.terms import RunTerms, nonces_digest

if TYPE_CHECKING:
    from secure_fedprompt.clients.cohort_key import CohortKey

_REFUSALS = (  # that a server may name
    FloodError, KeyInUseError, MismatchError, NotOnRosterError, RosterMismatchError,
    RunFailedError,
)  # fmt: skip


Replies = list[m.Message]


def refusal(message: m.Refused) -> SecureFedPromptError:
    """The server's refusal as the error that it names."""
    known = {cls.__name__: cls for cls in _REFUSALS}
    return known.get(message.error, RunFailedError)(f"server refuses us: {message.reason}")


@dataclass
class Keyring:
    """Keys of one run: what others seal to this client, and the key that clients share once it is
    held, ``cohort`` under homomorphic encryption and ``sums`` under masks."""

    secret: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    cohort: CohortKey | None = None
    sums: SumKey | None = None

    def renew(self, entropy: Entropy) -> None:
        """Another secret: of a connection, as it is of a process."""
        self.secret = X25519PrivateKey.from_private_bytes(entropy(32))

    @property
    def digest(self) -> bytes:
        """Of the shared key that is held, or zeros."""
        held = self.cohort or self.sums
        return held.digest if held else NO_KEY

    def drop(self) -> None:
        """Hold no shared key any more."""
        self.cohort = self.sums = None

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
        return len(self.roster.clients)

    def ready(self, run: bytes, nonce: bytes = bytes(32)) -> m.Ready:
        """The signed key of this run, which shared key is held, and the committed nonce."""
        public = self.keyring.secret.public_key().public_bytes_raw()
        ready = m.Ready(run, self.name, public, self.keyring.digest, nonce, m.UNSIGNED)
        return m.signed(ready, self.identity, Purpose.RUN_KEY, self.roster.digest)

    def count(self, plan: RoundPlan) -> None:
        """Note what an upload will tell of this client, before it leaves.

        Raises:
            BudgetError: more than the policy allows.
        """
        cost = self.policy.cost(plan)
        upload = Upload(plan.run.hex(), plan.learning_round, cost if math.isfinite(cost) else None)
        self.ledger.release(upload, self.policy.max_client_epsilon, self.policy.client_delta)

    def keep_key(self, run: bytes, key: SumKey) -> None:
        """Hold a sum key, also after a restart."""
        self.journal.keep_key(run, self.roster.digest + key.to_bytes())
        self.keyring.sums = key

    def prompt_key(self, run: bytes) -> bytes:
        """What opens the sealed prompts of a run, also after a restart; empty if unknown."""
        held = self.keyring.cohort
        return held.prompt_key if held else self.journal.kept_key(run)

    def keep_prompt_key(self, run: bytes) -> None:
        """Hold what opens prompts also after a restart: it has sealed or opened one."""
        held, kept = self.keyring.cohort, self.journal.kept_key(run)
        if held is not None and held.prompt_key != kept:
            self.journal.keep_key(run, held.prompt_key)

    def recall(self, run: bytes) -> None:
        """Hold the sum key that was kept before a restart, unless the roster has changed since."""
        self.keyring.sums = self.keyring.sums or self._kept_key(run, self.roster.digest)

    def sum_key(self, plan: RoundPlan) -> SumKey | None:
        """The key that checks the sum of a plan, if it is known; its roster may be an older one."""
        if plan.roster_digest == self.roster.digest:
            return self.keyring.sums
        return self._kept_key(plan.run, plan.roster_digest)

    def _kept_key(self, run: bytes, roster: bytes) -> SumKey | None:
        kept = self.journal.kept_key(run)
        return SumKey(kept[len(roster) :]) if kept.startswith(roster) and kept else None

    def check_cohort(self, plan: RoundPlan) -> None:
        """Decline, before anything is trained, a cohort whose sum no client would help to open."""
        try:
            check_isolation(plan.cohort, self.journal.near_lists(plan), plan.colluders)
        except IsolationError as error:
            declined = PolicyError(
                f"{error}; begin from another prompt (other words in init, or another seed), or "
                "with the clients of that run"
            )
            declined.told = error.told
            raise declined from None

    def last_prompt(self, run: bytes) -> bytes:
        """Digest of the prompt that a run must end with, or nothing if that is not known."""
        agreed = self.journal.terms_of(run)
        rounds = decode_fields(RunTerms, agreed).rounds if agreed else 0
        return self.journal.made(run, rounds + 1)[0]

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
