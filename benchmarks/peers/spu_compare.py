"""Comparisons under SecretFlow SPU, for the chapter "selection", in its own environment.

    python spu_compare.py '{"size": 1000}' REPEAT

CHEETAH in FM32 under its own runtime, one process a party, linked over loopback; private 32-bit
words in, shares of the result out. Prints samples of milliseconds, after one that is not counted.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pairs


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


if __name__ == "__main__":
    pairs.measured(party)
