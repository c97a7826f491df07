"""The server in the beginning of a round in which somebody lacks the key that clients share.

    asking -> keying -> what the protection begins with

It asks the key's maker on behalf of those who lack it, and relays the key sealed. Holders go on
meanwhile. Under ``bfv`` and ``ckks`` it is the cohort key, under ``masks`` the sum key.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.agreement_proof import lift
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    FieldError,
    KeyMismatchError,
)
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import verify
from secure_fedprompt.protocol.plan import NO_KEY
from secure_fedprompt.server.opening import grant_is_bad
from secure_fedprompt.server.rounds.base import Round, Stage
from secure_fedprompt.server.serve import Outbox

ASKED: Mapping[Stage, type[m.Message]] = {Stage.ASKING: m.KeyAsk, Stage.KEYING: m.KeyGrant}


@dataclass
class KeyedRound(Round):
    """One round.

    Attributes:
        key: digest of the key in use.
        holders: clients that are known to hold it.
        keyed: whether everybody could have the key; unasked: whether nobody asked for it; burnt:
            whether it must not be used any more.
        refusals: clients that kept another key, under which the prompt opens.
    """

    key: bytes = NO_KEY
    holders: set[str] = field(default_factory=set)
    keyed: bool = True
    unasked: bool = False
    burnt: bool = False
    refusals: set[str] = field(default_factory=set)

    def _prepare(self) -> None:
        self.key = self.plan.key
        self._begins: type[m.Message] = m.Advert  # what holders of the key send first
        self._asks: dict[str, m.KeyAsk] = {}
        self._granted: m.KeyGrant | None = None
        self._early: dict[str, m.Message] = {}  # of key holders, while others get the key

    @abstractmethod
    def _take_up(self, now: float) -> None:
        """Everybody who can has the key: wait for what the round begins with."""

    @abstractmethod
    def _check_context(self, context: bytes | memoryview) -> None:
        """Refuse a grant's context that is not public, or not the plan's.

        Raises:
            ProtocolError
        """

    @abstractmethod
    def _is_key(self, data: bytes) -> bool:
        """Whether these bytes of an opened box are a key at all, whose digest is ``_granted``'s."""

    def start(self, now: float) -> Outbox:
        plan = self.plan
        out = self._plans()
        if not plan.grants:
            self._take_up(now)
            return out
        self.keyed = False
        self._begin(Stage.ASKING, plan.grants, now)
        return out

    def _ask_maker(self, now: float) -> Outbox:
        plan = self.plan
        self._asks = {n: a for n, a in sorted(self.answers.items()) if isinstance(a, m.KeyAsk)}
        for name in set(plan.grants) - set(self._asks):
            self._gone.add(name)  # it has no key to take part with
        if not self._asks:
            self.keyed = plan.key != NO_KEY
            if not self.keyed:
                self.unasked = True
                return self._abort("nobody asked for the clients' key")
            nobody = m.KeyRequest(plan.run, plan.round, ())
            return [(plan.maker, nobody), *self._go_on(now)]
        self._begin(Stage.KEYING, (plan.maker,), now)
        request = m.KeyRequest(plan.run, plan.round, tuple(self._asks.values()))
        return [(plan.maker, request)]

    def _go_on(self, now: float) -> Outbox:
        """Take what holders of the key sent while others were given it."""
        self._take_up(now)
        out: Outbox = []
        for sender, message in self._early.items():
            out += self.on(sender, message, now)
        return out

    def _unawaited(self, sender: str, message: m.Message) -> Outbox:
        early = self.stage in ASKED and sender not in self.plan.grants
        if early and isinstance(message, self._begins):
            self._early[sender] = message
        return []

    def _of_grant(self, name: str) -> bool:
        """Whether a client that complains speaks of the key that it was granted."""
        return self._granted is not None and name in self._asks

    def _is_dealer(self, dealer: str, recipient: str) -> bool:
        return self._of_grant(recipient) and dealer == self.plan.maker

    def _judge(self, sender: str, message: m.Complaint | m.Accusation, now: float) -> Outbox:
        if isinstance(message, m.Complaint) and self._of_grant(sender):
            self.faults[sender] = "a complaint without a proof"
            return self.gone(sender, now)
        return super()._judge(sender, message, now)

    def _box_is_bad(self, sender: str, accusation: m.Accusation) -> bool:
        assert self._granted is not None
        maker, ask = self.run_keys[self.plan.maker], self._asks[sender]
        self.burnt = True  # seen by the server, or not held by everybody: never to be used
        return grant_is_bad(self.plan, maker, ask, self._granted, accusation, self._is_key)

    def gone(self, sender: str, now: float) -> Outbox:
        self.holders.discard(sender)
        return super().gone(sender, now)

    def _check(self, sender: str, message: m.Message) -> None:
        plan, identity = self.plan, self.roster.identity_of(sender)
        match message:
            case m.KeyAsk():
                if message.name != sender:
                    raise AdvertMismatchError(f"{sender} asks under the name {message.name!r}")
                verify(identity, Purpose.KEY_ASK, message.body(plan), message.signature, sender)
                lift(message.seal_key)  # refuses keys about which nothing could be proved
                others = [a.seal_key for a in self.answers.values() if isinstance(a, m.KeyAsk)]
                if message.seal_key in others:
                    raise AdvertMismatchError(f"{sender} asks with the key of another client")
            case m.KeyGrant():
                body = message.body(plan)
                verify(identity, Purpose.KEY_GRANT, body, message.signature, sender)
                self._check_context(message.context)
                if tuple(grant.recipient for grant in message.grants) != tuple(self._asks):
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

    def _check_key(self, sender: str, key: bytes) -> None:
        """Refuse what was made with another key than the round's."""
        if key != self.key:
            raise KeyMismatchError(
                f"{sender} uses key {key.hex()[:16]}, registered is {self.key.hex()[:16]}"
            )

    def _advance(self, now: float) -> Outbox:
        if self.stage not in ASKED:
            return super()._advance(now)
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self.began
        if self.stage is Stage.ASKING:
            return self._ask_maker(now)
        answers = list(self.answers.values())
        if not answers:
            return self._abort(f"key maker {self.plan.maker} granted no key")
        return self._relay(answers[0], now)

    def _relay(self, granted: m.Message, now: float) -> Outbox:
        plan = self.plan
        assert isinstance(granted, m.KeyGrant)
        self._granted = granted
        maker = self.run_keys[plan.maker]
        boxes: Outbox = [
            (grant.recipient, m.KeyBox(plan.run, plan.round, maker, granted.key, grant))
            for grant in granted.grants
        ]
        return boxes + self._go_on(now)
