"""Do protected payloads look uniform? Finds accidents; it proves no secrecy.

A masked word, a residue of a ciphertext, and the difference of two of them, is uniform if every
mask is fresh. Leading bits are put into 16 or 256 equal classes and counted: an unmasked vector
keeps to a few of them, and so does the difference of two vectors under one mask, where an update
is small against its ring. Chi-square, with a family-wise error of 1e-6 over all tests of an audit
(Bonferroni). Fields below 80 words are tested together.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from secure_fedprompt.audit.findings import Finding, failed, noted
from secure_fedprompt.audit.sums import TAG_MODULUS
from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import FieldError
from secure_fedprompt.protocol.fixedpoint import from_wire, wire_size
from secure_fedprompt.protocol.plan import RoundPlan

ALPHA = 1e-6
FEWEST = 80  # five expected in each of 16 classes
MOST = 64  # payloads of which all pairs are compared
Words = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Payload:
    """The words of one upload, each below ``modulus``.

    Attributes:
        part: what the words are of; only payloads of the same part are subtracted.
        alone: whether it is not subtracted from others.
    """

    client: str
    round: int
    part: str
    words: Words
    modulus: int
    alone: bool = False


def payloads(message: m.Message, plan: RoundPlan, client: str) -> Iterator[Payload]:
    """What should be uniform in an upload.

    Raises:
        SecureFedPromptError: it is not what the plan says.
    """
    match message:
        case m.MaskedUpload() if plan.protection == "masks":
            if len(message.vector) != wire_size(plan.layout):
                raise FieldError(f"{len(message.vector)} bytes, not {wire_size(plan.layout)}")
            for field, _, words in from_wire(plan.layout, message.vector):
                yield Payload(client, plan.round, field.name, words, 1 << field.bits)
            yield _tag(message.tag, plan, client)
        case m.CipherUpload() if plan.encrypted:
            yield _tag(message.tag, plan, client)
            scheme = homomorphic.scheme(plan.protection, plan.parameters)
            modulus, degree = scheme.settings.coeff_modulus()[0].value(), plan.parameters.degree
            for i, data in enumerate(message.ciphertexts):
                found = scheme.ciphertext(data)
                for half in (0, 1):
                    places = range(half * degree, (half + 1) * degree)
                    words = np.array([found[k] for k in places], np.uint64)
                    yield Payload(client, plan.round, f"ciphertext {i}.{half}", words, modulus)


def _tag(tag: bytes, plan: RoundPlan, client: str) -> Payload:
    return Payload(client, plan.round, "tag", np.frombuffer(tag, "<u8"), TAG_MODULUS)


def boxes(message: m.Message, plan: RoundPlan, client: str) -> Iterator[Payload]:
    """Sealed boxes, byte by byte, and shares that are uniform without the other one."""
    match message:
        case m.Shares():
            sealed = {"boxes": bytes(message.boxes)}
        case m.KeyGrant():
            sealed = {"grants": b"".join(bytes(grant.box) for grant in message.grants)}
        case m.SealedPrompt():
            sealed = {"box": bytes(message.box)}
        case m.KeyShares():
            sealed = {"box": bytes(message.box)}
            words = np.frombuffer(message.share, "<u4")
            yield Payload(client, plan.round, "share of selection keys", words, 1 << 32)
        case m.HelperOutcome():
            sealed = {"boxes": bytes(message.boxes)}
        case _:
            return
    for name, data in sealed.items():
        words = np.frombuffer(data, np.uint8).astype(np.uint32)
        part = f"{type(message).__name__}.{name}"
        yield Payload(client, plan.round, part, words, 256, alone=True)


def p_value(words: Words, modulus: int) -> float:
    """Of the leading bits' counts, if words were uniform below ``modulus``."""
    classes = 256 if len(words) >= 5 * 256 and modulus >= 1 << 16 else 16
    shift = max(0, modulus.bit_length() - 32)  # 32 leading bits are plenty, and fit a product
    place = (
        (words.astype(np.uint64) >> np.uint64(shift))
        * np.uint64(classes)
        // np.uint64((modulus >> shift) or 1)
    )
    counts = np.bincount(np.minimum(place, classes - 1).astype(np.int64), minlength=classes)
    expected = len(words) / classes
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), classes - 1))


def check_uniformity(found: Sequence[Payload]) -> Iterator[Finding]:
    """Each payload, and its differences from the same client's others and from other clients'."""
    large = [payload for payload in found if len(payload.words) >= FEWEST]
    small = defaultdict[int, list[Words]](list)
    for payload in found:
        if len(payload.words) < FEWEST:
            small[payload.modulus].append(payload.words)
    pooled = {modulus: np.concatenate(words) for modulus, words in small.items()}
    tests = list(_tests(large))
    for modulus, words in pooled.items():
        if len(words) >= FEWEST:
            pool = Payload("", 0, "small fields", words, modulus)
            tests.append(("", f"{len(words)} words of small fields: not uniform", pool, None))
        else:
            yield noted("uniformity", "", f"{len(words)} words of small fields are too few to test")
    limit = ALPHA / max(1, len(tests))
    for where, what, one, two in tests:
        p = p_value(one.words if two is None else _difference(two, one), one.modulus)
        if p < limit:
            yield failed("uniformity", where, f"{what} (p = {p:.1g}, limit {limit:.1g})")
    if tests:
        yield noted("uniformity", "", f"{len(tests)} tests of uploads and of their differences")


def _tests(found: list[Payload]) -> Iterator[tuple[str, str, Payload, Payload | None]]:
    """Each payload, and what is subtracted from it.

    All pairs of a group of up to ``MOST`` payloads; of a larger one, neighbours by value.
    """
    for payload in found:
        where = f"round {payload.round}, {payload.client}"
        text = f"{payload.part}, {len(payload.words)} words: not uniform"
        yield where, text, payload, None
    groups = defaultdict[tuple[object, ...], list[Payload]](list)
    for payload in found:
        if payload.alone:
            continue
        same = payload.part, payload.modulus, len(payload.words)
        groups["client", payload.client, *same].append(payload)
        groups["round", payload.round, *same].append(payload)
    for key, group in groups.items():
        pairs = itertools.combinations(group, 2)
        if len(group) > MOST:
            pairs = itertools.pairwise(sorted(group, key=lambda p: int(p.words[0])))  # type: ignore[assignment]
        for one, two in pairs:
            twice = f"from round {one.round}: a mask was used twice?"
            both = f"from {one.client}'s: one mask for both?"
            text = f"{two.part} differs too little {twice if key[0] == 'client' else both}"
            yield f"round {two.round}, {two.client}", text, two, one


def _difference(one: Payload, two: Payload) -> Words:
    q = np.uint64(one.modulus)
    return (two.words.astype(np.uint64) + (q - one.words)) % q
