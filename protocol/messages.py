"""The message catalogue: every frame that may cross the wire, in the order of a run.

    client                          server
      Hello            ->                            a nonce's commitment, model and classes
                       <-           Welcome          run id, settings
      Ready            ->                            or Initial, one client: the starting prompt
                       <-           Terms            of the run, signed
      Accept           ->                            or Contest: the start is not what I compute
                       <-           Plan             round plan, global prompt
      Advert           ->                            fresh public keys, signed
                       <-           Adverts          of the neighbours, and proof of their place
      Shares           ->                            sealed key shares for each peer
                       <-           Inbox
     (Complaint        ->                            a box does not open
                       <-           Evidence         what its dealer signed
      Accusation       ->                            proof: ends the attempt)
      MaskedUpload     ->                            (PlainUpload without protection)
                       <-           SurvivorList
      Consistent       ->                            signature on the list
                       <-           UnmaskRequest    enough signatures of neighbours
      Reveal           ->                            shares of self masks and of dropped keys
                       <-           OpenedSum        to the survivors, who check it
                       <-           RoundEnd         or the next Plan
                       <-           Finish           final prompt

Where somebody lacks the key that clients share (the sum key, or the cohort key under ``bfv`` and
``ckks``), after the plan:

      KeyAsk           ->                            who lacks it, with a fresh key
                       <-           KeyRequest       to the maker: who needs it
      KeyGrant         ->                            the key, sealed to each of them
                       <-           KeyBox           to each of them

Under ``bfv`` and ``ckks`` a round then goes like this:

      CipherUpload     ->
                       <-           CipherSum        the encrypted sum
      Consistent       ->                            signature on it
                       <-           SumSigned        by a quorum: it may be decrypted
      Opened           ->                            digest of the next prompt, sealed
                       <-           SealedRequest    to one client
      SealedPrompt     ->
                       <-           RoundEnd

Where server and helper select what is uploaded, between the keys and the uploads:

                       <-           HelperPlan       to the helper, when the round begins
      HelperOffer      ->
                       <-           HelperAnswer
      KeyShares        ->                            every client, after training
                       <-           HelperInputs     to the helper: its shares, sealed
      HelperChoices    ->
                       <-           HelperTables
      HelperOutcome    ->                            sealed to each owner
                       <-           Outcome          to each client

``Alive``, ``Withdraw`` (from one round) and ``Leave`` (client), and ``Rejoin`` and ``Refused``
(server) may come at any time. The sender is the
authenticated CurveZMQ key, so no message names it. Whoever keeps an audit log adds ``LogHead`` to
the end of each round. ``repr`` never shows vectors, shares or boxes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np

from secure_fedprompt.protocol import merkle
from secure_fedprompt.protocol.agreement_proof import AgreementProof
from secure_fedprompt.protocol.codec import (
    MAX_FRAME,
    U8,
    U16,
    U32,
    U64,
    Blob,
    Catalogue,
    Digest,
    Line,
    Many,
    Name,
    Printable,
    PublicKey,
    Roll,
    RunId,
    Signature,
    SumTag,
    Text,
    UpTo,
    encode_fields,
)
from secure_fedprompt.protocol.errors import FieldError, SecureFedPromptError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.keys import Identity
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.plan import MAX_COHORT, RoundPlan
from secure_fedprompt.protocol.selection import parties
from secure_fedprompt.protocol.terms import RunTerms

VectorBytes = Annotated[Blob, UpTo(MAX_FRAME)]
Names = Annotated[tuple[str, ...], Roll(MAX_COHORT)]
Members = Annotated[Blob, UpTo(MAX_COHORT // 8)]  # see ``members_bits``
Digests = Annotated[tuple[Digest, ...], Many(2 * MAX_COHORT)]
MAX_KEY = 1 << 20
MAX_CIPHERTEXTS = 1 << 15
UNSIGNED = bytes(64)  # in the place of a signature that is still to be made
TAG = 16  # that sealing adds
SEED_BOX = 32 + TAG
BOX = 80  # two 32-byte shares and a 16-byte tag


class _Signable(Protocol):
    @property
    def body(self) -> Callable[..., bytes]: ...


M = TypeVar("M", bound=_Signable)


@dataclass(frozen=True, repr=False)
class OfRound(Printable):
    """Any message of one attempt at a round."""

    run: RunId
    round: U32

    def is_of(self, plan: RoundPlan) -> bool:
        """Whether it is of this attempt."""
        return (self.run, self.round) == (plan.run, plan.round)


@dataclass(frozen=True, repr=False)
class Hello(Printable):
    """``method`` is empty if the client takes the run's.

    Attributes:
        commitment: to a nonce that ``Ready`` opens: nobody can choose one for what others chose.
    """

    commitment: Digest
    method: Annotated[str, Text(32)]
    model_fingerprint: Digest
    classes_digest: Digest
    roster_digest: Digest


@dataclass(frozen=True, repr=False)
class Probe(Printable):
    """What ``Hello`` says, by somebody who only asks whether it would be admitted."""

    method: Annotated[str, Text(32)]
    model_fingerprint: Digest
    classes_digest: Digest
    roster_digest: Digest


@dataclass(frozen=True, repr=False)
class Probed(Printable):
    """The answer. ``error`` is empty, or the name of what ``Hello`` would be refused with.

    Attributes:
        clients, quorum, protection: what the terms will say; settings: of the method.
        compared: whether there was a model and a class list to compare with.
    """

    error: Annotated[str, Text(64)]
    reason: Line
    settings: Annotated[Blob, UpTo(1 << 16)]
    protection: Annotated[str, Text(16)]
    clients: U16
    quorum: U16
    compared: U8


@dataclass(frozen=True, repr=False)
class Nonce(Printable):
    """Of a client: its nonce, or the commitment to it."""

    name: Name
    nonce: Digest


@dataclass(frozen=True, repr=False)
class Welcome(Printable):
    """``run`` is the digest of the nonces; ``settings`` is canonical JSON for the method."""

    run: RunId
    server_nonce: Digest
    commitments: Annotated[tuple[Nonce, ...], Many(MAX_COHORT)]
    settings: Annotated[Blob, UpTo(1 << 16)]
    need_initial: U8


@dataclass(frozen=True, repr=False)
class Initial(Printable):
    """The starting prompt, float32 little-endian in the order of ``tensors``."""

    run: RunId
    tensors: Annotated[tuple[TensorSpec, ...], Many(128)]
    vector: VectorBytes


@dataclass(frozen=True, repr=False)
class Ready(Printable):
    """Welcome is understood and the images are encoded: plans may come.

    Attributes:
        name: of the sender.
        seal_key: X25519, for this run; whatever is sealed to the client goes under it.
        key: digest of the cohort key that the client holds, or zeros.
        nonce: that ``Hello`` committed to.
        signature: of the identity on run, roster, name and ``seal_key``.
    """

    run: RunId
    name: Name
    seal_key: PublicKey
    key: Digest
    nonce: Digest
    signature: Signature

    def body(self, roster: bytes) -> bytes:
        return b"".join((self.run, roster, self.seal_key, self.name.encode()))


@dataclass(frozen=True, repr=False)
class Terms(Printable):
    """The terms of the run.

    Attributes:
        start: the prompt that it starts from, as in ``Initial``.
        nonces: opened ones, of which the terms hold the digest.
        signature: of the server's identity on the terms.
    """

    run: RunId
    terms: RunTerms
    start: VectorBytes
    nonces: Annotated[tuple[Nonce, ...], Many(MAX_COHORT)]
    signature: Signature


@dataclass(frozen=True, repr=False)
class Accept(Printable):
    """The terms with this digest are within the sender's policy."""

    run: RunId
    terms: Digest


