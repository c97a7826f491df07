"""Two parties of a comparison, a process each on loopback: for the scripts beside this one."""

from __future__ import annotations

import json
import multiprocessing
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

Party = Callable[[int, list[int], int, int, str], None]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def measured(party: Party) -> None:
    """Run both as the command line says, and print samples.

    Args:
        party: called with its rank, two free ports, how many comparisons, how many repetitions, and
            the path where the first one writes its seconds as JSON.
    """
    size, repeat = json.loads(sys.argv[1])["size"], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        args = free_ports(2), size, repeat, str(out)
        both = [multiprocessing.Process(target=party, args=(rank, *args)) for rank in (0, 1)]
        for one in both:
            one.start()
        for one in both:
            one.join(600)
        seconds = json.loads(out.read_text())
    print(json.dumps({
        "ms": [1e3 * s for s in seconds], "thousand_a_second": [size / s / 1e3 for s in seconds],
    }))  # fmt: skip
