"""A client's model and images: the private side, before any run."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from secure_fedprompt.clients.accounting import Steps
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data.loading import classes_digest
from secure_fedprompt.clients.data.sets import ImageSet
from secure_fedprompt.clients.features import Features, Progress, at_once, encode
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.ledger import Ledger
from secure_fedprompt.clients.methods.base import Batch, build
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.clients.starting import begin_from
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.settings import MethodSettings

_NO_DP = PrivacySettings()
_CHUNK = 256  # images at a time through the image tower
_VIEWS = 1 << 33  # a key of draws that no round has


def client_seed(seed: int, name: str) -> int:
    """A client's own seed: independent clients share none."""
    return zlib.crc32(f"{seed} {name}".encode())


class LocalTrainer:
    """A client's model and data: the ``Workload`` of a session.

    Args:
        backbone: frozen towers.
        train, test: this client's images.
        seed: of batch order and augmentation; None draws it from the operating system.
        augment: train on random crops and flips, encoded anew in every epoch.
        progress: called with what is being done, how far, out of how much.
        features: pooled features of ``train`` and ``test``, if they are known already.
        seat: this client's place on the roster, and how many clients are on it.
        dp: differential privacy of the images; the spend is kept in ``keep``.
    """

    def __init__(
        self,
        backbone: Backbone,
        train: ImageSet,
        test: ImageSet,
        seed: int | None = None,
        augment: bool = False,
        progress: Progress = lambda what, done, total: None,
        features: tuple[Features, Features] | None = None,
        seat: tuple[int, int] = (0, 1),
        dp: PrivacySettings = _NO_DP,
    ) -> None:
        self.backbone, self.progress, self.seed = backbone, progress, seed
        self.augment, self.seat, self.dp = augment, seat, dp
        dp.check()
        self.cancelled = threading.Event()
        self.class_names = train.class_names
        self.model_fingerprint = backbone.fingerprint
        self.classes_digest = classes_digest(train.class_names)
        self.weight = float(len(train))
        self.hold_seconds, self.views, self.compile = 0.0, 0, False  # as the client's settings say
        self._sets = train, test
        self._features = {features[0].needs: features} if features else {}
        self._views = dict[str, torch.Tensor]()
        self.keep: Path | None = None  # folder for what the method must not forget
        self.start_prompt: Path | None = None  # file to begin from, if a run asks for it
        self.ledger = Ledger()
        if self.dp.kind == "sample" and self.dp.delta * len(train) >= 1:
            raise ConfigError(
                f"dp.delta = {self.dp.delta:g}: with {len(train)} images it must be below "
                f"{1 / len(train):.2g}, or publishing one of them whole would be allowed"
            )
        self.resuming = False
        self.local_metrics = False  # whether figures are wanted where no round counts them
        backbone.check_class_names(train.class_names)

    @property
    def image_counts(self) -> tuple[int, int]:
        """Training and test images."""
        return len(self._sets[0]), len(self._sets[1])

    def draws(self, *key: int) -> np.random.Generator:
        """Random numbers of this client and a key, or fresh ones if there is no seed."""
        return np.random.default_rng(None if self.seed is None else [self.seed, *key])

    def prepare(self, settings: MethodSettings) -> LocalLearner:
        """Build the method of a run, and encode the images for it.

        Raises:
            ConfigError: it does not go with dp. BudgetError: nothing is left of the budget.
        """
        method = build(settings, self.backbone, self.class_names)
        if self.dp.kind == "sample":
            if method.fine_tunes:
                raise ConfigError(f"dp.kind = 'sample': {settings.method} trains outside of rounds")
            method.private_parts()  # refused before anything is encoded
            if self.dp.noise_multiplier and not self.resuming:  # within a run nobody is told
                # Of all that a server may ask for, the least: else it would ask how many images.
                least = Steps(self.dp.noise_multiplier, 1 / len(self._sets[0]), 1)
                self.ledger.check_room(least, self.dp)
        method.sit(*self.seat)
        if settings.start:
            places = [self.start_prompt, self.keep]
            begin_from(method, settings.start, [place for place in places if place is not None])
        learner = LocalLearner(self, settings, method)
        train, _ = self.features(method.needs)
        method.observe(train.images, train.labels)
        return learner

    def features(self, needs: str) -> tuple[Features, Features]:
        """Training and test images as a method needs them. Decoded and encoded once: without
        augmentation the frozen tower gives the same again."""
        if needs not in self._features:
            train, test = self._sets
            self._features[needs] = (
                Features(self.backbone, train, needs, self.progress, "encoding training images"),
                Features(self.backbone, test, needs, self.progress, "encoding test images"),
            )
        return self._features[needs]

    def batches(self, images: Features, order: NDArray[np.int64], size: int) -> Iterator[Batch]:
        """Training images in this order, freshly augmented if that is asked."""
        return (
            self._augmented(images.needs, order, size)
            if self.augment
            else images.batches(size, order)
        )

    def batch(self, images: Features, rows: NDArray[np.int64]) -> Batch:
        """These images, none or more: a view depends on its image alone."""
        index = torch.from_numpy(rows)
        if self.augment and len(rows):
            return next(self._augmented(images.needs, rows, len(rows)))
        picked = images.images[index.to(images.images.device)]
        return Batch(picked, images.labels[index.to(images.labels.device)])

    def _augmented(self, needs: str, order: NDArray[np.int64], size: int) -> Iterator[Batch]:
        """Batches of random views: fresh ones, which the frozen tower encodes anew, or some of
        those that are kept."""
        labels = torch.from_numpy(self._sets[0].labels).to(self.backbone.device)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            index = torch.from_numpy(rows).to(labels.device)
            if self.views:
                drawn = torch.randint(self.views, (len(rows),)).to(labels.device)
                views = self.kept_views(needs)[drawn, index]
            else:
                views = self._view(needs, rows)
            yield Batch(views, labels[index])

    def _view(self, needs: str, rows: NDArray[np.int64]) -> torch.Tensor:
        """A random view of each of these images, encoded."""
        train, _ = self._sets
        opened = at_once(train.image, rows.tolist())
        pixels = [self.backbone.train_transform(image) for image in opened]  # draws, in order
        return encode(self.backbone, torch.stack(pixels), needs)

    def kept_views(self, needs: str) -> torch.Tensor:
        """(views, N, ...): made once, and alike whenever a client with a seed is started again."""
        if needs not in self._views:
            count = len(self._sets[0])
            chunks = np.array_split(np.arange(count), -(-count // _CHUNK))
            found = []
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(self.draws(_VIEWS).integers(2**62)))
                for i in range(self.views):
                    found.append(torch.cat([self._view(needs, rows) for rows in chunks]))
                    self.progress("encoding views", i + 1, self.views)
            self._views[needs] = torch.stack(found)
        return self._views[needs]
