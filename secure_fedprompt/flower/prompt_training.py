"""The training behind ``prompts``."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data.loading import load_part
from secure_fedprompt.clients.features import Features, predict
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.methods.base import build
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.flower.form import ROUND
from secure_fedprompt.flower.site import KEY
from secure_fedprompt.host import command
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.settings import MethodSettings

ROUNDS = "num-server-rounds"
_PRIVATE, _RUN = "private", b"flower"


def initial_arrays(run_config: Mapping[str, Any]) -> ArrayRecord:
    """The starting prompt: a function of settings and model, the same on every machine."""
    method, client = _settings(run_config, {})
    backbone = Backbone.load(client.model, client.pretrained, client.device, client.precision)
    train, _ = load_part(client)
    return _record(build(method, backbone, train.class_names).state())


def train(message: Message, context: Context) -> Message:
    """One node's local training: the ``train`` of a ClientApp."""
    learner = _learner(*_keys(context))
    method, client = learner.method, learner.client
    if _PRIVATE in context.state.array_records:
        method.restore(_arrays(context.state.array_records[_PRIVATE]))
    (given,) = message.content.array_records.values()
    number = int(_round_of(message))
    rounds = int(context.run_config.get(ROUNDS, number))
    method.begin(_arrays(given), number)
    learner.train_round(_RUN, number, (number, rounds))
    sent = method.contribution(client.draws(number, 1), None)
    if private := method.private():
        context.state.array_records[_PRIVATE] = _record(private)
    metrics = MetricRecord({"num-examples": client.image_counts[0]})
    return Message(RecordDict({"arrays": _record(sent), "metrics": metrics}), reply_to=message)


def evaluator(run_config: Mapping[str, Any]) -> Callable[[int, ArrayRecord], MetricRecord]:
    """For ``evaluate_fn``: accuracy on test images that the server has itself."""
    settings, client = _settings(run_config, {})
    backbone = Backbone.load(client.model, client.pretrained, client.device, client.precision)
    _, test = load_part(client)
    method = build(settings, backbone, test.class_names)
    features = Features(backbone, test, method.needs, lambda what, done, total: None, "")

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        method.begin(_arrays(arrays), server_round + 1)
        guesses, losses = predict(method, features)
        right = float((guesses == features.labels.cpu().numpy()).mean())
        return MetricRecord({"accuracy": right, "loss": float(losses.mean())})

    return evaluate


def _round_of(message: Message) -> Any:
    for config in message.content.config_records.values():
        if ROUND in config:
            return config[ROUND]
    raise ConfigError(f"the message has no {ROUND!r}: strategies of Flower send it")


def _keys(context: Context) -> tuple[str, str]:
    """What a node's learner depends on."""
    return json.dumps(dict(context.run_config)), json.dumps(dict(context.node_config))


@functools.lru_cache(maxsize=32)
def _learner(run_config: str, node_config: str) -> LocalLearner:
    """A node's model and images, once for each process."""
    settings, client = _settings(json.loads(run_config), json.loads(node_config))
    if client.dp.kind != "none":
        raise ConfigError("dp.kind: a Flower app keeps no ledger for DP-SGD: leave it out")
    train, test = load_part(client)
    backbone = Backbone.load(client.model, client.pretrained, client.device, client.precision)
    trainer = LocalTrainer(backbone, train, test, None, client.augment)
    trainer.seat = client.part, max(client.parts, 1)
    return trainer.prepare(settings)


def _settings(
    run_config: Mapping[str, Any], node_config: Mapping[str, Any]
) -> tuple[MethodSettings, ClientSettings]:
    """Of the method and of one node.

    Raises:
        ConfigError: naming the key.
    """
    method = {k: v for k, v in run_config.items() if k in MethodSettings.__struct_fields__}
    made = command.build(MethodSettings, method, "run config")
    made.check()
    if path := node_config.get(KEY):
        return made, command.load(ClientSettings, argparse.Namespace(config=str(path)))
    known = set(ClientSettings.__struct_fields__) - {"method", "policy"}
    client = {k: v for k, v in run_config.items() if k in known}
    own = command.build(ClientSettings, client, "run config")
    if "num-partitions" in node_config:
        own = msgspec.structs.replace(
            own, part=int(node_config["partition-id"]), parts=int(node_config["num-partitions"])
        )
    return made, own


def _record(arrays: Mapping[str, Any]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in arrays.items()})


def _arrays(record: ArrayRecord) -> dict[str, Any]:
    return {name: array.numpy() for name, array in record.items()}
