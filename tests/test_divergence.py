"""The server chooses what is trained, and images how many steps that is: whose training overflows
must not depend on both, or a sum is of those whose does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rounds import make_plan

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.steps import Steps
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.clients.work import Work
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import settings as protocol_settings
from secure_fedprompt.protocol.settings import ComparatorSettings, MethodSettings

OVER: dict[str, dict[str, Any]] = {
    "decay": {"lr": 10.0, "weight_decay": 1.0},
    "just": {"lr": 10.0, "weight_decay": 0.0501},
    "proximal": {"method": "fedprox", "lr": 0.1, "compare": ComparatorSettings(prox_mu=100.0)},
    "anchored": {"method": "fedamp", "lr": 0.1, "compare": ComparatorSettings(amp_lambda=100.0)},
}


@pytest.mark.parametrize("case", OVER)
def test_settings_whose_steps_overshoot_are_refused_at_both_ends(case: str) -> None:
    settings = MethodSettings(**OVER[case])
    with pytest.raises(errors.ConfigError, match=r"take a prompt back by more than 50%"):
        settings.check()
    with pytest.raises(errors.ConfigError, match="lr = "):
        MethodSettings.from_bytes(settings.to_bytes())


def test_settings_that_do_not_are_not() -> None:
    MethodSettings(lr=10.0, weight_decay=0.05).check()
    MethodSettings(lr=0.1, compare=ComparatorSettings(prox_mu=100.0)).check()  # not fedprox


@pytest.mark.parametrize(("epochs", "overflows"), [(1, False), (40, True)])
def test_training_that_overflows_sends_the_last_prompt_that_had_not(
    bundled: Backbone, monkeypatch: pytest.MonkeyPatch, epochs: int, overflows: bool
) -> None:
    """And no zeros: a sum in which all others are zeros is one client's update."""
    monkeypatch.setattr(protocol_settings, "MOST_PULL", 1e3)
    train, test = sets.generated_sets(4, ["sketch"], 8, 1, 0)
    trainer = LocalTrainer(bundled, train, test, seed=0)
    wild = MethodSettings(n_ctx=2, lr=1.0, weight_decay=5.0, batch_size=2, epochs=epochs)
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
