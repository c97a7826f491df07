"""The server's socket: ROUTER with CURVE, admission by the roster, bounded in every direction.

The name of a sender comes from the CURVE key that its connection proved (ZAP ``User-Id``), never
from the routing id or the content of a frame.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from secure_fedprompt.protocol import chunks
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.address import Address
from secure_fedprompt.protocol.chunks import Assembler
from secure_fedprompt.protocol.errors import (
    CodecError,
    ConfigError,
    FloodError,
    KeyInUseError,
    PortInUseError,
    SecureFedPromptError,
    TrailingBytesError,
    UnknownVersionError,
)
from secure_fedprompt.protocol.keys import Identity, fingerprint
from secure_fedprompt.protocol.quota import RECORD, Quota
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.door import EVENTS, Door, room
from secure_fedprompt.server.routes import Heard, Routes

DOMAIN = "secure-fedprompt"
TWO = "two processes use this key at the same time, the later one must end: each has its own"
FLOOD = "more was sent than a round takes: what comes is not read for some minutes"
BURST = 1 << 20  # bytes beside what rounds take, of each member
READ = 64  # chunks of a connection that wait to be read
MUTED = 300.0  # seconds
DENIALS, DENIALS_IN = 20, 60.0  # refused keys that are told of, and in how many seconds


def _host(part: zmq.Frame) -> str:
    """The address that a frame came from."""
    return str(part.get("Peer-Address"))


class _Admission:
    """ZAP callback: a connection is admitted if its key is on the roster."""

    def __init__(self, names: dict[str, str], denied: Callable[[str, int], None]) -> None:
        self._names, self._denied = names, denied
        self._told, self._more = deque[float](maxlen=DENIALS), 0

    def callback(self, domain: str, key: bytes) -> bool:
        known, now = key.decode() in self._names, time.monotonic()
        if not known and len(self._told) == DENIALS and now - self._told[0] < DENIALS_IN:
            self._more += 1
        elif not known:
            self._told.append(now)
            self._denied(fingerprint(z85.decode(key)), self._more)
            self._more = 0
        return known


class CurveHub:
    """Frames from and to authenticated members; a ``transport.Hub``.

    Args:
        bind: ZeroMQ address; port ``*`` picks a free one, see ``address``.
        identity, roster: the server's key and who may connect.
        denied: called, from the authenticator's thread, with the fingerprint of a refused key, and
            how many others were refused since it was called before; now and then only.
        own: called with each frame that the hub sends of its own accord, before it is sent.

    Raises:
        PortInUseError: the address is taken; ConfigError: it is not an address.
    """

    def __init__(
        self,
        bind: str,
        identity: Identity,
        roster: Roster,
        denied: Callable[[str, int], None] = lambda key, more: None,
        own: Callable[[str, Frame], None] = lambda name, frame: None,
    ) -> None:
        where = Address.parse("bind", bind)
        self._names = {z85.encode(member.curve).decode(): member.name for member in roster.members}
        self._routes = Routes()
        self._coming: dict[str, Assembler] = {}
        self._hosts: dict[str, str] = {}
        self._quotas = {m.name: Quota(BURST, time.monotonic()) for m in roster.members}
        self._muted: dict[str, float] = {}
        self._own = own
        self.context = zmq.Context()
        self._zap = ThreadAuthenticator(self.context)
        self._zap.start()
        self._zap.configure_curve_callback(DOMAIN, _Admission(self._names, denied))
        self._socket = self.context.socket(zmq.ROUTER)
        self._socket.linger = 2000
        self._socket.ipv6 = where.ipv6
        self._socket.zap_domain = DOMAIN.encode()
        self._socket.curve_server = True
        self._socket.curve_secretkey = z85.encode(identity.curve.private_bytes_raw())
        self._socket.router_mandatory = True
        self._socket.maxmsgsize = chunks.LIMIT
        self._socket.rcvhwm, self._socket.sndhwm = READ, chunks.QUEUE
        self._socket.heartbeat_ivl, self._socket.heartbeat_timeout = 2000, 10000
        self._socket.handshake_ivl = 5000
        self._door = Door(self._socket.get_monitor_socket(EVENTS), room(len(roster.members)))
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            if error.errno == zmq.EADDRINUSE:
                raise PortInUseError(
                    f"bind = {bind!r}: the port is in use; stop the other server or choose another"
                ) from None
            raise ConfigError(f"bind = {bind!r}: {error}; write tcp://ADDRESS:PORT") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def poll(self, timeout: float) -> Iterator[tuple[str, Frame]]:
        """Frames that arrive within ``timeout`` seconds."""
        if not self._socket.poll(int(timeout * 1000)):
            return
        for _ in range(256):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if len(parts) < 2:
                continue
            name, route = self._names[str(parts[1].get("User-Id"))], parts[0].bytes
            self._door.heard(int(parts[1].get(zmq.SRCFD)), name)
            if self._muted.get(name, 0.0) > time.monotonic():
                continue
            heard = self._routes.hear(name, route, time.monotonic())
            if heard is Heard.NEW:
                self._coming[name], self._hosts[name] = Assembler(), _host(parts[1])
            elif heard is Heard.TWICE:
                hosts = f"{_host(parts[1])} and {self._hosts[name]}"
                if self._refuse_rival(name, route):
                    yield name, Frame(b"", None, KeyInUseError(f"{TWO} (at {hosts})"))
                self._hosts[name] = _host(parts[1])
            if heard in (Heard.STALE, Heard.TWICE):
                continue
            if not self._quotas[name].spend(sum(map(len, parts[1:])) + RECORD, time.monotonic()):
                self._muted[name] = time.monotonic() + MUTED
                self._coming[name] = Assembler()
                self._tell(name, FloodError(f"{name}: {FLOOD}"))
                yield name, Frame(b"", None, FloodError(FLOOD))
                continue
            if len(parts) != 2:
                whole = b"".join(part.buffer for part in parts[1:])
                error = TrailingBytesError(f"a frame of {len(parts) - 1} parts")
                yield name, Frame(whole, None, error)
                continue
            try:
                data = self._coming[name].add(parts[1].buffer)
            except CodecError as refusal:
                yield name, Frame(parts[1].buffer, None, refusal)
                continue
            if data is not None:
                frame = Frame.read(data)
                if isinstance(frame.error, UnknownVersionError):
                    self._tell(name, frame.error)  # in our version, which alone says what is wrong
                yield name, frame

    def reaches(self, name: str) -> bool:
        return self._routes.of(name) is not None

    def _refuse_rival(self, name: str, route: bytes) -> bool:
        """Give a member back to the process that had it first, and tell the other one, if it is
        still there."""
        told = self._tell(name, KeyInUseError(f"{name}: {TWO}"))
        self._routes.settle(name, route)
        return told

    def _tell(self, name: str, error: SecureFedPromptError) -> bool:
        """Turn a member away without asking the run."""
        frame = Frame.of(m.Refused(type(error).__name__, str(error)))
        self._own(name, frame)
        return self.send(name, frame)

    def send(self, name: str, frame: Frame) -> bool:
        """Queue a frame; False if the member is not connected or does not keep up."""
        route = self._routes.of(name)
        if route is None:
            return False
        try:
            for chunk in chunks.split(frame.data):
                self._socket.send_multipart([route, chunk], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError:
            return False
        self._quotas[name].said(frame.message)
        return True

    def close(self) -> None:
        self._socket.disable_monitor()
        self._door.close()
        self._socket.close()
        self._zap.stop()
        self.context.term()
