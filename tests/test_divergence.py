"""The server chooses what is trained, and images how many steps that is: whose training overflows
must not depend on both, or a sum is of those whose does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rounds import make_plan

from secure_fedprompt.clients import drift
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.clients.steps import Steps
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.clients.work import Work
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import settings as protocol_settings
from secure_fedprompt.protocol.settings import ComparatorSettings, MethodSettings

OVER: dict[str, dict[str, Any]] = {
    "decay": {"lr": 10.0, "weight_decay": 1.0},
    "just": {"lr": 10.0, "weight_decay": 0.101},
    "proximal": {"method": "fedprox", "lr": 1.0, "compare": ComparatorSettings(prox_mu=10.0)},
    "anchored": {"method": "fedamp", "lr": 1.0, "compare": ComparatorSettings(amp_lambda=10.0)},
}


@pytest.mark.parametrize("case", OVER)
def test_settings_whose_steps_overshoot_are_refused_at_both_ends(case: str) -> None:
    settings = MethodSettings(**OVER[case])
    with pytest.raises(errors.ConfigError, match=r"take a prompt back by more than 100%"):
        settings.check()
    with pytest.raises(errors.ConfigError, match="lr = "):
        MethodSettings.from_bytes(settings.to_bytes())


def test_settings_that_do_not_are_not() -> None:
    MethodSettings(lr=10.0, weight_decay=0.1).check()
    MethodSettings(lr=1.0, compare=ComparatorSettings(prox_mu=10.0)).check()  # not fedprox


@pytest.mark.parametrize(("epochs", "overflows"), [(1, False), (12, True)])
def test_training_that_overflows_sends_the_last_prompt_that_had_not(
    bundled: Backbone, monkeypatch: pytest.MonkeyPatch, epochs: int, overflows: bool
) -> None:
    """And no zeros: a sum in which all others are zeros is one client's update."""
    monkeypatch.setattr(protocol_settings, "MOST_PULL", 1e3)
    monkeypatch.setattr(drift, "MOST", 1e9)
    train, test = sets.generated_sets(4, ["sketch"], 8, 1, 0)
    trainer = LocalTrainer(bundled, train, test, seed=0)
    wild = MethodSettings(n_ctx=2, lr=2.0, weight_decay=50.0, batch_size=8, epochs=epochs)
    learner = trainer.prepare(wild)
    plan = make_plan(3, tensors=learner.tensors())
    update = np.ravel(learner.run(Work(plan, learner.initial())).values["ctx"])  # type: ignore[union-attr]
    assert learner.diverged == overflows
    assert np.isfinite(update).all()
    assert np.abs(update).max() > (1e20 if overflows else 1.0)
    assert learner.run(Work(plan, learner.initial())).values.keys()  # type: ignore[union-attr]


def test_only_the_steps_after_the_last_finite_one_are_taken_back() -> None:
    class Line:
        """A loss that is linear in one number, whose slope is the batch."""

        def __init__(self) -> None:
            self.p = torch.nn.Parameter(torch.zeros(1))

        def parameters(self) -> list[torch.Tensor]:
            return [self.p]

        def loss(self, batch: float) -> torch.Tensor:
            return (self.p * batch).sum()

    line: Any = Line()
    taking = Steps(line, lr=1.0, momentum=0.0, weight_decay=0.0)
    for slopes, end, diverged in (
        ([1.0, 2.0], -3.0, False),
        ([1.0, float("inf"), 4.0], -1.0, True),
        ([float("nan")], 0.0, True),
        ([2.0], -2.0, False),
    ):
        with torch.no_grad():
            line.p.zero_()
        taking.restart()
        for slope in slopes:
            taking.take(slope)  # type: ignore[arg-type]
            taking.keep_finite()
        assert taking.recover() == diverged
        assert line.p.tolist() == [end]


@pytest.mark.parametrize("pull", [0.0, 0.7])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_decay_alone_leaves_is_what_sgd_leaves(momentum: float, pull: float) -> None:
    rates = [0.1, 0.1, 0.05, 0.2, 0.01]
    p = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    sgd = torch.optim.SGD([p], lr=1.0, momentum=momentum, weight_decay=0.3)
    for rate in rates:
        sgd.param_groups[0]["lr"] = rate
        sgd.zero_grad()
        (pull / 2 * (p - 2.0).square().sum() + 0 * p.sum()).backward()
        sgd.step()
    assert p.tolist() == pytest.approx([2 * drift.share_left(rates, momentum, 0.3, pull)] * 3)


def test_decay_takes_back_a_tenth_of_a_round_at_most() -> None:
    published = MethodSettings(lr=2e-3)
    assert drift.decay_of(published, 5_000) == published.weight_decay
    for steps in (4, 400):
        wild = MethodSettings(lr=1.0, weight_decay=1.0, momentum=0.0)
        left = drift.share_left([1.0] * steps, 0.0, drift.decay_of(wild, steps), 0.0)
        assert 0.9 <= left < 0.91


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_images_whose_loss_says_nothing_are_not_counted(
    bundled: Backbone, private: bool, epochs: int
) -> None:
    """A prompt that decay alone moves is moved alike, whoever has more images: or a sum would be
    one of powers of all image counts."""
    train, test = sets.generated_sets(12, ["sketch"], 8, 1, 0)
    settings = MethodSettings(
        n_ctx=2, lr=0.5, weight_decay=0.5, batch_size=2, epochs=epochs, schedule="cosine"
    )
    dp = PrivacySettings(kind="sample", noise_multiplier=1e-9) if private else PrivacySettings()
    updates = []
    for count in (16, 60):
        trainer = LocalTrainer(bundled, train.subset(np.arange(count)), test, 0, dp=dp)
        learner = trainer.prepare(settings)
        method: Any = learner.method
        method.loss = lambda batch, loss=method.loss: 0.0 * loss(batch)
        method.sample_losses = lambda *args, losses=method.sample_losses: 0.0 * losses(*args)
        plan = make_plan(3, tensors=learner.tensors(), learning_round=2, rounds=3, round=2)
        made: Any = learner.run(Work(plan, learner.initial()))
        updates.append(np.ravel(made.values["ctx"]))
    largest = np.abs(updates[0]).max()
    assert largest > 1e-4
    for update in updates[1:]:
        assert np.allclose(update, updates[0], rtol=0, atol=1e-4 * largest)
