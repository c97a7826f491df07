"""The server in a round under pairwise masks.

    [asking -> keying ->] advertising -> sharing -> [selecting -> evaluating ->] collecting
        -> consistency -> unmasking -> done | aborted

Clients agree on keys, deal shares of their secrets, upload masked vectors, sign who survived, and
reveal what takes the masks off the sum (Bonawitz et al., CCS 2017; Bell et al., CCS 2020). They are
sent the sum with its tag, and check it with a key that the server relays sealed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.protocol import fixedpoint, masking, sum_tag
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import (
    AdvertMismatchError,
    BadShareError,
    FieldError,
)
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.keys import agree, verify
from secure_fedprompt.server.opening import (
    Pending,
    advert_tree,
    share_box_is_bad,
    signed_boxes,
)
from secure_fedprompt.server.rounds.base import LONG_AGO, Stage
from secure_fedprompt.server.rounds.keying import ASKED, KeyedRound
from secure_fedprompt.server.rounds.unmasking import MaskedSum, masks_to_remove
from secure_fedprompt.server.serve import Outbox


@dataclass
class MaskedRound(KeyedRound):
    """One round.

    Attributes:
        opened: the sum and its tag, once done, as survivors are sent it.
    """

    uploads: ClassVar = m.MaskedUpload
    awaited: ClassVar = {
        **ASKED,
        Stage.ADVERTISING: m.Advert,
        Stage.SHARING: m.Shares,
        Stage.CONSISTENCY: m.Consistent,
        Stage.UNMASKING: m.Reveal,
    }
    openings: ClassVar[frozenset[Stage]] = frozenset({Stage.UNMASKING})
    asking: ClassVar[frozenset[Stage]] = openings | {Stage.CONSISTENCY}

    opened: m.OpenedSum | None = None

    def _prepare(self) -> None:
        super()._prepare()
        self._adverts: dict[str, m.Advert] = {}
        self._shared: dict[str, tuple[str, ...]] = {}
        self._survivors_body = b""
        self._dealt: dict[str, m.Shares] = {}
        self._places: dict[str, dict[str, int]] = {}  # dealer -> recipient -> offset of its box
        self._keys: set[bytes] = set()
        self._probe = X25519PrivateKey.generate()
        self._sum = MaskedSum(self.plan)

    def _take_up(self, now: float) -> None:
        self._begin(Stage.ADVERTISING, self.plan.cohort, now)

    def _check_context(self, context: bytes | memoryview) -> None:
        if context:
            raise FieldError(f"a grant of a sum key with {len(context)} bytes of parameters")

    def _is_key(self, data: bytes) -> bool:
        assert self._granted is not None
        whole = len(data) == sum_tag.KEY
        return whole and digest(Purpose.SUM_KEY, data) == self._granted.key

    def _of_grant(self, name: str) -> bool:
        return super()._of_grant(name) and name not in self.holders  # who has not advertised yet

    def _is_dealer(self, dealer: str, recipient: str) -> bool:
        if self._of_grant(recipient):
            return super()._is_dealer(dealer, recipient)
        return recipient in self._places.get(dealer, ())

    def _evidence(self, dealer: str) -> m.Evidence | None:
        """What a dealer signed, or None if it did not sign it."""
        plan, dealt, tree = self.plan, self._dealt[dealer], self._tree
        if not signed_boxes(plan, self.roster, self._adverts[dealer], tree.root, dealt):
            return None
        places = self._places_of(masking.neighbourhoods(plan)[dealer])
        leaves = tuple([tree.levels[0][i] for i in places])
        return m.Evidence(
            plan.run, plan.round, dealer, dealt.boxes, dealt.signature, leaves, tree.proof(places)
        )

    def _places_of(self, near: tuple[str, ...]) -> list[int]:
        """In the tree of adverts."""
        return sorted(map(masking.neighbourhoods(self.plan).place, near))

    def _to_neighbours(
        self, names: tuple[str, ...], make: Callable[[tuple[str, ...]], m.Message]
    ) -> Outbox:
        """A message to each of these, which those with the same neighbourhood share."""
        graph = masking.neighbourhoods(self.plan)
        if self.plan.degree:
            return [(name, make(graph[name])) for name in names]
        message = make(self.plan.cohort)
        return [(name, message) for name in names]

    def _box_is_bad(self, sender: str, accusation: m.Accusation) -> bool:
        if self._of_grant(sender):
            return super()._box_is_bad(sender, accusation)
        at = self._places[accusation.dealer][sender]
        box = bytes(self._dealt[accusation.dealer].boxes[at : at + m.BOX])
        return share_box_is_bad(self.plan, self._adverts, box, sender, accusation)

    def _check(self, sender: str, message: m.Message) -> None:
        plan = self.plan
        match message:
            case m.Advert():
                keys = {message.seal_key, message.mask_key}
                if message.name != sender or len(keys) != 2 or keys & self._keys:
                    raise AdvertMismatchError(
                        f"advert of {sender}: another name, or keys used twice"
                    )
                for key in keys:
                    agree(self._probe, key, sender)  # refuses points of small order
                self._check_key(sender, message.key)
                if message.vouches > 1:
                    raise FieldError(f"{sender} vouches {message.vouches} times")
                self._keys |= keys
                identity = self.roster.identity_of(sender)
                verify(identity, Purpose.ADVERT, message.body(plan), message.signature, sender)
                self.holders.add(sender)
            case m.Shares():
                boxed = masking.neighbourhoods(plan).boxed(sender)
                boxes = sum(n in self._adverts for n in boxed)
                if len(message.boxes) != m.BOX * boxes:
                    raise FieldError(f"{len(message.boxes)} bytes of boxes, {boxes} boxes expected")
            case m.MaskedUpload():
                self._sum.add(message.vector, sum_tag.from_bytes(message.tag))
            case m.Consistent():
                body, identity = self._survivors_body, self.roster.identity_of(sender)
                verify(identity, Purpose.SURVIVORS, body, message.signature, sender)
            case m.Reveal():
                if len(message.shares) != 32 * len(self._shared[sender]):
                    raise FieldError(f"{len(message.shares)} bytes of shares")
            case _:
                super()._check(sender, message)

    def _close_stage(self, names: tuple[str, ...], now: float) -> Outbox:
        step: dict[Stage, Callable[[tuple[str, ...], float], Outbox]] = {
            Stage.ADVERTISING: self._send_adverts,
            Stage.SHARING: self._send_inboxes,
            Stage.COLLECTING: self._send_survivors,
            Stage.CONSISTENCY: self._ask_to_unmask,
            Stage.UNMASKING: self._unmask,
        }
        return step[self.stage](names, now)

    def _send_adverts(self, names: tuple[str, ...], now: float) -> Outbox:
        adverts = [a for name in names if isinstance(a := self.answers[name], m.Advert)]
        self._adverts = dict(zip(names, adverts, strict=True))
        if (before := self.plan.learning_round - 1) > 0:
            self.checked[before] = tuple(a.name for a in adverts if a.vouches)
        self._tree = advert_tree(self.plan, self._adverts)
        self._begin(Stage.SHARING, names, now)
        return self._to_neighbours(names, self._adverts_of)

    def _adverts_of(self, near: tuple[str, ...]) -> m.Adverts:
        there = tuple([self._adverts[name] for name in near if name in self._adverts])
        proof = self._tree.proof(self._places_of(near))
        return m.Adverts(self.plan.run, self.plan.round, there, proof)

    def _send_inboxes(self, names: tuple[str, ...], now: float) -> Outbox:
        near = masking.neighbourhoods(self.plan)
        alive = set(names)
        boxes: dict[str, bytes] = {}
        places = self._places
        for sender in names:
            answer = self.answers[sender]
            assert isinstance(answer, m.Shares)
            recipients = [n for n in near.boxed(sender) if n in self._adverts]
            self._dealt[sender], boxes[sender] = answer, bytes(answer.boxes)
            places[sender] = dict(zip(recipients, range(0, len(answer.boxes), m.BOX), strict=True))
        self._shared = {name: tuple(n for n in near[name] if n in alive) for name in names}
        out: Outbox = []
        for name in names:
            senders = m.members_bits(near[name], self._shared[name])
            offsets = [(s, places[s][name]) for s in near.boxers(name) if s in alive]
            data = b"".join([boxes[s][at : at + m.BOX] for s, at in offsets])
            out.append((name, m.Inbox(self.plan.run, self.plan.round, senders, data)))
        self._collect(names, now)
        return out

    def _send_survivors(self, names: tuple[str, ...], now: float) -> Outbox:
        plan, self._survivors = self.plan, names
        self._survivors_body = m.survivors_body(plan, self._tree.root, bytes(self._list.survivors))
        self._begin(Stage.CONSISTENCY, names, now)
        return [(name, self._list) for name in names]

    def _ask_to_unmask(self, names: tuple[str, ...], now: float) -> Outbox:
        signers = tuple(
            m.Signed(name, a.signature)
            for name in (names if self.plan.degree else names[: self.plan.quorum])
            if isinstance(a := self.answers[name], m.Consistent)
        )
        self._begin(Stage.UNMASKING, names, now)
        self.pending = Pending(
            self.plan, self._survivors, tuple(sorted(self.dropped)),
            tuple(self._adverts.values()), tuple(self._shared), signers,
            self._sum.words.astype("<u4").tobytes(), tag=sum_tag.to_bytes(self._sum.tag),
        )  # fmt: skip
        return self._to_neighbours(names, self._request_of)

    def _request(self, name: str) -> Outbox:
        if self.stage is Stage.CONSISTENCY:
            return [(name, self._list)]
        asks = self._request_of(masking.neighbourhoods(self.plan)[name])
        shown = name in self._signed  # the request tells nothing to who has not seen the list
        return [(name, asks)] if shown else [(name, self._list), (name, asks)]

    @functools.cached_property
    def _list(self) -> m.SurvivorList:
        members = m.members_bits(self.plan.cohort, self._survivors)
        return m.SurvivorList(self.plan.run, self.plan.round, members)

    @functools.cached_property
    def _signed(self) -> dict[str, m.Signed]:
        assert self.pending is not None
        return {signed.name: signed for signed in self.pending.signers}

    def _request_of(self, near: tuple[str, ...]) -> m.UnmaskRequest:
        """With as many signatures as are needed, and no more to verify."""
        plan, signed = self.plan, self._signed
        enough = tuple([signed[name] for name in near if name in signed][: plan.threshold])
        return m.UnmaskRequest(plan.run, plan.round, enough)

    def reopen(self, pending: Pending, now: float) -> None:
        self.pending, self._survivors = pending, pending.survivors
        self.dropped = dict.fromkeys(pending.dropped, LONG_AGO)
        self._adverts = {advert.name: advert for advert in pending.adverts}
        near, alive = masking.neighbourhoods(self.plan), set(pending.sharers)
        self._shared = {n: tuple(p for p in near[n] if p in alive) for n in pending.sharers}
        self._sum.words[:] = np.frombuffer(pending.words, "<u4")
        self._sum.tag = sum_tag.from_bytes(pending.tag)
        self._begin(Stage.UNMASKING, (), now)
        self._hope(now)

    def _unmask(self, names: tuple[str, ...], now: float) -> Outbox:
        reveals = {
            name: a.shares for name in names if isinstance(a := self.answers[name], m.Reveal)
        }
        try:
            plus, minus, liars = masks_to_remove(
                self.plan, self._adverts, self._shared, self._survivors, reveals
            )
        except BadShareError as error:
            if set(self._survivors) - set(names) and now < self._open_until:
                self._needed = len(names) + 1  # one more share may tell right from wrong
                return self._hope(now)
            self.suspect = error.owner
            if error.owner:
                self.faults[error.owner] = f"BadShareError: {error}"
            return self._abort(f"BadShareError: {error}")
        for name in liars:
            self.faults[name] = (
                "BadShareError: relayed shares that disagree with the others'; it or "
            )
            self.faults[name] += "their dealer is dishonest"
        integers = self._sum.unmask(plus, minus)
        out = self._finish(fixedpoint.decode(self.plan.layout, integers), integers)
        return self._told() + out if self.stage is Stage.DONE else out

    def _told(self) -> Outbox:
        """The sum, to those who are in it."""
        plan, total = self.plan, self._sum
        vector, tag = fixedpoint.to_wire(plan.layout, total.words), sum_tag.to_bytes(total.tag)
        members = m.members_bits(plan.cohort, self._survivors)
        self.opened = m.OpenedSum(plan.run, plan.round, vector, tag, members)
        return [(name, self.opened) for name in self._survivors]
