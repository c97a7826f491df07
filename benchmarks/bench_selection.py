"""Secure comparison and selection: two processes over loopback TCP, no dealer.

    python benchmarks/bench_selection.py --json benchmarks/results/selection.json
    python benchmarks/bench_selection.py --repeats 21 --peer-python venv-spu/bin/python

Ours: the garbler and evaluator of ``protocol/selection``, one process each, frames encoded as on
the wire. "cold" is the base transfers, once a session; a round's selection has a session of its
own, and does them while clients train. A comparison is of one private 32-bit word of each party;
after it both hold XOR shares of the result. A selection is that of a FedMGP round, from the shares
of the keys to the shares of the outcomes: 5 groups, 2 slots, text and visual. Bytes are those of
all frames between the two. Times are the evaluator's clock, medians with minimum and maximum.

SecretFlow SPU 0.9.5 (CHEETAH, FM32), where it can be installed: comparisons under its own runtime
of two processes (``--peer-python``: the Python of an environment that has spu and jax).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
import zmq

from secure_fedprompt.commands.demo_files import free_port
from secure_fedprompt.protocol.codec import Catalogue
from secure_fedprompt.protocol.selection import circuits, parties
from secure_fedprompt.protocol.selection.builder import Circuit
from secure_fedprompt.protocol.selection.parties import Evaluator, Garbler

FRAMES = Catalogue(parties.Offer, parties.Answer, parties.Choices, parties.Garbled)
SIZES = (10, 100, 1_000, 10_000)
CHUNK = 3334  # instances in one execution: working sets of a few MiB
GROUPS, SLOTS = 5, 2


def jobs() -> dict[str, tuple[Circuit, int]]:
    """Circuit and batch by name."""
    table = {f"compare {size}": (circuits.compare(), size) for size in SIZES}
    for clients in (10, 100):
        table[f"select client {clients}"] = circuits.top_s(GROUPS, SLOTS), 2 * clients
        many = circuits.fill_slots(clients, GROUPS, SLOTS * clients, SLOTS, 3)
        table[f"select federation {clients}"] = many, 2
    return table


def chunks(batch: int) -> list[slice]:
    return [slice(at, min(at + CHUNK, batch)) for at in range(0, batch, CHUNK)]


def inputs(bits: int, batch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((bits, batch)) < 0.5


class Wire:
    """Frames over a socket, counted. Without an address it binds a port of its own."""

    def __init__(self, address: str = "") -> None:
        self.socket = zmq.Context.instance().socket(zmq.PAIR)
        self.bytes, self.address = 0, address
        if address:
            self.socket.connect(address)
        else:
            port = self.socket.bind_to_random_port("tcp://127.0.0.1")
            self.address = f"tcp://127.0.0.1:{port}"

    def send(self, frame: Any) -> None:
        data = FRAMES.encode(frame)
        self.bytes += len(data)
        self.socket.send(data, copy=False)

    def receive(self) -> Any:
        data = self.socket.recv(copy=False).buffer
        self.bytes += len(data)
        return FRAMES.decode(data)


def garbler(address: str, repeats: int) -> None:
    """The other process."""
    wire = Wire(address)
    for circuit, batch in jobs().values():
        ours = inputs(circuit.garbler_bits, batch, 0)
        for _ in range(repeats):
            offer = wire.receive()
            one = Garbler(offer.session, os.urandom)
            wire.send(one.answer(offer))
            for part in chunks(batch):
                tables, shares = one.garble(circuit, ours[:, part], wire.receive())
                wire.send(tables)
                wire.socket.send(np.packbits(shares).tobytes())  # opened, to check the result


def measure(wire: Wire, circuit: Circuit, batch: int, repeats: int) -> dict[str, Any]:
    theirs = inputs(circuit.evaluator_bits, batch, 1)
    expected = circuit.evaluate(inputs(circuit.garbler_bits, batch, 0), theirs)
    cold, warm, sizes = [], [], []
    for _ in range(repeats):
        wire.bytes, begin = 0, time.perf_counter()
        other = Evaluator(os.urandom(32), os.urandom)
        wire.send(other.offer())
        other.accept(wire.receive())
        middle, first = time.perf_counter(), wire.bytes
        for part in chunks(batch):
            wire.send(other.choose(circuit, theirs[:, part]))
        found, opened = [], []
        for _ in chunks(batch):
            found.append(other.evaluate(wire.receive()))
            packed = np.frombuffer(wire.socket.recv(), np.uint8)
            count = found[-1].size
            opened.append(np.unpackbits(packed, count=count).reshape(found[-1].shape).astype(bool))
        warm.append(time.perf_counter() - middle)
        cold.append(middle - begin)
        sizes.append(wire.bytes - first)
        got = np.concatenate([f ^ o for f, o in zip(found, opened, strict=True)], axis=1)
        assert np.array_equal(got, expected)
    return {
        "cold_s": machine.spread(cold[1:]), "seconds": machine.spread(warm[1:]),
        "bytes": sizes[-1], "cold_bytes": first, "ands": circuit.ands, "depth": circuit.depth,
    }  # fmt: skip


SPU = """
import json, multiprocessing, sys, time
import numpy as np, jax.numpy as jnp
import spu, spu.libspu as libspu
import spu.api as api
import jax
from spu import intrinsic

