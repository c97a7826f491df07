"""The learning rate of an epoch."""

from __future__ import annotations

import math

from secure_fedprompt.protocol.settings import MethodSettings

WARM_UP = 1e-5  # of the very first epoch, as in CoOp's configurations


def rate(settings: MethodSettings, learning_round: int, rounds: int, epoch: int) -> float:
    """Constant, or a cosine over the learning rounds after one epoch of warming up.

    It follows the learning round and not the steps taken: momentum begins anew in each round, and a
    client that was away for some goes on at the rate of the others. Zhou et al., CoOp (IJCV 2022),
    and with it PromptFL.

    Args:
        learning_round: from 1, of ``rounds``; epoch: of the round, from 0.
    """
    if settings.schedule == "constant":
        return settings.lr
    if learning_round == 1 and epoch == 0:
        return min(settings.lr, WARM_UP)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (learning_round - 1) / rounds))


def slowest(settings: MethodSettings, rounds: int) -> tuple[float, int]:
    """The learning round in which a prompt moves least: its largest rate, and its number.

    Args:
        rounds: learning rounds of the run; one that only evaluates has none.
    """
    last, rounds = settings.epochs - 1, max(1, rounds)
    return min((rate(settings, number, rounds, last), number) for number in {1, rounds})
