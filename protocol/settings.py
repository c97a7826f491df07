"""Settings: one frozen struct per program, read from TOML and flags alike.

Unknown keys, wrong types and values out of range are errors that name the key. Every field is
also a flag: ``min_clients = 3`` is ``--min-clients 3``.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from secure_fedprompt.protocol.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)
Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]


class MethodSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every client must train alike. The server sends it; its digest is in every plan.

    Attributes:
        method: name of the federated prompt method.
        n_ctx: context length in tokens.
        init: words that start the context ("a photo of a"), or empty for N(0, 0.02).
        position: of the class name: "end", "middle" or "front" of the context.
        lr, momentum, weight_decay, batch_size, epochs: local SGD of one round.
        seed: of the random initial context.
    """

    method: str = "promptfl"
    n_ctx: Positive = 16
    init: str = ""
    position: str = "end"
    lr: Rate = 1e-3
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 5e-4
    batch_size: Positive = 32
    epochs: Positive = 1
    seed: Count = 0

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return msgspec.json.encode(self, order="deterministic")

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> MethodSettings:
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise ConfigError(f"the server's settings are not understood: {error}") from None


class ServerSettings(MethodSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The server's file.

    Attributes:
        key, roster: own key file and the federation's public roster file.
        bind: ZeroMQ address to listen on.
        run_dir: folder of this run; one that holds an unfinished run is resumed.
        clients: clients to wait for (0: all on the roster); min_clients: fewest to go on with.
        rounds: learning rounds. max_attempts: tries of a round before the run fails.
        protection: "masks", or "none" for benchmarks.
        graph: "complete", or "regular" (k neighbours, honest-but-curious server) for large cohorts.
        threshold: t; 0 means floor(2n/3) + 1.
        max_dropout, max_corruption: shares of clients that a regular graph must tolerate.
        ring_bits, clip, weights, max_weight: fixed point; "samples" or "uniform" weights.
        max_seen: largest number of test images a client counts. metrics: count at all.
        gather_seconds, stage_seconds, training_seconds: deadlines.
        alive_seconds: silence after which a client counts as gone.
    """

    key: str = "server.pem"
    roster: str = "roster.toml"
    bind: str = "tcp://127.0.0.1:5570"
    run_dir: str = ""
    clients: Count = 0
    min_clients: Positive = 3
    rounds: Positive = 10
    max_attempts: Positive = 3
    protection: str = "masks"
    graph: str = "complete"
    threshold: Count = 0
    max_dropout: NonNegative = 0.1
    max_corruption: NonNegative = 0.1
    ring_bits: Annotated[int, Meta(ge=8, le=32)] = 32
    clip: Rate = 1.0
    weights: str = "samples"
    max_weight: Positive = 4096
    max_seen: Positive = 65536
    metrics: bool = True
    gather_seconds: Seconds = 300.0
    stage_seconds: Seconds = 30.0
    training_seconds: Seconds = 900.0
    alive_seconds: Seconds = 15.0

    def method_settings(self) -> MethodSettings:
        names = MethodSettings.__struct_fields__
        return MethodSettings(**{name: getattr(self, name) for name in names})


CHOICES = {
    "protection": ("masks", "none"),
    "graph": ("complete", "regular"),
    "weights": ("samples", "uniform"),
    "position": ("end", "middle", "front"),
    "partition": ("iid", "pathological", "dirichlet", "domain"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("fp32", "bf16", "fp16"),
}


def load(cls: type[S], args: argparse.Namespace) -> S:
    """A struct from ``args.config`` (TOML, optional) with the flags on top.

    Relative paths in the file are relative to the current folder, like those of flags.

    Raises:
        ConfigError: one line naming the file or flag, the key, the value and what is allowed.
    """
    values: dict[str, Any] = {}
    where = "flags"
    if path := getattr(args, "config", None):
        where = str(path)
        try:
            values = tomllib.loads(Path(path).read_text())
        except FileNotFoundError:
            raise ConfigError(f"config file {path} does not exist") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"config file {path} cannot be read: {error}") from None
    known = set(cls.__struct_fields__)
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; {_suggest(unknown[0], known)}")
    for name in known:
        if (value := getattr(args, name, None)) is not None:
            values[name] = value
    for name, allowed in CHOICES.items():
        if name in known and name in values and values[name] not in allowed:
            raise ConfigError(f"{name} = {values[name]!r}: must be one of {', '.join(allowed)}")
    try:
        return msgspec.convert(values, cls)
    except msgspec.ValidationError as error:
        text = str(error).replace("$.", "")
        field = text.rpartition("`")[0].rpartition("`")[2]
        shown = f" (got {values[field]!r})" if field in values else ""
        raise ConfigError(f"{where}: {text}{shown}") from None


def _suggest(key: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "see --help for the known ones"


def add_flags(parser: argparse.ArgumentParser, cls: type[msgspec.Struct]) -> None:
    """A flag per field, with the docstring's words as help."""
    texts = _attribute_texts(cls)
    parser.add_argument("--config", metavar="FILE", help="TOML file with the fields below as keys")
    hints = get_type_hints(cls, include_extras=True)
    for field in msgspec.structs.fields(cls):
        kind = hints[field.name]
        while get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        flag = f"--{field.name.replace('_', '-')}"
        shown = "" if field.required else f" (default: {field.default!r})"
        text = (texts.get(field.name, "") + shown).strip().replace("%", "%%")
        if kind is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, dest=field.name, action=action, default=None, help=text)
        elif kind in (int, float, str):
            choices = CHOICES.get(field.name)
            parser.add_argument(
                flag, dest=field.name, type=kind, default=None, help=text,
                metavar=None if choices else field.name.upper(), choices=choices,
            )  # fmt: skip


def _attribute_texts(cls: type) -> dict[str, str]:
    """Help texts from the "Attributes" sections of a class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__doc__ is None or "Attributes:" not in base.__doc__:
            continue
        current: list[str] = []
        for line in base.__doc__.partition("Attributes:")[2].splitlines():
            words = line.strip()
            head, colon, rest = words.partition(": ")
            if line.startswith(" " * 8) and not line.startswith(" " * 9) and colon:
                current = [name.strip() for name in head.split(",")]
                for name in current:
                    texts[name] = rest
            else:
                for name in current:
                    texts[name] = f"{texts[name]} {words}".strip()
    return texts