@dataclass(frozen=True, repr=False)
class Contest(Printable):
    """The terms' start is not what the sender's settings and model give."""

    run: RunId
    terms: Digest


@dataclass(frozen=True, repr=False)
class Plan(Printable):
    """``base`` is the global prompt, float32 little-endian, or sealed by the clients. Under masks
    it is empty to those who were sent the sum that it follows from."""

    plan: RoundPlan
    base: VectorBytes


@dataclass(frozen=True, repr=False)
class Advert(OfRound):
    """Fresh X25519 keys (``seal_key`` seals shares, ``mask_key`` makes pair masks) and H(b).

    Attributes:
        key: digest of the sum key that the sender holds.
        vouches: 1 if it has computed the plan's global prompt itself, from sums that it checked.
    """

    name: Name
    seal_key: PublicKey
    mask_key: PublicKey
    commitment: Digest
    key: Digest
    vouches: U8
    signature: Signature

    def body(self, plan: RoundPlan) -> bytes:
        """What the identity signs: the keys under this plan, its global prompt and roster."""
        unsigned = (self.seal_key, self.mask_key, self.commitment, self.key, bytes((self.vouches,)))
        return b"".join((plan.digest, plan.roster_digest, *unsigned, self.name.encode()))


@dataclass(frozen=True, repr=False)
class Adverts(OfRound):
    """Those of the recipient and its neighbours, in name order, with what is missing to the root of
    the tree over all of them (``merkle``, by place in the graph)."""

    adverts: Annotated[tuple[Advert, ...], Many(MAX_COHORT)]
    proof: Digests


