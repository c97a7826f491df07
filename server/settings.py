"""The server's file."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from secure_fedprompt.protocol.protections import Protection, facts_of
from secure_fedprompt.protocol.settings import (
    Count,
    Digits,
    FilePath,
    LogPath,
    MethodSettings,
    NonNegative,
    Positive,
    Rate,
    Seconds,
)


class ServerSettings(MethodSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The server's file.

    Attributes:
        key: own key file.
        roster: the federation's public roster file, the same everywhere.
        bind: ZeroMQ address to listen on.
        run_dir: folder of this run; one that holds an unfinished run is resumed.
        clients: clients to wait for; 0 is all on the roster.
        min_clients: fewest clients to go on with; never below the quorum, floor(2n/3) + 1 of all
            clients on the roster, except without protection.
        rounds: learning rounds.
        stop_after: stop in good order after this learning round (or after the one that is under
            way), to go on later with the same run_dir, and perhaps a larger roster; 0 is off.
        max_attempts: tries of a learning round before the run fails; clients allow 10.
        protection: "masks"; "bfv" or "ckks" (the server adds ciphertexts and learns no sum; it must
            be honest-but-curious, and no client may collude with it); "none" for benchmarks.
        key_maker: client that makes the cohort key of bfv and ckks; empty is the lowest name.
        flood_bits: k of the statistical distance 2^-k of ckks' flooding.
        selection: of FedMGP's groups to upload: "client" (published: each client draws its own), or
            "secure" (server and a helper, on scores that neither can read).
        selection_scope: of "secure": "client" for the published rule, or "federation" for the
            largest keys of all clients' groups, whoever owns them: each fills as many slots.
        selection_keep: groups that scope "federation" takes of each kind; 0 is slots x clients.
        selection_fillers: fewest clients that must fill a slot in scope "federation", or it keeps
            its value; below 3 one filler could subtract itself.
        helper: name of the helper, a client or a process of role helper; empty elects a client.
        dp_noise: z of client-level differential privacy: the sum's noise has deviation z x dp_clip
            in each value. 0 is off. 'explain' prints epsilon.
        dp_clip: largest L2 norm of a client's whole update.
        dp_colluders: clients of a quorum whose noise does not count, since they can subtract it; -1
            is c = min(2t - n - 1, t - 2), and one at least.
        graph: "complete", or "regular" (k neighbours, honest-but-curious server) for large cohorts.
        threshold: t, the quorum; 0 means floor(2n/3) + 1, and less is refused.
        max_dropout: share of clients that a regular graph tolerates as lost.
        max_corruption: share of clients that a regular graph tolerates as colluding.
        ring_bits: b, width of the update words on the wire.
        clip: C, largest magnitude of an update value.
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
        log: file to append what the terminal shows to (objects, if it ends in .jsonl); or "json",
            for objects in the place of text on the terminal.
        log_level: least that is told: "debug", "info", "warning" or "error".
        model_fingerprint: of the model that every client must hold, as the first hex digits that
            'secure-fedprompt check' prints; empty takes what the first client announces.
        classes_digest: the same for the class list.
    """

    key: FilePath = "server.pem"
    roster: FilePath = "roster.toml"
    bind: str = "tcp://127.0.0.1:5570"
    run_dir: FilePath = "runs/{time}"
    clients: Count = 0
    min_clients: Positive = 3
    rounds: Positive = 10
    stop_after: Count = 0
    max_attempts: Annotated[int, Meta(ge=1, le=10)] = 3
    protection: str = "masks"
    key_maker: str = ""
    flood_bits: Annotated[int, Meta(ge=1, le=24)] = 8
    selection: str = "client"
    selection_scope: str = "client"
    selection_keep: Count = 0
    selection_fillers: Positive = 3
    helper: str = ""
    dp_noise: NonNegative = 0.0
    dp_clip: Rate = 1.0
    dp_colluders: Annotated[int, Meta(ge=-1, le=65535)] = -1
    graph: str = "complete"
    threshold: Count = 0
    max_dropout: NonNegative = 0.1
    max_corruption: NonNegative = 0.1
    ring_bits: Annotated[int, Meta(ge=8, le=32)] = 32
    clip: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    weights: str = "uniform"
    max_weight: Positive = 4096
    max_seen: Positive = 65536
    metrics: str = "final"
    gather_seconds: Seconds = 300.0
    patience: Seconds = 14400.0
    stage_seconds: Seconds = 30.0
    training_seconds: Seconds = 900.0
    upload_after: NonNegative = 0.0
    alive_seconds: Seconds = 15.0
    audit: str = "headers"
    audit_mb: Positive = 2048
    log: LogPath = ""
    log_level: str = "info"
    model_fingerprint: Digits = ""
    classes_digest: Digits = ""

    @property
    def facts(self) -> Protection:
        """Of its protection."""
        return facts_of(self.protection)

    def method_settings(self) -> MethodSettings:
        names = MethodSettings.__struct_fields__
        return MethodSettings(**{name: getattr(self, name) for name in names})
