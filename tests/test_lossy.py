"""A run against its model, over links that lose what is under way, say things twice, and come back:
Hypothesis chooses what happens, and when."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from rounds import names
from test_killed_anywhere import SERVER, SETTINGS, Mortal, N, check

CLIENT = st.sampled_from(names(N))


class Stepped(Mortal):
    """A world that stops after so many frames."""

    left = 0

    def tap(self, sender: str, recipient: str, frame: Any) -> Any:
        kept = super().tap(sender, recipient, frame)
        self.left -= 1
        self.network.stopped = self.network.stopped or not self.left
        return kept


class Lossy(RuleBasedStateMachine):
    """Whatever happens, each learning round counts once; and when it stops, the run ends."""

    @initialize(kind=st.sampled_from(["masks", "masks", "bfv", "selection"]))
    def begin(self, kind: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.world = Stepped(self.folder, **SETTINGS[kind])

    @rule(frames=st.integers(1, 60))
    def deliver(self, frames: int) -> None:
        if not self.world.run.over:
            self.world.left = frames
            self.world.pump()

    @rule(name=CLIENT)
    def lose_a_connection(self, name: str) -> None:
        """What is under way is gone; both ends notice, and it comes back."""
        self.world.forget(name)
        self.world.lose(name)
        if name not in self.world.lost:
            self.world.reconnect(name)

    @rule(name=CLIENT)
    def lose_a_connection_unnoticed(self, name: str) -> None:
        """The client comes back before the server sees that it was gone."""
        self.world.forget(name)
        if name not in self.world.lost:
            self.world.reconnect(name)

    @rule(name=CLIENT)
    def say_it_twice(self, name: str) -> None:
        """A frame of a client arrives again, behind whatever else is under way."""
        queue = self.world.network.queue
        if found := [frame for frame in queue if frame[0] == name]:
            queue.append(found[0])

    @rule(name=CLIENT)
    def restart_a_client(self, name: str) -> None:
        self.world.restart(name)

    @rule()
    def restart_the_server(self) -> None:
        if not self.world.run.over:
            self.world.restart(SERVER)

    @rule(seconds=st.sampled_from([1.0, 11.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.world.clock += seconds
        if not self.world.run.over:
            self.world.post(self.world.run.tick(self.world.clock))

    @invariant()
    def nothing_counts_twice(self) -> None:
        if not hasattr(self, "world"):
            return
        rows = self.world.store.summary()["rounds"]
        done = [row["learning_round"] for row in rows if row["outcome"] == "done"]
        assert done == list(range(1, len(done) + 1))
        numbers = [row["round"] for row in rows]
        assert numbers == sorted(set(numbers))

    def teardown(self) -> None:
        if hasattr(self, "world"):
            if not self.world.run.over:
                self.world.pump()
            if "in the memory of those" not in str(self.world.run.error):  # too few were left
                check(self.world)
            self.world.close()
            shutil.rmtree(self.folder)


Lossy.TestCase.settings = settings(
    max_examples=int(os.environ.get("LOSSY", "4")), stateful_step_count=12, deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to shrink takes minutes
    suppress_health_check=list(HealthCheck), derandomize="LOSSY" not in os.environ,
)  # fmt: skip
TestLossy = Lossy.TestCase
