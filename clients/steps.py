"""A step of local training: loss, gradients and SGD in one graph.

PyTorch's own optimisers break a compiled graph, and so does ``backward``. This is its SGD
(Sutskever et al., ICML 2013, as PyTorch has it: momentum without dampening, decay added to the
gradient), value for value, with nothing in it that a graph could not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secure_fedprompt.clients.methods.base import Batch, Method
from secure_fedprompt.protocol.errors import ConfigError


class Steps:
    """Steps on one method; momentum begins at zero.

    Attributes:
        rate: learning rate, a tensor, so that another one is no other graph.
    """

    def __init__(self, method: Method, *, lr: float, momentum: float, weight_decay: float) -> None:
        self.method, self.momentum, self.weight_decay = method, momentum, weight_decay
        self.parameters = method.parameters()
        self.moving = [torch.zeros_like(p) for p in self.parameters]
        self._finite = [p.detach().clone() for p in self.parameters]
        self._diverged = torch.zeros((), dtype=torch.bool, device=self.parameters[0].device)
        device = self.parameters[0].device
        self.rate = torch.tensor(lr, dtype=self.parameters[0].dtype, device=device)

    def restart(self) -> None:
        """Momentum zero again, in the same tensors."""
        for moving in self.moving:
            moving.zero_()
        self._diverged.zero_()
        self.keep_finite()

    @torch.no_grad()
    def keep_finite(self) -> None:
        """Remember the parameters after a step unless it overflowed, without waiting for it."""
        fine = torch.stack([p.isfinite().all() for p in self.parameters]).all()
        for kept, p in zip(self._finite, self.parameters, strict=True):
            kept.copy_(torch.where(fine, p, kept))
        self._diverged.logical_or_(~fine)

    @torch.no_grad()
    def recover(self) -> bool:
        """Be where the last finite step led to; whether there were others after it.

        The server chose what is trained, and how many steps overflow depends on the images: a
        failure would leave out of the sum whom the server likes.
        """
        diverged = bool(self._diverged)
        if diverged:
            for kept, p in zip(self._finite, self.parameters, strict=True):
                p.copy_(kept)
        return diverged

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


class CompiledSteps(Steps):
    """The same steps from one graph for each size of batch, made when it is first seen; on CUDA it
    is captured and replayed (``reduce-overhead``).

    Args:
        backend: of ``torch.compile``.

    Raises:
        ConfigError: this PyTorch cannot trace gradients, or not compile this method.
    """

    def __init__(
        self, method: Method, *, lr: float, momentum: float, weight_decay: float,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:  # fmt: skip
        super().__init__(method, lr=lr, momentum=momentum, weight_decay=weight_decay)
        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            raise ConfigError(
                f"compile: PyTorch {torch.__version__} traces no gradients: leave it out, or "
                "install a newer one"
            )
        for kept in (self.rate, *self.moving):  # a captured graph changes them where they are
            torch._dynamo.mark_static_address(kept)
        replayed = self.rate.device.type == "cuda" and backend == "inductor"
        options: dict[str, Any] = {"mode": "reduce-overhead"} if replayed else {}
        self._graph: Callable[[Batch], Tensor] = torch.compile(
            super().take, fullgraph=True, dynamic=False, backend=backend, **options
        )

    def take(self, batch: Batch) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                return self._graph(batch).clone()  # the next replay writes over it
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(
                f"compile: PyTorch {torch.__version__} cannot compile a step of "
                f"{self.method.name} on {self.rate.device.type} "
                f"({type(error).__name__}): leave it out"
            ) from error
