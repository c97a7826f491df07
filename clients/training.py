"""Local training and evaluation: the private side of a client."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from secure_fedprompt.clients.accounting import Steps, noise_for, steps_of
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data.loading import classes_digest
from secure_fedprompt.clients.data.sets import ImageSet
from secure_fedprompt.clients.features import Features, Progress, encode, predict
from secure_fedprompt.clients.ledger import Entry, Ledger
from secure_fedprompt.clients.methods.base import Arrays, Batch, Method, build
from secure_fedprompt.clients.privacy_settings import PrivacySettings
from secure_fedprompt.clients.session import Work
from secure_fedprompt.protocol import layout as lay
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.errors import ConfigError, DataError, UpdateError
from secure_fedprompt.protocol.fixedpoint import LOSS_CLIP
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.selection.shares import Keys
from secure_fedprompt.protocol.settings import MethodSettings

Result = tuple["Values", float] | Keys
_NO_DP = PrivacySettings()
_AFTER = 1 << 32  # later than every learning round
_LAST = (1 << 32) - 1  # a round's number that no plan has
Values = dict[str, NDArray[np.floating[Any]] | np.float64]


_METRICS = (lay.SEEN, lay.CORRECT, lay.LOSS, lay.ZERO_SHOT)


@dataclass(frozen=True)
class Figures:
    """What a client's own user may know of a round, and nobody else.

    Attributes:
        images: of the client's own test set; 0 where nothing was counted.
        correct: of these, by the prompt of the round's start; zero_shot: by words alone.
        loss: mean cross-entropy of these.
        first_loss, last_loss: mean loss of the first and the last epoch of training, not with dp.
    """

    images: int = 0
    correct: int = 0
    zero_shot: int = 0
    loss: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None


def _named_round(plan: RoundPlan) -> str:
    return f"round {plan.learning_round}/{plan.rounds}: training"


def client_seed(seed: int, name: str) -> int:
    """A client's own seed: independent clients share none."""
    return zlib.crc32(f"{seed} {name}".encode())


