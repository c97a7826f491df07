"""What all programs share: settings from TOML and flags, key and roster files, one-line errors.

Unknown keys, wrong types and values out of range are errors that name the key. Every field is
also a flag: ``min_clients = 3`` is ``--min-clients 3``, and ``min_cohort`` in the table
``[policy]`` is ``--policy-min-cohort``.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import os
import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TextIO, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from secure_fedprompt.host import plugins
from secure_fedprompt.host.forms import formed
from secure_fedprompt.protocol import presets
from secure_fedprompt.protocol.errors import (
    ConfigError,
    SecureFedPromptError,
)
from secure_fedprompt.protocol.methods import METHODS, unknown_method
from secure_fedprompt.protocol.settings import choices, wording

S = TypeVar("S", bound=msgspec.Struct)
INTERRUPTED, GONE = 130, 141  # as shells count signals
LOCAL_MODEL, TENSORBOARD = "local-dir:", "tensorboard:"
SCHEMES = LOCAL_MODEL, TENSORBOARD  # before a path
STDOUT = "-"
_output: ContextVar[TextIO] = ContextVar("output", default=sys.stdout)


def load(cls: type[S], args: argparse.Namespace, beside: type | None = None) -> S:
    """A struct from ``args.config`` (TOML, optional) with the flags on top.

    Args:
        beside: a larger struct whose files are good as well: its other keys are left out.

    Raises:
        ConfigError: one line naming the file or flag, the key, the value and what is allowed.
    """
    config = getattr(args, "config", None)
    values, where = _read_toml(config)
    if beside is not None:
        others = set(get_type_hints(beside)) - set(get_type_hints(cls))
        values = {name: value for name, value in values.items() if name not in others}
    return build(cls, values, where, args)


def build(
    cls: type[S], values: dict[str, Any], where: str, args: argparse.Namespace | None = None
) -> S:
    """A struct from plain values, with the flags of ``args`` on top.

    Args:
        where: the values come from, for errors.

    Raises:
        ConfigError: as ``load``.
    """
    args = args or argparse.Namespace()
    config = getattr(args, "config", None)
    _merge(cls, values, args, where, "")
    if "preset" in get_type_hints(cls):
        values = presets.beneath(values)
    if config:
        _from_folder(cls, values, args, Path(config).parent)
    try:
        made = msgspec.convert(values, cls)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {wording(cls, values, error)}") from None
    for name in _methods_of(made):
        plugins.find(name)
    if (name := getattr(made, "method", "")) and name not in METHODS:
        raise ConfigError(f"{where}: {unknown_method(name)}")
    return made


def _methods_of(settings: Any) -> tuple[str, ...]:
    """Methods whose packages may be imported: a client's policy says which."""
    if hasattr(settings, "policy"):
        return tuple(settings.policy.methods)
    return (settings.method,) if getattr(settings, "method", "") else ()


def _read_toml(path: str | None) -> tuple[dict[str, Any], str]:
    if not path:
        return {}, "flags"
    try:
        return tomllib.loads(Path(path).read_text()), str(path)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None


def _merge(
    cls: type, values: dict[str, Any], args: argparse.Namespace, where: str, prefix: str
) -> None:
    hints = get_type_hints(cls, include_extras=True)
    if unknown := sorted(set(values) - set(hints)):
        close = difflib.get_close_matches(unknown[0], hints, n=1)
        advice = f"did you mean {close[0]!r}?" if close else "see --help for the known ones"
        for table, inner in hints.items():
            if _is_struct(inner) and unknown[0] in get_type_hints(inner):
                advice = f"it belongs into the table [{table}]"
        raise ConfigError(
            f"{where}: unknown key {prefix.replace('_', '.')}{unknown[0]!r}; {advice}"
        )
    for name, hint in hints.items():
        if _is_struct(hint):
            table = values.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{where}: {name} = {table!r}: must be a table [{name}]")
            _merge(hint, table, args, where, f"{name}_")
        elif (flag := getattr(args, prefix + name, None)) is not None:
            values[name] = flag
        allowed = choices(hint)
        if allowed and name in values and values[name] not in allowed:
            said = f"{prefix.replace('_', '.')}{name} = {values[name]!r}"
            raise ConfigError(f"{where}: {said}: must be one of {', '.join(allowed)}")


