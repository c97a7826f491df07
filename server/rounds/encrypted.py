"""The server in one round under homomorphic encryption.

    [asking -> keying ->] collecting -> consistency -> opening -> reporting -> done | aborted

It relays the cohort key sealed, adds ciphertexts, hands the sum back, and keeps the next global
prompt in the sealed form on which the clients agree. It imports nothing that could decrypt.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from secure_fedprompt.protocol import homomorphic, mersenne, sum_tag
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import CiphertextError, FieldError, SecretKeyError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.homomorphic import RunningSum
from secure_fedprompt.protocol.keys import verify
from secure_fedprompt.protocol.packing import Packing
from secure_fedprompt.protocol.plan import NO_KEY
from secure_fedprompt.server.opening import Pending
from secure_fedprompt.server.rounds.base import LONG_AGO, Stage
from secure_fedprompt.server.rounds.keying import ASKED, KeyedRound
from secure_fedprompt.server.serve import Outbox


@dataclass
class EncryptedRound(KeyedRound):
    """One round.

    Attributes:
        sealed: the next global prompt, once done.
    """

    uploads: ClassVar = m.CipherUpload
    awaited: ClassVar = {
        **ASKED,
        Stage.CONSISTENCY: m.Consistent,
        Stage.OPENING: m.Opened,
        Stage.REPORTING: m.SealedPrompt,
    }
    openings: ClassVar = frozenset({Stage.CONSISTENCY, Stage.OPENING, Stage.REPORTING})
    asking: ClassVar = frozenset({Stage.CONSISTENCY, Stage.OPENING})

    sealed: bytes = b""

    def _prepare(self) -> None:
        super()._prepare()
        self._begins = m.KeyShares if self._selector else m.CipherUpload
        scheme = homomorphic.scheme(self.plan.protection, self.plan.parameters)
        packing = Packing.of(self.plan.layout, scheme.limit, self.plan.parameters.clients)
        self._ciphers = RunningSum(scheme, -(-packing.slots // scheme.slots))
        self._tag = np.zeros(sum_tag.TAGS, np.uint64)
        self._agreed = NO_KEY
        self._reporters: list[str] = []
        self._reported: set[str] = set()  # who can send the sealed prompt
        self._keyless: set[str] = set()  # who cannot open the sum any more

    def _take_up(self, now: float) -> None:
        self._collect(self.plan.cohort, now)

    def _check_context(self, context: bytes | memoryview) -> None:
        try:
            self._ciphers.scheme.check_context(context)
        except SecretKeyError:
            self.burnt = True
            raise

    def _is_key(self, data: bytes) -> bool:
        assert self._granted is not None
        try:
            self._ciphers.scheme.read(homomorphic.sealapi().SecretKey(), data[32:])
        except CiphertextError:
            return False
        return digest(Purpose.COHORT_KEY, data[32:], data[:32]) == self._granted.key

    def back(self, name: str, now: float) -> Outbox:
        if self.stage is Stage.COLLECTING and name in self.answers:
            self._gone.discard(name)  # it will be asked to sign the sum
        if self.stage is Stage.REPORTING and name in self._reported and name not in self.answers:
            self._gone.discard(name)
            if self.waiting - self._gone and not self._short:
                self._reporters.append(name)
                return []
            self.waiting = {name}
            return [(name, m.SealedRequest(self.plan.run, self.plan.round))]
        return super().back(name, now)

    def reopen(self, pending: Pending, now: float) -> None:
        self.pending, self._survivors, self.key = pending, pending.survivors, pending.key
        self.dropped = dict.fromkeys(pending.dropped, LONG_AGO)
        self._begin(Stage.OPENING if pending.signers else Stage.CONSISTENCY, (), now)
        self._hope(now)

    def _suffices(self, now: float) -> bool:
        """Also, once a deadline has passed, with a few clients that agree; or with all that have
        not said that they lost the key, as who was started again does."""
        if super()._suffices(now) or self.stage is not Stage.OPENING:
            return super()._suffices(now)
        opened = {a.sealed for a in self.answers.values() if isinstance(a, m.Opened)}
        few = len(opened) == 1 and len(self.answers) >= self._few and now >= self.deadline
        return few or self._able <= set(self.answers)

    @property
    def _able(self) -> set[str]:
        """Who may still open the sum."""
        return set(self._survivors) - self._keyless

    @property
    def _few(self) -> int:
        """How many must agree on what a sum opens to: more than may pool what they know, or these
        could say anything (docs/sum-tags.md)."""
        return max(1, self.plan.quorum - 1)

    def _hope(self, now: float) -> Outbox:
        self._asked = set()  # a lost frame costs nothing to send again
        out = super()._hope(now)
        self.deadline = min(self._open_until, now + self.deadlines.stage)
        return out

    def _request(self, name: str) -> Outbox:
        return [(name, self._sum_frame())]

    def _sum_frame(self) -> m.CipherSum:
        assert self.pending is not None
        p = self.pending
        return m.CipherSum(
            self.plan.run, self.plan.round, p.survivors, p.ciphertexts, p.tag, p.signers
        )

    @functools.cached_property
    def _sum_body(self) -> bytes:
        """What every client signs: one sum in a round."""
        return self._sum_frame().body(self.plan)

    def _summed(self, names: tuple[str, ...]) -> Pending:
        """The sum of these members' uploads, to be signed and opened."""
        tag, data = sum_tag.to_bytes(self._tag), self._ciphers.result()
        dropped = tuple(sorted(self.dropped))
        return Pending(self.plan, names, dropped, key=self.key, ciphertexts=data, tag=tag)

    def on(self, sender: str, message: m.Message, now: float) -> Outbox:
        if isinstance(message, m.Withdraw) and message.is_of(self.plan):
            if message.error == "KeyMismatchError" and self._granted and sender in self._asks:
                self.refusals.add(sender)
            if message.error == "KeyLostError":
                self._keyless.add(sender)
        return super().on(sender, message, now)

    def _abort(self, reason: str) -> Outbox:
        if len(self.refusals) > len(self.plan.cohort) - self.plan.quorum:
            self.burnt = True  # more clients than a round can do without hold another prompt key
        return super()._abort(reason)

    def _check(self, sender: str, message: m.Message) -> None:
        plan, identity = self.plan, self.roster.identity_of(sender)
        match message:
            case m.CipherUpload():
                self._check_key(sender, message.key)
                verify(identity, Purpose.UPLOAD, message.body(plan), message.signature, sender)
                tag = sum_tag.from_bytes(message.tag)
                self._ciphers.add(message.ciphertexts)
                self._tag = mersenne.add(self._tag, tag)
                self.holders.add(sender)
            case m.Consistent():
                verify(identity, Purpose.SUM, self._sum_body, message.signature, sender)
            case m.SealedPrompt():
                if digest(Purpose.BASE, message.box) != self._agreed:
                    raise FieldError("sealed prompt is not the one that was announced")
            case _:
                super()._check(sender, message)

    def _advance(self, now: float) -> Outbox:
        if self.stage is not Stage.REPORTING:
            return super()._advance(now)
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self.began
        answers = list(self.answers.values())
        if answers and isinstance(answers[0], m.SealedPrompt):
            self.sealed = bytes(answers[0].box)
            return self._done()
        return self._ask_for_prompt(now)

    def _close_stage(self, names: tuple[str, ...], now: float) -> Outbox:
        if self.stage is Stage.COLLECTING:
            present = len(set(names) - self._gone)
            if present < self.plan.quorum:  # nothing is open yet: another attempt may do better
                return self._abort(f"{present} of those who uploaded are still there, "
                                   f"{self.plan.quorum} are needed")  # fmt: skip
            self._survivors, self.pending = names, self._summed(names)
            self._begin(Stage.CONSISTENCY, names, now)
            message = self._sum_frame()
            return [(name, message) for name in names]
        if self.stage is Stage.CONSISTENCY:
            return self._open(names, now)
        announced = {n: a.sealed for n, a in self.answers.items() if isinstance(a, m.Opened)}
        tally = Counter(announced.values())
        self._agreed, votes = tally.most_common(1)[0] if tally else (NO_KEY, 0)
        for name in names:
            if announced[name] != self._agreed:
                self.faults[name] = "DecryptionError: opened the sum to another prompt than others"
        if votes < (self.plan.quorum if len(tally) > 1 else self._few):
            if self._able - set(names) and now < self._open_until:
                self._needed = len(names) + 1
                return self._hope(now)
            if len(tally) > 1:
                return self._abort(f"clients opened the sum to {len(tally)} different prompts")
            return self._abort(
                f"{votes} of {len(self._survivors)} clients could open the sum, {self._few} must "
                "agree: the key was in the memory of those that were started again"
            )
        agreeing = tuple(name for name in names if announced[name] == self._agreed)
        self.checked[self.plan.learning_round] = agreeing
        if (self._agreed != NO_KEY) != self.plan.training:
            return self._abort("clients disagree with the plan on whether there is a new prompt")
        if not self.plan.training:
            return self._done()
        self._reporters, self._reported = list(agreeing), set(agreeing)
        return self._ask_for_prompt(now)

    def _open(self, names: tuple[str, ...], now: float) -> Outbox:
        """A quorum has signed the sum, and will sign no other of this prompt: it may be opened."""
        assert self.pending is not None
        signers = tuple(
            m.Signed(name, a.signature)
            for name in names[: self.plan.quorum]
            if isinstance(a := self.answers[name], m.Consistent)
        )
        self._begin(Stage.OPENING, names, now)
        self.pending = replace(self.pending, signers=signers)
        message = m.SumSigned(self.plan.run, self.plan.round, signers)
        return [(name, message) for name in names]

    def _ask_for_prompt(self, now: float) -> Outbox:
        while self._reporters:
            name = self._reporters.pop(0)
            if name not in self._gone:
                again, until = self.stage is Stage.REPORTING, self._open_until
                self._begin(Stage.REPORTING, (name,), now)
                self._open_until = until if again else self._open_until
                return [(name, m.SealedRequest(self.plan.run, self.plan.round))]
        if now < self._open_until:
            self._reporters = sorted(self._reported)  # who comes back, or did not hear it
            self.waiting, self._needed, self._short = set(self._reported), 1, True
            self.deadline = min(self._open_until, now + self.deadlines.stage)
            return []
        return self._abort("nobody who opened the sum sent the sealed prompt")

    def _done(self) -> Outbox:
        self.stage = Stage.DONE
        return self._tell_all("")
