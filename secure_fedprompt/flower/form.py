"""The form of an app: which arrays are averaged, and what else every client must be given alike.

What a sum means must not vary between clients: a server that gave all but one of them a learning
rate of zero would read that one's update in the sum. So names, shapes and types of the arrays, the
records beside them, the app's run config and the number of Flower's run are digested; the digest is
in the terms, as the model's fingerprint is elsewhere, and a client with another one is in another
run. The digest without the number is in what runs are compared by, as training settings are.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.errors import ConfigError, FieldError, UpdateError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.plan import MAX_VALUES

ROUND = "server-round"  # what a strategy counts up; clients fill in what the plan says
VALUES = "arrays"  # name of the one tensor that is averaged
FLOATS = ("float16", "float32", "float64")
NPY = "numpy.ndarray"  # how Flower names arrays in numpy's own format


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array that is averaged."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class Fixed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array that every client begins each round with as it is, and nobody sends."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes  # npy


class Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a server says of its app, once for the run.

    Attributes:
        kind: message type, as "train".
        record: name of the record of arrays. order: names of all of them, as they come.
        averaged: those that are averaged.
        kept: those that are not.
        configs: other records by name; values as ``plain`` makes them.
        weighted_by: metric of an app's reply that says how many images it trained on.
    """

    kind: str
    record: str
    order: tuple[str, ...]
    averaged: tuple[Shape, ...]
    kept: dict[str, Fixed]
    configs: dict[str, dict[str, Any]]
    weighted_by: str

    @classmethod
    def of(cls, kind: str, content: RecordDict, exclude: Sequence[str], weighted_by: str) -> Form:
        """Of the first message of a strategy.

        Args:
            exclude: patterns of names of arrays that are not averaged.

        Raises:
            ConfigError: it cannot be averaged; names the array or record.
        """
        arrays = list(content.array_records.items())
        if len(arrays) != 1:
            names = ", ".join(name for name, _ in arrays) or "none"
            raise ConfigError(f"message has {len(arrays)} array records ({names}): one is averaged")
        if content.metric_records:
            name = next(iter(content.metric_records))
            raise ConfigError(f"message has a metric record {name!r}: put it into a config record")
        (record, found), averaged, kept = arrays[0], [], {}
        for name, array in found.items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
                kept[name] = Fixed(array.dtype, tuple(array.shape), array.data)
                continue
            if array.dtype not in FLOATS:
                raise ConfigError(
                    f"array {name!r} has type {array.dtype}, and only floats of 16 to 64 bits are "
                    f"averaged: give SecureGrid(exclude=[{name!r}]) to leave it as it is everywhere"
                )
            averaged.append(Shape(name, array.dtype, tuple(array.shape)))
        size = sum(shape.size for shape in averaged)
        if not 0 < size <= MAX_VALUES:
            raise ConfigError(f"{size} values to average: 1 to {MAX_VALUES} are possible")
        for pattern in exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in kept):
                raise ConfigError(f"exclude: no array is called {pattern!r}")
        configs = {name: plain(config) for name, config in content.config_records.items()}
        return cls(kind, record, tuple(found), tuple(averaged), kept, configs, weighted_by)

    def differs(self, other: Form) -> str:
        """What another message of the strategy has changed, or nothing. Types of arrays may change,
        since strategies calculate in other ones; clients are given the first."""
        for name in sorted({*self.configs, *other.configs}):
            mine, theirs = self.configs.get(name, {}), other.configs.get(name, {})
            for key in sorted({*mine, *theirs}):
                if mine.get(key) != theirs.get(key):
                    return f"{name}[{key!r}] = {theirs.get(key)!r}, before {mine.get(key)!r}"
        for what in ("kind", "record", "order", "shapes"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                return f"the message's {what} is {theirs}, before {mine}"
        return ""

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of what is averaged."""
        return [(shape.name, shape.shape) for shape in self.averaged]

    def digest(self, run_config: Mapping[str, Any]) -> bytes:
        """Of the form and of the app's run config; 32 bytes."""
        given = json.dumps(dict(run_config), sort_keys=True).encode()
        return digest(Purpose.FORM, msgspec.json.encode(self, order="deterministic"), given)

    def fingerprint(self, run_config: Mapping[str, Any], run_id: int) -> bytes:
        """The same for one run of Flower, and with it one app; 32 bytes."""
        return digest(Purpose.FORM, self.digest(run_config), run_id.to_bytes(8, "little"))

    def check(self) -> None:
        """Refuse what came from a server and is no form.

        Raises:
            FieldError
        """
        if not all(shape.dtype in FLOATS for shape in self.averaged):
            raise FieldError("form averages arrays that are no floats")
        sizes = [n for shape in self.averaged for n in shape.shape]
        total = sum(math.prod(shape.shape) for shape in self.averaged)
        if any(n < 0 for n in sizes) or not 0 < total <= MAX_VALUES:
            raise FieldError(f"form averages {total} values")
        names = [shape.name for shape in self.averaged] + list(self.kept)
        if len(set(names)) != len(names) or sorted(names) != sorted(self.order):
            raise FieldError("form names arrays twice, or not at all")

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """What is uploaded: all arrays, one after the other."""
        return (TensorSpec(VALUES, (sum(shape.size for shape in self.averaged),)),)

    def flat(self, arrays: ArrayRecord) -> Prompt:
        """Averaged arrays as one float32 vector.

        Raises:
            UpdateError: other names or shapes, or NaN or infinity.
        """
        if set(arrays) != set(self.order):
            other = ", ".join(sorted(set(arrays) ^ set(self.order)))
            raise UpdateError(f"arrays of other names than the run's: {other}")
        parts = []
        for shape in self.averaged:
            values = arrays[shape.name].numpy()
            if values.shape != shape.shape:
                raise UpdateError(
                    f"array {shape.name!r} has shape {values.shape}, not {shape.shape}"
                )
            parts.append(values.astype(np.float32).reshape(-1))
        flat = np.concatenate(parts)
        if not np.isfinite(flat).all():
            raise UpdateError("arrays hold NaN or infinity")
        return flat

    def arrays(self, flat: Prompt) -> ArrayRecord:
        """Inverse of ``flat``, with those that are kept, in the order and types of the app."""
        named: dict[str, Array] = {}
        at = 0
        for shape in self.averaged:
            values: NDArray[Any] = flat[at : at + shape.size].reshape(shape.shape)
            named[shape.name], at = Array(values.astype(shape.dtype)), at + shape.size
        for name, fixed in self.kept.items():
            named[name] = Array(fixed.dtype, fixed.shape, NPY, fixed.data)
        return ArrayRecord({name: named[name] for name in self.order})

    def records(self, learning_round: int) -> dict[str, ConfigRecord]:
        """The other records of a round."""
        made = {name: unplain(self.configs[name]) for name in sorted(self.configs)}
        for config in made.values():
            config[ROUND] = learning_round
        return made


def plain(config: ConfigRecord) -> dict[str, Any]:
    """A record as JSON can hold it, without the number of the round."""
    return {
        key: {"hex": value.hex()} if isinstance(value, bytes)
        else [{"hex": v.hex()} if isinstance(v, bytes) else v for v in value]
        if isinstance(value, list) else value
        for key, value in sorted(config.items()) if key != ROUND
    }  # fmt: skip


def unplain(config: Mapping[str, Any]) -> ConfigRecord:
    """Inverse of ``plain``."""
    return ConfigRecord({
        key: [_back(v) for v in value] if isinstance(value, list) else _back(value)
        for key, value in sorted(config.items())
    })  # fmt: skip


def _back(value: Any) -> Any:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
