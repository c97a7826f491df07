"""The sum of a round without protection."""

from __future__ import annotations

import numpy as np

from secure_fedprompt.protocol.errors import FieldError
from secure_fedprompt.protocol.layout import Vector, total_size
from secure_fedprompt.protocol.plan import RoundPlan


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
