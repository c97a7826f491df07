"""Splits as published code makes them, where ours differ on purpose."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from secure_fedprompt.clients.data import pachinko, partitions
from secure_fedprompt.clients.data.loading import load_sets, load_shares
from secure_fedprompt.clients.settings import DataSettings
from secure_fedprompt.protocol.errors import DataError


def hands(shares: list[partitions.Part], labels: np.ndarray) -> list[set[int]]:
    return [set(labels[share.train].tolist()) for share in shares]


@pytest.mark.parametrize(
    ("classes", "parts", "sizes"),
    [
        (10, 4, [2, 2, 2, 4]),
        (11, 3, [4, 4, 3]),
        (37, 10, [4] * 9 + [1]),
        (102, 10, [10] * 9 + [12]),
    ],
)
def test_official_hands_are_rounded_and_the_last_takes_the_rest(
    classes: int, parts: int, sizes: list[int]
) -> None:
    labels = np.repeat(np.arange(classes), 3)
    official = hands(partitions.pathological(labels, labels, parts, 5, official=True), labels)
    assert [len(hand) for hand in official] == sizes
    assert set.union(*official) == set(range(classes))
    assert sum(map(len, official)) == classes
    even = hands(partitions.pathological(labels, labels, parts, 5), labels)
    assert max(map(len, even)) - min(map(len, even)) <= 1
    assert official[0] <= even[0] | even[1]  # one order of the classes, cut in other places


def test_an_official_hand_that_would_be_empty_is_refused() -> None:
    labels = np.repeat(np.arange(11), 3)
    with pytest.raises(DataError, match="11 classes for 7 clients"):  # 2 each, and -1 for the last
        partitions.pathological(labels, labels, 7, 0, official=True)
    assert len(partitions.pathological(labels, labels, 7, 0)) == 7


def test_official_dirichlet_leaves_nobody_without_ten_test_images() -> None:
    train, test = np.repeat(np.arange(10), 60), np.repeat(np.arange(10), 20)
    fewest = {
        official: [
            min(len(s.test) for s in partitions.dirichlet(train, test, 8, seed, 0.1, official=official))
            for seed in range(12)
        ]
        for official in (False, True)
    }  # fmt: skip
    assert min(fewest[True]) >= 10
    assert min(fewest[False]) < 10


def test_official_halves_go_by_the_order_of_labels() -> None:
    settings = DataSettings(generated_classes=6, per_class=1, test_per_class=1, styles="photo")
    whole, _ = load_sets(settings)
    backwards = whole.renamed(tuple(sorted(whole.class_names, reverse=True)))
    assert backwards.half("base").class_names == tuple(sorted(whole.class_names)[:3])
    assert backwards.half("base", official=True).class_names == backwards.class_names[:3]
    assert backwards.half("novel", official=True).class_names == backwards.class_names[3:]
    for style in ("even", "official"):
        chosen = msgspec.structs.replace(settings, classes="novel", partition_style=style)
        assert load_sets(chosen)[0].class_names == whole.class_names[3:]


def test_the_style_reaches_the_shares() -> None:
    settings = DataSettings(generated_classes=10, per_class=4, test_per_class=2, styles="photo",
                            parts=4, partition="pathological", partition_style="official")  # fmt: skip
    train, _, shares = load_shares(settings)
    assert [len(hand) for hand in hands(shares, train.labels)] == [2, 2, 2, 4]


def test_the_tree_of_cifar_100_is_whole() -> None:
    names = tuple(" ".join(pachinko.COARSE.values()).split())
    assert len(set(names)) == 100
    assert set(map(len, map(str.split, pachinko.COARSE.values()))) == {5}
    spoken = tuple(name.replace("_", " ") for name in sorted(names))
    coarse = pachinko.coarse_labels(spoken)
    assert np.bincount(coarse).tolist() == [5] * 20
    assert coarse[sorted(names).index("shark")] == 1
    with pytest.raises(DataError, match="'red_ring' is no class of CIFAR-100"):
        pachinko.coarse_labels(("shark", "red ring"))


def test_pachinko_keeps_to_a_few_branches_and_deals_out_everything_once() -> None:
    names = tuple(" ".join(pachinko.COARSE.values()).split())
    coarse = pachinko.coarse_labels(names)
    train, test = np.repeat(np.arange(100), 20), np.repeat(np.arange(100), 4)
    shares = pachinko.pachinko(train, test, coarse, 20, 0, 0.1)
    for which, total in (("train", 2000), ("test", 400)):
        dealt = np.concatenate([getattr(share, which) for share in shares])
        assert sorted(dealt.tolist()) == list(range(total))
    assert {len(share.train) for share in shares} == {100}

    def widest(shares: list[partitions.Part], tree: np.ndarray) -> float:
        return float(
            np.mean([np.bincount(tree[train[s.train]]).max() / len(s.train) for s in shares])
        )

    flat = pachinko.pachinko(train, test, coarse, 20, 0, 100.0)
    assert widest(shares, coarse) > 3 * widest(flat, coarse)
    own = [np.bincount(train[s.train], minlength=100) for s in shares[:5]]
    for counts in own:  # within a branch the leaves are nearly even, Dir(10)
        top = np.argmax(np.bincount(coarse, counts))
        assert (counts[coarse == top] > 0).all()
    for share in shares:  # test images in the training proportions
        a = np.bincount(train[share.train], minlength=100) / 20
        b = np.bincount(test[share.test], minlength=100) / 4
        assert np.abs(a - b).max() <= 0.3
    again = pachinko.pachinko(train, test, coarse, 20, 0, 0.1)
    assert all((x.train == y.train).all() for x, y in zip(shares, again, strict=True))
