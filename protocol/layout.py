"""What is uploaded: named tensors and counters <-> one flat vector.

A layout is a tuple of ``Field``. Update fields come first (their values are multiplied by the
client's weight), then ``weight``, ``contributors`` and the metric counters. Everything that a
client contributes to a round is in this vector, so everything is under the same protection.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol.codec import F64, U8, U32, Many, Text
from secure_fedprompt.protocol.errors import FieldError, UpdateError

Vector = NDArray[np.float64]
Values = Mapping[str, NDArray[np.floating[Any]] | np.float64]
FieldName = Annotated[str, Text(48)]

WEIGHT, CONTRIBUTORS, CLIPPED = "weight", "contributors", "clipped"
CORRECT, SEEN, LOSS, ZERO_SHOT = "correct", "seen", "loss", "zero_shot"
METRICS = (CORRECT, SEEN, LOSS, ZERO_SHOT, CLIPPED)
FILLED = "filled."  # before a tensor's name: how many clients filled each of its slots


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a method uploads: its name and shape."""

    name: FieldName
    shape: Annotated[tuple[U32, ...], Many(8)]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Field:
    """One field of the upload vector.

    Attributes:
        name, shape: of the tensor; counters have shape ().
        bound: largest magnitude that one client may contribute, weight included.
        bits: width b of its ring Z_2^b, 8 to 32.
        frac: f of its scale 2^f.
        update: 1 if clipped to [-clip, clip] and multiplied by the weight, 0 for a counter.
    """

    name: FieldName
    shape: Annotated[tuple[U32, ...], Many(8)]
    bound: F64
    bits: U8
    frac: U8
    update: U8

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Layout = tuple[Field, ...]


class _Sized(Protocol):
    @property
    def size(self) -> int: ...


S = TypeVar("S", bound=_Sized)


def slices(parts: Iterable[S]) -> Iterator[tuple[S, slice]]:
    """Each field or tensor with its place in the flat vector."""
    at = 0
    for part in parts:
        yield part, slice(at, at + part.size)
        at += part.size


def total_size(layout: Layout) -> int:
    return sum(field.size for field in layout)


def flatten(layout: Layout, values: Values) -> Vector:
    """Named tensors as one float64 vector in layout order.

    Raises:
        UpdateError: a field is missing, left over, or of another shape.
    """
    if extra := set(values) - {field.name for field in layout}:
        raise UpdateError(f"update has fields {sorted(extra)} that the layout does not have")
    parts = []
    for field in layout:
        if field.name not in values:
            raise UpdateError(f"update lacks the field {field.name!r}")
        value = np.asarray(values[field.name], np.float64)
        if value.shape != tuple(field.shape):
            raise UpdateError(
                f"update field {field.name!r} has shape {value.shape}, layout says {field.shape}"
            )
        parts.append(value.reshape(-1))
    return np.concatenate(parts)


def unflatten(layout: Layout, vector: Vector) -> dict[str, Vector]:
    """Inverse of ``flatten``; the tensors are views of ``vector``."""
    if vector.shape != (total_size(layout),):
        raise FieldError(f"vector of shape {vector.shape}, layout has {total_size(layout)} values")
    return {field.name: vector[part].reshape(field.shape) for field, part in slices(layout)}
