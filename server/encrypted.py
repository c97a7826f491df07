"""The server in one round under homomorphic encryption.

    [keying ->] collecting -> opening -> reporting -> done | aborted

It relays the cohort key sealed, adds ciphertexts, hands the sum back, and keeps the next global
prompt in the sealed form on which the clients agree. It imports nothing that could decrypt.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import FieldError, KeyMismatchError, SecretKeyError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.homomorphic import CipherSum
from secure_fedprompt.protocol.keys import verify
from secure_fedprompt.protocol.packing import Packing
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.server.coordinator import Deadlines, Round, Stage
from secure_fedprompt.server.selection import Outbox


def make_round(
    plan: RoundPlan,
    base: bytes,
    roster: Roster,
    deadlines: Deadlines,
    run_keys: Mapping[str, m.Ready],
    entropy: Entropy = os.urandom,
) -> Round:
    """The state machine for a plan's protection; ``run_keys`` from the clients' ``Ready``."""
    kind = EncryptedRound if plan.encrypted else Round
    return kind(plan, base, roster, deadlines, run_keys, entropy)


@dataclass
class EncryptedRound(Round):
    """One round.

    Attributes:
        key: digest of the cohort key in use.
        holders: clients that are known to hold it.
        keyed: whether everybody could have the key; burnt: whether the server was shown it.
        sealed: the next global prompt, once done.
    """

    key: bytes = NO_KEY
    holders: set[str] = field(default_factory=set)
    keyed: bool = True
    burnt: bool = False
    sealed: bytes = b""

    def __post_init__(self) -> None:
        self.plan.check()
        self.key, self._gone = self.plan.key, set()
        self._selector = self._make_selector()
        scheme = homomorphic.scheme(self.plan.protection, self.plan.parameters)
        packing = Packing.of(self.plan.layout, scheme.limit, self.plan.parameters.clients)
        self._ciphers = CipherSum(scheme, -(-packing.slots // scheme.slots))
        self._survivors: tuple[str, ...] = ()
        self._agreed = NO_KEY
        self._reporters: list[str] = []
        self._early: dict[str, m.Message] = {}  # of key holders, while others get the key

    def start(self, now: float) -> Outbox:
        plan = self.plan
        out = self._plans()
        if not plan.grants:
            self._collect(plan.cohort, now)
            return out
        self.keyed = False
        self._begin(Stage.KEYING, (plan.maker,), now)
        recipients = tuple(self.run_keys[name] for name in plan.grants)
        return [*out, (plan.maker, m.KeyRequest(plan.run, plan.round, recipients))]

    def _unawaited(self, sender: str, message: m.Message) -> Outbox:
        """Holders of the key go on while others are given it."""
        early = self.stage is Stage.KEYING and sender not in self.plan.grants
        if early and isinstance(message, m.KeyShares if self._selector else m.CipherUpload):
            self._early[sender] = message
        return []

    def lost(self, sender: str, now: float) -> Outbox:
        self.holders.discard(sender)
        return super().lost(sender, now)

    def _expected(self) -> type[m.Message]:
        kinds: dict[Stage, type[m.Message]] = {
            Stage.KEYING: m.KeyGrant,
            Stage.SELECTING: m.KeyShares,
            Stage.EVALUATING: m.HelperOutcome,
            Stage.COLLECTING: m.CipherUpload,
            Stage.OPENING: m.Opened,
            Stage.REPORTING: m.SealedPrompt,
        }
        return kinds[self.stage]

    def _take(self, sender: str, message: m.Message) -> None:
        plan, identity = self.plan, self.roster.identity_of(sender)
        match message:
            case m.KeyShares():
                super()._take(sender, message)
            case m.KeyGrant():
                body = message.body(plan)
                verify(identity, Purpose.KEY_GRANT, body, message.signature, sender)
                try:
                    self._ciphers.scheme.check_context(message.context)
                except SecretKeyError:
                    self.burnt = True
                    raise
                if tuple(grant.recipient for grant in message.grants) != plan.grants:
                    raise FieldError("key is not granted to those whom the plan names")
                if message.key == NO_KEY or plan.key not in (NO_KEY, message.key):
                    raise KeyMismatchError(
                        f"{sender} grants key {message.key.hex()[:16]}, registered is "
                        f"{plan.key.hex()[:16]}"
                    )
                for grant in message.grants:
                    body = grant.body(plan, message.key)
                    verify(identity, Purpose.KEY_GRANT, body, grant.signature, sender)
                self.key, self.keyed = message.key, True
                self.holders.add(sender)
            case m.CipherUpload():
                if message.key != self.key:
                    raise KeyMismatchError(
                        f"{sender} encrypts under key {message.key.hex()[:16]}, registered is "
                        f"{self.key.hex()[:16]}"
                    )
                verify(identity, Purpose.UPLOAD, message.body(plan), message.signature, sender)
                self._ciphers.add(message.ciphertexts)
                self.holders.add(sender)
            case m.SealedPrompt():
                if digest(Purpose.BASE, message.box) != self._agreed:
                    raise FieldError("sealed prompt is not the one that was announced")

    def _kept(self, message: m.Message) -> m.Message:
        return m.Alive() if isinstance(message, m.CipherUpload) else message

    def _advance(self, now: float) -> Outbox:
        if self.stage not in (Stage.KEYING, Stage.REPORTING):
            return super()._advance(now)
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self.began
        answers = list(self.answers.values())
        if self.stage is Stage.KEYING:
            if not answers:
                return self._abort(f"key maker {self.plan.maker} granted no key")
            return self._relay(answers[0], now)
        if answers and isinstance(answers[0], m.SealedPrompt):
            self.sealed = bytes(answers[0].box)
            return self._done()
        return self._ask_for_prompt(now)

    def _relay(self, granted: m.Message, now: float) -> Outbox:
        plan = self.plan
        assert isinstance(granted, m.KeyGrant)
        maker = self.run_keys[plan.maker]
        self._collect(plan.cohort, now)
        out: Outbox = [
            (grant.recipient, m.KeyBox(plan.run, plan.round, maker, granted.key, grant))
            for grant in granted.grants
        ]
        for sender, upload in self._early.items():
            out += self.on(sender, upload, now)
        return out

    def _close_stage(self, names: tuple[str, ...], now: float) -> Outbox:
        if self.stage is Stage.COLLECTING:
            self._survivors = names
            ciphertexts = self._ciphers.result()
            self._begin(Stage.OPENING, names, now)
            message = m.CipherSum(self.plan.run, self.plan.round, names, ciphertexts)
            return [(name, message) for name in names]
        announced = {n: a.sealed for n, a in self.answers.items() if isinstance(a, m.Opened)}
        (self._agreed, votes), *others = Counter(announced.values()).most_common()
        for name in names:
            if announced[name] != self._agreed:
                self.faults[name] = "DecryptionError: opened the sum to another prompt than others"
        if others and votes < self.plan.quorum:
            return self._abort(f"clients opened the sum to {1 + len(others)} different prompts")
        if (self._agreed != NO_KEY) != self.plan.training:
            return self._abort("clients disagree with the plan on whether there is a new prompt")
        if not self.plan.training:
            return self._done()
        self._reporters = [name for name in names if announced[name] == self._agreed]
        return self._ask_for_prompt(now)

    def _ask_for_prompt(self, now: float) -> Outbox:
        while self._reporters:
            name = self._reporters.pop(0)
            if name not in self._gone:
                self._begin(Stage.REPORTING, (name,), now)
                return [(name, m.SealedRequest(self.plan.run, self.plan.round))]
        return self._abort("nobody who opened the sum sent the sealed prompt")

    def _done(self) -> Outbox:
        self.stage = Stage.DONE
        return self._tell_all("")
