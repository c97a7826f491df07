"""A hostile server against the client program: each trick ends it, or costs a round, in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crowd import Crowd, Member, Toy
from programs import LONG

from secure_fedprompt import client
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.commands import demo_files
from secure_fedprompt.host import command, files
from secure_fedprompt.host.log import Bars, Log
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.hub import CurveHub
from secure_fedprompt.server.planning import RunState
from secure_fedprompt.server.run import Run
from secure_fedprompt.server.serve import hear, post
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import Store

VICTIM, ROUNDS = "dave", 3
Trick = Callable[[m.Message], list[Frame]]


def instead(kind: type, act: Callable[[Any], list[Frame]], number: int = 2) -> Trick:
    """Frames in the place of one kind of message, in one round if it is of a round."""

    def trick(message: m.Message) -> list[Frame]:
        at = (
            message.plan.round if isinstance(message, m.Plan) else getattr(message, "round", number)
        )
        if not isinstance(message, kind) or at != number:
            return [Frame.of(message)]
        return act(message)

    return trick


def flip(field: str) -> Callable[[Any], list[Frame]]:
    def act(message: Any) -> list[Frame]:
        data = bytes(getattr(message, field))
        return [Frame.of(dataclasses.replace(message, **{field: bytes((data[0] ^ 1,)) + data[1:]}))]

    return act


def bent(**changes: Any) -> Callable[[m.Plan], list[Frame]]:
    return lambda x: [Frame.of(m.Plan(dataclasses.replace(x.plan, **changes), x.base))]


def raw(data: bytes) -> list[Frame]:
    return [Frame(data)]


def again(message: m.Message) -> list[Frame]:
    return [Frame.of(message)] * 2


TRICKS: dict[str, tuple[Trick, int, str]] = {
    "garbage": (instead(m.Adverts, lambda x: raw(b"garbage")), 10, "UnknownVersionError: "),
    "a cut frame": (
        instead(m.Plan, lambda x: raw(m.CATALOGUE.encode(x)[:-9])), 10, "TruncatedError: ",
    ),
    "a flood": (
        instead(m.Inbox, lambda x: [Frame.of(m.Finish(bytes(16), bytes(1 << 20), ""))] * 80), 10,
        "FloodError: .* sends more than its rounds take",
    ),
    "unsigned terms": (instead(m.Terms, flip("signature")), 10, "SignatureError: "),
    "a narrower bound": (instead(m.Plan, bent(clip=0.25)), 10, "TermsError: .*clip"),
    "a smaller threshold": (instead(m.Plan, bent(threshold=2, quorum=2)), 10, "TermsError: "),
    "a plan of another run": (instead(m.Plan, bent(run=bytes(16))), 10, "UnexpectedMessageError: "),
    "a round again": (instead(m.Plan, bent(round=1)), 10, "ReplayError: "),
    "a learning round left out": (instead(m.Plan, bent(learning_round=3)), 0, ""),  # not followed
    "another prompt": (instead(m.Plan, bent(base_digest=bytes(32))), 7, "MismatchError: global"),
    "a second unmask request": (instead(m.UnmaskRequest, again), 10, "SecondUnmaskError: "),
    "a wrong sum": (instead(m.OpenedSum, flip("vector")), 10, "SumError: "),
    "another final prompt": (instead(m.Finish, flip("vector")), 7, "MismatchError: final prompt"),
    "the end of another run": (
        instead(m.Inbox, lambda x: [Frame.of(m.Finish(bytes(16), b"", "over")), Frame.of(x)]), 0, "",
    ),
    "the end of a round that was not": (
        instead(m.Inbox, lambda x: [Frame.of(m.RoundEnd(x.run, 9, "over")), Frame.of(x)]), 0, "",
    ),
}  # fmt: skip


class Shadow(Toy):
    """A workload that says what a real client's does, and trains nothing."""

    def __init__(self, learner: Any) -> None:
        self._learner = learner
        self.model_fingerprint = learner.client.model_fingerprint
        self.classes_digest = learner.client.classes_digest

    def prepare(self, settings: MethodSettings) -> Any:
        return self

    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(self._learner.tensors())

    def initial(self) -> Prompt:
        prompt: Prompt = self._learner.initial()
        return prompt

    def run(self, work: Work) -> Update:
        return Update({t.name: np.full(t.shape, 1e-3) for t in self.tensors()}, 1.0)


