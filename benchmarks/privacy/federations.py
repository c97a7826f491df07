"""Federations to attack, and the adversary's view of them: the frames that the server recorded.

Every attack of this folder reads updates, uploads and prompts from an audit log (``audit =
"full"``) of a whole run, never from variables of the program that is attacked. Runs are those of
``secure-fedprompt simulate``: the state machines and frames of the real programs, in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from secure_fedprompt.audit.log import Log
from secure_fedprompt.bench import machine
from secure_fedprompt.clients.accounting import noise_for, steps_of
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import partitions
from secure_fedprompt.clients.data.loading import load_sets
from secure_fedprompt.clients.data.sets import ImageSet
from secure_fedprompt.clients.features import Features, predict
from secure_fedprompt.clients.methods.base import Method, build
from secure_fedprompt.clients.settings import DataSettings, PrivacySettings
from secure_fedprompt.clients.training import LocalTrainer, client_seed
from secure_fedprompt.commands.simulate import simulate_run
from secure_fedprompt.protocol import fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt, averaged
from secure_fedprompt.protocol.layout import slices, total_size
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import Store

Array = NDArray[np.float64]
Index = NDArray[np.int64]
T = TypeVar("T", bound=LocalTrainer)
NO_DP = PrivacySettings()
CONTEXT: dict[str, Any] = {
    "method": "promptfl",
    "n_ctx": 4,
    "init": "a photo of a",
    "batch_size": 16,
    "weights": "uniform",
}


@dataclass
class Pool:
    """A model, and all images that clients or adversaries may hold, encoded once."""

    backbone: Backbone
    sets: tuple[ImageSet, ImageSet]
    features: tuple[Features, Features]

    @classmethod
    def load(cls, args: argparse.Namespace, method: str = "promptfl") -> Pool:
        torch.set_num_threads(args.threads)
        backbone = Backbone.load(args.model, device=args.device)
        data = DataSettings(dataset=args.dataset, styles="poster,sketch", per_class=32,
                            test_per_class=16)  # fmt: skip
        train, test = load_sets(data)
        if args.classes and args.classes < len(train.class_names):
            rows = np.linspace(0, len(train.class_names) - 1, args.classes).round().astype(int)
            kept = tuple(train.class_names[i] for i in rows)
            train, test = (
                s.subset(np.array([i for i, y in enumerate(s.labels) if s.class_names[y] in kept]))
                .renamed(kept)
                for s in (train, test)
            )  # fmt: skip
        cap = lambda s: s.subset(partitions.few_shot(s.labels, args.per_class, 0))  # noqa: E731
        train, test = cap(train), cap(test)
        quiet = lambda *_: None  # noqa: E731
        needs = build(MethodSettings(method=method), backbone, train.class_names).needs
        encoded = tuple(Features(backbone, s, needs, quiet, "") for s in (train, test))
        return cls(backbone, (train, test), (encoded[0], encoded[1]))

    def method(self, settings: MethodSettings, prompt: Array | None = None) -> Method:
        """The adversary's own copy of the model, with a prompt that it saw, or as clients begin."""
        made = build(settings, self.backbone, self.sets[0].class_names)
        if prompt is not None:
            made.adopt({
                spec.name: prompt[part].reshape(spec.shape).astype(np.float32)
                for spec, part in slices(made.uploaded())
            })  # fmt: skip
        return made

    @contextlib.contextmanager
    def federation(
        self,
        settings: dict[str, Any],
        shares: Sequence[Index],
        seed: int,
        dp: Sequence[PrivacySettings] = (),
        tests: Index | None = None,
    ) -> Iterator[View]:
        """A whole run; ``shares`` are rows of the training images, one array per client.

        Yields:
            what the server could record.
        """
        rows = np.arange(0) if tests is None else tests
        trainers = [
            self.trainer(LocalTrainer, share, rows, seed, (k, len(shares)), dp[k] if dp else NO_DP)
            for k, share in enumerate(shares)
        ]
        with self.run(settings, trainers, seed) as view:
            yield view

    def trainer(
        self,
        kind: type[T],
        share: Index,
        tests: Index,
        seed: int,
        seat: tuple[int, int],
        dp: PrivacySettings = NO_DP,
    ) -> T:
        """The client in this seat, with these rows of training and test images."""
        return kind(
            self.backbone, self.sets[0].subset(share), self.sets[1].subset(tests),
            client_seed(seed, f"client{seat[0]:03d}"),
            features=(self.features[0].subset(share), self.features[1].subset(tests)),
            seat=seat, dp=dp,
        )  # fmt: skip

    @contextlib.contextmanager
    def run(
        self, settings: dict[str, Any], trainers: Sequence[LocalTrainer], seed: int
    ) -> Iterator[View]:
        """A whole run of these clients: ``federation``, where they are not all alike."""
        server = ServerSettings(audit="full", **{"seed": seed, **settings})
        named = {f"client{k:03d}": trainer for k, trainer in enumerate(trainers)}
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder), server)
            try:
                simulate_run(server, store, named)
            finally:
                store.close()
            yield View(Log.read(Path(folder)), server.method_settings())


