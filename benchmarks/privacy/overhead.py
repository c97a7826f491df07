"""What protection costs: bytes, time and accuracy of every combination, as processes over sockets.

    python benchmarks/privacy/overhead.py --json overhead.json
    python benchmarks/privacy/overhead.py --model local-dir:PATH --dataset caltech101.zip

FedMGP with a server and four clients, each a process, files and commands as the demo writes them.
Bytes are those of the server's run folder, per client and learning round. Seconds are of a learning
round, training included, median over rounds. Accuracy is that of the first client's final prompt
(all groups, mean of logits) on all test images; one run per row.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import plots
from federations import parser, save

from secure_fedprompt.commands import demo, demo_files

TIMEOUT = 900.0
DP: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # server settings, clients' [dp]
    "none": ({}, {}),
    "sample": ({}, {"kind": "sample", "target_epsilon": 8.0, "delta": 1e-3}),
    "client": ({"dp_noise": 0.5, "dp_clip": 0.5, "clip": 0.5, "metrics": "off"}, {}),
}


def measure(folder: Path, protection: str, selection: str, dp: str, args: Any) -> dict[str, Any]:
    """One run of processes, and what its files say."""
    server, private = DP[dp]
    model = args.model
    if model.startswith("local-dir:"):
        model = f"local-dir:{Path(model.removeprefix('local-dir:')).resolve()}"
    own = {"model": model, "dataset": args.dataset, "partition": "dirichlet"}
    if args.dataset == "generated":
        own["generated_classes"] = args.classes
    else:
        own |= {"shots": 8, "dataset": str(Path(args.dataset).resolve())}
    commands = demo_files.write_files(
        folder, "fedmgp", args.clients, args.rounds, protection, 0,
        for_server={**server, "selection": selection, "selection_scope": "client"},
        for_clients=own, dp=private,
    )  # fmt: skip
    with demo.processes(commands, folder, args.clients) as started:
        assert started[0].stdout is not None
        output = started[0].stdout.read()
        codes = [process.wait(TIMEOUT) for process in started]
    if any(codes):
        raise RuntimeError(f"{protection} {selection} {dp}: exit codes {codes}\n{output}")
    summary = json.loads((folder / "server" / "result.json").read_text())
    prompt = json.loads((folder / demo_files.NAMES[0] / "result.json").read_text())["prompt"]
    score = folder / "score.json"
    data = {**demo_files.DATA, **own}
    flags = [
        f"--{k.replace('_', '-')}={v}" for k, v in data.items() if k not in ("partition", "beta")
    ]
    words = [sys.executable, "-m", "secure_fedprompt", "evaluate", prompt, "--json", str(score)]
    subprocess.run([*words, *flags], check=True, stdout=subprocess.DEVNULL)
    rounds = [r for r in summary["rounds"] if r["learning_round"] <= args.rounds]
    moved = {way: sum(sum(r["bytes"][way].values()) for r in rounds) for way in ("up", "down")}
    per = args.clients * len(rounds) * 1000
    return {
        "run": f"{protection}, {selection}, dp {dp}",
        "protection": protection, "selection": selection, "dp": dp,
        "kb_up": moved["up"] / per, "kb_down": moved["down"] / per,
        "seconds": statistics.median(sum(r["seconds"].values()) for r in rounds),
        "accuracy": 100 * json.loads(score.read_text())["accuracy"],
        "aborted": sum(r["outcome"] != "done" for r in summary["rounds"]),
    }  # fmt: skip


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--clients", type=int, default=4)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--dps", nargs="*", default=list(DP), choices=list(DP))
    args = made.parse_args()
    rows = []
    for dp, selection, protection in itertools.product(
        args.dps, ("client", "secure"), ("none", "masks", "bfv", "ckks")
    ):
        if dp == "client" and protection == "none":
            continue  # refused: noise shares only add up inside a protected sum
        with tempfile.TemporaryDirectory() as scratch:
            row = measure(Path(scratch) / "run", protection, selection, dp, args)
        rows.append(row)
        print(f"{row['run']:28} up {row['kb_up']:7.1f} kB  down {row['kb_down']:7.1f} kB  "
              f"{row['seconds']:5.1f} s  {row['accuracy']:.1f}%", flush=True)  # fmt: skip
        save(args, rows)
    plots.bars(args.json, rows, "run", {
        "kb_up": "kB up", "kb_down": "kB down", "seconds": "s a round", "accuracy": "accuracy, %",
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
