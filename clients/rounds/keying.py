"""A client in the beginning of a round in which somebody lacks the key that clients share.

    begin -> [Granting | Receiving ->] what the protection begins with

Its maker seals it to a fresh key of each who lacks it. A grant that does not open ends the attempt,
as a bad box does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds.base import Complained, State, Step, Takes
from secure_fedprompt.protocol import masking
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    KeyMismatchError,
    ReplayError,
    SealError,
)
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import agree, seal, unseal, verify
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan


class SharedKey(Protocol):
    """A key that all clients hold, and the server does not."""

    digest: bytes

    @property
    def public(self) -> bytes:
        """What the server may know of it, and checks."""

    def to_bytes(self) -> bytes:
        """Secret: only ever sealed."""


@dataclass(frozen=True)
class Kind:
    """What a protection does with its key.

    Attributes:
        held: the key that a client holds, or None.
        make: a fresh one.
        read: the one in an opened box; KeyMismatchError if it is not the one with this digest.
        keep: from now on it is held; KeyMismatchError if what the old one opens would be lost.
        go_on: the round, with the key.
    """

    held: Callable[[Party], SharedKey | None]
    make: Callable[[Party, RoundPlan], SharedKey]
    read: Callable[[RoundPlan, bytes, bytes], SharedKey]
    keep: Callable[[Party, RoundPlan, Any], None]
    go_on: Callable[[Party, RoundPlan, Any], Step]


def begin(party: Party, plan: RoundPlan, kind: Kind) -> Step:
    """The first state of a checked plan, and what to send.

    Raises:
        KeyMismatchError: the plan goes on under a key that this client does not hold.
        ConfigError: this machine cannot make or use one.
    """
    if party.name in plan.grants:
        secret = X25519PrivateKey.from_private_bytes(party.entropy(32))
        public = secret.public_key().public_bytes_raw()
        ask = m.KeyAsk(plan.run, plan.round, party.name, public, m.UNSIGNED)
        asked = m.signed(ask, party.identity, Purpose.KEY_ASK, plan)
        return Receiving(party, plan, kind, secret), [asked]
    if plan.key == NO_KEY:  # hence we are the maker
        return Granting(party, plan, kind, kind.make(party, plan)), []
    held = kind.held(party)
    if held is None or held.digest != plan.key:
        ours = held.digest.hex()[:16] if held else "none"
        raise KeyMismatchError(f"plan is under key {plan.key.hex()[:16]}, we hold {ours}")
    if plan.grants and party.name == plan.maker:
        return Granting(party, plan, kind, held), []
    return kind.go_on(party, plan, held)


@dataclass(frozen=True, repr=False)
class Granting(State):
    """The maker, with a key that others need."""

    kind: Kind
    key: SharedKey

    def _on_key_request(self, message: m.KeyRequest) -> Step:
        plan, party = self.plan, self.party
        names = [ask.name for ask in message.recipients]
        if not names and plan.key != NO_KEY:  # whoever lacks the key has gone
            return self.kind.go_on(party, plan, self.key)
        if names != sorted(set(names)) or not set(names) <= set(plan.grants) or not names:
            raise AdvertMismatchError("key is not requested for those whom the plan names")
        if len({ask.seal_key for ask in message.recipients}) != len(names):
            raise AdvertMismatchError("two clients ask with the same key")
        grants = []
        for ask in message.recipients:
            if (ask.run, ask.round) != (plan.run, plan.round):
                raise ReplayError(f"{ask.name} asks for the key of another round")
            identity = party.roster.identity_of(ask.name)
            verify(identity, Purpose.KEY_ASK, ask.body(plan), ask.signature, ask.name)
            shared = agree(party.keyring.secret, ask.seal_key, ask.name)
            context = masking.seal_context(plan, party.name, ask.name)
            key = masking.grant_key(plan, ask.name, shared)
            box = seal(key, self.key.to_bytes(), context)
            grant = m.Grant(ask.name, box, m.UNSIGNED)
            signed = m.signed(grant, party.identity, Purpose.KEY_GRANT, plan, self.key.digest)
            grants.append(signed)
        public, digest = self.key.public, self.key.digest
        reply = m.KeyGrant(plan.run, plan.round, digest, public, tuple(grants), m.UNSIGNED)
        reply = m.signed(reply, party.identity, Purpose.KEY_GRANT, plan)
        self.kind.keep(party, plan, self.key)
        after, more = self.kind.go_on(party, plan, self.key)
        return after, [reply, *more]

    takes: ClassVar[Takes] = {m.KeyRequest: _on_key_request}


@dataclass(frozen=True, repr=False)
class Receiving(State):
    """Waits for the key, to be sealed to a key of this round alone."""

    kind: Kind
    secret: X25519PrivateKey

    def _on_key_box(self, message: m.KeyBox) -> Step:
        plan, party, grant = self.plan, self.party, message.grant
        if grant.recipient != party.name:
            raise AdvertMismatchError(f"key is sealed for {grant.recipient!r}")
        if plan.key not in (NO_KEY, message.key):
            raise KeyMismatchError("granted key is not the one that the plan names")
        party.check_run_key(plan, message.maker, plan.maker)
        identity = party.roster.identity_of(plan.maker)
        body = grant.body(plan, message.key)
        verify(identity, Purpose.KEY_GRANT, body, grant.signature, plan.maker)
        try:
            shared = agree(self.secret, message.maker.seal_key, plan.maker)
            context = masking.seal_context(plan, plan.maker, party.name)
            sealed = masking.grant_key(plan, party.name, shared)
            data = unseal(sealed, bytes(grant.box), context, plan.maker)
            key = self.kind.read(plan, data, message.key)
        except (SealError, KeyMismatchError):
            secret, peer = self.secret.private_bytes_raw(), message.maker.seal_key
            return Complained.of(party, plan, plan.maker, secret, peer)
        self.kind.keep(party, plan, key)
        return self.kind.go_on(party, plan, key)

    takes: ClassVar[Takes] = {m.KeyBox: _on_key_box}
