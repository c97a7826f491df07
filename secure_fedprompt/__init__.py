"""Federated prompt tuning of CLIP under secure aggregation.

Nothing is imported before it is used: the server must not load torch through this package.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Backbone": "secure_fedprompt.clients.backbone",
    "Federation": "secure_fedprompt.api.federation",
    "FedMGP": "secure_fedprompt.clients.methods.fedmgp",
    "FedOTP": "secure_fedprompt.clients.methods.fedotp",
    "History": "secure_fedprompt.api.history",
    "Identity": "secure_fedprompt.protocol.keys",
    "ImageSet": "secure_fedprompt.clients.data.sets",
    "Method": "secure_fedprompt.clients.methods.base",
    "MethodSettings": "secure_fedprompt.protocol.settings",
    "Part": "secure_fedprompt.clients.data.partitions",
    "Policy": "secure_fedprompt.protocol.policy",
    "Protection": "secure_fedprompt.api.protection",
    "PromptFL": "secure_fedprompt.clients.methods.promptfl",
    "Roster": "secure_fedprompt.protocol.roster",
    "RoundPlan": "secure_fedprompt.protocol.plan",
    "SecureFedPromptError": "secure_fedprompt.protocol.errors",
    "ServerSettings": "secure_fedprompt.server.settings",
    "run_round": "secure_fedprompt.memory",
    "Total": "secure_fedprompt.api.protection",
    "simulate": "secure_fedprompt.api.simulation",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
