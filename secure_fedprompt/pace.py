"""When a client's uploads leave."""

from __future__ import annotations

import secrets
from collections import deque

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.plan import RoundPlan

UPLOADS = (m.MaskedUpload, m.CipherUpload, m.PlainUpload, m.KeyShares)


class Pace:
    """Holds uploads back: for ``upload_after``, and a failure for as long as some training took.

    How long training takes shows how many images there are, and a failure would show by its haste,
    or by always the same time: one of those that training took before is drawn.
    Time counts from the first plan of a learning round: no later attempt at it shortens a hold, and
    neither does a deadline. A failure before anything was trained is held by ``upload_after``.
    """

    def __init__(self, at_least: float = 0.0) -> None:
        """``at_least``: seconds that this client holds uploads back, whatever the terms say."""
        self._at_least, self._after = at_least, 0.0
        self._here: tuple[bytes, int] = (b"", 0)
        self._began, self._drawn, self._failed = 0.0, 0.0, False
        self._took = deque[float](maxlen=100)
        self._held: list[m.Message] = []

    def begin(self, plan: RoundPlan, upload_after: float, now: float) -> None:
        """A plan was taken up."""
        here = plan.run, plan.learning_round
        if here != self._here:
            self._here, self._began, self._failed = here, now, False
            self._drawn = secrets.choice(self._took) if self._took else 0.0
        self._after = max(self._at_least, upload_after)
        self._held = []  # what an aborted attempt was about to send

    def trained(self, plan: RoundPlan, now: float, *, failed: bool = False) -> None:
        """Training for a plan ended."""
        if (plan.run, plan.learning_round) != self._here:
            return
        self._failed = self._failed or failed
        if not failed:
            self._took.append(now - self._began)

    def due(self, replies: list[m.Message], now: float) -> list[m.Message]:
        """What may leave now, of these replies and of those that were held."""
        self._held += [reply for reply in replies if isinstance(reply, UPLOADS)]
        wait = max(self._after, self._drawn if self._failed else 0.0)
        free = [reply for reply in replies if not isinstance(reply, UPLOADS)]
        if now - self._began >= wait:
            free, self._held = free + self._held, []
        return free
