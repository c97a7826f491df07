"""Accuracy of the methods: label shift, domain shift, and new classes.

    python benchmarks/methods.py --clients 8 --classes 32 --rounds 10     # generated, bundled CLIP
    python benchmarks/methods.py --model local-dir:PATH --dataset caltech101.zip
    python benchmarks/methods.py --model local-dir:PATH --dataset caltech101.zip --full
    python benchmarks/methods.py ... --ablation        # FedMGP's switches
    python benchmarks/methods.py ... --comparators     # the other methods
    python benchmarks/methods.py ... --scopes          # FedMGP's secure selection

Every run is a federation under masks in one process (the same state machines and frames as over
sockets). Each client is tested on its own test images among all classes (Local), and the mean over
clients is reported. "pathological": disjoint classes; "overlap RHO": some classes are everybody's;
"dirichlet BETA": labels spread; "domain": one style each, "domain-dirichlet" with labels spread
within them; "base/novel": the first half of the sorted class names is dealt out pathologically,
Base is the whole base test set and Novel the other half of the classes, with each client's prompts.
With fewer classes than clients to deal out, labels are spread by Dirichlet(0.3) instead.

The default protocol is reduced (30 classes, 8 shots, 5 rounds) to fit two CPU cores; ``--full``
takes all classes, 16 shots and 10 rounds. Mean and standard deviation over seeds. With ``--json`` a
run that was cut goes on where it was: rows of the same protocol in the file are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secure_fedprompt.bench import machine
from secure_fedprompt.clients import metrics
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import partitions
from secure_fedprompt.clients.data.loading import load_sets
from secure_fedprompt.clients.data.sets import ImageSet
from secure_fedprompt.clients.features import Features, predict
from secure_fedprompt.clients.methods.base import Method, build
from secure_fedprompt.clients.settings import DataSettings
from secure_fedprompt.clients.training import LocalTrainer, client_seed
from secure_fedprompt.commands.simulate import simulate_run
from secure_fedprompt.protocol.settings import (
    ComparatorSettings,
    FedMGPSettings,
    FedOTPSettings,
    MethodSettings,
)
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import Store

COMPARATORS = ("promptfl-ft", "fedprox", "fedper", "fedamp", "promptfolio", "fedpgp", "dpfpl",
               "pfedprompt", "fedtpg", "linear")  # fmt: skip
CLASSES_OF_ITS_OWN = ("linear",)  # it cannot name a class that it has not seen
SPLITS = ("pathological", "overlap 0.2", "overlap 0.5", "dirichlet 0.1", "dirichlet 0.3",
          "dirichlet 0.5", "domain", "domain-dirichlet 0.3", "base/novel")  # fmt: skip
QUIET = lambda *_: None  # noqa: E731


def cases(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings by the name in the table."""
    words = {"n_ctx": 4, "init": "a photo of a"} if args.start == "words" else {"n_ctx": 16}
    context = {**words, "lr": args.lr, "epochs": args.epochs, "batch_size": 8}
    groups = {"method": "fedmgp", "weights": "uniform", "lr": args.group_lr, "epochs": 2,
              "batch_size": 8}  # fmt: skip
    if args.scopes:
        secure = {**groups, "selection": "secure"}
        return {
            "scope client": {**secure},
            "scope federation": {**secure, "selection_scope": "federation"},
        }
    if args.ablation:
        changes: dict[str, dict[str, Any]] = {
            "m=5 s=2 l=2": {}, "l=4": {"length": 4}, "l=8": {"length": 8},
            "m=1": {"groups": 1, "slots": 1},
            "m=3": {"groups": 3}, "s=1": {"slots": 1}, "s=4": {"slots": 4},
            "no diversity": {"diversity_weight": 0.0}, "text only": {"modality": "text"},
            "vision only": {"modality": "vision"}, "random rule": {"rule": "random"},
            "fixed rule": {"rule": "fixed"},
        }  # fmt: skip
        return {k: {**groups, "fedmgp": FedMGPSettings(**v)} for k, v in changes.items()}
    if args.comparators:
        open_ = {"fedamp": {"protection": "none"}}  # everybody sees everybody's prompt
        own = {"fedtpg": {"lr": args.network_lr}, "dpfpl": {"compare": ComparatorSettings(rank=2)}}
        return {
            k: {**context, "method": k, **open_.get(k, {}), **own.get(k, {})} for k in COMPARATORS
        }
    table: dict[str, dict[str, Any]] = {
        "zero-shot": {"method": "zeroshot", "n_ctx": 4},
        "CoOp (local)": {**context, "method": "coop"},
        "PromptFL": {**context, "method": "promptfl"},
    }
    for transport in ("unbalanced", "classical", "average"):
        table[f"FedOTP {transport}"] = {
            **context, "method": "fedotp", "lr": args.transport_lr,
            "fedotp": FedOTPSettings(transport=transport, eps=args.eps),
        }  # fmt: skip
    table["FedMGP"] = groups
    return table


