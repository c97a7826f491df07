"""A client in one round under homomorphic encryption: the states of ``bfv`` and ``ckks``.

    begin -> [Granting | Receiving ->] EncryptedAwaiting -> Sent -> Signing -> Decrypted -> Reported

``keying`` has the states in brackets. Everybody decrypts the sum and computes the next global
prompt, which the server keeps only in a sealed form. From ``Sent`` on the journal has the state: a
client that is killed there has lost the key, and can still sign the sum that others open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from secure_fedprompt.clients.cohort_key import CohortKey
from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds import keying
from secure_fedprompt.clients.rounds.base import (
    Awaiting,
    Opening,
    State,
    Step,
    Takes,
    check_signers,
    words_of,
)
from secure_fedprompt.protocol import client_noise, fixedpoint, homomorphic, layout, sum_tag
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import MAX_FRAME, UpTo, decode_fields, encode_fields
from secure_fedprompt.protocol.errors import (
    DecryptionError,
    KeyLostError,
    KeyMismatchError,
    SurvivorError,
)
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.keys import verify
from secure_fedprompt.protocol.layout import Vector
from secure_fedprompt.protocol.packing import Integers, Packing
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan


def begin(party: Party, plan: RoundPlan) -> Step:
    """The first state of a checked plan, and what to send; see ``keying.begin``."""
    return keying.begin(party, plan, KIND)


def _make(party: Party, plan: RoundPlan) -> CohortKey:
    """A fresh key, under whose successor the prompt stays readable.

    Raises:
        KeyLostError: not by this client.
    """
    prompt_key = party.prompt_key(plan.run)
    if plan.learning_round > 1 and not prompt_key:
        raise KeyLostError("this client can make no key under which the global prompt opens")
    scheme = homomorphic.scheme(plan.protection, plan.parameters)
    return CohortKey.make(scheme, party.entropy, prompt_key)


def _read(plan: RoundPlan, data: bytes, expected: bytes) -> CohortKey:
    scheme = homomorphic.scheme(plan.protection, plan.parameters)
    return CohortKey.from_bytes(scheme, data, expected)


def _keep(party: Party, plan: RoundPlan, key: CohortKey) -> None:
    # A key under which nothing was sealed or opened yet may be one that others never heard of.
    if (known := party.journal.kept_key(plan.run)) and known != key.prompt_key:
        raise KeyMismatchError(  # what the old one opens would be lost with it
            f"{plan.maker} grants a key under which the global prompt does not open"
        )
    party.keyring.cohort = key


@dataclass(frozen=True, repr=False)
class EncryptedAwaiting(Awaiting):
    """The cohort key is held."""

    key: CohortKey

    def _encode(self, vector: Vector) -> bytes:
        layout, noise, entropy = self.plan.layout, self.plan.noise, self.party.entropy
        words = client_noise.encode(layout, noise, vector, entropy(32), entropy)
        return words.astype("<u4").tobytes()

    def _send(self, data: bytes) -> Step:
        plan, party = self.plan, self.party
        integers = fixedpoint.to_integers(plan.layout, words_of(plan, data))
        ciphertexts = self.key.encrypt(_packing(plan, self.key).pack(integers))
        # One upload in a plan, as the journal sees to: two under one offset would show b . (D a).
        tag = sum_tag.to_bytes(self.key.tags(plan).tag(party.name, integers))
        reply = m.CipherUpload(plan.run, plan.round, self.key.digest, ciphertexts, tag, m.UNSIGNED)
        reply = m.signed(reply, party.identity, Purpose.UPLOAD, plan)
        after = Sent(party, plan, self.key)
        party.journal.keep_opening(plan, after.to_bytes())
        return after, [reply]


def _packing(plan: RoundPlan, key: CohortKey) -> Packing:
    return Packing.of(plan.layout, key.scheme.limit, plan.parameters.clients)


KIND = keying.Kind(
    held=lambda party: party.keyring.cohort,
    make=_make,
    read=_read,
    keep=_keep,
    go_on=lambda party, plan, key: (EncryptedAwaiting(party, plan, key), []),
)


@dataclass(frozen=True, repr=False)
class _Kept:
    """What the journal keeps of a round from the upload on; what is not there yet is empty."""

    plan: RoundPlan
    body: Annotated[bytes | memoryview, UpTo(96)] = b""
    announced: Annotated[bytes | memoryview, UpTo(32)] = b""
    box: Annotated[bytes | memoryview, UpTo(MAX_FRAME)] = b""


def restored(party: Party, data: bytes) -> Sent | Reported:
    """The state of a client that was killed in it. Raises CodecError if this release did not keep
    it."""
    kept = decode_fields(_Kept, data)
    if kept.announced:
        return Reported(party, kept.plan, bytes(kept.announced), bytes(kept.box))
    if kept.body:
        return Signing(party, kept.plan, None, bytes(kept.body))
    return Sent(party, kept.plan, None)


@dataclass(frozen=True, repr=False)
class Sent(State):
    """The upload is on its way; the sum is awaited.

    Attributes:
        key: lost with the process that held it.
    """

    key: CohortKey | None

    def to_bytes(self) -> bytes:
        """See ``restored``."""
        return encode_fields(_Kept(self.plan))

    def _on_cipher_sum(self, message: m.CipherSum) -> Step:
        plan, party = self.plan, self.party
        if not plan.points.keys() >= set(message.survivors):
            raise SurvivorError("survivor list is from outside the cohort")
        self.check_survivors(message.survivors)
        after = Signing(party, plan, self.key, message.body(plan), message)
        if message.signers:  # what others signed while we were away
            after.check(message.signers)
        party.journal.record_survivors(plan, message.survivors, after.to_bytes())
        return after.open() if message.signers else after.sign()

    takes: ClassVar[Takes] = {m.CipherSum: _on_cipher_sum}


@dataclass(frozen=True, repr=False)
class Signing(Sent):
    """The encrypted sum is signed; it is decrypted once a quorum has signed the same ``body``.

    Attributes:
        sum: None in a restarted client, until it is shown again.
    """

    body: bytes
    sum: m.CipherSum | None = None

    def to_bytes(self) -> bytes:
        return encode_fields(_Kept(self.plan, self.body))

    def _on_other_sum(self, message: m.CipherSum) -> Step:
        """The same one after a reconnection; a second one is not signed."""
        if message.body(self.plan) != self.body:
            raise SurvivorError(f"a second sum in {self}")
        same = self if self.sum else replace(self, sum=message)
        if not message.signers:
            return same.sign()
        same.check(message.signers)
        return same.open()

    @property
    def _shown(self) -> m.CipherSum:
        assert self.sum is not None  # but in a restarted client, which has no key
        return self.sum

    def sign(self) -> Step:
        """Sign this sum: from now on nothing else of this prompt."""
        plan = self.plan
        self.reveal(self._shown.survivors)
        signature = self.party.identity.sign(Purpose.SUM, self.body)
        return self, [m.Consistent(plan.run, plan.round, signature)]

    def _on_sum_signed(self, message: m.SumSigned) -> Step:
        if self.sum is None:
            return self, [self._lost()]
        self.check(message.signers)
        return self.open()

    def check(self, signers: Sequence[m.Signed]) -> None:
        """Raises SurvivorError, ThresholdError or SignatureError if no quorum signed this sum."""
        check_signers(signers, self._shown.survivors, self.plan.quorum)
        for signed in signers:
            identity = self.party.roster.identity_of(signed.name)
            verify(identity, Purpose.SUM, self.body, signed.signature, signed.name)

    def open(self) -> Step:
        """Decrypt the sum, and check that it is one; without the key others must, and are told so.

        Raises:
            SumError: it is not the sum of what its members sent.
        """
        plan, party, shown = self.plan, self.party, self._shown
        survivors = shown.survivors
        self.reveal(survivors)  # first: whatever comes of it, nothing else is opened
        if self.key is None:
            return self, [self._lost()]
        packing = _packing(plan, self.key)
        ciphertexts = tuple(bytes(data) for data in shown.ciphertexts)
        tag = sum_tag.from_bytes(shown.tag)
        integers = packing.unpack(self.key.decrypt(ciphertexts, packing.slots, plan.digest))
        if not self.key.tags(plan).holds(survivors, integers, tag):
            raise self.not_the_sum(survivors)
        check_sum(plan, integers, len(survivors))
        total = layout.unflatten(plan.layout, fixedpoint.decode(plan.layout, integers))
        self.check_fillers(survivors, total)
        return Decrypted(party, plan, integers, total, self.key), []

    def _lost(self) -> m.Withdraw:
        """Nobody need wait for us to open this sum."""
        text = "this client was started again, and the key is in memory only"
        return m.Withdraw(self.plan.run, self.plan.round, KeyLostError.__name__, text)

    takes: ClassVar[Takes] = {m.SumSigned: _on_sum_signed, m.CipherSum: _on_other_sum}


def check_sum(plan: RoundPlan, integers: Integers, uploads: int) -> None:
    """Refuse what cannot be the sum of this many uploads.

    Its tag holds, so that it is the sum of what members sent: one of them did not keep to the plan.

    Raises:
        DecryptionError: naming the field.
    """
    for field, place in layout.slices(plan.layout):
        part = integers[place]
        largest = uploads * fixedpoint.magnitude(field.bound, field.frac)
        if len(part) and int(max(abs(part.min()), abs(part.max()))) > largest:
            raise DecryptionError(
                f"decrypted sum of {field.name!r} exceeds what {uploads} uploads can make: wrong "
                "key, or ciphertexts that do not belong to this round"
            )
        if field.name == layout.CONTRIBUTORS and int(part[0]) != uploads:
            raise DecryptionError(
                f"decrypted sum counts {int(part[0])} contributors, the server names {uploads}"
            )
        if field.name == layout.WEIGHT and int(part[0]) <= 0:
            raise DecryptionError("decrypted sum has no weight")


@dataclass(frozen=True, repr=False)
class Decrypted(Opening):
    """The sum is open, and sealed is what is made of it."""

    key: CohortKey

    def report(self, prompt: bytes) -> Step:
        plan = self.plan
        box, announced = b"", NO_KEY
        if prompt:
            box = self.key.seal_prompt(plan.run, plan.learning_round + 1, prompt)
            announced = digest(Purpose.BASE, box)
            self.party.keep_prompt_key(plan.run)
        after = Reported(self.party, plan, announced, box)
        self.party.journal.keep_opening(plan, after.to_bytes())
        return after, [after.opened()]


@dataclass(frozen=True, repr=False)
class Reported(State):
    """The sum is open. What is sent about it from here on is always the same.

    Attributes:
        announced: digest of ``box``, the sealed next prompt.
    """

    announced: bytes
    box: bytes

    def to_bytes(self) -> bytes:
        """See ``restored``."""
        return encode_fields(_Kept(self.plan, announced=self.announced, box=self.box))

    def opened(self) -> m.Opened:
        return m.Opened(self.plan.run, self.plan.round, self.announced)

    def _on_cipher_sum(self, message: m.CipherSum) -> Step:
        return self, [self.opened()]  # after a reconnection; no second sum is opened

    def _on_sealed_request(self, message: m.SealedRequest) -> Step:
        return self, [m.SealedPrompt(self.plan.run, self.plan.round, self.box)]

    def _on_round_end(self, message: m.RoundEnd) -> Step:
        return self, []

    takes: ClassVar[Takes] = {
        m.CipherSum: _on_cipher_sum,
        m.SealedRequest: _on_sealed_request,
        m.RoundEnd: _on_round_end,
    }
