"""The server's file."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from secure_fedprompt.protocol import masking
from secure_fedprompt.protocol.client_noise import NONE as NO_NOISE
from secure_fedprompt.protocol.client_noise import Noise
from secure_fedprompt.protocol.errors import ConfigError, PlanError
from secure_fedprompt.protocol.fixedpoint import size_layout, smallest_ring
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.methods import method_facts
from secure_fedprompt.protocol.plan import (
    noise_colluders,
)
from secure_fedprompt.protocol.protections import Protection, default_threshold, facts_of
from secure_fedprompt.protocol.ring import MAX_BITS, MIN_BITS
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.selection.task import SCOPES, Selection
from secure_fedprompt.protocol.settings import (
    AuditMode,
    Count,
    Digits,
    FilePath,
    Graph,
    LogLevel,
    LogPath,
    MethodSettings,
    Metrics,
    NonNegative,
    Positive,
    Protecting,
    Rate,
    Seconds,
    SelectionMode,
    SelectionScope,
    TrackPath,
    Weights,
)


class ServerSettings(MethodSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The server's file.

    Attributes:
        preset: "published" for the settings that the method was published with, in the place of
            defaults; what the file or a flag says stays.
        key: own key file.
        roster: the federation's public roster file, the same everywhere.
        bind: ZeroMQ address to listen on.
        run_dir: folder of this run; one that holds an unfinished run is resumed.
        start_prompt: prompt to begin from in the place of init and seed: a prompt file, or the run
            folder of a server for the last one in it. Every client must hold it, as those who
            finished that run do.
        clients: clients to wait for; 0 is all on the roster.
        min_clients: fewest clients to go on with; never below the quorum, floor(2n/3) + 1 of all
            clients on the roster, except without protection.
        rounds: learning rounds.
        stop_after: stop in good order after this learning round (or after the one that is under
            way), to go on later with the same run_dir, and perhaps a larger roster; 0 is off.
        max_attempts: tries of a learning round before the run fails; 0 is as many as clients allow,
            200, or 10 on a regular graph. After the second one more time passes before each, up to
            a minute.
        protection: "masks"; "bfv" or "ckks" (the server adds ciphertexts and learns no sum; no
            client may collude with it); "none" for benchmarks.
        key_maker: client that makes the key that clients share; empty is the lowest name.
        flood_bits: k of the statistical distance 2^-k of ckks' flooding.
        selection: of FedMGP's groups to upload: "client" (published: each client draws its own), or
            "secure" (server and a helper, on scores that neither can read).
        selection_scope: of "secure": "client" for the published rule, or "federation" for the
            largest keys of all clients' groups, whoever owns them: each fills as many slots.
        selection_keep: groups that scope "federation" takes of each kind; 0 is slots x clients.
        selection_fillers: fewest clients that must fill a slot in scope "federation", or it keeps
            its value; 0 is c + 2, with the c that the smallest quorum tolerates: colluders can
            subtract what they fill.
        helper: name of the helper, a client or a process of role helper; empty elects a client,
            whom clients accept only if their policies say so.
        dp_noise: z of client-level differential privacy: the sum's noise has deviation z x dp_clip
            in each value. 0 is off. 'explain' prints epsilon.
        dp_clip: largest L2 norm of a client's whole update.
        dp_colluders: clients of a quorum whose noise does not count, since they can subtract it; -1
            is c = min(2t - n - 1, t - 2), and one at least.
        graph: "complete", or "regular" (k neighbours, honest-but-curious server) for large cohorts.
        threshold: t, the quorum; 0 means floor(2n/3) + 1, and less is refused. -1 is everybody on
            the roster: who is in one of two sums only can be told by their difference.
        max_dropout: share of clients that a regular graph tolerates as lost.
        max_corruption: share of clients that a regular graph tolerates as colluding.
        ring_bits: b, width of the update words on the wire, 8 to 32; 0 is the smallest with steps
            of clip / 131072 or finer, 22 for ten clients of weight 1.
        clip: C, largest magnitude of an update value; an update with larger ones is scaled down.
        weights: "uniform"; "bucket" (n_k rounded down to a power of two) or "samples" (n_k). Under
            the last two a dropout between two rounds can reveal a client's bucket, or its n_k.
        max_weight: W_max, largest weight; more images count as so many.
        max_seen: largest number of test images a client counts.
        metrics: protected counts of accuracy and loss: "final" (once, of the final prompt),
            "rounds" (in every round: a dropout between two can reveal a client's counts) or "off".
        gather_seconds: to wait for all clients, at the start and whenever too few are left; after
            that a quorum will do.
        patience: seconds to wait for a quorum after that, before the run fails.
        stage_seconds: for each answer of a round but the upload.
        training_seconds: for training and the upload, and to encode images at the start.
        upload_after: seconds from a round's plan before which no client uploads, so that nobody's
            training time shows; 0 is off.
        alive_seconds: silence after which a client counts as gone.
        audit: log of frames, in run_dir/audit: "off", "headers" (sizes, digests), or "full".
        audit_mb: most megabytes of that log; its oldest parts go first.
        metrics_bind: HOST:PORT on which Prometheus may ask for rounds, bytes, seconds and faults,
            in sum over clients; empty is off. It asks for no password: 127.0.0.1, or a network of
            the operator's own.
        track: aggregate metrics and epsilon by round to "tensorboard:DIR", "mlflow:URI" or
            "wandb:PROJECT" (an extra each); empty is nowhere.
        log: file to append what the terminal shows to (objects, if it ends in .jsonl); or "json",
            for objects in the place of text on the terminal.
        log_level: least that is told: "debug", "info", "warning" or "error".
        model_fingerprint: of the model that every client must hold, as the first hex digits that
            'secure-fedprompt check' prints; empty takes what the first client announces.
        classes_digest: the same for the class list.
    """

    preset: Literal["", "published"] = ""
    key: FilePath = "server.pem"
    roster: FilePath = "roster.toml"
    bind: str = "tcp://127.0.0.1:5570"
    run_dir: FilePath = "runs/{time}"
    start_prompt: FilePath = ""
    clients: Count = 0
    min_clients: Positive = 3
    rounds: Positive = 10
    stop_after: Count = 0
    max_attempts: Annotated[int, Meta(ge=0, le=200)] = 0
    protection: Protecting = "masks"
    key_maker: str = ""
    flood_bits: Annotated[int, Meta(ge=1, le=24)] = 8
    selection: SelectionMode = "client"
    selection_scope: SelectionScope = "client"
    selection_keep: Count = 0
    selection_fillers: Count = 0
    helper: str = ""
    dp_noise: NonNegative = 0.0
    dp_clip: Rate = 1.0
    dp_colluders: Annotated[int, Meta(ge=-1, le=65535)] = -1
    graph: Graph = "complete"
    threshold: Annotated[int, Meta(ge=-1)] = 0
    max_dropout: NonNegative = 0.1
    max_corruption: NonNegative = 0.1
    ring_bits: Annotated[int, Meta(ge=0, le=32)] = 32
    clip: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    weights: Weights = "uniform"
    max_weight: Positive = 4096
    max_seen: Positive = 65536
    metrics: Metrics = "final"
    gather_seconds: Seconds = 300.0
    patience: Seconds = 14400.0
    stage_seconds: Seconds = 30.0
    training_seconds: Seconds = 900.0
    upload_after: NonNegative = 0.0
    alive_seconds: Seconds = 15.0
    audit: AuditMode = "headers"
    audit_mb: Positive = 2048
    metrics_bind: str = ""
    track: TrackPath = ""
    log: LogPath = ""
    log_level: LogLevel = "info"
    model_fingerprint: Digits = ""
    classes_digest: Digits = ""

    @property
    def facts(self) -> Protection:
        """Of its protection."""
        return facts_of(self.protection)

    def method_settings(self) -> MethodSettings:
        names = MethodSettings.__struct_fields__
        return MethodSettings(**{name: getattr(self, name) for name in names})


