"""Pachinko allocation: label shift over a tree of labels, for CIFAR-100.

Reddi et al., "Adaptive Federated Optimization" (ICLR 2021), appendix on CIFAR-100: each client has
one distribution over the 20 coarse labels, Dir(alpha), and for each of them one over its five fine
ones, Dir(10). It draws its images one by one, without replacement; what is used up is left out, and
the rest renormalised. Test images follow the training proportions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.clients.data.partitions import Index, Part, spread
from secure_fedprompt.protocol.errors import DataError

LEAVES = 10.0
COARSE = {  # Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009)
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}


def coarse_labels(names: tuple[str, ...]) -> NDArray[np.int64]:
    """The coarse label of each class.

    Raises:
        DataError: a class is none of CIFAR-100's.
    """
    known = {fine: i for i, fines in enumerate(COARSE.values()) for fine in fines.split()}
    spelled = [name.replace(" ", "_") for name in names]
    if strange := [name for name in spelled if name not in known]:
        raise DataError(
            f"partition 'pachinko': {strange[0]!r} is no class of CIFAR-100, whose labels have a "
            "tree: use dirichlet"
        )
    return np.array([known[name] for name in spelled])


def pachinko(
    train: Index, test: Index, coarse: NDArray[np.int64], parts: int, seed: int, alpha: float
) -> list[Part]:
    """See the module.

    Args:
        train, test: fine labels; coarse: of each fine one; alpha: of the root.

    Raises:
        DataError: fewer images than clients.
    """
    if len(train) < parts:
        raise DataError(f"partition 'pachinko': {len(train)} training images for {parts} clients")
    rng = np.random.default_rng([seed, 7])
    pools = [list(rng.permutation(np.flatnonzero(train == c))) for c in range(len(coarse))]
    taken = np.zeros((parts, len(coarse)), np.int64)
    owner = np.full(len(train), -1)
    for client in range(parts):
        share = len(train) // parts + (client < len(train) % parts)
        root = rng.dirichlet(np.full(int(coarse.max()) + 1, alpha))
        leaf = np.zeros(len(coarse))
        for c in np.unique(coarse):
            leaf[coarse == c] = rng.dirichlet(np.full(int((coarse == c).sum()), LEAVES))
        for _ in range(share):
            label = _draw(rng, root, leaf, coarse, np.array([len(pool) > 0 for pool in pools]))
            owner[pools[label].pop()] = client
            taken[client, label] += 1
    dealt = _follow(rng, test, taken)
    return [Part(np.flatnonzero(owner == k), np.flatnonzero(dealt == k)) for k in range(parts)]


def _draw(
    rng: np.random.Generator,
    root: NDArray[np.float64],
    leaf: NDArray[np.float64],
    coarse: NDArray[np.int64],
    left: NDArray[np.bool_],
) -> int:
    """A fine label of which images are left: down the tree, with what is used up left out."""
    weight = np.where(left, leaf, 0.0)
    branch = np.bincount(coarse, weight, len(root))
    top = np.where(branch > 0, root, 0.0)
    if not top.sum():  # its branches are all used up
        top = (branch > 0).astype(np.float64)
    chosen = int(rng.choice(len(root), p=top / top.sum()))
    below = np.where(coarse == chosen, weight, 0.0)
    return int(rng.choice(len(leaf), p=below / below.sum()))


def _follow(rng: np.random.Generator, test: Index, taken: NDArray[np.int64]) -> Index:
    """Owners of test images, each class in the proportions of its training images."""
    owner = np.empty(len(test), np.int64)
    for label in np.unique(test):
        counts = taken[:, label]
        share = counts / counts.sum() if counts.sum() else np.full(len(counts), 1 / len(counts))
        for client, chosen in enumerate(spread(rng, test, label, share)):
            owner[chosen] = client
    return owner
