"""A client in one round under homomorphic encryption: the states of ``bfv`` and ``ckks``.

    begin -> [Granting | Receiving ->] EncryptedReady -> Sent -> Opening -> Reported

The first two exist only in a round in which somebody lacks the cohort key: its maker seals it to
each of them. Everybody decrypts the sum and computes the next global prompt, which the server keeps
only in a sealed form.
"""

from __future__ import annotations

from dataclasses import dataclass

from secure_fedprompt.clients.cohort_key import CohortKey
from secure_fedprompt.clients.state import Party, Ready, State, Step
from secure_fedprompt.protocol import client_noise, fixedpoint, homomorphic, layout, masking
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    DecryptionError,
    KeyMismatchError,
)
from secure_fedprompt.protocol.expand import Purpose, derive, digest
from secure_fedprompt.protocol.keys import agree, seal, unseal, verify
from secure_fedprompt.protocol.layout import Vector
from secure_fedprompt.protocol.packing import Integers, Packing
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan


def begin(party: Party, plan: RoundPlan) -> State:
    """The first state of a checked plan.

    Raises:
        KeyMismatchError: the plan goes on under a cohort key that this client does not hold.
        ConfigError: this machine cannot encrypt.
    """
    scheme = homomorphic.scheme(plan.protection, plan.parameters)
    if party.name in plan.grants:
        return Receiving(party, plan)
    held = party.keyring.cohort
    if plan.key == NO_KEY:  # hence we are the maker; the prompt stays readable under the next key
        kept = held.prompt_key if held else b""
        return Granting(party, plan, CohortKey.make(scheme, party.entropy, kept))
    if held is None or held.digest != plan.key:
        ours = held.digest.hex()[:16] if held else "none"
        raise KeyMismatchError(f"plan is under cohort key {plan.key.hex()[:16]}, we hold {ours}")
    grants = plan.grants and party.name == plan.maker
    return Granting(party, plan, held) if grants else EncryptedReady(party, plan, held)


def _seal_key(plan: RoundPlan, recipient: str, shared: bytes) -> bytes:
    names = plan.maker.encode(), recipient.encode()
    return derive(shared, Purpose.KEY_GRANT, plan.digest, *names)


@dataclass(frozen=True, repr=False)
class Granting(State):
    """The maker, with a key that others need."""

    key: CohortKey

    def _on_KeyRequest(self, message: m.KeyRequest) -> Step:
        plan, party = self.plan, self.party
        if tuple(r.name for r in message.recipients) != plan.grants:
            raise AdvertMismatchError("key is not requested for those whom the plan names")
        if len({r.seal_key for r in message.recipients}) != len(message.recipients):
            raise AdvertMismatchError("two run keys are the same")
        for ready in message.recipients:
            party.check_run_key(plan, ready, ready.name)
        grants = []
        for ready in message.recipients:
            shared = agree(party.keyring.secret, ready.seal_key, ready.name)
            context = masking.seal_context(plan, party.name, ready.name)
            box = seal(_seal_key(plan, ready.name, shared), self.key.to_bytes(), context)
            grant = m.Grant(ready.name, box, bytes(64))
            body = grant.body(plan, self.key.digest)
            signature = party.identity.sign(Purpose.KEY_GRANT, body)
            grants.append(m.Grant(ready.name, box, signature))
        public = self.key.scheme.public
        reply = m.KeyGrant(plan.run, plan.round, self.key.digest, public, tuple(grants), bytes(64))
        signature = party.identity.sign(Purpose.KEY_GRANT, reply.body(plan))
        reply = m.KeyGrant(plan.run, plan.round, self.key.digest, public, tuple(grants), signature)
        party.keyring.cohort = self.key
        return EncryptedReady(party, plan, self.key), [reply]


