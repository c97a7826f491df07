"""The ``[dp]`` table of a client's file."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.settings import CHOICES, NonNegative, Rate


class PrivacySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Differential privacy of this client's images in what it sends, by DP-SGD with Opacus.

    Attributes:
        kind: "none", or "sample": one image more or less changes little.
        target_epsilon: the budget of all runs in this state_dir together; the noise is chosen for
            it when a run begins, unless noise_multiplier says it. 0: none, set noise_multiplier.
        noise_multiplier: sigma, noise over clipping length. Alone it is bounded by no budget.
        delta: below one over the number of images.
        max_grad_norm: clipping length of one image's gradient over all trained tensors.
        accountant: "prv" or "rdp".
        retries: rounds that may be tried once more within the budget.
    """

    kind: str = "none"
    target_epsilon: NonNegative = 0.0
    noise_multiplier: NonNegative = 0.0
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    max_grad_norm: Rate = 1.0
    accountant: str = "prv"
    retries: Annotated[int, Meta(ge=0, le=1000)] = 2

    def check(self) -> None:
        """Refuse values that contradict each other.

        Raises:
            ConfigError: naming the key.
        """
        for key in ("kind", "accountant"):
            value = getattr(self, key)
            if value not in CHOICES[key]:
                allowed = ", ".join(repr(choice) for choice in CHOICES[key])
                raise ConfigError(f"dp.{key} = {value!r}: must be one of {allowed}")
        if self.kind == "none" and (self.target_epsilon or self.noise_multiplier):
            raise ConfigError(
                "dp.kind = 'none' with a target_epsilon or noise_multiplier: set kind = 'sample'"
            )
        if self.kind == "sample" and not (self.target_epsilon or self.noise_multiplier):
            raise ConfigError(
                "dp.kind = 'sample' without dp.target_epsilon and dp.noise_multiplier: set one of "
                "them, or both for a given noise within a budget"
            )
