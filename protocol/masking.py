"""Pairwise masking: who is paired with whom, and the keys and shares of one client in a round.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017),
with the k-regular graph of Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead" (CCS 2020) for large cohorts. Client i uploads

    x_i + PRG(b_i) + sum_{j > i} PRG(s_ij) - sum_{j < i} PRG(s_ij)   mod 2^b

over its neighbours j. The server may learn b_i of a survivor or the key of a dropped client,
never both.
"""

from __future__ import annotations

import functools
import hmac
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.protocol import shamir
from secure_fedprompt.protocol.errors import PlanError
from secure_fedprompt.protocol.expand import Purpose, derive, digest, keystream
from secure_fedprompt.protocol.keys import agree
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.shamir import Entropy

Check = Callable[[bytes], bool]
SHARE = 64  # bytes of a share of both secrets


class Graph(Mapping[str, tuple[str, ...]]):
    """For every client its sorted closed neighbourhood: itself and those it is paired with.

    The k-regular graph is a ring lattice over a permutation that the plan's seed fixes. ``places``
    are those on the ring, so that a neighbourhood is a run of them; the cohort's order on the
    complete graph.
    """

    def __init__(self, plan: RoundPlan) -> None:
        n, self._plan = len(plan.cohort), plan
        self._ring = np.arange(n)  # the client at each place
        if plan.degree:
            stream = keystream(derive(plan.graph_seed, Purpose.GRAPH, plan.run), 16 * n)
            halves = np.frombuffer(stream, ">u8").reshape(n, 2)
            self._ring = np.lexsort((self._ring, halves[:, 1], halves[:, 0]))
        self._places = np.argsort(self._ring)

    def place(self, name: str) -> int:
        """From 0; KeyError if the client is not in the cohort."""
        return int(self._places[self._plan.points[name] - 1])

    @property
    def ring(self) -> tuple[str, ...]:
        """Names by place."""
        return tuple(self._plan.cohort[i] for i in self._ring.tolist())

    def __getitem__(self, name: str) -> tuple[str, ...]:
        plan, place, half = self._plan, self.place(name), self._plan.degree // 2
        if not half:
            return plan.cohort
        return self._run(place - half, place + half + 1)

    def boxed(self, dealer: str) -> tuple[str, ...]:
        """To whom a dealer seals shares: those next before it on the ring. The threshold - 1 others
        of its neighbourhood draw theirs."""
        place = self.place(dealer)
        return self._run(place - self.boxes, place)

    def boxers(self, recipient: str) -> tuple[str, ...]:
        """Inverse of ``boxed``: who seals shares for a recipient."""
        place = self.place(recipient)
        return self._run(place + 1, place + 1 + self.boxes)

    @property
    def boxes(self) -> int:
        """How many a dealer seals, and a recipient gets, if everybody is there."""
        size = self._plan.degree + 1 if self._plan.degree else len(self)
        return size - self._plan.threshold

    def _run(self, start: int, stop: int) -> tuple[str, ...]:
        """Who is at these places, in name order."""
        found = np.sort(self._ring.take(range(start, stop), mode="wrap"))
        return tuple([self._plan.cohort[i] for i in found.tolist()])

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.cohort)

    def __len__(self) -> int:
        return len(self._plan.cohort)


@functools.lru_cache(maxsize=8)
def neighbourhoods(plan: RoundPlan) -> Graph:
    """The graph of a plan."""
    return Graph(plan)


