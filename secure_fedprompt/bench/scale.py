"""A masked round of thousands of clients on one machine: seconds, memory, and how both grow.

All parties are there, with the machines, keys, signatures and frames of the real programs: the
server in one process, the clients in two others. Seconds are of the wall, from the plan to the
checked sum. A process decodes a broadcast once, and checks no signature twice; what a client costs
by itself is measured on some that go through what they were sent once more, afterwards, in new
processes of their own. Sockets, training and the disk are not in it. Dropped clients vanish before
their upload, and the sum is held against the inputs.

Flower: its SecAgg+ with as many neighbours and the same threshold, records as its transport would
carry them, all of it in one process without network; its legacy API, the only one that has it. It
has no signatures, no list that clients agree on and no checked sum, and mask seeds of 32 bits.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from secure_fedprompt.bench import masking, metered
from secure_fedprompt.bench.chapter import Case, Chapter, Column, Curve, Samples
from secure_fedprompt.clients.sum_key import SumKey
from secure_fedprompt.protocol import keys as signatures
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol import rolls
from secure_fedprompt.protocol.expand import Stream
from secure_fedprompt.protocol.layout import Values
from secure_fedprompt.protocol.masking import choose_degree, neighbourhoods
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.server.rounds.base import Deadlines, Stage
from secure_fedprompt.server.rounds.masks import MaskedRound

WORKERS = 2
SPAWN = mp.get_context("spawn")  # the driver begins with nothing of ours in its memory
FORK = mp.get_context("fork")  # and hands what it has to the clients' processes
FRAMES = 128  # in one message to a worker
ALONE = 5  # clients that are measured by themselves, with random bytes that come again
COUNTED = ("seen", "correct", "loss")
Frames = list[tuple[str, bytes]]


@dataclass
class Report:
    """Of a worker at the end, by client."""

    cpu: dict[str, float]
    up: dict[str, int]
    down: dict[str, int]
    opened: int
    wrong: float  # largest difference of the opened sum from the inputs
    megabytes: float


def megabytes() -> float:
    """The most that this process has used. (``getrusage`` would count its parent's as well.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def crowd_of(
    keys: metered.Keys, secret: bytes, dim: int, gone: frozenset[str], entropy: Entropy
) -> metered.Crowd:
    """Clients that hold the sum key and know their roster, as after a round or more."""
    values: Values = {"ctx": masking.update_of(dim), **dict.fromkeys(COUNTED, np.float64(64))}
    parties, shared = metered.parties_of(keys, entropy), SumKey(secret)
    assert keys[1].clients == keys[1].by_name.keys()
    for party in parties.values():
        party.keyring.sums = shared
    return metered.Crowd(parties, values, 1.0, gone, np.zeros(dim, np.float32))


def work(
    pipe: Connection, keys: metered.Keys, secret: bytes, dim: int, gone: frozenset[str],
    survivors: int,
) -> None:  # fmt: skip
    """A worker's clients, until the driver asks for the report."""
    signatures.remember_signatures()
    alone = next(iter(keys[0])) if len(keys[0]) == 1 else ""
    crowd = crowd_of(keys, secret, dim, gone, again(alone) if alone else os.urandom)
    pipe.send("ready")
    while (frames := pipe.recv()) is not None:
        pipe.send([(name, out) for name, frame in frames for out in crowd.take(name, frame)])
    meter = crowd.meter
    wrong = (
        np.abs(meter.sum["ctx"] - survivors * masking.update_of(dim)).max() if meter.opened else 0.0
    )
    cpu = {name: meter.total(name) for name in keys[0]}
    pipe.send(Report(cpu, meter.up, meter.down, meter.opened, float(wrong), megabytes()))


def again(name: str) -> Entropy:
    """Random bytes of a client that can be had again: for measuring, never for keys in use."""
    read = Stream(name.encode().ljust(32)).read
    return lambda size: read(size).tobytes()


def replay(
    pipe: Connection, name: str, keys: metered.Keys, secret: bytes, dim: int, frames: list[bytes]
) -> None:
    """A client's round, five times, each as if nothing of it were known but the code."""
    found, own = list[float](), ({name: keys[0][name]}, keys[1])
    for _ in range(5):
        for cached in (rolls.unpack, m._members_of, neighbourhoods, signatures._public_key):
            cached.cache_clear()
        rolls._RECENT.clear()
        crowd = crowd_of(own, secret, dim, frozenset(), again(name))
        for frame in frames:
            crowd.take(name, bytes(bytearray(frame)))
        assert crowd.meter.opened == 1
        found.append(crowd.meter.total(name))
    pipe.send(found[1:])


