"""Who trains the clients of a simulation: this process, others on this machine, or a Ray cluster.

Protocol and server stay in one process. What is handed out is training, for all clients that wait
for it at the same time: a ``Job`` is a client's name and its work, an outcome its update. Workers
keep their clients for the whole run, since methods have private parts. Images are encoded once, by
the driver, so that every engine trains on the same features; with the same seeds and threads
updates are the same, bit for bit.

Another engine is an object with ``train`` and ``close``: give it to ``simulate_run``.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data.loading import load_shares
from secure_fedprompt.clients.data.partitions import Part
from secure_fedprompt.clients.data.sets import ImageSet
from secure_fedprompt.clients.features import Features
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.clients.training import LocalTrainer, client_seed
from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.protocol.errors import ConfigError, RunFailedError, SecureFedPromptError
from secure_fedprompt.protocol.selection.shares import Keys
from secure_fedprompt.protocol.settings import MethodSettings

Job = tuple[str, Work]
Outcome = Update | Keys | SecureFedPromptError
Arrays = tuple[NDArray[Any], NDArray[np.int64]]
Kept = tuple[list[float], dict[str, NDArray[np.float32]]]  # norms of updates, private part
Answer = tuple[Outcome, list[float], dict[str, NDArray[np.float32]]]


class Engine(Protocol):
    """Trains clients."""

    def train(self, jobs: Sequence[Job]) -> list[Outcome]:
        """In the order of the jobs; an error is that client's own."""

    def close(self) -> None:
        """No more jobs."""


class Inline:
    """Training in this process, one client after another."""

    def __init__(self, learners: dict[str, LocalLearner]) -> None:
        self.learners = learners

    def train(self, jobs: Sequence[Job]) -> list[Outcome]:
        return [attempt(self.learners[name], work) for name, work in jobs]

    def close(self) -> None:
        pass


def attempt(learner: LocalLearner, work: Work) -> Outcome:
    try:
        return learner.run(work)
    except SecureFedPromptError as error:
        return error


@dataclass
class Clients:
    """What a worker needs to know of its clients.

    Attributes:
        settings: of the simulation; method: of the run.
        names: of these clients; all clients sit in the order of ``of``.
        features: by name, what the driver encoded of training and test images, with labels.
        needs: what that is.
    """

    settings: ClientSettings
    method: MethodSettings
    names: list[str]
    of: list[str]
    features: dict[str, tuple[Arrays, Arrays]]
    needs: str
    threads: int


def arrays_of(images: Features) -> Arrays:
    return images.images.float().cpu().numpy(), images.labels.cpu().numpy()


def trainer_of(
    settings: ClientSettings,
    backbone: Backbone,
    sets: tuple[ImageSet, ImageSet],
    share: Part,
    features: tuple[Features, Features],
    name: str,
    seat: tuple[int, int],
) -> LocalTrainer:
    """One client of a simulation: its share of training and test images, and their features."""
    train, test = sets
    trainer = LocalTrainer(
        backbone, train.subset(share.train), test.subset(share.test),
        client_seed(max(0, settings.seed), name), settings.augment,
        features=features, seat=seat, dp=settings.dp,
    )  # fmt: skip
    trainer.views = settings.views
    trainer.start_prompt = Path(settings.start_prompt) if settings.start_prompt else None
    return trainer


class Worker:
    """Learners of some clients, with a model of their own."""

    def __init__(self, clients: Clients) -> None:
        settings = clients.settings
        torch.set_num_threads(clients.threads)
        train, test, shares = load_shares(settings)
        backbone = Backbone.load(
            settings.model, settings.pretrained, settings.device, settings.precision
        )
        self.learners = {}
        for name in clients.names:
            seat = clients.of.index(name)
            pair = [
                Features.of(
                    torch.from_numpy(np.array(images)).to(backbone.device, backbone.dtype),
                    torch.from_numpy(np.array(labels)).to(backbone.device), clients.needs,
                )
                for images, labels in clients.features[name]
            ]  # fmt: skip
            trainer = trainer_of(
                settings, backbone, (train, test), shares[seat], (pair[0], pair[1]), name,
                (seat, len(clients.of)),
            )  # fmt: skip
            self.learners[name] = trainer.prepare(clients.method)

    def train(self, jobs: Sequence[Job]) -> list[Answer]:
        """Outcomes, with what another worker would need to go on with these clients."""
        found = []
        for name, work in jobs:
            outcome, learner = attempt(self.learners[name], work), self.learners[name]
            found.append((outcome, learner.norms, learner.method.private()))
        return found

    def resume(self, kept: Mapping[str, Kept]) -> None:
        """Go on with clients of a worker that is gone."""
        for name, (norms, private) in kept.items():
            self.learners[name].norms[:] = norms
            self.learners[name].method.restore(private)


def divided(
    settings: ClientSettings,
    method: MethodSettings,
    trainers: dict[str, LocalTrainer],
    needs: str,
    count: int,
    threads: int,
) -> list[Clients]:
    """Clients for each of ``count`` workers."""
    names = list(trainers)
    found = []
    for i in range(count):
        own = names[i::count]
        features = {}
        for name in own:
            train, test = trainers[name].features(needs)
            features[name] = arrays_of(train), arrays_of(test)
        found.append(Clients(settings, method, own, names, features, needs, threads))
    return found


