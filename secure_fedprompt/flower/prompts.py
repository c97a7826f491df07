"""Prompts of a frozen CLIP as a Flower app: PromptFL, FedOTP, FedMGP, and every other method.

What is in ``[tool.flwr.app.config]`` under the names of our settings (method, n_ctx, lr, dataset,
partition, ...) is taken from there. A node trains on its share of the data set ("partition-id" and
"num-partitions" of its node config), or on what its own client file says. What a method keeps at
home (FedOTP's local prompt) is in the context's state.

Model and torch are loaded where they are used: most messages that a ClientApp answers, each in a
process of its own, train nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord


def initial_arrays(run_config: Mapping[str, Any]) -> ArrayRecord:
    """The starting prompt: a function of settings and model, the same on every machine."""
    from secure_fedprompt.flower import prompt_training

    return prompt_training.initial_arrays(run_config)


def train(message: Message, context: Context) -> Message:
    """One node's local training: the ``train`` of a ClientApp."""
    from secure_fedprompt.flower import prompt_training

    return prompt_training.train(message, context)


def evaluator(run_config: Mapping[str, Any]) -> Callable[[int, ArrayRecord], MetricRecord]:
    """For ``evaluate_fn``: accuracy on test images that the server has itself."""
    from secure_fedprompt.flower import prompt_training

    return prompt_training.evaluator(run_config)