def _log_choose(n: int, k: int) -> float:
    if not 0 <= k <= n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _tail(population: int, marked: int, draws: int, at_least: int) -> float:
    """log2 of P[X >= at_least] for a hypergeometric X."""
    every = _log_choose(population, draws)
    terms = [
        _log_choose(marked, i) + _log_choose(population - marked, draws - i) - every
        for i in range(max(0, at_least), min(marked, draws) + 1)
    ]
    top = max(terms, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return (top + math.log(sum(math.exp(t - top) for t in terms))) / math.log(2)


@functools.lru_cache(maxsize=64)
def choose_degree(
    clients: int, *, dropout: float, corruption: float, sigma: int = 40, eta: int = 30
) -> tuple[int, int]:
    """Smallest even degree k and a threshold t for a k-regular graph (Bell et al., section 3).

    The server is honest-but-curious and may collude with a share ``corruption`` of the clients.
    Union bounds over all clients give, except with probability 2^-sigma, that no neighbourhood
    holds t colluders and that the honest survivors stay connected (k/2 consecutive clients of the
    lattice would have to fail), and, except with 2^-eta, that t of each neighbourhood survive.

    Raises:
        PlanError: no degree below n - 1 is enough; use the complete graph.
    """
    bad, gone = math.ceil(corruption * clients), math.ceil(dropout * clients)
    union = math.log2(clients)
    lost = (bad + gone) / clients
    for k in range(2, clients - 1, 2):
        if union + k / 2 * math.log2(lost) > -sigma if lost else False:
            continue
        for t in range(k // 2 + 2, k + 1):  # see docs/regular-graph.md on arcs
            safe = union + _tail(clients - 1, bad, k, t) <= -sigma
            alive = union + _tail(clients - 1, gone, k, k - t + 1) <= -eta
            if safe and alive:
                return k, t
    raise PlanError(
        f"no k-regular graph of {clients} clients tolerates {dropout:.0%} dropout and "
        f'{corruption:.0%} collusion at sigma {sigma}, eta {eta}: use graph = "complete"'
    )


def commitment(plan: RoundPlan, name: str, self_seed: bytes) -> bytes:
    """H(b): binds a client to its self-mask seed, which is a uniform field element."""
    return digest(Purpose.SELF_COMMITMENT, plan.digest, name.encode(), self_seed)


def seed_check(plan: RoundPlan, name: str, committed: bytes) -> Check:
    """Tests a reconstructed self-mask seed against the signed H(b)."""
    return lambda seed: hmac.compare_digest(commitment(plan, name, seed), committed)


def key_check(mask_key: bytes) -> Check:
    """Tests a reconstructed mask key against the signed public key."""

    def check(raw: bytes) -> bool:
        public = X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw()
        return hmac.compare_digest(public, mask_key)

    return check


def self_key(plan: RoundPlan, name: str, self_seed: bytes) -> bytes:
    return derive(self_seed, Purpose.SELF_MASK, plan.digest, name.encode())


def pair_key(plan: RoundPlan, one: str, other: str, shared: bytes) -> bytes:
    """Key of the mask between two clients; the same on both sides."""
    first, second = sorted((one, other))
    return derive(shared, Purpose.PAIR_MASK, plan.digest, first.encode(), second.encode())


def seal_key(plan: RoundPlan, sender: str, recipient: str, shared: bytes) -> bytes:
    """Key of the one box from ``sender`` to ``recipient`` in this round."""
    return derive(shared, Purpose.SHARE_SEAL, plan.digest, sender.encode(), recipient.encode())


def drawn_share(plan: RoundPlan, dealer: str, recipient: str, shared: bytes) -> bytes:
    """Shares of a mask key and a self-mask seed that both draw from what they have agreed on."""
    names = dealer.encode(), recipient.encode()
    return shamir.drawn(derive(shared, Purpose.DRAWN_SHARE, plan.digest, *names, size=SHARE))


def seal_context(plan: RoundPlan, sender: str, recipient: str) -> bytes:
    """Associated data of that box."""
    names = b"\0".join((sender.encode(), recipient.encode()))
    return plan.run + plan.round.to_bytes(4, "little") + names


def grant_key(plan: RoundPlan, recipient: str, shared: bytes) -> bytes:
    """Key of the box in which the maker sends the cohort key to ``recipient`` in this round."""
    names = plan.maker.encode(), recipient.encode()
    return derive(shared, Purpose.KEY_GRANT, plan.digest, *names)


def private_key(entropy: Entropy) -> tuple[bytes, X25519PrivateKey]:
    """A fresh X25519 key whose bytes are a field element: bit 255, which X25519 ignores, is 0."""
    raw = bytearray(entropy(32))
    raw[31] &= 0x7F
    return bytes(raw), X25519PrivateKey.from_private_bytes(bytes(raw))


@dataclass(frozen=True, repr=False)
class RoundSecrets:
    """A client's secrets of one round: fresh, never stored, never printed."""

    seal: X25519PrivateKey
    mask: X25519PrivateKey
    mask_bytes: bytes
    self_seed: bytes
    rounding: bytes

    @classmethod
    def fresh(cls, entropy: Entropy) -> RoundSecrets:
        _, seal = private_key(entropy)
        mask_bytes, mask = private_key(entropy)
        return cls(seal, mask, mask_bytes, shamir.random_element(entropy), entropy(32))

    def pair_key(self, plan: RoundPlan, own: str, peer: str, mask_public: bytes) -> bytes:
        return pair_key(plan, own, peer, agree(self.mask, mask_public, peer))

    def __repr__(self) -> str:
        return "RoundSecrets(<private>)"
