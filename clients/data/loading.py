"""A client's images: the whole data set, and its share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from secure_fedprompt.clients.data import pachinko, partitions, sets
from secure_fedprompt.clients.data.sets import ImageSet
from secure_fedprompt.clients.settings import DataSettings
from secure_fedprompt.protocol.errors import DataError
from secure_fedprompt.protocol.expand import Purpose, digest


def load_sets(
    settings: DataSettings, names: tuple[str, ...] | None = None
) -> tuple[ImageSet, ImageSet]:
    """The whole data set, before partitioning: training and test images.

    Args:
        names: of the classes, in the place of a class list.

    Raises:
        DataError: nothing there, fewer than two classes, unknown names.
    """
    if settings.class_list:
        names = sets.read_class_list(Path(settings.class_list))
    path = Path(settings.dataset)
    if settings.dataset == "generated":
        styles = [style.strip() for style in settings.styles.split(",") if style.strip()]
        train, test = sets.generated_sets(
            settings.generated_classes, styles, settings.per_class, settings.test_per_class,
            settings.data_seed,
        )  # fmt: skip
    elif path.exists() or "/" in settings.dataset or path.suffix:
        train, test = sets.folder_sets(path, names, settings.test_share, settings.data_seed)
    else:
        train, test = sets.torchvision_sets(
            settings.dataset, Path(settings.data_root), settings.download, settings.test_share,
            settings.data_seed,
        )  # fmt: skip
    if settings.classes != "all":
        official = settings.partition_style == "official"
        train, test = (s.half(settings.classes, official=official) for s in (train, test))
    if len(train.class_names) < 2:
        raise DataError(
            f"data set {settings.dataset} has one class, {train.class_names[0]!r}: "
            "a classifier needs two; give class_list if this client lacks the others"
        )
    return train, test


Dealt = tuple[ImageSet, ImageSet, list[partitions.Part]]


def load_shares(settings: DataSettings) -> Dealt:
    """Training (after few-shot sampling) and test images, and every client's share of them.

    Raises:
        DataError: also if the partition cannot be made.
    """
    return deal_out(settings, *load_sets(settings))


def deal_out(settings: DataSettings, train: ImageSet, test: ImageSet) -> Dealt:
    """The same of images that are there.

    Raises:
        DataError: the partition cannot be made.
    """
    train = train.subset(partitions.few_shot(train.labels, settings.shots, settings.data_seed))
    labels, n, seed = (train.labels, test.labels), settings.parts, settings.data_seed
    official = settings.partition_style == "official"
    match settings.partition:
        case "pathological":
            shares = partitions.pathological(*labels, n, seed, official=official)
        case "overlap":
            shares = partitions.overlap(*labels, n, seed, settings.rho)
        case "dirichlet":
            shares = partitions.dirichlet(*labels, n, seed, settings.beta, official=official)
        case "domain-dirichlet":
            both = (train.labels, train.domains), (test.labels, test.domains)
            shares = partitions.domain_dirichlet(*both, n, seed, settings.beta)
        case "pachinko":
            coarse = pachinko.coarse_labels(train.class_names)
            shares = pachinko.pachinko(*labels, coarse, n, seed, settings.beta)
        case "domain":
            shares = partitions.by_domain(train.domains, test.domains, n)
        case _:
            shares = partitions.iid(*labels, n, seed)
    return train, test, shares


def load_part(settings: DataSettings) -> tuple[ImageSet, ImageSet]:
    """This client's share.

    Raises:
        DataError: also if the share has no training image.
    """
    if settings.part >= settings.parts:
        raise DataError(f"part = {settings.part}: must be below parts = {settings.parts}")
    if settings.parts == 1:
        settings = msgspec.structs.replace(settings, partition="iid")
    train, test, shares = load_shares(settings)
    own = shares[settings.part]
    if not len(own.train):
        raise DataError(f"share {settings.part} of {settings.dataset} has no training images")
    return train.subset(own.train), test.subset(own.test)


def classes_digest(names: Sequence[str]) -> bytes:
    return digest(Purpose.CLASSES, *(name.encode() for name in names))
