"""Data sets and partitions."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from secure_fedprompt.clients import metrics
from secure_fedprompt.clients.data import generated, partitions, sets
from secure_fedprompt.clients.data.loading import load_part, load_sets
from secure_fedprompt.clients.settings import ClientSettings, DataSettings
from secure_fedprompt.commands.simulate import make_trainers
from secure_fedprompt.protocol.errors import DataError


def test_the_generated_world_is_wide_enough() -> None:
    assert len(generated.STYLES) >= 4
    assert len(set(generated.ALL_CLASSES)) == 256
    names = generated.class_names(24)
    assert len(names) == 24
    for position in range(3):
        assert len({name.split()[position] for name in names}) >= 4


def test_pictures_are_functions_of_class_style_and_seed() -> None:
    one = generated.render("striped red circle", "sketch", 5)
    assert one.shape == (64, 64, 3)
    assert (one == generated.render("striped red circle", "sketch", 5)).all()
    for other in (("striped red circle", "sketch", 6), ("striped red circle", "photo", 5),
                  ("striped blue circle", "sketch", 5), ("dotted red circle", "sketch", 5)):  # fmt: skip
        assert (one != generated.render(*other)).any()


def test_train_and_test_pictures_differ() -> None:
    train, test = sets.generated_sets(4, ["poster"], 3, 3, 0)
    a = {train.image(i).tobytes() for i in range(len(train))}
    assert len(a) == 12
    assert not a & {test.image(i).tobytes() for i in range(len(test))}


def make_folder(root: Path, classes: dict[str, int], shade: int = 0) -> Path:
    for k, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 8), (k * 40, i * 10, shade)).save(root / name / f"{i}.png")
    return root


def test_folders_and_zips_give_the_same(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", {"cat": 4, "dog": 6, "sea_lion": 1})
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, f"top/{path.relative_to(folder)}")
    pairs = [sets.folder_sets(p, None, 0.5, 3) for p in (folder, archive)]
    for (train, test), (train2, test2) in [pairs]:
        assert train.class_names == ("cat", "dog", "sea_lion")
        assert (train.labels == train2.labels).all()
        assert (test.labels == test2.labels).all()
        assert [train.image(i).tobytes() for i in range(len(train))] == [
            train2.image(i).tobytes() for i in range(len(train2))
        ]
        assert np.bincount(test.labels).tolist() == [2, 3]


def test_train_and_test_folders_are_used(tmp_path: Path) -> None:
    make_folder(tmp_path / "d" / "train", {"a": 3, "b": 2})
    make_folder(tmp_path / "d" / "test", {"a": 1, "b": 1}, shade=9)
    train, test = sets.folder_sets(tmp_path / "d", None, 0.3, 0)
    assert (len(train), len(test)) == (5, 2)


def test_labels_follow_their_images_through_subsets(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "d", {"a": 5, "b": 5, "c": 5})
    train, _ = sets.folder_sets(folder, None, 0.2, 0)
    part = train.subset(np.random.default_rng(0).permutation(len(train))[:6])
    for i in range(len(part)):
        assert part.image(i).getpixel((0, 0))[0] == 40 * part.labels[i]  # type: ignore[index]


def packed(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path


def png(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("1", (width, height)).save(data, "png")
    return data.getvalue()


def test_zip_names_are_read_however_they_are_written(tmp_path: Path) -> None:
    small = png(9, 8)
    names = ("./cat/1.png", "cat//2.png", "dog/./1.png", "dog/2.png", "dog/3.png", "cat/3.png")
    path = packed(tmp_path / "d.zip", dict.fromkeys(names, small))
    train, test = sets.folder_sets(path, None, 0.34, 0)
    assert train.class_names == ("cat", "dog")
    assert [train.image(i).size for i in range(len(train))] == [(9, 8)] * 4
    assert len(test) == 2
    for name in ("../cat/1.png", "/cat/1.png"):
        path = packed(tmp_path / "bad.zip", {name: small, "dog/1.png": small})
        with pytest.raises(DataError, match="a path outside of it"):
            sets.folder_sets(path, None, 0.5, 0)
    path = packed(tmp_path / "twice.zip", {"cat/1.png": small, "./cat/1.png": small})
    with pytest.raises(DataError, match="'cat/1.png' twice"):
        sets.folder_sets(path, None, 0.5, 0)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    """A few kilobytes of zip must not take gigabytes of memory."""
    wide, small = png(9_000, 8_000), png(9, 8)
    assert len(wide) < 100_000
    zeros = bytes(sets.MAX_FILE + 1)
    members = {"cat/1.png": wide, "cat/2.png": small, "dog/1.png": zeros, "dog/2.png": small}
    path = packed(tmp_path / "bomb.zip", members)
    assert path.stat().st_size < 400_000
    folder = tmp_path / "folder"
    for name in ("cat/1.png", "cat/2.png", "dog/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(members[name])
    tracemalloc.start()
    for source in (path, folder):
        found = unreadable(source)
        assert "9000 x 8000 pixels, at most" in found["cat/1.png"]
        assert source is folder or "bytes unpacked, at most" in found["dog/1.png"]
        assert not {"cat/2.png", "dog/2.png"} & set(found)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:60] + b"\xff" * 20 + data[80:],  # the compressed stream
        lambda data: with_method(data, 99),  # a compression that nobody knows
    ],
)
def test_damaged_members_are_named(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "png")
    path = packed(tmp_path / "d.zip", {"cat/1.png": data.getvalue(), "dog/1.png": png(9, 8)})
    path.write_bytes(spoil(path.read_bytes()))
    assert "1.png cannot be read" in unreadable(path)["cat/1.png"]


def with_method(data: bytes, method: int) -> bytes:
    at = data.index(b"PK\x01\x02") + 10
    return data[:at] + method.to_bytes(2, "little") + data[at + 2 :]


def unreadable(source: Path) -> dict[str, str]:
    found = {}
    for images in sets.folder_sets(source, None, 0.0, 0):
        for i in range(len(images)):
            try:
                images.image(i)
            except DataError as error:
                found[str(images._keys[i])] = str(error)
    return found


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda p: None, r"dataset = .*: no such file or folder"),
        (lambda p: p.mkdir(), "holds no images"),
        (lambda p: make_folder(p, {"only": 3}), "has one class, 'only'"),
        (lambda p: p.write_bytes(b"PK nonsense"), "not a readable zip"),
    ],
)
def test_bad_folders(tmp_path: Path, prepare: Callable[[Path], object], words: str) -> None:
    path = tmp_path / "data"
    prepare(path)
    with pytest.raises(DataError, match=words):
        load_sets(DataSettings(dataset=str(path)))


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "d", {"a": 2, "b": 2})
    (folder / "a" / "bad.jpg").write_bytes(b"\xff\xd8\xff not a jpeg")
    train, test = sets.folder_sets(folder, None, 0.0, 0)
    with pytest.raises(DataError, match=r"a/bad\.jpg"):
        [images.image(i) for images in (train, test) for i in range(len(images))]


def test_class_list_lets_clients_lack_classes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "d", {"b": 4})
    listed = tmp_path / "classes.txt"
    listed.write_text("a\nb\nc\n")
    train, _ = load_sets(DataSettings(dataset=str(folder), class_list=str(listed)))
    assert train.class_names == ("a", "b", "c")
    assert set(train.labels) == {1}
    listed.write_text("a\nc\n")
    with pytest.raises(DataError, match="folder 'b' is not in the class list"):
        load_sets(DataSettings(dataset=str(folder), class_list=str(listed)))
    listed.write_text("a\na\n")
    with pytest.raises(DataError, match="'a' twice"):
        load_sets(DataSettings(dataset=str(folder), class_list=str(listed)))


def test_torchvision_by_name(tmp_path: Path) -> None:
    """OxfordIIITPet's own files, made here: the real loader reads them."""
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    for split, numbers in (("trainval", range(3)), ("test", range(3, 5))):
        lines = []
        for k, name in enumerate(("Abyssinian", "great_pyrenees")):
            for i in numbers:
                Image.new("RGB", (8, 8), (k * 99, i, 0)).save(base / "images" / f"{name}_{i}.jpg")
                lines.append(f"{name}_{i} {k + 1} 1 1")
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    train, test = load_sets(DataSettings(dataset="OxfordIIITPet", data_root=str(tmp_path)))
    assert train.class_names == ("Abyssinian", "Great Pyrenees")
    assert (len(train), len(test)) == (6, 4)
    assert train.image(3).size == (8, 8)
    with pytest.raises(DataError, match="--download"):
        load_sets(DataSettings(dataset="OxfordIIITPet", data_root=str(tmp_path / "no")))
    with pytest.raises(DataError, match="neither 'generated'"):
        load_sets(DataSettings(dataset="OxfordPet"))


