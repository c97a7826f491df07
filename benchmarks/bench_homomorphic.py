"""CPU time and bytes of a homomorphic round, beside NVFlare's own path in the same run.

    python benchmarks/bench_homomorphic.py --json benchmarks/results/homomorphic.json
    python benchmarks/bench_homomorphic.py --clients 10 --dim 8192 --tensors 16 --no-peer

Ours: the state machines, signatures and frames of the real programs in one process and thread (see
``metered.py``), in a round in which every client holds the key already. "encrypt" is clipping,
rounding, packing, encrypting, signing and framing an upload; "server" everything the server does
in the round; "decrypt" opening the sum. However many tensors there are, an upload is one vector.
Bytes are those of all frames but the prompt that a plan carries, 4 a value and 16.

NVFlare 2.9: its classes and its serialisation, in a virtual environment that is made for it (first
run: two minutes, needs a package index). Its parameters are its defaults: degree 8192, primes
[60, 40, 40], and each tensor travels with its own public context.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import metered
import numpy as np

from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol.client_noise import NONE as NO_NOISE
from secure_fedprompt.protocol.fixedpoint import size_layout
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.plan import NO_KEY, NO_SEED, RoundPlan
from secure_fedprompt.protocol.protections import default_threshold
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.selection.task import NONE
from secure_fedprompt.server.rounds.base import Deadlines
from secure_fedprompt.server.rounds.encrypted import EncryptedRound
from secure_fedprompt.server.rounds.start import make_round

PEER = "nvflare[HE]==2.9.0"
TABLE = [(n, d, t) for n in (10, 50) for d in (8_192, 1_000_000) for t in (1, 16)]
FIGURES = ("client_encrypt_s", "client_decrypt_s", "server_s", "bytes_up", "bytes_down")


def make_plan(n: int, dim: int, tensors: int, protection: str, roster: Roster) -> RoundPlan:
    sizes = [len(part) for part in np.array_split(np.empty(dim, bool), tensors)]
    specs = [TensorSpec(f"t{i}", (size,)) for i, size in enumerate(sizes)]
    layout = size_layout(
        specs, n, clip=1.0, max_weight=4096, max_seen=65536, ring_bits=32, metrics=True
    )
    names = tuple(member.name for member in roster.members)
    return RoundPlan(
        run=os.urandom(16), terms=bytes(32), round=1, attempt=1, learning_round=1, rounds=1000,
        method="promptfl", members=n, bucket=0,
        protection=protection, settings_digest=bytes(32), model_fingerprint=bytes(32),
        classes_digest=bytes(32), roster_digest=roster.digest, base_digest=os.urandom(32),
        cohort=names, quorum=default_threshold(n), threshold=default_threshold(n), degree=0,
        graph_seed=NO_SEED, clip=1.0,
        max_weight=4096, uniform=0, layout=layout,
        parameters=homomorphic.choose(protection, n), maker=names[0], election=1, key=NO_KEY,
        grants=names[1:], selection=NONE, noise=NO_NOISE,
    )  # fmt: skip


def ours(n: int, dim: int, tensors: int, protection: str, repeat: int) -> list[dict[str, float]]:
    """Figures of each repetition; the sum is checked."""
    keys = metered.federation(n)
    parties = metered.parties_of(keys)
    plan = make_plan(n, dim, tensors, protection, keys[1])
    rng = np.random.default_rng(0)
    rows = []
    for number in range(1, repeat + 2):  # the first one makes and grants the key
        updates = {f.name: rng.normal(0, 0.05, f.shape) for f in plan.layout if f.update}
        values = {**updates, **{k: np.float64(64) for k in ("seen", "correct", "loss")}}
        plan = replace(plan, round=number, learning_round=number, base_digest=os.urandom(32))
        run_keys = {name: party.ready(plan.run) for name, party in parties.items()}
        server = make_round(plan, b"", keys[1], Deadlines(1, 1), run_keys)
        meter = metered.run(server, parties, values, 64.0)
        assert isinstance(server, EncryptedRound)
        assert meter.opened == n
        field = plan.layout[0]
        error = np.abs(meter.sum[field.name] - 64 * n * updates[field.name]).max()
        assert error <= n * 2.0**-field.frac, error
        plan = replace(plan, key=server.key, grants=())
        if number > 1:
            encrypt = [meter.total(name, ("upload",)) for name in parties]
            decrypt = [meter.total(name, ("CipherSum", "SumSigned")) for name in parties]
            rows.append({
                "client_encrypt_s": float(np.median(encrypt)),
                "client_decrypt_s": float(np.median(decrypt)),
                "server_s": meter.total(""),
                "bytes_up": float(np.median(list(meter.up.values()))),
                "bytes_down": float(np.median(list(meter.down.values()))),
                "error": float(error) / (64 * n),
            })  # fmt: skip
    return rows


def make_peer(folder: Path) -> Path:
    """NVFlare in an environment of its own; the path of its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {PEER} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", PEER], check=True)
    return python


def theirs(python: Path, n: int, dim: int, tensors: int, repeat: int) -> list[dict[str, float]]:
    script = Path(__file__).parent / "nvflare_he.py"
    words = [str(python), str(script), *map(str, (n, dim, tensors, repeat))]
    out = subprocess.run(words, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    return [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]


def show(row: dict[str, Any], dim: int) -> None:
    shown = [f"{1e3 * row[k]['median']:9.1f}" for k in FIGURES[:3]]
    shown += [f"{row[k]['median'] / dim:8.2f}" for k in FIGURES[3:]]
    low, high = (1e3 * row["server_s"][k] for k in ("min", "max"))
    print(
        f"{row['clients']:4} {dim:9,} {row['tensors']:3}  {row['system']:8}{''.join(shown)}"
        f"   ({low:.1f}-{high:.1f})",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--tensors", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="leave NVFlare out")
    parser.add_argument("--peer-venv", type=Path, metavar="DIR", help="keep its environment here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = [(args.clients, args.dim, args.tensors)] if args.clients else TABLE
    print(json.dumps(machine.describe()))
    print("   n    values  tn  system    encrypt  decrypt   server ms  B/value up, down  (server)")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        peer = None if args.no_peer else make_peer(args.peer_venv or Path(scratch) / "peer")
        for n, dim, tensors in cases:
            repeat = min(args.repeat, 3) if n * dim > 2_000_000 else args.repeat
            results = {p: ours(n, dim, tensors, p, repeat) for p in homomorphic.SCHEMES}
            # Sixteen contexts for each of fifty clients take gigabytes and add nothing new.
            if peer and n * dim * tensors <= 160_000_000:
                results["nvflare"] = theirs(peer, n, dim, tensors, min(repeat, 3))
            for system, figures in results.items():
                row = {k: machine.spread([f[k] for f in figures]) for k in (*FIGURES, "error")}
                rows.append({"clients": n, "values": dim, "tensors": tensors, "system": system,
                             "repeat": len(figures), **row})  # fmt: skip
                show(rows[-1], dim)
            if "nvflare" in results:
                base = rows[-1]["server_s"]["median"]
                ratios = [
                    f"{r['system']} {base / r['server_s']['median']:.0f}x" for r in rows[-3:-1]
                ]
                print(f"{'':20}server CPU of NVFlare against ours: {', '.join(ratios)}", flush=True)
    if args.json:
        content = {"machine": machine.describe(), "peer": PEER, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