@dataclass(frozen=True, repr=False)
class Shares(OfRound):
    """One box for each that the dealer boxes (``masking.Graph.boxed``) and that advertised, in name
    order; ``signature`` of the identity on them."""

    boxes: Annotated[Blob, UpTo(BOX * MAX_COHORT)]
    signature: Signature

    def body(self, plan: RoundPlan, adverts: bytes) -> bytes:
        """What the dealer signs; ``adverts`` is the root over all of them."""
        return plan.digest + adverts + digest(Purpose.BOXES, self.boxes)


@dataclass(frozen=True, repr=False)
class Inbox(OfRound):
    """Who dealt, of the recipient's closed neighbourhood (``members_bits``), itself included, and
    what those sealed for it who box it (``masking.Graph.boxers``), in name order."""

    senders: Members
    boxes: Annotated[Blob, UpTo(BOX * MAX_COHORT)]


@dataclass(frozen=True, repr=False)
class Complaint(OfRound):
    """A box that came from ``dealer`` does not open."""

    dealer: Name


@dataclass(frozen=True, repr=False)
class Evidence(OfRound):
    """What ``dealer`` sent and signed: was the box altered on its way?

    Attributes:
        near: of its closed neighbourhood by place, the leaves of the tree of adverts; proof: the
            rest of it. To whom it dealt boxes follows from them.
    """

    dealer: Name
    boxes: Annotated[Blob, UpTo(BOX * MAX_COHORT)]
    signature: Signature
    near: Digests
    proof: Digests


@dataclass(frozen=True, repr=False)
class Accusation(OfRound):
    """The box that ``dealer`` signed does not open: proof of the key that should open it."""

    dealer: Name
    proof: AgreementProof

    def body(self, plan: RoundPlan, name: str) -> bytes:
        """What the proof is about."""
        return b"".join(
            (plan.digest, len(name).to_bytes(2, "little"), name.encode(), self.dealer.encode())
        )


@dataclass(frozen=True, repr=False)
class MaskedUpload(OfRound):
    """``tag`` of the vector, masked like it."""

    vector: VectorBytes
    tag: SumTag


@dataclass(frozen=True, repr=False)
class PlainUpload(OfRound):
    """Float64 little-endian, weighted; only under protection "none"."""

    vector: VectorBytes


@dataclass(frozen=True, repr=False)
class SurvivorList(OfRound):
    survivors: Members


@dataclass(frozen=True, repr=False)
class Consistent(OfRound):
    signature: Signature


@dataclass(frozen=True, repr=False)
class Signed(Printable):
    name: Name
    signature: Signature


