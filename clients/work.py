"""What a session asks of the private side of a client, and what that gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.layout import (
    CLIPPED,
    CONTRIBUTORS,
    FILLED,
    WEIGHT,
    TensorSpec,
    Values,
)
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.selection.shares import Keys
from secure_fedprompt.protocol.selection.task import Choice
from secure_fedprompt.protocol.settings import MethodSettings

Place = tuple[bytes, int, bytes]


class Learner(Protocol):
    """Data and model with the method of a run."""

    def tensors(self) -> tuple[TensorSpec, ...]:
        """What is uploaded."""

    def initial(self) -> Prompt:
        """The starting prompt, flat float32, from settings and model alone."""

    def run(self, work: Work) -> Update | Keys:
        """Evaluate the global prompt, train on it if the round trains, and return the update.

        Where server and helper select, the first call returns the keys of the groups,
        (modalities, groups); the second has their choice in ``work``, and trains no more.

        Raises:
            SecureFedPromptError: there is none.
        """


L_co = TypeVar("L_co", bound=Learner, covariant=True)


class Workload(Protocol[L_co]):
    """The private side of a client: model and data."""

    model_fingerprint: bytes
    classes_digest: bytes
    weight: float  # n_k
    resuming: bool  # whether this client has been in the run already; told before ``prepare``

    def prepare(self, settings: MethodSettings) -> L_co:
        """Build the method of the run."""


class Update(NamedTuple):
    """What one client contributes to a round.

    Attributes:
        values: update tensors and metric counters by field name.
        weight: n_k, or 1 under uniform weights.
    """

    values: Values
    weight: float


@dataclass(frozen=True)
class Work:
    """A round that waits for an update, or for selection keys.

    Attributes:
        base: the global prompt, flat.
        choice: of server and helper, where they select, once they have.
    """

    plan: RoundPlan
    base: Prompt
    choice: Choice | None = None


@dataclass(frozen=True, repr=False)
class Made:
    """What training gave, and for which learning round."""

    place: Place
    result: Update | Keys


def place_of(plan: RoundPlan) -> Place:
    """What all attempts at a learning round have in common."""
    return plan.run, plan.learning_round, plan.base_digest


def choice_bytes(choice: Choice | None) -> bytes:
    """A prefix that tells for which outcome of a selection a vector was made."""
    if choice is None:
        return b""
    return digest(Purpose.SELECTION, *(part.astype("<i8").tobytes() for part in choice))


def nothing(work: Work, weight: float) -> Update:
    """A zero update at a client's usual weight: it looks like any other.

    Args:
        weight: n_k.
    """
    values: dict[str, Any] = {}
    for field in work.plan.layout:
        if field.name in (WEIGHT, CONTRIBUTORS, CLIPPED):
            continue
        values[field.name] = np.zeros(field.shape)
        if field.name.startswith(FILLED):
            assert work.choice is not None
            tensors = [f.name for f in work.plan.layout if f.update]
            chosen = work.choice[tensors.index(field.name.removeprefix(FILLED))]
            filled = np.arange(field.size) < len(chosen)
            values[field.name] = filled.astype(np.float64)
    return Update(values, 1.0 if work.plan.uniform else weight)
