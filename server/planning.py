"""What the server plans before a round."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from secure_fedprompt.protocol import layout as lay
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt, prompt_bytes
from secure_fedprompt.protocol.errors import ConfigError, PlanError, RunFailedError, TermsError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.plan import (
    MAX_VALUES,
    NO_KEY,
    PlanInputs,
    RoundPlan,
    most_attempts,
)
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.selection.task import SCOPES
from secure_fedprompt.protocol.terms import RunTerms, nonces_digest
from secure_fedprompt.server.settings import (
    ServerSettings,
    bits_of,
    fillers_of,
    noise_of,
    quorum_of,
    weight_of,
)

TENSOR_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,47}")


@dataclass
class RunState:
    """What a restart needs: stored by the run store after every change.

    Attributes:
        run: its id, empty before it has begun; made of ``server_nonce`` and ``commitments``.
        opened: nonces that clients opened, by name.
        terms: of the run, once they are made; signature: of this server on them.
        round: the last round number used; learning_round: the next one to complete; attempt: the
            last at it.
        excluded: clients that dealt bad boxes, or complained falsely.
        pending: an encoded ``Pending``, while a sum is being opened; summed: an encoded
            ``LastSum``, once one was, under masks.
        tensors, start, prompt: the starting and the global prompt, float32, flat; under encryption
            both are the starting one.
        sealed: the global prompt, sealed by the clients, once a round under encryption is done.
        maker, election, key: of the clients' key; see ``RoundPlan``. ``key`` is zeros before there
            is one, and once it must not be used any more.
        keys: digests of all these keys; who holds any of them can open the prompt.
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
    summed: bytes = b""
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
    """Of the clients' key in a round: ``key`` is zeros if the state's maker makes a new one."""

    key: bytes = NO_KEY
    grants: tuple[str, ...] = ()


def elect(
    state: RunState,
    cohort: tuple[str, ...],
    held: Mapping[str, bytes],
    wanted: str,
    unfit: Set[str] = frozenset(),
) -> Keying:
    """Who must be given the clients' key; elects another maker, in ``state``, if the last is gone.

    A new maker makes a new key. It must be able to open a sealed global prompt, so it is then one
    of those who hold a key of the run, the lowest name unless ``wanted`` is one of them. If all
    have been started again, any who were there at the start may have kept what opens the prompt.
    The old key stays registered until the new one is granted.

    Args:
        state: of the run; maker and election may change.
        cohort: of the round.
        held: digest of the key that each client holds.
        wanted: configured maker, or empty.
        unfit: clients whose grants failed; they make no key while somebody else can.

    Raises:
        RunFailedError: nobody who could make a key is left.
    """
    holders = {name for name in cohort if state.key != NO_KEY and held.get(name) == state.key}
    lacking = set(cohort) - holders
    if not lacking or (state.maker in holders and state.maker not in unfit):
        return Keying(state.key, tuple(sorted(lacking)))
    able, early = set(cohort), {nonce.name for nonce in state.commitments}
    if state.sealed:
        able = {name for name in cohort if held.get(name) in state.keys}
    rest = set(cohort) - unfit
    if not (able := able - unfit or rest & early or rest or able):
        raise RunFailedError("no client that can open the sealed prompt is left: start a new run")
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
    secure = settings.selection == "secure"
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
        attempts=most_attempts(regular),
        protection=settings.protection,
        tensors=state.tensors,
        ring_bits=bits_of(settings, n),
        clip=settings.clip,
        weights=settings.weights,
        max_weight=weight_of(settings),
        max_seen=settings.max_seen,
        metrics=settings.metrics,
        regular=int(regular),
        dropout=settings.max_dropout,
        corruption=corruption,
        flood=settings.flood_bits,
        makers=makers if settings.facts.keyed else (),
        helpers=((settings.helper,) if settings.helper else tuple(names)) if secure else (),
        selection=1 + SCOPES.index(settings.selection_scope) if secure else 0,
        keep=settings.selection_keep if federation else 0,
        fillers=fillers_of(settings, n) if federation else 0,
        noise=noise_of(settings, n),
        stage_seconds=settings.stage_seconds,
        training_seconds=settings.training_seconds,
        upload_after=settings.upload_after,
    )
    terms.check()
    return terms


def grown_terms(settings: ServerSettings, roster: Roster, state: RunState) -> RunTerms:
    """The terms of a run that goes on with a changed roster.

    Raises:
        ConfigError: it cannot, or not now.
    """
    assert state.terms is not None
    grown = terms_of(settings, roster, state)
    try:
        grown.succeed(state.terms)
    except TermsError as error:
        raise ConfigError(f"this run cannot go on with the changed roster: {error}") from None
    if state.attempt:  # one prompt, two rosters: each could open a sum of it
        raise ConfigError(
            f"learning round {state.learning_round} has begun with the old roster: start "
            "once more with that file and --stop-after "
            f"{state.learning_round}, then change it"
        )
    return grown


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
    keyed = state.terms.facts.keyed
    chosen = PlanInputs(
        round=state.round,
        attempt=state.attempt,
        learning_round=state.learning_round,
        cohort=cohort,
        base_digest=digest(Purpose.BASE, state.base),
        maker=state.maker if keyed else "",
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
