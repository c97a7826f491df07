"""A masked round: CPU of the server and of a client, bytes up and down.

One round runs in one process and thread, with the state machines, keys, signatures and frames of
the real programs; each call of a machine, encoding and decoding included, is charged to its owner
by process CPU time, as is the next prompt that each client computes. Sockets, training and the disk
are not in it. Dropped clients vanish before their upload. Every sum is checked against the sum of
the inputs. It is a round like most: everybody holds the sum key, and the prompt before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from secure_fedprompt.bench import metered
from secure_fedprompt.bench.chapter import Case, Chapter, Column, Curve, Samples
from secure_fedprompt.clients.sum_key import SumKey
from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol.client_noise import NONE as NO_NOISE
from secure_fedprompt.protocol.fixedpoint import size_layout
from secure_fedprompt.protocol.layout import Layout, TensorSpec, Values, Vector
from secure_fedprompt.protocol.masking import choose_degree
from secure_fedprompt.protocol.plan import NO_SEED, RoundPlan
from secure_fedprompt.protocol.protections import default_threshold
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.selection.task import NONE
from secure_fedprompt.server.rounds.base import Deadlines
from secure_fedprompt.server.rounds.masks import MaskedRound


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


def update_of(dim: int) -> Vector:
    """What every client sends."""
    return np.random.default_rng(0).normal(0, 0.05, dim)


def one_round(
    case: Case, keys: metered.Keys, passed: metered.Passed = lambda *frame: None
) -> dict[str, float]:
    """Run a round; returns the figures of one repetition. ``passed`` sees every frame."""
    n, dim = case["clients"], case["values"]
    key = SumKey.make(os.urandom)
    plan = make_plan(n, dim, case["ring_bits"], case["graph"], keys[1], key)
    parties = metered.parties_of(keys)
    for party in parties.values():
        party.keyring.sums = key
    update = update_of(dim)
    values: Values = {"ctx": update, **{k: np.float64(64) for k in ("seen", "correct", "loss")}}
    weight = 1.0 if plan.uniform else 64.0
    gone = frozenset(list(parties)[: round(case["dropped"] * n)])
    server = MaskedRound(plan, b"", keys[1], Deadlines(1, 1))
    prompt = np.zeros(dim, np.float32)
    meter = metered.run(server, parties, values, weight, gone, passed, prompt)
    assert server.result is not None
    survivors = [name for name in parties if name not in gone]
    step = 2.0 ** -plan.layout[0].frac
    error = np.abs(server.result["ctx"] - len(survivors) * weight * update).max()
    assert error <= len(survivors) * step, error
    own = [meter.total(name) for name in survivors]
    opening = [meter.total(name, ("OpenedSum",)) for name in survivors]
    return {
        "client_ms": 1e3 * float(np.median(own)),
        "client_sum_ms": 1e3 * float(np.median(opening)),
        "server_ms": 1e3 * meter.total(""),
        "bytes_up_per_value": float(np.mean([meter.up[name] for name in survivors])) / dim,
        "kb_down": float(np.mean([meter.down[name] for name in survivors])) / 1e3,
    }


def measure(case: Case, repeat: int) -> Samples:
    """Rounds after one that is not counted."""
    keys = metered.federation(case["clients"])
    if case["clients"] * case["values"] > 2_000_000:
        repeat = min(repeat, 3)
    runs = [one_round(case, keys) for _ in range(repeat + 1)][1:]
    return {name: [run[name] for run in runs] for name in runs[0]}


def cases(quick: bool) -> list[Case]:
    keys = ("clients", "values", "dropped", "ring_bits", "graph")
    table = [(10, 8_192, 0.0, 32, "complete"), (10, 8_192, 0.0, 22, "complete"),
             (50, 8_192, 0.0, 32, "complete"), (100, 8_192, 0.1, 32, "complete")]  # fmt: skip
    if not quick:
        sizes = [(n, d, share) for n in (10, 50, 100) for d in (8_192, 1_000_000)
                 for share in (0.0, 0.1)]  # fmt: skip
        sizes += [(100, d, 0.0) for d in (65_536, 262_144)] + [(n, 8_192, 0.0) for n in (25, 200)]
        table += [(n, d, share, 32, "complete") for n, d, share in sizes]
        table += [(100, 8_192, 0.0, 32, "regular")]
    return [dict(zip(keys, row, strict=True)) for row in sorted(set(table))]


def client_limit(case: Case, known: Mapping[str, float]) -> float:
    """Two agreements and a signature to check for each other client, a mask for each, in ms."""
    n, d = case["clients"], case["values"]
    each = 2 * known["x25519_us"] + known["ed25519_verify_us"]
    return float(n * each + n * 4 * d / known["aes_bytes_per_us"]) / 1e3


def server_limit(case: Case, known: Mapping[str, float]) -> float:
    """Each upload is added once, and its own mask taken off again, in ms."""
    n, d = case["clients"], case["values"]
    each = known["ed25519_verify_us"] + 4 * d / known["aes_bytes_per_us"]
    return float(n * (each + 4 * d / known["add_bytes_per_us"])) / 1e3


BY_CLIENTS = {"values": 8_192, "dropped": 0.0, "ring_bits": 32, "graph": "complete"}
BY_VALUES = {"clients": 100, "dropped": 0.0, "ring_bits": 32, "graph": "complete"}
CHAPTER = Chapter(
    name="masking",
    title="A round under masks",
    about=__doc__,
    keys={"clients": "clients", "values": "values", "dropped": "dropped", "ring_bits": "ring bits",
          "graph": "graph"},
    columns=(
        Column("client_ms", "client CPU, ms"), Column("client_sum_ms", "of it, the sum, ms"),
        Column("server_ms", "server CPU, ms"), Column("bytes_up_per_value", "bytes up per value"),
        Column("kb_down", "kB down"),
    ),
    cases=cases,
    measure=measure,
    curves=(
        Curve("client by n", "clients", "client_ms", BY_CLIENTS, client_limit),
        Curve("server by n", "clients", "server_ms", BY_CLIENTS, server_limit),
        Curve("client by d", "values", "client_ms", BY_VALUES, client_limit),
        Curve("server by d", "values", "server_ms", BY_VALUES, server_limit),
    ),
)  # fmt: skip
