"""A client's socket: DEALER with CURVE, and a diagnosis when no connection comes about.

Three failures look alike to a user and are told apart by the socket monitor: the server answers
the handshake with ZAP status 400 (our key is not on its roster), the handshake breaks off again
and again without detail (most likely the server key on our roster is wrong), or nothing answers.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from secure_fedprompt.protocol import chunks
from secure_fedprompt.protocol.address import Address
from secure_fedprompt.protocol.errors import (
    CodecError,
    ConfigError,
    FloodError,
    NotOnRosterError,
    UnreachableError,
    WrongServerKeyError,
)
from secure_fedprompt.protocol.keys import Identity, fingerprint
from secure_fedprompt.protocol.quota import RECORD, Quota
from secure_fedprompt.protocol.transport import Frame

_HANDSHAKE_TRIES = 3
_MISSED = 5.0  # seconds without a connection until somebody is told
BURST = 1 << 26  # bytes beside what rounds take: a starting prompt, what a restart missed


def _families(where: Address) -> set[int]:
    """Kinds of address that a host has: none, if its name is not known here."""
    with contextlib.suppress(OSError):
        return {int(row[0]) for row in socket.getaddrinfo(where.host, where.port)}
    return set()


class CurveLink:
    """A connection to one server; a ``transport.Link``.

    Args:
        address: tcp://HOST:PORT.
        server_key: the server's CURVE public key, 32 bytes, from the roster.
        identity: our keys.
        patience: seconds without a connection after which ``receive`` gives up.
        notice: told when a connection is missed, and when it is back.

    Attributes:
        connections: completed handshakes; it grows when the link was lost and came back.
    """

    def __init__(
        self,
        address: str,
        server_key: bytes,
        identity: Identity,
        patience: float = 60.0,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.address, self.patience, self._notice = address, patience, notice
        self._told = False  # that there is no connection
        self._key = fingerprint(identity.curve_public())
        self._where = Address.parse("server", address)
        self.connections = 0
        self._broken = 0
        self._down_since: float | None = time.monotonic()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 3000
        self._socket.ipv6 = self._where.ipv6 or _families(self._where) == {socket.AF_INET6}
        self._socket.curve_serverkey = z85.encode(server_key)
        self._socket.curve_publickey = z85.encode(identity.curve_public())
        self._socket.curve_secretkey = z85.encode(identity.curve.private_bytes_raw())
        self._socket.maxmsgsize = chunks.LIMIT
        self._socket.rcvhwm = self._socket.sndhwm = chunks.QUEUE
        self._socket.immediate = True  # what a lost connection did not carry is not for the next
        self._coming = chunks.Assembler()
        self._quota = Quota(BURST, time.monotonic())
        self._socket.heartbeat_ivl, self._socket.heartbeat_timeout = 2000, 10000
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 200, 3000
        self._monitor = self._socket.get_monitor_socket()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"server = {address!r}: {error}; write tcp://HOST:PORT") from None

    def connect(self) -> None:
        """Wait for the first handshake.

        Raises:
            UnreachableError, NotOnRosterError, WrongServerKeyError
        """
        if not _families(self._where):
            raise UnreachableError(
                f"server = {self.address!r}: no such host as {self._where.host}: check its name, "
                "and that this machine can look it up"
            )
        while not self.connections:
            self._poller.poll(200)
            self._watch()

    def send(self, frame: Frame) -> None:
        """Queue a frame; while the link is down it is dropped, since the round goes on anyway."""
        with contextlib.suppress(zmq.Again):
            for chunk in chunks.split(frame.data):
                self._socket.send(chunk, zmq.NOBLOCK, copy=False)
        self._quota.said(frame.message)

    def receive(self, timeout: float) -> Frame | None:
        """The next frame, or None after ``timeout`` seconds.

        Raises:
            LinkError: no connection for ``patience`` seconds, or refused on reconnection.
            FloodError: the server sends more than rounds take.
        """
        self._poller.poll(int(timeout * 1000))
        self._watch()
        data: bytes | memoryview | None = None
        while data is None:
            try:
                chunk = self._socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            if not self._quota.spend(len(chunk) + RECORD, time.monotonic()):
                raise FloodError(
                    f"server {self.address} sends more than its rounds take, as a flood that "
                    "pushes older records out of this client's audit log would: keep that log, "
                    "and ask who runs the server"
                )
            try:
                data = self._coming.add(chunk.buffer)
            except CodecError as error:
                return Frame(chunk.buffer, None, error)
        frame = Frame.read(data)
        self._quota.came(frame.message, data)
        return frame

    def _watch(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            match event["event"]:
                case zmq.Event.HANDSHAKE_SUCCEEDED:
                    self.connections += 1
                    self._broken, self._down_since = 0, None
                    if self._told:
                        self._told = False
                        self._notice(f"connected to {self.address} again")
                case zmq.Event.HANDSHAKE_FAILED_AUTH:
                    raise NotOnRosterError(
                        f"server {self.address} refuses our key {self._key} (status "
                        f"{event['value']}): it is not on the server's roster; have our entry "
                        "added there and restart it"
                    )
                case zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
                    self._broken += 1
                case zmq.Event.DISCONNECTED if self._down_since is None:
                    self._down_since = time.monotonic()
        if self._broken >= _HANDSHAKE_TRIES:
            raise WrongServerKeyError(
                f"server {self.address} breaks off the handshake: the server key on our roster is "
                "probably not this server's; compare the roster files"
            )
        down = 0.0 if self._down_since is None else time.monotonic() - self._down_since
        if down > min(_MISSED, self.patience) and not self._told:
            self._told = True
            self._notice(
                f"no connection to {self.address}: trying again, for {self.patience:g} s in all"
            )
        if down > self.patience:
            raise UnreachableError(
                f"server {self.address} is unreachable for {down:.0f} s: check the address, that "
                "the server runs, and the firewall"
            )

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()
        self._context.term()
