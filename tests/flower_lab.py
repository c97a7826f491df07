"""A Flower grid in this process: every message goes through Flower's own serialisation."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as strategies

from secure_fedprompt.flower import SecureGrid, secure, site, wire
from secure_fedprompt.host.files import make_key
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.store import open_run, rounds_of

Train = Callable[[Message, Context], Message]


class LabGrid(Grid):
    """Nodes are ClientApps; a message is answered when it is pulled.

    Args:
        lose: called with node and its message; whether it is lost, and an error comes back.
        after: called with node and reply; returns what comes back.
    """

    def __init__(self, apps: dict[int, ClientApp], configs: dict[int, dict] | None = None) -> None:
        with contextlib.suppress(ImportError):  # before Flower 1.38
            from flwr.supercore.task_identity import TaskIdentity

            TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.apps = apps
        self.contexts = {
            node: Context(1, node, (configs or {}).get(node, {}), RecordDict(), {"lr": 0.1})
            for node in apps
        }
        self.context = Context(1, 0, {}, RecordDict(), {"lr": 0.1})  # of the ServerApp
        self.lose: Callable[[int, Message], bool] = lambda node, message: False
        self.after: Callable[[int, Message], Message] = lambda node, reply: reply
        self.sent: list[tuple[int, RecordDict]] = []
        self.got: list[tuple[int, Message]] = []
        self._waiting: dict[str, Message] = {}

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def push_messages(self, messages):
        names = []
        for message in messages:
            name = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = name
            self._waiting[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids):
        replies = []
        for name in message_ids:
            message = self._waiting.pop(name, None)
            if message is not None:
                replies.append(self._answer(message))
        return replies

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        self.sent.append((node, _copied(message.content)))
        if self.lose(node, message):
            return Message(Error(1, "lost"), reply_to=message)
        asked = Message(_copied(message.content), metadata=message.metadata)
        try:
            reply = self.apps[node](asked, self.contexts[node])
        except Exception as error:
            reply = Message(Error(2, str(error)), reply_to=message)
        context = self.contexts[node]
        context.state = _copied(context.state)
        reply = self.after(node, reply)
        self.got.append((node, reply))
        return reply

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


def _copied(content: RecordDict) -> RecordDict:
    """Through the bytes that Flower sends."""
    sent = recorddict_to_proto(content).SerializeToString()
    return recorddict_from_proto(ProtoRecordDict.FromString(sent))


def arrays_of(values: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in values.items()})


def adding(node: int, step: float = 0.125) -> Train:
    """Trains by adding ``node * step`` to every array."""

    def train(message: Message, context: Context) -> Message:
        (record,) = message.content.array_records.values()
        moved = {name: array.numpy() + array.numpy().dtype.type(node * step)
                 if array.numpy().dtype.kind == "f" else array.numpy()
                 for name, array in record.items()}  # fmt: skip
        content = RecordDict({
            "arrays": arrays_of(moved),
            "metrics": MetricRecord({"num-examples": 10 * node, "loss": 1234.5 + node}),
        })  # fmt: skip
        return Message(content, reply_to=message)

    return train


def app_of(train: Train) -> ClientApp:
    app = ClientApp(mods=[secure])
    app.train()(train)
    return app


START = {"w": np.zeros((3, 2), np.float32), "b": np.ones(4, np.float16)}
QUIET = {"fraction_evaluate": 0.0}


def lab(count: int = 4, **trains) -> LabGrid:
    nodes = range(1, count + 1)
    return LabGrid({node: app_of(trains.get(f"n{node}", adding(node))) for node in nodes})


def federate(grid, folder, rounds=1, strategy=None, start=None, **settings):
    made = SecureGrid(grid, grid.context, rounds=rounds, run_dir=str(folder / "run"), **settings)
    strategy = strategy or strategies.FedAvg(**QUIET)
    result = strategy.start(made, arrays_of(START if start is None else start), rounds)
    return {name: array.numpy() for name, array in result.arrays.items()}, made


def frames_of(content: RecordDict) -> list[m.Message]:
    fields = content.config_records.get(wire.RECORD, {})
    return [Frame.read(data).message for data in fields.get("frames", [])]


def made_rows(folder):
    with open_run(folder / "run") as db:
        return rounds_of(db)


def sites_in(tmp_path, count=4):
    """Four nodes with keys, a roster and client files, and the settings of their server."""
    names = ["alice", "bob", "carol", "dave", "erin"][:count]
    members = [make_key(name, "client", tmp_path) for name in names]
    members.append(make_key("server", "server", tmp_path))
    (tmp_path / "roster.toml").write_text(Roster.of(tuple(members)).to_toml())
    for name in names:
        (tmp_path / f"{name}.toml").write_text(
            f'key = "{name}.pem"\nroster = "roster.toml"\nstate_dir = "state-{name}"\n'
        )
    configs = {i: {site.KEY: str(tmp_path / f"{n}.toml")} for i, n in enumerate(names, 1)}
    keys = {"key": str(tmp_path / "server.pem"), "roster": str(tmp_path / "roster.toml")}
    return configs, keys


def deployed(configs, **trains) -> LabGrid:
    apps = {node: app_of(trains.get(f"n{node}", adding(node))) for node in configs}
    return LabGrid(apps, configs)
