"""Which client holds which images: the splits of the literature.

Each rule deals out training and test images together, so that a client is tested on the
distribution it trains on; test images of a class that nobody trains on are nobody's, except under
``iid`` and ``domain``, which look at no class. All rules are deterministic in their seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol.errors import DataError

Index = NDArray[np.int64]
MIN_SAMPLES = 10  # of every client under Dirichlet
NOBODY = -1
_TRIES = 1000


@dataclass(frozen=True)
class Part:
    """Indices into the training and test set."""

    train: Index
    test: Index


def few_shot(labels: Index, shots: int, seed: int) -> Index:
    """At most ``shots`` indices per class, drawn by seed; all if ``shots`` is 0."""
    if not shots:
        return np.arange(len(labels))
    rng = np.random.default_rng([seed, 2])
    picks = [
        rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(picks))


def iid(train: Index, test: Index, parts: int, seed: int) -> list[Part]:
    """Disjoint random slices of equal size."""
    rng = np.random.default_rng([seed, 3])
    slices = [np.array_split(rng.permutation(len(x)), parts) for x in (train, test)]
    return [Part(np.sort(a), np.sort(b)) for a, b in zip(*slices, strict=True)]


def pathological(
    train: Index, test: Index, parts: int, seed: int, *, official: bool = False
) -> list[Part]:
    """Classes shuffled by seed and dealt out: no class is at two clients.

    Args:
        official: round(C / n) classes each, and to the last what is left, as FedOTP's code has it;
            else as evenly as it goes.

    Raises:
        DataError: fewer classes than clients, or none for the last.
    """
    classes = np.unique(train)
    each = round(len(classes) / parts) if official else 1
    if len(classes) < parts or each * (parts - 1) >= len(classes):
        raise DataError(f"partition 'pathological': {len(classes)} classes for {parts} clients")
    order = np.random.default_rng([seed, 4]).permutation(classes)
    cuts = [each * k for k in range(1, parts)]
    hands = np.split(order, cuts) if official else np.array_split(order, parts)
    return [
        Part(np.flatnonzero(np.isin(train, hand)), np.flatnonzero(np.isin(test, hand)))
        for hand in hands
    ]


def overlap(train: Index, test: Index, parts: int, seed: int, rho: float) -> list[Part]:
    """floor(rho C) classes are shared, their images dealt out; the rest is disjoint.

    Raises:
        DataError: fewer disjoint classes than clients.
    """
    rng = np.random.default_rng([seed, 6])
    classes = rng.permutation(np.unique(train))
    shared, rest = np.split(classes, [int(rho * len(classes))])
    if len(rest) < parts and rho < 1:
        raise DataError(
            f"partition 'overlap': {len(rest)} classes beside the shared ones for {parts} clients: "
            "use a smaller rho or fewer clients"
        )
    owners = []
    for labels in (train, test):
        owner = np.full(len(labels), NOBODY)
        for client, hand in enumerate(np.array_split(rest, parts)):
            owner[np.isin(labels, hand)] = client
        for number, label in enumerate(shared):
            index = rng.permutation(np.flatnonzero(labels == label))
            owner[index] = (np.arange(len(index)) + number) % parts
        owners.append(owner)
    return [Part(*(np.flatnonzero(owner == k) for owner in owners)) for k in range(parts)]


def spread(
    rng: np.random.Generator, labels: Index, label: int, share: NDArray[np.float64]
) -> list[Index]:
    """One class's indices, shuffled and cut in the proportions ``share``, which sum to one."""
    index = rng.permutation(np.flatnonzero(labels == label))
    return np.split(index, np.round(np.cumsum(share)[:-1] * len(index)).astype(int))


def dirichlet(
    train: Index, test: Index, parts: int, seed: int, beta: float, *, official: bool = False
) -> list[Part]:
    """Label shift: each class is spread with proportions ~ Dir(beta), Hsu et al. 2019.

    A client that already holds N / K training images gets no more of later classes, and the draw
    is repeated until every client has at least ``MIN_SAMPLES``, or a quarter of an even share if
    that is less. Test images follow the training proportions.

    Args:
        official: every client must have ten test images as well.

    Raises:
        DataError: too few images for that.
    """
    if len(train) < parts:
        raise DataError(
            f"partition 'dirichlet': {len(train)} training images for {parts} clients: use fewer"
        )
    least = max(1, min(MIN_SAMPLES, len(train) // (4 * parts)))
    rng = np.random.default_rng([seed, 5])
    classes = np.unique(train)
    for _ in range(_TRIES):
        owners = np.full(len(train), NOBODY), np.full(len(test), NOBODY)
        held = np.zeros(parts)
        for label in rng.permutation(classes):
            share = rng.dirichlet(np.full(parts, beta)) * (held < len(train) / parts)
            share = share / share.sum() if share.sum() > 0 else np.full(parts, 1 / parts)
            for labels, owner in zip((train, test), owners, strict=True):
                for client, chosen in enumerate(spread(rng, labels, label, share)):
                    owner[chosen] = client
                    held[client] += len(chosen) if labels is train else 0
        tested = np.bincount(owners[1][owners[1] != NOBODY], minlength=parts)
        if held.min() >= least and not (official and tested.min() < MIN_SAMPLES):
            return [Part(*(np.flatnonzero(owner == k) for owner in owners)) for k in range(parts)]
    raise DataError(
        f"partition 'dirichlet': no draw of beta {beta} gave each of {parts} clients "
        f"{least} images: use a larger beta, fewer clients or more images"
    )


def by_domain(train: Index, test: Index, parts: int) -> list[Part]:
    """One domain per client; further clients share the domains, round robin, in slices.

    Args:
        train, test: domain of each image, not its label.
    """
    domains = int(max(train.max(initial=0), test.max(initial=0))) + 1
    result = []
    for k in range(parts):
        sharers = len(range(k % domains, parts, domains))
        own = [np.flatnonzero(x == k % domains)[k // domains :: sharers] for x in (train, test)]
        result.append(Part(*own))
    return result


def domain_dirichlet(
    train: tuple[Index, Index], test: tuple[Index, Index], parts: int, seed: int, beta: float
) -> list[Part]:
    """Feature and label shift: clients of one domain share it with Dirichlet label proportions.

    Args:
        train, test: labels and domains.

    Raises:
        DataError: fewer clients than domains, or too few images.
    """
    domains = int(max(train[1].max(initial=0), test[1].max(initial=0))) + 1
    if parts < domains:
        raise DataError(
            f"partition 'domain-dirichlet': {parts} clients for {domains} domains: use more clients"
        )
    result: dict[int, Part] = {}
    for domain in range(domains):
        clients = list(range(domain, parts, domains))
        rows = [np.flatnonzero(side[1] == domain) for side in (train, test)]
        labels = [side[0][own] for side, own in zip((train, test), rows, strict=True)]
        shares = dirichlet(labels[0], labels[1], len(clients), seed + domain, beta)
        for client, share in zip(clients, shares, strict=True):
            result[client] = Part(rows[0][share.train], rows[1][share.test])
    return [result[k] for k in range(parts)]
