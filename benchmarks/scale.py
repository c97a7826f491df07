"""A masked round of thousands of clients on one machine: seconds, memory, and how both grow.

    python benchmarks/scale.py                                  # 250 to 4,000 clients
    python benchmarks/scale.py --clients 1000 --clients 10000 --json out.json
    python benchmarks/scale.py --clients 1000 --corruption 0.33
    python benchmarks/scale.py --clients 100 --dim 8192 --dim 65536 --peer-python venv/bin/python

All parties are there, with the machines, keys, signatures and frames of the real programs: the
server in this process, the clients in ``--workers`` others. Seconds are of the wall, from the plan
to the checked sum. A process decodes a broadcast once, and checks no signature twice; what a client
costs by itself is measured on some that go through what they were sent once more, afterwards, in
new processes of their own.
Sockets, training and the disk are not in it. Dropped clients vanish before their upload, and the
sum is held against the inputs. Ends with the exponent of n that fits the seconds best.

``--peer-python`` is the Python of an environment that has Flower (``pip install
"flwr[simulation]"``): its SecAgg+ then runs with as many neighbours and the same threshold, all of
it in one process (``flower_secagg.py``). It has no signatures, no checked sums and 32-bit seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import os
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import bench_masking
import machine
import metered
import numpy as np

from secure_fedprompt.clients.sum_key import SumKey
from secure_fedprompt.protocol import keys as signatures
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol import rolls
from secure_fedprompt.protocol.expand import Stream
from secure_fedprompt.protocol.layout import Values
from secure_fedprompt.protocol.masking import neighbourhoods
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.shamir import Entropy
from secure_fedprompt.server.rounds.base import Deadlines, Stage
from secure_fedprompt.server.rounds.masks import MaskedRound

CPU = "server_cpu_s", "clients_cpu_s"
FRAMES = 128  # in one message to a worker
ALONE = 5  # clients that are measured by themselves, with random bytes that come again
COUNTED = ("seen", "correct", "loss")
Frames = list[tuple[str, bytes]]


def update_of(dim: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.05, dim)


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
    """The most that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def crowd_of(
    keys: metered.Keys, secret: bytes, dim: int, gone: frozenset[str], entropy: Entropy
) -> metered.Crowd:
    """Clients that hold the sum key and know their roster, as after a round or more."""
    values: Values = {"ctx": update_of(dim), **dict.fromkeys(COUNTED, np.float64(64))}
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
    while (frames := pipe.recv()) is not None:
        pipe.send([(name, out) for name, frame in frames for out in crowd.take(name, frame)])
    meter = crowd.meter
    wrong = np.abs(meter.sum["ctx"] - survivors * update_of(dim)).max() if meter.opened else 0.0
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
            ours, theirs = mp.Pipe()
            own = {name: keys[0][name] for name in group}, keys[1]
            args = theirs, own, secret, dim, gone, len(names) - len(gone)
            mp.Process(target=work, args=args, daemon=True).start()
            self.pipes.append(ours)

    def alone(self, name: str) -> list[float]:
        """CPU seconds of a client that is told the same once more, in a new process."""
        ours, theirs = mp.Pipe()
        args = theirs, name, self._keys, self._secret, self._dim, self.told[name]
        mp.Process(target=replay, args=args, daemon=True).start()
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
            for pipe in wait(list(busy)) if busy else ():
                assert isinstance(pipe, Connection)
                replies: Frames = pipe.recv()
                busy.discard(pipe)
                begin = time.process_time()
                for name, frame in replies:
                    post(server.on(name, m.CATALOGUE.decode(frame), 0.0))
                spent += time.process_time() - begin

    def reports(self) -> list[Report]:
        for pipe in self.pipes:
            pipe.send(None)
        return [pipe.recv() for pipe in self.pipes]


