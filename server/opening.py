"""What an opening needs to outlive the server, and who is to blame for a box that does not open.

Once a sum may be open at some clients, no other sum of that learning round will be: the round must
be finished, by a restarted server as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.protocol import homomorphic, masking
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import Digest, Many
from secure_fedprompt.protocol.errors import CiphertextError, ProtocolError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.keys import agree, unseal, verify
from secure_fedprompt.protocol.plan import MAX_COHORT, NO_KEY, RoundPlan
from secure_fedprompt.protocol.roster import Roster


@dataclass(frozen=True)
class Pending:
    """A round whose sum is being opened.

    Attributes:
        dropped: clients that are not in the sum.
        adverts, sharers, signers, words: of masks; ``words`` is the masked sum.
        key, ciphertexts: of homomorphic encryption.
    """

    plan: RoundPlan
    survivors: m.Names
    dropped: m.Names
    adverts: Annotated[tuple[m.Advert, ...], Many(MAX_COHORT)] = ()
    sharers: m.Names = ()
    signers: Annotated[tuple[m.Signed, ...], Many(MAX_COHORT)] = ()
    words: m.Vector = b""
    key: Digest = NO_KEY
    ciphertexts: Annotated[tuple[m.Vector, ...], Many(m.MAX_CIPHERTEXTS)] = ()


def public_of(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def share_box_is_bad(
    plan: RoundPlan,
    roster: Roster,
    adverts: Mapping[str, m.Advert],
    dealt: m.Shares,
    box: bytes,
    accuser: str,
    complaint: m.Complaint,
) -> bool:
    """Whether the dealer is to blame, judged with the key that the accuser published."""
    dealer = complaint.dealer
    if public_of(complaint.secret) != adverts[accuser].seal_key:
        return False
    try:
        identity = roster.identity_of(dealer)
        verify(identity, Purpose.BOXES, dealt.body(plan), dealt.signature, dealer)
        secret = X25519PrivateKey.from_private_bytes(complaint.secret)
        shared = agree(secret, adverts[dealer].seal_key, dealer)
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
    complaint: m.Complaint,
) -> tuple[bool, bool]:
    """Whether the maker is to blame, and whether the server has now seen a cohort key."""
    if public_of(complaint.secret) != ask.seal_key:
        return False, False
    grant = next(g for g in granted.grants if g.recipient == ask.name)
    try:
        secret = X25519PrivateKey.from_private_bytes(complaint.secret)
        key = masking.grant_key(plan, ask.name, agree(secret, maker.seal_key, maker.name))
        context = masking.seal_context(plan, maker.name, ask.name)
        data = unseal(key, bytes(grant.box), context, maker.name)
    except ProtocolError:
        return True, False
    fits = digest(Purpose.COHORT_KEY, data[32:], data[:32]) == granted.key
    scheme = homomorphic.scheme(plan.protection, plan.parameters)
    try:
        scheme.read(homomorphic.sealapi().SecretKey(), data[32:])
    except CiphertextError:
        return True, True
    return not fits, True
