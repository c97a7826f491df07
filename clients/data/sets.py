"""Labelled image sets: generated, folders, zip files, and torchvision's by name."""

from __future__ import annotations

import inspect
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from secure_fedprompt.clients.data import generated
from secure_fedprompt.clients.data.images import (
    SUFFIXES,
    UNREADABLE,
    from_pixels,
    open_image,
    reason,
    to_rgb,
)
from secure_fedprompt.protocol.errors import DataError

Index = NDArray[np.int64]
MAX_FILE = 256_000_000  # bytes of an image file that is packed in a zip
_TEST_SPLITS = ("test", "val", "valid", "validation", "dev")  # in this order
_SPLIT_NAMES = ("train", *_TEST_SPLITS)


@dataclass(frozen=True)
class ImageSet:
    """Images with labels; nothing is decoded until ``image`` is called.

    Attributes:
        class_names: what labels index.
        labels, domains: (N,) int64; ``domains`` are zeros where there is one.
        domain_names: what domains index.
        note: what its user should know of how it was read.
    """

    class_names: tuple[str, ...]
    labels: Index
    domains: Index
    domain_names: tuple[str, ...]
    _keys: Sequence[Any]
    _open: Callable[[Any], Image.Image]
    note: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_arrays(
        cls,
        images: Sequence[Any],
        labels: Sequence[int] | Index,
        class_names: Sequence[str],
        domains: Sequence[str] | None = None,
    ) -> ImageSet:
        """Your own images.

        Args:
            images: PIL images, or arrays as ``images.from_pixels`` takes them: (N, H, W, 3) or N of
                any sizes. They are not copied.
            labels: (N,), indices into ``class_names``.
            class_names: what a prompt calls the classes, all of them different.
            domains: (N,) names of the domains, where there are several.

        Raises:
            DataError: naming the argument and what is wrong with it.
        """
        names = tuple(map(str, class_names))
        if not names or len(set(names)) < len(names):
            raise DataError(f"class_names: {len(names)} names, at least one and no name twice")
        found = np.asarray(labels)
        if found.shape != (len(images),) or found.dtype.kind not in "iu":
            raise DataError(
                f"labels: {found.dtype} of shape {found.shape}, {len(images)} integers expected"
            )
        if len(wrong := np.flatnonzero((found < 0) | (found >= len(names)))):
            i = int(wrong[0])
            raise DataError(f"labels[{i}] = {found[i]}: must be 0 to {len(names) - 1}")
        given = ["all"] * len(found) if domains is None else list(map(str, domains))
        if len(given) != len(found):
            raise DataError(f"domains: {len(given)} for {len(found)} images")
        kinds = sorted(set(given))
        places = np.array([kinds.index(domain) for domain in given], np.int64)
        return cls(names, found.astype(np.int64), places, tuple(kinds), range(len(found)),
                   lambda i: _picture(images[i]))  # fmt: skip

    @classmethod
    def from_dataset(cls, dataset: Any, class_names: Sequence[str] | None = None) -> ImageSet:
        """A map-style PyTorch data set of (image, label), which is decoded when it is needed.

        Args:
            dataset: images are as in ``from_arrays``, or tensors (3, H, W) of them; leave out
                transforms that normalise. Labels are read from its ``targets``, or one by one.
            class_names: else its ``classes``.

        Raises:
            DataError: it has no names, or wrong labels.
        """
        names = class_names if class_names is not None else getattr(dataset, "classes", None)
        if names is None:
            raise DataError("class_names: the data set has no 'classes', give their names")
        labels = _labels_of(dataset)
        if labels is None:
            labels = [int(dataset[i][1]) for i in range(len(dataset))]
        made = cls.from_arrays(range(len(labels)), np.asarray(labels), names)
        return replace(made, _open=lambda i: _picture(dataset[i][0]))

    def image(self, i: int) -> Image.Image:
        """The i-th image as RGB.

        Raises:
            DataError: it cannot be decoded; names the file.
        """
        key = self._keys[i]
        try:
            return to_rgb(self._open(key))
        except UNREADABLE as error:
            why = reason(error)
            raise DataError(f"image {key} cannot be read: {why}; repair or remove it") from None

    def unreadable(self, progress: Callable[[str, int, int], None]) -> dict[int, str]:
        """Images that cannot be decoded, and why: every file is opened."""
        if not len(self) or not isinstance(self._keys[0], PurePosixPath):
            return {}  # no files of the user's

        def fault(i: int) -> str:
            try:
                self.image(i)
            except DataError as error:
                return str(error)
            return ""

        found: dict[int, str] = {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for i, text in enumerate(pool.map(fault, range(len(self)))):
                progress("opening images", i + 1, len(self))
                if text:
                    found[i] = text
        return found

    def subset(self, index: Index) -> ImageSet:
        """Images, labels and domains together."""
        keys = [self._keys[i] for i in index]
        return replace(self, labels=self.labels[index], domains=self.domains[index], _keys=keys)

    def half(self, which: str, *, official: bool = False) -> ImageSet:
        """The images of the "base" or "novel" classes, the halves of the sorted names, or of the
        data set's own order of labels as CoOp's code has it (``official``)."""
        names = list(self.class_names) if official else sorted(self.class_names)
        cut = -(-len(names) // 2)
        kept = tuple(names[:cut] if which == "base" else names[cut:])
        number = {name: i for i, name in enumerate(kept)}
        rows = np.array(
            [i for i, label in enumerate(self.labels) if self.class_names[label] in number],
            np.int64,
        )
        return self.subset(rows).renamed(kept)

    def renamed(self, names: tuple[str, ...]) -> ImageSet:
        """The same images under another list of class names, which must hold all of theirs."""
        number = {name: i for i, name in enumerate(names)}
        labels = np.array([number[self.class_names[label]] for label in self.labels], np.int64)
        return replace(self, class_names=names, labels=labels)


def _picture(image: Any) -> Image.Image:
    """An image of the user's own, whatever it is."""
    if isinstance(image, Image.Image):
        return image
    if hasattr(image, "detach"):  # a tensor
        image = image.detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    return from_pixels(np.asarray(image))


def _labels_of(data: Any) -> Any:
    """The labels of a data set in PyTorch's habit, or None."""
    names = ("_labels", "targets", "labels", "y")
    return next((getattr(data, name) for name in names if hasattr(data, name)), None)


def _generated(
    names: tuple[str, ...], styles: tuple[str, ...], per_class: int, seed: int
) -> ImageSet:
    pixels, labels, domains = generated.pictures(names, styles, per_class, seed)
    return ImageSet(names, labels, domains, styles, list(pixels), Image.fromarray)


def generated_sets(
    classes: int, styles: Sequence[str], train_per_class: int, test_per_class: int, seed: int
) -> tuple[ImageSet, ImageSet]:
    """Train and test pictures of the generated world; ``per_class`` counts each style.

    Raises:
        DataError: unknown style or number of classes.
    """
    if unknown := set(styles) - set(generated.STYLES):
        raise DataError(f"styles {sorted(unknown)}: must be among {', '.join(generated.STYLES)}")
    try:
        names = generated.class_names(classes)
    except ValueError as error:
        raise DataError(str(error)) from None
    base = 20_000 + 2 * seed  # far from the seeds that the bundled CLIP was trained on
    train = _generated(names, tuple(styles), train_per_class, base)
    return train, _generated(names, tuple(styles), test_per_class, base + 1)


@dataclass(frozen=True)
class _Source:
    """Paths of a folder or a zip file, with one way to open them."""

    where: str
    paths: list[PurePosixPath]
    open: Callable[[PurePosixPath], Image.Image]


def _folder(path: Path) -> _Source:
    files = [PurePosixPath(p.relative_to(path).as_posix()) for p in path.rglob("*") if p.is_file()]

    def open_file(name: PurePosixPath) -> Image.Image:
        return open_image(path / name, name.suffix.lower())

    return _Source(str(path), sorted(files), open_file)


def _zip(path: Path) -> _Source:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"data set {path} is not a readable zip file: {error}") from None
    members: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = PurePosixPath(info.filename)  # without "./" and "//"
        if info.is_dir():
            continue
        if name.is_absolute() or ".." in name.parts:
            raise DataError(f"data set {path}: {info.filename!r} is a path outside of it")
        if name in members:
            raise DataError(f"data set {path} holds {str(name)!r} twice")
        members[name] = info

    def open_member(name: PurePosixPath) -> Image.Image:
        info = members[name]
        if info.file_size > MAX_FILE:
            raise ValueError(f"{info.file_size:,} bytes unpacked, at most {MAX_FILE:,}")
        return open_image(io.BytesIO(archive.read(info)), name.suffix.lower())

    return _Source(str(path), sorted(members), open_member)


def _by_class(source: _Source, inside: str, names: tuple[str, ...] | None) -> ImageSet:
    rows = [
        (p.parent.name, p)
        for p in source.paths
        if p.suffix.lower() in SUFFIXES and p.parent.name and (not inside or inside in p.parts[:-2])
    ]
    where = f"{source.where}/{inside}" if inside else source.where
    if not rows:
        raise DataError(f"data set {where} holds no images in class folders (CLASS/IMAGE.jpg)")
    found = tuple(sorted({name for name, _ in rows}))
    names = names or found
    if unknown := sorted(set(found) - set(names)):
        raise DataError(f"data set {where}: folder {unknown[0]!r} is not in the class list")
    number = {name: i for i, name in enumerate(names)}
    labels = np.array([number[name] for name, _ in rows], np.int64)
    keys = [p for _, p in rows]
    domains, domain_names = _domains(keys)
    return ImageSet(names, labels, domains, domain_names, keys, source.open)


def _check_kinds(source: _Source) -> None:
    """Refuse a class folder without a single image that can be read: it would seem to be absent.

    Raises:
        DataError: naming it and what it holds.
    """
    images = [p for p in source.paths if p.suffix.lower() in SUFFIXES]
    known = {folder for p in images for folder in p.parents}
    for p in source.paths:
        hidden = any(part.startswith((".", "__")) for part in p.parts)
        if images and p.parent not in known and not hidden:
            kinds = ", ".join(sorted(SUFFIXES))
            raise DataError(
                f"data set {source.where}: folder {str(p.parent)!r} holds no image of a known "
                f"kind, but {p.name!r}; known are {kinds}"
            )


def _domains(keys: list[PurePosixPath]) -> tuple[Index, tuple[str, ...]]:
    """DOMAIN/CLASS/IMAGE, as DomainNet and Office-Caltech10 are laid out: the folder above the
    classes, if all images lie equally deep and there are several such folders."""
    above = [[part for part in p.parts[:-2] if part not in _SPLIT_NAMES] for p in keys]
    names = sorted({parts[-1] for parts in above if parts})
    if len({len(parts) for parts in above}) != 1 or len(names) < 2:
        return np.zeros(len(keys), np.int64), ("all",)
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[parts[-1]] for parts in above], np.int64), tuple(names)


