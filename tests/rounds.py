"""Building blocks for protocol tests: deterministic parties, plans and updates."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.party import Keyring, Party
from secure_fedprompt.clients.sum_key import SumKey
from secure_fedprompt.protocol import client_noise, fixedpoint, homomorphic
from secure_fedprompt.protocol.expand import keystream
from secure_fedprompt.protocol.keys import Identity, Member
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.plan import NO_KEY, NO_SEED, RoundPlan
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.protections import default_threshold
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.selection.task import NONE
from secure_fedprompt.protocol.shamir import Entropy

OPEN = Policy(
    min_cohort=1,
    min_survivors=1,
    min_threshold=1,
    colluders=0,
    min_clip=0.0,
    min_weight=1,
    min_seen=1,
    protections=("masks", "bfv", "ckks", "none"),
    graphs=("complete", "regular"),
    selections=("secure", "secure-federation"),
    metrics=(),
    weights=(),
    client_helpers=True,
    min_fillers=1,
    max_lr=10.0,
    max_momentum=0.999,
    max_weight_decay=1.0,
    max_batch_size=1 << 16,
)
CTX = (TensorSpec("ctx", (3, 5)),)
SUMS = SumKey(b"k" * 32)  # what parties of masked plans hold; a run has them make one


def entropy_from(seed: str) -> Entropy:
    """A reproducible byte source for vectors and oracles; never for keys in use."""
    counter = 0

    def read(size: int) -> bytes:
        nonlocal counter
        counter += 1
        return keystream(hashlib.sha256(f"{seed}/{counter}".encode()).digest(), size)

    return read


@functools.cache
def identity(name: str) -> Identity:
    raw = entropy_from(f"identity {name}")
    return Identity(
        Ed25519PrivateKey.from_private_bytes(raw(32)), X25519PrivateKey.from_private_bytes(raw(32))
    )


def names(count: int) -> tuple[str, ...]:
    return tuple(f"c{i:03d}" for i in range(1, count + 1))


@functools.cache
def roster(count: int, *helpers: str) -> Roster:
    members = [Member.of(identity(name), name, "client") for name in names(count)]
    members += [Member.of(identity(name), name, "helper") for name in helpers]
    return Roster.of((*members, Member.of(identity("server"), "server", "server")))


def make_plan(
    count: int,
    *,
    tensors: Sequence[TensorSpec] = CTX,
    ring_bits: int = 32,
    clip: float = 1.0,
    max_weight: int = 64,
    max_seen: int = 100,
    threshold: int | None = None,
    **changes: object,
) -> RoundPlan:
    layout = fixedpoint.size_layout(
        tensors, count, clip=clip, max_weight=max_weight, max_seen=max_seen,
        ring_bits=ring_bits, metrics=True,
    )  # fmt: skip
    t = default_threshold(count) if threshold is None else threshold
    plan = RoundPlan(
        run=bytes(16), terms=bytes(32), round=1, attempt=1, learning_round=1, rounds=1, method="promptfl", protection="masks",
        settings_digest=bytes(32), model_fingerprint=bytes(32), classes_digest=bytes(32),
        roster_digest=roster(count).digest, base_digest=bytes(32), members=count, cohort=names(count),
        quorum=t, threshold=t, degree=0, graph_seed=NO_SEED, clip=clip, max_weight=max_weight,
        uniform=int(max_weight == 1), bucket=0, layout=layout, parameters=homomorphic.NONE, maker="",
        election=0, key=NO_KEY, grants=(), selection=NONE, noise=client_noise.NONE,
    )  # fmt: skip
    if changes.get("protection", "masks") == "masks":
        plan = replace(plan, key=SUMS.digest)
    return replace(plan, **changes)  # type: ignore[arg-type]


def later(plan: RoundPlan, round: int = 2, **changes: object) -> RoundPlan:
    """A plan of the next learning round."""
    base = round.to_bytes(32, "little")
    moved = replace(plan, round=round, learning_round=round, rounds=max(plan.rounds, round))
    return replace(moved, base_digest=base, **changes)  # type: ignore[arg-type]


def vouched(parties: Mapping[str, Party], plan: RoundPlan) -> RoundPlan:
    """The same plan, for whose prompt all parties vouch."""
    for party in parties.values():
        party.journal.note_made(plan.run, plan.learning_round, plan.base_digest, own=True)
    return plan


def make_encrypted_plan(count: int, protection: str, **changes: object) -> RoundPlan:
    """The first encrypted round of a run: the lowest name makes the key and grants it to all."""
    return make_plan(
        count, protection=protection, parameters=homomorphic.choose(protection, count),
        maker=names(count)[0], election=1, grants=names(count)[1:], **changes,
    )  # type: ignore[arg-type]  # fmt: skip


def make_parties(count: int, policy: Policy = OPEN, seed: str = "") -> dict[str, Party]:
    return {
        name: Party(name, identity(name), roster(count), policy, MemoryJournal(),
                    entropy_from(f"{seed} {name}"), Keyring(sums=SUMS))
        for name in names(count)
    }  # fmt: skip


Update = tuple[dict[str, np.ndarray], float]


def make_updates(plan: RoundPlan, seed: int = 0) -> dict[str, Update]:
    rng = np.random.default_rng(seed)
    result: dict[str, Update] = {}
    for name in plan.cohort:
        values = {f.name: rng.normal(0, 0.4, f.shape) for f in plan.layout if f.update}
        seen = int(rng.integers(1, 100))
        values["seen"], values["correct"] = np.float64(seen), np.float64(rng.integers(0, seen + 1))
        values["loss"] = np.float64(rng.uniform(0, 3 * seen))
        result[name] = (values, float(rng.integers(1, plan.max_weight + 1)))
    return result


def own_words(
    plan: RoundPlan, updates: Mapping[str, Update], name: str, seed: str = ""
) -> np.ndarray:
    """What a client protects: its update, encoded with its own rounding stream."""
    from secure_fedprompt.protocol.masking import RoundSecrets

    values, weight = updates[name]
    full = {**values, "weight": np.float64(weight), "contributors": np.float64(1)}
    vector = fixedpoint.weighted(plan.layout, full, weight=weight, clip=plan.clip)
    key = RoundSecrets.fresh(entropy_from(f"{seed} {name}")).rounding
    return fixedpoint.encode(plan.layout, vector, key)


def plain_sum(
    plan: RoundPlan, updates: Mapping[str, Update], who: Sequence[str], seed: str = ""
) -> np.ndarray:
    """The reference: encode each update with the client's own rounding stream and add integers."""
    from secure_fedprompt.protocol import layout as lay

    total = np.zeros(lay.total_size(plan.layout), np.int64)
    for name in who:
        total += fixedpoint.to_integers(plan.layout, own_words(plan, updates, name, seed))
    return total


def float_sum(plan: RoundPlan, updates: dict[str, Update], who: Sequence[str]) -> np.ndarray:
    """The float64 reference, before any rounding."""
    from secure_fedprompt.protocol import layout as lay

    total = np.zeros(lay.total_size(plan.layout))
    for name in who:
        values, weight = updates[name]
        full = {**values, "weight": np.float64(weight), "contributors": np.float64(1)}
        total += fixedpoint.weighted(plan.layout, full, weight=weight, clip=plan.clip)
    return total
