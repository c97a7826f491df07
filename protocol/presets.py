"""Settings as methods were published with, by name: what ``preset`` puts under the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FEW_SHOT: dict[str, Any] = {
    "lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "rounds": 10, "epochs": 5, "batch_size": 32,
    "n_ctx": 16, "init": "", "position": "end", "schedule": "constant", "weights": "samples",
}  # fmt: skip
_PROMPTFL = {**_FEW_SHOT, "schedule": "cosine"}  # CoOp's configurations, which it builds on
_CHANGES: dict[str, dict[str, Any]] = {
    "promptfl": _PROMPTFL,
    "coop": _PROMPTFL,
    "promptfl-ft": _PROMPTFL,
    "fedprox": {**_PROMPTFL, "compare": {"prox_mu": 0.5}},
    "fedper": _PROMPTFL,
    "fedotp": {
        **_FEW_SHOT, "batch_size": 16,  # its shots
        "fedotp": {"transport": "unbalanced", "eps": 0.01, "gamma": 0.8, "iterations": 100},
    },
    "fedmgp": {
        **_FEW_SHOT, "batch_size": 8, "epochs": 2, "weights": "uniform",
        "fedmgp": {"groups": 5, "slots": 2, "length": 2, "diversity_weight": 1.0, "tau": 1.0},
    },
    "promptfolio": {**_FEW_SHOT, "compare": {"theta": 0.4}},
    "fedpgp": {**_FEW_SHOT, "compare": {"rank": 4, "contrast": 1.0}},
    "dpfpl": {**_FEW_SHOT, "rounds": 100, "epochs": 1, "compare": {"rank": 8}},
    "fedtpg": {
        **_FEW_SHOT, "lr": 3e-3, "weight_decay": 1e-5, "schedule": "cosine", "n_ctx": 4,
        "compare": {"queries": 4},
    },
}  # fmt: skip


def published(method: str) -> dict[str, Any]:
    """Of one method; empty where nothing of the kind was published."""
    return _CHANGES.get(method, {})


def beneath(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with what ``preset`` asks for in the place of defaults: what is given stays."""
    if values.get("preset") != "published":
        return dict(values)
    merged = dict(values)
    for name, value in published(str(values.get("method", "promptfl"))).items():
        if isinstance(value, dict):
            merged[name] = {**value, **merged.get(name, {})}
        else:
            merged.setdefault(name, value)
    return merged
