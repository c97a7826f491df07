"""What an opening needs to outlive the server, and who is to blame for a box that does not open.

Once a sum may be open at some clients, no other sum of that learning round will be: the round must
be finished, by a restarted server as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from secure_fedprompt.protocol import masking, merkle
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.agreement_proof import check, lift
from secure_fedprompt.protocol.codec import Digest, Many, SumTag
from secure_fedprompt.protocol.errors import PointError, ProtocolError
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import unseal, verify
from secure_fedprompt.protocol.plan import MAX_COHORT, NO_KEY, RoundPlan
from secure_fedprompt.protocol.roster import Roster


@dataclass(frozen=True)
class Pending:
    """A round whose sum is being opened.

    Attributes:
        dropped: clients that are not in the sum.
        signers: of the list, all of them on a regular graph; and of the encrypted sum.
        adverts, sharers, words: of masks; ``words`` is the masked sum.
        key, ciphertexts, tag: of homomorphic encryption.
    """

    plan: RoundPlan
    survivors: m.Names
    dropped: m.Names
    adverts: Annotated[tuple[m.Advert, ...], Many(MAX_COHORT)] = ()
    sharers: m.Names = ()
    signers: Annotated[tuple[m.Signed, ...], Many(MAX_COHORT)] = ()
    words: m.VectorBytes = b""
    key: Digest = NO_KEY
    ciphertexts: Annotated[tuple[m.VectorBytes, ...], Many(m.MAX_CIPHERTEXTS)] = ()
    tag: SumTag = bytes(16)


def advert_tree(plan: RoundPlan, adverts: Mapping[str, m.Advert]) -> merkle.Tree:
    """Over the adverts of everybody in the cohort, by place in the graph."""
    ring = masking.neighbourhoods(plan).ring
    return merkle.Tree([m.advert_leaf(adverts.get(name)) for name in ring])


def signed_boxes(
    plan: RoundPlan, roster: Roster, advert: m.Advert, root: bytes, dealt: m.Shares
) -> bool:
    """Whether a dealer signed its boxes, with a key that anything can be proved about."""
    dealer = advert.name
    try:
        identity = roster.identity_of(dealer)
        verify(identity, Purpose.BOXES, dealt.body(plan, root), dealt.signature, dealer)
        lift(advert.seal_key)
    except ProtocolError:
        return False
    return True


def share_box_is_bad(
    plan: RoundPlan,
    adverts: Mapping[str, m.Advert],
    box: bytes,
    accuser: str,
    accusation: m.Accusation,
) -> bool:
    """Whether the dealer is to blame: the box that it signed does not open with the key that the
    two have agreed on."""
    dealer, context = accusation.dealer, accusation.body(plan, accuser)
    own, other = adverts[accuser].seal_key, adverts[dealer].seal_key
    try:
        shared = check(accusation.proof, own, other, context)
    except ProtocolError:
        return False
    try:
        key = masking.seal_key(plan, dealer, accuser, shared)
        unseal(key, box, masking.seal_context(plan, dealer, accuser), dealer)
    except ProtocolError:
        return True
    return False


def grant_is_bad(
    plan: RoundPlan,
    maker: m.Ready,
    ask: m.KeyAsk,
    granted: m.KeyGrant,
    accusation: m.Accusation,
    is_key: Callable[[bytes], bool],
) -> bool:
    """Whether the maker is to blame for a grant that is of no use: it does not open, or not to
    what ``is_key`` takes for the granted key."""
    grant = next(g for g in granted.grants if g.recipient == ask.name)
    context = accusation.body(plan, ask.name)
    try:
        shared = check(accusation.proof, ask.seal_key, maker.seal_key, context)
    except PointError:
        return True
    except ProtocolError:
        return False
    try:
        key = masking.grant_key(plan, ask.name, shared)
        data = unseal(
            key, bytes(grant.box), masking.seal_context(plan, maker.name, ask.name), maker.name
        )
    except ProtocolError:
        return True
    return not is_key(data)
