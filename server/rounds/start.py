"""The round that a plan asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.server.rounds.base import Deadlines, Round
from secure_fedprompt.server.rounds.encrypted import EncryptedRound
from secure_fedprompt.server.rounds.masks import MaskedRound
from secure_fedprompt.server.rounds.plain import PlainRound

ROUNDS: dict[str, type[Round]] = {
    "masks": MaskedRound,
    "bfv": EncryptedRound,
    "ckks": EncryptedRound,
    "none": PlainRound,
}


def make_round(
    plan: RoundPlan,
    base: bytes,
    roster: Roster,
    deadlines: Deadlines,
    run_keys: Mapping[str, m.Ready],
    entropy: Entropy = os.urandom,
) -> Round:
    """The state machine for a plan's protection; ``run_keys`` from the clients' ``Ready``."""
    return ROUNDS[plan.protection](plan, base, roster, deadlines, run_keys, entropy)
