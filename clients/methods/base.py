"""What a federated prompt method is, to the rest of the system.

Secure aggregation sees ``uploaded`` and the flat vector; training sees ``parameters`` and
``loss``; evaluation sees ``logits``. Nothing else knows which method runs.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.methods import METHODS, MethodFacts, method_facts, unknown_method
from secure_fedprompt.protocol.selection.shares import Keys
from secure_fedprompt.protocol.selection.task import Choice
from secure_fedprompt.protocol.settings import MethodSettings

Array = NDArray[np.float32]
Arrays = dict[str, Array]
Shared = tuple[tuple[nn.Parameter, ...], Callable[..., Tensor]]


@dataclass(frozen=True)
class Batch:
    """Labelled images as the method asked for them (``needs``).

    Attributes:
        images: see ``Method.needs``.
        labels: (B,) class indices.
    """

    images: Tensor
    labels: Tensor


class Method(ABC):
    """A prompt method on one client: ``__init__`` makes the parameters, ``logits`` uses them.

    Attributes:
        shared, own: parameters that are aggregated, and that stay with the client, by name.
        name: as in settings and plans.
        fine_tunes: whether a client trains once more on the last aggregate before it is evaluated.
        needs: what the frozen image tower must give, computed once and cached: "features" (B, E)
            pooled, "patches" (B, M, E), "tokens" (B, 1 + M, W) before the first layer, or nothing:
            "pixels" (B, 3, H, H).
    """

    name: ClassVar[str]
    fine_tunes: ClassVar[bool] = False
    needs: str = "features"
    shared: dict[str, nn.Parameter]
    own: dict[str, nn.Parameter] = MappingProxyType({})  # type: ignore[assignment]

    @abstractmethod
    def __init__(
        self, settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]
    ) -> None: ...

    @property
    def facts(self) -> MethodFacts:
        """Its row in the table."""
        return method_facts(self.name)

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """(B, C) for prediction."""

    def loss(self, batch: Batch) -> Tensor:
        """Training loss, a scalar."""
        return F.cross_entropy(self.logits(batch), batch.labels)

    def parameters(self) -> list[nn.Parameter]:
        """Everything that local training changes."""
        return [*self.shared.values(), *self.own.values()]

    def uploaded(self) -> tuple[TensorSpec, ...]:
        """The tensors that are aggregated."""
        return tuple(TensorSpec(name, tuple(p.shape)) for name, p in self.shared.items())

    def state(self) -> Arrays:
        """Current values of the uploaded tensors, float32."""
        return {name: array(values) for name, values in self.shared.items()}

    def load(self, tensors: Mapping[str, Array]) -> None:
        """Take over an aggregate."""
        for name, target in self.shared.items():
            put(target, tensors[name])

    def sit(self, seat: int, seats: int) -> None:  # noqa: B027
        """Be told the client's place on the roster, counted from 0, once, before anything else."""

    def begin(self, tensors: Mapping[str, Array], learning_round: int) -> None:
        """Start a round from the aggregate. The same round may begin again after an abort."""
        self.load(tensors)

    def tuned(self) -> None:  # noqa: B027
        """Be told that training on the last aggregate is done, where ``fine_tunes``."""

    def contribution(self, rng: np.random.Generator, choice: Choice | None = None) -> Arrays:
        """What is uploaded after training: the uploaded tensors, or what was chosen of them.

        Args:
            choice: of server and helper; None if the client chooses.
        """
        return self.state()

    def selection_keys(self, rng: np.random.Generator) -> Keys:
        """(modalities, groups) integer keys by which server and helper choose."""
        raise ConfigError(f"method {self.name!r} has no groups to select")

    def observe(self, images: Tensor, labels: Tensor) -> None:  # noqa: B027
        """See the client's own training features, once, before the first round."""

    def private_parts(self) -> tuple[dict[str, Shared], dict[str, nn.Parameter]]:
        """For DP-SGD: contexts that reach the loss through class features alone, with how; and
        parameters that act on each image. Together they are ``parameters``.

        Raises:
            ConfigError: this method has no loss of single images.
        """
        raise ConfigError(f"dp.kind = 'sample': {self.name} has no loss of single images")

    def sample_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """(B,) losses, whose mean is ``loss`` but for ``data_free_loss``.

        Args:
            outputs: by name of ``private_parts``: class features (B, G, C, E) and copies of the
                parameters (B, ...), one for each image.
        """
        raise NotImplementedError

    def after_noise(self) -> None:  # noqa: B027
        """With DP-SGD: change the gradients, noise and all, before they move anything. Only what
        is private already may be looked at, no image."""

    def data_free_loss(self) -> Tensor | None:
        """The part of the loss that depends on no image."""
        return None

    def private(self) -> Arrays:
        """What never leaves the client but must survive its restart."""
        return {name: array(values) for name, values in self.own.items()}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Inverse of ``private``."""
        if set(arrays) != set(self.own):
            raise ConfigError(
                f"method {self.name!r} keeps {sorted(self.own)}, found {sorted(arrays)}"
            )
        for name, target in self.own.items():
            put(target, arrays[name])

    def adopt(self, tensors: Mapping[str, Array]) -> None:
        """Predict with an aggregate alone, as who holds no private part must."""
        self.load(tensors)


def parameter(values: Array, backbone: Backbone) -> nn.Parameter:
    """A trainable tensor on the model's device."""
    return nn.Parameter(torch.from_numpy(np.array(values)).to(backbone.device, torch.float32))


def array(tensor: Tensor) -> Array:
    values: Array = tensor.detach().float().cpu().numpy().copy()
    return values


@torch.no_grad()
def put(target: Tensor, values: Array) -> None:
    """Copy values into a tensor in place: optimisers and captured graphs keep it."""
    target.copy_(torch.from_numpy(np.array(values)))


def initial_context(settings: MethodSettings, backbone: Backbone) -> Array:
    """(n_ctx, W): from words, or normal at the scale of the model's words (published: 0.02), drawn
    by numpy so that every machine gets the same.

    Raises:
        ConfigError: the words are not n_ctx tokens.
    """
    if not settings.init:
        rng = np.random.default_rng(settings.seed)
        shape = (settings.n_ctx, backbone.width)
        return (rng.standard_normal(shape) * backbone.word_scale).astype(np.float32)
    ids = backbone.words(settings.init)
    if len(ids) != settings.n_ctx:
        raise ConfigError(
            f"init = {settings.init!r} has {len(ids)} tokens, n_ctx is {settings.n_ctx}: "
            f"set n_ctx = {len(ids)}"
        )
    return array(backbone.embed(ids))


def build(settings: MethodSettings, backbone: Backbone, class_names: Sequence[str]) -> Method:
    """The method that the settings name.

    Raises:
        ConfigError: there is no such method, or it cannot run with these settings.
        ModelError: it cannot run on this model.
    """
    settings.check()
    if settings.method not in METHODS:
        raise ConfigError(unknown_method(settings.method))
    module, name = METHODS[settings.method].implementation.split(":")
    method: type[Method] = getattr(importlib.import_module(module), name)
    return method(settings, backbone, class_names)