class Tapped:
    """A hub that treats one member in its own way."""

    def __init__(self, hub: CurveHub, trick: Trick) -> None:
        self._hub, self._trick = hub, trick

    def poll(self, timeout: float) -> Iterator[tuple[str, Frame]]:
        return self._hub.poll(timeout)

    def reaches(self, name: str) -> bool:
        return self._hub.reaches(name)

    def send(self, name: str, frame: Frame) -> bool:
        if name != VICTIM or frame.message is None:
            return self._hub.send(name, frame)
        sent = [self._hub.send(name, each) for each in self._trick(frame.message)]
        return all(sent)


def settings_of(cls: Any, path: Path) -> Any:
    return command.load(cls, argparse.Namespace(config=str(path)))


@contextlib.contextmanager
def serving(folder: Path, trick: Trick) -> Iterator[None]:
    """The server's state machine over its real socket, in a thread."""
    settings = settings_of(ServerSettings, folder / "server" / "server.toml")
    identity = files.read_identity(settings.key)
    roster, stop = files.read_roster(settings.roster), threading.Event()

    def serve() -> None:
        store = Store(folder / "server" / "run", settings)
        hub = CurveHub(settings.bind, identity, roster)
        run = Run(settings, roster, store, os.urandom, RunState(), time.monotonic(), identity)
        tapped = Tapped(hub, trick)
        while not run.over and not stop.is_set():
            out = hear(tapped, run, 0.02, time.monotonic) + run.tick(time.monotonic())
            post(tapped, run, out, time.monotonic)
        stop.wait(LONG)  # for the last frames to leave
        hub.close()
        store.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def begin(config: str, output: str) -> None:
    """The client program, as ``python -m`` would run it, with its modules loaded already."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(client.main(["--config", config]))


@pytest.fixture(scope="module")
def forked() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_hostile_server", "secure_fedprompt.clients.training"])
    return context


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("shadow") / "f"
    write(folder)
    own = settings_of(ClientSettings, folder / "alice" / "client.toml")
    log = Log("client")
    trainer = client.load_trainer(own, log, Bars(log))
    server = settings_of(ServerSettings, folder / "server" / "server.toml")
    return trainer.prepare(server.method_settings())


def write(folder: Path) -> str:
    demo_files.write_files(
        folder, "promptfl", 4, ROUNDS, "masks", 0,
        for_server={"metrics": "off", "stage_seconds": 3.0, "gather_seconds": 30.0,
                    "patience": 1.0, "max_attempts": 3},
    )  # fmt: skip
    server = settings_of(ServerSettings, folder / "server" / "server.toml")
    return str(server.bind)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRICKS if "LONG" in os.environ else list(TRICKS)[::2])
def test_each_trick_ends_in_one_line(name: str, tmp_path: Path, forked: Any, learner: Any) -> None:
    """All of them with LONG=1."""
    trick, code, words = TRICKS[name]
    folder = tmp_path / "f"
    address = write(folder)
    output = folder / VICTIM / "output.log"
    others = [Member(folder, other, address) for other in ("alice", "bob", "carol")]
    for other in others:
        other.workload = Shadow(learner)
        other.begin()
    config = str(folder / VICTIM / "client.toml")
    victim = forked.Process(target=begin, args=(config, str(output)))
    with serving(folder, trick), Crowd(others):
        victim.start()
        victim.join(LONG)
    said = output.read_text()
    assert victim.exitcode == code, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert re.match(words, last), last
