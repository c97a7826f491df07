"""Comparisons under SecretFlow SPU, for the chapter "selection", in its own environment.

    python spu_compare.py '{"size": 1000}' REPEAT

CHEETAH in FM32 under its own runtime, one process a party, linked over loopback; private 32-bit
words in, shares of the result out. Prints samples of milliseconds, after one that is not counted.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def party(rank: int, ports: list[int], size: int, repeat: int, out: str) -> None:
    from spu import api, libspu
    from spu.utils import frontend

    link = libspu.link.Desc()
    for i, port in enumerate(ports):
        link.add_party(f"p{i}", f"127.0.0.1:{port}")
    context = libspu.link.create_brpc(link, rank)
    config = libspu.RuntimeConfig(protocol=libspu.ProtocolKind.CHEETAH, field=libspu.FieldType.FM32)
    runtime, io = api.Runtime(context, config), api.Io(2, config)
    secret = libspu.Visibility.VIS_SECRET
    words = [
        np.random.default_rng(k).integers(-(2**20), 2**20, size).astype(np.int32) for k in (0, 1)
    ]
    program, _ = frontend.compile(
        frontend.Kind.JAX, lambda a, b: a > b, tuple(words), {}, ["a", "b"], [secret] * 2,
        lambda flat: [f"o{i}" for i in range(len(flat))],
    )  # fmt: skip
    for name, own in zip("ab", words, strict=True):
        runtime.set_var(name, io.make_shares(own, secret)[rank])
    seconds = []
    for _ in range(repeat + 1):
        begin = time.perf_counter()
        runtime.run(program)
        seconds.append(time.perf_counter() - begin)
    if rank == 0:
        Path(out).write_text(json.dumps(seconds[1:]))


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def main() -> None:
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


if __name__ == "__main__":
    main()
