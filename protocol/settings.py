"""The settings that server and clients share, as frozen structs. ``command`` reads them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.methods import METHODS, unknown_method
from secure_fedprompt.protocol.protections import PROTECTIONS, Protection, facts_of

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Strength = Annotated[float, Meta(ge=0, le=1e4)]  # of a term of the loss
Digits = Annotated[str, Meta(pattern="^[0-9a-f]{0,64}$")]  # hexadecimal, the first of a digest
# Paths: relative ones are relative to the configuration file, or on the command line to its folder.
FilePath = Annotated[str, Meta(extra={"path": "file"})]
LogPath = Annotated[str, Meta(extra={"path": "log"})]  # or "json"
DataPath = Annotated[str, Meta(extra={"path": "data"})]  # or the name of a data set
ModelPath = Annotated[str, Meta(extra={"path": "model"})]  # or the name of a model or its weights


class FedOTPSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """FedOTP (CVPR 2024).

    Attributes:
        transport: "unbalanced", "classical" or "average".
        eps: entropic regularisation; the paper takes 0.1 (CIFAR) and 0.01 (few-shot).
        gamma: share of an image's patches that must be matched, unbalanced transport only.
        iterations: most updates of a transport plan.
    """

    transport: str = "unbalanced"
    eps: Annotated[float, Meta(ge=1e-3, le=10)] = 0.1
    gamma: Annotated[float, Meta(gt=0, le=1)] = 0.8
    iterations: Annotated[int, Meta(ge=1, le=10000)] = 100


class FedMGPSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """FedMGP (NeurIPS 2025). Its slots are averaged without weights: set weights = "uniform".

    Attributes:
        groups: m, pairs of a text and a visual prompt on each client.
        slots: s, groups that a client sends in a round, at most m.
        length: l, tokens of each prompt.
        diversity_weight: lambda.
        diversity: "cosine" (the paper's), "l1" or "l2".
        compat: "released" for the released code's diversity term, which pulls groups together.
        tau: temperature of the selection.
        rule: "similarity" (published), "fixed", "random" or "all".
        inference: "mean" of the groups' logits, "single" group, "max" logit, or "feature" mean.
        modality: "both", "text" or "vision".
    """

    groups: Annotated[int, Meta(ge=1, le=64)] = 5
    slots: Annotated[int, Meta(ge=1, le=64)] = 2
    length: Annotated[int, Meta(ge=1, le=64)] = 2
    diversity_weight: Strength = 1.0
    diversity: str = "cosine"
    compat: str = ""
    tau: Annotated[float, Meta(ge=1e-4, le=100)] = 1.0
    rule: str = "similarity"
    inference: str = "mean"
    modality: str = "both"


class ComparatorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of the methods that PromptFL, FedOTP and FedMGP are compared with.

    Attributes:
        prox_mu: FedProx, weight of half the squared distance from the global prompt.
        theta: PromptFolio, share of the local prompt in a text feature.
        rank: FedPGP, of the local correction of the global prompt.
        contrast: FedPGP, weight of the contrastive term.
        cache_weight: pFedPrompt, weight of the local cache's logits.
        cache_sharpness: pFedPrompt, how fast they fall with the distance of features.
        queries: FedTPG, context vectors that are generated.
        amp_alpha: FedAMP, largest share of others in a client's anchor.
        amp_sigma: FedAMP, squared distance over which that share falls to 1/e.
        amp_lambda: FedAMP, weight of half the squared distance from the anchor.
    """

    prox_mu: Strength = 0.5
    theta: Annotated[float, Meta(ge=0, le=1)] = 0.2
    rank: Annotated[int, Meta(ge=1, le=512)] = 8
    contrast: Strength = 1.0
    cache_weight: Strength = 1.0
    cache_sharpness: Annotated[float, Meta(gt=0, le=1e4)] = 5.5
    queries: Annotated[int, Meta(ge=1, le=64)] = 4
    amp_alpha: Annotated[float, Meta(ge=0, le=1)] = 0.5
    amp_sigma: Rate = 1.0
    amp_lambda: Strength = 0.5


class MethodSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every client must train alike. The server sends it; its digest is in every plan.

    Attributes:
        method: promptfl, fedotp, fedmgp, one of their comparators, or an installed package's.
        n_ctx: context length in tokens.
        init: words that start the context ("a photo of a"), or empty for N(0, 0.02).
        position: of the class name: "end", "middle" or "front" of the context.
        lr: learning rate of local SGD.
        momentum: of local SGD; it begins anew in each round.
        weight_decay: of local SGD.
        batch_size: images of a step; at most a quarter of a client's.
        epochs: passes over a client's images in one round.
        seed: of the random initial context.
    """

    method: str = "promptfl"
    n_ctx: Annotated[int, Meta(ge=1, le=1024)] = 16
    init: str = ""
    position: str = "end"
    lr: Rate = 1e-3
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 5e-4
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 32
    epochs: Annotated[int, Meta(ge=1, le=1000)] = 1
    seed: Count = 0
    fedotp: FedOTPSettings = FedOTPSettings()
    fedmgp: FedMGPSettings = FedMGPSettings()
    compare: ComparatorSettings = ComparatorSettings()

    def check(self) -> None:
        """Refuse values outside ``CHOICES``, and sizes that contradict each other.

        Raises:
            ConfigError: naming the key.
        """
        if self.method not in METHODS:
            raise ConfigError(unknown_method(self.method))
        for where, table in (("", self), ("fedotp.", self.fedotp), ("fedmgp.", self.fedmgp)):
            for name in table.__struct_fields__:
                value = getattr(table, name)
                if name in CHOICES and value not in CHOICES[name]:
                    allowed = ", ".join(repr(choice) for choice in CHOICES[name])
                    raise ConfigError(f"{where}{name} = {value!r}: must be one of {allowed}")
        if self.fedmgp.slots > self.fedmgp.groups:
            raise ConfigError(
                f"fedmgp.slots = {self.fedmgp.slots}: at most fedmgp.groups = {self.fedmgp.groups}"
            )

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return msgspec.json.encode(self, order="deterministic")

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> MethodSettings:
        try:
            settings = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
            raise ConfigError(f"the server's settings are not understood: {error}") from None
        try:
            settings.check()
        except ConfigError as error:
            raise ConfigError(f"the server's settings are not understood: {error}") from None
        return settings


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


CHOICES = {
    "protection": tuple(PROTECTIONS),
    "selection": ("client", "secure"),
    "selection_scope": ("client", "federation"),
    "graph": ("complete", "regular"),
    "weights": ("uniform", "bucket", "samples"),
    "metrics": ("off", "final", "rounds"),
    "position": ("end", "middle", "front"),
    "transport": ("unbalanced", "classical", "average"),
    "diversity": ("cosine", "l1", "l2"),
    "compat": ("", "released"),
    "rule": ("similarity", "fixed", "random", "all"),
    "inference": ("mean", "single", "max", "feature"),
    "modality": ("both", "text", "vision"),
    "partition": ("iid", "pathological", "overlap", "dirichlet", "domain", "domain-dirichlet"),
    "classes": ("all", "base", "novel"),
    "kind": ("none", "sample"),
    "accountant": ("prv", "rdp"),
    "audit": ("off", "headers", "full"),
    "log_level": ("debug", "info", "warning", "error"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("fp32", "bf16", "fp16"),
}
