"""Who is there, and who keeps the record of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.plan import NO_KEY
from secure_fedprompt.server.planning import RunState
from secure_fedprompt.server.rounds.base import Round


class RunStore(Protocol):
    """The run store, as the state machine sees it."""

    def save(self, state: RunState) -> None: ...

    def round_over(self, round: Round, metrics: Mapping[str, float], state: RunState) -> None:
        """Keep what became of an attempt, and the state that follows, both or neither."""

    def event(self, kind: str, text: str) -> None: ...


@dataclass
class Client:
    """A member that is there.

    Attributes:
        commitment: to its nonce. seen, joined: when it was last heard of, and greeted.
        ready: its run key, once announced. told: the terms. key: digest of the cohort key it holds.
        informed: the last learning round whose start it can compute, from what it was sent.
        missed: a learning round went by without it. called: to greet again.
    """

    commitment: bytes
    seen: float
    joined: float
    welcomed: bool = False
    ready: m.Ready | None = None
    told: bool = False
    accepted: bool = False
    contests: bool = False
    informed: int = 0
    missed: bool = False
    called: bool = False
    key: bytes = NO_KEY
