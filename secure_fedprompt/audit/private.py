"""Looking for what only a client knows in the frames: its own record against the wire.

A client writes the record on request (``private_record = true``): class names, how many images it
has, and for each round the update, the local prompt and the counters that went into its upload.
Values are sought as float64, float32, float16 and bfloat16 in both byte orders at every bit
position, eight bytes at a time; names as UTF-8 and UTF-16; counts as numbers in free text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.audit.fields import leaves
from secure_fedprompt.audit.findings import Finding, failed, noted
from secure_fedprompt.audit.log import Entry, Log
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import ConfigError

FORMAT = "secure-fedprompt/private/1"
WINDOW = 8
SHORTEST_NAME = 4
_CHUNK = 1 << 20  # bytes of a frame that are searched at a time
_DISTINCT = 5  # bytes of a window, or zeros and ones would be found everywhere
_HALVES = 2  # hits that count for 16-bit floats, whose windows are likelier to coincide
_LITTLE: Literal["<"] = "<"
_BIG: Literal[">"] = ">"
Bytes = NDArray[np.uint8]
Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Private:
    """A client's private record.

    Attributes:
        name: of the client; classes: names.
        counts: by what is counted.
        arrays: (what, float64 values) of all rounds.
    """

    name: str
    classes: tuple[str, ...]
    counts: dict[str, int]
    arrays: tuple[tuple[str, NDArray[np.float64]], ...]

    @classmethod
    def read(cls, path: Path) -> Private:
        """Raises ConfigError if it is no such record."""
        try:
            head, *rounds = [json.loads(line) for line in path.read_text().splitlines()]
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']!r}, {FORMAT!r} expected")
            arrays = []
            for row in rounds:
                for what, values in row["values"].items():
                    array = np.array(values, np.float64).reshape(-1)
                    arrays.append((f"{what} of round {row['round']}", array))
            counts = {str(k): int(v) for k, v in head["counts"].items()}
            return cls(str(head["name"]), tuple(head["classes"]), counts, tuple(arrays))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--secrets {path}: no private record ({error}); a client with private_record = "
                "true writes one to its state_dir"
            ) from None


def write_head(path: Path, name: str, classes: tuple[str, ...], counts: dict[str, int]) -> None:
    """Begin a record; only its owner can read the file."""
    path.touch(mode=0o600)
    head = {"format": FORMAT, "name": name, "classes": classes, "counts": counts}
    path.write_text(json.dumps(head) + "\n")


def write_round(path: Path, number: int, values: dict[str, Any]) -> None:
    """Add what went into one upload, by name."""
    plain = {k: np.asarray(v, np.float64).reshape(-1).tolist() for k, v in values.items()}
    with path.open("a") as file:
        file.write(json.dumps({"round": number, "values": plain}) + "\n")


# -- searching -------------------------------------------------------------------------------------


def check_private(log: Log, private: Private) -> Iterator[Finding]:
    """Every frame from or to the client against its record."""
    needles = _needles(private)
    looked = 0
    for entry, message in log.messages():
        frame = log.frame(entry)
        if private.name not in (log.name, entry.peer) or frame is None:
            continue
        looked += len(frame)
        where = f"{log.name}: record {entry.n}, {entry.kind} in round {entry.round}"
        for what in _found(frame, needles):
            yield failed("private values", where, f"{what} is in the frame")
        for text in _words(frame, private.classes):
            yield failed("private values", where, f"class name {text!r} is in the frame")
        if (entry.way == "out") == (log.name == private.name):  # of the client
            yield from _counts(where, entry, message, private, log)
    text = f"{looked:,} bytes searched for {sum(len(k) for _, k, _ in needles):,} windows of values"
    yield noted("private values", log.name, text)


def _needles(private: Private) -> list[tuple[str, Keys, int]]:
    """Windows of values in every form, sorted; with how many hits count."""
    forms: dict[str, tuple[int, list[Bytes]]] = {
        form: (hits, []) for form, hits in
        (("float64", 1), ("float32", 1), ("float16", _HALVES), ("bfloat16", _HALVES))
    }  # fmt: skip
    for _, values in private.arrays:
        for form in forms:
            forms[form][1].extend(_encodings(values, form))
    found = []
    for form, (hits, windows) in forms.items():
        rows = np.concatenate(windows) if windows else np.zeros((0, WINDOW), np.uint8)
        distinct = 1 + (np.diff(np.sort(rows, axis=1), axis=1) != 0).sum(axis=1)
        rows = rows[distinct >= _DISTINCT]
        keys = np.unique(np.ascontiguousarray(rows).view("<u8").reshape(-1))
        found.append((f"a private value as {form}", keys, hits))
    return found


def _encodings(values: NDArray[np.float64], form: str) -> list[Bytes]:
    """Both byte orders, every window of neighbouring values."""
    result = []
    with np.errstate(over="ignore"):
        match form:
            case "bfloat16":
                words = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            case _:
                words = values.astype(form)
    per = WINDOW // words.itemsize
    for swapped in (words.astype(words.dtype.newbyteorder(order)) for order in (_LITTLE, _BIG)):
        if len(words) >= per:
            windows = np.lib.stride_tricks.sliding_window_view(swapped, per)
            flat = np.ascontiguousarray(windows).view(np.uint8)
            result.append(flat.reshape(-1, WINDOW))
    return result


def _shifted(data: Bytes) -> Iterator[Bytes]:
    """The bytes at each of eight bit positions, most and least significant bit first."""
    yield data
    here, following = data[:-1].astype(np.uint16), data[1:].astype(np.uint16)
    for k in range(1, 8):
        yield (here << k | following >> (8 - k)).astype(np.uint8)
        yield (here >> k | following << (8 - k)).astype(np.uint8)


def _found(frame: bytes, needles: list[tuple[str, Keys, int]]) -> list[str]:
    hits: dict[str, set[int]] = {what: set() for what, _, _ in needles}
    for start in range(0, len(frame) - WINDOW, _CHUNK):
        part = frame[start : start + _CHUNK + WINDOW + 1]  # windows at every bit reach so far
        for data in _shifted(np.frombuffer(part, np.uint8)):
            if len(data) < WINDOW:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(data, WINDOW)
            words = np.ascontiguousarray(windows).view("<u8").reshape(-1)
            for what, keys, _ in needles:
                if len(keys):
                    place = np.minimum(np.searchsorted(keys, words), len(keys) - 1)
                    hits[what] |= set(words[keys[place] == words].tolist())
    return [what for what, _, least in needles if len(hits[what]) >= least]


def _words(frame: bytes, names: tuple[str, ...]) -> list[str]:
    low = frame.lower()
    return [
        name for name in names if len(name) >= SHORTEST_NAME
        and (name.lower().encode() in low or name.lower().encode("utf-16-le") in low)
    ]  # fmt: skip


def _counts(
    where: str, entry: Entry, message: m.Message, private: Private, log: Log
) -> Iterator[Finding]:
    """Counts in text, and numbers that are not what the field is for."""
    for path, value in leaves(message):
        if isinstance(value, str) and value not in log.members[""]:
            numbers = set(re.findall(r"\d+", value))
            for what, count in private.counts.items():
                if str(count) in numbers:
                    text = f"{path} says {count}, as many as this client has {what}"
                    yield failed("private values", where, text)
