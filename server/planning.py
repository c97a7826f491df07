"""What the server plans before a round."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from secure_fedprompt.protocol import layout as lay
from secure_fedprompt.protocol import masking
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt, prompt_bytes
from secure_fedprompt.protocol.client_noise import NONE as NO_NOISE
from secure_fedprompt.protocol.client_noise import Noise
from secure_fedprompt.protocol.errors import ConfigError, PlanError, RunFailedError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.fixedpoint import size_layout
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.methods import method_facts
from secure_fedprompt.protocol.plan import (
    MAX_ATTEMPTS,
    MAX_VALUES,
    NO_KEY,
    RoundPlan,
    noise_colluders,
)
from secure_fedprompt.protocol.protections import default_threshold
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.selection.task import SCOPES, Selection
from secure_fedprompt.protocol.terms import Choice, RunTerms, nonces_digest
from secure_fedprompt.server.settings import ServerSettings

TENSOR_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,47}")


@dataclass
class RunState:
    """What a restart needs: stored by the ledger after every change.

    Attributes:
        run: its id, empty before it has begun; made of ``server_nonce`` and ``commitments``.
        opened: nonces that clients opened, by name.
        terms: of the run, once they are made; signature: of this server on them.
        round: the last round number used; learning_round: the next one to complete; attempt: the
            last at it.
        excluded: clients that dealt bad boxes, or complained falsely.
        pending: an encoded ``Pending``, while a sum is being opened.
        tensors, start, prompt: the starting and the global prompt, float32, flat; under encryption
            both are the starting one.
        sealed: the global prompt, sealed by the clients, once a round under encryption is done.
        maker, election, key: of the cohort key; see ``RoundPlan``. ``key`` is zeros before there is
            one, and once it must not be used any more.
        keys: digests of all cohort keys of the run; who holds any of them can open the prompt.
        model_fingerprint, classes_digest: what the first client announced; announced_by: who that
            was, if it is still known.
    """

    run: bytes = b""
    server_nonce: bytes = b""
    commitments: tuple[m.Nonce, ...] = ()
    opened: dict[str, bytes] = field(default_factory=dict)
    terms: RunTerms | None = None
    round: int = 0
    learning_round: int = 1
    attempt: int = 0
    excluded: tuple[str, ...] = ()
    pending: bytes = b""
    tensors: tuple[TensorSpec, ...] = ()
    start: Prompt | None = None
    prompt: Prompt | None = None
    model_fingerprint: bytes = b""
    announced_by: str = ""
    classes_digest: bytes = b""
    sealed: bytes = b""
    maker: str = ""
    election: int = 0
    key: bytes = NO_KEY
    keys: tuple[bytes, ...] = ()

    @property
    def nonces(self) -> tuple[m.Nonce, ...]:
        """The opened ones, as in the terms."""
        return tuple(m.Nonce(name, nonce) for name, nonce in sorted(self.opened.items()))

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
    """Updates that a sum needs, of so many clients of the run."""
    if not settings.facts.hides:
        return settings.min_clients
    return max(settings.threshold, settings.facts.least(clients))


def fewest_of(settings: ServerSettings, clients: int) -> int:
    """The smallest cohort that a round can be planned for.

    Raises:
        PlanError: there is none.
    """
    quorum = quorum_of(settings, clients)
    if settings.graph != "regular" or not settings.facts.masked:
        return quorum
    for n in range(quorum, clients + 1):
        try:
            masking.choose_degree(
                n, dropout=settings.max_dropout,
                corruption=min(settings.max_corruption * clients / n, 0.99),
            )  # fmt: skip
        except PlanError:
            continue
        return n
    raise PlanError(
        f"no k-regular graph of {clients} clients or fewer tolerates {settings.max_dropout:.0%} "
        f'dropout and {settings.max_corruption:.0%} collusion: use graph = "complete"'
    )


def noise_of(settings: ServerSettings, clients: int) -> Noise:
    """The noise of a run with so many clients.

    Raises:
        ConfigError: nobody's noise would count.
    """
    if not settings.dp_noise:
        return NO_NOISE
    quorum = quorum_of(settings, clients)
    colluders = noise_colluders(settings.dp_colluders, clients, quorum)
    if colluders >= quorum:
        raise ConfigError(
            f"dp_colluders = {colluders}: a sum may have only {quorum} clients, so "
            "nobody's noise would count; lower it, or raise threshold or min_clients"
        )
    return Noise(settings.dp_clip, settings.dp_noise, quorum - colluders)


def check_roster(settings: ServerSettings, roster: Roster) -> None:
    """Refuse what no run with this roster can have: thresholds, rings and selections that do not
    fit its number of clients, a helper that is not on it, and noise of nobody.

    Raises:
        ConfigError: naming the key.
    """
    listed = len(roster.with_role("client"))
    if settings.clients > listed:
        raise ConfigError(f"clients = {settings.clients}: the roster has {listed}")
    n = listed  # whoever is on the roster could be in some cohort: quorums must meet in all of it
    least, quorum = default_threshold(n), quorum_of(settings, n)
    if settings.facts.hides and 0 < settings.threshold < least:
        raise ConfigError(
            f"threshold = {settings.threshold}: a sum of {n} clients needs at least "
            f"floor(2n/3) + 1 = {least}"
        )
    if quorum > n:
        key = "threshold" if settings.facts.hides else "min_clients"
        raise ConfigError(f"{key} = {getattr(settings, key)}: the run has {n} clients")
    noise = noise_of(settings, n)
    try:
        size_layout(
            (TensorSpec("prompt", (1,)),), n, clip=settings.clip,
            max_weight=weight_of(settings), max_seen=settings.max_seen,
            ring_bits=settings.ring_bits, metrics=settings.metrics != "off", noise=noise.room,
        )  # fmt: skip
        fewest_of(settings, n)
    except PlanError as error:
        raise ConfigError(f"no round can be planned for {n} clients: {error}") from None
    if settings.selection != "secure":
        return
    names = {member.name for member in roster.members if member.role in ("client", "helper")}
    if settings.helper and settings.helper not in names:
        raise ConfigError(
            f"helper = {settings.helper!r}: no client or helper of this name is on the roster"
        )
    clients = settings.clients or len(roster.with_role("client"))
    try:
        selection_of(settings, clients, settings.helper or "elected").check(clients)
    except PlanError as error:
        raise ConfigError(f"selection = 'secure' with {clients} clients: {error}") from None


def selection_of(settings: ServerSettings, clients: int, helper: str) -> Selection:
    """What plans under these settings select, with a helper of this name."""
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
        helper=helper,
        helper_key=bytes(32),
        helper_signature=bytes(64),
    )


def check_settings(settings: ServerSettings) -> None:
    """Refuse settings that no run can have.

    Raises:
        ConfigError: naming the key.
    """
    settings.check()
    method = method_facts(settings.method)
    if not method.weighted and settings.weights != "uniform":
        raise ConfigError(
            f"weights = {settings.weights!r}: {settings.method} averages without weights; "
            "set weights = 'uniform'"
        )
    if settings.selection == "secure":
        if not method.grouped or settings.fedmgp.rule != "similarity":
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
            "protection": not settings.facts.hides,
            "weights": settings.weights != "uniform",
            "metrics": settings.metrics != "off",
            "selection_scope": settings.selection_scope == "federation",
            "graph": settings.graph == "regular",
        }
        for key in (key for key, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(
                f"{key} = {getattr(settings, key)!r}: dp_noise needs a protected sum on the "
                "complete graph, weights = 'uniform', metrics = 'off' and no counts of slots"
            )
    if settings.facts.hides and not method.hidden:
        raise ConfigError(
            f"protection = {settings.protection!r}: {settings.method} shows every client's prompt "
            "to the others; only 'none' is honest, for comparisons"
        )


def weight_of(settings: ServerSettings) -> int:
    """W_max."""
    return 1 if settings.weights == "uniform" else settings.max_weight


def check_tensors(tensors: tuple[TensorSpec, ...]) -> None:
    """Refuse tensors whose names or sizes are not usable.

    Raises:
        PlanError: naming them.
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


