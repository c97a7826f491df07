"""A client in a round under masks, as a state machine without I/O.

    begin(party, plan) -> Advertised -> Dealt -> MaskedAwaiting -> Uploaded -> Agreed -> Revealed
                                          |-> Doubting -> Complained

``state.on(message)`` returns the next state and the frames to send, or raises a named error and
changes nothing. Randomness and the journal (what must survive a crash) are arguments. A state
knows only what it needs from there on; no state can upload, sign or reveal twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds.base import (
    Awaiting,
    Complained,
    Revealed,
    State,
    Step,
    Takes,
    check_signers,
    words_of,
)
from secure_fedprompt.protocol import client_noise, fixedpoint, masking, shamir
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import UpTo, decode_fields, encode_fields
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    OverlapError,
    ReplayError,
    SealError,
    SurvivorError,
    ThresholdError,
)
from secure_fedprompt.protocol.expand import Purpose, add_masks
from secure_fedprompt.protocol.keys import agree, seal, unseal, verify
from secure_fedprompt.protocol.layout import Vector
from secure_fedprompt.protocol.plan import MAX_COHORT, RoundPlan


def begin(party: Party, plan: RoundPlan) -> Step:
    """Advertise fresh keys."""
    secrets = masking.RoundSecrets.fresh(party.entropy)
    advert = m.Advert(
        plan.run,
        plan.round,
        party.name,
        secrets.seal.public_key().public_bytes_raw(),
        secrets.mask.public_key().public_bytes_raw(),
        masking.commitment(plan, party.name, secrets.self_seed),
        m.UNSIGNED,
    )
    advert = m.signed(advert, party.identity, Purpose.ADVERT, plan)
    return Advertised(party, plan, secrets, advert), [advert]


@dataclass(frozen=True, repr=False)
class Advertised(State):
    secrets: masking.RoundSecrets
    advert: m.Advert

    def _on_adverts(self, message: m.Adverts) -> Step:
        plan, own = self.plan, self.party.name
        names = [a.name for a in message.adverts]
        if names != sorted(set(names)) or not set(names) <= set(plan.cohort):
            raise AdvertMismatchError("adverts are doubled, unsorted or from outside the cohort")
        by_name = {a.name: a for a in message.adverts}
        if by_name.get(own) != self.advert:
            raise AdvertMismatchError("our own advert is missing or altered")
        if len(names) < plan.quorum:
            raise ThresholdError(f"{len(names)} adverts, quorum is {plan.quorum}")
        keys = [key for a in message.adverts for key in (a.seal_key, a.mask_key)]
        if len(set(keys)) != len(keys):
            raise AdvertMismatchError("two adverts share a key")
        for advert in message.adverts:
            if (advert.run, advert.round) != (plan.run, plan.round):
                raise ReplayError(f"advert of {advert.name} belongs to another round")
            identity = self.party.roster.identity_of(advert.name)
            verify(identity, Purpose.ADVERT, advert.body(plan), advert.signature, advert.name)
        peers = [n for n in masking.neighbourhoods(plan)[own] if n in by_name]
        if len(peers) < plan.threshold:
            raise ThresholdError(f"{len(peers)} neighbours advertised, threshold {plan.threshold}")
        points = [plan.points[peer] for peer in peers]
        mask_shares, self_shares = (
            shamir.split(secret, points, plan.threshold, self.party.entropy)
            for secret in (self.secrets.mask_bytes, self.secrets.self_seed)
        )
        boxes, incoming, own_shares = [], {}, b""
        for peer, mask_share, self_share in zip(peers, mask_shares, self_shares, strict=True):
            if peer == own:
                own_shares = mask_share + self_share
                continue
            shared = agree(self.secrets.seal, by_name[peer].seal_key, peer)
            key = masking.seal_key(plan, own, peer, shared)
            context = masking.seal_context(plan, own, peer)
            boxes.append(seal(key, mask_share + self_share, context))
            incoming[peer] = masking.seal_key(plan, peer, own, shared)
        listed = m.adverts_digest(message.adverts)
        mask_keys = {peer: by_name[peer].mask_key for peer in incoming}
        seal_keys = {peer: by_name[peer].seal_key for peer in incoming}
        reply = m.Shares(plan.run, plan.round, b"".join(boxes), m.UNSIGNED)
        reply = m.signed(reply, self.party.identity, Purpose.BOXES, plan, listed)
        after = Dealt(
            self.party,
            plan,
            self.secrets,
            own_shares,
            incoming,
            mask_keys,
            seal_keys,
            listed,
            tuple(names),
        )
        return after, [reply]

    takes: ClassVar[Takes] = {m.Adverts: _on_adverts}


@dataclass(frozen=True, repr=False)
class Dealt(State):
    secrets: masking.RoundSecrets
    own_shares: bytes
    incoming: Mapping[str, bytes]  # peer -> key of the box it sealed for us
    mask_keys: Mapping[str, bytes]
    seal_keys: Mapping[str, bytes]
    adverts: bytes
    advertised: tuple[str, ...]

    def _on_inbox(self, message: m.Inbox) -> Step:
        plan, own = self.plan, self.party.name
        senders = message.senders
        if list(senders) != sorted(set(senders)) or not set(senders) <= set(self.incoming):
            raise AdvertMismatchError("inbox names a sender that is doubled or never advertised")
        if len(message.boxes) != m.BOX * len(senders):
            raise AdvertMismatchError(
                f"inbox of {len(message.boxes)} bytes, {len(senders)} senders"
            )
        if len(senders) + 1 < plan.threshold:
            raise ThresholdError(
                f"{len(senders) + 1} clients shared keys, threshold is {plan.threshold}"
            )
        shares = {own: self.own_shares}
        for i, peer in enumerate(senders):
            box = bytes(message.boxes[m.BOX * i : m.BOX * (i + 1)])
            context = masking.seal_context(plan, peer, own)
            try:
                shares[peer] = unseal(self.incoming[peer], box, context, peer)
            except SealError:
                key = self.seal_keys[peer]
                after = Doubting(
                    self.party, plan, peer, box, key, self.secrets, self.adverts, self.advertised
                )
                return after, [m.Complaint(plan.run, plan.round, peer)]
        pairs = {
            peer: self.secrets.pair_key(plan, own, peer, self.mask_keys[peer]) for peer in senders
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
    advertised: tuple[str, ...]

    def on(self, message: m.Message) -> Step:
        return super().on(message) if isinstance(message, m.Evidence) else (self, [])

    def _on_evidence(self, message: m.Evidence) -> Step:
        plan, party, dealer = self.plan, self.party, self.dealer
        if message.dealer != dealer:
            raise AdvertMismatchError(f"evidence about {message.dealer!r}, asked was {dealer!r}")
        dealt = m.Shares(plan.run, plan.round, message.boxes, message.signature)
        identity = party.roster.identity_of(dealer)
        verify(identity, Purpose.BOXES, dealt.body(plan, self.adverts), dealt.signature, dealer)
        near = masking.neighbourhoods(plan)[dealer]
        recipients = [n for n in near if n in self.advertised and n != dealer]
        at = m.BOX * recipients.index(party.name)
        if bytes(message.boxes[at : at + m.BOX]) != self.box:
            raise SealError(f"the box that {dealer} sealed for us was altered on its way")
        secret = self.secrets.seal.private_bytes_raw()
        return Complained.of(party, plan, dealer, secret, self.seal_key)

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
        add_masks(words, plus, minus)
        reply = m.MaskedUpload(plan.run, plan.round, fixedpoint.to_wire(plan.layout, words))
        return Uploaded(self.party, plan, self.adverts, self.shares), [reply]


@dataclass(frozen=True, repr=False)
class Uploaded(State):
    adverts: bytes
    shares: Mapping[str, bytes]

    def _on_survivor_list(self, message: m.SurvivorList) -> Step:
        plan, party, survivors = self.plan, self.party, message.survivors
        self.check_survivors(survivors)
        near = set(masking.neighbourhoods(plan)[party.name])
        if strangers := (set(survivors) & near) - set(self.shares):
            raise SurvivorError(
                f"survivor list names {sorted(strangers)}, who shared no keys with us"
            )
        body = m.survivors_body(plan, self.adverts, survivors)
        alive = set(survivors)
        shares = b"".join(
            share[32:] if name in alive else share[:32]
            for name, share in sorted(self.shares.items())
        )
        dropped = tuple(sorted(set(self.shares) - alive))
        after = Agreed(party, plan, survivors, dropped, body, shares)
        party.journal.record_survivors(plan, survivors, after.to_bytes())
        signature = party.identity.sign(Purpose.SURVIVORS, body)
        return after, [m.Consistent(plan.run, plan.round, signature)]

    takes: ClassVar[Takes] = {m.SurvivorList: _on_survivor_list}


@dataclass(frozen=True, repr=False)
class _Kept:
    """An ``Agreed`` on the disk."""

    plan: RoundPlan
    survivors: m.Names
    dropped: m.Names
    body: Annotated[bytes | memoryview, UpTo(1 << 12)]
    shares: Annotated[bytes | memoryview, UpTo(32 * MAX_COHORT)]


@dataclass(frozen=True, repr=False)
class Agreed(State):
    """The survivor list is signed. ``shares`` can open this sum, and nothing else."""

    survivors: tuple[str, ...]
    dropped: tuple[str, ...]
    body: bytes
    shares: bytes

    def to_bytes(self) -> bytes:
        """What the journal keeps, so that a restarted client can still help to open the sum."""
        return encode_fields(_Kept(self.plan, self.survivors, self.dropped, self.body, self.shares))

    @classmethod
    def from_bytes(cls, party: Party, data: bytes) -> Agreed:
        """Inverse of ``to_bytes``."""
        kept = decode_fields(_Kept, data)
        return cls(
            party, kept.plan, kept.survivors, kept.dropped, bytes(kept.body), bytes(kept.shares)
        )

    def _on_unmask_request(self, message: m.UnmaskRequest) -> Step:
        plan, party = self.plan, self.party
        if both := set(message.dropped) & set(self.survivors):
            raise OverlapError(f"{sorted(both)} asked for as dropped, but on the survivor list")
        near = set(masking.neighbourhoods(plan)[party.name])
        if set(message.dropped) & near != set(self.dropped):
            raise SurvivorError("dropped clients are not those that shared keys and then vanished")
        check_signers(plan, message.signers, self.survivors)
        for signed in message.signers:
            identity = party.roster.identity_of(signed.name)
            verify(identity, Purpose.SURVIVORS, self.body, signed.signature, signed.name)
        party.journal.record_reveal(plan)
        return Revealed(party, plan), [m.Reveal(plan.run, plan.round, self.shares)]

    takes: ClassVar[Takes] = {m.UnmaskRequest: _on_unmask_request}
