"""A run that begins from a prompt which its clients hold, from a run before or from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from secure_fedprompt.clients.methods.base import Method
from secure_fedprompt.protocol.averaging import prompt_bytes
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.expand import Purpose, digest

_PRIVATE = "private."


def begin_from(method: Method, start: str, places: Iterable[Path]) -> None:
    """Have a method begin from a prompt, with the private part that lies beside it, if any.

    Args:
        start: its digest in hex, as in the run's settings.
        places: files, and folders of clients and servers; the first that fits is taken.

    Raises:
        ConfigError: none is this prompt.
    """
    looked: list[str] = []
    for place in places:
        for path in _files(place):
            looked.append(str(path))
            tensors = _tensors(path)
            if tensors is None or not _fits(method, tensors, start):
                continue
            method.load(tensors)
            own = {
                name.removeprefix(_PRIVATE): values
                for name, values in tensors.items()
                if name.startswith(_PRIVATE)
            }
            if own and own.keys() == method.private().keys():
                method.restore(own)
            return
    raise ConfigError(
        f"start = {start!r}: the run begins from a prompt that is none of "
        f"{', '.join(looked) or 'ours (there is no prompt file here)'}; name its file with "
        "--start-prompt"
    )


def _files(place: Path) -> list[Path]:
    """A file, or the prompts in a client's or a server's folder, the newest first."""
    if not place.is_dir():
        return [place]
    found = [*place.glob("prompt-*.safetensors"), *place.glob("prompts/global-*.safetensors")]
    return sorted(found, reverse=True)


def _tensors(path: Path) -> dict[str, NDArray[np.float32]] | None:
    try:
        return {name: np.asarray(v, np.float32) for name, v in load_file(path).items()}
    except (OSError, SafetensorError):
        return None


def _fits(method: Method, tensors: dict[str, NDArray[np.float32]], start: str) -> bool:
    parts = [tensors.get(spec.name) for spec in method.uploaded()]
    shapes = [tuple(spec.shape) for spec in method.uploaded()]
    if any(p is None or p.shape != shape for p, shape in zip(parts, shapes, strict=True)):
        return False
    flat = np.concatenate([np.asarray(part).reshape(-1) for part in parts])
    return digest(Purpose.BASE, prompt_bytes(flat)).hex() == start
