"""PromptFL on real photos, as real processes, with one client killed in the middle.

    python benchmarks/photos.py --model local-dir:PATH --dataset caltech101.zip

Needs a CLIP in open_clip's ``local-dir:`` form and a data set of class folders (or a zip of
them). Five clients, pathological and Dirichlet(0.3) splits, 16 shots, 10 rounds; the last client is
killed after the fourth round. Zero-shot is the same model with "a photo of a {}." on the same test
images. Writes a table in Markdown and
JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from secure_fedprompt import show
from secure_fedprompt.bench import machine
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data.loading import load_shares
from secure_fedprompt.clients.features import Features
from secure_fedprompt.clients.settings import DataSettings
from secure_fedprompt.commands import demo, demo_files

CLIENTS, ROUNDS, SHOTS, KILL_AFTER = 5, 10, 16, 4
CASES = [("masks", True), ("bfv", True), ("ckks", True), ("masks", False), ("none", False)]
SPLITS = {"pathological": {}, "dirichlet": {"beta": 0.3}}


def absolute(model: str) -> str:
    return f"local-dir:{Path(model.removeprefix('local-dir:')).resolve()}"


def zero_shot(model: str, dataset: str) -> float:
    """Accuracy of "a photo of a NAME." over all test images."""
    backbone = Backbone.load(model)
    _, test, _ = load_shares(DataSettings(dataset=dataset))
    features = Features(backbone, test, "features", lambda *_: None, "")
    text = backbone.zero_shot_features(test.class_names)
    return float(((features.images @ text.T).argmax(1) == features.labels).float().mean())


def federate(
    folder: Path, args: argparse.Namespace, split: str, protection: str, kill: bool
) -> dict[str, Any]:
    """One run; returns the server's summary."""
    commands = demo_files.write_files(
        folder, "promptfl", CLIENTS, ROUNDS, protection, 0,
        for_server={
            "n_ctx": 16, "init": "", "lr": args.lr, "epochs": args.epochs, "alive_seconds": 8.0,
            "gather_seconds": 300.0,
        },
        for_clients={
            "dataset": str(Path(args.dataset).resolve()), "model": absolute(args.model),
            "shots": SHOTS, "partition": split,
            **SPLITS[split],
        },
    )  # fmt: skip
    begin = time.monotonic()
    with demo.processes(commands, folder, CLIENTS) as started:
        out = started[0].stdout
        assert out is not None
        for line in out:
            print("   ", line.rstrip(), flush=True)
            if kill and f"round {KILL_AFTER}/{ROUNDS}" in line:
                started[-1].send_signal(signal.SIGKILL)
        assert started[0].wait() == 0, folder
        for process in started[1:]:  # they write their results after their goodbye
            process.wait(60)
    summary: dict[str, Any] = json.loads((folder / "server" / "result.json").read_text())
    history = json.loads((folder / demo_files.NAMES[0] / "result.json").read_text())["opened"]
    show.add_history(summary, history)  # what only clients know under encryption
    return {**summary, "seconds": time.monotonic() - begin}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="local-dir:PATH")
    parser.add_argument("--dataset", required=True, help="folder or zip file")
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--only", metavar="A,B", default="",
        help="protections to run; rows of the others are kept from the last result",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="figures; a table goes beside it as .md",
                        default=Path(__file__).parent / "results" / "photos.json")  # fmt: skip
    args = parser.parse_args()
    base = zero_shot(args.model, args.dataset)
    rows: list[dict[str, Any]] = []
    for split in SPLITS:
        for protection, kill in CASES:
            if args.only and protection not in args.only.split(","):
                continue
            print(f"{split}, {protection}{', last client killed' if kill else ''}", flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                result = federate(Path(scratch) / "run", args, split, protection, kill)
            rounds = result["rounds"]
            rows.append({
                "split": split, "protection": protection, "killed": int(kill),
                "zero_shot": base, "start": result["accuracy_before"],
                "after": result["accuracy_after"],
                "contributors": [r["metrics"].get("contributors", 0) for r in rounds],
                "accuracy": [r["metrics"].get("accuracy") for r in rounds],
                "rounds_done": sum(r["outcome"] == "done" for r in rounds),
                "aborted": sum(r["outcome"] != "done" for r in rounds),
                "bytes_up_per_client": result["bytes_up_per_client"],
                "bytes_down_per_client": result["bytes_down_per_client"],
                "seconds": result["seconds"],
            })  # fmt: skip
    write(args, rows)
    return 0


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    args.json.parent.mkdir(exist_ok=True)
    protocol = {
        "clients": CLIENTS, "rounds": ROUNDS, "shots": SHOTS, "n_ctx": 16, "init": "random",
        "lr": args.lr, "epochs": args.epochs, "batch": 32, "killed_after_round": KILL_AFTER,
        "dataset": Path(args.dataset).name, "model": Path(args.model).name,
    }  # fmt: skip
    if args.only and args.json.exists():
        old = json.loads(args.json.read_text())
        assert old["protocol"] == protocol, "the last result is of another protocol"
        cells = {(r["split"], r["protection"], r["killed"]): r for r in [*old["rows"], *rows]}
        rows = [
            cells[split, protection, int(kill)]
            for split in SPLITS
            for protection, kill in CASES
            if (split, protection, int(kill)) in cells
        ]
    content = {"machine": machine.describe(), "protocol": protocol, "rows": rows}
    args.json.write_text(json.dumps(content, indent=1) + "\n")
    lines = [
        "# Real photos: PromptFL as processes", "",
        ", ".join(f"{k} {v}" for k, v in protocol.items()), "",
        "| split | protection | killed | zero-shot | start | after 10 rounds | clients in "
        "| kB up / down per client | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        inside = " ".join(f"{c:.0f}" for c in r["contributors"])
        lines.append(
            f"| {r['split']} | {r['protection']} | {r['killed']} | {r['zero_shot']:.1%} | "
            f"{r['start']:.1%} | {r['after']:.1%} | {inside} | "
            f"{r['bytes_up_per_client'] / 1e3:.0f} / {r['bytes_down_per_client'] / 1e3:.0f} | "
            f"{r['seconds']:.0f} |"
        )
    lines += ["", "The last number of clients is the final evaluation's. After a kill the accuracy"]
    lines += ["is over the remaining clients' test images.", "", "One seed, one run per cell."]
    args.json.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
