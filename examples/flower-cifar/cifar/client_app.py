"""The clients of a plain Flower app; one line is ours."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from cifar.task import Net, fit, share
from secure_fedprompt.flower import secure

app = ClientApp(mods=[secure])  # was: ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    config, node = context.run_config, context.node_config
    torch.set_num_threads(1)
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = share(config["data"], int(node["partition-id"]), int(node["num-partitions"]))
    loss = fit(model, data, config["lr"], config["batch-size"], config["local-epochs"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(data)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