class Workers:
    """Clients in processes of their own; the first ones have one each."""

    def __init__(
        self, keys: metered.Keys, secret: bytes, dim: int, gone: frozenset[str], count: int,
    ) -> None:  # fmt: skip
        names = list(keys[0])
        self._keys, self._secret, self._dim = keys, secret, dim
        alone = [name for name in names if name not in gone][:ALONE]
        self.told: dict[str, list[bytes]] = {name: [] for name in alone}
        rest = [name for name in names if name not in self.told]
        groups = [*([name] for name in alone), *(rest[i::count] for i in range(count))]
        self.of = {name: i for i, group in enumerate(groups) for name in group}
        self.pipes = list[Connection]()
        for group in groups:
            ours, theirs = FORK.Pipe()
            own = {name: keys[0][name] for name in group}, keys[1]
            args = theirs, own, secret, dim, gone, len(names) - len(gone)
            FORK.Process(target=work, args=args, daemon=True).start()
            self.pipes.append(ours)
        for pipe in self.pipes:
            assert pipe.recv() == "ready"

    def alone(self, name: str) -> list[float]:
        """CPU seconds of a client that is told the same once more, in a new process."""
        ours, theirs = FORK.Pipe()
        args = theirs, name, self._keys, self._secret, self._dim, self.told[name]
        FORK.Process(target=replay, args=args, daemon=True).start()
        found: list[float] = ours.recv()
        return found

    def run(self, server: MaskedRound) -> float:
        """A round; CPU seconds of the server."""
        waiting = [deque[tuple[str, bytes]]() for _ in self.pipes]
        busy, spent = set[Connection](), 0.0

        def post(out: list[tuple[str, m.Message]]) -> None:
            for name, message in out:
                frame = m.CATALOGUE.encode(message)
                waiting[self.of[name]].append((name, frame))
                if name in self.told:
                    self.told[name].append(frame)

        begin = time.process_time()
        post(server.start(0.0))
        spent += time.process_time() - begin
        while True:
            for pipe, frames in zip(self.pipes, waiting, strict=True):
                if frames and pipe not in busy:
                    pipe.send([frames.popleft() for _ in range(min(FRAMES, len(frames)))])
                    busy.add(pipe)
            if not busy:
                if server.over:
                    return spent
                begin = time.process_time()
                post(server.tick(server.deadline))
                spent += time.process_time() - begin
            for ready in wait(list(busy)) if busy else ():
                assert isinstance(ready, Connection)
                replies: Frames = ready.recv()
                busy.discard(ready)
                begin = time.process_time()
                for name, frame in replies:
                    post(server.on(name, m.CATALOGUE.decode(frame), 0.0))
                spent += time.process_time() - begin

    def reports(self) -> list[Report]:
        for pipe in self.pipes:
            pipe.send(None)
        return [pipe.recv() for pipe in self.pipes]


def drive(pipe: Connection, case: Case) -> None:
    """A round of everybody, as the server's process."""
    keys = metered.federation(case["clients"])
    identities, roster = keys
    n, dim, key = len(identities), case["values"], SumKey.make(os.urandom)
    plan = masking.make_plan(n, dim, 32, "regular", roster, key, case["corruption"])
    gone = frozenset(list(identities)[n - round(case["dropped"] * n) :])
    crowd = Workers(keys, key.to_bytes(), dim, gone, WORKERS)
    server = MaskedRound(plan, b"", roster, Deadlines(1, 1))
    begin = time.perf_counter()
    cpu = crowd.run(server)
    wall = time.perf_counter() - begin
    assert server.stage is Stage.DONE, server.reason
    reports = crowd.reports()
    pipe.send({
        "wall_s": [wall], "server_cpu_s": [cpu],
        "clients_cpu_s": [checked(plan, reports, n - len(gone))],
        "cpu_s": [cpu + sum(sum(r.cpu.values()) for r in reports)],
        **alone_of(plan, crowd, reports),
        "megabytes": [megabytes() + sum(r.megabytes for r in reports)],
        "neighbours": [plan.degree], "threshold": [plan.threshold],
    })  # fmt: skip


