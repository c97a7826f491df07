"""The network in memory, and what wraps a link or hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from rounds import identity, roster

from secure_fedprompt.audit.log import Log
from secure_fedprompt.clients.conversation import Conversation
from secure_fedprompt.host.recorded import RecordedHub, RecordedLink
from secure_fedprompt.host.recorder import MALFORMED, Recorder
from secure_fedprompt.memory import Network
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.serve import CountedHub, Outbox, post

RUN = b"r" * 16


def end(number: int, reason: str = "") -> m.RoundEnd:
    return m.RoundEnd(RUN, number, reason)


class Echo:
    """Ends a round for whoever lives, and is over after so many; ``heard`` is what came, in order."""

    def __init__(self, rounds: int, *members: str) -> None:
        self.heard: list[tuple[str, m.Message]] = []
        self.left: list[str] = []
        self.members = members
        self.rounds = rounds

    @property
    def over(self) -> bool:
        return len(self.heard) >= self.rounds

    def on(self, sender: str, message: m.Message, now: float) -> Outbox:
        self.heard.append((sender, message))
        return [(sender, end(len(self.heard)))] if isinstance(message, m.Alive) else []

    def tick(self, now: float) -> Outbox:
        return [(name, end(0, f"{now:g}")) for name in self.members]

    def gone(self, name: str, now: float) -> Outbox:
        self.left.append(name)
        return []


def test_frames_keep_their_order_and_time_jumps_when_all_have_spoken() -> None:
    network, server, got = (
        Network(wait=lambda clock: clock + 7),
        Echo(4, "a", "b"),
        list[tuple[str, str]](),
    )

    def member(name: str) -> None:
        def on(message: m.Message) -> list[m.Message]:
            assert isinstance(message, m.RoundEnd)
            got.append((name, message.reason or str(message.round)))
            return [m.Alive()] if message.reason else []

        network.join(name, on)

    member("a")
    member("b")
    network.run(server)
    assert network.clock == 14
    assert [name for name, _ in server.heard] == ["a", "b", "a", "b"]
    assert got == [("a", "7"), ("b", "7"), ("a", "1"), ("b", "2"),
                   ("a", "14"), ("b", "14"), ("a", "3"), ("b", "4")]  # fmt: skip


def test_a_tap_loses_and_replaces_frames_and_everything_passes_the_codec() -> None:
    def tap(sender: str, recipient: str, frame: Frame) -> Frame | None:
        if sender == "a":
            return None
        return Frame(b"\x00garbage") if sender == "b" else frame

    network, server = Network(tap), Echo(1, "a", "b")
    for name in ("a", "b"):
        network.join(name, lambda message: [m.Alive()] if message.reason else [])  # type: ignore[attr-defined]
    network.run(server)
    ((sender, left),) = server.heard
    assert sender == "b"
    assert isinstance(left, m.Leave)
    assert left.error == "UnknownVersionError"
    assert left.reason.startswith("malformed frame: ")


def test_a_stopped_network_goes_on_where_it_was() -> None:
    network, server = Network(), Echo(2)
    network.join("a", lambda message: [])
    network.send("a", m.Alive())
    network.stopped = True
    network.run(server)
    assert not server.heard
    network.send("a", m.Alive())
    network.stopped = False
    network.run(server)
    assert len(server.heard) == 2


def test_the_recorder_goes_around_any_transport(tmp_path: Path) -> None:
    known, counted = roster(3), list[tuple[str, ...]]()
    logs = {
        name: Recorder(tmp_path / name, "full", 1 << 24, identity(name), known.by_name[name], known)
        for name in ("server", "c001")
    }
    network, server = Network(), Echo(2)  # Alive, and the head after the round's end
    network.join("c001", lambda message: [])
    network.links["c001"] = RecordedLink(network.links["c001"], logs["c001"])
    count = lambda peer, way, kind, size: counted.append((peer, way, kind))  # noqa: E731
    network.hub = RecordedHub(CountedHub(network.hub, count), logs["server"])
    network.send("c001", m.Alive())
    network.run(server)
    for log in logs.values():
        log.close()
    ours, theirs = (Log.read(tmp_path / name).entries for name in ("server", "c001"))
    assert {e.kind for e in ours} == {"Alive", "LogHead", "RoundEnd"}
    assert sorted(e.digest for e in ours) == sorted(e.digest for e in theirs)
    assert len(counted) == len(ours)


def test_what_is_no_message_is_recorded_and_what_is_no_frame_is_not(tmp_path: Path) -> None:
    class Odd:
        def poll(self, timeout: float) -> list[tuple[str, Frame]]:
            told = errors.KeyInUseError("twice")
            return [("c001", Frame.read(b"garbage")), ("c001", Frame(b"", None, told))]

    known = roster(3)
    log = Recorder(tmp_path, "full", 1 << 24, identity("server"), known.by_name["server"], known)
    assert len(list(RecordedHub(Odd(), log).poll(0.0))) == 2  # type: ignore[arg-type]
    log.close()
    assert [(e.kind, e.size) for e in Log.read(tmp_path).entries] == [(MALFORMED, 7)]


class Line:
    """A link that plays what a server says."""

    def __init__(self, *says: m.Message | None) -> None:
        self.connections, self.says, self.sent = 0, list(says), list[str]()

    def send(self, frame: Frame) -> None:
        self.sent.append(type(frame.message).__name__)

    def receive(self, timeout: float) -> Frame | None:
        said = self.says.pop(0)
        return None if said is None else Frame.of(said)


def test_a_conversation_greets_lives_and_ignores_a_rejoin_that_crossed_its_greeting() -> None:
    clock = [100.0]
    line = Line(m.Rejoin(), None, m.Rejoin(), end(1))
    hello = m.Hello(bytes(32), "", bytes(32), bytes(32), bytes(32))
    talk = Conversation(line, lambda: hello, lambda: clock[0])
    talk.greet()
    assert line.sent == []  # no connection yet
    line.connections = 1
    for clock[0] in (100.0, 101.0, 101.9):
        talk.greet()
        talk.live()
    assert line.sent == ["Hello", "Alive"]
    assert talk.receive(0.0) is None  # it crossed
    assert talk.receive(0.0) is None
    clock[0] = 107.0
    talk.live()
    assert line.sent == ["Hello", "Alive", "Alive"]
    assert talk.receive(0.0) == m.Rejoin()
    assert talk.receive(0.0) == end(1)
    line.connections = 2
    talk.greet()
    assert line.sent[-1] == "Hello"


def test_a_member_that_cannot_be_reached_is_gone_and_leaves_no_record(tmp_path: Path) -> None:
    class Nobody:
        def reaches(self, name: str) -> bool:
            return False

        def poll(self, timeout: float) -> list[tuple[str, Frame]]:  # pragma: no cover
            return []

        def send(self, name: str, frame: Frame) -> bool:
            return False

    known, server = roster(3), Echo(1)
    log = Recorder(tmp_path, "full", 1 << 24, identity("server"), known.by_name["server"], known)
    post(RecordedHub(Nobody(), log), server, [("c001", end(1))], lambda: 0.0)  # type: ignore[arg-type]
    log.close()
    assert server.left == ["c001"]
    assert not Log.read(tmp_path).entries


def test_a_frame_that_is_none_is_raised_by_who_opens_it() -> None:
    assert Frame.of(m.Alive()).opened() == m.Alive()
    with pytest.raises(errors.UnknownTypeError):
        Frame.read(Frame.of(m.Alive()).data[:1] + b"\xff").opened()
    rival = Frame(b"", None, errors.KeyInUseError("twice"))
    assert not rival.came
    assert rival.heard() == m.Leave("KeyInUseError", "twice")