@dataclass(frozen=True, repr=False)
class Receiving(State):
    """Waits for the cohort key."""

    def _on_KeyBox(self, message: m.KeyBox) -> Step:
        plan, party, grant = self.plan, self.party, message.grant
        if grant.recipient != party.name:
            raise AdvertMismatchError(f"key is sealed for {grant.recipient!r}")
        if plan.key not in (NO_KEY, message.key):
            raise KeyMismatchError("granted key is not the one that the plan names")
        party.check_run_key(plan, message.maker, plan.maker)
        identity = party.roster.identity_of(plan.maker)
        body = grant.body(plan, message.key)
        verify(identity, Purpose.KEY_GRANT, body, grant.signature, plan.maker)
        shared = agree(party.keyring.secret, message.maker.seal_key, plan.maker)
        context = masking.seal_context(plan, plan.maker, party.name)
        data = unseal(_seal_key(plan, party.name, shared), bytes(grant.box), context, plan.maker)
        scheme = homomorphic.scheme(plan.protection, plan.parameters)
        key = CohortKey.from_bytes(scheme, data, message.key)
        party.keyring.cohort = key
        return EncryptedReady(party, plan, key), []


@dataclass(frozen=True, repr=False)
class EncryptedReady(Ready):
    """The cohort key is held."""

    key: CohortKey

    def _send(self, vector: Vector) -> Step:
        plan, party = self.plan, self.party
        words = client_noise.encode(
            plan.layout, plan.noise, vector, party.entropy(32), party.entropy
        )
        integers = fixedpoint.to_integers(plan.layout, words)
        ciphertexts = self.key.encrypt(_packing(plan, self.key).pack(integers))
        body = m.CipherUpload(plan.run, plan.round, self.key.digest, ciphertexts, bytes(64)).body(
            plan
        )
        signature = party.identity.sign(Purpose.UPLOAD, body)
        reply = m.CipherUpload(plan.run, plan.round, self.key.digest, ciphertexts, signature)
        return Sent(party, plan, self.key), [reply]


def _packing(plan: RoundPlan, key: CohortKey) -> Packing:
    return Packing.of(plan.layout, key.scheme.limit, plan.parameters.clients)


@dataclass(frozen=True, repr=False)
class Sent(State):
    """The upload is on its way; the sum is awaited."""

    key: CohortKey

    def _on_CipherSum(self, message: m.CipherSum) -> Step:
        plan, party, survivors = self.plan, self.party, message.survivors
        self.check_survivors(survivors)
        party.policy.check_survivors(survivors, party.journal.survivor_lists(plan.run))
        party.journal.record_survivors(plan.run, plan.round, survivors)
        packing = _packing(plan, self.key)
        ciphertexts = tuple(bytes(data) for data in message.ciphertexts)
        slots = self.key.decrypt(ciphertexts, packing.slots, plan.digest)
        integers = packing.unpack(slots)
        check_sum(plan, integers, len(survivors))
        total = layout.unflatten(plan.layout, fixedpoint.decode(plan.layout, integers))
        return Opening(party, plan, self.key, integers, total), []


def check_sum(plan: RoundPlan, integers: Integers, uploads: int) -> None:
    """Refuse what cannot be the sum of this many uploads.

    This finds accidents: a wrong key, ciphertexts of another position or round, a wrong count. It
    is no defence against a server that sends something else on purpose.

    Raises:
        DecryptionError: naming the field.
    """
    at = 0
    for field in plan.layout:
        part = integers[at : at + field.size]
        at += field.size
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
class Opening(State):
    """The sum is open: the caller makes the next prompt of it.

    Attributes:
        integers: the sum; total: the same as decoded fields.
    """

    key: CohortKey
    integers: Integers
    total: dict[str, Vector]

    def report(self, prompt: bytes) -> Step:
        """Announce the next global prompt, float32 little-endian; empty after the last round."""
        plan = self.plan
        box, announced = b"", NO_KEY
        if prompt:
            box = self.key.seal_prompt(plan.run, plan.learning_round + 1, prompt)
            announced = digest(Purpose.BASE, box)
        return Reported(self.party, plan, box), [m.Opened(plan.run, plan.round, announced)]


@dataclass(frozen=True, repr=False)
class Reported(State):
    box: bytes

    def _on_SealedRequest(self, message: m.SealedRequest) -> Step:
        return self, [m.SealedPrompt(self.plan.run, self.plan.round, self.box)]

    def _on_RoundEnd(self, message: m.RoundEnd) -> Step:
        return self, []
