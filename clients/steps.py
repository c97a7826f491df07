"""A step of local training: loss, gradients and SGD in one graph.

PyTorch's own optimisers break a compiled graph, and so does ``backward``. This is its SGD
(Sutskever et al., ICML 2013, as PyTorch has it: momentum without dampening, decay added to the
gradient), value for value, with nothing in it that a graph could not hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secure_fedprompt.clients.methods.base import Batch, Method


class Steps:
    """Steps on one method; momentum begins at zero.

    Attributes:
        rate: learning rate, a tensor, so that another one is no other graph.
    """

    def __init__(self, method: Method, *, lr: float, momentum: float, weight_decay: float) -> None:
        self.method, self.momentum, self.weight_decay = method, momentum, weight_decay
        self.parameters = method.parameters()
        self.moving = [torch.zeros_like(p) for p in self.parameters]
        device = self.parameters[0].device
        self.rate = torch.tensor(lr, dtype=self.parameters[0].dtype, device=device)

    def take(self, batch: Batch) -> Tensor:
        """One step; the loss before it."""
        loss = self.method.loss(batch)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        with torch.no_grad():
            for p, gradient, moving in zip(self.parameters, gradients, self.moving, strict=True):
                if gradient is None:
                    continue
                moving.mul_(self.momentum).add_(gradient.add(p, alpha=self.weight_decay))
                p.sub_(self.rate * moving)
        return loss.detach()