def _from_folder(cls: type, values: dict[str, Any], args: argparse.Namespace, folder: Path) -> None:
    """Relative paths of a configuration file, defaults included, belong to its folder: a program
    does the same wherever it is started. Those of flags belong to where it is started."""
    for field in msgspec.structs.fields(cls):
        kind = _path_kind(field.type)
        value = values.get(field.name, field.default)
        given = getattr(args, field.name, None) is not None
        if kind and not given and isinstance(value, str) and _is_path(kind, value, folder):
            scheme = next((s for s in SCHEMES if value.startswith(s)), "")
            values[field.name] = scheme + str(folder / value.removeprefix(scheme))


def _is_path(kind: str, value: str, folder: Path) -> bool:
    """Whether a value is a path, and not a name."""
    if kind == "log":
        return value not in ("", "json")
    if kind == "track":
        return value.startswith(TENSORBOARD)
    if kind == "model":
        return value.startswith(LOCAL_MODEL) or value.endswith(".safetensors")
    if kind == "data" and "/" not in value and not Path(value).suffix:
        return value != "generated" and (folder / value).exists()
    return bool(value)


def _path_kind(hint: Any) -> str:
    """What a setting's path is of, or nothing: see ``FilePath``."""
    for meta in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        if isinstance(meta, msgspec.Meta) and meta.extra:
            return str(meta.extra.get("path", ""))
    return ""


def _is_struct(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, msgspec.Struct)


def add_flags(
    parser: argparse.ArgumentParser, cls: type, prefix: str = "", skip: frozenset[str] = frozenset()
) -> None:
    """A flag per field, with the words of the "Attributes" section as help."""
    if not prefix and "config" not in skip:
        text = "TOML file with the fields below as keys"
        parser.add_argument("--config", metavar="FILE", help=text)
    texts = attribute_texts(cls)
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if name in skip:
            continue
        if _is_struct(hint):
            add_flags(parser, hint, f"{name}_")
            continue
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        default = next(f.default for f in msgspec.structs.fields(cls) if f.name == name)
        help_ = f"{texts.get(name, '')} (default: {default!r})".strip().replace("%", "%%")
        flag = f"--{(prefix + name).replace('_', '-')}"
        options: dict[str, Any] = {"dest": prefix + name, "default": None, "help": help_}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(kind) is tuple:
            options |= {"metavar": "A,B", "type": lambda text: [x for x in text.split(",") if x]}
            parser.add_argument(flag, **options)
        else:
            words = choices(hint)
            options["choices" if words else "metavar"] = words or name.upper()
            parser.add_argument(flag, type=str if words else kind, **options)


def attribute_texts(cls: type) -> dict[str, str]:
    """Help texts from the "Attributes" sections of a class and its bases.

    An entry is "a, b: text"; a line may hold several, and text may go on in deeper lines.
    """
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = (base.__doc__ or "").partition("Attributes:\n")[2]
        entries: list[str] = []
        for line in section.splitlines():
            indent = len(line) - len(line.lstrip())
            if indent == 8:
                entries.append(line.strip())
            elif entries and line.strip():
                entries[-1] += " " + line.strip()
        for entry in entries:
            heads, _, text = entry.partition(": ")
            for name in heads.split(", "):
                texts[name.strip()] = text
    return texts


def parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help ends in examples, with the flags that every command has."""
    made = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--json", metavar="PATH", help="write the result as JSON; - is standard output"
    )
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def write_json(path: str | None, form: str, result: Mapping[str, Any]) -> None:
    """Write a result where ``--json`` says; an infinite number is null, since JSON has none.

    Args:
        form: of ``forms.FORMS``.

    Raises:
        ConfigError: it cannot be written there.
    """
    text = as_json(form, result)
    if path == STDOUT:
        _output.get().write(text)
    elif path:
        try:
            Path(path).write_text(text)
        except OSError as error:
            raise ConfigError(f"--json {path}: cannot be written ({error.strerror})") from None


def as_json(form: str, result: Mapping[str, Any]) -> str:
    """A result as text, in its form."""
    return json.dumps(_finite(formed(form, result)), indent=1, default=str) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def guard(body: Callable[[], int], args: argparse.Namespace) -> int:
    """Run a command: expected failures are one line on stderr and an exit code.

    With ``--json -`` standard output is for the JSON; what people read goes to standard error.
    SIGTERM and SIGINT interrupt it alike, also where a shell started it with SIGINT ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
        signal.signal(signal.SIGINT, interrupt)
    for_json = getattr(args, "json", None) == STDOUT
    _output.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr) if for_json else contextlib.nullcontext():
            return body()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GONE
    except SecureFedPromptError as error:
        if args.debug:
            raise
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
