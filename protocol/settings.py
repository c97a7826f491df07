"""The settings that server and clients share, as frozen structs. ``command`` reads them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.methods import FOREIGN, METHODS, unknown_method
from secure_fedprompt.protocol.protections import PROTECTIONS

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
MOST_PULL = 1.0  # share that one step takes back by what pulls a prompt towards a point
Strength = Annotated[float, Meta(ge=0, le=10)]  # of a term beside the images' loss
Digits = Annotated[str, Meta(pattern="^[0-9a-f]{0,64}$")]  # hexadecimal, the first of a digest
Weights = Literal["uniform", "bucket", "samples"]
Metrics = Literal["off", "final", "rounds"]
SelectionMode = Literal["client", "secure"]
SelectionScope = Literal["client", "federation"]
Graph = Literal["complete", "regular"]
Accountant = Literal["prv", "rdp"]
AuditMode = Literal["off", "headers", "full"]
LogLevel = Literal["debug", "info", "warning", "error"]
Protecting = Annotated[str, Meta(extra={"choices": tuple(PROTECTIONS)})]
# Paths: relative ones are relative to the configuration file, or on the command line to its folder.
FilePath = Annotated[str, Meta(extra={"path": "file"})]
TrackPath = Annotated[str, Meta(extra={"path": "track"})]  # tensorboard:DIR, or no path
LogPath = Annotated[str, Meta(extra={"path": "log"})]  # or "json"
DataPath = Annotated[str, Meta(extra={"path": "data"})]  # or the name of a data set
ModelPath = Annotated[str, Meta(extra={"path": "model"})]  # or the name of a model or its weights


def choices(hint: Any) -> tuple[str, ...]:
    """The words that a setting of this type may have, or none if it may have any."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        extra = (note.extra or {} for note in notes if isinstance(note, Meta))
        return next((e["choices"] for e in extra if "choices" in e), choices(inner))
    return get_args(hint) if get_origin(hint) is Literal else ()


def wording(cls: Any, values: dict[str, Any], error: msgspec.ValidationError) -> str:
    """What msgspec refuses among ``values`` of a struct, in our words: key = value: remedy."""
    text, _, at = str(error).partition(" - at ")
    path = at.strip("`").removeprefix("$.")
    value: Any = values
    hint: Any = cls
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else value
        known = get_type_hints(hint, include_extras=True) if isinstance(hint, type) else {}
        hint = known.get(key)
    allowed = ", ".join(choices(hint))
    remedy = f"must be one of {allowed}" if allowed else f"{text[:1].lower()}{text[1:]}"
    return f"{path} = {value!r}: {remedy}"


def validate(settings: msgspec.Struct, prefix: str = "") -> None:
    """Refuse values out of range, of settings that no file was read into.

    Raises:
        ConfigError: naming the key, after ``prefix``.
    """
    values = msgspec.to_builtins(settings)
    try:
        msgspec.convert(values, type(settings))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{prefix}{wording(type(settings), values, error)}") from None


class FedOTPSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """FedOTP (CVPR 2024).

    Attributes:
        transport: "unbalanced", "classical" or "average".
        eps: entropic regularisation; the paper takes 0.1 (CIFAR) and 0.01 (few-shot).
        gamma: share of an image's patches that must be matched, unbalanced transport only.
        iterations: most updates of a transport plan.
    """

    transport: Literal["unbalanced", "classical", "average"] = "unbalanced"
    eps: Annotated[float, Meta(ge=1e-3, le=10)] = 0.1
    gamma: Annotated[float, Meta(ge=0.01, le=1)] = 0.8
    iterations: Annotated[int, Meta(ge=1, le=10000)] = 100


class FedMGPSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """FedMGP (NeurIPS 2025). Its slots are averaged without weights: set weights = "uniform".

    Attributes:
        groups: m, pairs of a text and a visual prompt on each client.
        slots: s, groups that a client sends in a round, at most m.
        length: l, tokens of each prompt.
        diversity_weight: lambda.
        diversity: "cosine" (the paper's), "l1" or "l2".
        compat: "released" for the released code's diversity term (l1, whatever ``diversity`` says),
            which pulls groups together.
        tau: temperature of the selection.
        rule: "similarity" (published), "fixed", "random" or "all".
        pairing: "apart" if text and visual prompts are drawn independently (the paper), "together"
            if with the same noise, so that pairs mostly travel together (the released code).
        inference: "mean" of the groups' logits, "single" group, "max" logit, "feature" mean as
            published, or "feature-unit", the same with its length normalised again.
        modality: "both", "text" or "vision".
    """

    groups: Annotated[int, Meta(ge=1, le=64)] = 5
    slots: Annotated[int, Meta(ge=1, le=64)] = 2
    length: Annotated[int, Meta(ge=1, le=64)] = 2
    diversity_weight: Strength = 1.0
    diversity: Literal["cosine", "l1", "l2"] = "cosine"
    compat: Literal["", "released"] = ""
    tau: Annotated[float, Meta(ge=1e-4, le=100)] = 1.0
    rule: Literal["similarity", "fixed", "random", "all"] = "similarity"
    pairing: Literal["apart", "together"] = "apart"
    inference: Literal["mean", "single", "max", "feature", "feature-unit"] = "mean"
    modality: Literal["both", "text", "vision"] = "both"


class ComparatorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of the methods that PromptFL, FedOTP and FedMGP are compared with.

    Attributes:
        prox_mu: FedProx, weight of half the squared distance from the global prompt.
        theta: PromptFolio, share of the local prompt in a text feature (its code: 0.4).
        rank: FedPGP, of the local correction of the global prompt (its code: 4, its paper: 8);
            DP-FPL, of the local prompt's steps (its code: 8), n_ctx at most.
        contrast: FedPGP, weight of the contrastive term.
        cache_weight: pFedPrompt, weight of the local cache's logits.
        cache_sharpness: pFedPrompt, how fast they fall with the distance of features.
        queries: FedTPG, context vectors that are generated.
        amp_alpha: FedAMP, largest share of others in a client's anchor.
        amp_sigma: FedAMP, squared distance over which that share falls to 1/e.
        amp_lambda: FedAMP, weight of half the squared distance from the anchor.
    """

    prox_mu: Strength = 0.5
    theta: Annotated[float, Meta(ge=0, le=0.95)] = 0.4
    rank: Annotated[int, Meta(ge=1, le=512)] = 4
    contrast: Strength = 1.0
    cache_weight: Annotated[float, Meta(ge=0, le=1e4)] = 1.0
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
        init: words that start the context ("a photo of a"), or empty for random tokens
            at the scale of the model's words.
        position: of the class name: "end", "middle" or "front" of the context.
        lr: learning rate of local SGD.
        schedule: of it: "constant", or "cosine" over the learning rounds with one epoch of warming
            up (PromptFL's).
        momentum: of local SGD; it begins anew in each round.
        weight_decay: of local SGD. In a round it takes back a tenth at most, and as much as one
            step for each epoch would, whoever has how many images.
        batch_size: images of a step; at most a quarter of a client's.
        epochs: passes over a client's images in one round.
        seed: of the random initial context.
        start: digest of a prompt that every client holds, 64 hex digits, to begin from in the place
            of init and seed; servers make it of --start-prompt. All of it, or a server could ask a
            client for a prompt of another federation that it does not know.
    """

    method: str = "promptfl"
    n_ctx: Annotated[int, Meta(ge=1, le=1024)] = 16
    init: str = ""
    position: Literal["end", "middle", "front"] = "end"
    lr: Rate = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 5e-4
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 32
    epochs: Annotated[int, Meta(ge=1, le=1000)] = 1
    seed: Count = 0
    start: Digits = ""
    fedotp: FedOTPSettings = FedOTPSettings()
    fedmgp: FedMGPSettings = FedMGPSettings()
    compare: ComparatorSettings = ComparatorSettings()

    def check(self) -> None:
        """Refuse values out of range, and sizes that contradict each other.

        Raises:
            ConfigError: naming the key.
        """
        if self.method not in METHODS and self.method not in FOREIGN:
            raise ConfigError(unknown_method(self.method))
        validate(self)
        if self.start and len(self.start) != 64:
            raise ConfigError(
                f"start = {self.start!r}: the whole digest, 64 hex digits (see --start-prompt)"
            )
        pull, names = self.weight_decay, "weight_decay"
        if more := {"fedprox": "prox_mu", "fedamp": "amp_lambda"}.get(self.method):
            pull, names = pull + getattr(self.compare, more), f"weight_decay + compare.{more}"
        if self.lr * pull > MOST_PULL:
            raise ConfigError(
                f"lr = {self.lr:g} with {names} = {pull:g}: a step would take a prompt back by "
                f"more than {MOST_PULL:.0%}, and past 200% it diverges, sooner where there are "
                "more images: lower one of them"
            )
        if self.fedmgp.slots > self.fedmgp.groups:
            raise ConfigError(
                f"fedmgp.slots = {self.fedmgp.slots}: at most fedmgp.groups = {self.fedmgp.groups}"
            )

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return msgspec.json.encode(self, order="deterministic")

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> MethodSettings:
        """From JSON.

        Raises:
            ConfigError: it is none, or holds what this program does not know.
        """
        unknown = "the server's settings are not understood"
        try:
            values = msgspec.json.decode(data)
            try:
                settings = msgspec.convert(values, cls)
            except msgspec.ValidationError as error:
                raise ConfigError(wording(cls, values, error)) from None
            settings.check()
        except (ConfigError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{unknown}: {error}") from None
        return settings
