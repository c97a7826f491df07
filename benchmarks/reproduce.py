"""Published tables again, with the published protocol: for people with a GPU and the data.

    python benchmarks/reproduce.py --list
    python benchmarks/reproduce.py --table fedotp-label-shift --dataset OxfordPets --root data \\
        --model RN50 --pretrained openai --download --json pets.json
    python benchmarks/reproduce.py --table promptfl-iid --root data --estimate   # time, memory

A data set is read in CoOp's layout where its split file is there (Zhou et al., IJCV 2022: the same
training and test images as in the papers), else from torchvision, which splits otherwise. Prints
what each cell will take before it begins, goes on where it was cut (``--json``), and ends with a
table of published, measured, and their difference. Figures are accuracies in percent, means over
seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import methods
import numpy as np

from secure_fedprompt.bench import machine
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import partitions
from secure_fedprompt.clients.data.images import open_image
from secure_fedprompt.clients.data.loading import load_sets
from secure_fedprompt.clients.data.sets import ImageSet
from secure_fedprompt.clients.methods.base import Batch, build
from secure_fedprompt.clients.settings import DataSettings
from secure_fedprompt.clients.steps import Steps
from secure_fedprompt.protocol.errors import DataError, SecureFedPromptError
from secure_fedprompt.protocol.presets import published as preset
from secure_fedprompt.protocol.settings import FedMGPSettings, MethodSettings


@dataclass(frozen=True)
class Layout:
    """Where a data set lies: CoOp's folder, images and split file in it; torchvision's name. One
    of several domains has no split file: a folder each, and in it one for each class."""

    images: str
    split: str = ""
    torchvision: str = ""


DATA = {
    "OxfordPets": Layout("oxford_pets/images", "split_zhou_OxfordPets.json", "OxfordIIITPet"),
    "Flowers102": Layout("oxford_flowers/jpg", "split_zhou_OxfordFlowers.json", "Flowers102"),
    "Food101": Layout("food-101/images", "split_zhou_Food101.json", "Food101"),
    "DTD": Layout("dtd/images", "split_zhou_DescribableTextures.json", "DTD"),
    "Caltech101": Layout(
        "caltech-101/101_ObjectCategories", "split_zhou_Caltech101.json", "Caltech101"
    ),
    "StanfordCars": Layout("stanford_cars", "split_zhou_StanfordCars.json", "StanfordCars"),
    "SUN397": Layout("sun397/SUN397", "split_zhou_SUN397.json", "SUN397"),
    "UCF101": Layout("ucf101/UCF-101-midframes", "split_zhou_UCF101.json"),
    "FGVCAircraft": Layout("fgvc-aircraft-2013b", torchvision="FGVCAircraft"),
    "DomainNet": Layout("domainnet"),
    "OfficeCaltech10": Layout("office_caltech_10"),
}
FIVE = ("Food101", "DTD", "Caltech101", "Flowers102", "OxfordPets")
NINE = (*FIVE, "StanfordCars", "SUN397", "UCF101", "FGVCAircraft")


@dataclass(frozen=True)
class Table:
    """One published table.

    Attributes:
        source: where it is; model: that it was measured with; split, shots, clients: its protocol.
        cells: published figures by data set and method; ``mean`` where only that is known here,
            neither where nothing is.
        settings: of each method, over its preset.
        figure: what is compared: "local" or "cm".
    """

    source: str
    model: str
    split: str
    shots: int
    clients: int
    cells: dict[tuple[str, str], float]
    settings: dict[str, dict[str, Any]]
    figure: str = "local"
    mean: dict[str, float] = field(default_factory=dict)
    datasets: tuple[str, ...] = FIVE


def _rows(names: tuple[str, ...], **figures: tuple[float, ...]) -> dict[tuple[str, str], float]:
    return {
        (data, method.replace("_", " ")): value
        for method, values in figures.items() for data, value in zip(names, values, strict=True)
    }  # fmt: skip


_ViT = ("Caltech101", "Flowers102", "OxfordPets", "Food101")
TABLES = {
    "promptfl-iid": Table(
        "PromptFL, TMC 2024, IID", "ViT-B-16", "iid", 16, 10,
        _rows(_ViT, PromptFL=(94.65, 90.5, 92.89, 85.75)), {"PromptFL": {"method": "promptfl"}},
        datasets=_ViT,
    ),
    "promptfl-non-iid": Table(
        "PromptFL, TMC 2024, extreme non-IID", "ViT-B-16", "pathological", 16, 10,
        _rows(_ViT, PromptFL=(94.12, 74.75, 89.51, 85.88)), {"PromptFL": {"method": "promptfl"}},
        datasets=_ViT,
    ),
    "fedotp-label-shift": Table(
        "FedOTP, CVPR 2024, label shift", "RN50", "pathological", 16, 10,
        _rows(FIVE, zero_shot=(75.27, 40.21, 85.14, 62.17, 84.47),
              PromptFL=(74.81, 50.46, 87.90, 73.68, 88.17),
              FedOTP=(92.73, 87.67, 97.02, 96.23, 98.82)),
        {"zero shot": {"method": "zeroshot"}, "PromptFL": {"method": "promptfl"},
         "FedOTP": {"method": "fedotp"}},
    ),
    "fedmgp-base-novel": Table(
        "FedMGP, NeurIPS 2025, means of nine data sets", "ViT-B-16", "base/novel", 16, 10, {},
        {"PromptFL": {"method": "promptfl"}, "FedOTP": {"method": "fedotp"},
         "FedMGP": {"method": "fedmgp"}},
        "cm", {"PromptFL": 71.31, "FedOTP": 57.10, "FedMGP": 81.85}, NINE,
    ),
    "fedotp-domains": Table(
        "FedOTP, CVPR 2024, DomainNet, a client for each domain; its figures are not known here",
        "ViT-B-16", "domain", 16, 6, {},
        {"zero shot": {"method": "zeroshot"}, "PromptFL": {"method": "promptfl"},
         "FedOTP": {"method": "fedotp"}},
        datasets=("DomainNet",),
    ),
    "fedotp-offices": Table(
        "FedOTP, CVPR 2024, Office-Caltech10, a client for each domain; its figures are not known "
        "here", "ViT-B-16", "domain", 16, 4, {},
        {"zero shot": {"method": "zeroshot"}, "PromptFL": {"method": "promptfl"},
         "FedOTP": {"method": "fedotp"}},
        datasets=("OfficeCaltech10",),
    ),
    "fedmgp-ablation": Table(
        "FedMGP, NeurIPS 2025, means of Flowers102, DTD, Caltech101", "ViT-B-16", "base/novel", 16,
        10, {},
        {name: {"method": "fedmgp", "fedmgp": FedMGPSettings(**changes)} for name, changes in {
            "as published": {}, "l=16": {"length": 16}, "m=1": {"groups": 1, "slots": 1},
            "s=4": {"slots": 4}, "no diversity": {"diversity_weight": 0.0},
            "text only": {"modality": "text"}, "vision only": {"modality": "vision"},
        }.items()},
        "cm", {"as published": 85.43, "l=16": 78.53, "m=1": 76.88, "s=4": 81.93,
               "no diversity": 83.63, "text only": 84.46, "vision only": 75.30},
        ("Flowers102", "DTD", "Caltech101"),
    ),
}  # fmt: skip


def load(name: str, root: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    """Training and test images.

    Raises:
        DataError: they are not there; says where to put them.
    """
    layout = DATA[name]
    folder = root / Path(layout.images).parts[0]
    if layout.split and (folder / layout.split).exists():
        return coop_split(folder / layout.split, root / layout.images)
    if not layout.split and not layout.torchvision:
        if folder.exists():
            return load_sets(DataSettings(dataset=str(folder)))
        raise DataError(f"{name}: put its domains' folders, with one for each class, into {folder}")
    if not layout.torchvision:
        raise DataError(missing(name, root))
    try:
        settings = DataSettings(dataset=layout.torchvision, data_root=str(root), download=download)
        return load_sets(settings)
    except DataError as error:
        raise DataError(
            f"{missing(name, root)}, or: {error}" if layout.split else f"{error}"
        ) from None


def missing(name: str, root: Path) -> str:
    """Where a data set with a split file of CoOp's goes."""
    layout = DATA[name]
    folder = root / Path(layout.images).parts[0]
    return (
        f"{name}: put its images into {root / layout.images} and CoOp's {layout.split} into "
        f"{folder} (its repository's DATASETS.md says where both are)"
    )