class Shared(ABC):
    """Workers, each with a share of the clients.

    Args:
        clients: of each; learners: the driver's, which take over what is private to a client.
    """

    def __init__(self, clients: Sequence[Clients], learners: dict[str, LocalLearner]) -> None:
        self.clients, self.learners = clients, learners
        self._of = {name: i for i, some in enumerate(clients) for name in some.names}

    def train(self, jobs: Sequence[Job]) -> list[Outcome]:
        shares = [[job for job in jobs if self._of[job[0]] == i] for i in range(len(self.clients))]
        asked = [(i, share) for i, share in enumerate(shares) if share]
        for i, share in asked:
            self._ask(i, share)
        outcomes = dict[str, Outcome]()
        for i, share in asked:
            for (name, _), (outcome, norms, private) in zip(
                share, self._answers(i, share), strict=True
            ):
                outcomes[name], self.learners[name].norms[:] = outcome, norms
                self.learners[name].method.restore(private)
        return [outcomes[name] for name, _ in jobs]

    @abstractmethod
    def _ask(self, i: int, share: list[Job]) -> None:
        """Have a worker train."""

    @abstractmethod
    def _answers(self, i: int, share: list[Job]) -> list[Answer]:
        """Wait for it.

        Raises:
            RunFailedError: it is gone.
        """


class Processes(Shared):
    """Processes of this machine."""

    def __init__(self, clients: Sequence[Clients], learners: dict[str, LocalLearner]) -> None:
        super().__init__(clients, learners)
        context = mp.get_context("spawn")  # a fork would inherit the threads of torch
        self._pipes, self._processes = list[Connection](), list[Any]()
        for some in clients:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            ours.send(some)
            self._pipes.append(ours)
            self._processes.append(process)

    def _ask(self, i: int, share: list[Job]) -> None:
        with contextlib.suppress(OSError):  # it is missed when it has to answer
            self._pipes[i].send(share)

    def _answers(self, i: int, share: list[Job]) -> list[Answer]:
        try:
            answers: list[Answer] = self._pipes[i].recv()
        except (EOFError, OSError) as error:
            raise RunFailedError(
                f"a training process of the simulation ended ({type(error).__name__}); what it "
                "said is above; use fewer --workers if memory ran out"
            ) from None
        return answers

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(10)
            process.kill()


def _serve(pipe: Connection) -> None:
    """A worker's process."""
    worker = Worker(pipe.recv())
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(worker.train(pipe.recv()))


class Ray(Shared):
    """Actors of a Ray cluster. Clients of one that died go on in another, from where they were
    after their last round.

    Args:
        address: of a running cluster, or "" to start one on this machine.
        gpus: share of a GPU for each actor.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """

    def __init__(
        self,
        clients: Sequence[Clients],
        learners: dict[str, LocalLearner],
        address: str = "",
        gpus: float = 0.0,
    ) -> None:
        super().__init__(clients, learners)
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "engine = 'ray' needs Ray: pip install 'secure-fedprompt[ray]'"
            ) from None
        self._ray = ray
        try:
            ray.init(address=address or None, include_dashboard=False, ignore_reinit_error=True)
        except (ConnectionError, ray.exceptions.RayError) as error:
            line = str(error).splitlines()[0]
            raise ConfigError(
                f"--ray-address {address}: {line}; 'ray start --head' starts a cluster, and where "
                "it asks for a token (Ray 2.60 does), set RAY_AUTH_MODE=token on each machine"
            ) from None
        self._class = ray.remote(num_cpus=clients[0].threads, num_gpus=gpus)(Worker)
        self.actors = [self._class.remote(some) for some in clients]
        self._asked = dict[int, Any]()

    def _ask(self, i: int, share: list[Job]) -> None:
        self._asked[i] = self.actors[i].train.remote(share)

    def _answers(self, i: int, share: list[Job]) -> list[Answer]:
        failure = self._ray.exceptions.RayError
        try:
            try:
                answers: list[Answer] = self._ray.get(self._asked[i])
            except self._ray.exceptions.RayActorError:
                self._replace(i)
                answers = self._ray.get(self.actors[i].train.remote(share))
        except failure as error:
            line = str(error).splitlines()[0]
            raise RunFailedError(f"an actor of the simulation failed: {line}") from None
        return answers

    def _replace(self, i: int) -> None:
        """Another actor for the clients of one that died.

        Raises:
            RunFailedError: their spending would not be known.
        """
        some = self.clients[i]
        if some.settings.dp.kind != "none":
            raise RunFailedError("an actor died, and with it what dp has spent: start again")
        self.actors[i] = self._class.remote(some)
        own = {name: self.learners[name] for name in some.names}
        known = {name: (learner.norms, learner.method.private()) for name, learner in own.items()}
        self._ray.get(self.actors[i].resume.remote(known))

    def close(self) -> None:
        for actor in self.actors:
            self._ray.kill(actor)
        self._ray.shutdown()
