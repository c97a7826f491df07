"""``simulate``: a federation in this process, from Python.

The machines, frames and protection are those of the programs, as in ``secure-fedprompt simulate``.
Images, method and partition may be your own.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from secure_fedprompt import show
from secure_fedprompt.api.history import History
from secure_fedprompt.api.protection import Protection, installed
from secure_fedprompt.clients import metrics
from secure_fedprompt.clients.accounting import epsilon
from secure_fedprompt.clients.data.loading import Dealt, deal_out, load_sets
from secure_fedprompt.clients.data.partitions import Part, few_shot
from secure_fedprompt.clients.data.sets import ImageSet, hold_out
from secure_fedprompt.clients.features import predict
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.methods.base import Method
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.commands.simulate import (
    ABSENT,
    Simulated,
    engine_of,
    make_trainers,
    simulate_run,
)
from secure_fedprompt.host import command
from secure_fedprompt.protocol.errors import ConfigError, DataError
from secure_fedprompt.protocol.layout import slices
from secure_fedprompt.protocol.messages import Message
from secure_fedprompt.protocol.methods import METHODS, MethodFacts
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import Store, started

Labels = NDArray[np.int64]
Partition = Callable[[Labels, Labels, int, int], Sequence[Any]]
_OURS = ("method", "dataset", "clients", "rounds", "protection", "partition", "dropout", "engine",
         "workers", "on_round", "on_frame", "progress")  # fmt: skip


def simulate(
    method: str | type[Method] = "promptfl",
    dataset: Any = "generated",
    *,
    clients: int = 10,
    rounds: int = 5,
    protection: str | Protection = "masks",
    partition: str | Partition = "iid",
    dropout: float = 0.0,
    engine: str = "inline",
    workers: int = 0,
    on_round: Callable[[dict[str, Any]], None] | None = None,
    on_frame: Callable[[str, str, Message], None] | None = None,
    progress: bool = True,
    **settings: Any,
) -> History:
    """Run a federation in this process.

    Args:
        method: a name, or your own subclass of ``Method``, whose ``name`` is not taken.
        dataset: "generated", a folder or zip file (CLASS/IMAGE), a torchvision name; an
            ``ImageSet`` or map-style PyTorch data set, of which ``test_share`` is held out; or a
            pair of those, training and test images.
        clients: how many, among whom the images are dealt out.
        rounds: learning rounds.
        protection: "masks", "bfv", "ckks" or "none", or your own ``Protection``.
        partition: "iid", "pathological", "overlap", "dirichlet", "domain", "domain-dirichlet",
            "pachinko", or your own function of training labels, test labels, clients and seed: for
            each client a pair of index arrays, or a ``Part``.
        dropout: share of the clients that vanish in each round, at a random message.
        engine: who trains: "inline", "processes" or "ray"; workers: how many of them, 0 is one for
            each core. Your own images, method and partition are trained inline.
        on_round: called with each round that is over, as in ``History.summary["rounds"]``.
        on_frame: called with sender, recipient and message of everything that arrives: what the
            server reads of each client, and an attacker could. The server's name is "".
        progress: show a bar.
        settings: any of the server's and the clients' settings, as in their files (``--help``
            explains each); accuracy is counted in every round unless ``metrics`` says otherwise.

    Returns:
        what happened.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of range; names it.
        SecureFedPromptError: the run failed.
    """
    own = not isinstance(dataset, str | Path) or callable(partition) or not isinstance(method, str)
    if own and engine != "inline":
        raise ConfigError(f"engine = {engine!r}: your own images, method or partition need inline")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout = {dropout}: must be at least 0 and below 1")
    given: dict[str, Any] = {
        "rounds": rounds,
        "protection": protection if isinstance(protection, str) else "none",
        "parts": clients,
        "metrics": "rounds",
    }
    given |= settings
    if isinstance(dataset, str | Path):
        given["dataset"] = str(dataset)
    if isinstance(partition, str):
        given["partition"] = partition
    with contextlib.ExitStack() as stack:
        given["method"] = method if isinstance(method, str) else stack.enter_context(_named(method))
        server, client = _settings(given)
        if not isinstance(protection, str):
            name = stack.enter_context(installed(protection))
            server = msgspec.structs.replace(server, protection=name)
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        bar = stack.enter_context(Progress(transient=True, disable=not progress))
        task = bar.add_task("rounds", total=server.rounds + int(server.metrics != "off"))
        trainers = make_trainers(
            client, server.method_settings(), _dealt(client, dataset, partition)
        )
        store = stack.enter_context(
            contextlib.closing(Store(Path(str(given.get("run_dir") or scratch)), server))
        )
        if store.finished:
            raise ConfigError(f"run_dir = {server.run_dir!r} holds a finished run: choose another")
        seconds, last = dict[int, float](), [time.perf_counter()]

        def tell(kind: str, value: Any) -> None:
            if kind != "round":
                return
            bar.advance(task)
            now, number = time.perf_counter(), int(value["learning_round"])
            seconds[number] = seconds.get(number, 0.0) + now - last[0]  # aborted attempts included
            last[0] = now
            if on_round is not None:
                on_round(value)

        store.on_event.append(tell)
        flags = argparse.Namespace(engine=engine, workers=workers, ray_address="", ray_gpus=0.0)
        made = engine_of(flags, client, server.method_settings(), trainers)
        done = simulate_run(server, store, trainers, dropout, made, on_frame)
        summary = store.summary()
        store.event("finished", f"prompt {summary['prompt']}")
        show.add_history(summary, {str(number): row for number, row in done.history.items()})
        for row in summary["rounds"]:
            row["seconds"] = {}  # of a clock that jumps from deadline to deadline
        return History.of(summary, _prompt(done), seconds, _personal(done), _spent(done))


def _settings(given: dict[str, Any]) -> tuple[ServerSettings, ClientSettings]:
    """The two files that these keywords would be in."""
    known = [set(cls.__struct_fields__) - ABSENT for cls in (ServerSettings, ClientSettings)]
    for name in given:
        if not any(name in names for names in known):
            close = difflib.get_close_matches(name, [*_OURS, *known[0], *known[1]], n=1)
            advice = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"simulate() has no setting {name!r}{advice}")
    server, client = (
        {name: dict(value) if isinstance(value, dict) else value
         for name, value in given.items() if name in names}
        for names in known
    )  # fmt: skip
    return (
        started(command.build(ServerSettings, server, "simulate()")),
        command.build(ClientSettings, client, "simulate()"),
    )


@contextlib.contextmanager
def _named(method: Any) -> Iterator[str]:
    """A method's class in the table, by its name, for as long as it runs.

    Raises:
        ConfigError: it cannot be found by its name, or another has it.
    """
    name = getattr(method, "name", "")
    if not isinstance(method, type) or not issubclass(method, Method) or not name:
        raise ConfigError(f"method = {method!r}: a name, or a subclass of Method with a name")
    if name in METHODS:
        raise ConfigError(f"method.name = {name!r}: the package has a method of this name")
    if "." in method.__qualname__:
        raise ConfigError(f"method = {method.__qualname__}: define it at the top of a module")
    METHODS[name] = MethodFacts(name, f"{method.__module__}:{method.__qualname__}", "your own")
    try:
        yield name
    finally:
        del METHODS[name]


def _dealt(settings: ClientSettings, dataset: Any, partition: str | Partition) -> Dealt | None:
    """The user's own images or partition, or None where settings say it all."""
    if isinstance(dataset, str | Path) and isinstance(partition, str):
        return None
    if isinstance(dataset, str | Path):
        train, test = load_sets(settings)
    elif isinstance(dataset, tuple | list):
        if len(dataset) != 2:
            raise DataError(f"dataset: {len(dataset)} sets, a pair of training and test images")
        train, test = map(_image_set, dataset)
    else:
        train, test = hold_out(_image_set(dataset), settings.test_share, settings.data_seed)
    if train.class_names != test.class_names:
        raise DataError("dataset: training and test images have different class_names")
    if len(train.class_names) < 2:
        raise DataError("dataset: one class, a classifier needs two")
    if isinstance(partition, str):
        return deal_out(settings, train, test)
    train = train.subset(few_shot(train.labels, settings.shots, settings.data_seed))
    found = partition(train.labels, test.labels, settings.parts, settings.data_seed)
    return train, test, _checked(found, len(train), len(test), settings.parts)


