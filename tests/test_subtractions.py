"""Sums of two rounds, one of them without a client: what is left of its update."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import World
from rounds import OPEN, names
from test_sum_keys import grown
from test_terms import make_terms

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.clients.work import Work
from secure_fedprompt.protocol import errors, fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.schedule import slowest
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.server.run import Run

N, PER, WIDTH = 4, 8, 2 * 128
TRAINING: dict[str, Any] = {
    "init": "a photo", "n_ctx": 2, "batch_size": 1, "momentum": 0.0, "weight_decay": 0.0,
    "metrics": "off", "weights": "uniform", "ring_bits": 32, "clip": 0.1, "patience": 5.0,
    "alive_seconds": 12.0, "gather_seconds": 20.0,
}  # fmt: skip


class Real:
    """A client's model and images as a workload of a world."""

    resuming = False

    def __init__(self, trainer: LocalTrainer) -> None:
        self.trainer, self.updates = trainer, dict[int, np.ndarray]()
        self.model_fingerprint = trainer.model_fingerprint
        self.classes_digest, self.weight = trainer.classes_digest, trainer.weight

    def prepare(self, settings: MethodSettings) -> LocalLearner:
        self.learner = self.trainer.prepare(settings)
        return self.learner

    def run(self, work: Work) -> Any:
        made = self.learner.run(work)
        assert not isinstance(made, list)
        self.updates[work.plan.learning_round] = np.ravel(made.values["ctx"])  # type: ignore[union-attr]
        return made


def without_the_last(
    folder: Path, bundled: Backbone, monkeypatch: pytest.MonkeyPatch, policy: Policy, **changes: Any
) -> tuple[World, list[np.ndarray]]:
    """A run whose server has no ears for the last client after the first round, and its sums."""
    sums: list[np.ndarray] = []
    applied = Run._apply

    def apply(self: Run, done: Any) -> None:
        sums.append(fixedpoint.decode(done.plan.layout, done.integers)[:WIDTH])
        applied(self, done)

    monkeypatch.setattr(Run, "_apply", apply)
    world = World(folder, N, policy, **TRAINING, **changes)
    train, test = sets.generated_sets(PER, ["sketch"], 8, 1, 0)
    shares = np.array_split(np.random.default_rng(0).permutation(len(train)), N)
    world.toys = {
        name: Real(LocalTrainer(bundled, train.subset(share[:PER]), test, int(share[0])))
        for name, share in zip(names(N), shares, strict=True)
    }
    world.withdraws = True
    last = names(N)[-1]

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.RoundEnd) and recipient == last and last not in world.lost:
            world.lose(last)
            world.lost.add(last)
        return message

    world.tamper = tap
    for name in names(N):
        world.join(name)
    world.pump()
    return world, sums


def error_of(guess: np.ndarray, update: np.ndarray) -> float:
    return float(np.linalg.norm(guess - update) / np.linalg.norm(update))


