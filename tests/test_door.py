"""Floods against real sockets: of connections, before a key is shown, and of frames after that."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import zmq
from rounds import identity, names, roster
from sockets import PATIENCE, collect
from zmq.utils import z85

from secure_fedprompt.clients import link
from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.protocol import chunks, errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.keys import Identity
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server import door, hub
from secure_fedprompt.server.hub import CurveHub

ALIVE = Frame.of(m.Alive())


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "this never comes true"
        time.sleep(0.01)


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr(door, "STRANGERS", 12)
    monkeypatch.setattr(hub, "BURST", 20_000)
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def server(stack: ExitStack) -> CurveHub:
    return stack.enter_context(
        closing(CurveHub("tcp://127.0.0.1:*", identity("server"), roster(4)))
    )


def linked(stack: ExitStack, server: CurveHub, name: str) -> CurveLink:
    key = identity("server").curve_public()
    made = stack.enter_context(closing(CurveLink(server.address, key, identity(name), PATIENCE)))
    made.connect()
    made.send(ALIVE)
    (got,) = collect(server, 1)
    assert got == (name, m.Alive())
    return made


def test_the_oldest_of_too_many_strangers_must_leave(stack: ExitStack, server: CurveHub) -> None:
    port = int(server.address.rsplit(":", 1)[1])
    early = linked(stack, server, "c001")

    def stranger() -> socket.socket:
        return stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))

    first = [stranger() for _ in range(12)]
    until(lambda: len(server._door._silent) == 12)
    last = [stranger() for _ in range(5)]
    for held in first[:5]:  # ZeroMQ's greeting, then the end
        until(lambda held=held: not held.recv(64))
    assert len(server._door._silent) == 12
    for held in (*first[5:], *last):
        assert held.recv(1)
        held.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # ZeroMQ's greeting, and no end
            while True:
                assert held.recv(64)
    late = linked(stack, server, "c002")  # who speaks is no stranger
    more = [stranger() for _ in range(15)]
    until(lambda: len(server._door._silent) == 12)
    for one in (early, late):
        one.send(ALIVE)
        assert [message for _, message in collect(server, 1)] == [m.Alive()]
        assert one.connections == 1
    del more


def watched(
    stack: ExitStack, strangers: int, connections: int
) -> tuple[door.Door, Callable[[zmq.Event, int], None], list[socket.socket]]:
    """A door, what tells it of handles, and both ends of some connections."""
    context = stack.enter_context(zmq.Context())
    tells, told = (stack.enter_context(context.socket(zmq.PAIR)) for _ in range(2))
    told.bind("inproc://door")
    tells.connect("inproc://door")

    def tell(kind: zmq.Event, handle: int) -> None:
        tells.send_multipart([struct.pack("=HI", kind, handle), b"tcp://127.0.0.1"])

    pairs = [socket.socketpair() for _ in range(connections)]
    made = door.Door(told, strangers)
    stack.callback(made.close)
    stack.callback(tell, zmq.Event.MONITOR_STOPPED, 0)
    return made, tell, [stack.enter_context(end) for pair in pairs for end in pair]


def ended(end: socket.socket) -> bool:
    end.setblocking(False)
    try:
        return not end.recv(1)
    except BlockingIOError:
        return False


@pytest.mark.parametrize("soon", [door.SOON, 0.0])
def test_who_spoke_before_its_connection_was_told_of_is_no_stranger(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, soon: float
) -> None:
    """The socket hands out its first frame, and the monitor is late. Long after it, a handle is
    another connection's."""
    monkeypatch.setattr(door, "SOON", soon)
    watching, tell, ends = watched(stack, 3, 5)
    handles = [end.fileno() for end in ends[::2]]
    watching.heard(handles[0], "c001")
    for handle in handles:
        tell(zmq.Event.ACCEPTED, handle)
    until(lambda: list(watching._silent) == handles[2:])
    assert watching._speaker == ({handles[0]: "c001"} if soon else {})
    assert [ended(end) for end in ends[1::2]] == [not soon, True, False, False, False]


