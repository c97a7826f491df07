"""Zero-shot beside every accuracy: what a run is measured against, and what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Toy, World
from rich.console import Console
from rounds import make_plan, names
from test_comparators import settings_of

from secure_fedprompt import show
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.features import Features, predict
from secure_fedprompt.clients.methods.base import build
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.host.log import Log
from secure_fedprompt.prompt_file import read_prompt
from secure_fedprompt.server.__main__ import tell
from secure_fedprompt.server.store import BEST


class Scored(Toy):
    """Right answers of twenty by round, and zero-shot's ten."""

    def __init__(self, right: list[float]) -> None:
        super().__init__(0.3, 1.0)
        self.right = right

    def run(self, work: Work) -> Any:
        values, weight = super().run(work)
        if any(field.name == "seen" for field in work.plan.layout):
            right = self.right[work.plan.learning_round - 1]
            values = {**values, "seen": np.float64(20), "correct": np.float64(right),
                      "zero_shot": np.float64(10)}  # fmt: skip
        return Update(values, weight)


def federation(folder: Path, right: list[float], **changes: Any) -> World:
    given = {"weights": "uniform", "metrics": "rounds", "rounds": len(right) - 1, **changes}
    world = World(folder, 4, **given)
    world.toys = {name: Scored(right) for name in names(4)}
    for name in names(4):
        world.join(name)
    world.pump()
    assert world.run.error is None
    return world


@pytest.mark.parametrize("protection", ["masks", "bfv"])
def test_zero_shot_is_counted_under_the_same_protection(tmp_path: Path, protection: str) -> None:
    world = federation(tmp_path, [8, 12, 16], protection=protection, metrics="final")
    rounds = world.store.summary()["rounds"]
    if protection == "masks":
        assert world.store.summary()["zero_shot"] == 0.5
        assert "zero_shot" not in rounds[0]["metrics"]  # once, at the end
        assert rounds[-1]["metrics"]["accuracy"] == 0.8
    else:  # only clients know
        assert world.store.summary()["zero_shot"] is None
        assert world.sessions["c001"].history[3]["zero_shot"] == 0.5


def test_the_best_prompt_is_kept_beside_the_last(tmp_path: Path) -> None:
    world = federation(tmp_path, [8, 18, 12, 11])
    best = read_prompt(tmp_path / BEST)
    second = read_prompt(world.store.prompt_path(1))
    last = read_prompt(world.store.prompt_path(3))
    for name, values in best.tensors.items():
        assert np.array_equal(values, second.tensors[name])
        assert not np.array_equal(values, last.tensors[name])
    (tmp_path / "f").mkdir()
    federation(tmp_path / "f", [8, 18, 12, 11], metrics="off")
    assert not (tmp_path / "f" / BEST).exists()


@pytest.mark.parametrize(
    ("right", "metrics", "warned", "best"),
    [([8, 18, 6], "rounds", True, True), ([8, 18, 6], "final", True, False),
     ([8, 6, 12], "rounds", False, False), ([8, 6, 10], "rounds", None, False)],
)  # fmt: skip
def test_a_prompt_worse_than_zero_shot_is_called_so(
    tmp_path: Path, right: list[float], metrics: str, warned: bool | None, best: bool
) -> None:
    world = federation(tmp_path, right, metrics=metrics)
    console = Console(width=400, record=True)
    for row in world.store.summary()["rounds"]:
        tell(Log("server", console=console), "round", row, world.settings, tmp_path)
    text = console.export_text()
    assert "zero-shot 50.0%, " in text
    assert ("the prompt is worse than zero-shot" in text) is bool(warned)
    assert ("the prompt is no better than zero-shot" in text) is (warned is None)
    assert (world.store.folder / BEST).exists() is (metrics == "rounds")
    if warned is not None:
        assert (f"the best prompt is {tmp_path / BEST}" in text) is best
    show.show_run(console, world.store.summary())
    points = 100 * (right[-1] - 10) / 20
    assert f"zero-shot 50.0% ({points:+.1f} points)" in console.export_text()


@pytest.mark.parametrize("method", ["promptfl", "fedotp", "fedmgp"])
def test_clients_count_what_zero_shot_gets_right(method: str) -> None:
    bundled = Backbone.load("bundled", device="cpu")
    train, test = sets.generated_sets(6, ["poster"], 4, 5, 0)
    plain = build(settings_of("zeroshot"), bundled, test.class_names)
    pooled = Features(bundled, test, plain.needs, lambda *_: None, "")
    expected = int((predict(plain, pooled)[0] == test.labels).sum())
    for dp, counted in ((PrivacySettings(), expected), (
        PrivacySettings(kind="sample", noise_multiplier=1.0), 0,
    )):  # fmt: skip
        trainer = LocalTrainer(bundled, train, test, 0, dp=dp)
        learner = trainer.prepare(settings_of(method))
        plan = make_plan(3, tensors=learner.tensors(), max_weight=1)
        values, _ = learner.run(Work(plan, learner.initial()))
        assert values["zero_shot"] == counted
    assert 0 < expected < len(test)