def test_two_sums_of_a_low_rate_open_an_update_of_who_does_not_mind(
    tmp_path: Path, bundled: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack, on clients that take any rate and any quorum."""
    world, (first, second) = without_the_last(tmp_path, bundled, monkeypatch, OPEN, lr=1e-5)
    assert world.run.error is None
    update = world.toys[names(N)[-1]].updates[1]
    assert error_of(first - second, update) < 0.05
    assert error_of(first / N, update) > 0.3  # what the mean alone tells


@pytest.mark.parametrize(
    ("policy", "words"),
    [({"min_lr": 1e-3}, "lr 1e-05 in round 1, but policy.min_lr is 0.001"),
     ({"min_survivors": N}, "quorum 3, but policy.min_survivors is 4"),
     ({"min_survivors": -1}, "quorum 3, but policy.min_survivors is -1: everybody, which is 4")],
    ids=str,
)  # fmt: skip
def test_who_minds_trains_nothing(
    tmp_path: Path,
    bundled: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    policy: dict[str, Any],
    words: str,
) -> None:
    world, sums = without_the_last(tmp_path, bundled, monkeypatch, Policy(**policy), lr=1e-5)
    assert not sums
    assert not any(toy.updates for toy in world.toys.values())
    assert set(world.errors) == set(names(N))
    assert all(words in str(error) for error in world.errors.values())


def test_the_rate_of_every_round_counts() -> None:
    cosine = MethodSettings(lr=0.1, schedule="cosine", epochs=2)
    rate, number = slowest(cosine, 10)
    assert number == 10
    assert rate == pytest.approx(0.1 * 0.5 * (1 + np.cos(0.9 * np.pi)))
    assert slowest(MethodSettings(lr=0.1, schedule="cosine"), 10) == (1e-5, 1)  # one warm-up epoch
    assert slowest(MethodSettings(lr=0.1), 10) == (0.1, 1)
    for rounds in (0, 1):
        assert slowest(cosine, rounds) == (0.1, 1)
    terms = make_terms(lr=0.1, schedule="cosine", epochs=2)
    with pytest.raises(errors.PolicyError, match=rf"lr \S+ in round {terms.rounds}, but policy"):
        Policy(colluders=0, min_lr=0.09).check_terms(terms, 4)


@pytest.mark.parametrize("everybody", [N, -1])
def test_who_asks_for_everybody_in_every_sum_is_never_subtracted(
    tmp_path: Path, everybody: int
) -> None:
    """A run with such clients waits for who is away."""
    policy = Policy(colluders=0, min_survivors=everybody)
    world = World(tmp_path, N, policy, threshold=everybody, rounds=3, max_attempts=0,
                  patience=3600.0, alive_seconds=12.0, metrics="off", weights="uniform")  # fmt: skip
    world.withdraws = True
    cohorts, lists, last = dict[int, Any](), set[tuple[str, ...]](), names(N)[-1]

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Plan):
            cohorts[message.plan.round] = message.plan.cohort
        if isinstance(message, m.SurvivorList):
            lists.add(m.members_of(cohorts[message.round], message.survivors))
        if isinstance(message, m.RoundEnd) and recipient == last and world.clock < 100:
            world.lose(last)
            world.lost.add(last)
        if last in world.lost and world.clock > 100:
            world.reconnect(last)
        return message

    world.tamper = tap
    for name in names(N):
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert world.clock > 100
    assert world.run.state.learning_round == 4
    assert lists == {names(N)}


def declined(world: World) -> set[str]:
    """Who asked its operator for the word, and told nobody why."""
    told = [str(text) for kind, text in world.events if kind == "fault"]
    assert all(errors.AcceptanceError.told in text for text in told)
    return {text.split(": ")[1] for text in told}


def test_others_are_not_everybody_without_their_operators_word(tmp_path: Path) -> None:
    """A site that joins is in the second sum and not in the first."""
    changes: dict[str, Any] = {"metrics": "off", "weights": "uniform", "threshold": -1}
    for policy, asks in ((Policy(colluders=0, min_survivors=-1), True), (OPEN, False)):
        world = World(tmp_path / str(asks), 4, policy, stop_after=1, **changes)
        for name in names(4):
            world.join(name)
        world.pump()
        world.withdraws = True
        with contextlib.suppress(AssertionError):  # nothing moves any more, if clients have left
            grown(world, 5)
        assert declined(world) == (set(names(4)) if asks else set())
        assert (world.run.state.learning_round == 3) != asks


@pytest.mark.parametrize(("given", "asks"), [("", False), ("ab" * 32, True)])
def test_a_given_prompt_may_be_of_sums_over_others(tmp_path: Path, given: str, asks: bool) -> None:
    changes: dict[str, Any] = {"metrics": "off", "weights": "uniform", "threshold": -1}
    policy = Policy(colluders=0, min_survivors=-1)
    first = World(tmp_path / "first", 4, policy, **changes)
    for name in names(4):
        first.join(name)
    first.pump()
    assert first.run.error is None
    world = World(tmp_path / "second", 5, policy, start=given, max_attempts=1, **changes)
    world.journals |= first.journals
    world.withdraws, world.clock = True, 1000.0
    for toy in world.toys.values():
        toy.initial = lambda: np.full(10, 9.0, np.float32)  # elsewhere
    world.start_server()
    for name in names(5):
        world.join(name)
    with contextlib.suppress(AssertionError):
        world.pump()
    assert declined(world) == (set(names(4)) if asks else set())
