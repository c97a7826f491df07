"""The client's file."""

from __future__ import annotations

import msgspec

from secure_fedprompt.clients.data.settings import DataSettings
from secure_fedprompt.clients.privacy_settings import PrivacySettings
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.settings import (
    Count,
    FilePath,
    LogPath,
    ModelPath,
    NonNegative,
    Positive,
    Seconds,
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
    device: str = "auto"
    precision: str = "fp32"
    threads: Count = 0


class ClientSettings(ModelSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A client.

    Attributes:
        key: own key file.
        roster: the federation's public roster file, the same everywhere.
        server: address of the server.
        state_dir: what must survive a restart; {name} in it is the client's.
        method: take part only if the run uses this method; empty takes the run's.
        seed: of batch order, for reproducible benchmarks, together with the client's name; -1
            draws it from the system.
        augment: train on random crops and flips instead of cached features.
        skip_unreadable: leave out images that cannot be read, instead of ending with their names.
        accept: first hex digits of the terms of a run that train from a prompt that this client has
            trained from before, under other bounds or settings; its error message names them.
        hold_seconds: seconds from a round's plan before which nothing is uploaded, whatever the
            terms say, so that neither how long training takes nor whether it failed shows.
        patience: seconds without a connection, or without a round that the policy allows, before
            giving up.
        audit: log of frames, in state_dir/audit: "off", "headers" (sizes, digests), or "full".
        audit_mb: most megabytes of that log; its oldest parts go first.
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
    method: str = ""
    seed: int = -1
    augment: bool = False
    skip_unreadable: bool = False
    accept: tuple[str, ...] = ()
    hold_seconds: NonNegative = 0.0
    patience: Seconds = 14400.0
    audit: str = "headers"
    audit_mb: Positive = 2048
    log: LogPath = ""
    log_level: str = "info"
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
    audit: str = "headers"
    audit_mb: Positive = 2048
    log: LogPath = ""
    log_level: str = "info"
