"""Engines of the simulation: whoever trains, updates are the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secure_fedprompt import engines
from secure_fedprompt.__main__ import main
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.commands.simulate import make_trainers, simulate_run
from secure_fedprompt.protocol.errors import ConfigError, RunFailedError, UpdateError
from secure_fedprompt.protocol.settings import FedMGPSettings
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import Store

CLIENTS = ClientSettings(
    parts=3, generated_classes=6, per_class=4, test_per_class=2, styles="sketch", seed=3, threads=1
)
SERVER = ServerSettings(
    method="fedmgp", protection="none", rounds=3, epochs=1, batch_size=8, lr=0.05, weights="uniform",
    metrics="off", fedmgp=FedMGPSettings(groups=2, slots=1),
)  # fmt: skip


def run(folder: Path, engine: Any = engines.Inline) -> tuple[np.ndarray, list[float]]:
    """The last prompt, and all norms: FedMGP keeps groups to itself, so that a client which is not
    where it was would show."""
    trainers = make_trainers(CLIENTS, SERVER.method_settings())
    store = Store(folder, SERVER)
    made = engine if engine is engines.Inline else lambda learners: engine(trainers, learners)
    done = simulate_run(SERVER, store, trainers, 0.0, made)
    store.close()
    assert done.state.prompt is not None
    return done.state.prompt, [x for learner in done.learners.values() for x in learner.norms]


def shares(trainers: Any, learners: dict[str, LocalLearner]) -> list[engines.Clients]:
    method = SERVER.method_settings()
    return engines.divided(CLIENTS, method, trainers, "tokens", 2, 1)


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class RayError(Exception):
        """Stands in for Ray's, which may not be installed."""

    def init(**_: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:9\nmore")

    ray = types.SimpleNamespace(init=init, exceptions=types.SimpleNamespace(RayError=RayError))
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(
        ConfigError, match=r"--ray-address 127.0.0.1:9: Failed .*RAY_AUTH_MODE"
    ) as e:
        engines.Ray([], {}, "127.0.0.1:9")
    assert "\n" not in str(e.value)


class Mortal(engines.Ray):
    """Loses an actor after the first round."""

    rounds = 0

    def train(self, jobs: Any) -> list[engines.Outcome]:
        self.rounds += 1
        if self.rounds == 2:
            self._ray.kill(self.actors[0])
        return super().train(jobs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_every_engine_gives_the_same_prompt(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "ray":
        pytest.importorskip("ray")
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        if "RAY_HERE" not in os.environ:  # it leaves files and processes for the collector
            case = f"{__file__}::test_every_engine_gives_the_same_prompt[ray]"
            words = ["-q", "-m", "slow", "-p", "no:unraisableexception", "-W", "ignore", case]
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *words], env={**os.environ, "RAY_HERE": "1"},
                capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            assert "1 passed" in done.stdout
            return
    engine = engines.Processes if kind == "processes" else Mortal
    prompt, norms = run(tmp_path / "inline")
    other, other_norms = run(tmp_path / kind, lambda t, found: engine(shares(t, found), found))
    assert np.array_equal(prompt, other)
    assert norms == other_norms
    assert len(norms) == 9
    assert not np.array_equal(prompt, np.zeros_like(prompt))


@pytest.mark.slow
def test_a_process_that_ends_is_one_line() -> None:
    trainers = make_trainers(CLIENTS, SERVER.method_settings())
    engine = engines.Processes(shares(trainers, {}), {})
    os.kill(engine._processes[1].pid, signal.SIGKILL)
    name = engine.clients[1].names[0]
    with pytest.raises(RunFailedError, match="a training process of the simulation ended"):
        engine.train([(name, None)])  # type: ignore[list-item]
    engine.close()


class Moody:
    """Trains nobody."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def train(self, jobs: Any) -> list[Any]:
        return [self.error for _ in jobs]

    def close(self) -> None:
        self.closed = True


def test_errors_of_training_are_zeros_and_others_end_the_run(tmp_path: Path) -> None:
    store = Store(tmp_path / "a", SERVER)
    trainers = make_trainers(CLIENTS, SERVER.method_settings())
    moody = Moody(UpdateError("not today"))
    done = simulate_run(SERVER, store, trainers, 0.0, lambda _: moody)
    store.close()
    assert moody.closed
    start = next(iter(done.learners.values())).initial()
    assert done.state.prompt is not None
    assert np.array_equal(done.state.prompt, start)
    store = Store(tmp_path / "b", SERVER)
    broke = Moody(ConfigError("spent"))
    with pytest.raises(ConfigError, match="spent"):
        simulate_run(SERVER, store, trainers, 0.0, lambda _: broke)
    store.close()
    assert broke.closed


def test_a_worker_goes_on_where_another_was() -> None:
    method = SERVER.method_settings()
    trainers = make_trainers(CLIENTS, method)
    (some,) = engines.divided(CLIENTS, method, trainers, "tokens", 1, 1)
    first, second = engines.Worker(some), engines.Worker(some)
    name, learner = some.names[0], first.learners[some.names[0]]
    for prompts in learner.method.private().values():
        assert prompts.size
    changed = {k: v + 1 for k, v in learner.method.private().items()}
    second.resume({name: ([2.5], changed)})
    moved = second.learners[name]
    assert moved.norms == [2.5]
    assert all(np.array_equal(moved.method.private()[k], v) for k, v in changed.items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--workers", "2"], "need --engine processes or ray"),
     (["--engine", "processes", "--workers", "-1"], "--workers -1")],
)  # fmt: skip
def test_flags_that_contradict_each_other(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--parts", "2", "--generated-classes", "4", *flags]) == 2
    assert words in capsys.readouterr().err
