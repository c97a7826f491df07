"""kill -9 at every message: a server, a client or a helper ends before or after each frame of a run,
and is started again with what its disk has kept.

Whatever was under way, the run ends, each learning round counts once, no sum of a prompt is opened
twice, and nothing is masked twice alike.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from federation import World
from rounds import names
from selecting import SECURE, Grouped

from secure_fedprompt.clients.file_journal import FileJournal
from secure_fedprompt.clients.ledger import NAME, Ledger
from secure_fedprompt.protocol import messages as m

SETTINGS: dict[str, dict[str, Any]] = {
    "masks": {},
    "bfv": {"protection": "bfv"},
    "ckks": {"protection": "ckks"},
    "selection": SECURE,
}
SERVER, N = "", 4
UPLOADS = m.MaskedUpload | m.CipherUpload


class Mortal(World):
    """A world whose parties can be killed; what they kept is on the disk.

    Attributes:
        frames: that were delivered. sent: uploads by client and round.
        absent: a client that is gone from the second round on, if any: the rest are a quorum.
    """

    absent = ""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.place, self.frames, self.kill = folder, 0, (-1, "", "")
        self.sent: dict[tuple[str, int], list[bytes]] = {}
        super().__init__(
            folder / "server", N, **{"alive_seconds": 12.0, "rounds": 2, "gather_seconds": 20.0,
                                     "patience": 4000.0, "max_attempts": 0, **changes},
        )  # fmt: skip
        self.withdraws = True
        if self.settings.selection == "secure":
            self.toys = {name: Grouped(i) for i, name in enumerate(names(N))}
        for name in names(N):
            self.begin(name)

    def begin(self, name: str) -> None:
        """Start a client's process."""
        if isinstance(old := self.journals[name], FileJournal):
            old.close()
            self.ledgers[name].close()
        folder = self.place / name
        self.journals[name] = FileJournal(folder / "journal.jsonl")
        self.ledgers[name] = Ledger(folder / NAME)
        self.join(name)

    def close(self) -> None:
        for name in names(N):
            self.journals[name].close()  # type: ignore[attr-defined]
            self.ledgers[name].close()
        self.store.close()

    def tap(self, sender: str, recipient: str, frame: Any) -> Any:
        message = frame.opened()
        if isinstance(message, m.Alive):
            return super().tap(sender, recipient, frame)
        self.frames += 1
        if isinstance(message, m.Plan) and message.plan.round == 2 and recipient == self.absent:
            self.lost.add(self.absent)
        at, who, when = self.kill
        kept = super().tap(sender, recipient, frame)
        if isinstance(message, UPLOADS):
            self.sent.setdefault((sender, message.round), []).append(bytes(frame.data))
        if self.frames != at or who not in (sender, recipient):
            return kept
        if when == "after" and kept is not None and recipient == who and who != SERVER:
            for reply in self.answer(who, message):  # it acts, and its answers are lost
                del reply
        if when == "after" and kept is not None and recipient == who == SERVER:
            self.run.on(sender, message, self.clock)
        self.restart(who)
        return None if when == "before" or recipient == who else kept

    def restart(self, who: str) -> None:
        if who == SERVER:
            self.network.queue.clear()
            self.store.close()
            self.start_server()
            for name in self.sessions:
                self.reconnect(name)
        else:
            self.begin(who)

    def pump(self, until: Any = lambda world, message: False) -> None:
        """The network drives whichever server there is."""
        self.idle, self.until, self.network.stopped = 0, until, False
        self.network.run(Present(self))


class Present:
    """The server that runs now."""

    def __init__(self, world: Mortal) -> None:
        self._world = world

    @property
    def over(self) -> bool:
        return self._world.run.over

    def on(self, *args: Any) -> Any:
        return self._world.run.on(*args)

    def tick(self, *args: Any) -> Any:
        return self._world.run.tick(*args)

    def gone(self, *args: Any) -> Any:
        return self._world.run.gone(*args)


def check(world: Mortal) -> None:
    """What must hold, wherever somebody was killed."""
    rows = world.store.summary()["rounds"]
    done = [row["learning_round"] for row in rows if row["outcome"] == "done"]
    assert world.run.error is None, world.run.error
    last = 2 + int(world.settings.metrics != "off")
    assert done == list(range(1, last + 1))
    numbers = [row["round"] for row in rows]
    assert len(set(numbers)) == len(numbers)
    for name in names(N):
        opened = Counter[int]()
        run = world.run.state.run.hex()
        known = world.journals[name]._runs.get(run)
        for learning_round in known.opened if known is not None else ():
            opened[learning_round] += 1
        assert max(opened.values(), default=0) <= 1
        counted = Counter(u.learning_round for u in world.ledgers[name].uploads if u.run == run)
        assert set(counted) <= {1, 2, 3}
    for (name, number), uploads in world.sent.items():
        assert len(set(uploads)) == 1, f"{name} masked two vectors alike in round {number}"
    for name in world.lost - {world.absent}:
        assert name in world.errors, f"{name} is gone, and nobody knows why"


def length(folder: Path, kind: str, absent: str) -> int:
    """Frames of a run in which nobody is killed."""
    world = Mortal(folder, **SETTINGS[kind])
    world.absent = absent
    world.pump()
    check(world)
    world.close()
    return world.frames


def walk(tmp_path: Path, kind: str, step: int, offset: int = 0, absent: str = "") -> int:
    """Kill each party at every ``step``-th of its frames; how often it was done."""
    frames, tried = length(tmp_path / "whole", kind, absent), 0
    for at in range(1 + offset, frames, step):
        for who in (SERVER, "c001", "c002"):
            for when in ("before", "after"):
                world = Mortal(tmp_path / f"{at}-{who}-{when}", **SETTINGS[kind])
                world.kill, world.absent = (at, who, when), absent
                try:
                    world.pump()
                    check(world)
                except AssertionError as error:
                    error.add_note(
                        f"{kind}: {who or 'server'} killed {when} frame {at} of {frames}"
                    )
                    raise
                finally:
                    world.close()
                tried += 1
    return tried


@pytest.mark.parametrize(("kind", "step", "absent"), [("masks", 97, ""), ("bfv", 61, "c004")])
def test_killed_here_and_there(tmp_path: Path, kind: str, step: int, absent: str) -> None:
    assert walk(tmp_path, kind, step, 3, absent) >= 6


EVERY = [(kind, absent) for kind in SETTINGS for absent in ("", "c004")]
SOME = [("masks", ""), ("selection", "")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "absent"), EVERY if "KILL_STEP" in os.environ else SOME)
def test_killed_at_many_messages(tmp_path: Path, kind: str, absent: str) -> None:
    """At every one with KILL_STEP=1, which takes half an hour."""
    assert walk(tmp_path, kind, int(os.environ.get("KILL_STEP", "31")), absent=absent) >= 30
