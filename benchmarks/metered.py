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
from secure_fedprompt.server.rounds.base import Round, Stage

T = TypeVar("T")
POLICY = Policy(protections=("masks", "bfv", "ckks"), graphs=("complete", "regular"), colluders=0)
Keys = tuple[dict[str, Identity], Roster]


def federation(n: int) -> Keys:
    identities = {f"c{i:04d}": Identity.generate() for i in range(n)}
    members = [Member.of(key, name, "client") for name, key in identities.items()]
    return identities, Roster.of(tuple(members))


def parties_of(keys: Keys) -> dict[str, Party]:
    identities, roster = keys
    return {
        name: Party(name, key, roster, POLICY, MemoryJournal(), os.urandom)
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


def run(
    server: Round,
    parties: Mapping[str, Party],
    values: Values,
    weight: float,
    gone: frozenset[str] = frozenset(),
    passed: Callable[[str, str, bytes], None] = lambda sender, recipient, frame: None,
    prompt: Prompt | None = None,
) -> Meter:
    """Drive a round to its end; clients in ``gone`` vanish before their upload.

    ``passed`` sees every frame, uncharged; the server is "". Work of clients is charged by the kind
    of the frame that caused it, the upload as "upload". From ``prompt`` clients compute the next
    one, if it is given.
    """
    meter, states = Meter(), dict[str, State]()
    queue: deque[tuple[str, str, bytes]] = deque()

    def post(sender: str, out: list[tuple[str, m.Message]]) -> None:
        for recipient, message in out:
            queue.append((sender, recipient, m.CATALOGUE.encode(message)))

    def to_server(sender: str, frame: bytes) -> None:
        post("", server.on(sender, m.CATALOGUE.decode(frame), 0.0))

    def to_client(name: str, frame: bytes) -> None:
        message = m.CATALOGUE.decode(frame)
        if isinstance(message, m.Plan):
            states[name], replies = start(parties[name], message.plan)
        else:
            states[name], replies = states[name].on(message)
        state = states[name]
        if isinstance(state, Opening):
            meter.opened, meter.sum = meter.opened + 1, state.total
            following = b"prompt"
            if prompt is not None:
                following = prompt_bytes(averaged(prompt, state.plan.layout, state.total))
            states[name], replies = state.report(following)
        post(name, [("", reply) for reply in replies])

    def upload(name: str, state: Awaiting) -> None:
        states[name], replies = state.upload(values, weight)
        post(name, [("", reply) for reply in replies])

    meter.charge("", "start", lambda: post("", server.start(0.0)))
    while not server.over or queue:
        if not queue:
            meter.charge("", "tick", lambda: post("", server.tick(server.deadline)))
            continue
        sender, recipient, frame = queue.popleft()
        passed(sender, recipient, frame)
        kind = m.CATALOGUE.types[frame[1]].__name__
        if sender:
            meter.up[sender] = meter.up.get(sender, 0) + len(frame)
            meter.charge("", kind, lambda s=sender, f=frame: to_server(s, f))  # type: ignore[misc]
            continue
        meter.down[recipient] = meter.down.get(recipient, 0) + len(frame)
        if kind == "RoundEnd":
            continue
        meter.charge(recipient, kind, lambda r=recipient, f=frame: to_client(r, f))  # type: ignore[misc]
        if isinstance(state := states[recipient], Awaiting) and recipient not in gone:
            meter.charge(recipient, "upload", lambda r=recipient, s=state: upload(r, s))  # type: ignore[misc]
    assert server.stage is Stage.DONE, server.reason
    return meter
