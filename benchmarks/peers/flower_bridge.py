"""Rounds of Flower's simulation, for the chapter "flower": in the clear, under our masks, and under
its own SecAgg+.

    python flower_bridge.py '{"clients": 10, "values": 100000, "kind": "masks"}' ROUNDS

``kind`` is clear, masks or secagg+. One Ray worker a core; every client adds a number to an array.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from typing import Any

import numpy as np


class Counting:
    """A grid that counts; delegates to another."""

    def __init__(self, grid: Any) -> None:
        self._grid, self.messages, self.bytes = grid, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def _count(self, messages: Any) -> list[Any]:
        from flwr.common.serde import recorddict_to_proto

        counted = list(messages)
        for message in counted:
            if message.has_content():
                self.messages += 1
                self.bytes += recorddict_to_proto(message.content).ByteSize()
        return counted

    def push_messages(self, messages: Any) -> Any:
        return self._grid.push_messages(self._count(messages))

    def pull_messages(self, message_ids: Any) -> Any:
        return self._count(self._grid.pull_messages(message_ids))

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        waiting = set(self.push_messages(messages))
        found = []
        while waiting:
            new = self.pull_messages(list(waiting))
            waiting -= {message.metadata.reply_to_message_id for message in new}
            found += new
            time.sleep(0.02)
        return found


def modern(kind: str, clients: int, values: int, rounds: int) -> dict[str, list[float]]:
    """Flower's message API, in the clear or masked."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from secure_fedprompt.flower import SecureGrid, secure

    client = ClientApp(mods=[secure] if kind == "masks" else [])

    @client.train()
    def train(message: Message, context: Any) -> Message:
        add = np.float32(0.01 * (1 + int(context.node_config["partition-id"])))
        moved = message.content["arrays"]["x"].numpy() + add
        content = {
            "arrays": ArrayRecord({"x": Array(moved)}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    server, seconds, counted = ServerApp(), list[float](), list[tuple[int, int]]()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        counting = Counting(grid)
        folder = tempfile.mkdtemp()
        used = (
            SecureGrid(counting, context, rounds=rounds, run_dir=folder)
            if kind == "masks"
            else counting
        )

        class Timed(FedAvg):  # type: ignore[misc]
            def aggregate_train(self, server_round: int, replies: Any) -> Any:
                seconds.append(time.perf_counter() - self.begun)
                counted.append((counting.messages, counting.bytes))
                return super().aggregate_train(server_round, replies)

            def configure_train(self, *args: Any) -> Any:
                self.begun = time.perf_counter()
                return super().configure_train(*args)

        start = ArrayRecord({"x": Array(np.zeros(values, np.float32))})
        strategy = Timed(fraction_evaluate=0.0, min_available_nodes=clients)
        found = strategy.start(used, start, rounds).arrays["x"].numpy()
        expected = rounds * 0.01 * (clients + 1) / 2
        assert np.allclose(found, expected, atol=1e-3), (found[0], expected)

    run_simulation(server, client, clients, backend_config={"client_resources": {"num_cpus": 1}})
    return figures(seconds, counted)


def legacy(clients: int, values: int, rounds: int) -> dict[str, list[float]]:
    """SecAgg+ as its documentation says: shares for all, a threshold of two thirds."""
    from flwr.client import NumPyClient
    from flwr.client.mod import secaggplus_mod
    from flwr.clientapp import ClientApp
    from flwr.common import ndarrays_to_parameters
    from flwr.server import LegacyContext, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    class Client(NumPyClient):  # type: ignore[misc]
        def __init__(self, part: int) -> None:
            self.add = np.float32(0.01 * (1 + part))

        def fit(self, parameters: Any, config: Any) -> Any:
            return [parameters[0] + self.add], 1, {}

    def client_fn(context: Any) -> Any:
        return Client(int(context.node_config["partition-id"])).to_client()

    client = ClientApp(client_fn=client_fn, mods=[secaggplus_mod])
    server, seconds, counted = ServerApp(), list[float](), list[tuple[int, int]]()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        counting = Counting(grid)
        inner = SecAggPlusWorkflow(
            num_shares=clients, reconstruction_threshold=2 * clients // 3 + 1, max_weight=1.0
        )

        def timed(grid: Any, context: Any) -> None:
            begun = time.perf_counter()
            inner(grid, context)
            seconds.append(time.perf_counter() - begun)
            counted.append((counting.messages, counting.bytes))

        strategy = FedAvg(
            fraction_evaluate=0.0, min_fit_clients=clients, min_available_clients=clients,
            initial_parameters=ndarrays_to_parameters([np.zeros(values, np.float32)]),
        )  # fmt: skip
        whole = LegacyContext(context, ServerConfig(num_rounds=rounds), strategy)
        DefaultWorkflow(fit_workflow=timed)(counting, whole)

    run_simulation(server, client, clients, backend_config={"client_resources": {"num_cpus": 1}})
    return figures(seconds, counted)


def figures(seconds: list[float], counted: list[tuple[int, int]]) -> dict[str, list[float]]:
    """Of the rounds after the first, in which nodes are met."""
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(counted)]
    return {
        "first_round_s": seconds[:1],
        "seconds": seconds[1:],
        "messages": [float(step[0]) for step in steps],
        "megabytes": [step[1] / 1e6 for step in steps],
    }


def main() -> None:
    case, rounds = json.loads(sys.argv[1]), int(sys.argv[2]) + 1
    size = case["clients"], case["values"], rounds
    found = legacy(*size) if case["kind"] == "secagg+" else modern(case["kind"], *size)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
