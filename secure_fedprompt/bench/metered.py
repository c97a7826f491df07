"""A round in one process and thread, with every call of a state machine charged to its owner.

Keys, signatures and frames, encoding and decoding included, are those of the real programs.
Sockets, training and the disk are not in it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeVar

from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds.base import Awaiting, Opening, State
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt, averaged, prompt_bytes
from secure_fedprompt.protocol.keys import Identity, Member
from secure_fedprompt.protocol.layout import Values, Vector
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.server.rounds.base import Round, Stage

T = TypeVar("T")
POLICY = Policy(protections=("masks", "bfv", "ckks"), graphs=("complete", "regular"), colluders=0)
Keys = tuple[dict[str, Identity], Roster]
Passed = Callable[[str, str, bytes], None]  # sees sender, recipient and frame


def federation(n: int) -> Keys:
    identities = {f"c{i:04d}": Identity.generate() for i in range(n)}
    members = [Member.of(key, name, "client") for name, key in identities.items()]
    return identities, Roster.of(tuple(members))


def parties_of(keys: Keys, entropy: Entropy = os.urandom) -> dict[str, Party]:
    identities, roster = keys
    return {
        name: Party(name, key, roster, POLICY, MemoryJournal(), entropy)
        for name, key in identities.items()
    }


class Meter:
    """CPU seconds by owner and kind of work, and bytes by client; the server is ""."""

    def __init__(self) -> None:
        self.cpu: dict[str, dict[str, float]] = {}
        self.up: dict[str, int] = {}
        self.down: dict[str, int] = {}
        self.opened, self.sum = 0, dict[str, Vector]()  # by how many clients, and what it is

    def charge(self, who: str, kind: str, work: Callable[[], T]) -> T:
        begin = time.process_time()
        result = work()
        kinds = self.cpu.setdefault(who, {})
        kinds[kind] = kinds.get(kind, 0.0) + time.process_time() - begin
        return result

    def total(self, who: str, kinds: tuple[str, ...] = ()) -> float:
        """Seconds of one owner, for some kinds of work or all."""
        return sum(s for kind, s in self.cpu.get(who, {}).items() if not kinds or kind in kinds)


class Crowd:
    """Clients of one process, and what each costs.

    Args:
        values, weight: what every client uploads.
        gone: clients that vanish before their upload.
        prompt: from which each computes the next one, if it is given.
    """

    def __init__(
        self, parties: Mapping[str, Party], values: Values, weight: float, gone: frozenset[str],
        prompt: Prompt | None,
    ) -> None:  # fmt: skip
        self.parties, self.gone, self.prompt = parties, gone, prompt
        self.values, self.weight = values, weight
        self.meter, self.states = Meter(), dict[str, State]()
        self._last: tuple[bytes, m.Message] = b"", m.Alive()

    def take(self, name: str, frame: bytes) -> list[bytes]:
        """A frame to one of them; its answers. Work is charged by the kind of the frame that caused
        it, the upload as "upload"."""
        meter, kind = self.meter, m.CATALOGUE.types[frame[1]].__name__
        meter.down[name] = meter.down.get(name, 0) + len(frame)
        if kind == "RoundEnd":
            return []
        out = meter.charge(name, kind, lambda: self._on(name, frame))
        if isinstance(state := self.states[name], Awaiting) and name not in self.gone:
            out += meter.charge(name, "upload", lambda: self._upload(name, state))
        meter.up[name] = meter.up.get(name, 0) + sum(map(len, out))
        return out

    def _on(self, name: str, frame: bytes) -> list[bytes]:
        message = self._decoded(frame)
        if isinstance(message, m.Plan):
            self.states[name], replies = start(self.parties[name], message.plan)
        else:
            self.states[name], replies = self.states[name].on(message)
        state = self.states[name]
        if isinstance(state, Opening):
            self.meter.opened, self.meter.sum = self.meter.opened + 1, state.total
            following = b"prompt"
            if self.prompt is not None:
                following = prompt_bytes(averaged(self.prompt, state.plan.layout, state.total))
            self.states[name], replies = state.report(following)
        return [m.CATALOGUE.encode(reply) for reply in replies]

    def _decoded(self, frame: bytes) -> m.Message:
        """A broadcast, the same object again, is decoded once."""
        if frame is not self._last[0]:
            self._last = frame, m.CATALOGUE.decode(frame)
        return self._last[1]

    def _upload(self, name: str, state: Awaiting) -> list[bytes]:
        self.states[name], replies = state.upload(self.values, self.weight)
        return [m.CATALOGUE.encode(reply) for reply in replies]


def run(
    server: Round,
    parties: Mapping[str, Party],
    values: Values,
    weight: float,
    gone: frozenset[str] = frozenset(),
    passed: Passed = lambda sender, recipient, frame: None,
    prompt: Prompt | None = None,
) -> Meter:
    """Drive a round to its end; clients in ``gone`` vanish before their upload.

    ``passed`` sees every frame, uncharged; the server is "".
    """
    crowd = Crowd(parties, values, weight, gone, prompt)
    meter, queue = crowd.meter, deque[tuple[str, str, bytes]]()

    def post(out: list[tuple[str, m.Message]]) -> None:
        queue.extend(("", recipient, m.CATALOGUE.encode(message)) for recipient, message in out)

    def to_server(sender: str, frame: bytes) -> None:
        post(server.on(sender, m.CATALOGUE.decode(frame), 0.0))

    meter.charge("", "start", lambda: post(server.start(0.0)))
    while not server.over or queue:
        if not queue:
            meter.charge("", "tick", lambda: post(server.tick(server.deadline)))
            continue
        sender, recipient, frame = queue.popleft()
        passed(sender, recipient, frame)
        if sender:
            kind = m.CATALOGUE.types[frame[1]].__name__
            meter.charge("", kind, lambda s=sender, f=frame: to_server(s, f))  # type: ignore[misc]
        else:
            queue.extend((recipient, "", reply) for reply in crowd.take(recipient, frame))
    assert server.stage is Stage.DONE, server.reason
    return meter
