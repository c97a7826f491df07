"""The files of clients and helpers. Imports nothing heavy: ``--help`` must be quick."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.settings import (
    Accountant,
    AuditMode,
    Count,
    DataPath,
    FilePath,
    LogLevel,
    LogPath,
    ModelPath,
    NonNegative,
    Positive,
    Rate,
    Seconds,
    TrackPath,
    validate,
)

Partition = Literal[
    "iid", "pathological", "overlap", "dirichlet", "domain", "domain-dirichlet", "pachinko"
]  # fmt: skip


class DataSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which images a client holds.

    Attributes:
        dataset: "generated", a folder or zip file (CLASS/IMAGE), or a torchvision name.
        data_root: where torchvision data sets lie.
        download: fetch a missing torchvision data set.
        class_list: text file with one class name a line, the same at every client; needed where
            a client lacks some classes.
        test_share: part of each class held out for testing if the data have no test split.
        shots: training images per class, 0 for all, drawn before the partition.
        styles: of the generated set, comma-separated.
        generated_classes: how many of its classes.
        per_class: training pictures of each class and style of the generated set.
        test_per_class: test pictures of each of them.
        classes: "all", or the "base" or "novel" half of the sorted class names.
        partition: how a shared data set is dealt out: iid, pathological, overlap, dirichlet,
            domain, domain-dirichlet, or pachinko (CIFAR-100's tree of labels).
        partition_style: "even", or "official" where the published code does it otherwise:
            round(C/n) classes each and the rest to the last (pathological), ten test images at
            least (dirichlet), halves by the labels' order (classes).
        part: which share this client takes, from 0.
        parts: into how many shares the data set is dealt out; 1 takes everything.
        beta: concentration of the Dirichlet partitions, and of pachinko's root (published: 0.1).
        rho: share of classes that all clients have, partition overlap.
        data_seed: of all these draws.
    """

    dataset: DataPath = "generated"
    data_root: FilePath = "data"
    download: bool = False
    class_list: FilePath = ""
    test_share: Annotated[float, Meta(ge=0, le=1)] = 0.3
    shots: Count = 0
    styles: str = "photo,poster,sketch,neon"
    generated_classes: Positive = 32
    per_class: Positive = 16
    test_per_class: Positive = 8
    classes: Literal["all", "base", "novel"] = "all"
    partition: Partition = "iid"
    partition_style: Literal["even", "official"] = "even"
    part: Count = 0
    parts: Positive = 1
    beta: Rate = 0.3
    rho: Annotated[float, Meta(ge=0, le=1)] = 0.2
    data_seed: Count = 0


class PrivacySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Differential privacy of this client's images in what it sends, by DP-SGD with Opacus.

    Attributes:
        kind: "none", or "sample": one image more or less changes little.
        target_epsilon: the budget of all runs in this state_dir together; the noise is chosen for
            it when a run begins, unless noise_multiplier says it. 0: none, set noise_multiplier.
        noise_multiplier: sigma, noise over clipping length. Alone it is bounded by no budget.
        delta: below one over the number of images.
        max_grad_norm: clipping length of one image's gradient over all trained tensors.
        accountant: "prv" or "rdp".
        retries: rounds that may be tried once more within the budget.
    """

    kind: Literal["none", "sample"] = "none"
    target_epsilon: NonNegative = 0.0
    noise_multiplier: NonNegative = 0.0
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    max_grad_norm: Rate = 1.0
    accountant: Accountant = "prv"
    retries: Annotated[int, Meta(ge=0, le=1000)] = 2

    def check(self) -> None:
        """Refuse values that contradict each other.

        Raises:
            ConfigError: naming the key.
        """
        validate(self, "dp.")
        if self.kind == "none" and (self.target_epsilon or self.noise_multiplier):
            raise ConfigError(
                "dp.kind = 'none' with a target_epsilon or noise_multiplier: set kind = 'sample'"
            )
        if self.kind == "sample" and not (self.target_epsilon or self.noise_multiplier):
            raise ConfigError(
                "dp.kind = 'sample' without dp.target_epsilon and dp.noise_multiplier: set one of "
                "them, or both for a given noise within a budget"
            )


class ModelSettings(DataSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which frozen CLIP runs, and where.

    Attributes:
        model: "bundled", "local-dir:PATH", or an open_clip name such as ViT-B-16.
        pretrained: open_clip tag such as "openai", or a .safetensors file.
        device: auto, cpu or cuda.
        precision: fp32, or bf16 / fp16 autocast.
        threads: of PyTorch on the CPU; 0 leaves its default.
    """

    model: ModelPath = "bundled"
    pretrained: ModelPath = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: Count = 0


