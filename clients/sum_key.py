"""The sum key: what clients under ``masks`` share, to check the sums that the server opens.

Made by one client, sealed to each of the others, never seen by the server. Whoever holds it and
colludes with the server could make any sum pass, and learns nothing of an update by it. It outlives
a restart, in the client's own folder: the sum that it checks may come after one.
"""

from __future__ import annotations

import hmac

from secure_fedprompt.protocol.errors import KeyMismatchError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.layout import total_size
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.protocol.sum_tag import KEY, TagKey


class SumKey:
    """K of docs/sum-tags.md.

    Attributes:
        digest: what adverts, plans and grants name it by.
    """

    public = b""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.digest = digest(Purpose.SUM_KEY, secret)
        self._last: tuple[bytes, TagKey] | None = None  # of a plan, which tags and checks

    def __repr__(self) -> str:
        return "SumKey(<private>)"

    @classmethod
    def make(cls, entropy: Entropy) -> SumKey:
        """A fresh key."""
        return cls(entropy(KEY))

    @classmethod
    def from_bytes(cls, data: bytes, expected: bytes) -> SumKey:
        """The key in a grant.

        Raises:
            KeyMismatchError: it is not the one that its maker signed for.
        """
        key = cls(data)
        if len(data) != KEY or not hmac.compare_digest(key.digest, expected):
            raise KeyMismatchError("granted key is not the one that its maker announced")
        return key

    def to_bytes(self) -> bytes:
        """Secret: only ever sealed, or written for its owner alone."""
        return self._secret

    def tags(self, plan: RoundPlan) -> TagKey:
        """What tags uploads under a plan, and checks their sums."""
        if self._last is None or self._last[0] != plan.digest:
            size = total_size(plan.layout)
            self._last = plan.digest, TagKey.of(self._secret, plan.digest, size, plan.cohort)
        return self._last[1]