RULES: dict[str, Callable[[np.ndarray, np.ndarray, int, int], list[partitions.Part]]] = {
    "iid": partitions.iid,
    "pathological": partitions.pathological,
    "dirichlet": lambda a, b, n, s: partitions.dirichlet(a, b, n, s, 0.3),
    "domain": lambda a, b, n, s: partitions.by_domain(a, b, n),
    "overlap": lambda a, b, n, s: partitions.overlap(a, b, n, s, 0.3),
    "domain-dirichlet": lambda a, b, n, s: partitions.domain_dirichlet(
        (a, np.arange(len(a)) % 2), (b, np.arange(len(b)) % 2), n, s, 1.0
    ),
}


@pytest.mark.parametrize("rule", RULES)
@given(st.integers(2, 5), st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_partitions_deal_out_everything_once(rule: str, parts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    train, test = rng.integers(0, 8, 400), rng.integers(0, 8, 90)
    shares = RULES[rule](train, test, parts, seed)
    again = RULES[rule](train, test, parts, seed)
    assert len(shares) == parts
    for x in ("train", "test"):
        dealt = np.concatenate([getattr(s, x) for s in shares])
        total = 400 if x == "train" else 90
        if rule != "domain" or parts >= 8:
            assert sorted(dealt.tolist()) == list(range(total))
        assert len(set(dealt.tolist())) == len(dealt)
        for a, b in zip(shares, again, strict=True):
            assert (getattr(a, x) == getattr(b, x)).all()


def test_pathological_classes_are_disjoint_and_test_follows() -> None:
    labels = np.repeat(np.arange(10), 20)
    shares = partitions.pathological(labels, labels, 5, 0)
    seen: set[int] = set()
    for share in shares:
        own = set(labels[share.train].tolist())
        assert own == set(labels[share.test].tolist())
        assert not own & seen
        seen |= own
    with pytest.raises(DataError, match="10 classes for 11"):
        partitions.pathological(labels, labels, 11, 0)


def test_dirichlet_is_skewed_and_keeps_its_promise() -> None:
    labels = np.repeat(np.arange(10), 100)
    shares = partitions.dirichlet(labels, labels, 5, 0, 0.1)
    assert min(len(s.train) for s in shares) >= partitions.MIN_SAMPLES
    largest = [np.bincount(labels[s.train], minlength=10).max() / len(s.train) for s in shares]
    even = [np.bincount(labels[s.train], minlength=10).max() / len(s.train)
            for s in partitions.iid(labels, labels, 5, 0)]  # fmt: skip
    assert np.mean(largest) > 2 * np.mean(even)
    for share in shares:  # test images in the training proportions
        a, b = (np.bincount(labels[x], minlength=10) for x in (share.train, share.test))
        assert np.abs(a - b).max() <= 2
    few = partitions.dirichlet(labels[::5], labels, 20, 0, 0.3)  # ten each, if they were even
    assert min(len(s.train) for s in few) >= 2
    with pytest.raises(DataError, match="4 training images for 5 clients: use fewer"):
        partitions.dirichlet(labels[:4], labels, 5, 0, 0.3)


def test_few_shot_draws_k_of_each_class() -> None:
    labels = np.repeat(np.arange(5), 9)
    index = partitions.few_shot(labels, 4, 1)
    assert np.bincount(labels[index]).tolist() == [4] * 5
    assert (index != partitions.few_shot(labels, 4, 2)).any()
    assert len(partitions.few_shot(labels, 0, 1)) == 45


def test_domain_gives_each_client_one_style() -> None:
    train, _ = load_part(
        DataSettings(per_class=1, test_per_class=1, partition="domain", parts=4, part=2)
    )
    assert set(train.domains.tolist()) == {2}
    with pytest.raises(DataError, match="part = 4"):
        load_part(DataSettings(parts=4, part=4))


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.5, 1.0])
def test_overlap_shares_some_classes_and_deals_out_the_rest(rho: float) -> None:
    labels = np.repeat(np.arange(20), 12)
    shares = partitions.overlap(labels, labels, 4, 0, rho)
    own = [set(labels[s.train].tolist()) for s in shares]
    common = set.intersection(*own)
    assert len(common) == int(rho * 20)
    rest = [classes - common for classes in own]
    assert sum(map(len, rest)) == len(set.union(*own) - common) == 20 - int(rho * 20)
    for share in shares:
        assert set(labels[share.test].tolist()) == set(labels[share.train].tolist())
    with pytest.raises(DataError, match="2 classes beside the shared ones for 4"):
        partitions.overlap(labels, labels, 4, 0, 0.9)