def quorum_of(settings: ServerSettings, clients: int) -> int:
    """Updates that a sum needs, of so many clients of the run."""
    if not settings.facts.hides:
        return settings.min_clients
    wanted = clients if settings.threshold < 0 else settings.threshold
    return max(wanted, settings.facts.least(clients))


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


def fillers_of(settings: ServerSettings, clients: int) -> int:
    """Fewest clients of a slot, of so many on the roster."""
    regular, least = settings.graph == "regular", settings.facts.least(clients)
    colluders = settings.facts.tolerated(regular, clients, least) if settings.facts.hides else 1
    return settings.selection_fillers or max(3, colluders + 2)


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
            ring_bits=bits_of(settings, n), metrics=settings.metrics != "off", noise=noise.room,
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
        fillers=fillers_of(settings, clients) if federation else 0,
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
    if 0 < settings.ring_bits < MIN_BITS:
        raise ConfigError(
            f"ring_bits = {settings.ring_bits}: {MIN_BITS} to {MAX_BITS}, or 0 for the smallest"
        )
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


def bits_of(settings: ServerSettings, clients: int) -> int:
    """b."""
    return settings.ring_bits or smallest_ring(
        clients, clip=settings.clip, max_weight=weight_of(settings),
        noise=noise_of(settings, clients).room,
    )  # fmt: skip


def weight_of(settings: ServerSettings) -> int:
    """W_max."""
    return 1 if settings.weights == "uniform" else settings.max_weight