def folder_sets(
    path: Path, names: tuple[str, ...] | None, test_share: float, seed: int
) -> tuple[ImageSet, ImageSet]:
    """Train and test images of a folder or zip file with one folder per class, or one folder per
    domain with one per class in each.

    If there are folders ``train`` and ``test`` (or ``val``) above the classes they are used, else
    ``test_share`` of each class is held out by ``seed``.

    Raises:
        DataError: nothing there, no images, or a class that is not in ``names``.
    """
    if not path.exists():
        raise DataError(f"dataset = {str(path)!r}: no such file or folder")
    source = _zip(path) if path.is_file() else _folder(path)
    _check_kinds(source)
    splits = [s for s in _SPLIT_NAMES if any(s in p.parts[:-2] for p in source.paths)]
    if len(splits) > 1 and splits[0] == "train":
        train = _by_class(source, "train", names)
        test = _by_class(source, splits[1], names or train.class_names)
        unused = f"; {', '.join(f'{s}/' for s in splits[2:])} is not used" if splits[2:] else ""
        note = f"trains on train/, tests on {splits[1]}/{unused}"
        return replace(train, note=note), test
    return hold_out(_by_class(source, "", names), test_share, seed)


def hold_out(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split each class of each domain: ``round(share * count)`` of its images, at least one of two,
    are test."""
    rng = np.random.default_rng([seed, 1])
    test: list[int] = []
    groups = images.domains * len(images.class_names) + images.labels
    for group in np.unique(groups):
        index = rng.permutation(np.flatnonzero(groups == group))
        test += index[: max(round(share * len(index)), 1 if len(index) > 1 else 0)].tolist()
    is_test = np.zeros(len(images), bool)
    is_test[test] = True
    return images.subset(np.flatnonzero(~is_test)), images.subset(np.flatnonzero(is_test))


_SPLITS = {"train": ("trainval", "train"), "test": ("test", "val")}


def torchvision_sets(
    name: str, root: Path, download: bool, test_share: float, seed: int
) -> tuple[ImageSet, ImageSet]:
    """A classification data set of torchvision by its class name, for example OxfordIIITPet.

    Raises:
        DataError: unknown name, files missing (and ``download`` off), or no class names.
    """
    import torchvision

    cls = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(cls):
        raise DataError(
            f"dataset = {name!r} is neither 'generated', nor a folder or zip file, nor a data set "
            "of torchvision (such as OxfordIIITPet, Flowers102, Food101, DTD, CIFAR10)"
        )
    parameters = inspect.signature(cls).parameters
    parts: dict[str, ImageSet] = {}
    for part in ("train", "test"):
        options: dict[str, Any] = {"root": str(root)}
        if "download" in parameters:
            options["download"] = download
        tries: list[dict[str, Any]] = [{}]
        if "split" in parameters:
            tries = [{"split": split} for split in _SPLITS[part]]
        elif "train" in parameters:
            tries = [{"train": part == "train"}]
        elif part == "test":
            return hold_out(parts["train"], test_share, seed)
        parts[part] = _torchvision_part(cls, name, root, options, tries)
    return parts["train"], parts["test"]


def _torchvision_part(
    cls: Any, name: str, root: Path, options: dict[str, Any], tries: list[dict[str, Any]]
) -> ImageSet:
    problem = ""
    for choice in tries:
        try:
            data = cls(**options, **choice)
            break
        except ValueError as error:  # no such split
            problem = str(error)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"dataset {name} is not in {root} ({error}): give --download, or the right "
                "--data-root"
            ) from None
    else:
        raise DataError(f"dataset {name} cannot be opened: {problem}")
    names = getattr(data, "classes", None) or getattr(data, "categories", None)
    labels = _labels_of(data)
    if names is None or labels is None:
        raise DataError(f"dataset {name} has no class names in torchvision: export it as folders")
    names = tuple(str(n[0] if isinstance(n, tuple) else n) for n in names)
    array = np.asarray(labels, np.int64)
    zeros = np.zeros_like(array)
    return ImageSet(names, array, zeros, ("all",), range(len(array)), lambda i: data[i][0])


def read_class_list(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one a line.

    Raises:
        DataError: unreadable, or doubled names.
    """
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class list {path} cannot be read: {error}") from None
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"class list {path} names {twice!r} twice")
    return tuple(names)
