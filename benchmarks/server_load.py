"""The real server under load: hundreds of clients over real sockets, round after round.

    python benchmarks/server_load.py                              # 200 clients, 30 rounds
    python benchmarks/server_load.py --clients 50 --graph complete --json out.json
    python benchmarks/server_load.py --hub                        # small frames a second

The server is the program, in a process of its own, with its log of frames' headers and its run
folder. Clients are sessions over CURVE sockets on loopback, many in a process, with a toy update in
the place of training and journals in memory. After every round the server's memory, file handles
and threads are read from /proc; "grown" compares the last with the middle.

``--hub`` counts how many small frames a second the hub's loop takes in, decoded and counted, from
as many senders as there are processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any, Self

import numpy as np

from secure_fedprompt.bench import machine
from secure_fedprompt.clients.conversation import Conversation
from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.session import Session
from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.commands import demo_files
from secure_fedprompt.host import files
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.errors import SecureFedPromptError
from secure_fedprompt.protocol.keys import Identity, Member
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.quota import Quota
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.door import bound_handles
from secure_fedprompt.server.hub import CurveHub
from secure_fedprompt.server.serve import CountedHub

POLICY = Policy(graphs=("complete", "regular"), colluders=0, max_rounds=10_000)


class Toy:
    """A workload without a model."""

    model_fingerprint, classes_digest = b"m" * 32, b"c" * 32
    weight, resuming = 1.0, False

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def prepare(self, settings: MethodSettings) -> Self:
        return self

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("ctx", (self.dim,)),)

    def initial(self) -> Prompt:
        return np.zeros(self.dim, np.float32)

    def run(self, work: Work) -> Update:
        return Update({"ctx": np.full(self.dim, 1e-3)} if work.plan.training else {}, 1.0)


def client(
    folder: Path, name: str, roster: Roster, address: str, dim: int
) -> tuple[Any, Any, CurveLink]:
    identity = files.read_identity(str(folder / name / f"{name}.pem"))
    server = roster.with_role("server")[0]
    party = Party(name, identity, roster, POLICY, MemoryJournal(), os.urandom)
    session = Session(party, Toy(dim))
    link = CurveLink(address, server.curve, identity, 600.0)
    return Conversation(link, session.hello), session, link


def crowd(folder: Path, names: list[str], address: str, dim: int) -> None:
    """Client loops, many in one thread, until their run is over."""
    roster = files.read_roster(str(folder / "roster.toml"))
    loops = [client(folder, name, roster, address, dim) for name in names]
    while loops:
        idle = True
        for talk, session, link in list(loops):
            talk.greet()
            talk.live()
            if (message := talk.receive(0.0)) is None:
                continue
            idle = False
            try:
                talk.send(session.on(message))
            except SecureFedPromptError as error:
                talk.send(session.withdraw(error))
            if (work := session.work) is not None:
                talk.send(session.trained(work, session.learner.run(work)))
            if session.over:
                talk.send([m.Leave("Finished", "")])
                loops.remove((talk, session, link))
                link.close()  # once the last frames are out
        if idle:
            time.sleep(0.002)


def usage(pid: int) -> dict[str, int]:
    """Of a process: resident kB, file handles, threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    lines = (line.split(":") for line in status.splitlines())
    numbers = {key: value.split()[0] for key, value in lines if value.split()}
    return {"kb": int(numbers["VmRSS"]), "threads": int(numbers["Threads"]),
            "handles": len(list(Path(f"/proc/{pid}/fd").iterdir()))}  # fmt: skip