def measure(case: Case, repeat: int) -> Samples:
    """One round; several of a client by itself."""
    ours, theirs = SPAWN.Pipe()
    driver = SPAWN.Process(target=drive, args=(theirs, case))
    driver.start()
    theirs.close()
    try:
        found: Samples = ours.recv()
    except EOFError:
        raise RuntimeError("the driver of the round ended without figures") from None
    finally:
        driver.join()
    return found


def checked(plan: RoundPlan, reports: list[Report], survivors: int) -> float:
    """The clients' CPU seconds; everybody opened the sum, and it is the sum."""
    step = 2.0 ** -plan.layout[0].frac
    assert sum(r.opened for r in reports) == survivors
    assert all(r.wrong <= survivors * step for r in reports)
    return sum(sum(r.cpu.values()) for r in reports)


def alone_of(plan: RoundPlan, crowd: Workers, reports: list[Report]) -> dict[str, list[float]]:
    """What a client costs that remembers nothing, vectors apart: one up, one down."""
    vector = 4 * sum(field.size for field in plan.layout)
    own = [(name, reports[crowd.of[name]]) for name in crowd.told]
    return {
        "client_ms": [1e3 * found for name in crowd.told for found in crowd.alone(name)],
        "bytes_besides": [float(r.up[name] + r.down[name] - 2 * vector) for name, r in own],
    }


def cases(quick: bool) -> list[Case]:
    keys = ("clients", "values", "dropped", "corruption")
    table = [(100, 8_192, 0.1, 0.1), (250, 8_192, 0.1, 0.1), (500, 8_192, 0.1, 0.1)]
    if not quick:
        table += [(n, 8_192, 0.1, 0.1) for n in (1_000, 2_000, 5_000, 10_000)]
        table += [(1_000, 8_192, 0.1, 0.33)]
        table += [(100, d, 0.1, 0.1) for d in (65_536, 524_288)]
        table += [(100, 8_192, share, 0.1) for share in (0.0, 0.2)]
    return [dict(zip(keys, row, strict=True)) for row in sorted(table)]


def flower_runs(case: Case) -> bool:
    return bool(case["clients"] <= 250 and case["corruption"] == 0.1 and case["dropped"] <= 0.1)


def shares_of(case: Case) -> tuple[int, int]:
    """Neighbours and threshold of our round, for whoever runs the same."""
    return choose_degree(case["clients"], dropout=0.1, corruption=case["corruption"])


def limit(case: Case, known: Mapping[str, float]) -> float:
    """Of all clients, in seconds: two agreements and a signature to check for each neighbour, a
    signature for each of the broadcast lists to check, masks for neighbours and one's own."""
    n, (k, _) = case["clients"], shares_of(case)
    each = 2 * known["x25519_us"] + known["ed25519_verify_us"]
    mask = 4 * case["values"] / known["aes_bytes_per_us"]
    return float(n * (1 - case["dropped"]) * (k * each + (k + 1) * mask)) / 1e6


FAMILY = {"values": 8_192, "dropped": 0.1, "corruption": 0.1}
CHAPTER = Chapter(
    name="scale",
    title="Thousands of clients on a k-regular graph",
    about=__doc__,
    keys={"clients": "clients", "values": "values", "dropped": "dropped",
          "corruption": "colluding"},
    columns=(
        Column("wall_s", "seconds"), Column("server_cpu_s", "server CPU, s"),
        Column("clients_cpu_s", "clients' CPU, s"), Column("cpu_s", "all CPU, s"),
        Column("client_ms", "a client alone, ms CPU"),
        Column("bytes_besides", "its bytes beside vectors", 4), Column("megabytes", "MB"),
        Column("neighbours", "k", 2, less=None), Column("threshold", "t", 2, less=None),
    ),
    cases=cases,
    measure=measure,
    repeat=1,
    curves=(
        Curve("round by n", "clients", "wall_s", FAMILY),
        Curve("clients by n", "clients", "clients_cpu_s", FAMILY, limit),
        Curve("server by n", "clients", "server_cpu_s", FAMILY),
    ),
    peers={"flower": flower_runs},
)  # fmt: skip
