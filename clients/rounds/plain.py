"""A round without protection."""

from __future__ import annotations

from dataclasses import dataclass

from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds.base import Awaiting, Done, Step
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.layout import Vector
from secure_fedprompt.protocol.plan import RoundPlan


def begin(party: Party, plan: RoundPlan) -> Step:
    """Nothing is agreed before the upload."""
    return PlainAwaiting(party, plan), []


@dataclass(frozen=True, repr=False)
class PlainAwaiting(Awaiting):
    """No protection."""

    def _encode(self, vector: Vector) -> bytes:
        return vector.astype("<f8").tobytes()

    def _send(self, data: bytes) -> Step:
        plan = self.plan
        return Done(self.party, plan), [m.PlainUpload(plan.run, plan.round, data)]
