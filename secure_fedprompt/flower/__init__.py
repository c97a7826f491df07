"""Secure aggregation for apps of Flower: two lines of somebody else's federation change.

On the server ``grid = SecureGrid(grid, rounds=...)``, on the clients ``ClientApp(mods=[secure])``.
Needs ``pip install 'secure-fedprompt[flower]'``; docs/flower.md says who learns what.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "SecureGrid": "secure_fedprompt.flower.grid",
    "secure": "secure_fedprompt.flower.mod",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flwr":
            raise
        text = f"{name} needs Flower: pip install 'secure-fedprompt[flower]'"
        raise ImportError(text) from None