@dataclass(frozen=True, repr=False)
class UnmaskRequest(OfRound):
    """Who signed the survivor list, of the recipient and its neighbours. What is revealed follows
    from the list."""

    signers: Annotated[tuple[Signed, ...], Many(MAX_COHORT)]


@dataclass(frozen=True, repr=False)
class Reveal(OfRound):
    """One 32-byte share per neighbour that shared keys, self included, in name order:
    of its self mask if it survived, of its mask key if it dropped."""

    shares: Annotated[Blob, UpTo(32 * MAX_COHORT)]


@dataclass(frozen=True, repr=False)
class OpenedSum(OfRound):
    """The sum that the masks hid, as an upload is packed, and the sum of its members' tags.

    Attributes:
        members: of the plan's cohort.
    """

    vector: VectorBytes
    tag: SumTag
    members: Members


@dataclass(frozen=True, repr=False)
class KeyAsk(OfRound):
    """A client that lacks the key that others share, with a fresh X25519 key for this one grant."""

    name: Name
    seal_key: PublicKey
    signature: Signature

    def body(self, plan: RoundPlan) -> bytes:
        """What the identity signs."""
        return plan.digest + self.seal_key + self.name.encode()


@dataclass(frozen=True, repr=False)
class KeyRequest(OfRound):
    """Those of ``plan.grants`` that asked, in name order, with the keys to seal to."""

    recipients: Annotated[tuple[KeyAsk, ...], Many(MAX_COHORT)]


@dataclass(frozen=True, repr=False)
class Grant(Printable):
    """The shared key, sealed to ``recipient``."""

    recipient: Name
    box: Annotated[Blob, UpTo(MAX_KEY)]
    signature: Signature

    def body(self, plan: RoundPlan, key: bytes) -> bytes:
        """What the maker signs."""
        sealed = digest(Purpose.KEY_GRANT, self.box)
        number = plan.election.to_bytes(4, "little")
        return b"".join((plan.digest, number, key, sealed, self.recipient.encode()))


@dataclass(frozen=True, repr=False)
class KeyGrant(OfRound):
    """``context`` is the public SEAL parameters and nothing else; empty under masks."""

    key: Digest
    context: Annotated[Blob, UpTo(MAX_KEY)]
    grants: Annotated[tuple[Grant, ...], Many(MAX_COHORT)]
    signature: Signature

    def body(self, plan: RoundPlan) -> bytes:
        """What the maker signs towards the server."""
        parts = self.key, self.context, *(encode_fields(grant) for grant in self.grants)
        return plan.digest + digest(Purpose.KEY_GRANT, *parts)


@dataclass(frozen=True, repr=False)
class KeyBox(OfRound):
    maker: Ready
    key: Digest
    grant: Grant


@dataclass(frozen=True, repr=False)
class CipherUpload(OfRound):
    """The packed vector, encrypted under the cohort key with this digest, and its tag."""

    key: Digest
    ciphertexts: Annotated[tuple[VectorBytes, ...], Many(MAX_CIPHERTEXTS)]
    tag: SumTag
    signature: Signature

    def body(self, plan: RoundPlan) -> bytes:
        """What the identity signs: these ciphertexts in this order, for this plan and key."""
        return plan.digest + self.key + digest(Purpose.UPLOAD, self.tag, *self.ciphertexts)


@dataclass(frozen=True, repr=False)
class CipherSum(OfRound):
    """The encrypted sum of these members' uploads, and the sum of their tags.

    Attributes:
        signers: none as long as it is to be signed; else, to who comes back, as in ``SumSigned``.
    """

    survivors: Names
    ciphertexts: Annotated[tuple[VectorBytes, ...], Many(MAX_CIPHERTEXTS)]
    tag: SumTag
    signers: Annotated[tuple[Signed, ...], Many(MAX_COHORT)]

    def body(self, plan: RoundPlan) -> bytes:
        """What each client signs before it decrypts: this sum, over this list, under this plan."""
        names = digest(Purpose.SURVIVORS, *(name.encode() for name in self.survivors))
        return plan.digest + names + digest(Purpose.SUM, self.tag, *self.ciphertexts)


