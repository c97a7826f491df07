"""A client under masks after its upload: who survived, what opens the sum, and whether it is one.

    Uploaded -> Agreed -> Revealed -> Checked -> Revealed

``OpenedSum`` may come to any of them, also after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds.base import Opening, State, Step, Takes, check_signers
from secure_fedprompt.protocol import fixedpoint, layout, masking, sum_tag
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import UpTo, decode_fields, encode_fields
from secure_fedprompt.protocol.errors import (
    ProtocolError,
    SecondUnmaskError,
    SurvivorError,
)
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import verify
from secure_fedprompt.protocol.layout import total_size
from secure_fedprompt.protocol.plan import MAX_COHORT, RoundPlan


@dataclass(frozen=True, repr=False)
class InSum(State):
    """The upload is on its way: what is opened of it will be checked."""

    @property
    def listed(self) -> tuple[str, ...] | None:
        """The members that the sum must have, if that is known."""
        return None

    def _on_opened_sum(self, message: m.OpenedSum) -> Step:
        plan, party = self.plan, self.party
        key = party.sum_key(plan)
        if key is None:  # lost with the folder that it was in: others have to vouch
            return self, []
        words = np.zeros(total_size(plan.layout), np.uint32)
        try:
            members = m.members_of(plan.cohort, message.members)
            fixedpoint.add_wire(plan.layout, message.vector, words)
            tag = sum_tag.from_bytes(message.tag)
        except ProtocolError as error:
            raise self.distrusted(f"no sum ({error})") from None
        if self.listed not in (None, members) or party.name not in members:
            raise self.distrusted("a sum of others than those whose list was signed")
        if len(members) < plan.quorum:
            raise self.distrusted(f"a sum of {len(members)} clients, the quorum is {plan.quorum}")
        integers = fixedpoint.to_integers(plan.layout, words)
        if not key.tags(plan).holds(members, integers, tag):
            raise self.not_the_sum(members)
        party.journal.record_reveal(plan)  # by us or by others: it is open
        total = layout.unflatten(plan.layout, fixedpoint.decode(plan.layout, integers))
        self.check_fillers(members, total)
        return Checked(party, plan, integers, total, members), []

    takes: ClassVar[Takes] = {m.OpenedSum: _on_opened_sum}


@dataclass(frozen=True, repr=False)
class Checked(Opening):
    """The sum is what its members sent."""

    members: tuple[str, ...]

    def report(self, prompt: bytes) -> Step:
        return Revealed(self.party, self.plan, self.members), []


@dataclass(frozen=True, repr=False)
class Uploaded(InSum):
    adverts: bytes
    shares: Mapping[str, bytes]

    def _on_survivor_list(self, message: m.SurvivorList) -> Step:
        plan, party = self.plan, self.party
        survivors = m.members_of(plan.cohort, message.survivors)
        self.check_survivors(survivors)
        alive = set(masking.neighbourhoods(plan)[party.name]).intersection(survivors)
        if strangers := alive - set(self.shares):
            raise SurvivorError(
                f"survivor list names {sorted(strangers)}, who shared no keys with us"
            )
        listed = bytes(message.survivors)
        body = m.survivors_body(plan, self.adverts, listed)
        shares = b"".join(
            share[32:] if name in alive else share[:32]
            for name, share in sorted(self.shares.items())
        )
        after = Agreed(party, plan, survivors, listed, body, shares)
        party.journal.record_survivors(plan, survivors, after.to_bytes())
        signature = party.identity.sign(Purpose.SURVIVORS, body)
        return after, [m.Consistent(plan.run, plan.round, signature)]

    takes: ClassVar[Takes] = {**InSum.takes, m.SurvivorList: _on_survivor_list}


@dataclass(frozen=True, repr=False)
class _Kept:
    """An ``Agreed`` on the disk."""

    plan: RoundPlan
    members: m.Members
    body: Annotated[bytes | memoryview, UpTo(1 << 12)]
    shares: Annotated[bytes | memoryview, UpTo(32 * MAX_COHORT)]


@dataclass(frozen=True, repr=False)
class Agreed(InSum):
    """The survivor list is signed. ``shares`` can open this sum, and nothing else."""

    survivors: tuple[str, ...]
    members: bytes  # the same, as it came
    body: bytes
    shares: bytes

    @property
    def listed(self) -> tuple[str, ...]:
        return self.survivors

    def to_bytes(self) -> bytes:
        """What the journal keeps, so that a restarted client can still help to open the sum."""
        return encode_fields(_Kept(self.plan, self.members, self.body, self.shares))

    @classmethod
    def from_bytes(cls, party: Party, data: bytes) -> Agreed:
        """Inverse of ``to_bytes``."""
        kept = decode_fields(_Kept, data)
        members = bytes(kept.members)
        survivors = m.members_of(kept.plan.cohort, members)
        return cls(party, kept.plan, survivors, members, bytes(kept.body), bytes(kept.shares))

    def _on_same_list(self, message: m.SurvivorList) -> Step:
        """After a reconnection; another one is not signed."""
        if bytes(message.survivors) != self.members:
            raise SurvivorError(f"a second survivor list in {self}")
        signature = self.party.identity.sign(Purpose.SURVIVORS, self.body)
        return self, [m.Consistent(self.plan.run, self.plan.round, signature)]

    def _on_unmask_request(self, message: m.UnmaskRequest) -> Step:
        plan, party = self.plan, self.party
        near = masking.neighbourhoods(plan)[party.name]
        asked = set(near).intersection(self.survivors)
        check_signers(message.signers, asked, plan.threshold)
        for signed in message.signers:
            identity = party.roster.identity_of(signed.name)
            verify(identity, Purpose.SURVIVORS, self.body, signed.signature, signed.name)
        self.reveal(self.survivors)
        return Revealed(party, plan, self.survivors), [m.Reveal(plan.run, plan.round, self.shares)]

    takes: ClassVar[Takes] = {
        **InSum.takes, m.SurvivorList: _on_same_list, m.UnmaskRequest: _on_unmask_request,
    }  # fmt: skip


@dataclass(frozen=True, repr=False)
class Revealed(InSum):
    """Nothing secret is left."""

    survivors: tuple[str, ...]

    @property
    def listed(self) -> tuple[str, ...]:
        return self.survivors

    def _on_unmask_request(self, message: m.UnmaskRequest) -> Step:
        raise SecondUnmaskError(f"a second unmask request in {self}")

    def _on_round_end(self, message: m.RoundEnd) -> Step:
        return self, []

    takes: ClassVar[Takes] = {
        **InSum.takes, m.UnmaskRequest: _on_unmask_request, m.RoundEnd: _on_round_end,
    }  # fmt: skip
