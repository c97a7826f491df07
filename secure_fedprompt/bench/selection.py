"""Secure comparison and selection: two processes over loopback TCP, no dealer.

Ours: the garbler and evaluator of ``protocol/selection``, one process each, frames encoded as on
the wire. "base" is the base transfers, once a session; a round's selection has a session of its
own, and does them while clients train. A comparison is of one private 32-bit word of each party;
after it both hold XOR shares of the result. A selection is that of a FedMGP round, from the shares
of the keys to the shares of the outcomes: m groups, 2 slots, text and visual. Bytes are those of
all frames between the two. Times are the evaluator's clock.

SecretFlow SPU: CHEETAH in FM32, its own runtime of two processes; bytes are not what it tells.
CrypTen: its arithmetic shares and its comparison, two processes, 64-bit ring, with randomness from
a dealer that both trust ("trusted first party"), which ours and SPU do without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from secure_fedprompt.bench.chapter import Case, Chapter, Column, Curve, Samples
from secure_fedprompt.protocol.codec import Catalogue
from secure_fedprompt.protocol.selection import circuits, parties
from secure_fedprompt.protocol.selection.builder import Circuit
from secure_fedprompt.protocol.selection.parties import Evaluator, Garbler

FRAMES = Catalogue(parties.Offer, parties.Answer, parties.Choices, parties.Garbled)
CHUNK = 3334  # instances in one execution: working sets of a few MiB
SLOTS = 2


def circuit_of(case: Case) -> tuple[Circuit, int]:
    """The circuit of a case, and how many instances of it."""
    size, groups = case["size"], case["groups"]
    if case["work"] == "compare":
        return circuits.compare(), size
    if case["work"] == "selection client":
        return circuits.top_s(groups, SLOTS), 2 * size
    return circuits.fill_slots(size, groups, SLOTS * size, SLOTS, 3), 2


def chunks(batch: int) -> list[slice]:
    return [slice(at, min(at + CHUNK, batch)) for at in range(0, batch, CHUNK)]


def inputs(bits: int, batch: int, seed: int) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random((bits, batch)) < 0.5


class Wire:
    """Frames over a socket, counted. Without an address it binds a port of its own."""

    def __init__(self, address: str = "") -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self.bytes, self.address = 0, address
        if address:
            self.socket.connect(address)
        else:
            port: int = self.socket.bind_to_random_port("tcp://127.0.0.1")
            self.address = f"tcp://127.0.0.1:{port}"

    def send(self, frame: Any) -> None:
        data = FRAMES.encode(frame)
        self.bytes += len(data)
        self.socket.send(data, copy=False)

    def receive(self) -> Any:
        data = self.socket.recv(copy=False).buffer
        self.bytes += len(data)
        return FRAMES.decode(data)


def garbler(address: str, case: Case, repeat: int) -> None:
    """The other process."""
    wire = Wire(address)
    circuit, batch = circuit_of(case)
    ours = inputs(circuit.garbler_bits, batch, 0)
    for _ in range(repeat):
        offer = wire.receive()
        one = Garbler(offer.session, os.urandom)
        wire.send(one.answer(offer))
        for part in chunks(batch):
            tables, shares = one.garble(circuit, ours[:, part], wire.receive())
            wire.send(tables)
            wire.socket.send(np.packbits(shares).tobytes())  # opened, to check the result


def measure(case: Case, repeat: int) -> Samples:
    """As the evaluator, after one that is not counted; every result is checked."""
    wire, (circuit, batch) = Wire(), circuit_of(case)
    words = [sys.executable, "-m", "secure_fedprompt.bench.selection", wire.address]
    words += [json.dumps(case), str(repeat + 1)]
    theirs = inputs(circuit.evaluator_bits, batch, 1)
    expected = circuit.evaluate(inputs(circuit.garbler_bits, batch, 0), theirs)
    found: dict[str, list[float]] = {k: [] for k in ("ms", "base_ms", "bytes", "base_bytes")}
    with subprocess.Popen(words) as other:
        for _ in range(repeat + 1):
            wire.bytes, begin = 0, time.perf_counter()
            party = Evaluator(os.urandom(32), os.urandom)
            wire.send(party.offer())
            party.accept(wire.receive())
            middle, first = time.perf_counter(), wire.bytes
            for part in chunks(batch):
                wire.send(party.choose(circuit, theirs[:, part]))
            shares, opened = [], []
            for _ in chunks(batch):
                shares.append(party.evaluate(wire.receive()))
                bits = np.unpackbits(np.frombuffer(wire.socket.recv(), np.uint8))
                opened.append(bits[: shares[-1].size].reshape(shares[-1].shape).astype(bool))
            found["ms"].append(1e3 * (time.perf_counter() - middle))
            found["base_ms"].append(1e3 * (middle - begin))
            found["bytes"].append(wire.bytes - first)
            found["base_bytes"].append(first)
            got = np.concatenate([a ^ b for a, b in zip(shares, opened, strict=True)], axis=1)
            assert np.array_equal(got, expected)
        other.wait(60)
    wire.socket.close()
    counted = {name: values[1:] for name, values in found.items()}
    sizes = counted.pop("bytes")
    return {
        **counted, "kb": [size / 1e3 for size in sizes],
        "bytes_each": [size / case["size"] for size in sizes],
        "thousand_a_second": [case["size"] / ms for ms in counted["ms"]],
    }  # fmt: skip


def cases(quick: bool) -> list[Case]:
    made = [("compare", size, 0) for size in (10, 1_000, 10_000)]
    made += [("selection client", 10, 5), ("selection federation", 10, 5)]
    if not quick:
        made += [("compare", 100, 0), ("compare", 100_000, 0)]
        made += [(f"selection {scope}", 100, 5) for scope in ("client", "federation")]
        made += [("selection federation", n, 5) for n in (20, 50)]
        made += [("selection federation", 10, m) for m in (3, 10, 20)]
    return [{"work": work, "size": size, "groups": m} for work, size, m in sorted(made)]


def limit(case: Case, known: Mapping[str, float]) -> float:
    """Half gates: four blocks of AES to garble an AND and two to evaluate it, in ms; whatever else
    is free."""
    circuit, batch = circuit_of(case)
    return circuit.ands * batch * 6 * 16 / known["aes_bytes_per_us"] / 1e3


def compares(case: Case) -> bool:
    return bool(case["work"] == "compare")


FEDERATION = {"work": "selection federation"}
CHAPTER = Chapter(
    name="selection",
    title="Secure comparison and selection",
    about=__doc__,
    keys={"work": "work", "size": "comparisons or clients", "groups": "m"},
    columns=(
        Column("ms", "ms"), Column("thousand_a_second", "thousand a second", 3, less=False),
        Column("kb", "kB", 4), Column("bytes_each", "bytes each", 4),
        Column("base_ms", "base transfers, ms"), Column("base_bytes", "their bytes", 4),
    ),
    cases=cases,
    measure=measure,
    repeat=15,
    curves=(
        Curve("comparisons", "size", "ms", {"work": "compare"}, limit),
        Curve("selection by n", "size", "ms", {**FEDERATION, "groups": 5}, limit),
        Curve("selection by m", "groups", "ms", {**FEDERATION, "size": 10}, limit),
    ),
    peers={"spu": compares, "crypten": compares},
)  # fmt: skip


if __name__ == "__main__":
    garbler(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
