"""Addresses, families, hosts that nobody knows, and connections that are missed."""

from __future__ import annotations

import re
import socket
import time
from contextlib import closing

import pytest
from rounds import (
    identity,
    roster,
)

from secure_fedprompt.clients import link as link_module
from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.address import Address
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.hub import CurveHub


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("tcp://a.example:5570", "a.example", 5570), ("tcp://[::1]:5571", "::1", 5571),
     ("tcp://[fe80::1%eth0]:1", "fe80::1%eth0", 1), ("tcp://*:*", "*", None)],
)  # fmt: skip
def test_addresses_are_read(text: str, host: str, port: int | None) -> None:
    assert Address.parse("server", text) == Address(host, port)


@pytest.mark.parametrize(
    "text", ["tcp://::1:5570", "tcp://a", "udp://a:1", "tcp://a:0", "tcp://a:65536", "tcp://a b:1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"^server = {re.escape(repr(text))}"):
        Address.parse("server", text)


def test_servers_and_clients_speak_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        served = CurveHub("tcp://[::1]:*", identity("server"), roster(4))
    except errors.ConfigError:
        pytest.skip("this machine has no IPv6 loopback")
    with closing(served):
        key = identity("server").curve_public()
        with closing(CurveLink(served.address, key, identity("c001"), 10.0)) as link:
            link.connect()
            link.send(Frame.of(m.Alive()))
            assert [name for name, _ in served.poll(10.0)] == ["c001"]


def test_a_host_that_nobody_knows_is_not_called_unreachable() -> None:
    link = CurveLink("tcp://no.such.host.invalid:5570", identity("server").curve_public(),
                     identity("c001"), 60.0)  # fmt: skip
    with closing(link), pytest.raises(errors.UnreachableError, match="no such host as no.such"):
        link.connect()


def test_a_missing_connection_is_told_once_and_its_return_too() -> None:
    """A server that starts after its client: nobody need do anything."""
    told: list[str] = []
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    key = identity("server").curve_public()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(link_module, "_MISSED", 0.3)
        link = CurveLink(address, key, identity("c001"), 60.0, told.append)
        with closing(link):
            until = time.monotonic() + 20
            while not told:
                assert time.monotonic() < until
                link.receive(0.1)
            with closing(CurveHub(address, identity("server"), roster(4))):
                link.connect()
                link.receive(0.5)
            while len(told) < 3:  # lost once more
                assert time.monotonic() < until + 20
                link.receive(0.1)
    lost = f"no connection to {address}: trying again, for 60 s in all"
    assert told == [lost, f"connected to {address} again", lost]
