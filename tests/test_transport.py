"""Real sockets: who gets in, who is told what, and what a frame's sender is."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import (
    float_sum,
    identity,
    make_encrypted_plan,
    make_parties,
    make_plan,
    make_updates,
    names,
    plain_sum,
    roster,
)
from sockets import PATIENCE, collect
from zmq.utils import z85

from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.clients.party import refusal
from secure_fedprompt.memory import RoundClient
from secure_fedprompt.protocol import chunks, errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import VERSION
from secure_fedprompt.protocol.keys import Identity
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server import routes
from secure_fedprompt.server.door import EACH, HANDLES, bound_handles, room
from secure_fedprompt.server.hub import TWO, CurveHub
from secure_fedprompt.server.rounds.base import Deadlines, Stage
from secure_fedprompt.server.rounds.start import make_round
from secure_fedprompt.server.routes import Heard, Routes
from secure_fedprompt.server.serve import hear, post


@pytest.fixture
def hub() -> Iterator[CurveHub]:
    with closing(CurveHub("tcp://127.0.0.1:*", identity("server"), roster(4))) as made:
        yield made


@pytest.fixture
def connect(hub: CurveHub) -> Iterator[Callable[..., CurveLink]]:
    """Open links that are closed at the end."""
    with ExitStack() as stack:

        def make(who: Identity, server: bytes | None = None, patience: float = 5.0) -> CurveLink:
            key = identity("server").curve_public() if server is None else server
            return stack.enter_context(closing(CurveLink(hub.address, key, who, patience)))

        yield make


def heard(link: CurveLink) -> m.Message:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (frame := link.receive(0.05)) is not None:
            return frame.opened()
    raise AssertionError("nothing came")


def test_the_sender_is_the_authenticated_key(
    hub: CurveHub, connect: Callable[..., CurveLink]
) -> None:
    for name in names(2):
        link = connect(identity(name))
        link.connect()
        link.send(Frame.of(m.Alive()))
        assert collect(hub, 1) == [(name, m.Alive())]
        assert hub.send(name, Frame.of(m.RoundEnd(bytes(16), 1, name)))
        assert heard(link) == m.RoundEnd(bytes(16), 1, name)
    assert not hub.send("c004", Frame.of(m.Alive()))


def test_a_chosen_routing_id_gives_no_other_name(hub: CurveHub) -> None:
    """c002 connects under the routing id that c001 has; it still speaks as c002."""
    context = zmq.Context()
    opened = []
    for name in ("c001", "c002"):
        peer = context.socket(zmq.DEALER)
        peer.linger = 0
        peer.routing_id = b"c001"
        peer.curve_serverkey = z85.encode(identity("server").curve_public())
        peer.curve_publickey = z85.encode(identity(name).curve_public())
        peer.curve_secretkey = z85.encode(identity(name).curve.private_bytes_raw())
        peer.connect(hub.address)
        peer.send(m.CATALOGUE.encode(m.Alive()))
        opened.append(peer)
        got = collect(hub, 1) if name == "c001" else list(hub.poll(1.0))
        assert all(sender == name for sender, _ in got)
    context.destroy(linger=0)


def test_not_on_the_roster(connect: Callable[..., CurveLink]) -> None:
    with pytest.raises(errors.NotOnRosterError, match=r"status 400.*not on the server's roster"):
        connect(Identity.generate()).connect()


def test_wrong_server_key(connect: Callable[..., CurveLink]) -> None:
    wrong = Identity.generate().curve_public()
    with pytest.raises(errors.WrongServerKeyError, match="probably not this server's"):
        connect(identity("c001"), wrong, patience=15.0).connect()


def test_unreachable() -> None:
    with socket.socket() as taken:  # bound, never listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        link = CurveLink(address, identity("server").curve_public(), identity("c001"), 0.5)
        with closing(link), pytest.raises(errors.UnreachableError, match="check the address"):
            link.connect()


def test_port_in_use_and_bad_addresses(hub: CurveHub) -> None:
    with pytest.raises(errors.PortInUseError, match="stop the other server"):
        CurveHub(hub.address, identity("server"), roster(4))
    with pytest.raises(errors.ConfigError, match="bind = 'nonsense': write tcp://HOST:PORT"):
        CurveHub("nonsense", identity("server"), roster(4))
    with pytest.raises(errors.ConfigError, match="port 80000 is not between 1 and 65535"):
        CurveHub("tcp://127.0.0.1:80000", identity("server"), roster(4))
    with pytest.raises(errors.ConfigError, match="tcp://HOST:PORT"):
        CurveLink("nonsense", identity("server").curve_public(), identity("c001"))


def test_malformed_frames_are_reported_with_their_sender(
    hub: CurveHub, connect: Callable[..., CurveLink]
) -> None:
    link = connect(identity("c003"))
    link.connect()
    link._socket.send(bytes((3, VERSION, 0xFF)) + b"garbage")
    ((sender, message),) = collect(hub, 1)
    assert sender == "c003"
    assert isinstance(message, m.Leave)
    assert message.error == "UnknownTypeError"
    for parts, error in (([b"two", b"parts"], "TrailingBytesError"), ([b""], "FieldError"),
                         ([b"\x09x"], "FieldError")):  # fmt: skip
        link._socket.send_multipart(parts)
        ((sender, message),) = collect(hub, 1)
        assert (sender, message.error) == ("c003", error)
    link.send(Frame.of(m.Alive()))
    assert collect(hub, 1) == [("c003", m.Alive())]


def test_another_release_is_answered_so_that_it_can_tell(
    hub: CurveHub, connect: Callable[..., CurveLink]
) -> None:
    """Whatever it understands: our version is in the first byte."""
    link = connect(identity("c003"))
    link.connect()
    link._socket.send(b"\3" + bytes((VERSION + 1,)) + Frame.of(m.Alive()).data[1:])
    ((sender, message),) = collect(hub, 1)
    assert sender == "c003"
    assert isinstance(message, m.Leave)
    assert message.error == "UnknownVersionError"
    told = link.receive(PATIENCE)
    assert told is not None
    assert told.data[0] == VERSION
    theirs = Frame.read(bytes((VERSION + 1,)) + bytes(told.data[1:]))  # as the other one sees it
    with pytest.raises(errors.UnknownVersionError, match="same release of secure-fedprompt"):
        theirs.opened()


def test_large_frames_cross_in_chunks_both_ways(
    hub: CurveHub, connect: Callable[..., CurveLink]
) -> None:
    link = connect(identity("c003"))
    link.connect()
    large = m.MaskedUpload(
        bytes(16), 1, np.random.default_rng(0).bytes(5 * chunks.CHUNK + 17), bytes(16)
    )
    link.send(Frame.of(large))
    link.send(Frame.of(m.Alive()))
    (_, first), (_, second) = collect(hub, 2)
    assert (bytes(first.vector), second) == (large.vector, m.Alive())
    assert hub.send("c003", Frame.of(large))
    received = heard(link)
    assert isinstance(received, m.MaskedUpload)
    assert bytes(received.vector) == large.vector


def test_strangers_make_the_server_hold_no_more_than_a_chunk(hub: CurveHub) -> None:
    """It is the announced size that a socket allocates, before anybody has shown a key."""
    port = int(hub.address.rsplit(":", 1)[1])
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
    for size, held in ((chunks.LIMIT // 2, True), (60_000_000, False)):
        with socket.create_connection(("127.0.0.1", port), 5.0) as stranger:
            stranger.sendall(greeting)
            received = b""
            while len(received) < 64:
                received += stranger.recv(64 - len(received))
            stranger.sendall(b"\x06" + size.to_bytes(8, "big"))
            stranger.settimeout(1.0 if held else PATIENCE)
            try:
                closed = stranger.recv(1) == b""
            except TimeoutError:
                closed = False
            except ConnectionError:
                closed = True
            assert closed is not held


def test_open_files_bound_the_connections() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        bound_handles(5)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == 5 * EACH + room(5) + HANDLES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@given(st.integers(0, 3 * chunks.CHUNK + 5))
@settings(max_examples=20, deadline=None)
def test_chunks_make_the_frame_again(size: int) -> None:
    frame = np.random.default_rng(size).bytes(size)
    assembler = chunks.Assembler()
    made = [assembler.add(memoryview(part)) for part in chunks.split(frame)]
    assert made[:-1] == [None] * (len(made) - 1)
    assert made[-1] is not None
    assert bytes(made[-1]) == frame


def test_a_frame_that_a_lost_connection_cut_is_forgotten() -> None:
    assembler = chunks.Assembler()
    one, two = (list(chunks.split(bytes((i,)) * (2 * chunks.CHUNK))) for i in (1, 2))
    assert assembler.add(memoryview(one[0])) is None
    assert assembler.add(memoryview(two[0])) is None  # the next frame begins
    assert assembler.add(memoryview(two[1])) == b"\2" * (2 * chunks.CHUNK)
    assert assembler.add(memoryview(one[1])) is None  # the rest of what was cut


def test_a_frame_without_an_end_is_refused_before_it_fills_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "MAX_FRAME", 3 * chunks.CHUNK)
    assembler = chunks.Assembler()
    part = memoryview(b"\0" + bytes(chunks.CHUNK))
    assert assembler.add(memoryview(b"\1" + bytes(chunks.CHUNK))) is None
    assert assembler.add(part) is None
    assert assembler.add(part) is None
    with pytest.raises(errors.TooLargeError):
        assembler.add(part)
    assert assembler.add(part) is None
    with pytest.raises(errors.FieldError):
        assembler.add(memoryview(b"\3" + bytes(chunks.CHUNK + 1)))


def test_unencrypted_peers_get_nothing(hub: CurveHub) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as plain:
        plain.linger = 0
        plain.connect(hub.address)
        plain.send(m.CATALOGUE.encode(m.Alive()))
        assert not list(hub.poll(0.5))


def test_a_link_that_comes_back_counts_a_new_connection() -> None:
    first = CurveHub("tcp://127.0.0.1:*", identity("server"), roster(4))
    address = first.address
    link = CurveLink(address, identity("server").curve_public(), identity("c001"), PATIENCE)
    with closing(link):
        link.connect()
        first.close()
        deadline = time.monotonic() + PATIENCE
        while link._down_since is None and time.monotonic() < deadline:
            link.receive(0.1)
        link.send(Frame.of(m.Leave("Stopped", "")))  # said to nobody: not for the next one either
        with closing(CurveHub(address, identity("server"), roster(4))) as second:
            deadline = time.monotonic() + PATIENCE
            while link.connections < 2 and time.monotonic() < deadline:
                link.receive(0.1)
            link.send(Frame.of(m.Alive()))
            assert collect(second, 1) == [("c001", m.Alive())]


@pytest.mark.parametrize("protection", ["masks", "bfv", "ckks"])
def test_a_round_of_random_vectors_over_sockets(
    hub: CurveHub, connect: Callable[..., CurveLink], protection: str
) -> None:
    plan = make_plan(4) if protection == "masks" else make_encrypted_plan(4, protection)
    updates = make_updates(plan)
    parties = make_parties(4)
    links = {name: connect(identity(name)) for name in names(4)}
    for link in links.values():
        link.connect()
        link.send(Frame.of(m.Alive()))
    collect(hub, 4)
    run_keys = {name: party.ready(plan.run) for name, party in parties.items()}
    server = make_round(plan, b"", roster(4), Deadlines(), run_keys)
    clients = {name: RoundClient(party, updates[name]) for name, party in parties.items()}
    post(hub, server, server.start(0.0), lambda: 0.0)
    deadline = time.monotonic() + PATIENCE
    while not server.over and time.monotonic() < deadline:
        for name, link in links.items():
            if (frame := link.receive(0.01)) is not None:
                for reply in clients[name].on(frame.opened()):
                    link.send(Frame.of(reply))
        post(hub, server, hear(hub, server, 0.01, lambda: 0.0), lambda: 0.0)
    opened = [client.opened.integers for client in clients.values() if client.opened]
    assert server.stage is Stage.DONE, server.reason
    if protection == "masks":
        assert server.integers is not None
        assert np.array_equal(server.integers, plain_sum(plan, updates, plan.cohort))
        return
    assert server.integers is None
    assert len(opened) == 4
    assert all((one == opened[0]).all() for one in opened)
    steps = np.concatenate([np.full(f.size, 2.0**-f.frac) for f in plan.layout])
    reference = float_sum(plan, updates, plan.cohort)
    assert (np.abs(opened[0] * steps - reference) <= 4 * steps).all()


def test_two_machines_with_one_key_are_noticed_and_named(
    hub: CurveHub, connect: Callable[..., CurveLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "SPACING", 0.0)
    sent: list[tuple[str, Frame]] = []
    monkeypatch.setattr(hub, "_own", lambda name, frame: sent.append((name, frame)))
    first, copy = connect(identity("c001")), connect(identity("c001"))
    for link in (first, copy):
        link.connect()
        link.send(Frame.of(m.Alive()))
        assert collect(hub, 1) == [("c001", m.Alive())]
    for _ in range(routes.SIGHTINGS):
        first.send(Frame.of(m.Alive()))
    ((name, left),) = collect(hub, 1)
    assert (name, left) == ("c001", m.Leave("KeyInUseError", f"{TWO} (at 127.0.0.1 and 127.0.0.1)"))
    told = heard(copy)
    assert isinstance(told, m.Refused)
    assert isinstance(refusal(told), errors.KeyInUseError)
    assert [(name, frame.message) for name, frame in sent] == [("c001", told)]  # for the audit log
    copy.send(Frame.of(m.Alive()))  # it should have ended: not heard any more
    first.send(Frame.of(m.RoundEnd(bytes(16), 1, "first")))
    assert collect(hub, 1) == [("c001", m.RoundEnd(bytes(16), 1, "first"))]
    assert hub.send("c001", Frame.of(m.Alive()))
    assert heard(first) == m.Alive()


def test_what_a_lost_connection_left_behind_is_dropped() -> None:
    lines = Routes()
    assert lines.hear("c001", b"1", 0.0) is Heard.NEW
    assert lines.of("c001") == b"1"
    assert lines.hear("c001", b"2", 0.1) is Heard.NEW
    stale = [lines.hear("c001", b"1", 0.2 + i / 1000) for i in range(500)]
    assert set(stale) == {Heard.STALE}
    assert lines.of("c001") == b"2"
    assert lines.hear("c001", b"2", 1.0) is Heard.CURRENT
    # and one that goes on for longer than a queue lasts is a process
    lasting = [lines.hear("c001", b"1", 2.0 + i) for i in range(routes.SIGHTINGS)]
    assert lasting == [*[Heard.STALE] * (routes.SIGHTINGS - 1), Heard.TWICE]
    assert lines.settle("c001", b"1") == b"2"
    assert lines.of("c001") == b"1"
    assert [lines.hear("c001", b"2", 10.0 + i) for i in range(9)] == [Heard.STALE] * 9
    assert lines.hear("c001", b"3", 30.0) is Heard.NEW  # started again
    seen = [lines.hear("c001", b"1", 31.0 + i) for i in range(routes.SIGHTINGS - 1)]
    assert lines.hear("c001", b"4", 40.0) is Heard.NEW  # counts anew
    seen += [lines.hear("c001", b"1", 41.0 + i) for i in range(routes.SIGHTINGS - 1)]
    assert set(seen) == {Heard.STALE}


def test_a_visitor_with_the_same_key_that_has_gone_costs_nothing(
    hub: CurveHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``check`` from another machine: its connection is gone when the client is heard again."""
    monkeypatch.setattr(routes, "SPACING", 0.0)
    key = identity("server").curve_public()
    with closing(CurveLink(hub.address, key, identity("c001"), 5.0)) as first:
        first.connect()
        first.send(Frame.of(m.Alive()))
        collect(hub, 1)
        with closing(CurveLink(hub.address, key, identity("c001"), 5.0)) as visitor:
            visitor.connect()
            visitor.send(Frame.of(m.Alive()))
            collect(hub, 1)
        until = time.monotonic() + PATIENCE
        while hub.send("c001", Frame.of(m.Alive())) and time.monotonic() < until:
            collect(hub, 0)
            list(hub.poll(0.05))
        for _ in range(routes.SIGHTINGS):
            first.send(Frame.of(m.Alive()))
        first.send(Frame.of(m.RoundEnd(bytes(16), 1, "first")))
        assert collect(hub, 1) == [("c001", m.RoundEnd(bytes(16), 1, "first"))]
