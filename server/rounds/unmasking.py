"""The server's arithmetic: a running ring sum, and the masks that have to come off it.

Single uploads are added and forgotten. Unmasking reconstructs, from the survivors' shares, the
self-mask seed of every survivor and the mask key of every dropped client, checks each against
what its owner signed, and removes the masks. Masks between two dropped clients are never made:
neither of them is in the sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.protocol import fixedpoint, masking, mersenne, shamir, sum_tag
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import BadShareError
from secure_fedprompt.protocol.expand import add_masks
from secure_fedprompt.protocol.keys import agree
from secure_fedprompt.protocol.layout import total_size
from secure_fedprompt.protocol.mersenne import Elements
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.ring import Integers

_TRIES = 400  # subsets searched for a consistent one when a share is bad, 5 ms each at t = 67


class MaskedSum:
    """Running sums of masked uploads modulo 2^32, uint32 words in layout order, and of their tags
    modulo 2^61 - 1."""

    def __init__(self, plan: RoundPlan) -> None:
        self.plan = plan
        self.words = np.zeros(total_size(plan.layout), np.uint32)
        self.tag = np.zeros(sum_tag.TAGS, np.uint64)

    def add(self, vector: bytes | memoryview, tag: Elements) -> None:
        fixedpoint.add_wire(self.plan.layout, vector, self.words)
        self.tag = mersenne.add(self.tag, tag)

    def unmask(self, plus: list[bytes], minus: list[bytes]) -> Integers:
        """Remove masks (``plus`` were subtracted by clients, ``minus`` were added); the sum."""
        after = add_masks(self.words, plus, minus, sum_tag.MASK)
        self.tag = mersenne.add(self.tag, sum_tag.mask(after, len(plus)))
        return fixedpoint.to_integers(self.plan.layout, self.words)


def reconstruct(
    plan: RoundPlan,
    owner: str,
    shares: Mapping[str, int],
    basis: Sequence[int],
    check: masking.Check,
) -> tuple[bytes, tuple[str, ...]]:
    """A secret from its shares, and the senders of shares that do not belong to it.

    The first ``threshold`` shares are used; if they give something else than the owner committed
    to, other subsets are tried, and every sender off the polynomial that fits is named.

    Args:
        plan: of the round.
        owner: whose secret it is.
        shares: by sender, as integers, at least ``plan.threshold`` of them.
        basis: Lagrange coefficients of the first ``threshold`` senders.
        check: tells whether a candidate is what the owner committed to.

    Raises:
        BadShareError: no subset of the shares gives the committed secret.
    """
    senders, t = list(shares), plan.threshold
    for tried, subset in enumerate(itertools.islice(_subsets(len(senders), t), _TRIES)):
        chosen = [senders[i] for i in subset]
        points = [plan.points[s] for s in chosen]
        weights = shamir.basis(points) if tried else basis
        values = [shares[s] for s in chosen]
        secret = shamir.combine(weights, values)
        if not check(secret):
            continue
        if not tried:
            return secret, ()
        bad = tuple(
            s
            for s in senders
            if shamir.combine(shamir.basis(points, plan.points[s]), values)
            != shamir.to_bytes(shares[s] % shamir.PRIME)
        )
        return secret, bad
    spare = len(senders) - t
    raise BadShareError(
        f"shares of {owner} do not give what it committed to: {owner} dealt bad shares, or of its "
        f"{len(senders)} responders ({', '.join(senders)}) too many lie for {spare} spare shares",
        owner if spare else "",
    )


def _subsets(count: int, size: int) -> Iterator[tuple[int, ...]]:
    """The first ``size`` of ``count``, then all subsets if they are few, else random ones.

    With e liars among ``count`` senders a random subset is honest with probability about
    (1 - size / count)^e, so a few spare shares find a few liars quickly.
    """
    yield tuple(range(size))
    if math.comb(count, size) <= _TRIES:
        yield from itertools.islice(itertools.combinations(range(count), size), 1, None)
        return
    rng = np.random.default_rng(count)  # which subsets are tried needs no secrecy
    while True:
        yield tuple(sorted(rng.permutation(count)[:size].tolist()))


def masks_to_remove(
    plan: RoundPlan,
    adverts: Mapping[str, m.Advert],
    shared: Mapping[str, tuple[str, ...]],
    survivors: Sequence[str],
    reveals: Mapping[str, bytes | memoryview],
) -> tuple[list[bytes], list[bytes], tuple[str, ...]]:
    """Mask keys to add back and to subtract, from the survivors' reveals.

    Args:
        plan: of the round.
        adverts: by name.
        shared: for each client that shared keys, the sorted neighbours that did (itself included):
            the order of the shares in its reveal.
        survivors: whose uploads are in the sum.
        reveals: the shares each responder sent.

    Returns:
        keys whose masks to add, keys whose masks to subtract, names of senders of bad shares.

    Raises:
        BadShareError: a secret cannot be reconstructed.
    """
    shares: dict[str, dict[str, int]] = {name: {} for name in shared}
    for sender, data in reveals.items():
        for i, owner in enumerate(shared[sender]):
            shares[owner][sender] = int.from_bytes(data[32 * i : 32 * i + 32], "little")
    alive = set(survivors)
    bases: dict[tuple[str, ...], list[int]] = {}
    plus: list[bytes] = []
    minus: list[bytes] = []
    liars: set[str] = set()
    for owner, given in shares.items():
        peers = [p for p in shared[owner] if p in alive and p != owner]
        if owner not in alive and not peers:
            continue
        if len(given) < plan.threshold:
            raise BadShareError(
                f"only {len(given)} shares of {owner} arrived, threshold is {plan.threshold}"
            )
        by_sender = {s: given[s] for s in sorted(given, key=liars.__contains__)}
        first = tuple(by_sender)[: plan.threshold]
        if first not in bases:
            bases[first] = shamir.basis([plan.points[s] for s in first])
        advert = adverts[owner]
        if owner in alive:
            check = masking.seed_check(plan, owner, advert.commitment)
            seed, bad = reconstruct(plan, owner, by_sender, bases[first], check)
            minus.append(masking.self_key(plan, owner, seed))
        else:
            check = masking.key_check(advert.mask_key)
            raw, bad = reconstruct(plan, owner, by_sender, bases[first], check)
            secret = X25519PrivateKey.from_private_bytes(raw)
            for peer in peers:
                key = masking.pair_key(
                    plan, owner, peer, agree(secret, adverts[peer].mask_key, peer)
                )
                # The peer added this mask if the owner's name comes after its own.
                (minus if owner > peer else plus).append(key)
        liars.update(bad)
    return plus, minus, tuple(sorted(liars))