def load(args: argparse.Namespace) -> dict[str, Any]:
    """One run of the program."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "federation"
        server_words, *_ = demo_files.write_files(
            folder, "promptfl", args.clients, args.rounds, "masks", 0,
            for_server={"graph": args.graph, "metrics": "off", "stage_seconds": 120.0,
                        "gather_seconds": 600.0, "alive_seconds": 600.0},
        )  # fmt: skip
        address = tomllib.loads((folder / "server" / "server.toml").read_text())["bind"]
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "server")
        log = (folder / "server.log").open("w")
        server = subprocess.Popen(server_words, stdout=log, stderr=log)
        groups = [names[i :: args.processes] for i in range(args.processes)]
        for group in groups:
            mp.Process(target=crowd, args=(folder, group, address, args.dim), daemon=True).start()
        seen, done = [], 0
        while server.poll() is None:
            found = (folder / "server.log").read_text().count("clients in,")
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if found > done:
                    done = found
                    seen.append({"rounds": done, **usage(server.pid)})
            time.sleep(0.1)
        if server.returncode:
            raise SystemExit((folder / "server.log").read_text()[-2000:])
        rows = json.loads((folder / "server" / "result.json").read_text())["rounds"]
        size = sum(p.stat().st_size for p in (folder / "server" / "run").rglob("*") if p.is_file())
    seconds = [sum(row["seconds"].values()) for row in rows]
    assert all(row["outcome"] == "done" and not row["dropped"] for row in rows)
    first, last = seen[len(seen) // 2], seen[-2]  # then clients leave
    return {
        "clients": args.clients, "rounds": len(rows), "graph": args.graph, "dim": args.dim,
        "seconds": machine.spread(seconds), "run_folder_kb": size // 1024, "seen": seen,
        "grown": {k: last[k] / first[k] - 1 for k in ("kb", "handles", "threads")},
    }  # fmt: skip


def shout(identity: Identity, server: Member, address: str, count: int) -> None:
    link = CurveLink(address, server.curve, identity, 60.0)
    link.connect()
    frame = Frame.of(m.Alive())
    for sent in range(count):
        link.send(frame)
        if not sent % 200:
            time.sleep(0.002)  # the queue is bounded
    link.close()


def hub_rate(senders: int, count: int = 60_000) -> dict[str, Any]:
    """Small frames a second through the hub, in one thread."""
    keys = {name: Identity.generate() for name in ("server", *(f"c{i}" for i in range(senders)))}
    roster = Roster.of(tuple(
        Member.of(key, name, "server" if name == "server" else "client")
        for name, key in keys.items()
    ))  # fmt: skip
    bound_handles(len(roster.members))
    hub = CurveHub("tcp://127.0.0.1:*", keys["server"], roster)
    for name in keys:
        hub._quotas[name] = Quota(1 << 40, time.monotonic())  # no member may send so many
    counts = dict[str, int]()

    def counted(peer: str, way: str, kind: str, size: int) -> None:
        counts[peer] = counts.get(peer, 0) + 1

    wrapped = CountedHub(hub, counted)
    me = roster.by_name["server"]
    for name in keys.keys() - {"server"}:
        mp.Process(target=shout, args=(keys[name], me, hub.address, count), daemon=True).start()
    got, busy, began = 0, 0.0, 0.0
    while True:
        start = time.thread_time()
        some = sum(1 for _ in wrapped.poll(1.0))
        busy += time.thread_time() - start
        began = began or time.perf_counter()
        if not some and got:
            break
        got += some
    wall = time.perf_counter() - began - 1.0
    hub.close()
    assert got == sum(counts.values())
    assert got > senders * count // 2, f"{got} of {senders * count} frames came"
    return {"senders": senders, "frames": got, "per_second": got / wall,
            "cpu_us": 1e6 * busy / got}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--graph", choices=("complete", "regular"), default="regular")
    parser.add_argument("--processes", type=int, default=2, help="that the clients share")
    parser.add_argument("--hub", action="store_true", help="only the hub's rate")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine.describe()}
    if args.hub:
        result["hub"] = [hub_rate(n) for n in (1, 2)]
        for row in result["hub"]:
            print(f"{row['senders']} senders: {row['per_second']:,.0f} frames a second, "
                  f"{row['cpu_us']:.0f} us of the loop's CPU each")  # fmt: skip
    else:
        row = result["load"] = load(args)
        s = row["seconds"]
        end = row["seen"][-2]
        print(f"{row['clients']} clients, {row['rounds']} rounds, {row['graph']} graph: "
              f"{s['median']:.2f} s a round ({s['min']:.2f}-{s['max']:.2f}); server "
              f"{end['kb'] / 1024:.0f} MB, {end['handles']} handles, "
              f"{end['threads']} threads, run folder {row['run_folder_kb']:,} kB")  # fmt: skip
        print("grown in the second half: "
              + ", ".join(f"{k} {100 * v:+.1f}%" for k, v in row["grown"].items()))  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
