"""What the server plans before a round."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from secure_fedprompt.protocol import homomorphic, masking, shamir
from secure_fedprompt.protocol import layout as lay
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt, prompt_bytes
from secure_fedprompt.protocol.errors import PlanError, RunFailedError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.fixedpoint import size_layout
from secure_fedprompt.protocol.homomorphic import SCHEMES
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.plan import (
    MAX_VALUES,
    NO_KEY,
    NO_SEED,
    RoundPlan,
    default_threshold,
)
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.settings import ServerSettings

TENSOR_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,47}")


@dataclass
class RunState:
    """What a restart needs: stored by the ledger after every change.

    Attributes:
        run: its id, empty before it has begun; made of ``server_nonce`` and ``nonces``.
        round: the last round number used; learning_round: the next one to complete.
        tensors, prompt: the global prompt, float32, flat; under encryption the starting one.
        sealed: the global prompt, sealed by the clients, once a round under encryption is done.
        maker, election, key: of the cohort key; see ``RoundPlan``.
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
    sealed: bytes = b""
    maker: str = ""
    election: int = 0
    key: bytes = NO_KEY

    @property
    def base(self) -> bytes:
        """The global prompt as it goes into plans."""
        return self.sealed or (b"" if self.prompt is None else prompt_bytes(self.prompt))


def elect(
    state: RunState, cohort: tuple[str, ...], held: Mapping[str, bytes], wanted: str
) -> tuple[str, ...]:
    """Who must be given the cohort key; elects another maker, in ``state``, if the last is gone.

    A new maker makes a new key. It must be able to open the global prompt, so it is one of those
    who hold the last key, the lowest name unless ``wanted`` is one of them.

    Args:
        state: of the run; maker, election and key may change.
        cohort: of the round.
        held: digest of the key that each client holds.
        wanted: configured maker, or empty.

    Raises:
        RunFailedError: nobody who holds the key is left.
    """
    holders = {name for name in cohort if state.key != NO_KEY and held.get(name) == state.key}
    lacking = set(cohort) - holders
    if lacking and state.maker not in holders:
        able = holders if state.sealed else set(cohort)
        if not able:
            raise RunFailedError(
                "no client that can open the sealed prompt is left: start a new run"
            )
        state.maker = wanted if wanted in able else min(able)
        state.election, state.key = state.election + 1, NO_KEY
        lacking = set(cohort) - {state.maker}
    return tuple(sorted(lacking))


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


def round_plan(
    settings: ServerSettings,
    roster: Roster,
    state: RunState,
    cohort: tuple[str, ...],
    entropy: shamir.Entropy,
    grants: tuple[str, ...] = (),
) -> RoundPlan:
    """The plan of ``state.round`` for a cohort; ``grants`` from ``elect``.

    Raises:
        PlanError: the settings do not allow one.
    """
    assert state.prompt is not None
    n, training = len(cohort), state.learning_round <= settings.rounds
    uniform = settings.weights == "uniform"
    encrypted = settings.protection in SCHEMES
    shares = settings.protection == "masks"
    quorum = settings.threshold or (default_threshold(n) if shares else settings.min_clients)
    degree, threshold, seed = 0, quorum, NO_SEED
    if settings.graph == "regular" and shares:
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
        base_digest=digest(Purpose.BASE, state.base),
        cohort=cohort,
        quorum=quorum,
        threshold=threshold,
        degree=degree,
        graph_seed=seed,
        clip=settings.clip,
        max_weight=1 if uniform else settings.max_weight,
        uniform=int(uniform),
        layout=upload_layout(settings, state.tensors if training else (), n),
        parameters=homomorphic.choose(
            settings.protection, len(roster.with_role("client")), settings.flood_bits
        ),
        maker=state.maker if encrypted else "",
        election=state.election,
        key=state.key,
        grants=grants,
    )