@dataclass(frozen=True, repr=False)
class SumSigned(OfRound):
    """Who signed the encrypted sum: a quorum, hence nobody saw another one."""

    signers: Annotated[tuple[Signed, ...], Many(MAX_COHORT)]


@dataclass(frozen=True, repr=False)
class Opened(OfRound):
    """The sum decrypts; digest of the sealed next prompt, zeros after the final evaluation."""

    sealed: Digest


@dataclass(frozen=True, repr=False)
class SealedRequest(OfRound):
    pass


@dataclass(frozen=True, repr=False)
class SealedPrompt(OfRound):
    box: VectorBytes


@dataclass(frozen=True, repr=False)
class HelperPlan(OfRound):
    """The round that the recipient helps with."""

    plan: RoundPlan


@dataclass(frozen=True, repr=False)
class HelperOffer(OfRound):
    offer: parties.Offer


@dataclass(frozen=True, repr=False)
class HelperAnswer(OfRound):
    answer: parties.Answer


@dataclass(frozen=True, repr=False)
class KeyShares(OfRound):
    """Of the selection keys, by modality and group.

    Attributes:
        share: the server's, little-endian words, uniform on its own.
        box: seed of the helper's, sealed to it.
    """

    share: Annotated[Blob, UpTo(1 << 12)]
    box: Annotated[Blob, UpTo(SEED_BOX)]


@dataclass(frozen=True, repr=False)
class HelperInputs(OfRound):
    """The owners' run keys, by name, and the boxes that they sealed to the helper."""

    owners: Annotated[tuple[Ready, ...], Many(MAX_COHORT)]
    boxes: Annotated[Blob, UpTo(SEED_BOX * MAX_COHORT)]


@dataclass(frozen=True, repr=False)
class HelperChoices(OfRound):
    """``refused`` are owners whose keys or boxes the helper could not use: it leaves them out."""

    refused: Names
    choices: parties.Choices


@dataclass(frozen=True, repr=False)
class HelperTables(OfRound):
    tables: parties.Garbled


@dataclass(frozen=True, repr=False)
class HelperOutcome(OfRound):
    """The helper's shares of the outcomes, sealed to each owner, in the order of the inputs."""

    boxes: Annotated[Blob, UpTo(MAX_FRAME)]


@dataclass(frozen=True, repr=False)
class Outcome(OfRound):
    """Both shares of one owner's outcome: the server's, and the helper's sealed one."""

    share: Annotated[Blob, UpTo(1 << 12)]
    box: Annotated[Blob, UpTo(1 << 13)]


@dataclass(frozen=True, repr=False)
class RoundEnd(OfRound):
    """``reason`` is empty for a finished round."""

    reason: Line


@dataclass(frozen=True, repr=False)
class Finish(Printable):
    """``vector`` as in ``Plan``: sealed if a training round under encryption was done."""

    run: RunId
    vector: VectorBytes
    reason: Line


@dataclass(frozen=True, repr=False)
class LogHead(OfRound):
    """Where the sender's audit log stands as a round ends, round 0 as the run ends."""

    records: U64
    chain: Digest
    signature: Signature

    def body(self, name: str) -> bytes:
        """What the identity of ``name`` signs."""
        numbers = self.round.to_bytes(4, "little") + self.records.to_bytes(8, "little")
        return b"".join((self.run, numbers, self.chain, name.encode()))


@dataclass(frozen=True, repr=False)
class Alive(Printable):
    pass


@dataclass(frozen=True, repr=False)
class Withdraw(OfRound):
    """The client refuses to go on with this round, but stays in the run."""

    error: Annotated[str, Text(48)]
    reason: Line


@dataclass(frozen=True, repr=False)
class Rejoin(Printable):
    """The server does not know this client any more: say Hello again."""


@dataclass(frozen=True, repr=False)
class Leave(Printable):
    """The client stops. ``reason`` is empty if it could say anything about private data."""

    error: Annotated[str, Text(48)]
    reason: Line