def choose_classes(images: ImageSet, count: int) -> ImageSet:
    """The first ``count`` class names, spread evenly over the alphabet."""
    if not count or count >= len(images.class_names):
        return images
    rows = np.linspace(0, len(images.class_names) - 1, count).round().astype(int)
    kept = tuple(images.class_names[i] for i in rows)
    index = np.array([i for i, y in enumerate(images.labels) if images.class_names[y] in kept])
    return images.subset(index).renamed(kept)


def guess(method: Method, features: Features) -> tuple[np.ndarray, np.ndarray]:
    return features.labels.cpu().numpy(), predict(method, features)[0]


def shares_of(
    split: str, train: ImageSet, test: ImageSet, parts: int, seed: int
) -> list[partitions.Part]:
    """Who holds what, by the name of the split and its number."""
    rule, _, number = split.partition(" ")
    labels = train.labels, test.labels, parts, seed
    both = (train.labels, train.domains), (test.labels, test.domains)
    match rule:
        case "iid":
            return partitions.iid(*labels)
        case "overlap":
            return partitions.overlap(*labels, float(number))
        case "domain":
            return partitions.by_domain(train.domains, test.domains, parts)
        case "domain-dirichlet":
            return partitions.domain_dirichlet(*both, parts, seed, float(number))
        case "pathological" | "base/novel" if len(train.class_names) >= parts:
            return partitions.pathological(*labels)
    return partitions.dirichlet(*labels, float(number or 0.3))