def one_round(
    keys: metered.Keys, dim: int, dropout: float, corruption: float, workers: int
) -> dict[str, Any]:
    """A round of everybody."""
    identities, roster = keys
    n = len(identities)
    key = SumKey.make(os.urandom)
    plan = bench_masking.make_plan(n, dim, 32, "regular", roster, key, corruption)
    gone = frozenset(list(identities)[n - round(dropout * n) :])
    crowd = Workers(keys, key.to_bytes(), dim, gone, workers)
    server = MaskedRound(plan, b"", roster, Deadlines(1, 1))
    begin = time.perf_counter()
    cpu = crowd.run(server)
    wall = time.perf_counter() - begin
    assert server.stage is Stage.DONE, server.reason
    reports = crowd.reports()
    return {**checked(plan, reports, n - len(gone)), **alone_of(plan, crowd, reports),
            "clients": n, "dim": dim, "dropout": dropout, "corruption": corruption,
            "degree": plan.degree, "threshold": plan.threshold, "workers": workers,
            "wall_s": wall, "server_cpu_s": cpu,
            "megabytes": megabytes() + sum(r.megabytes for r in reports)}  # fmt: skip


def checked(plan: RoundPlan, reports: list[Report], survivors: int) -> dict[str, Any]:
    """Everybody opened the sum, and it is the sum."""
    step = 2.0 ** -plan.layout[0].frac
    assert sum(r.opened for r in reports) == survivors
    assert all(r.wrong <= survivors * step for r in reports)
    return {"clients_cpu_s": sum(sum(r.cpu.values()) for r in reports)}


def alone_of(plan: RoundPlan, crowd: Workers, reports: list[Report]) -> dict[str, Any]:
    """What a client costs that remembers nothing, vectors apart: one up, one down."""
    vector = 4 * sum(field.size for field in plan.layout)
    own = [(name, reports[crowd.of[name]]) for name in crowd.told]
    other = [report.up[name] + report.down[name] - 2 * vector for name, report in own]
    seconds = [found for name in crowd.told for found in crowd.alone(name)]
    return {
        "client_cpu_s": machine.spread(seconds),
        "client_bytes_besides": float(np.median(other)),
    }


def theirs(python: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Flower's figures for the same case."""
    script = Path(__file__).parent / "flower_secagg.py"
    case = row["clients"], row["dim"], row["dropout"], row["degree"] + 1, row["threshold"]
    words = [python, str(script), *map(str, case)]
    quiet = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def exponent(rows: list[Mapping[str, Any]]) -> float:
    """Of n, in the seconds of the wall."""
    logs = np.log([[row["clients"], row["wall_s"]] for row in rows])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, action="append", help="may be given several times")
    parser.add_argument("--dim", type=int, action="append", help="also")
    parser.add_argument("--dropout", type=float, action="append", help="also")
    parser.add_argument("--corruption", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peer-python", metavar="PATH", help="runs Flower's SecAgg+ as well")
    parser.add_argument("--peer-most", type=int, default=1000, help="with so many clients at most")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(json.dumps(machine.describe()))
    print("     n   k   t   wall s  server s  clients s  MB    alone: ms   bytes besides vectors")
    rows: list[dict[str, Any]] = []
    clients = args.clients or (250, 500, 1000, 2000, 4000)
    for n, dim, dropout in itertools.product(clients, args.dim or (8192,), args.dropout or (0.1,)):
        row = one_round(metered.federation(n), dim, dropout, args.corruption, args.workers)
        rows.append(row)
        if args.peer_python and n <= args.peer_most:
            row["flower"] = theirs(args.peer_python, row)
        alone = row["client_cpu_s"]
        print(f"{n:6} {row['degree']:3} {row['threshold']:3} {row['wall_s']:8.2f} "
              f"{row['server_cpu_s']:8.2f} {row['clients_cpu_s']:9.1f} {row['megabytes']:6.0f} "
              f"{1e3 * alone['median']:7.1f} ({1e3 * alone['min']:.0f}-{1e3 * alone['max']:.0f})"
              f"{row['client_bytes_besides']:9,.0f}", flush=True)  # fmt: skip
        if "flower" in row:
            peer = row["flower"]
            ratio = sum(map(peer.get, CPU)) / sum(map(row.get, CPU))
            print(f"{'':7}Flower {peer['wall_s']:9.2f} {peer['server_cpu_s']:8.2f} "
                  f"{peer['clients_cpu_s']:9.1f}   CPU of all parties: {ratio:.1f} times ours",
                  flush=True)  # fmt: skip
        if args.json:
            content = {"machine": machine.describe(), "rows": rows}
            if len({row["clients"] for row in rows}) > 1:
                content["exponent"] = exponent(rows)
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    if len(clients) > 1:
        print(f"seconds grow as n^{exponent(rows):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