def node(rank, ports, sizes, repeats, out):
    link = libspu.link
    desc = link.Desc()
    for i, port in enumerate(ports):
        desc.add_party("p%d" % i, "127.0.0.1:%d" % port)
    ctx = link.create_brpc(desc, rank)
    config = libspu.RuntimeConfig(protocol=libspu.ProtocolKind.CHEETAH, field=libspu.FieldType.FM32)
    runtime, io = api.Runtime(ctx, config), api.Io(2, config)
    from spu.utils import frontend
    result = {}
    for size in sizes:
        x = np.random.default_rng(0).integers(-2**20, 2**20, size).astype(np.int32)
        y = np.random.default_rng(1).integers(-2**20, 2**20, size).astype(np.int32)
        exe, _ = frontend.compile(
            frontend.Kind.JAX, lambda a, b: a > b, (x, y), {}, ["a", "b"],
            [libspu.Visibility.VIS_SECRET] * 2, lambda flat: ["o%d" % i for i in range(len(flat))])
        runtime.set_var("a", io.make_shares(x, libspu.Visibility.VIS_SECRET)[rank])
        runtime.set_var("b", io.make_shares(y, libspu.Visibility.VIS_SECRET)[rank])
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            runtime.run(exe)
            times.append(time.perf_counter() - begin)
        result[str(size)] = times[1:]
    if rank == 0:
        open(out, "w").write(json.dumps(result))

if __name__ == "__main__":
    sizes, repeats, ports, out = json.loads(sys.argv[1])
    args = ports, sizes, repeats, out
    both = [multiprocessing.Process(target=node, args=(r, *args)) for r in (0, 1)]
    [p.start() for p in both]
    [p.join(600) for p in both]
"""


def peer(python: str, repeats: int) -> dict[str, Any]:
    """SPU's times by batch size, or an empty table with the reason printed."""
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder, "peer.py"), Path(folder, "out.json")
        script.write_text(SPU)
        ports = [free_port() for _ in range(2)]
        words = [python, str(script), json.dumps([SIZES, repeats, ports, str(out)])]
        done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
        if not out.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"SPU did not run: {reason}")
            return {}
        return {k: machine.spread(v) for k, v in json.loads(out.read_text()).items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=11, help="the first one is left out")
    parser.add_argument("--peer-python", default="", help="Python that has spu==0.9.5 and jax")
    parser.add_argument("--garbler", default="", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.garbler:
        garbler(args.garbler, args.repeats)
        return 0
    wire = Wire()
    words = [sys.executable, __file__, "--garbler", wire.address, "--repeats", str(args.repeats)]
    rows: dict[str, Any] = {}
    with subprocess.Popen(words) as other:
        for name, (circuit, batch) in jobs().items():
            rows[name] = row = measure(wire, circuit, batch, args.repeats)
            s, size = row["seconds"], int(name.split()[-1])
            rate = f"{size / s['median'] / 1000:6.1f}k/s  {row['bytes'] / size:6.0f} B each"
            print(
                f"{name:22} {1e3 * s['median']:8.2f} ms ({1e3 * s['min']:.2f} to "
                f"{1e3 * s['max']:.2f})  {rate if name.startswith('compare') else ''}  "
                f"{row['bytes']} bytes; cold {1e3 * row['cold_s']['median']:.0f} ms, "
                f"{row['cold_bytes']} bytes", flush=True,
            )  # fmt: skip
        other.wait()
    found = peer(args.peer_python, args.repeats) if args.peer_python else {}
    for size, s in found.items():
        ours = rows[f"compare {size}"]["seconds"]["median"]
        print(
            f"SPU compare {size:>8} {1e3 * s['median']:8.2f} ms, "
            f"{int(size) / s['median'] / 1000:.1f}k/s; ratio {s['median'] / ours:.2f}"
        )
    if args.json:
        content = {"machine": machine.describe(), "rows": rows, "spu": found}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
