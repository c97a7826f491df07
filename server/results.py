"""What follows from a round that is done: the next global prompt, and what is told of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import averaged, metrics_of
from secure_fedprompt.protocol.codec import decode_fields, encode_fields
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.terms import RunTerms
from secure_fedprompt.server.planning import RunState
from secure_fedprompt.server.rounds.base import Round
from secure_fedprompt.server.rounds.encrypted import EncryptedRound
from secure_fedprompt.server.rounds.masks import MaskedRound
from secure_fedprompt.server.serve import Outbox


@dataclass(frozen=True)
class LastSum:
    """The sum of the learning round that was done last.

    Attributes:
        members: of the sum.
    """

    members: m.Names
    message: m.OpenedSum


def survivors(done: Round) -> tuple[str, ...]:
    """Whose updates are in the sum."""
    return tuple(name for name in done.plan.cohort if name not in done.dropped)


def apply(state: RunState, done: Round) -> dict[str, float]:
    """Move a run on, and return the aggregate metrics as far as the server knows them."""
    state.learning_round, state.attempt, state.pending = state.learning_round + 1, 0, b""
    if isinstance(done, EncryptedRound):  # all that is known of the sum
        state.sealed = done.sealed or state.sealed
        return {"contributors": len(survivors(done))}
    assert done.result is not None
    assert state.prompt is not None
    if done.plan.training:
        state.prompt = averaged(state.prompt, done.plan.layout, done.result)
    if isinstance(done, MaskedRound) and done.opened is not None:
        state.summed = encode_fields(LastSum(survivors(done), done.opened))
    return metrics_of(done.result)


def check_vouchers(state: RunState, grown: RunTerms, names: Collection[str]) -> None:
    """Refuse a roster that has grown so much that too few know the global prompt from a sum that
    they checked: newcomers believe c + 1 of them.

    Args:
        grown: terms of the new roster; names: of its clients.

    Raises:
        ConfigError
    """
    if not state.summed:
        return
    members = set(decode_fields(LastSum, state.summed).members) & set(names)
    needed = 1 + grown.facts.tolerated(bool(grown.regular), grown.clients, grown.quorum)
    if len(members) < needed:
        raise ConfigError(
            f"with {grown.clients} clients on the roster {needed} must vouch for the global prompt "
            f"to those who are new, and {len(members)} can: add fewer clients at a time, with a "
            "learning round in between"
        )


def remind(state: RunState, name: str) -> Outbox:
    """The last sum, to a member of it that has a new connection: it may have missed it."""
    last = decode_fields(LastSum, state.summed) if state.summed else None
    return [(name, last.message)] if last is not None and name in last.members else []