@dataclass
class View:
    """The server's record, decoded."""

    log: Log
    settings: MethodSettings
    _made: dict[int, Prompt] = field(default_factory=dict)

    @cached_property
    def plans(self) -> dict[int, tuple[RoundPlan, bytes]]:
        """Plan and global prompt as they left, by learning round."""
        found = {}
        for _, message in self.log.messages():
            if isinstance(message, m.Plan):
                found[message.plan.learning_round] = message.plan, bytes(message.base)
        return found

    @cached_property
    def uploads(self) -> dict[tuple[int, str], m.Message]:
        """Uploads by learning round and client."""
        rounds = {plan.round: number for number, (plan, _) in self.plans.items()}
        kinds = (m.PlainUpload, m.MaskedUpload, m.CipherUpload)
        return {
            (rounds[entry.round], entry.peer): message
            for entry, message in self.log.messages()
            if isinstance(message, kinds)
        }

    def prompt(self, learning_round: int) -> Array:
        """The global prompt at the start of a round, or at the end of the run, in the clear: as it
        was sent, or as it follows from the sum that was."""
        sent = self.plans[learning_round][1] if learning_round in self.plans else self._final
        if sent:
            return np.frombuffer(sent, "<f4").astype(np.float64)
        if learning_round not in self._made:
            plan, _ = self.plans[learning_round - 1]
            total = dict(zip((f.name for f in plan.layout), self._parts(plan), strict=True))
            base = self.prompt(learning_round - 1).astype(np.float32)
            self._made[learning_round] = averaged(base, plan.layout, total)
        return self._made[learning_round].astype(np.float64)

    def _parts(self, plan: RoundPlan) -> list[Array]:
        """The sum of a round as the server sent it to whom it is about."""
        vector = next(x.vector for _, x in self.log.messages()
                      if isinstance(x, m.OpenedSum) and x.round == plan.round)  # fmt: skip
        words = np.zeros(total_size(plan.layout), np.uint32)
        fixedpoint.add_wire(plan.layout, vector, words)
        values = fixedpoint.decode(plan.layout, fixedpoint.to_integers(plan.layout, words))
        return [values[part] for _, part in slices(plan.layout)]

    @cached_property
    def _final(self) -> bytes:
        return bytes(next(x for _, x in self.log.messages() if isinstance(x, m.Finish)).vector)

    def average(self, learning_round: int) -> Array:
        """What the round moved the global prompt by: the sum that the server learns, divided."""
        return self.prompt(learning_round + 1) - self.prompt(learning_round)

    def update(self, learning_round: int, client: str) -> Array:
        """A client's update as its upload shows it: exact in the clear, else what the bytes say
        when read as if nothing protected them."""
        plan, _ = self.plans[learning_round]
        size = sum(f.size for f in plan.layout if f.update)
        message = self.uploads[learning_round, client]
        match message:
            case m.PlainUpload():
                values = np.frombuffer(message.vector, "<f8")
                weight = values[size]
                return values[:size] / weight
            case m.MaskedUpload():
                words = np.zeros(total_size(plan.layout), np.uint32)
                fixedpoint.add_wire(plan.layout, message.vector, words)
                integers = fixedpoint.to_integers(plan.layout, words)
                return fixedpoint.decode(plan.layout, integers)[:size]
            case m.CipherUpload():
                data = b"".join(bytes(c) for c in message.ciphertexts)
                words = np.frombuffer(data[: 4 * size], "<i4")
                return np.ldexp(words.astype(np.float64), -24)
        raise TypeError(type(message).__name__)


def private(
    epsilon: float, delta: float, images: int, epochs: int, rounds: int = 1
) -> PrivacySettings:
    """DP-SGD that spends ``epsilon`` in this many rounds; its noise is looked up once for all."""
    rate, steps = steps_of(images, CONTEXT["batch_size"], epochs)
    sigma = noise_for(epsilon, delta, rate, steps * rounds, [], "prv")
    return PrivacySettings(kind="sample", noise_multiplier=sigma, delta=delta)


def losses(method: Method, images: Features) -> tuple[Array, Array]:
    """Cross-entropy, and the logit of the right class's probability (Carlini et al., 2022)."""
    found = predict(method, images)[1]
    p = np.clip(np.exp(-found), 1e-7, 1 - 1e-7)
    return found, np.log(p) - np.log1p(-p)


def auc(inside: Array, outside: Array) -> float:
    """Probability that a member scores above a non-member; ties count half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside)))


def tpr_at(inside: Array, outside: Array, fpr: float = 0.01) -> float:
    """True positives at the threshold that lets through at most ``fpr`` of the others."""
    threshold = np.quantile(outside, 1 - fpr, method="higher")
    return float((inside > threshold).mean())


def bootstrap(rows: Sequence[tuple[Array, Array]], seed: int = 0) -> dict[str, dict[str, float]]:
    """AUC and TPR at 1% FPR over runs, with 95% intervals from resampled runs."""
    rng = np.random.default_rng(seed)

    def figures(picked: Sequence[int]) -> tuple[float, float]:
        inside = np.concatenate([rows[i][0] for i in picked])
        outside = np.concatenate([rows[i][1] for i in picked])
        return auc(inside, outside), tpr_at(inside, outside)

    whole = figures(range(len(rows)))
    again = np.array([figures(rng.integers(0, len(rows), len(rows))) for _ in range(200)])
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    return {
        name: {"value": whole[i], "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(("auc", "tpr_at_1_fpr"))
    }


def worded(row: dict[str, Any]) -> str:
    """The figures of a row with their intervals, for the screen."""
    return "  ".join(
        f"{key} {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        for key, value in row.items()
        if isinstance(value, dict)
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of every script here."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="bundled", help="bundled, or local-dir:PATH")
    made.add_argument("--dataset", default="generated", help="generated, or a folder or zip file")
    made.add_argument("--classes", type=int, default=16, help="0 is all")
    made.add_argument("--per-class", type=int, default=40, help="most images taken of each class")
    made.add_argument("--device", default="auto")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--json", type=Path, help="write figures there, and a plot beside it as .svg")
    return made


def save(args: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> None:
    """Figures with what they were measured on."""
    if args.json:
        paths = ("model", "dataset", "json")  # whose folders are this machine's
        shown = {k: Path(v).name if k in paths else v for k, v in vars(args).items()}
        content = {"machine": machine.describe(), "settings": shown, **more, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
