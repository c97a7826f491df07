"""Trackers: what reaches them, with their own libraries; and that they cannot stop a run."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from secure_fedprompt.host import tracking
from secure_fedprompt.host.log import Log
from secure_fedprompt.host.tracking import figures, tracked
from secure_fedprompt.protocol.errors import ConfigError

ROUND = {
    "learning_round": 3, "round": 4, "outcome": "done", "dropped": {},
    "metrics": {"accuracy": 0.5, "zero_shot": 0.4, "loss": 1.25, "contributors": 4.0, "weight": 4.0},
    "seconds": {"training": 1.0, "sharing": 0.5}, "bytes": {"up": {"a": 100, "b": 300}, "down": {"a": 8}},
}  # fmt: skip
OPENED = {"learning_round": 4, "metrics": {"accuracy": 0.75, "contributors": 4.0}}
EPSILON = {"learning_round": 3, "epsilon": 1.5, "delta": 1e-5, "accountant": "prv"}
LOCAL = {"learning_round": 3, "images": 12, "correct": 9, "loss": 0.125}


def test_figures_stand_at_the_rounds_that_are_done_by_then() -> None:
    assert list(figures("round", ROUND)) == [
        (2, {"accuracy": 0.5, "zero_shot": 0.4, "loss": 1.25}),
        (3, {"clients": 4.0, "seconds": 1.5, "bytes_up": 100.0, "bytes_down": 2.0}),
    ]
    assert list(figures("opened", OPENED)) == [(3, {"accuracy": 0.75})]
    assert list(figures("epsilon", EPSILON)) == [(3, {"epsilon": 1.5})]
    assert not list(figures("round", ROUND | {"outcome": "aborted", "metrics": {}}))
    assert not list(figures("local", LOCAL))  # a client's own
    assert not list(figures("joined", {}))
    assert not list(figures("round", {"learning_round": 1}))  # as a client says that one begins


def told(where: str, events: list[tuple[str, dict[str, Any]]]) -> str:
    """Log events of a program that tracks; what its terminal shows."""
    console = Console(file=io.StringIO(), record=True, width=200)
    with Log("server", console=console) as log, tracked(log, where, {"lr": 0.5}):
        log.name = "server"
        for kind, facts in events:
            log.info(kind, f"words of {kind}", **facts)

    return console.export_text()


EVENTS = [("round", ROUND), ("local", LOCAL), ("epsilon", EPSILON)]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told(f"tensorboard:{tmp_path}", EVENTS)
    found = reader.EventAccumulator(str(tmp_path))
    found.Reload()
    scalars = {
        tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }
    assert scalars["accuracy"] == [(2, 0.5)]
    assert scalars["epsilon"] == [(3, 1.5)]
    assert scalars["bytes_up"] == [(3, 100.0)]
    assert "correct" not in scalars
    assert scalars["loss"] == [(2, 1.25)]  # of all, not the client's own


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    told(f"mlflow:file:{tmp_path}", EVENTS)
    client = mlflow.MlflowClient(tracking_uri=f"file:{tmp_path}")
    (run,) = client.search_runs([client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id])
    assert run.data.params == {"lr": "0.5"}
    assert run.data.metrics["accuracy"] == 0.5
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "epsilon")] == [
        (3, 1.5)
    ]
    assert run.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_DIR", str(tmp_path)),
        ("WANDB_SILENT", "true"),
    ):
        monkeypatch.setenv(name, value)
    told("wandb:project", EVENTS)
    wandb.teardown()  # its own process writes on for a moment
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"accuracy" in path.read_bytes()


def test_a_tracker_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        closed = 0

        def put(self, step: int, values: dict[str, float]) -> None:
            raise OSError("no space\non the disk")

        def close(self) -> None:
            self.closed += 1
            raise OSError("nor now")

    broken = Broken()
    monkeypatch.setattr(tracking, "opened", lambda *_: broken)
    said = told("tensorboard:x", [*EVENTS, *EVENTS])
    assert said.count("failed, going on without it: no space on the disk") == 1
    assert said.count("words of round") == 2
    assert broken.closed == 1


@pytest.mark.parametrize("where", ["tensorboard", "tensorboard:", "comet:x", "nowhere"])
def test_what_is_no_tracker_is_named(where: str) -> None:
    with pytest.raises(
        ConfigError, match=f"track = '{where}': tensorboard:DIR, mlflow:URI or wandb"
    ):
        told(where, [])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install 'secure-fedprompt\[tensorboard\]'"):
        told("tensorboard:x", [])


@pytest.mark.slow
def test_the_programs_track(federation: Any) -> None:
    """Server and a client over sockets: the client's board has the sums that it opened."""
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    f = federation(rounds=1, track="tensorboard:boards")
    config = f.folder / "alice" / "client.toml"
    config.write_text('track = "tensorboard:board"\n' + config.read_text())
    for i in range(5):
        f.start(i)
    f.wait_for("server", "finished")
    for process in f.started.values():
        assert process.wait(60) == 0
    result = json.loads((f.folder / "server" / "result.json").read_text())
    accuracy = [row["metrics"]["accuracy"] for row in result["rounds"]]
    for folder in (
        f.folder / "server" / "boards" / "server",
        f.folder / "alice" / "board" / "alice",
    ):
        found = reader.EventAccumulator(str(folder))
        found.Reload()
        assert [e.step for e in found.Scalars("accuracy")] == [0, 1]
        assert [e.value for e in found.Scalars("accuracy")] == pytest.approx(accuracy, abs=1e-6)
