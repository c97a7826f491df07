"""What the server plans before a round."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass

from secure_fedprompt.protocol import homomorphic, masking, shamir
from secure_fedprompt.protocol import layout as lay
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt, prompt_bytes
from secure_fedprompt.protocol.client_noise import NONE as NO_NOISE
from secure_fedprompt.protocol.client_noise import Noise
from secure_fedprompt.protocol.errors import ConfigError, PlanError, RunFailedError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.fixedpoint import size_layout
from secure_fedprompt.protocol.homomorphic import SCHEMES
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.plan import (
    MAX_VALUES,
    NO_KEY,
    NO_SEED,
    UNPROTECTED,
    RoundPlan,
    default_threshold,
)
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.selection.task import NONE, SCOPES, Selection
from secure_fedprompt.protocol.settings import ServerSettings

UNWEIGHTED = ("fedmgp",)
TENSOR_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,47}")


@dataclass
class RunState:
    """What a restart needs: stored by the ledger after every change.

    Attributes:
        run: its id, empty before it has begun; made of ``server_nonce`` and ``nonces``.
        round: the last round number used; learning_round: the next one to complete.
        tensors, prompt: the global prompt, float32, flat; under encryption the starting one.
        sealed: the global prompt, sealed by the clients, once a round under encryption is done.
        maker, election, key: of the cohort key; see ``RoundPlan``. ``key`` is zeros before there is
            one, and once it must not be used any more.
        keys: digests of all cohort keys of the run; who holds any of them can open the prompt.
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
    keys: tuple[bytes, ...] = ()

    @property
    def base(self) -> bytes:
        """The global prompt as it goes into plans."""
        return self.sealed or (b"" if self.prompt is None else prompt_bytes(self.prompt))


@dataclass(frozen=True)
class Keying:
    """Of the cohort key in a round: ``key`` is zeros if the state's maker makes a new one."""

    key: bytes = NO_KEY
    grants: tuple[str, ...] = ()


def elect(
    state: RunState,
    cohort: tuple[str, ...],
    held: Mapping[str, bytes],
    wanted: str,
    unfit: Set[str] = frozenset(),
) -> Keying:
    """Who must be given the cohort key; elects another maker, in ``state``, if the last is gone.

    A new maker makes a new key. It must be able to open the global prompt, so it is one of those
    who hold a key of the run, the lowest name unless ``wanted`` is one of them. The old key stays
    registered until the new one is granted.

    Args:
        state: of the run; maker and election may change.
        cohort: of the round.
        held: digest of the key that each client holds.
        wanted: configured maker, or empty.
        unfit: clients whose grants failed; they make no key while somebody else can.

    Raises:
        RunFailedError: nobody who holds a key is left.
    """
    holders = {name for name in cohort if state.key != NO_KEY and held.get(name) == state.key}
    lacking = set(cohort) - holders
    if not lacking or (state.maker in holders and state.maker not in unfit):
        return Keying(state.key, tuple(sorted(lacking)))
    able = {name for name in cohort if held.get(name) in state.keys} if state.sealed else {*cohort}
    if not able:
        raise RunFailedError("no client that can open the sealed prompt is left: start a new run")
    able = able - unfit or able
    state.maker = wanted if wanted in able else min(able)
    state.election += 1
    return Keying(NO_KEY, tuple(sorted(set(cohort) - {state.maker})))


def elect_helper(
    settings: ServerSettings, state: RunState, ready: Mapping[str, m.Ready], unfit: Set[str]
) -> m.Ready | None:
    """Who evaluates the selection of the next round, or None if it has none.

    The configured helper; else the lowest name of those who did not fail as helpers.

    Args:
        ready: run keys of all clients and helpers that are there.

    Raises:
        RunFailedError: the configured helper is not there.
    """
    training = 1 < state.learning_round <= settings.rounds
    if settings.selection != "secure" or not training:
        return None
    wanted = settings.helper
    if wanted:
        if wanted not in ready:
            raise RunFailedError(f"helper {wanted!r} is not there: start it, or set helper = ''")
        return ready[wanted]
    return ready[min(set(ready) - unfit or set(ready))]


def quorum_of(settings: ServerSettings, clients: int) -> int:
    """Updates that a sum needs."""
    shares = settings.protection == "masks"
    return settings.threshold or (default_threshold(clients) if shares else settings.min_clients)


def noise_of(settings: ServerSettings, quorum: int) -> Noise:
    """The plan's client noise under these settings."""
    if not settings.dp_noise:
        return NO_NOISE
    if settings.dp_colluders >= quorum:
        raise ConfigError(
            f"dp_colluders = {settings.dp_colluders}: a sum may have only {quorum} clients, so "
            "nobody's noise would count; lower it, or raise threshold or min_clients"
        )
    return Noise(settings.dp_clip, settings.dp_noise, quorum - settings.dp_colluders)


