"""Experiment trackers: aggregate metrics and epsilon by round, to TensorBoard, MLflow or W&B.

    tensorboard:DIR   event files in DIR/NAME
    mlflow:URI        a run of the experiment "secure-fedprompt" at a tracking server or file:PATH
    wandb:PROJECT     a run of the project; WANDB_MODE=offline keeps it on this machine

What is tracked comes from the program's own log: sums over clients as this end knows them, and
what privacy has cost, never a client's own figures. A tracker that fails is left out, and the run
goes on. Nothing is imported unless it is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from secure_fedprompt.host.command import TENSORBOARD
from secure_fedprompt.host.log import Log
from secure_fedprompt.protocol.errors import ConfigError

MLFLOW, WANDB = "mlflow:", "wandb:"
EXPERIMENT = "secure-fedprompt"
Values = dict[str, float]


class Tracker(Protocol):
    """One run at a tracker."""

    def put(self, step: int, values: Values) -> None:
        """Figures after so many learning rounds."""

    def close(self) -> None:
        """No more of them."""


@contextlib.contextmanager
def tracked(log: Log, where: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Track what a program logs, for as long as the block lasts.

    Args:
        log: of a program that knows its name; where: as above, or "" for nowhere.
        settings: to note with the run.

    Raises:
        ConfigError: there is no such tracker, or its library is not installed.
    """
    if not where:
        yield
        return
    made = opened(where, log.name, settings)
    log.info("track", f"tracking to {where}")

    def take(event: str, facts: Mapping[str, Any]) -> None:
        try:
            for step, values in figures(event, facts):
                made.put(step, values)
        except Exception as error:
            log.listeners.remove(take)
            line = " ".join(str(error).split())
            log.warning("track", f"track = {where!r} failed, going on without it: {line}")

    log.listeners.append(take)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            made.close()


def figures(event: str, facts: Mapping[str, Any]) -> Iterator[tuple[int, Values]]:
    """What an event of a server's or a client's log says, with learning rounds done by then."""
    if event not in ("round", "opened", "epsilon"):
        return
    if event == "round" and facts.get("outcome") != "done":
        return  # aborted; or one that a client begins
    number = int(facts["learning_round"])
    metrics = facts.get("metrics", {})
    before = {
        name: float(metrics[name]) for name in ("accuracy", "zero_shot", "loss") if name in metrics
    }
    if before:
        yield number - 1, before  # they are of the prompt that the round began from
    after = {name: float(facts[name]) for name in ("epsilon", "client_epsilon") if name in facts}
    if event == "round":
        clients = float(metrics["contributors"])
        after |= {"clients": clients, "seconds": float(sum(facts["seconds"].values()))}
        after |= {f"bytes_{way}": sum(of.values()) / max(1.0, clients)
                  for way, of in facts["bytes"].items()}  # fmt: skip
    if after:
        yield number, after


def opened(where: str, name: str, settings: Mapping[str, Any]) -> Tracker:
    """A tracker.

    Raises:
        ConfigError: there is no such one, or its library is not installed.
    """
    kinds: dict[str, Callable[[str, str, Mapping[str, Any]], Tracker]] = {
        TENSORBOARD: _TensorBoard,
        MLFLOW: _MLflow,
        WANDB: _Wandb,
    }
    for scheme, kind in kinds.items():
        if where.startswith(scheme) and len(where) > len(scheme):
            try:
                return kind(where.removeprefix(scheme), name, settings)
            except ImportError as error:
                extra = scheme.removesuffix(":")
                raise ConfigError(
                    f"track = {where!r}: {error.name} is missing: pip install "
                    f"'secure-fedprompt[{extra}]'"
                ) from None
            except Exception as error:
                line = " ".join(str(error).split())
                raise ConfigError(f"track = {where!r} cannot be begun: {line}") from None
    raise ConfigError(f"track = {where!r}: tensorboard:DIR, mlflow:URI or wandb:PROJECT")


class _TensorBoard:
    def __init__(self, folder: str, name: str, settings: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(Path(folder) / name))
        rows = "\n".join(f"    {key} = {value!r}" for key, value in settings.items())
        self._writer.add_text("settings", rows)

    def put(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, uri: str, name: str, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(EXPERIMENT)
        where = known.experiment_id if known else self._client.create_experiment(EXPERIMENT)
        self._run = self._client.create_run(where, run_name=name).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._run, key, value)

    def put(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Wandb:
    def __init__(self, project: str, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project=project, name=name, config=dict(settings))

    def put(self, step: int, values: Values) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
