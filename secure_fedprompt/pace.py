"""When a client's uploads leave."""

from __future__ import annotations

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.terms import RunTerms

UPLOADS = (m.MaskedUpload, m.CipherUpload, m.PlainUpload, m.KeyShares)


class Pace:
    """When uploads leave: not before ``upload_after``, and not sooner for having failed.

    How long training takes shows how many images there are, and a failure would show by its haste.
    """

    def __init__(self) -> None:
        self._round, self._began, self._after, self._longest = 0, 0.0, 0.0, 0.0
        self._limit, self._failed = 0.0, False
        self._held: list[m.Message] = []

    def begin(self, round_: int, terms: RunTerms | None, now: float) -> None:
        """A plan came."""
        self._round, self._began, self._failed, self._held = round_, now, False, []
        if terms is not None:
            self._after, self._limit = terms.upload_after, 0.9 * terms.training_seconds

    def trained(self, round_: int, now: float, *, failed: bool = False) -> None:
        """Training ended; the longest so far is what a failure waits for."""
        if round_ == self._round and not self._failed:
            self._failed = failed
            self._longest = max(self._longest, 0.0 if failed else now - self._began)

    def due(self, replies: list[m.Message], now: float) -> list[m.Message]:
        """What may leave now, of these replies and of earlier ones."""
        self._held += [reply for reply in replies if isinstance(reply, UPLOADS)]
        wait = min(max(self._after, self._longest if self._failed else 0.0), self._limit)
        free = [reply for reply in replies if not isinstance(reply, UPLOADS)]
        if now - self._began >= wait:
            free, self._held = free + self._held, []
        return free
