"""A client in a round under masks, as a state machine without I/O.

    begin -> [Granting | Receiving ->] Advertised -> Dealt -> MaskedAwaiting -> Uploaded ...
                                                       |-> Doubting -> Complained

``keying`` has the states in brackets, ``unmasking`` those that follow. Whoever was in a sum has
checked it and computed the next global prompt itself; who missed it believes c + 1 others that
vouch for a prompt.

``state.on(message)`` returns the next state and the frames to send, or raises a named error and
changes nothing. Randomness and the journal (what must survive a crash) are arguments. A state
knows only what it needs from there on; no state can upload, sign or reveal twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds import keying
from secure_fedprompt.clients.rounds.base import (
    Awaiting,
    Complained,
    State,
    Step,
    Takes,
    words_of,
)
from secure_fedprompt.clients.rounds.unmasking import Uploaded
from secure_fedprompt.clients.sum_key import SumKey
from secure_fedprompt.protocol import (
    client_noise,
    fixedpoint,
    masking,
    merkle,
    mersenne,
    shamir,
    sum_tag,
)
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    ReplayError,
    SealError,
    ThresholdError,
)
from secure_fedprompt.protocol.expand import Purpose, add_masks
from secure_fedprompt.protocol.keys import agree, seal, unseal, verify
from secure_fedprompt.protocol.layout import Vector
from secure_fedprompt.protocol.methods import method_facts
from secure_fedprompt.protocol.plan import RoundPlan


def begin(party: Party, plan: RoundPlan) -> Step:
    """The first state of a checked plan, and what to send; see ``keying.begin``."""
    return keying.begin(party, plan, KIND)


def _advertise(party: Party, plan: RoundPlan, key: SumKey) -> Step:
    """Advertise fresh keys."""
    made = party.journal.made(plan.run, plan.learning_round)
    vouches = plan.learning_round == 1 or made == (plan.base_digest, True)  # the first: by terms
    secrets = masking.RoundSecrets.fresh(party.entropy)
    advert = m.Advert(
        plan.run,
        plan.round,
        party.name,
        secrets.seal.public_key().public_bytes_raw(),
        secrets.mask.public_key().public_bytes_raw(),
        masking.commitment(plan, party.name, secrets.self_seed),
        key.digest,
        int(vouches),
        m.UNSIGNED,
    )
    advert = m.signed(advert, party.identity, Purpose.ADVERT, plan)
    return Advertised(party, plan, secrets, advert), [advert]


KIND = keying.Kind(
    held=lambda party: party.keyring.sums,
    make=lambda party, plan: SumKey.make(party.entropy),
    read=lambda plan, data, expected: SumKey.from_bytes(data, expected),
    keep=lambda party, plan, key: party.keep_key(plan.run, key),
    go_on=_advertise,
)


@dataclass(frozen=True, repr=False)
class Advertised(State):
    secrets: masking.RoundSecrets
    advert: m.Advert

    def _on_adverts(self, message: m.Adverts) -> Step:
        plan, own = self.plan, self.party.name
        peers, graph = [a.name for a in message.adverts], masking.neighbourhoods(plan)
        near = graph[own]
        if peers != sorted(set(peers)) or not set(peers) <= set(near):
            raise AdvertMismatchError("adverts are doubled, unsorted or not of our neighbours")
        by_name = {a.name: a for a in message.adverts}
        if by_name.get(own) != self.advert:
            raise AdvertMismatchError("our own advert is missing or altered")
        if len(peers) < plan.threshold:
            raise ThresholdError(f"{len(peers)} neighbours advertised, threshold {plan.threshold}")
        keys = [key for a in message.adverts for key in (a.seal_key, a.mask_key)]
        if len(set(keys)) != len(keys):
            raise AdvertMismatchError("two adverts share a key")
        for advert in message.adverts:
            if (advert.run, advert.round) != (plan.run, plan.round):
                raise ReplayError(f"advert of {advert.name} belongs to another round")
            identity = self.party.roster.identity_of(advert.name)
            verify(identity, Purpose.ADVERT, advert.body(plan), advert.signature, advert.name)
            if advert.key != self.advert.key:
                raise AdvertMismatchError(f"{advert.name} holds another sum key than we do")
        self._check_prompt(message.adverts)
        leaves = {graph.place(name): m.advert_leaf(by_name.get(name)) for name in near}
        root = merkle.fold(len(plan.cohort), leaves, message.proof)
        agreed = {
            peer: agree(self.secrets.seal, by_name[peer].seal_key, peer)
            for peer in peers
            if peer != own
        }
        boxers = set(graph.boxers(own))
        seals = {p: masking.seal_key(plan, p, own, z) for p, z in agreed.items() if p in boxers}
        drawn = {
            p: masking.drawn_share(plan, p, own, z) for p, z in agreed.items() if p not in boxers
        }
        mask_keys = {peer: by_name[peer].mask_key for peer in agreed}
        seal_keys = {peer: by_name[peer].seal_key for peer in seals}
        boxes, drawn[own] = self._deal(agreed)
        if not self.advert.vouches:  # last: whatever is refused changes nothing
            place = plan.run, plan.learning_round
            self.party.journal.note_made(*place, plan.base_digest, own=False)
        reply = m.Shares(plan.run, plan.round, boxes, m.UNSIGNED)
        reply = m.signed(reply, self.party.identity, Purpose.BOXES, plan, root)
        after = Dealt(
            self.party,
            plan,
            self.secrets,
            drawn,
            seals,
            mask_keys,
            seal_keys,
            root,
        )
        return after, [reply]

    def _deal(self, agreed: Mapping[str, bytes]) -> tuple[bytes, bytes]:
        """Our secrets to those who advertised, with whom we agreed on a key: the boxes, and our own
        share."""
        plan, own = self.plan, self.party.name
        boxed = [peer for peer in masking.neighbourhoods(plan).boxed(own) if peer in agreed]
        given = {
            plan.points[peer]: masking.drawn_share(plan, own, peer, shared)
            for peer, shared in agreed.items()
            if peer not in boxed
        }
        points = [*given, plan.points[own], *(plan.points[peer] for peer in boxed)]
        secrets = self.secrets.mask_bytes + self.secrets.self_seed
        shares = shamir.split(secrets, points, plan.threshold, self.party.entropy, given)
        own_share, *others = shares[len(given) :]
        boxes = [
            seal(
                masking.seal_key(plan, own, peer, agreed[peer]),
                share,
                masking.seal_context(plan, own, peer),
            )
            for peer, share in zip(boxed, others, strict=True)
        ]
        return b"".join(boxes), own_share

    def _check_prompt(self, adverts: Sequence[m.Advert]) -> None:
        """Take a global prompt that we could not compute ourselves from c + 1 who have, or from a
        threshold of neighbours on a regular graph: one of them is honest.

        Raises:
            AdvertMismatchError: they are fewer.
        """
        plan = self.plan
        if not method_facts(plan.method).chained:
            return  # nobody can know it
        needed = 1 + plan.colluders
        needed = plan.threshold if plan.degree else needed
        vouching = sum(advert.vouches == 1 for advert in adverts)
        if not self.advert.vouches and vouching < needed:
            raise AdvertMismatchError(
                f"{vouching} clients vouch for the global prompt of learning round "
                f"{plan.learning_round}, and this one, which missed the sum before, needs {needed}"
            )

    takes: ClassVar[Takes] = {m.Adverts: _on_adverts}


@dataclass(frozen=True, repr=False)
class Dealt(State):
    secrets: masking.RoundSecrets
    drawn: Mapping[str, bytes]  # peer -> its share that needs no box; our own
    keys: Mapping[str, bytes]  # peer -> key of the box that it seals for us
    mask_keys: Mapping[str, bytes]  # of all who advertised
    seal_keys: Mapping[str, bytes]  # of those who seal for us
    adverts: bytes  # the root over all of them

    def _on_inbox(self, message: m.Inbox) -> Step:
        plan, own = self.plan, self.party.name
        senders = m.members_of(masking.neighbourhoods(plan)[own], message.senders)
        if own not in senders or not {*senders} - {own} <= self.mask_keys.keys():
            raise AdvertMismatchError("inbox without us, or with a sender that never advertised")
        boxing = [peer for peer in senders if peer in self.keys]
        if len(message.boxes) != m.BOX * len(boxing):
            raise AdvertMismatchError(
                f"inbox of {len(message.boxes)} bytes, {len(boxing)} of the senders box us"
            )
        if len(senders) < plan.threshold:
            raise ThresholdError(
                f"{len(senders)} clients shared keys, threshold is {plan.threshold}"
            )
        shares = {peer: self.drawn[peer] for peer in senders if peer in self.drawn}
        for i, peer in enumerate(boxing):
            box = bytes(message.boxes[m.BOX * i : m.BOX * (i + 1)])
            context = masking.seal_context(plan, peer, own)
            try:
                shares[peer] = unseal(self.keys[peer], box, context, peer)
            except SealError:
                key = self.seal_keys[peer]
                after = Doubting(self.party, plan, peer, box, key, self.secrets, self.adverts)
                return after, [m.Complaint(plan.run, plan.round, peer)]
        pairs = {
            peer: self.secrets.pair_key(plan, own, peer, self.mask_keys[peer])
            for peer in senders
            if peer != own
        }
        return MaskedAwaiting(self.party, plan, self.secrets, pairs, self.adverts, shares), []

    takes: ClassVar[Takes] = {m.Inbox: _on_inbox}


@dataclass(frozen=True, repr=False)
class Doubting(State):
    """A box did not open. Its dealer is accused only if it signed that very box: a server that
    alters boxes must not get anything for it."""

    dealer: str
    box: bytes
    seal_key: bytes  # the dealer's
    secrets: masking.RoundSecrets
    adverts: bytes

    def on(self, message: m.Message) -> Step:
        return super().on(message) if isinstance(message, m.Evidence) else (self, [])

    def _on_evidence(self, message: m.Evidence) -> Step:
        plan, party, dealer = self.plan, self.party, self.dealer
        if message.dealer != dealer:
            raise AdvertMismatchError(f"evidence about {message.dealer!r}, asked was {dealer!r}")
        dealt = m.Shares(plan.run, plan.round, message.boxes, message.signature)
        identity = party.roster.identity_of(dealer)
        verify(identity, Purpose.BOXES, dealt.body(plan, self.adverts), dealt.signature, dealer)
        recipients = self._recipients(message)
        if party.name not in recipients:
            raise AdvertMismatchError(f"evidence that {dealer} dealt us nothing")
        at = m.BOX * recipients.index(party.name)
        if bytes(message.boxes[at : at + m.BOX]) != self.box:
            raise SealError(f"the box that {dealer} sealed for us was altered on its way")
        secret = self.secrets.seal.private_bytes_raw()
        return Complained.of(party, plan, dealer, secret, self.seal_key)

    def _recipients(self, message: m.Evidence) -> list[str]:
        """To whom the dealer had to seal: those whom it boxes and who advertised.

        Raises:
            AdvertMismatchError: it is not what the signed root says.
        """
        graph = masking.neighbourhoods(self.plan)
        near = graph[self.dealer]
        if len(message.near) != len(near):
            raise AdvertMismatchError(f"evidence on {len(message.near)} of {len(near)} neighbours")
        leaves = dict(zip(sorted(map(graph.place, near)), message.near, strict=True))
        if merkle.fold(len(self.plan.cohort), leaves, message.proof) != self.adverts:
            raise AdvertMismatchError("evidence on other adverts than those that were signed")
        boxed = graph.boxed(self.dealer)
        return [name for name in boxed if leaves[graph.place(name)] != merkle.ABSENT]

    takes: ClassVar[Takes] = {m.Evidence: _on_evidence}


@dataclass(frozen=True, repr=False)
class MaskedAwaiting(Awaiting):
    """Keys are agreed."""

    secrets: masking.RoundSecrets
    pairs: Mapping[str, bytes]
    adverts: bytes
    shares: Mapping[str, bytes]

    def _encode(self, vector: Vector) -> bytes:
        layout, noise, rounding = self.plan.layout, self.plan.noise, self.secrets.rounding
        words = client_noise.encode(layout, noise, vector, rounding, self.party.entropy)
        return words.astype("<u4").tobytes()

    def _send(self, data: bytes) -> Step:
        plan = self.plan
        own = self.party.name
        words = words_of(plan, data)
        plus = [masking.self_key(plan, own, self.secrets.self_seed)]
        plus += [key for peer, key in self.pairs.items() if peer > own]
        minus = [key for peer, key in self.pairs.items() if peer < own]
        sums = self.party.keyring.sums
        assert sums is not None
        tag = sums.tags(plan).tag(own, fixedpoint.to_integers(plan.layout, words))
        after = add_masks(words, plus, minus, sum_tag.MASK)
        # In the clear, a tag would be a linear equation on one client's vector for who holds K.
        tag = mersenne.add(tag, sum_tag.mask(after, len(plus)))
        vector = fixedpoint.to_wire(plan.layout, words)
        reply = m.MaskedUpload(plan.run, plan.round, vector, sum_tag.to_bytes(tag))
        return Uploaded(self.party, plan, self.adverts, self.shares), [reply]
