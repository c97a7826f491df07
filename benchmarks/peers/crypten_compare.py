"""Comparisons under CrypTen, for the chapter "selection", in its own environment.

    python crypten_compare.py '{"size": 1000}' REPEAT

Two processes linked by its own launcher's means (gloo over loopback), its default provider of
correlated randomness: the first party deals it ("TFP"), so that party could open everything.
Secret-shared values in, a secret-shared result out; the result is checked. Prints samples of
milliseconds, after one that is not counted.

CrypTen 0.4.1 imports a module of ONNX export that newer releases of PyTorch no longer have; nothing
here exports anything, so an empty one stands in for it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from pathlib import Path

import pairs


def party(rank: int, ports: list[int], size: int, repeat: int, out: str) -> None:
    os.environ |= {
        "WORLD_SIZE": "2", "RANK": str(rank), "BACKEND": "gloo",
        "RENDEZVOUS": f"tcp://127.0.0.1:{ports[0]}",
    }  # fmt: skip
    import torch

    sys.modules["torch.onnx.symbolic_registry"] = types.ModuleType("symbolic_registry")
    import crypten

    torch.set_num_threads(1)
    crypten.init()
    a, b = (torch.randint(-(2**14), 2**14, (size,), generator=torch.Generator().manual_seed(k))
            .float() for k in (0, 1))  # fmt: skip
    left, right = (crypten.cryptensor(x, src=k) for k, x in enumerate((a, b)))
    seconds = []
    for _ in range(repeat + 1):
        crypten.communicator.get().barrier()
        begin = time.perf_counter()
        more = left > right
        seconds.append(time.perf_counter() - begin)
    assert torch.equal(more.get_plain_text().round() > 0, a > b)
    if rank == 0:
        Path(out).write_text(json.dumps(seconds[1:]))


if __name__ == "__main__":
    pairs.measured(party)
