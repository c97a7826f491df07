"""A client before the first round: it greets, is welcomed, and judges the terms of the run.

A state machine without I/O. What a client agrees to are terms, once; plans only follow from them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic

import numpy as np

from secure_fedprompt.clients.party import Party, Replies
from secure_fedprompt.clients.work import (
    L_co,
    Workload,
)
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import SAME_START, Prompt, prompt_bytes
from secure_fedprompt.protocol.codec import decode_fields, encode_fields
from secure_fedprompt.protocol.errors import (
    AcceptanceError,
    FieldError,
    HomomorphicError,
    MismatchError,
    PolicyError,
    ProtocolError,
    ReplayError,
    SecureFedPromptError,
    SumError,
    UnexpectedMessageError,
)
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.protocol.terms import RunTerms


@dataclass(eq=False, repr=False)
class Joining(Generic[L_co]):
    """One client, up to the terms of a run that it accepts.

    Attributes:
        method: to take part with, or empty for the run's.
        accept: first hex digits of terms that the operator accepts by name.
        exempt: simulation: every client is one's own.
        run: its id, once welcomed. settings: of its method.
        terms: of the run, once accepted.
    """

    party: Party
    workload: Workload[L_co]
    method: str = ""
    accept: Collection[str] = ()
    exempt: bool = False

    def __post_init__(self) -> None:
        self._nonce, self._opened_nonce = self.party.entropy(32), False
        self._greeting = False  # until we are welcomed
        self._commitments: tuple[m.Nonce, ...] = ()
        self.run = b""
        self.settings: MethodSettings | None = None
        self.terms: RunTerms | None = None
        self._learner: L_co | None = None

    @property
    def learner(self) -> L_co:
        """Data and model with the run's method.

        Raises:
            UnexpectedMessageError: no run has welcomed us.
        """
        if self._learner is None:
            raise UnexpectedMessageError("a frame of a run that did not welcome us")
        return self._learner

    def hello(self) -> m.Hello:
        """The first frame of each connection."""
        self._greeting = True
        self.party.keyring.renew(self.party.entropy)  # what was seen of it is of no use to others
        if self._opened_nonce and self.terms is None:  # it is known: the next run needs another
            self._nonce, self._opened_nonce, self.run = self.party.entropy(32), False, b""
        w = self.workload
        return m.Hello(
            m.commitment(self.party.name, self._nonce),
            self.method,
            w.model_fingerprint,
            w.classes_digest,
            self.party.roster.digest,
        )

    def leave(self, error: SecureFedPromptError) -> m.Leave:
        """The last frame. Only errors about what the server itself sent carry their text."""
        told = isinstance(error, ProtocolError | MismatchError)
        told = told and not isinstance(error, HomomorphicError | SumError)
        return m.Leave(type(error).__name__ if told else "Stopped", m.told(error) if told else "")

    def _welcome(self, message: m.Welcome) -> Replies:
        if message.run != m.run_id(message.server_nonce, message.commitments):
            raise ReplayError("run id is not the digest of the run's nonces")
        self.party.journal.check_trust(message.run)
        own = m.Nonce(self.party.name, m.commitment(self.party.name, self._nonce))
        ours = own in message.commitments
        if not (ours or self.party.journal.knows(message.run) or self.party.policy.allow_late_join):
            raise PolicyError(
                "run began without this client's nonce, and policy.allow_late_join is false"
            )
        if self.run not in (b"", message.run):
            raise ReplayError("welcome to another run: start this client again to join it")
        settings = MethodSettings.from_bytes(message.settings)
        if self.settings not in (None, settings):
            raise MismatchError("the run's settings changed: start this client again")
        allowed = self.party.policy.methods
        if allowed and settings.method not in allowed:
            raise PolicyError(
                f"run wants method {settings.method!r}, policy.methods allows {', '.join(allowed)}"
            )
        if self.settings is None:
            self.workload.resuming = self.party.journal.knows(message.run)
            self._learner = self.workload.prepare(settings)
        self.settings, self.run = settings, message.run
        self.party.recall(message.run)
        self._commitments = message.commitments
        self._opened_nonce, self._greeting = True, False
        ready = self.party.ready(self.run, self._nonce)
        if not message.need_initial:
            return [ready]
        vector = prompt_bytes(self.learner.initial())
        return [m.Initial(self.run, self.learner.tensors(), vector), ready]

    def _terms(self, message: m.Terms) -> Replies:
        """Judge the terms of the run, once."""
        settings, journal = self.settings, self.party.journal
        if self._greeting:
            return []  # crossed our greeting: it is of a connection that has ended
        if settings is None or message.run != self.run or message.terms.run != self.run:
            raise UnexpectedMessageError("terms of a run that did not welcome us")
        terms = self.party.check_terms(message, self._commitments)
        accept = m.Accept(self.run, terms.digest)
        if self.terms is not None and terms.digest == self.terms.digest:
            return [accept]
        expected: dict[str, tuple[str | bytes, str | bytes]] = {
            "settings": (bytes(terms.settings), settings.to_bytes()),
            "model": (terms.model_fingerprint, self.workload.model_fingerprint),
            "classes": (terms.classes_digest, self.workload.classes_digest),
        }
        for what, (theirs, ours) in expected.items():
            if theirs != ours:
                raise MismatchError(f"terms' {what} is {_show(theirs)}, ours is {_show(ours)}")
        start = self.learner.initial()
        try:
            given = self._floats(message.start)
            same = np.allclose(given, start, rtol=0, atol=SAME_START)
        except SecureFedPromptError:
            same = False
        if not same or terms.tensors != self.learner.tensors():
            return [m.Contest(self.run, terms.digest)]
        before = journal.terms_of(self.run)
        if before and before != encode_fields(terms):
            terms.succeed(decode_fields(RunTerms, before))
        self.party.policy.check_terms(terms, self.party.roster_clients)
        self._check_budget(terms)
        self._check_seen(terms, start)
        if before != encode_fields(terms):
            journal.accept_terms(terms, digest(Purpose.BASE, prompt_bytes(start)))
        self.terms = terms
        return [accept]

    def _check_budget(self, terms: RunTerms) -> None:
        """Refuse a run that this client's budget does not last for."""
        ledger, run = self.party.ledger, terms.run.hex()
        own = ledger.rho(lambda other: other == run)
        self.party.policy.check_budget(terms, ledger.rho(lambda other: other != run), own)

    def _check_seen(self, terms: RunTerms, start: Prompt) -> None:
        """Refuse other bounds for what this client has contributed before, unless its operator
        accepts them: two sums that are cut off in different places tell what lies between."""
        journal = self.party.journal
        mine = digest(Purpose.BASE, prompt_bytes(start))
        seen = journal.bounds_of(mine, self.run)
        if seen and terms.bounds not in seen:
            self._ask(terms, f"from the same starting prompt{self._changed(terms, mine)}")
        if terms.counts and (counted := journal.counts_of(self.run) - {terms.counts}):
            before, now = min(counted).strip("; "), terms.counts.strip("; ")
            self._ask(terms, f"that counted {before} where this one counts {now}")

    def _changed(self, terms: RunTerms, start: bytes | None) -> str:
        """What is not as in the last run before this one (from this start), if that is known."""
        before = self.party.journal.other_terms(self.run, start)
        changed = terms.differences(decode_fields(RunTerms, before)) if before else ""
        return f" with {changed}" if changed else " under other bounds or settings"

    def _ask(self, terms: RunTerms, what: str) -> None:
        """Ask the operator's word for terms, unless it was given."""
        word = terms.digest.hex()
        if not self._accepted(terms):
            raise AcceptanceError(
                f"this client took part in a run {what}: if that is meant, start it again with "
                f"--accept {word[:16]}"
            )

    def _accepted(self, terms: RunTerms) -> bool:
        """Whether the operator's word was given for these terms."""
        word = terms.digest.hex()
        return self.exempt or any(given and word.startswith(given) for given in self.accept)

    def _floats(self, data: bytes | memoryview) -> Prompt:
        """A global prompt in the clear.

        Raises:
            MismatchError, FieldError
        """
        size = sum(tensor.size for tensor in self.learner.tensors())
        if len(data) != 4 * size:
            raise MismatchError(f"global prompt has {len(data)} bytes, our method {4 * size}")
        base = np.frombuffer(data, "<f4").astype(np.float32)
        if not np.isfinite(base).all():
            raise FieldError("global prompt holds NaN or infinity")
        return base


def _show(value: str | bytes) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else repr(value)