def check_roster(settings: ServerSettings, roster: Roster) -> None:
    """Refuse a helper that is not on the roster, selections too large for it, and noise of nobody.

    Raises:
        ConfigError: naming the key.
    """
    noise_of(settings, quorum_of(settings, settings.clients or len(roster.with_role("client"))))
    if settings.selection != "secure":
        return
    names = {member.name for member in roster.members if member.role in ("client", "helper")}
    if settings.helper and settings.helper not in names:
        raise ConfigError(
            f"helper = {settings.helper!r}: no client or helper of this name is on the roster"
        )
    clients = settings.clients or len(roster.with_role("client"))
    helper = m.Ready(bytes(16), settings.helper or "elected", bytes(32), bytes(32), bytes(64))
    try:
        selection_of(settings, clients, helper).check(clients)
    except PlanError as error:
        raise ConfigError(f"selection = 'secure' with {clients} clients: {error}") from None


def selection_of(settings: ServerSettings, clients: int, helper: m.Ready | None) -> Selection:
    """The plan's selection under these settings."""
    if helper is None:
        return NONE
    o = settings.fedmgp
    modalities = 2 if o.modality == "both" else 1
    federation = settings.selection_scope == "federation"
    keep = min(settings.selection_keep or o.slots * clients, o.groups * clients)
    return Selection(
        scope=1 + SCOPES.index(settings.selection_scope),
        modalities=modalities,
        groups=o.groups,
        slots=o.slots,
        keep=keep if federation else 0,
        fillers=settings.selection_fillers if federation else 0,
        helper=helper.name,
        helper_key=helper.seal_key,
        helper_signature=helper.signature,
    )


def check_settings(settings: ServerSettings) -> None:
    """Refuse settings that no run can have.

    Raises:
        ConfigError: naming the key.
    """
    settings.check()
    if settings.method in UNWEIGHTED and settings.weights != "uniform":
        raise ConfigError(
            f"weights = {settings.weights!r}: {settings.method} averages without weights; "
            "set weights = 'uniform'"
        )
    if settings.selection == "secure":
        if settings.method != "fedmgp" or settings.fedmgp.rule != "similarity":
            raise ConfigError(
                f"selection = 'secure': {settings.method} with rule {settings.fedmgp.rule!r} "
                "compares no keys; use method = 'fedmgp' and fedmgp.rule = 'similarity'"
            )
    elif settings.selection_scope != "client" or settings.selection_keep or settings.helper:
        raise ConfigError(
            f"selection = {settings.selection!r}: selection_scope, selection_keep and helper need "
            "selection = 'secure'"
        )
    if settings.selection_keep and settings.selection_scope != "federation":
        raise ConfigError(
            f"selection_keep = {settings.selection_keep}: needs selection_scope = 'federation'"
        )
    if settings.dp_noise:
        wrong = {
            "protection": settings.protection == "none",
            "weights": settings.weights != "uniform",
            "metrics": settings.metrics,
            "selection_scope": settings.selection_scope == "federation",
            "graph": settings.graph == "regular",
        }
        for key in (key for key, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(
                f"{key} = {getattr(settings, key)!r}: dp_noise needs a protected sum on the "
                "complete graph, weights = 'uniform', metrics = false and no counts of slots"
            )
    if settings.method in UNPROTECTED and settings.protection != "none":
        raise ConfigError(
            f"protection = {settings.protection!r}: {settings.method} shows every client's prompt "
            "to the others; only 'none' is honest, for comparisons"
        )


def upload_layout(
    settings: ServerSettings,
    tensors: tuple[TensorSpec, ...],
    clients: int,
    selection: Selection = NONE,
    noise: Noise = NO_NOISE,
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
        filled=selection.slots if selection.federation else 0,
        noise=noise.room,
    )


def round_plan(
    settings: ServerSettings,
    roster: Roster,
    state: RunState,
    cohort: tuple[str, ...],
    entropy: shamir.Entropy,
    keying: Keying = Keying(),
    helper: m.Ready | None = None,
) -> RoundPlan:
    """The plan of ``state.round`` for a cohort; ``keying`` from ``elect``, ``helper`` from
    ``elect_helper``.

    Raises:
        PlanError: the settings do not allow one.
    """
    assert state.prompt is not None
    n, training = len(cohort), state.learning_round <= settings.rounds
    quorum = quorum_of(settings, n)
    selection = selection_of(settings, n, helper)
    noise = noise_of(settings, quorum) if training else NO_NOISE
    uniform = settings.weights == "uniform"
    encrypted = settings.protection in SCHEMES
    shares = settings.protection == "masks"
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
        layout=upload_layout(settings, state.tensors if training else (), n, selection, noise),
        parameters=homomorphic.choose(
            settings.protection, len(roster.with_role("client")), settings.flood_bits
        ),
        maker=state.maker if encrypted else "",
        election=state.election,
        key=keying.key,
        grants=keying.grants,
        selection=selection,
        noise=noise,
    )