def _image_set(data: Any) -> ImageSet:
    return data if isinstance(data, ImageSet) else ImageSet.from_dataset(data)


def _checked(found: Sequence[Any], train: int, test: int, clients: int) -> list[Part]:
    """What a user's partition says.

    Raises:
        DataError: not a share for each client, an index that is none, or one image at two clients.
    """
    if len(found) != clients:
        raise DataError(f"partition: {len(found)} shares for {clients} clients")
    parts = [
        share if isinstance(share, Part) else Part(*(np.asarray(x, np.int64) for x in share))
        for share in found
    ]
    for what, size in (("train", train), ("test", test)):
        index = np.concatenate([getattr(part, what) for part in parts])
        if len(index) and not 0 <= index.min() <= index.max() < size:
            raise DataError(f"partition: {what} index beyond 0 to {size - 1}")
        if len(np.unique(index)) < len(index):
            raise DataError(f"partition: a {what} image at two clients, or twice at one")
    for i, part in enumerate(parts):
        if not len(part.train):
            raise DataError(f"partition: client {i} has no training images")
    return parts


def _prompt(done: Simulated) -> dict[str, NDArray[np.float32]]:
    learner = next(iter(done.learners.values()))
    named = slices(learner.method.uploaded())
    return {spec.name: done.prompt[part].reshape(spec.shape) for spec, part in named}


def _personal(done: Simulated) -> dict[str, float]:
    """Accuracy of each client's own prompt on its own test images."""
    found = {}
    for name, learner in done.learners.items():
        learner.finish(done.prompt, done.state.run)
        _, test = learner.client.features(learner.method.needs)
        if len(test):
            guesses, _ = predict(learner.method, test)
            found[name] = metrics.accuracy(test.labels.cpu().numpy(), guesses)
    return found


def _spent(done: Simulated) -> dict[str, float]:
    """Epsilon of each client with DP-SGD."""
    return {
        name: _epsilon(learner)
        for name, learner in done.learners.items()
        if learner.client.dp.kind == "sample"
    }


def _epsilon(learner: LocalLearner) -> float:
    dp, history = learner.client.dp, learner.client.ledger.history
    return epsilon(history, dp.delta, dp.accountant)
