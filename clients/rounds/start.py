"""The beginning of a round: a plan is checked, and its protection taken up."""

from __future__ import annotations

from collections.abc import Callable

from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds import encrypted, masks, plain
from secure_fedprompt.clients.rounds.base import Step
from secure_fedprompt.clients.rounds.selecting import check_helper
from secure_fedprompt.protocol.errors import (
    RosterMismatchError,
    UnexpectedMessageError,
)
from secure_fedprompt.protocol.plan import RoundPlan

BEGIN: dict[str, Callable[[Party, RoundPlan], Step]] = {
    "masks": masks.begin,
    "bfv": encrypted.begin,
    "ckks": encrypted.begin,
    "none": plain.begin,
}


def check(party: Party, plan: RoundPlan) -> None:
    """Hold a plan against itself, the roster and the policy.

    Raises:
        PlanError, PolicyError, RosterMismatchError: the plan is refused.
    """
    plan.check()
    if plan.roster_digest != party.roster.digest:
        raise RosterMismatchError(
            f"server's roster {plan.roster_digest.hex()[:16]} is not ours "
            f"{party.roster.digest.hex()[:16]}: copy the same roster file to every machine"
        )
    for name in plan.names - party.roster.clients:
        party.roster.identity_of(name)  # which says what it is
    if party.name not in plan.names:
        raise UnexpectedMessageError(f"plan's cohort does not contain {party.name!r}")
    party.policy.check_plan(plan, party.roster_clients)
    if plan.selecting:
        check_helper(party, plan)


def start(party: Party, plan: RoundPlan) -> Step:
    """Check a plan, also against the journal, and begin.

    Raises:
        PlanError, PolicyError, RosterMismatchError, ReplayError: the plan is refused.
    """
    check(party, plan)
    return begin(party, plan)


def begin(party: Party, plan: RoundPlan) -> Step:
    """Begin with a plan that was checked.

    Raises:
        ReplayError: the journal refuses it.
    """
    party.journal.begin_round(plan)
    return BEGIN[plan.protection](party, plan)
