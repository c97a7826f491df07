"""One round of Flower's SecAgg+ with all parties in one process, for the chapter "scale".

    python flower_secagg.py '{"clients": 100, "values": 8192, "dropped": 0.1, "shares": 43,
                             "threshold": 23}' REPEAT

Runs in an environment of its own. Its workflow is the server, its mod each client (both belong to
its legacy API), and records pass between them as the bytes that its transport would carry; there is
no network and no process of its own around them. Dropped clients answer with an error from the
upload on. Prints samples: CPU seconds of the server and of all clients, wall seconds, a client's
bytes beside its vector. The sum is checked against the inputs.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.compat.common.recorddict_compat import (
    arrayrecord_to_parameters,
    fitres_to_recorddict,
    parameters_to_arrayrecord,
)
from flwr.proto.recorddict_pb2 import RecordDict as Wire
from flwr.server import LegacyContext, ServerConfig, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity

BASE = 1 << 40  # node identities are large numbers there


class Proxy(ClientProxy):
    """A name in the client manager; nothing is called on it."""

    def __init__(self, node_id: int) -> None:
        super().__init__(str(node_id))
        self.node_id = node_id

    get_properties = get_parameters = fit = evaluate = reconnect = None


class Grid:
    """Calls the mod in the place of sending."""

    def __init__(self, clients: int, values: int, dropout: float) -> None:
        self.updates = np.random.default_rng(0).normal(0, 0.05, (clients, values))
        self.contexts = {BASE + i: context(BASE + i) for i in range(clients)}
        self.gone = set(list(self.contexts)[: round(dropout * clients)])
        self.clients_s, self.bytes, self.stage = 0.0, dict.fromkeys(self.contexts, 0), 0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        self.stage += 1
        replies = []
        for number, message in enumerate(messages):
            known = message.metadata.__dict__
            known |= {"_run_id": 1, "_src_node_id": 1, "_message_id": f"{self.stage}-{number}"}
            name = message.metadata.dst_node_id
            if self.stage >= 3 and name in self.gone:
                replies.append(Message(Error(code=0), reply_to=message))
                continue
            down = recorddict_to_proto(message.content).SerializeToString()
            begin = time.process_time()
            message.content = recorddict_from_proto(Wire.FromString(down))
            reply = secaggplus_mod(message, self.contexts[name], self.train)
            up = recorddict_to_proto(reply.content).SerializeToString()
            self.clients_s += time.process_time() - begin
            self.bytes[name] += len(down) + len(up)
            reply.metadata.__dict__["_src_node_id"] = name
            reply.content = recorddict_from_proto(Wire.FromString(up))
            replies.append(reply)
        return replies

    def train(self, message: Message, _: Context) -> Message:
        update = self.updates[message.metadata.dst_node_id - BASE]
        parameters = ndarrays_to_parameters([update])
        result = FitRes(Status(Code.OK, ""), parameters, num_examples=64, metrics={})
        return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)


def context(node_id: int) -> Context:
    return Context(run_id=1, node_id=node_id, node_config={}, state=RecordDict(), run_config={})


def main() -> None:
    logging.disable(logging.CRITICAL)
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    case = json.loads(sys.argv[1])
    clients, values, shares, threshold = (
        case[key] for key in ("clients", "values", "shares", "threshold")
    )
    dropout = case["dropped"]
    grid, manager = Grid(clients, values, dropout), SimpleClientManager()
    for node_id in grid.contexts:
        manager.register(Proxy(node_id))
    initial = ndarrays_to_parameters([np.zeros(values)])
    strategy = FedAvg(min_available_clients=clients, initial_parameters=initial)
    legacy = LegacyContext(context(1), ServerConfig(num_rounds=1), strategy, manager)

    legacy.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    arrays: Any = parameters_to_arrayrecord(initial, keep_input=True)
    legacy.state.array_records[MAIN_PARAMS_RECORD] = arrays
    begin, cpu = time.perf_counter(), time.process_time()
    SecAggPlusWorkflow(shares, threshold)(grid, legacy)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu

    after = arrayrecord_to_parameters(legacy.state.array_records[MAIN_PARAMS_RECORD], True)
    there = [i for i in range(clients) if BASE + i not in grid.gone]
    error = np.abs(parameters_to_ndarrays(after)[0] - grid.updates[there].mean(0)).max()
    assert error < 1e-3, error
    besides = np.median([grid.bytes[BASE + i] for i in there]) - 8 * 2 * values
    print(json.dumps({
        "wall_s": [wall], "server_cpu_s": [cpu - grid.clients_s],
        "clients_cpu_s": [grid.clients_s], "cpu_s": [cpu], "bytes_besides": [float(besides)],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
