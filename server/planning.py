"""The server's arithmetic around a round: what is planned before it, what is averaged after it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol import layout as lay
from secure_fedprompt.protocol import masking, shamir
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import PlanError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.fixedpoint import size_layout
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.plan import MAX_VALUES, NO_SEED, RoundPlan, default_threshold
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.settings import ServerSettings

Prompt = NDArray[np.float32]
TENSOR_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,47}")


@dataclass
class RunState:
    """What a restart needs: stored by the ledger after every change.

    Attributes:
        run: its id, empty before it has begun; made of ``server_nonce`` and ``nonces``.
        round: the last round number used; learning_round: the next one to complete.
        tensors, prompt: the global prompt, float32, flat.
        model_fingerprint, classes_digest, class_count: what the first client announced.
    """

    run: bytes = b""
    server_nonce: bytes = b""
    nonces: tuple[m.Nonce, ...] = ()
    round: int = 0
    learning_round: int = 1
    tensors: tuple[TensorSpec, ...] = ()
    prompt: Prompt | None = None
    model_fingerprint: bytes = b""
    classes_digest: bytes = b""
    class_count: int = 0


def upload_layout(
    settings: ServerSettings, tensors: tuple[TensorSpec, ...], clients: int
) -> lay.Layout:
    """The upload layout for a number of clients.

    Raises:
        PlanError: no layout fits, or the tensors' names or sizes are not usable.
    """
    names = [tensor.name for tensor in tensors]
    reserved = {lay.WEIGHT, lay.CONTRIBUTORS, *lay.METRICS}
    if len(set(names)) != len(names) or reserved & set(names):
        raise PlanError(f"tensor names {names} are doubled or reserved")
    if not all(TENSOR_NAME.fullmatch(name) for name in names):
        raise PlanError(f"tensor names {names}: use letters, digits, '_' and '.'")
    if any(tensor.size < 1 for tensor in tensors):
        raise PlanError("a tensor without values")
    if sum(tensor.size for tensor in tensors) > MAX_VALUES:
        raise PlanError(f"prompt of more than {MAX_VALUES} values")
    return size_layout(
        tensors,
        clients,
        clip=settings.clip,
        max_weight=1 if settings.weights == "uniform" else settings.max_weight,
        max_seen=settings.max_seen,
        ring_bits=settings.ring_bits,
        metrics=settings.metrics,
    )


def prompt_bytes(prompt: Prompt) -> bytes:
    """As on the wire: float32 little-endian."""
    return prompt.astype("<f4").tobytes()


def round_plan(
    settings: ServerSettings,
    roster: Roster,
    state: RunState,
    cohort: tuple[str, ...],
    entropy: shamir.Entropy,
) -> RoundPlan:
    """The plan of ``state.round`` for a cohort.

    Raises:
        PlanError: the settings do not allow one.
    """
    assert state.prompt is not None
    n, training = len(cohort), state.learning_round <= settings.rounds
    uniform = settings.weights == "uniform"
    quorum = settings.threshold or default_threshold(n)
    degree, threshold, seed = 0, quorum, NO_SEED
    if settings.graph == "regular":
        degree, threshold = masking.choose_degree(
            n, dropout=settings.max_dropout, corruption=settings.max_corruption
        )
        seed = entropy(32)
    return RoundPlan(
        run=state.run,
        round=state.round,
        learning_round=state.learning_round,
        rounds=settings.rounds,
        method=settings.method,
        protection=settings.protection,
        settings_digest=digest(Purpose.SETTINGS, settings.method_settings().to_bytes()),
        model_fingerprint=state.model_fingerprint,
        classes_digest=state.classes_digest,
        roster_digest=roster.digest,
        base_digest=digest(Purpose.BASE, prompt_bytes(state.prompt)),
        cohort=cohort,
        quorum=quorum,
        threshold=threshold,
        degree=degree,
        graph_seed=seed,
        clip=settings.clip,
        max_weight=1 if uniform else settings.max_weight,
        uniform=int(uniform),
        layout=upload_layout(settings, state.tensors if training else (), n),
    )


def averaged(prompt: Prompt, layout: lay.Layout, total: Mapping[str, lay.Vector]) -> Prompt:
    """FedAvg: global + sum(n_k * delta_k) / sum(n_k). McMahan et al. 2017, Algorithm 1.

    Saturated to finite float32: a malicious ring vector must not leave a file that none can use.
    """
    updates = [total[f.name].reshape(-1) for f in layout if f.update]
    mean = np.concatenate(updates) / float(total[lay.WEIGHT])
    limit = float(np.finfo(np.float32).max)
    moved = np.clip(prompt.astype(np.float64) + mean, -limit, limit)
    return np.nan_to_num(moved).astype(np.float32)


def metrics_of(total: Mapping[str, lay.Vector]) -> dict[str, float]:
    """The aggregate metrics of a round; accuracy and loss are the incoming prompt's."""
    metrics = {
        "weight": float(total[lay.WEIGHT]),
        "contributors": float(total[lay.CONTRIBUTORS]),
    }
    if lay.SEEN in total and (seen := float(total[lay.SEEN])) > 0:
        metrics |= {
            "accuracy": float(total[lay.CORRECT]) / seen,
            "loss": float(total[lay.LOSS]) / seen,
            "seen": seen,
            "clipped": float(total.get(lay.CLIPPED, 0.0)),
        }
    return metrics
