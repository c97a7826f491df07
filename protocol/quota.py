"""How much a peer may send: what its part of a round takes, and a little beside it.

Whoever is authenticated could fill the other end's memory, or push older records out of its audit
log by a flood of small frames. So every byte that comes is taken from an allowance, which grows
slowly with time, and by what a round needs when this end enters one: not when the peer says so.
"""

from __future__ import annotations

import functools

from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import MAX_FRAME
from secure_fedprompt.protocol.layout import total_size
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.selection.task import most_bytes
from secure_fedprompt.protocol.terms import RunTerms

RECORD = 300  # bytes that a frame takes in an audit log
RATE = 1_000  # bytes a second; who only lives sends 170
_PEER = 2_048  # in a round, about each client of the cohort: adverts, boxes, signatures, shares
_GRANT = 20_000  # of a cohort key, about each of them
_ROOM = 1 << 14  # plans, and records


@functools.lru_cache(maxsize=4)
def need(plan: RoundPlan) -> int:
    """Bytes that no peer's part of a round exceeds, in either direction."""
    vector = 8 * total_size(plan.layout)
    if plan.encrypted:
        ciphertexts = 1 + -(-total_size(plan.layout) // max(plan.parameters.degree, 1))
        vector += ciphertexts * homomorphic.summed_size(plan.parameters)
        vector += _GRANT * len(plan.cohort)
    if plan.selecting:
        chosen, n = plan.selection, len(plan.cohort)
        each = most_bytes(n * chosen.groups) if chosen.federation else n * most_bytes(chosen.groups)
        vector += chosen.modalities * each
    return 2 * (vector + _PEER * len(plan.cohort) + _ROOM)


@functools.lru_cache(maxsize=4)
def _sampled(terms: RunTerms) -> int:
    return max(need(terms.plan(terms.sample(number))) for number in (1, 2))


class Quota:
    """Of one peer: ``spend`` what it sends, and show what ``came`` and what this end ``said``.

    Args:
        burst: bytes at once, beside rounds.
        now: seconds.
    """

    def __init__(self, burst: int, now: float) -> None:
        self._burst, self._left, self._at = burst, float(burst), now
        self._need = 0
        self._entered, self._terms = (b"", -1), b""
        self._known: bytes | memoryview = b""

    def spend(self, size: int, now: float) -> bool:
        """Take so many bytes; False if the peer has no more."""
        grown = min(self._left + RATE * max(now - self._at, 0.0), self._burst)
        self._left, self._at = max(self._left, grown), now
        if self._left < size:
            return False
        self._left -= size
        return True

    def came(self, message: m.Message | None, data: bytes | memoryview) -> None:
        """What the peer's bytes were."""
        if isinstance(message, m.Plan | m.HelperPlan):
            self._need = need(message.plan)
        if isinstance(message, m.Terms):  # told on every connection: counted once
            if data == self._known:
                self._left += len(data)
            self._known = data

    def said(self, message: m.Message | None) -> None:
        """What this end says: by that it enters rounds."""
        match message:
            case m.Welcome() if message.need_initial:
                self._left += MAX_FRAME
            case m.Terms() if message.terms.digest != self._terms:
                self._terms = message.terms.digest
                self._need = _sampled(message.terms)
                self._left += self._need
            case m.Plan():
                self._need = need(message.plan)
                self._enter(message.plan.run, message.plan.round)
            case m.HelperPlan():
                self._need = need(message.plan)
                self._enter(message.run, message.round)
            case m.LogHead():
                return  # follows what the peer says
            case m.OfRound():
                self._enter(message.run, message.round)

    def _enter(self, run: bytes, number: int) -> None:
        if run != self._entered[0] or number > self._entered[1]:
            self._entered = run, number
            self._left = min(self._left, self._burst + self._need) + self._need  # none piles up