def coop_split(path: Path, images: Path) -> tuple[ImageSet, ImageSet]:
    """Train and test of one of CoOp's split files: [file, label, class name] by split.

    Raises:
        DataError: it is none, or names a file outside of the images' folder.
    """
    try:
        content = json.loads(path.read_text())
        parts = {split: [(str(f), int(y), str(n)) for f, y, n in content[split]]
                 for split in ("train", "test")}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"split file {path} cannot be read: {error!r}") from None
    numbered = {label: name for rows in parts.values() for _, label, name in rows}
    names = tuple(numbered[i] for i in sorted(numbered))
    place = {label: i for i, label in enumerate(sorted(numbered))}

    def of(rows: list[tuple[str, int, str]]) -> ImageSet:
        keys = [PurePosixPath(file) for file, _, _ in rows]
        if bad := [key for key in keys if key.is_absolute() or ".." in key.parts]:
            raise DataError(f"split file {path}: {bad[0]} is outside of {images}")
        labels = np.array([place[label] for _, label, _ in rows], np.int64)
        open_file = lambda key: open_image(images / key, key.suffix.lower())  # noqa: E731
        return ImageSet(names, labels, np.zeros(len(rows), np.int64), ("all",), keys, open_file)

    return of(parts["train"]), of(parts["test"])


def settings_of(table: Table, method: str) -> dict[str, Any]:
    """A method's own, over what it was published with."""
    own = table.settings[method]
    given = {**preset(own["method"]), **own}
    given.pop("rounds", None)  # the bench's
    for key in ("fedotp", "fedmgp", "compare"):
        if isinstance(given.get(key), dict):
            given[key] = type(getattr(MethodSettings(), key))(**given[key])
    return given


