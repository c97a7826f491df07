"""A frozen open_clip CLIP with a text forward made for learned contexts.

Two restructurings are exact for a causal text tower that is pooled at EOT: tokens behind the
longest EOT are never computed, and the tokens before the class-dependent part (SOS and, with the
class name at the end, the whole context) are computed once per prompt and shared by every class,
which attends to their keys and values. In the last layer only the EOT position is computed.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.resources
import json
import logging
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from torch import Tensor, nn

from secure_fedprompt.protocol.errors import ModelError

_HUB_SECONDS = 3.0
BUNDLED = "bundled"
_BUNDLED_DIR = Path(str(importlib.resources.files("secure_fedprompt"))) / "bundled_clip"
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PromptTokens:
    """How class names and a context of ``n_ctx`` tokens line up.

    Attributes:
        shared: number of leading positions that are the same for every class (SOS, and the
            context if the name is at the end).
        behind: embeddings (A, W) of fixed words between the context and the name, if any; they
            belong to the shared positions.
        static: embeddings (K, W) of all fixed tokens; row 0 is SOS.
        index: (C, S) into cat(static, ctx): the tokens after the shared ones, padded.
        eot: (C,) position of EOT within those S.
    """

    shared: int
    behind: Tensor
    static: Tensor
    index: Tensor
    eot: Tensor


def _check_names(name: str, pretrained: str) -> None:
    """Refuse what open_clip would not load, and do not let it try a hub that is out of reach.

    Raises:
        ModelError: with the nearest names.
    """
    known = open_clip.list_models()
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, 5, 0.3))
        raise ModelError(f"model = {name!r}: open_clip knows no such model; near it are {near}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if Path(pretrained).suffix or (pretrained and Path(pretrained).exists()):
        if not pretrained.endswith(".safetensors"):
            raise ModelError(f"pretrained = {pretrained!r}: only .safetensors files are loaded")
        return
    if pretrained not in tags:
        raise ModelError(
            f"pretrained = {pretrained!r}: weights of {name} are {', '.join(tags)}, or a "
            ".safetensors file"
        )
    host = urlsplit(constants.ENDPOINT).hostname
    if host and not getproxies():
        try:
            socket.create_connection((host, 443), _HUB_SECONDS).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True  # what is in the cache still loads


class Backbone:
    """The frozen towers, with pooled image features and prompt text features.

    Args:
        model: an open_clip ``CLIP`` or ``CustomTextCLIP`` with a causal, EOT-pooled text tower.
        tokenizer: open_clip's tokenizer for it.
        train_transform, test_transform: PIL image to tensor (3, H, H).
        precision: "fp32", or "bf16" / "fp16" autocast (prompts stay float32).

    Raises:
        ModelError: the text tower is of another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        train_transform: Callable[[Image.Image], Tensor],
        test_transform: Callable[[Image.Image], Tensor],
        precision: str = "fp32",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.train_transform, self.test_transform = train_transform, test_transform
        self.text: Any = getattr(model, "text", model)
        pool = getattr(self.text, "text_pool_type", getattr(self.text, "pool_type", None))
        blocks = getattr(getattr(self.text, "transformer", None), "resblocks", ())
        plain = all(isinstance(getattr(b, "attn", None), nn.MultiheadAttention) for b in blocks)
        if pool not in ("argmax", "eos") or not blocks or not plain or self.text.attn_mask is None:
            raise ModelError(
                "this model's text tower is not causal and pooled at EOT; "
                "use a CLIP such as ViT-B-16, ViT-L-14 or RN50"
            )
        self.dtype: torch.dtype = self.text.positional_embedding.dtype
        self.width: int = self.text.positional_embedding.shape[1]
        self.length: int = self.text.positional_embedding.shape[0]
        self._autocast = _DTYPES[precision]

    @classmethod
    def load(
        cls, name: str, pretrained: str = "", device: str = "auto", precision: str = "fp32"
    ) -> Backbone:
        """Load weights.

        Args:
            name: "bundled", "local-dir:PATH" (``open_clip_config.json`` and
                ``open_clip_model.safetensors``), or an open_clip model name.
            pretrained: tag for a model name, such as "openai", or a .safetensors file.
            device: "cpu", "cuda", or "auto".
            precision: see the class.

        Raises:
            ModelError: unknown name, missing files, weights in a pickle.
        """
        local = str(_BUNDLED_DIR) if name == BUNDLED else name.removeprefix("local-dir:")
        if name == BUNDLED or name.startswith("local-dir:"):
            name, pretrained = f"local-dir:{local}", ""
            for file in ("open_clip_config.json", "open_clip_model.safetensors"):
                if not (Path(local) / file).is_file():
                    raise ModelError(f"model folder {local} lacks {file}")
        else:
            _check_names(name, pretrained)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise ModelError("device = 'cuda', but PyTorch sees no GPU here: use 'cpu' or 'auto'")
        quick = pretrained == "openai" and "quickgelu" not in name
        for logger in ("", "huggingface_hub"):  # what they say is in the error
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        try:
            model, _, test = open_clip.create_model_and_transforms(
                name, pretrained=pretrained or None, device=device, force_quick_gelu=quick
            )
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip raises anything from KeyError to RuntimeError
            line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            if constants.HF_HUB_OFFLINE and "download" in line:
                line = (
                    "this machine does not reach the model hub, and its cache lacks these weights; "
                    "copy them here and use local-dir:PATH, or a .safetensors file as pretrained"
                )
            raise ModelError(
                f"model {name!r} ({pretrained or 'local'}) does not load: {line}"
            ) from None
        return cls(model, tokenizer, augmentation(model.visual), test, precision)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.text.positional_embedding.device)

    def precision(self) -> torch.autocast:
        """The context in which frozen towers run."""
        return torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 over names, shapes and float32 bytes of all weights."""
        h = hashlib.sha256(b"secure-fedprompt/v1/weights\0")
        for key, value in sorted(self.model.state_dict().items()):
            h.update(json.dumps([key, list(value.shape)]).encode())
            h.update(value.detach().float().cpu().contiguous().numpy().data)
        return h.digest()

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), the factor of cosine similarities."""
        return cast(Tensor, self.model.logit_scale).exp()

    # -- tokens ----------------------------------------------------------------------------------

    def words(self, text: str) -> list[int]:
        """Token ids of a text without SOS, EOT and padding."""
        row = self.tokenizer([text])[0].tolist()
        eot = max(range(len(row)), key=row.__getitem__)
        return cast(list[int], row[1:eot])

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Frozen token embeddings (len(ids), W)."""
        index = torch.tensor(list(ids), dtype=torch.long, device=self.device)
        return cast(Tensor, self.text.token_embedding(index)).to(self.dtype)

    @functools.cached_property
    def word_scale(self) -> float:
        """Root mean square of the embeddings of "a photo of a", in two digits: a random context is
        drawn at this scale, and machines of other precisions must draw the same. Not of the whole
        table: a small model has seen few of its words."""
        words = self.embed(self.words("a photo of a")).float()
        return float(f"{float(words.square().mean().sqrt()):.2g}")

    def check_class_names(self, names: Sequence[str]) -> None:
        """Refuse class names that embed identically, as unseen words do on a small model.

        Raises:
            ModelError: naming two of them.
        """
        seen: dict[bytes, str] = {}
        for name in names:
            key = self.embed(self.words(_spoken(name))).cpu().numpy().tobytes()
            if key in seen:
                raise ModelError(
                    f"class names {seen[key]!r} and {name!r} have the same token embeddings in "
                    "this model (words it never saw): use other names or a larger model"
                )
            seen[key] = name

    def prompt_tokens(
        self, names: Sequence[str], n_ctx: int, position: str = "end", behind: Sequence[int] = ()
    ) -> PromptTokens:
        """Token plan for "[SOS] ctx name . [EOT]" with the name at the end, middle or front.

        ``behind`` are ids of fixed words after a context whose name is at the end.

        Raises:
            ModelError: the longest prompt does not fit the text tower.
        """
        ids = [self.words(f"{_spoken(name)}.") for name in names]
        sos, eot = self.tokenizer([""])[0][:2].tolist()
        static, rows, ends = [sos, eot], [], []
        context = list(range(n_ctx))
        for words in ids:
            base = len(static)
            static += words
            name, dot = [base + i for i in range(len(words) - 1)], base + len(words) - 1
            ctx = [-1 - c for c in context]  # negative: shifted behind the static rows below
            half = n_ctx // 2
            row = {
                "end": [*name, dot],
                "middle": [*ctx[:half], *name, *ctx[half:], dot],
                "front": [*name, *ctx, dot],
            }[position]
            rows.append([*row, 1])
            ends.append(len(row))
        longest = max(ends) + 1
        shared = 1 + (n_ctx + len(behind) if position == "end" else 0)
        if shared + longest > self.length:
            raise ModelError(
                f"prompt of {shared + longest} tokens, the text tower takes {self.length}: "
                "use a smaller n_ctx or shorter class names"
            )
        padded = [row + [1] * (longest - len(row)) for row in rows]
        index = torch.tensor(padded, device=self.device)
        index = torch.where(index < 0, len(static) - 1 - index, index)
        ends_at = torch.tensor(ends, device=self.device)
        return PromptTokens(shared, self.embed(behind), self.embed(static), index, ends_at)

    # -- features --------------------------------------------------------------------------------

    def text_features(self, ctx: Tensor, tokens: PromptTokens) -> Tensor:
        """Normalised text features of every class under every context.

        Args:
            ctx: (G, n_ctx, W), the only tensor with a gradient.
            tokens: from ``prompt_tokens`` with the same n_ctx.

        Returns:
            (G, C, E).
        """
        with self.precision():
            ctx = ctx.to(self.dtype)
            groups = ctx.shape[0]
            table = torch.cat([tokens.static.expand(groups, -1, -1), ctx], 1)  # (G, K + n_ctx, W)
            prefix = table[:, :1]
            if tokens.shared > 1:
                words = tokens.behind.expand(groups, -1, -1)
                prefix = torch.cat([prefix, ctx, words], 1)  # (G, P, W)
            position = self.text.positional_embedding
            prefix = prefix + position[: tokens.shared]
            suffix = table[:, tokens.index]  # (G, C, S, W)
            suffix = suffix + position[tokens.shared : tokens.shared + suffix.shape[2]]
            pooled = self._causal_tower(prefix, suffix, tokens.eot)  # (G, C, W)
            projection = self.text.text_projection
            x = self.text.ln_final(pooled)
            if isinstance(projection, nn.Linear):
                x = projection(x)
            elif projection is not None:
                x = x @ projection
        return F.normalize(x.to(ctx.dtype), dim=-1)

    def _causal_tower(self, prefix: Tensor, suffix: Tensor, eot: Tensor) -> Tensor:
        groups, classes, length, _ = suffix.shape
        ahead = torch.ones(length, length, dtype=torch.bool, device=suffix.device).triu(1)
        blocks = self.text.transformer.resblocks
        rows = torch.arange(classes, device=suffix.device)
        for number, block in enumerate(blocks):
            last = number == len(blocks) - 1
            heads = block.attn.num_heads
            q_p, k_p, v_p = qkv(block, prefix, heads)  # (G, H, P, D)
            q, k, v = qkv(block, suffix, heads)  # (G, C, H, S, D)
            if last:
                q = q.transpose(2, 3)[:, rows, eot][:, :, :, None]  # (G, C, H, 1, D)
                suffix = suffix[:, rows, eot][:, :, None]
                mask = (torch.arange(length, device=eot.device) > eot[:, None])[:, None, None]
            else:
                mask = ahead
            scale = 1 / math.sqrt(q.shape[-1])
            steps = q.shape[3]
            flat = q.transpose(1, 2).reshape(groups, heads, classes * steps, -1)
            to_prefix = (flat @ k_p.transpose(-1, -2)).reshape(groups, heads, classes, steps, -1)
            to_own = (q @ k.transpose(-1, -2)).masked_fill(mask, float("-inf"))  # (G, C, H, S', S)
            scores = torch.cat([to_prefix.transpose(1, 2), to_own], -1) * scale
            weights = scores.softmax(-1).to(v.dtype)
            near_p, near = weights[..., : k_p.shape[2]], weights[..., k_p.shape[2] :]
            flat = near_p.transpose(1, 2).reshape(groups, heads, classes * steps, -1)
            mixed = (flat @ v_p).reshape(groups, heads, classes, steps, -1).transpose(1, 2)
            mixed = mixed + near @ v  # (G, C, H, S', D)
            suffix = residual(block, suffix, mixed.transpose(2, 3).flatten(3))
            if not last:
                own = F.scaled_dot_product_attention(q_p, k_p, v_p, is_causal=True)
                prefix = residual(block, prefix, own.transpose(1, 2).flatten(2))
        return suffix[:, :, 0]

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Normalised pooled image features (B, E) of preprocessed pixels (B, 3, H, H)."""
        with self.precision():
            features = cast(Any, self.model).encode_image(pixels.to(self.device, self.dtype))
        return F.normalize(features.to(self.dtype), dim=-1)

    @torch.no_grad()
    def zero_shot_features(self, names: Sequence[str], template: str = "a photo of a") -> Tensor:
        """Text features (C, E) of "a photo of a NAME."."""
        ctx = self.embed(self.words(template))[None]
        return self.text_features(ctx, self.prompt_tokens(names, ctx.shape[1]))[0]


def augmentation(visual: Any) -> Callable[[Image.Image], Tensor]:
    """Random resized crop (scale 0.08 to 1, bicubic), flip, and the tower's own mean and std."""
    from torchvision import transforms

    return cast(
        Callable[[Image.Image], Tensor],
        transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    visual.image_size,
                    scale=(0.08, 1.0),
                    interpolation=transforms.InterpolationMode.BICUBIC,
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(visual.image_mean, visual.image_std),
            ]
        ),
    )


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def qkv(block: Any, x: Tensor, heads: int) -> list[Tensor]:
    """Queries, keys and values (..., H, L, D) of a residual block for tokens (..., L, W)."""
    packed = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    parts = packed.reshape(*packed.shape[:-1], 3, heads, -1).unbind(-3)
    return [part.transpose(-2, -3) for part in parts]


def residual(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    x = x + block.ls_1(block.attn.out_proj(mixed))
    return cast(Tensor, x + block.ls_2(block.mlp(block.ln_2(x))))