@pytest.mark.parametrize("rule", ["pathological", "dirichlet", "overlap", "domain-dirichlet"])
def test_images_of_a_class_that_nobody_trains_on_are_nobodys(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = np.repeat(np.arange(8), 40), np.tile(np.arange(11), 20)
    monkeypatch.setattr(np, "empty", np.zeros)  # what was never written would name a client
    shares = RULES[rule](train, test, 4, 0)
    dealt = np.concatenate([share.test for share in shares])
    assert sorted(dealt.tolist()) == np.flatnonzero(test < 8).tolist()


def test_domain_dirichlet_keeps_clients_in_their_domain_and_skews_labels() -> None:
    labels, domains = np.tile(np.repeat(np.arange(10), 40), 2), np.repeat([0, 1], 400)
    shares = partitions.domain_dirichlet((labels, domains), (labels, domains), 6, 0, 0.1)
    largest = []
    for k, share in enumerate(shares):
        assert set(domains[share.train].tolist()) == set(domains[share.test].tolist()) == {k % 2}
        largest.append(np.bincount(labels[share.train]).max() / len(share.train))
    assert np.mean(largest) > 0.2
    with pytest.raises(DataError, match="1 clients for 2 domains"):
        partitions.domain_dirichlet((labels, domains), (labels, domains), 1, 0, 0.1)


def test_domain_folders_keep_images_labels_and_domains_together(tmp_path: Path) -> None:
    """Colours tell class and domain: whatever the names and their order, they stay together."""
    rng = np.random.default_rng(3)
    for d, domain in enumerate(("webcam", "amazon", "dslr")):
        for c, name in enumerate(("mug", "bike")):
            folder = tmp_path / "office" / domain / name
            folder.mkdir(parents=True)
            for stem in rng.permutation(1000)[:6]:
                pixels = np.full((8, 8, 3), (40 * d, 100 * c, 7), np.uint8)
                Image.fromarray(pixels).save(folder / f"{stem}.png")
    train, test = sets.folder_sets(tmp_path / "office", None, 0.34, 0)
    assert train.domain_names == ("amazon", "dslr", "webcam")
    assert train.class_names == ("bike", "mug")
    assert len(test) == 12  # two of six in each class of each domain
    truth_d, truth_c = {0: "webcam", 1: "amazon", 2: "dslr"}, {0: "mug", 1: "bike"}
    for part in (train, test, train.subset(rng.permutation(len(train))[:9])):
        for i in range(len(part)):
            red, green, _ = part.image(i).getpixel((0, 0))  # type: ignore[misc]
            assert part.domain_names[part.domains[i]] == truth_d[red // 40]
            assert part.class_names[part.labels[i]] == truth_c[green // 100]
    assert len(set(test.domains.tolist())) == 3


def test_base_and_novel_halves_split_the_sorted_names() -> None:
    train, _ = load_sets(DataSettings(generated_classes=9, per_class=2, test_per_class=1))
    base, novel = (
        load_sets(DataSettings(generated_classes=9, per_class=2, test_per_class=1, classes=half))
        for half in ("base", "novel")
    )
    names = sorted(train.class_names)
    assert base[0].class_names == base[1].class_names == tuple(names[:5])
    assert novel[1].class_names == tuple(names[5:])
    assert len(base[0]) + len(novel[0]) == len(train)
    for half in (base, novel):
        for i in range(0, len(half[0]), 7):
            name = half[0].class_names[half[0].labels[i]]
            whole = [j for j in range(len(train)) if train.class_names[train.labels[j]] == name]
            pixels = np.asarray(half[0].image(i))
            assert any(np.array_equal(pixels, np.asarray(train.image(j))) for j in whole)


def test_figures() -> None:
    labels, guesses = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    assert metrics.accuracy(labels, guesses) == 0.6
    expected = np.mean([2 * 1 / (2 + 2), 2 * 2 / (2 + 3), 0])
    assert np.isclose(metrics.macro_f1(labels, guesses), expected)
    assert np.isclose(metrics.harmonic_mean(0.6, 0.3), 0.4)
    assert metrics.harmonic_mean(0, 0) == 0
    assert np.isclose(metrics.combined_mean(0.8, 0.6, 0.3), 0.6)


def test_a_share_without_images_is_told_before_anything_is_loaded() -> None:
    images = sets.generated_sets(3, ["sketch"], 2, 2, 0)
    shares = [partitions.Part(np.arange(n), np.arange(n)) for n in (6, 0)]
    settings = ClientSettings(dataset="generated")
    with pytest.raises(DataError, match=r"1 of 2 clients have no training image, client001 first"):
        make_trainers(settings, None, (*images, shares))