@dataclass(frozen=True, repr=False)
class Refused(Printable):
    """The server does not admit this client to the run."""

    error: Annotated[str, Text(48)]
    reason: Line


Message = Printable
CATALOGUE = Catalogue(
    Hello, Welcome, Ready, Initial, Plan, Advert, Adverts, Shares, Inbox, MaskedUpload, PlainUpload,
    SurvivorList, Consistent, UnmaskRequest, Reveal, RoundEnd, Finish, Alive,
    Withdraw, Rejoin, Leave, Refused,
    KeyRequest, KeyGrant, KeyBox, CipherUpload, CipherSum, Opened, SealedRequest, SealedPrompt,
    HelperPlan, HelperOffer, HelperAnswer, KeyShares, HelperInputs, HelperChoices, HelperTables,
    HelperOutcome, Outcome, LogHead, Terms, Accept, Contest, Complaint, Evidence,
    Accusation, KeyAsk, Probe, Probed, SumSigned, OpenedSum,
)  # fmt: skip

TO_HELPER = (HelperPlan, HelperAnswer, HelperInputs, HelperTables)
FROM_HELPER = (HelperOffer, HelperChoices, HelperOutcome)


def signed(message: M, identity: Identity, purpose: Purpose, *context: Any) -> M:
    """The same message with the identity's signature on its ``body(*context)``."""
    signature = identity.sign(purpose, message.body(*context))
    return replace(message, signature=signature)  # type: ignore[type-var]


def line(text: object) -> str:
    """Any text as a ``Line``: one printable line of at most 512 bytes."""
    words = " ".join(str(text).split())
    printable = "".join(c if c.isprintable() else "?" for c in words)
    return printable.encode()[:512].decode(errors="ignore")


def told(error: SecureFedPromptError) -> str:
    """What a peer may read of an error, as a ``Line``."""
    return line(error if error.told is None else error.told)


def commitment(name: str, nonce: bytes) -> bytes:
    """To a client's nonce, in ``Hello``."""
    return digest(Purpose.NONCE, name.encode(), nonce)


def run_id(server_nonce: bytes, commitments: Sequence[Nonce]) -> bytes:
    """The 16-byte run id: no party alone can make it repeat."""
    parts = [encode_fields(n) for n in sorted(commitments, key=lambda n: n.name)]
    return digest(Purpose.RUN_ID, server_nonce, *parts)[:16]


def advert_leaf(advert: Advert | None) -> bytes:
    """Of the tree over all adverts, which has a leaf for everybody in the cohort."""
    return merkle.ABSENT if advert is None else merkle.leaf(encode_fields(advert))


def members_bits(cohort: Sequence[str], members: Collection[str]) -> bytes:
    """Who of a cohort is meant: a bit for each, from the lowest of the first byte."""
    chosen = set(members)
    bits = np.fromiter((name in chosen for name in cohort), bool, len(cohort))
    return np.packbits(bits, bitorder="little").tobytes()


def members_of(cohort: tuple[str, ...], bits: bytes | memoryview) -> tuple[str, ...]:
    """Inverse of ``members_bits``.

    Raises:
        FieldError: of another length, or with bits behind the last name.
    """
    return _members_of(cohort, bytes(bits))


@functools.lru_cache(maxsize=8)
def _members_of(cohort: tuple[str, ...], bits: bytes) -> tuple[str, ...]:
    found = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
    if len(bits) != -(-len(cohort) // 8) or found[len(cohort) :].any():
        raise FieldError(f"{len(bits)} bytes of members for a cohort of {len(cohort)}")
    return tuple(itertools.compress(cohort, found.tolist()))


def survivors_body(plan: RoundPlan, adverts: bytes, survivors: bytes | memoryview) -> bytes:
    """What a client signs in the consistency stage: the root over all adverts, and the list."""
    listed = digest(Purpose.SURVIVORS, survivors)
    return b"".join((plan.run, plan.round.to_bytes(4, "little"), plan.digest, adverts, listed))