class Bench:
    """One data set and model, with features cached by what methods need."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.backbone = args, Backbone.load(args.model, device=args.device)
        train, test = load_sets(DataSettings(dataset=args.dataset, generated_classes=args.classes))
        if args.tests and not args.full:
            test = test.subset(partitions.few_shot(test.labels, args.tests, 0))
        count = 0 if args.full else args.classes
        self.whole = choose_classes(train, count), choose_classes(test, count)
        self._cache: dict[tuple[str, str, int], Features] = {}

    @classmethod
    def of(
        cls, backbone: Backbone, train: ImageSet, test: ImageSet, *, clients: int, shots: int,
        rounds: int,
    ) -> Bench:  # fmt: skip
        """With images that were read before."""
        made = cls.__new__(cls)
        made.args = argparse.Namespace(
            clients=clients, shots=shots, rounds=rounds, full=False, views=0
        )
        made.backbone, made.whole, made._cache = backbone, (train, test), {}
        return made

    def features(self, key: str, images: ImageSet, needs: str, seed: int) -> Features:
        where = key, needs, seed
        if where not in self._cache:
            self._cache[where] = Features(self.backbone, images, needs, QUIET, "")
        return self._cache[where]

    def run(self, settings: dict[str, Any], split: str, seed: int) -> dict[str, float]:
        """One federation, evaluated client by client."""
        args = self.args
        train, test = self.whole
        if split == "base/novel":
            train, test = train.half("base"), test.half("base")
        shots = 16 if args.full else args.shots
        index = partitions.few_shot(train.labels, shots, seed)
        train = train.subset(index)
        shares = shares_of(split, train, test, args.clients, seed)
        server = ServerSettings(
            rounds=10 if args.full else args.rounds, seed=seed, metrics="off", **settings
        )
        method = server.method_settings()
        needs = build(method, self.backbone, train.class_names).needs
        own = self.features(f"train {split}", train, needs, seed)
        tests = self.features(f"test {split}", test, needs, 0)
        trainers = {
            f"client{k:03d}": LocalTrainer(
                self.backbone, train.subset(s.train), test.subset(s.test),
                client_seed(seed, f"client{k:03d}"),
                features=(own.subset(s.train), tests.subset(s.test)), seat=(k, args.clients),
                augment=args.views > 0,
            )
            for k, s in enumerate(shares)
        }  # fmt: skip
        for trainer in trainers.values():
            trainer.views = args.views
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder), server)
            done = simulate_run(server, store, trainers)
            store.close()
        assert done.state.prompt is not None
        scores: list[dict[str, float]] = []
        for learner, share in zip(done.learners.values(), shares, strict=True):
            learner.finish(done.state.prompt, b"")
            labels, guesses = guess(learner.method, tests.subset(share.test))
            row = {
                "local": metrics.accuracy(labels, guesses),
                "f1": metrics.macro_f1(labels, guesses),
            }
            if split == "base/novel":
                row["base"] = metrics.accuracy(*guess(learner.method, tests))
                row["novel"] = self.novel(learner.method, method, needs)
            scores.append(row)
        found = {k: float(np.mean([row[k] for row in scores])) for k in scores[0]}
        if split == "base/novel":  # of means over clients, as the papers have it
            found["hm"] = metrics.harmonic_mean(found["base"], found["novel"])
            found["cm"] = metrics.combined_mean(found["local"], found["base"], found["novel"])
        return found

    def novel(self, trained: Method, settings: MethodSettings, needs: str) -> float:
        """The same prompts on names and images that no client has seen."""
        images = self.whole[1].half("novel")
        features = self.features("novel", images, needs, 0)
        method = build(settings, self.backbone, images.class_names)
        method.load(trained.state())
        method.restore(trained.private())
        return metrics.accuracy(*guess(method, features))


def rows_of(
    bench: Bench, args: argparse.Namespace, done: set[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    splits = ("base/novel",) if args.ablation else ("pathological", "base/novel")
    splits = ("dirichlet 0.3",) if args.scopes else splits
    splits = ("pathological", "dirichlet 0.3", "base/novel") if args.comparators else splits
    for split in args.split or splits:
        for name, settings in cases(args).items():
            if (args.only and args.only not in name) or (split, name) in done:
                continue
            if split == "base/novel" and name in CLASSES_OF_ITS_OWN:
                continue
            begin, runs = time.monotonic(), []
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                runs.append(bench.run(settings, split, seed))
            figures = {
                k: {"mean": float(np.mean([r[k] for r in runs])),
                    "std": float(np.std([r[k] for r in runs], ddof=1)) if len(runs) > 1 else 0.0}
                for k in runs[0]
            }  # fmt: skip
            shown = "  ".join(
                f"{k} {100 * v['mean']:.1f}+-{100 * v['std']:.1f}" for k, v in figures.items()
            )
            seconds = (time.monotonic() - begin) / args.seeds
            print(f"{split:20} {name:18} {shown}  {seconds:.0f} s a run", flush=True)
            yield {"split": split, "method": name, "seconds": seconds, **figures}


def kept(path: Path | None, protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of this protocol that are there already."""
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text())
    return list(content["rows"]) if content["protocol"] == protocol else []


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled", help="bundled, or local-dir:PATH")
    parser.add_argument("--dataset", default="generated", help="generated, or a folder or zip file")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--full", action="store_true", help="all classes, 16 shots, 10 rounds")
    parser.add_argument("--ablation", action="store_true", help="FedMGP's switches, base/novel")
    parser.add_argument("--scopes", action="store_true", help="secure selection, Dirichlet(0.3)")
    parser.add_argument("--comparators", action="store_true", help="the other methods, by name")
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--classes", type=int, default=30)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--tests", type=int, default=10, help="test images per class; 0 is all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5, help="of the context methods")
    parser.add_argument(
        "--start", choices=("random", "words"), default="random",
        help="of the context methods: 16 random tokens, or four: a photo of a",
    )  # fmt: skip
    parser.add_argument("--lr", type=float, default=0.002, help="of the context methods")
    parser.add_argument("--transport-lr", type=float, default=0.002, help="of FedOTP")
    parser.add_argument("--group-lr", type=float, default=0.002, help="of FedMGP")
    parser.add_argument("--network-lr", type=float, default=0.002, help="of FedTPG")
    parser.add_argument("--eps", type=float, default=0.01)
    parser.add_argument(
        "--views", type=int, default=0, help="random crops and flips kept of each training image"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="another one to choose lr by")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--split", action="append", choices=SPLITS, help="may be given several times"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    protocol = {
        "clients": args.clients, "dataset": Path(args.dataset).name, "model": Path(args.model).name,
        "classes": 0 if args.full else args.classes, "shots": 16 if args.full else args.shots,
        "tests": 0 if args.full else args.tests,
        "rounds": 10 if args.full else args.rounds, "epochs": args.epochs, "lr": args.lr,
        "start": args.start, "group_lr": args.group_lr, "transport_lr": args.transport_lr,
        "batch_size": 8, "first_seed": args.first_seed, "eps": args.eps, "seeds": args.seeds,
        "views": args.views,
    }  # fmt: skip
    print(json.dumps(protocol))
    rows = kept(args.json, protocol)
    for row in rows_of(Bench(args), args, {(row["split"], row["method"]) for row in rows}):
        rows.append(row)
        if args.json:  # after every row: a long run that is cut keeps what it has
            content = {"machine": machine.describe(), "protocol": protocol, "rows": rows}
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
