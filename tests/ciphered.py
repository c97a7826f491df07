"""Encrypted rounds, and what tests change in them."""

from __future__ import annotations

from typing import Any

from rounds import (
    later,
    make_encrypted_plan,
    make_parties,
    make_updates,
)

from secure_fedprompt.clients.party import Party
from secure_fedprompt.memory import run_round
from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.server.rounds.encrypted import EncryptedRound

SCHEMES = homomorphic.SCHEMES


BIG = (TensorSpec("ctx", (40, 60)),)


def keyed(
    count: int, protection: str = "bfv", **changes: Any
) -> tuple[RoundPlan, dict[str, Party]]:
    """A plan of a later round, and clients that hold the key."""
    first = make_encrypted_plan(count, protection, **changes)
    parties = make_parties(count)
    outcome = run_round(first, parties, make_updates(first))
    assert isinstance(outcome.round, EncryptedRound)
    return later(first, key=outcome.round.key, grants=()), parties
