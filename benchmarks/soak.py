"""Hundreds of rounds of the real programs under random kill -9, and what they hold meanwhile.

    python benchmarks/soak.py --rounds 500 --kill-every 8 --json soak.json --plot soak.svg
    python benchmarks/soak.py --rounds 60 --protection bfv --spare ""    # nobody is spared
    python benchmarks/soak.py --rounds 60 --selection secure --spare ""  # FedMGP, helper and all
    python benchmarks/soak.py --walk server,bob --frames 200             # at every frame in turn

Server and clients are processes on loopback, with the bundled CLIP on generated pictures. Every so
often one of them, drawn at random, is killed and started again with the same files. After each
round memory, file handles and threads of those who are spared are read from /proc, and the sizes of
the server's folder. In the end: each learning round once, no number twice, all logs in agreement.
"grown" compares the last tenth of the rounds with the tenth after the first half.

With ``--walk`` nobody is drawn: those who are named kill themselves before their first frame, then
after it, before the second one, and so on (``mortal.py``), and are started again each time.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from server_load import usage

from secure_fedprompt.bench import machine
from secure_fedprompt.commands import demo_files

WATCHED = ("kb", "handles", "threads")


class Soak:
    """A federation of programs, and who is killed.

    Attributes:
        kills: how often who was.
        seen: after each round, what those who are spared hold.
        walked: by name, at how many places it has killed itself.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder = folder
        self.spared = set(args.spare.split(",")) - {"", *args.walk.split(",")}
        selecting = {
            "selection": "secure", "selection_scope": "client", "helper": demo_files.HELPER,
        }  # fmt: skip
        secure = args.selection == "secure"
        self.commands = demo_files.write_files(
            folder, "fedmgp" if secure else "promptfl", args.clients, args.rounds, args.protection,
            0, for_server={"metrics": "off", "alive_seconds": 8.0, "gather_seconds": 20.0,
                           "patience": 600.0, "audit": "headers", **(selecting if secure else {})},
            for_clients={"shots": 1, "local_metrics": False, "patience": 600.0},
        )  # fmt: skip
        self.kills: dict[str, int] = {}
        self.walked = dict.fromkeys(filter(None, args.walk.split(",")), 0)
        self.frames = args.frames
        self.seen: list[dict[str, Any]] = []
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for words in self.commands:
            self.start(words)

    def start(self, words: list[str]) -> None:
        name = Path(words[4]).parent.name
        if name in self.walked and self.walked[name] < 2 * self.frames:
            n = str(self.walked[name] + 1)
            words = [words[0], str(Path(__file__).with_name("mortal.py")), n, *words[2:]]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(words, stdout=log, stderr=log)

    def kill(self, rng: random.Random) -> None:
        name = rng.choice(sorted(self.running.keys() - self.spared))
        if self.running[name].poll() is not None:
            return  # it has ended in order
        self.running[name].kill()
        self.again(name)

    def again(self, name: str) -> None:
        """Start what was killed."""
        self.running[name].wait()
        self.kills[name] = self.kills.get(name, 0) + 1
        self.start(next(w for w in self.commands if Path(w[4]).parent.name == name))

    def walk(self) -> None:
        """Start those that killed themselves, to do so one place further on."""
        for name in self.walked:
            if self.running[name].poll() == -signal.SIGKILL:
                self.walked[name] += 1
                self.again(name)

    def sample(self, rounds: int) -> None:
        run = self.folder / "server" / "run"
        row: dict[str, Any] = {"rounds": rounds}
        for name in sorted(self.spared & self.running.keys()):
            if self.running[name].poll() is None:
                row[name] = usage(self.running[name].pid)
        row["database"] = sum(p.stat().st_size for p in run.glob("run.sqlite*"))
        row["audit"] = sum(p.stat().st_size for p in run.glob("audit/*"))
        self.seen.append(row)

    def run(self, args: argparse.Namespace) -> None:
        rng, done, due = random.Random(args.seed), 0, time.monotonic() + args.kill_every
        while self.running["server"].poll() in (None, -signal.SIGKILL):
            self.walk()
            rounds = (self.folder / "server.log").read_text().count("clients in,")
            if rounds > done:
                done = rounds
                self.sample(done)
                if not done % 25:
                    print(f"{done} rounds, {sum(self.kills.values())} kills", flush=True)
            if not self.walked and time.monotonic() > due and done < args.rounds - 5:
                due = time.monotonic() + rng.expovariate(1 / args.kill_every)
                self.kill(rng)
            time.sleep(0.05)
        for name, process in self.running.items():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                if name not in self.walked:  # else the run ended while it was dead
                    raise
                process.kill()


