"""A homomorphic round: CPU and bytes, beside NVFlare's own path in the same run.

Ours: the state machines, signatures and frames of the real programs in one process and thread (see
``metered.py``), in a round in which every client holds the key already. "encrypt" is clipping,
rounding, packing, encrypting, signing and framing an upload; "server" everything the server does
in the round; "decrypt" opening the sum. However many tensors there are, an upload is one vector.
Bytes are those of all frames but the prompt that a plan carries, 4 a value and 16.

NVFlare: its own classes and serialisation with its defaults: degree 8192, primes [60, 40, 40], and
each tensor travels with its own public context. It signs nothing and checks no sum.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from secure_fedprompt.bench import metered
from secure_fedprompt.bench.chapter import Case, Chapter, Column, Curve, Samples
from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol.client_noise import NONE as NO_NOISE
from secure_fedprompt.protocol.fixedpoint import size_layout
from secure_fedprompt.protocol.layout import TensorSpec, Values
from secure_fedprompt.protocol.plan import NO_KEY, NO_SEED, RoundPlan
from secure_fedprompt.protocol.protections import default_threshold, facts_of
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.selection.task import NONE
from secure_fedprompt.server.rounds.base import Deadlines
from secure_fedprompt.server.rounds.encrypted import EncryptedRound
from secure_fedprompt.server.rounds.start import make_round


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


def measure(case: Case, repeat: int) -> Samples:
    """Rounds after the one that makes and grants the key; each sum is checked."""
    n, dim = case["clients"], case["values"]
    keys = metered.federation(n)
    parties = metered.parties_of(keys)
    plan = make_plan(n, dim, case["tensors"], case["protection"], keys[1])
    rng = np.random.default_rng(0)
    rows = list[dict[str, float]]()
    for number in range(1, (min(repeat, 3) if n * dim > 2_000_000 else repeat) + 2):
        updates = {f.name: rng.normal(0, 0.05, f.shape) for f in plan.layout if f.update}
        values: Values = {**updates, **{k: np.float64(64) for k in ("seen", "correct", "loss")}}
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
                "encrypt_ms": 1e3 * float(np.median(encrypt)),
                "decrypt_ms": 1e3 * float(np.median(decrypt)),
                "server_ms": 1e3 * meter.total(""),
                "bytes_up_per_value": float(np.median(list(meter.up.values()))) / dim,
                "bytes_down_per_value": float(np.median(list(meter.down.values()))) / dim,
                "error": float(error) / (64 * n),
            })  # fmt: skip
    return {name: [row[name] for row in rows] for name in rows[0]}


def cases(quick: bool) -> list[Case]:
    sizes = [(10, 8_192, 1), (10, 8_192, 16)]
    if not quick:
        sizes = [(n, d, t) for n in (10, 50) for d in (8_192, 1_000_000) for t in (1, 16)]
        sizes += [(10, d, 1) for d in (2_048, 65_536, 262_144)]
    return [
        {"clients": n, "values": d, "tensors": t, "protection": protection}
        for n, d, t in sorted(sizes)
        for protection in homomorphic.SCHEMES
    ]


def nvflare_runs(case: Case) -> bool:
    """Once a size, beside the scheme that it has as well; sixteen contexts for each of fifty
    clients take gigabytes and add nothing."""
    size = case["clients"] * case["values"] * case["tensors"]
    return facts_of(case["protection"]).approximate and size <= 160_000_000


FAMILY = {"clients": 10, "tensors": 1}
CHAPTER = Chapter(
    name="encryption",
    title="A round under homomorphic encryption",
    about=__doc__,
    keys={"clients": "clients", "values": "values", "tensors": "tensors",
          "protection": "protection"},
    columns=(
        Column("encrypt_ms", "encrypt, ms"), Column("decrypt_ms", "decrypt, ms"),
        Column("server_ms", "server CPU, ms"), Column("bytes_up_per_value", "bytes up per value"),
        Column("bytes_down_per_value", "down", 4), Column("error", "error", 2),
    ),
    cases=cases,
    measure=measure,
    curves=tuple(
        Curve(f"{who} by d, {name}", "values", f"{who}_ms", {**FAMILY, "protection": name})
        for name in homomorphic.SCHEMES
        for who in ("encrypt", "server")
    ),
    peers={"nvflare": nvflare_runs},
)  # fmt: skip
