"""Local training and evaluation: one client in one run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from secure_fedprompt.clients.drift import Drift, decay_of
from secure_fedprompt.clients.features import Features, predict
from secure_fedprompt.clients.kept import Kept
from secure_fedprompt.clients.ledger import Entry
from secure_fedprompt.clients.methods.base import Arrays, Method, build
from secure_fedprompt.clients.steps import CompiledSteps, Steps
from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.protocol import layout as lay
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.errors import ConfigError, UpdateError
from secure_fedprompt.protocol.fixedpoint import LOSS_CLIP
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.schedule import rate
from secure_fedprompt.protocol.selection.shares import Keys
from secure_fedprompt.protocol.settings import MethodSettings

if TYPE_CHECKING:
    from secure_fedprompt.clients.training import LocalTrainer

_AFTER = 1 << 32  # later than every learning round
_LAST = (1 << 32) - 1  # a round's number that no plan has
_METRICS = (lay.SEEN, lay.CORRECT, lay.LOSS, lay.ZERO_SHOT)
Counts = dict[str, NDArray[np.floating[Any]] | np.float64]


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


def named_round(learning_round: int, rounds: int) -> str:
    """A round, for the progress bar."""
    return f"round {learning_round}/{rounds}: training"


class LocalLearner:
    """A client's images with the method of a run: the ``Learner`` of a session.

    Args:
        client: model and images.
        settings, method: of the run.

    Attributes:
        figures: of the last round, for this client's own user.
        clipped: update values beyond the plan's clip in the last round.
        diverged: whether its training overflowed, so that what came before was sent.
        norms: L2 norms of the updates so far.
        sigma: noise multiplier of the run. spent: epsilon so far, once somebody has asked for it.
        seconds: that the last round's work took, once somebody has counted them.
    """

    def __init__(self, client: LocalTrainer, settings: MethodSettings, method: Method) -> None:
        self.client, self.settings, self.method = client, settings, method
        self.kept = Kept(client.keep)
        self.figures, self.clipped, self.norms = Figures(), 0, list[float]()
        self.sigma = self.spent = self.seconds = 0.0
        self.diverged = False
        self._initial = self._flattened(method.state())
        self._before: tuple[tuple[bytes, int], Arrays] | None = None  # private part, round's start
        self._zero_shot_hits: int | None = None
        self._steps: Steps | None = None
        self._counted: Counts = {}  # metrics of the round under way

    def tensors(self) -> tuple[TensorSpec, ...]:
        return self.method.uploaded()

    def initial(self) -> Prompt:
        return self._initial

    def _flattened(self, tensors: Arrays) -> Prompt:
        return np.concatenate([tensors[t.name].reshape(-1) for t in self.method.uploaded()])

    def finish(self, flat: Prompt, run: bytes) -> None:
        """Take over the final prompt of a run; what a client has made of it since is kept."""
        self.kept.restore(self.method, run)
        own = self.method.private() if self.method.fine_tunes else {}
        self.method.begin(self._named(flat), _AFTER)
        if own:
            self.method.restore(own)
        elif self.method.fine_tunes:  # no round evaluated the last prompt
            train, _ = self.client.features(self.method.needs)
            self._fine_tune(train, run, _LAST)

    def _named(self, flat: Prompt) -> Arrays:
        return {
            spec.name: flat[part].reshape(spec.shape)
            for spec, part in lay.slices(self.method.uploaded())
        }

    def run(self, work: Work) -> Update | Keys:
        if work.choice is not None:
            return self._contribution(work)
        plan, method, client = work.plan, self.method, self.client
        train, test = client.features(method.needs)
        self.kept.restore(method, plan.run)
        here = plan.run, plan.learning_round
        if self._before and self._before[0] == here:  # an attempt at this round was aborted
            method.restore(self._before[1])
        self._before = here, method.private()
        method.begin(self._named(work.base), plan.learning_round)
        self.clipped, self.figures = 0, Figures()
        if method.fine_tunes and not plan.training:
            self._fine_tune(train, plan.run, plan.round)
        counting = any(field.name == lay.SEEN for field in plan.layout)
        values: Counts = {}
        if client.local_metrics or (counting and client.dp.kind == "none"):
            values = self._metrics(test)
        if counting and client.dp.kind != "none":
            values = {name: np.float64(0) for name in _METRICS}
        elif not counting:
            values = {}
        if plan.training:
            if client.dp.kind == "sample":
                from secure_fedprompt.clients.private_training import train_privately

                train_privately(self, train, plan)
            else:
                self.train_round(plan.run, plan.round, (plan.learning_round, plan.rounds))
        self._counted = values
        if plan.selecting:
            return method.selection_keys(client.draws(plan.round, 1))
        return self._contribution(work)

    def train_round(self, run: bytes, number: int, place: tuple[int, int]) -> None:
        """Train from where the method is.

        Args:
            number: of the round, as in plans. place: the learning round, of how many.
        """
        train, _ = self.client.features(self.method.needs)
        pace = functools.partial(rate, self.settings, *place)
        self._train(train, run, number, named_round(*place), pace)

    def _metrics(self, test: Features) -> Counts:
        """Counters of the prompt as it came, on this client's own test images."""
        guesses, losses = predict(self.method, test)
        hits, zero = int((guesses == test.labels.cpu().numpy()).sum()), self._zero_shot()
        self.figures = Figures(len(test), hits, zero, float(losses.mean()) if len(test) else None)
        summed = np.minimum(losses, LOSS_CLIP).sum()
        counts = (len(test), hits, summed, zero)
        return {name: np.float64(count) for name, count in zip(_METRICS, counts, strict=True)}

    def _zero_shot(self) -> int:
        """Test images that "a photo of a NAME." gets right: what the run is measured against."""
        if self._zero_shot_hits is None:
            client = self.client
            method = build(MethodSettings(method="zeroshot"), client.backbone, client.class_names)
            _, test = client.features(method.needs)
            guesses, _ = predict(method, test)
            self._zero_shot_hits = int((guesses == test.labels.cpu().numpy()).sum())
        return self._zero_shot_hits

    def _contribution(self, work: Work) -> Update:
        """The trained method's update, with the counters of this round."""
        plan, method, values = work.plan, self.method, self._counted
        if plan.training:
            sent = method.contribution(self.client.draws(plan.round, 1), work.choice)
            delta = self._flattened(sent) - work.base
            self.kept.save(method, plan.run)
            self.clipped = int(np.count_nonzero(np.abs(delta) > plan.clip))
            self.norms.append(float(np.linalg.norm(delta.astype(np.float64))))
            for i, (spec, part) in enumerate(lay.slices(method.uploaded())):
                values[spec.name] = delta[part].reshape(spec.shape)
                if plan.selection.federation:
                    assert work.choice is not None
                    filled = np.arange(spec.shape[0]) < len(work.choice[i])
                    values[lay.FILLED + spec.name] = filled.astype(np.float64)
        return Update(values, 1.0 if plan.uniform else self.client.weight)

    def _fine_tune(self, images: Features, run: bytes, number: int) -> None:
        """Once more, on the last aggregate."""
        self._train(images, run, number, "fine-tuning", lambda epoch: self.settings.lr)
        self.method.tuned()
        self.kept.save(self.method, run)

    def _taking(self, steps: int) -> Steps:
        """Steps from rest. They are kept: a compiled graph belongs to their tensors."""
        s, trained = self.settings, self.method.parameters()
        if self._steps is None or list(map(id, self._steps.parameters)) != list(map(id, trained)):
            kind = CompiledSteps if self.client.compile else Steps
            self._steps = kind(
                self.method, lr=s.lr, momentum=s.momentum, weight_decay=decay_of(s, steps)
            )
        self._steps.restart()
        return self._steps

    def check_kind(self, run: bytes) -> None:
        """Refuse to change between dp and none within a run.

        Raises:
            ConfigError: what was done first decides what the other promises.
        """
        client = self.client
        began, kept = client.ledger.sigma_of(run.hex()), self.kept.path(run)
        private = client.dp.kind == "sample"
        if began is None and private and kept is not None and kept.exists():
            began = 0.0  # the ledger was lost
        if began is None or private == (began > 0):
            return
        before = "without dp, so that its prompts are not private" if private else "with DP-SGD"
        raise ConfigError(
            f"dp.kind = {client.dp.kind!r}: this client has trained in run {run.hex()[:8]} "
            f"{before}; change it back, or wait for the next run"
        )

    def _train(
        self, images: Features, run: bytes, number: int, what: str, pace: Callable[[int], float]
    ) -> None:
        """Local SGD; optimiser and momentum are new in each round. It is on record before the
        first step.

        Args:
            number: of the round, as in plans; what: is done, for the progress bar; pace: learning
                rate of an epoch.
        """
        s, method, client = self.settings, self.method, self.client
        if not method.parameters():
            return
        self.check_kind(run)
        rng = client.draws(number)
        # A batch of everything would make training a function of the prompt alone.
        size = min(s.batch_size, max(1, len(images) // 4))
        each = -(-len(images) // size)
        steps = s.epochs * each
        taking = self._taking(steps)
        paces = [pace(epoch) for epoch in range(s.epochs)]
        drift = Drift(s, method.parameters(), paces, [done // each for done in range(steps)])
        entry = Entry(run.hex(), number, 0.0, size / len(images), steps)
        client.ledger.reserve(entry, client.dp)
        if client.compile:
            client.progress("compiling a step", 0, 1)
        done, losses = 0, list[torch.Tensor]()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator
            torch.manual_seed(int(rng.integers(2**62)))
            for epoch in range(s.epochs):
                taking.rate.fill_(paces[epoch])
                order = rng.permutation(len(images))
                for batch in client.batches(images, order, size):
                    if client.cancelled.is_set():
                        raise UpdateError("training was cancelled")
                    loss = taking.take(batch)
                    taking.keep_finite()
                    done += 1
                    losses.append(loss.float() * len(batch.labels))
                    client.progress(what, done, steps)
        self.diverged = taking.recover()
        if not self.diverged:
            drift.even_out()
        first, last = (
            float(torch.stack(part).sum()) / len(images) for part in (losses[:each], losses[-each:])
        )
        self.figures = replace(self.figures, first_loss=first, last_loss=last)