def terms_of(settings: ServerSettings, roster: Roster, state: RunState) -> RunTerms:
    """The terms of a run whose start and nonces are known.

    Raises:
        TermsError: the settings do not allow any with these tensors.
    """
    assert state.start is not None
    names = [member.name for member in roster.with_role("client")]
    n = len(names)
    quorum = quorum_of(settings, n)
    regular = settings.graph == "regular" and settings.facts.masked
    encrypted, secure = settings.facts.encrypted, settings.selection == "secure"
    corruption = settings.max_corruption
    wanted = settings.key_maker
    makers = tuple([wanted] * (wanted in names) + [name for name in names if name != wanted])
    federation = settings.selection_scope == "federation"
    terms = RunTerms(
        run=state.run,
        settings=settings.method_settings().to_bytes(),
        model_fingerprint=state.model_fingerprint,
        classes_digest=state.classes_digest,
        roster_digest=roster.digest,
        start=digest(Purpose.BASE, prompt_bytes(state.start)),
        nonces=nonces_digest(state.nonces),
        clients=n,
        quorum=quorum,
        colluders=settings.facts.tolerated(regular, n, quorum, corruption),
        rounds=settings.rounds,
        attempts=MAX_ATTEMPTS,
        protection=settings.protection,
        tensors=state.tensors,
        ring_bits=settings.ring_bits,
        clip=settings.clip,
        weights=settings.weights,
        max_weight=weight_of(settings),
        max_seen=settings.max_seen,
        metrics=settings.metrics,
        regular=int(regular),
        dropout=settings.max_dropout,
        corruption=corruption,
        flood=settings.flood_bits,
        makers=makers if encrypted else (),
        helpers=((settings.helper,) if settings.helper else tuple(names)) if secure else (),
        selection=1 + SCOPES.index(settings.selection_scope) if secure else 0,
        keep=settings.selection_keep if federation else 0,
        fillers=settings.selection_fillers if federation else 0,
        noise=noise_of(settings, n),
        stage_seconds=settings.stage_seconds,
        training_seconds=settings.training_seconds,
        upload_after=settings.upload_after,
    )
    terms.check()
    return terms


def round_plan(
    state: RunState,
    cohort: tuple[str, ...],
    keying: Keying = Keying(),
    helper: m.Ready | None = None,
) -> RoundPlan:
    """The plan of ``state.round`` for a cohort; ``keying`` from ``elect``, ``helper`` from
    ``elect_helper``.

    Raises:
        PlanError: the terms do not allow one.
    """
    assert state.terms is not None
    encrypted = state.terms.facts.encrypted
    chosen = Choice(
        round=state.round,
        attempt=state.attempt,
        learning_round=state.learning_round,
        cohort=cohort,
        base_digest=digest(Purpose.BASE, state.base),
        maker=state.maker if encrypted else "",
        election=state.election,
        key=keying.key,
        grants=keying.grants,
    )
    if helper is not None:
        chosen = replace(
            chosen, helper=helper.name, helper_key=helper.seal_key,
            helper_signature=helper.signature,
        )  # fmt: skip
    return state.terms.plan(chosen)