def estimate(bench: methods.Bench, table: Table, method: str, rounds: int) -> tuple[float, float]:
    """Seconds of a run, from three steps, and GB that its images take as features."""
    given = settings_of(table, method)
    names = MethodSettings.__struct_fields__
    settings = MethodSettings(**{k: v for k, v in given.items() if k in names})
    train, _ = bench.whole
    shots = len(partitions.few_shot(train.labels, table.shots, 0))
    made = build(settings, bench.backbone, train.class_names)
    batch_size = min(settings.batch_size, max(1, shots // (4 * table.clients)))
    sample = train.subset(np.arange(min(batch_size, len(train))))
    features = bench.features("estimate", sample, made.needs, 0)
    each = features.images.element_size() * features.images[0].numel()
    memory = each * sum(len(images) for images in bench.whole) / 1e9
    if not made.parameters():
        return 0.0, memory
    steps = Steps(made, lr=0.0, momentum=0.9, weight_decay=0.0)
    batch = Batch(features.images, features.labels)
    steps.take(batch)
    begin = time.perf_counter()
    for _ in range(3):
        float(steps.take(batch))
    step = (time.perf_counter() - begin) / 3
    return step * rounds * settings.epochs * max(1, shots // batch_size), memory


def run(args: argparse.Namespace) -> int:
    table = TABLES[args.table]
    chosen = args.dataset or list(table.datasets)
    rounds = args.rounds or 10
    protocol = {
        "table": args.table, "model": args.model, "pretrained": args.pretrained, "rounds": rounds,
        "split": table.split, "shots": table.shots, "clients": table.clients,
    }  # fmt: skip
    print(f"{table.source}; published with {table.model}\n{json.dumps(protocol)}")
    backbone = Backbone.load(args.model, args.pretrained, args.device)
    rows: dict[str, dict[str, Any]] = {
        f"{r['dataset']}, {r['method']}, {r['seed']}": r
        for r in methods.kept(args.json, protocol)
    }  # fmt: skip
    for dataset in chosen:
        train, test = load(dataset, args.root, args.download)
        bench = methods.Bench.of(
            backbone, train, test, clients=table.clients, shots=table.shots, rounds=rounds
        )
        for method in table.settings:
            seconds, memory = estimate(bench, table, method, rounds)
            print(f"{dataset}, {method}: about {seconds / 60:.1f} min a seed after encoding, "
                  f"{memory:.1f} GB of features", flush=True)  # fmt: skip
            for seed in range(args.seeds if not args.estimate else 0):
                key = f"{dataset}, {method}, {seed}"
                if key in rows:
                    continue
                found = bench.run(settings_of(table, method), table.split, seed)
                rows[key] = {"dataset": dataset, "method": method, "seed": seed, **found}
                if args.json:
                    content = {"machine": machine.describe(), "protocol": protocol,
                               "rows": list(rows.values())}  # fmt: skip
                    args.json.write_text(json.dumps(content, indent=1) + "\n")
    if not args.estimate:
        print("\n".join(lines(table, chosen, list(rows.values()))))
    return 0


def lines(table: Table, chosen: list[str], rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table: published, measured, and the difference."""
    yield f"{'':12} {'':14} published  measured    +-   difference"
    means: dict[str, list[float]] = {}
    for dataset in chosen:
        for method in table.settings:
            own = [r for r in rows if (r["dataset"], r["method"]) == (dataset, method)]
            values = [100 * r[table.figure] for r in own]
            if not values:
                continue
            mean, spread = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
            means.setdefault(method, []).append(float(mean))
            said = table.cells.get((dataset, method))
            yield _line(dataset, method, said, float(mean), float(spread))
    for method, values in means.items():
        if table.mean:
            mean = float(np.mean(values))
            yield _line(f"mean of {len(values)}", method, table.mean.get(method), mean, 0.0)


def _line(dataset: str, method: str, said: float | None, mean: float, spread: float) -> str:
    published = "      " if said is None else f"{said:6.2f}"
    difference = "" if said is None else f"{mean - said:+.2f}"
    return f"{dataset:12} {method:14} {published}    {mean:6.2f}  {spread:5.2f}   {difference}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="the tables")
    parser.add_argument("--table", choices=sorted(TABLES))
    parser.add_argument("--dataset", action="append", choices=sorted(DATA), help="default all")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where data sets lie")
    parser.add_argument("--download", action="store_true", help="by torchvision")
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--pretrained", default="openai")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=0, help="another number than published")
    parser.add_argument("--estimate", action="store_true", help="time and memory, and no more")
    parser.add_argument("--json", type=Path, help="results; a run that was cut goes on")
    args = parser.parse_args(argv)
    if args.list or not args.table:
        for name, table in TABLES.items():
            print(f"{name:20} {table.source} ({table.model}; {', '.join(table.settings)})")
        return 0
    try:
        return run(args)
    except SecureFedPromptError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
