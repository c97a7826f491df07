"""What training moves parameters by whatever images show, which must not tell how many there are.

Weight decay takes a share of them at each step, and images decide how many steps a round has: the
sum's part along a prompt that everybody knows would be a sum of powers of all image counts, and
with enough decay a client with many images would forget all that they said, so that the sum is of
those with few. So a round takes back a tenth at most, by less decay where there are many steps,
and in the end what decay alone would have left is what one step for each epoch leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secure_fedprompt.protocol.settings import MethodSettings

MOST = 0.1  # share that decay takes back in a round


def decay_of(settings: MethodSettings, steps: int) -> float:
    """Weight decay of a round of so many steps."""
    reach = settings.lr * steps / (1 - min(settings.momentum, 0.999))
    return min(settings.weight_decay, MOST / reach)


def share_left(rates: Sequence[float], momentum: float, decay: float, pull: float) -> float:
    """What these steps would leave of parameters whose loss has no gradient.

    Args:
        rates: learning rate of each step. pull: weight of half the squared distance from where they
            began (FedProx).
    """
    left, moving = 1.0, 0.0
    for rate in rates:
        moving = momentum * moving + decay * left + pull * (left - 1.0)
        left -= rate * moving
    return left


class Drift:
    """A round of training.

    Args:
        rates: learning rate of each epoch. epochs: of each step.
    """

    def __init__(
        self, settings: MethodSettings, parameters: Sequence[Tensor], rates: Sequence[float],
        epochs: Sequence[int],
    ) -> None:  # fmt: skip
        self._parameters = parameters
        self._begin = [p.detach().clone() for p in parameters]
        pull = settings.compare.prox_mu if settings.method == "fedprox" else 0.0
        own = [rates[epoch] for epoch in epochs]
        self._more = share_left(rates, settings.momentum, settings.weight_decay, pull) - share_left(
            own, settings.momentum, decay_of(settings, len(own)), pull
        )

    @torch.no_grad()
    def even_out(self) -> None:
        """Have decay taken back what it does in any client's round."""
        for p, begin in zip(self._parameters, self._begin, strict=True):
            p.add_(begin, alpha=self._more)
