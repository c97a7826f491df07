"""Apps for Flower's own simulation and processes: numpy only, quick to start."""

from __future__ import annotations

import json
import os

import numpy as np
from flower_lab import adding, arrays_of
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from secure_fedprompt.flower import SecureGrid, secure, wire
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.transport import Frame

STAGES = (m.Plan, m.Adverts, m.Inbox, m.SurvivorList, m.UnmaskRequest)
VALUES = 5


def config_of(context: Context) -> dict[str, object]:
    """The run config; Flower's run_simulation knows none."""
    return dict(context.run_config) or json.loads(os.environ["LAB"])


def losing(message: Message, context: Context, call_next):  # type: ignore[no-untyped-def]
    """In learning round r the node of partition r ends before the r-th stage, if that is asked."""
    part = int(context.node_config["partition-id"])
    if config_of(context).get("lose") and part < len(STAGES):
        fields = message.content.config_records[wire.RECORD]
        for data in fields.get("frames", []):
            frame = Frame.read(data).message  # type: ignore[arg-type]
            if isinstance(frame, STAGES[part]):
                number = frame.plan.round if isinstance(frame, m.Plan) else frame.round
                if number == part + 1:
                    raise RuntimeError("this node ends here")
    return call_next(message, context)


def train(message: Message, context: Context) -> Message:
    return adding(int(context.node_config["partition-id"]) + 1, 1 / 16)(message, context)


client_app = ClientApp(mods=[losing, secure])
client_app.train()(train)
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    config = config_of(context)
    rounds = int(config["rounds"])
    made = SecureGrid(
        grid, context, rounds=rounds, run_dir=str(config["run-dir"]), key=str(config["key"]),
        roster=str(config["roster"]),
    )  # fmt: skip
    least = int(config["nodes"])
    result = FedAvg(fraction_evaluate=0.0, min_available_nodes=least, min_train_nodes=least).start(
        made, arrays_of({"w": np.zeros(VALUES, np.float32)}), rounds
    )
    values = result.arrays["w"].numpy()
    with open(os.path.join(str(config["run-dir"]), "average.txt"), "w") as file:
        file.write(" ".join(map(str, values.tolist())))
