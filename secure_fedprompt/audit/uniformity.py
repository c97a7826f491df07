"""Do protected payloads look uniform? Finds accidents; it proves no secrecy.

A masked word, a residue of a ciphertext, and the difference of two of them, is uniform if every
mask is fresh. Leading bits are put into 16 or 256 equal classes and counted: an unmasked vector
keeps to a few of them, and so does the difference of two vectors under one mask, where an update
is small against its ring. Chi-square, with a family-wise error of 1e-6 over all tests of an audit
(Bonferroni). Payloads below 80 words are not tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from secure_fedprompt.audit.findings import Finding, failed, noted
from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.layout import Layout
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.ring import packed_size, unpack

ALPHA = 1e-6
FEWEST = 80  # five expected in each of 16 classes
Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Payload:
    """The words of one upload, each below ``modulus``.

    Attributes:
        part: what the words are of; only payloads of the same part are subtracted.
    """

    client: str
    round: int
    part: str
    words: Words
    modulus: int


def payloads(message: m.Message, plan: RoundPlan, client: str) -> Iterator[Payload]:
    """What should be uniform in an upload.

    Raises:
        SecureFedPromptError: ciphertexts are not of the plan's parameter set.
    """
    match message:
        case m.MaskedUpload():
            for field, words in _fields(plan.layout, message.vector):
                part = f"{field}, {len(words)} words"
                yield Payload(client, plan.round, part, words, 1 << _bits(plan.layout, field))
        case m.CipherUpload():
            scheme = homomorphic.scheme(plan.protection, plan.parameters)
            modulus = scheme.settings.coeff_modulus()[0].value()
            for i, data in enumerate(message.ciphertexts):
                found = scheme.ciphertext(data)
                words = np.array([found[k] for k in range(plan.parameters.degree)], np.uint64)
                yield Payload(client, plan.round, f"ciphertext {i}", words, modulus)


def _fields(layout: Layout, vector: bytes | memoryview) -> Iterator[tuple[str, Words]]:
    at = 0
    for field in layout:
        size = packed_size(field.size, field.bits)
        yield field.name, unpack(vector[at : at + size], field.size, field.bits).astype(np.uint64)
        at += size


def _bits(layout: Layout, name: str) -> int:
    return next(field.bits for field in layout if field.name == name)


def p_value(words: Words, modulus: int) -> float:
    """Of the leading bits' counts, if words were uniform below ``modulus``."""
    classes = 256 if len(words) >= 5 * 256 and modulus >= 1 << 16 else 16
    shift = max(0, modulus.bit_length() - 32)  # 32 leading bits are plenty, and fit a product
    place = (words >> np.uint64(shift)) * np.uint64(classes) // np.uint64((modulus >> shift) or 1)
    counts = np.bincount(np.minimum(place, classes - 1).astype(np.int64), minlength=classes)
    expected = len(words) / classes
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), classes - 1))


def check_uniformity(found: Sequence[Payload]) -> Iterator[Finding]:
    """Each payload, its difference from the same client's last one, and from its neighbour's."""
    tests = list(_tests([payload for payload in found if len(payload.words) >= FEWEST]))
    limit = ALPHA / max(1, len(tests))
    for where, what, words, modulus in tests:
        p = p_value(words, modulus)
        if p < limit:
            yield failed("uniformity", where, f"{what} (p = {p:.1g}, limit {limit:.1g})")
    if tests:
        yield noted("uniformity", "", f"{len(tests)} tests of uploads and of their differences")


def _tests(found: list[Payload]) -> Iterator[tuple[str, str, Words, int]]:
    for payload in found:
        where = f"round {payload.round}, {payload.client}"
        yield where, f"{payload.part}: not uniform", payload.words, payload.modulus
    by_client = sorted(found, key=lambda p: (p.client, p.part, p.round))
    by_round = sorted(found, key=lambda p: (p.round, p.part, p.client))
    for order, what in (
        (by_client, "differs too little from round {0.round}: a mask was used twice?"),
        (by_round, "differs too little from {0.client}'s: one mask for both?"),
    ):
        for one, two in itertools.pairwise(order):
            same = one.client == two.client if order is by_client else one.round == two.round
            if same and (one.part, one.modulus) == (two.part, two.modulus):
                where = f"round {two.round}, {two.client}"
                text = f"{two.part} {what.format(one)}"
                yield where, text, _difference(one, two), two.modulus


def _difference(one: Payload, two: Payload) -> Words:
    q = np.uint64(one.modulus)
    return (two.words + (q - one.words)) % q