class LocalTrainer:
    """A client's model, data and method: the ``Workload`` of a session.

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
        self.sigma = 0.0  # noise multiplier of the run under way
        self.spent = 0.0  # epsilon of all steps so far, once somebody has asked for it
        self.cancelled = threading.Event()
        self.class_names = train.class_names
        self.model_fingerprint = backbone.fingerprint
        self.classes_digest = classes_digest(train.class_names)
        self.weight = float(len(train))
        self.hold_seconds = 0.0  # as the client's settings say
        self._sets = train, test
        self._features = {features[0].needs: features} if features else {}
        self.keep: Path | None = None  # folder for what the method must not forget
        self._restored = b""
        self.method: Method | None = None
        self.settings: MethodSettings | None = None
        self._before: tuple[tuple[bytes, int], Arrays] | None = None  # private part, round's start
        self.ledger = Ledger()
        if self.dp.kind == "sample" and self.dp.delta * len(train) >= 1:
            raise ConfigError(
                f"dp.delta = {self.dp.delta:g}: with {len(train)} images it must be below "
                f"{1 / len(train):.2g}, or publishing one of them whole would be allowed"
            )
        self._zero_shot_hits: int | None = None
        self._counted: Values = {}  # metrics of the round under way
        self.resuming = False
        self.local_metrics = False  # whether ``figures`` are wanted where no round counts them
        self.figures = Figures()
        self.clipped = 0  # update values beyond the plan's clip in the last round
        self.norms: list[float] = []  # L2 norms of the updates so far
        backbone.check_class_names(train.class_names)

    @property
    def image_counts(self) -> tuple[int, int]:
        """Training and test images."""
        return len(self._sets[0]), len(self._sets[1])

    def prepare(self, settings: MethodSettings) -> None:
        self.settings = settings
        self.method = build(settings, self.backbone, self.class_names)
        if self.dp.kind == "sample":
            if self.method.fine_tunes:
                raise ConfigError(f"dp.kind = 'sample': {settings.method} trains outside of rounds")
            self.method.private_parts()  # refused before anything is encoded
            if self.dp.noise_multiplier and not self.resuming:  # within a run nobody is told
                rate, steps = steps_of(len(self._sets[0]), settings.batch_size, settings.epochs)
                self.ledger.check_room(Steps(self.dp.noise_multiplier, rate, steps), self.dp)
        self.method.sit(*self.seat)
        self._initial = self._flattened(self.method.state())
        train, _ = self._load_features(self.method.needs)
        self.method.observe(train.images, train.labels)

    def _load_features(self, needs: str) -> tuple[Features, Features]:
        """Decoded and encoded once: without augmentation the frozen tower gives the same again."""
        if needs not in self._features:
            train, test = self._sets
            self._features[needs] = (
                Features(self.backbone, train, needs, self.progress, "encoding training images"),
                Features(self.backbone, test, needs, self.progress, "encoding test images"),
            )
        return self._features[needs]

    def _flattened(self, tensors: Arrays) -> Prompt:
        assert self.method is not None
        return np.concatenate([tensors[t.name].reshape(-1) for t in self.method.uploaded()])

    def tensors(self) -> tuple[TensorSpec, ...]:
        assert self.method is not None
        return self.method.uploaded()

    def initial(self) -> Prompt:
        return self._initial

    def finish(self, flat: Prompt, run: bytes) -> None:
        """Take over the final prompt of a run; what a client has made of it since is kept."""
        assert self.method is not None
        self._restore(run)
        own = self.method.private() if self.method.fine_tunes else {}
        self.method.begin(self._named(flat), _AFTER)
        if own:
            self.method.restore(own)
        elif self.method.fine_tunes:  # no round evaluated the last prompt
            train, _ = self._load_features(self.method.needs)
            self._fine_tune(train, run, _LAST)

    def _named(self, flat: Prompt) -> Arrays:
        assert self.method is not None
        tensors, at = {}, 0
        for spec in self.method.uploaded():
            tensors[spec.name] = flat[at : at + spec.size].reshape(spec.shape)
            at += spec.size
        return tensors

    def _kept(self, run: bytes) -> Path | None:
        return self.keep / f"private-{run.hex()[:8]}.safetensors" if self.keep else None

    def _restore(self, run: bytes) -> None:
        """What the method kept of this run before a restart, once."""
        path = self._kept(run)
        if self._restored == run or path is None or not path.exists():
            return
        assert self.method is not None
        try:
            self.method.restore(load_file(path))
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            line = str(error).splitlines()[0]
            raise DataError(f"{path} cannot be used: {line}; remove it to start afresh") from None
        self._restored = run

    def _save(self, run: bytes) -> None:
        assert self.method is not None
        path, arrays = self._kept(run), self.method.private()
        if path is None or not arrays:
            return
        partial = path.with_suffix(".partial")
        partial.touch(mode=0o600)
        save_file(arrays, partial)
        partial.replace(path)
        self._restored = run

    def run(self, work: Work) -> Result:
        """Evaluate the global prompt, train on it if the round trains, and return the contribution.

        Where server and helper select, the first call returns the keys of the groups; the second
        has their choice in ``work``, and trains no more.

        Returns:
            update tensors and metric counters by field name, and the weight n_k; or the keys.
        """
        if work.choice is not None:
            return self._contribution(work)
        assert self.method is not None
        assert self.settings is not None
        plan, method = work.plan, self.method
        train, test = self._load_features(method.needs)
        self._restore(plan.run)
        here = plan.run, plan.learning_round
        if self._before and self._before[0] == here:  # an attempt at this round was aborted
            method.restore(self._before[1])
        self._before = here, method.private()
        method.begin(self._named(work.base), plan.learning_round)
        self.clipped, self.figures = 0, Figures()
        if method.fine_tunes and not plan.training:
            self._fine_tune(train, plan.run, plan.round)
        counting = any(field.name == lay.SEEN for field in plan.layout)
        values: Values = {}
        if self.local_metrics or (counting and self.dp.kind == "none"):
            values = self._metrics(test)
        if counting and self.dp.kind != "none":
            values = {name: np.float64(0) for name in _METRICS}
        elif not counting:
            values = {}
        if plan.training:
            if self.dp.kind == "sample":
                self._train_privately(train, plan)
            else:
                self._train(train, plan.run, plan.round, _named_round(plan))
        self._counted = values
        if plan.selecting:
            return method.selection_keys(self._draws(plan))
        return self._contribution(work)

    def _metrics(self, test: Features) -> Values:
        """Counters of the prompt as it came, on this client's own test images."""
        assert self.method is not None
        guesses, losses = predict(self.method, test)
        hits, zero = int((guesses == test.labels.cpu().numpy()).sum()), self._zero_shot()
        self.figures = Figures(len(test), hits, zero, float(losses.mean()) if len(test) else None)
        summed = np.minimum(losses, LOSS_CLIP).sum()
        counts = (len(test), hits, summed, zero)
        return {name: np.float64(count) for name, count in zip(_METRICS, counts, strict=True)}

    def _zero_shot(self) -> int:
        """Test images that "a photo of a NAME." gets right: what the run is measured against."""
        if self._zero_shot_hits is None:
            method = build(MethodSettings(method="zeroshot"), self.backbone, self.class_names)
            _, test = self._load_features(method.needs)
            guesses, _ = predict(method, test)
            self._zero_shot_hits = int((guesses == test.labels.cpu().numpy()).sum())
        return self._zero_shot_hits

    def _draws(self, plan: RoundPlan) -> np.random.Generator:
        return np.random.default_rng(None if self.seed is None else [self.seed, plan.round, 1])

    def _contribution(self, work: Work) -> tuple[Values, float]:
        """The trained method's update, with the counters of this round."""
        assert self.method is not None
        plan, method, values = work.plan, self.method, self._counted
        if plan.training:
            sent = method.contribution(self._draws(plan), work.choice)
            delta = self._flattened(sent) - work.base
            self._save(plan.run)
            self.clipped = int(np.count_nonzero(np.abs(delta) > plan.clip))
            self.norms.append(float(np.linalg.norm(delta)))
            at = 0
            for i, spec in enumerate(method.uploaded()):
                values[spec.name] = delta[at : at + spec.size].reshape(spec.shape)
                at += spec.size
                if plan.selection.federation:
                    assert work.choice is not None
                    filled = np.arange(spec.shape[0]) < len(work.choice[i])
                    values[lay.FILLED + spec.name] = filled.astype(np.float64)
        return values, 1.0 if plan.uniform else self.weight

    def _fine_tune(self, images: Features, run: bytes, number: int) -> None:
        """Once more, on the last aggregate."""
        assert self.method is not None
        self._train(images, run, number, "fine-tuning")
        self.method.tuned()
        self._save(run)

    def _check_kind(self, run: bytes) -> None:
        """Refuse to change between dp and none within a run.

        Raises:
            ConfigError: what was done first decides what the other promises.
        """
        began, kept = self.ledger.sigma_of(run.hex()), self._kept(run)
        private = self.dp.kind == "sample"
        if began is None and private and kept is not None and kept.exists():
            began = 0.0  # the ledger was lost
        if began is None or private == (began > 0):
            return
        before = "without dp, so that its prompts are not private" if private else "with DP-SGD"
        raise ConfigError(
            f"dp.kind = {self.dp.kind!r}: this client has trained in run {run.hex()[:8]} "
            f"{before}; change it back, or wait for the next run"
        )

    def _train(self, images: Features, run: bytes, number: int, what: str) -> None:
        """Local SGD; optimiser and momentum are new in each round. It is on record before the
        first step.

        Args:
            number: of the round, as in plans; what: is done, for the progress bar.
        """
        assert self.method is not None
        assert self.settings is not None
        s, method = self.settings, self.method
        if not method.parameters():
            return
        self._check_kind(run)
        rng = np.random.default_rng(None if self.seed is None else [self.seed, number])
        optimiser = torch.optim.SGD(
            method.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay
        )
        # A batch of everything would make training a function of the prompt alone.
        size = min(s.batch_size, max(1, len(images) // 4))
        steps = s.epochs * -(-len(images) // size)
        entry = Entry(run.hex(), number, 0.0, size / len(images), steps)
        self.ledger.reserve(entry, self.dp)
        done, losses = 0, list[torch.Tensor]()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator
            torch.manual_seed(int(rng.integers(2**62)))
            for _ in range(s.epochs):
                order = rng.permutation(len(images))
                batches = images.batches(size, order)
                for batch in self._augmented(order, size) if self.augment else batches:
                    if self.cancelled.is_set():
                        raise UpdateError("training was cancelled")
                    optimiser.zero_grad()
                    loss = method.loss(batch)
                    torch.autograd.backward(loss)
                    optimiser.step()
                    done += 1
                    losses.append(loss.detach().float() * len(batch.labels))
                    self.progress(what, done, steps)
        each = steps // s.epochs
        first, last = (
            float(torch.stack(part).sum()) / len(images) for part in (losses[:each], losses[-each:])
        )
        self.figures = replace(self.figures, first_loss=first, last_loss=last)

    def _train_privately(self, images: Features, plan: RoundPlan) -> None:
        """DP-SGD: the spend is on the disk before the first step.

        Raises:
            BudgetError: the budget does not allow this round.
            ConfigError: this run was begun without dp.
        """
        from secure_fedprompt.clients.dp_sgd import Draws, PrivateTraining

        assert self.method is not None
        assert self.settings is not None
        s, dp, method, run = self.settings, self.dp, self.method, plan.run.hex()
        self._check_kind(plan.run)
        self.ledger.check_bounded(dp)
        rate, steps = steps_of(len(images), s.batch_size, s.epochs)
        self.sigma = max(self.ledger.sigma_of(run) or 0.0, dp.noise_multiplier)
        if not self.sigma:
            left = steps * (plan.rounds - plan.learning_round + 1 + dp.retries)
            before = self.ledger.history
            self.sigma = noise_for(dp.target_epsilon, dp.delta, rate, left, before, dp.accountant)
        entry = Entry(run, plan.round, self.sigma, rate, steps, dp.delta, dp.accountant)
        self.ledger.reserve(entry, dp)
        optimiser = torch.optim.SGD(
            method.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay
        )
        draws = Draws(os.urandom)
        training = PrivateTraining(
            method, optimiser, draws, sigma=self.sigma, clip=dp.max_grad_norm,
            expected=rate * len(images),
        )  # fmt: skip
        try:
            for done in range(steps):
                if self.cancelled.is_set():
                    raise UpdateError("training was cancelled")
                taken = draws.poisson(len(images), rate)
                training.step(self._batch(images, taken))
                self.progress(_named_round(plan), done + 1, steps)
        finally:
            training.close()

    def _batch(self, images: Features, rows: NDArray[np.int64]) -> Batch:
        """These images, freshly augmented if that is asked: a view depends on its image alone."""
        index = torch.from_numpy(rows)
        if self.augment and len(rows):
            return next(self._augmented(rows, len(rows)))
        picked = images.images[index.to(images.images.device)]
        return Batch(picked, images.labels[index.to(images.labels.device)])

    def _augmented(self, order: NDArray[np.int64], size: int) -> Iterator[Batch]:
        """Batches of fresh random views; the frozen tower encodes each anew."""
        assert self.method is not None
        train, _ = self._sets
        labels = torch.from_numpy(train.labels).to(self.backbone.device)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            views = torch.stack([self.backbone.train_transform(train.image(i)) for i in rows])
            views = encode(self.backbone, views, self.method.needs)
            yield Batch(views, labels[torch.from_numpy(rows).to(labels.device)])
