"""The server in a round without protection: collecting -> done | aborted."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import FieldError, PlanError
from secure_fedprompt.protocol.layout import Vector, total_size
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.server.opening import Pending
from secure_fedprompt.server.rounds.base import Round, Stage
from secure_fedprompt.server.serve import Outbox


class PlainSum:
    """Sum of unprotected float64 uploads, for protection "none"."""

    def __init__(self, plan: RoundPlan) -> None:
        self.total = np.zeros(total_size(plan.layout), np.float64)

    def add(self, vector: bytes | memoryview) -> None:
        if len(vector) != 8 * len(self.total):
            raise FieldError(f"upload of {len(vector)} bytes, {8 * len(self.total)} expected")
        values = np.frombuffer(vector, "<f8")
        if not np.isfinite(values).all():
            raise FieldError("upload holds NaN or infinity")
        self.total += values

    def result(self) -> Vector:
        return self.total


class PlainRound(Round):
    """Every client uploads its update as it is."""

    uploads = m.PlainUpload
    awaited: ClassVar[dict[Stage, type[m.Message]]] = {}
    openings: ClassVar[frozenset[Stage]] = frozenset()
    asking: ClassVar[frozenset[Stage]] = frozenset()

    def _prepare(self) -> None:
        self._sum = PlainSum(self.plan)

    def start(self, now: float) -> Outbox:
        self._collect(self.plan.cohort, now)
        return self._plans()

    def _check(self, sender: str, message: m.Message) -> None:
        assert isinstance(message, m.PlainUpload)
        self._sum.add(message.vector)

    def _close_stage(self, names: tuple[str, ...], now: float) -> Outbox:
        return self._finish(self._sum.result(), None)

    def reopen(self, pending: Pending, now: float) -> None:
        raise PlanError("a sum without protection is not opened")

    def _request(self, name: str) -> Outbox:
        raise PlanError("a sum without protection is not opened")