def test_many_connections_that_speak_at_once_are_ended_too(stack: ExitStack) -> None:
    """Before their ends are told of; and a frame that was read late binds no handle to its name."""
    watching, tell, ends = watched(stack, 100, 21)
    *handles, other = [end.fileno() for end in ends[::2]]
    for handle in (*handles, other):
        tell(zmq.Event.ACCEPTED, handle)
    until(lambda: len(watching._silent) == 21)
    watching.heard(other, "c001")  # of a connection that had the handle before
    watching.heard(other, "c002")
    for handle in handles:
        watching.heard(handle, "c001")
    assert list(watching._lines["c001"]) == handles[-door.EACH :]
    assert list(watching._lines["c002"]) == [other]
    assert [ended(end) for end in ends[1::2]] == [True] * (20 - door.EACH) + [False] * 5


def test_a_member_has_few_connections(stack: ExitStack, server: CurveHub) -> None:
    context = stack.enter_context(zmq.Context())
    lines = []
    for _ in range(door.EACH + 3):
        peer = stack.enter_context(context.socket(zmq.DEALER))
        peer.linger, peer.reconnect_ivl = 0, -1
        peer.curve_serverkey = z85.encode(identity("server").curve_public())
        peer.curve_publickey = z85.encode(identity("c001").curve_public())
        peer.curve_secretkey = z85.encode(identity("c001").curve.private_bytes_raw())
        peer.connect(server.address)
        peer.send(b"\3" + bytes(ALIVE.data))
        assert collect(server, 1) == [("c001", m.Alive())]
        lines.append(peer)
    until(lambda: len(server._door._lines["c001"]) == door.EACH)
    linked(stack, server, "c002")


def test_who_floods_is_dropped_by_name_and_the_others_go_on(
    stack: ExitStack, server: CurveHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: list[tuple[str, Frame]] = []
    monkeypatch.setattr(server, "_own", lambda name, frame: own.append((name, frame)))
    hostile, honest = (linked(stack, server, name) for name in names(2))
    for _ in range(200):
        hostile.send(ALIVE)
    honest.send(ALIVE)
    got: list[tuple[str, m.Message]] = []
    flood = "c001", m.Leave("FloodError", hub.FLOOD)
    until(lambda: got.extend(collect(server, 1)) or {("c002", m.Alive()), flood} <= set(got))
    fallen = [message for name, message in got if name == "c001"]
    assert len(fallen) < 20_000 / 300 + 5
    assert fallen[-1] == flood[1]
    assert [message for message in fallen if message != m.Alive()] == fallen[-1:]
    assert [(name, type(frame.message)) for name, frame in own] == [("c001", m.Refused)]
    told = hostile.receive(PATIENCE)
    assert told is not None
    assert told.message == m.Refused("FloodError", f"c001: {hub.FLOOD}")
    for _ in range(3):
        hostile.send(ALIVE)
    honest.send(ALIVE)
    assert collect(server, 1) == [("c002", m.Alive())]  # nothing of c001 is read
    monkeypatch.setattr(server, "_muted", {})  # minutes later
    monkeypatch.setattr(server._quotas["c001"], "_at", time.monotonic() - hub.MUTED)
    until(lambda: hostile.send(ALIVE) or ("c001", m.Alive()) in collect(server, 1))


def test_what_a_flood_has_filled_is_given_back(stack: ExitStack, server: CurveHub) -> None:
    """A frame without an end; and what nobody reads yet waits with its sender."""
    hostile = linked(stack, server, "c001")
    hostile._socket.send(b"\1" + bytes(1000))
    for _ in range(30):
        hostile._socket.send(b"\0" + bytes(1000))
    assert collect(server, 1) == [("c001", m.Leave("FloodError", hub.FLOOD))]
    assert server._coming["c001"]._parts is None
    assert server._socket.rcvhwm * chunks.LIMIT < 5 << 20


def test_a_server_that_floods_is_left(
    stack: ExitStack, server: CurveHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "BURST", 20_000)
    client = linked(stack, server, "c001")
    rejoin = Frame.of(m.Rejoin())
    for _ in range(100):
        assert server.send("c001", rejoin)
    with pytest.raises(errors.FloodError, match=r"sends more than its rounds take.*keep that log"):
        until(lambda: client.receive(PATIENCE) is None)


def test_refused_keys_are_told_of_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    told: list[int] = []
    admission = hub._Admission({}, lambda key, more: told.append(more))
    key = z85.encode(Identity.generate().curve_public())
    for _ in range(500):
        clock[0] += 0.01
        assert not admission.callback("", key)
    assert told == [0] * hub.DENIALS
    clock[0] += hub.DENIALS_IN
    assert not admission.callback("", key)
    assert not admission.callback("", key)
    assert told[hub.DENIALS :] == [500 - hub.DENIALS, 0]
