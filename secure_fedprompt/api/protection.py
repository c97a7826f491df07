"""Your own protection, for ``simulate``: what a client does to its vector, and what sums them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds import start as client_start
from secure_fedprompt.clients.rounds.base import Done, Step
from secure_fedprompt.clients.rounds.plain import PlainAwaiting
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.layout import Vector
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.protections import PROTECTIONS
from secure_fedprompt.protocol.protections import Protection as Facts
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.server.rounds import start as server_start
from secure_fedprompt.server.rounds.plain import PlainRound


class Total(ABC):
    """A sum that a server makes of protected uploads."""

    @abstractmethod
    def add(self, data: bytes | memoryview) -> None:
        """Take one client's upload.

        Raises:
            FieldError: it is none; the client is turned away, with this as the reason.
        """

    @abstractmethod
    def result(self) -> Vector:
        """The sum, float64, as long as ``protect`` was given."""


class Protection(ABC):
    """A protection of one message each: subclass it, and give ``simulate`` an instance.

    It promises nothing that the package could check, so plans and reports call it unprotected;
    everything else, dropouts, bytes, attacks through ``on_frame``, is measured as for ours.
    Protections of several messages are state machines: docs/architecture.md.

    Attributes:
        name: that no other protection has. title: what it does, in words.
    """

    name: ClassVar[str]
    title: ClassVar[str] = "your own"

    @abstractmethod
    def protect(self, plan: RoundPlan, vector: Vector, entropy: Entropy) -> bytes:
        """What a client uploads.

        Args:
            vector: its weighted update, clipped, and its counters, float64, in the order of
                ``plan.layout``.
            entropy: random bytes, by their number.
        """

    @abstractmethod
    def total(self, plan: RoundPlan) -> Total:
        """An empty sum."""


@contextlib.contextmanager
def installed(own: Protection) -> Iterator[str]:
    """A protection in the tables, by its name, for as long as it runs.

    Raises:
        ConfigError: it has no name of its own.
    """
    if not (name := getattr(own, "name", "")) or not hasattr(own, "protect"):
        raise ConfigError(f"protection = {own!r}: a name, or a Protection with a name")
    if name in PROTECTIONS:
        raise ConfigError(f"protection.name = {name!r}: the package has a protection of this name")

    @dataclass(frozen=True, repr=False)
    class OwnAwaiting(PlainAwaiting):
        def _encode(self, vector: Vector) -> bytes:
            return own.protect(self.plan, vector, self.party.entropy)

        def _send(self, data: bytes) -> Step:
            return Done(self.party, self.plan), [
                m.PlainUpload(self.plan.run, self.plan.round, data)
            ]

    class OwnRound(PlainRound):
        def _prepare(self) -> None:
            self._sum = own.total(self.plan)  # type: ignore[assignment]

    def begin(party: Party, plan: RoundPlan) -> Step:
        return OwnAwaiting(party, plan), []

    PROTECTIONS[name] = Facts(name, own.title, hides=False, server="what your own protection shows")
    client_start.BEGIN[name], server_start.ROUNDS[name] = begin, OwnRound
    try:
        yield name
    finally:
        del PROTECTIONS[name], client_start.BEGIN[name], server_start.ROUNDS[name]