class ClientSettings(ModelSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A client.

    Attributes:
        key: own key file.
        roster: the federation's public roster file, the same everywhere.
        server: address of the server.
        state_dir: what must survive a restart; {name} in it is the client's.
        start_prompt: prompt file to begin from, if a run asks for one that is not in state_dir.
        method: take part only if the run uses this method; empty takes the run's.
        seed: of batch order, for reproducible benchmarks, together with the client's name; -1
            draws it from the system.
        augment: train on random crops and flips instead of cached features.
        views: of each training image to encode and keep with augment, one of which is drawn for
            each step; 0 encodes a fresh one for each step, through the whole tower.
        compile: compile the training step with torch.compile, without dp; takes a minute or more,
            so that it pays for a large model, or ten thousand steps.
        skip_unreadable: leave out images that cannot be read, instead of ending with their names.
        accept: first hex digits of the terms of a run that train from a prompt that this client has
            trained from before, under other bounds or settings; its error message names them.
        hold_seconds: seconds from a round's plan before which nothing is uploaded, whatever the
            terms say, so that neither how long training takes nor whether it failed shows.
        patience: seconds without a connection, or without a round that the policy allows, before
            giving up.
        audit: log of frames, in state_dir/audit: "off", "headers" (sizes, digests), or "full".
        audit_mb: most megabytes of that log; its oldest parts go first.
        track: aggregate metrics and epsilon by round to "tensorboard:DIR", "mlflow:URI" or
            "wandb:PROJECT" (an extra each); empty is nowhere.
        log: file to append what the terminal shows to (objects, if it ends in .jsonl); or "json",
            for objects in the place of text on the terminal. It holds this client's own accuracy.
        log_level: least that is told: "debug", "info", "warning" or "error".
        local_metrics: show, on this machine only, what the global prompt gets right of this
            client's own test images, beside zero-shot, in every round.
        private_record: write what only this client knows of each update to state_dir, in the clear,
            for 'audit --secrets'; delete it afterwards.
    """

    key: FilePath = "client.pem"
    roster: FilePath = "roster.toml"
    server: str = "tcp://127.0.0.1:5570"
    state_dir: FilePath = "state/{name}"
    start_prompt: FilePath = ""
    method: str = ""
    seed: int = -1
    augment: bool = False
    views: Count = 0
    compile: bool = False
    skip_unreadable: bool = False
    accept: tuple[str, ...] = ()
    hold_seconds: NonNegative = 0.0
    patience: Seconds = 14400.0
    audit: AuditMode = "headers"
    audit_mb: Positive = 2048
    track: TrackPath = ""
    log: LogPath = ""
    log_level: LogLevel = "info"
    local_metrics: bool = True
    private_record: bool = False
    dp: PrivacySettings = PrivacySettings()
    policy: Policy = Policy()


class HelperSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The helper's file.

    Attributes:
        key: own key file.
        roster: the federation's public roster file, the same everywhere.
        server: address of the server.
        min_cohort: smallest cohort to help.
        patience: seconds without a connection before giving up.
        state_dir: of the audit log; {name} in it is the helper's.
        audit: log of frames, in state_dir/audit: "off", "headers" (sizes, digests), or "full".
            Its shares and the server's open scores together: keep the two logs apart.
        audit_mb: most megabytes of that log; its oldest parts go first.
        log: file to append what the terminal shows to (objects, if it ends in .jsonl); or "json",
            for objects in the place of text on the terminal.
        log_level: least that is told: "debug", "info", "warning" or "error".
    """

    key: FilePath = "helper.pem"
    roster: FilePath = "roster.toml"
    server: str = "tcp://127.0.0.1:5570"
    min_cohort: int = 3
    patience: Seconds = 14400.0
    state_dir: FilePath = "state/{name}"
    audit: AuditMode = "headers"
    audit_mb: Positive = 2048
    log: LogPath = ""
    log_level: LogLevel = "info"