def grown(seen: list[dict[str, Any]], name: str, what: str) -> float:
    """Of the medians of two tenths of the rounds."""
    values = [row[name][what] for row in seen if name in row]
    tenth = max(1, len(values) // 10)
    middle = values[len(values) // 2 :][:tenth]
    return statistics.median(values[-tenth - 1 : -1]) / statistics.median(middle) - 1


def judged(soak: Soak, args: argparse.Namespace) -> dict[str, Any]:
    """What came of it."""
    rows = json.loads((soak.folder / "server" / "result.json").read_text())["rounds"]
    done = [row["learning_round"] for row in rows if row["outcome"] == "done"]
    assert done == list(range(1, args.rounds + 1)), "a learning round is missing, or counted twice"
    numbers = [row["round"] for row in rows]
    assert len(set(numbers)) == len(numbers), "a round number was used twice"
    peers = [f"--peer={p}" for p in sorted(soak.folder.glob("*/state"))]
    words = [sys.executable, "-m", "secure_fedprompt", "audit", str(soak.folder / "server" / "run")]
    audit = subprocess.run([*words, *peers], capture_output=True, text=True, check=False)
    spared = sorted(soak.spared)
    last = soak.seen[-1]
    return {
        "protection": args.protection, "clients": args.clients, "rounds": len(done),
        "selection": args.selection, "attempts": len(rows), "kills": soak.kills,
        "walked": soak.walked, "audit_exit": audit.returncode,
        "audit_said": audit.stdout.strip().splitlines()[-1:] if audit.stdout else [],
        "grown": {name: {w: grown(soak.seen, name, w) for w in WATCHED} for name in spared},
        "database_bytes_per_round": last["database"] / last["rounds"],
        "audit_bytes_per_round": last["audit"] / last["rounds"],
        "seen": soak.seen,
    }  # fmt: skip


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "soak"
    from matplotlib import pyplot as plt

    figure, (memory, others, sizes) = plt.subplots(1, 3, figsize=(12, 3.2))
    for name in result["grown"]:
        rows = [row for row in result["seen"] if name in row]
        x = [row["rounds"] for row in rows]
        memory.plot(x, [row[name]["kb"] / 1024 for row in rows], label=f"{name}, MB")
        for what in ("handles", "threads"):
            others.plot(x, [row[name][what] for row in rows], label=f"{name}, {what}")
    x = [row["rounds"] for row in result["seen"]]
    for what in ("database", "audit"):
        sizes.plot(x, [row[what] / 2**20 for row in result["seen"]], label=f"{what}, MB")
    for axes in (memory, others, sizes):
        axes.set_xlabel("learning rounds")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.suptitle(f"{result['rounds']} rounds, {sum(result['kills'].values())} kills")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--protection", default="masks")
    parser.add_argument("--selection", choices=("client", "secure"), default="client",
                        help="secure: FedMGP, with a helper's process")  # fmt: skip
    parser.add_argument("--walk", default="", help="who is killed at every frame; names")
    parser.add_argument("--frames", type=int, default=60, help="of each walk, at most")
    parser.add_argument("--kill-every", type=float, default=8.0, help="seconds, on average")
    parser.add_argument(
        "--spare", default="server,alice", help="are not killed, and watched; names with commas"
    )
    parser.add_argument("--seed", type=int, default=0, help="of who is killed, and when")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--keep", type=Path, help="run in this folder, and leave it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak((args.keep or Path(scratch)) / "federation", args)
        try:
            soak.run(args)
        finally:
            for process in soak.running.values():
                process.kill()
        if soak.running["server"].returncode:
            raise SystemExit((soak.folder / "server.log").read_text()[-3000:])
        result = {"machine": machine.describe(), **judged(soak, args)}
    print(
        f"{result['rounds']} learning rounds in {result['attempts']} attempts, kills: "
        f"{result['kills'] or 'none'}; audit of all logs: exit {result['audit_exit']}"
    )
    for name, by in result["grown"].items():
        print(f"{name}: " + ", ".join(f"{what} {100 * v:+.1f}%" for what, v in by.items()))
    print(f"a round takes {result['database_bytes_per_round']:,.0f} bytes of database, "
          f"{result['audit_bytes_per_round']:,.0f} of audit log")  # fmt: skip
    if args.plot:
        plot(result, args.plot)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
