"""Cost of a masked round: CPU of the server and of a client, bytes up and down.

    python benchmarks/bench_masking.py                       # the whole table, a few minutes
    python benchmarks/bench_masking.py --clients 100 --dim 8192 --dropout 0.1 --json out.json
    python benchmarks/bench_masking.py --clients 1000 --graph regular --repeat 1

One round runs in one process and thread, with the state machines, keys, signatures and frames of
the real programs; each call of a machine, encoding and decoding included, is charged to its owner
by process CPU time, as is the next prompt that each client computes. Sockets, training and the disk
are not in it. Dropped clients vanish before their upload. Every sum is checked against the sum of
the inputs. It is a round like most: everybody holds the sum key, and the prompt before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import machine
import metered
import numpy as np

from secure_fedprompt.clients.sum_key import SumKey
from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol.client_noise import NONE as NO_NOISE
from secure_fedprompt.protocol.fixedpoint import size_layout
from secure_fedprompt.protocol.layout import Layout, TensorSpec
from secure_fedprompt.protocol.masking import choose_degree
from secure_fedprompt.protocol.plan import NO_SEED, RoundPlan
from secure_fedprompt.protocol.protections import default_threshold
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.selection.task import NONE
from secure_fedprompt.server.rounds.base import Deadlines
from secure_fedprompt.server.rounds.masks import MaskedRound

T = TypeVar("T")
TABLE = [
    (n, d, share, 32, "complete")
    for n in (10, 50, 100)
    for d in (8_192, 1_000_000)
    for share in (0.0, 0.1)
]
TABLE += [(10, 8_192, 0.0, 22, "complete")]


def weight_of(n: int, bits: int) -> int:
    """Weighted updates at 32 bits; uniform weights where there is no room for them."""
    return 4096 if bits == 32 and n <= 1000 else 1


def layout_of(n: int, dim: int, bits: int) -> Layout:
    return size_layout(
        [TensorSpec("ctx", (dim,))], n, clip=1.0, max_weight=weight_of(n, bits),
        max_seen=65536 if n <= 1000 else 4096, ring_bits=bits, metrics=True,
    )  # fmt: skip


def make_plan(
    n: int, dim: int, bits: int, graph: str, roster: Roster, key: SumKey, corruption: float = 0.1,
    sized_for: int = 0,
) -> RoundPlan:  # fmt: skip
    """For ``n`` clients, in a ring for ``sized_for``, if those are more."""
    max_weight = weight_of(sized_for or n, bits)
    layout = layout_of(sized_for or n, dim, bits)
    degree, quorum = 0, default_threshold(n)
    threshold, seed = quorum, NO_SEED
    if graph == "regular":
        degree, threshold = choose_degree(n, dropout=0.1, corruption=corruption)
        seed = os.urandom(32)
    return RoundPlan(
        run=os.urandom(16), terms=bytes(32), round=1, attempt=1, learning_round=1, rounds=1,
        method="promptfl", members=n, bucket=0,
        protection="masks", settings_digest=bytes(32), model_fingerprint=bytes(32),
        classes_digest=bytes(32), roster_digest=roster.digest, base_digest=os.urandom(32),
        cohort=tuple(m.name for m in roster.members), quorum=quorum, threshold=threshold,
        degree=degree, graph_seed=seed, clip=1.0, max_weight=max_weight,
        uniform=int(max_weight == 1), layout=layout,
        parameters=homomorphic.NONE, maker="", election=0, key=key.digest, grants=(),
        selection=NONE, noise=NO_NOISE,
    )  # fmt: skip


def one_round(
    n: int,
    dim: int,
    dropout: float,
    bits: int,
    graph: str,
    keys: metered.Keys,
) -> dict[str, float]:
    """Run a round; returns the figures of one repetition."""
    key = SumKey.make(os.urandom)
    plan = make_plan(n, dim, bits, graph, keys[1], key)
    parties = metered.parties_of(keys)
    for party in parties.values():
        party.keyring.sums = key
    update = np.random.default_rng(0).normal(0, 0.05, dim)
    values = {"ctx": update, **{k: np.float64(64) for k in ("seen", "correct", "loss")}}
    weight = 1.0 if plan.uniform else 64.0
    gone = frozenset(list(parties)[: round(dropout * n)])
    server = MaskedRound(plan, b"", keys[1], Deadlines(1, 1))
    meter = metered.run(server, parties, values, weight, gone, prompt=np.zeros(dim, np.float32))
    assert server.result is not None
    survivors = [name for name in parties if name not in gone]
    step = 2.0 ** -plan.layout[0].frac
    error = np.abs(server.result["ctx"] - len(survivors) * weight * update).max()
    assert error <= len(survivors) * step, error
    return {
        "client_cpu_s": float(np.median([meter.total(name) for name in survivors])),
        "client_sum_cpu_s": float(
            np.median([meter.total(name, ("OpenedSum",)) for name in survivors])
        ),
        "server_cpu_s": meter.total(""),
        "bytes_up": float(np.mean([meter.up[name] for name in survivors])),
        "bytes_down": float(np.mean([meter.down[name] for name in survivors])),
    }


def measure(n: int, dim: int, dropout: float, bits: int, graph: str, repeat: int) -> dict[str, Any]:
    keys = metered.federation(n)
    runs = [one_round(n, dim, dropout, bits, graph, keys) for _ in range(repeat + 1)][1:]
    figures = {name: machine.spread([run[name] for run in runs]) for name in runs[0]}
    row: dict[str, Any] = {
        "clients": n, "dim": dim, "dropout": dropout, "ring_bits": bits, "graph": graph,
        **{name: figure["median"] for name, figure in figures.items()},
        "bytes_up_per_value": figures["bytes_up"]["median"] / dim,
        "repeat": repeat, "spread": figures,
    }  # fmt: skip
    client, server = figures["client_cpu_s"], figures["server_cpu_s"]
    print(
        f"{n:5} {dim:9,} {dropout:4.0%} {bits:3} {graph:9}"
        f"{1e3 * client['median']:9.1f} ({1e3 * client['min']:.0f}-{1e3 * client['max']:.0f})"
        f"{1e3 * server['median']:9.1f} ({1e3 * server['min']:.0f}-{1e3 * server['max']:.0f})"
        f"{row['bytes_up_per_value']:9.3f}{row['bytes_down'] / 1e3:10.1f}",
        flush=True,
    )
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--ring-bits", type=int, default=32)
    parser.add_argument("--graph", choices=("complete", "regular"), default="complete")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = TABLE
    if args.clients:
        cases = [(args.clients, args.dim, args.dropout, args.ring_bits, args.graph)]
    print(json.dumps(machine.describe()))
    print("    n    values drop   b graph     client CPU ms     server CPU ms  B/value up  kB down")
    rows = []
    for n, dim, dropout, bits, graph in cases:
        heavy = n * dim > 2_000_000
        rows.append(
            measure(n, dim, dropout, bits, graph, min(args.repeat, 3) if heavy else args.repeat)
        )
    if args.json:
        content = {"machine": machine.describe(), "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
