"""Connections that nobody has spoken on yet: some at a time, the oldest go first.

Before a handshake is over, nothing is known of a peer but that it holds a file handle and a buffer
of the server's. Strangers who open many would take all handles of the process, and it could write
no file any more. A member speaks as soon as its handshake is done: it is never the oldest for long.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import OrderedDict, deque

import zmq
from zmq.utils.monitor import recv_monitor_message

STRANGERS = 256  # connections without a word
EACH = 4  # connections of one member: a lost one, and a copy of its key elsewhere
SOON = 2.0  # seconds in which a connection is told of here after its first frame was read
HANDLES = 1024  # of the process beside connections: files, and floods while it is busy
_GONE = zmq.Event.DISCONNECTED | zmq.Event.CLOSED
EVENTS = zmq.Event.ACCEPTED | _GONE | zmq.Event.MONITOR_STOPPED


def room(members: int) -> int:
    """How many may be silent: all members come back at once when a server was restarted."""
    return max(STRANGERS, 2 * members)


def bound_handles(members: int) -> None:
    """Let the process open as many files as its connections need, and no more."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = EACH * members + room(members) + HANDLES
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Door:
    """Watches the connections of a socket, in a thread of its own.

    Args:
        monitor: the socket's, of EVENTS.
        strangers: how many may be silent.
    """

    def __init__(self, monitor: zmq.Socket[bytes], strangers: int) -> None:
        self._monitor, self._strangers = monitor, strangers
        self._silent: OrderedDict[int, None] = OrderedDict()
        self._speaker: dict[int, str] = {}
        self._lines: dict[str, deque[int]] = {}
        self._early: dict[int, tuple[str, float]] = {}  # heard before we were told of them, when
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="door", daemon=True)
        self._thread.start()

    def heard(self, handle: int, name: str) -> None:
        """A member has spoken on a connection."""
        if self._speaker.get(handle) == name:
            return
        with self._lock:
            if handle in self._silent or handle in self._speaker:
                self._forget(handle)
                self._speaks(handle, name)
            else:  # gone meanwhile, or not told of yet
                self._early[handle] = name, time.monotonic()

    def _speaks(self, handle: int, name: str) -> None:
        self._speaker[handle] = name
        lines = self._lines.setdefault(name, deque())
        lines.append(handle)
        if len(lines) > EACH:
            oldest = lines[0]
            self._forget(oldest)
            _shut(oldest)

    def _watch(self) -> None:
        while True:
            event = recv_monitor_message(self._monitor)
            kind, handle = event["event"], int(event["value"])
            if kind == zmq.Event.MONITOR_STOPPED:
                return
            with self._lock:
                if kind == zmq.Event.ACCEPTED:
                    self._come(handle)
                elif kind & _GONE:
                    self._forget(handle)

    def _come(self, handle: int) -> None:
        self._forget(handle)
        name, at = self._early.pop(handle, ("", 0.0))
        if name and time.monotonic() < at + SOON:
            self._speaks(handle, name)
            return
        self._silent[handle] = None
        if len(self._silent) > self._strangers:
            _shut(self._silent.popitem(last=False)[0])

    def _forget(self, handle: int) -> None:
        self._silent.pop(handle, None)
        if (name := self._speaker.pop(handle, None)) is not None:
            self._lines[name].remove(handle)

    def close(self) -> None:
        """After the socket's ``disable_monitor``."""
        self._thread.join()
        self._monitor.close(0)


def _shut(handle: int) -> None:
    """End a connection; the socket's own thread finds it closed and cleans up."""
    with contextlib.suppress(OSError):  # it is gone already
        line = socket.socket(fileno=handle)
        try:
            line.shutdown(socket.SHUT_RDWR)
        finally:
            line.detach()
