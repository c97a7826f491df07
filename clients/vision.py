"""The frozen image tower beyond pooled features: patch features, and learned visual tokens.

FedOTP compares patches with prompts; FedMGP appends learned tokens behind the patches, after the
positional embedding and before ln_pre, and reads the class token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secure_fedprompt.clients.backbone import Backbone, qkv, residual
from secure_fedprompt.protocol.errors import ModelError


def is_transformer(backbone: Backbone) -> bool:
    """Whether the image tower is a plain ViT that reads its class token."""
    visual: Any = backbone.model.visual
    return (
        hasattr(visual, "class_embedding")
        and getattr(visual, "attn_pool", None) is None
        and getattr(visual, "pool_type", "tok") == "tok"
        and not getattr(visual, "final_ln_after_pool", False)
    )


def visual_width(backbone: Backbone) -> int:
    """Width of the image tower's tokens.

    Raises:
        ModelError: it is no ViT.
    """
    if not is_transformer(backbone):
        raise ModelError("visual prompts need a ViT image tower that reads its class token")
    visual: Any = backbone.model.visual
    return int(visual.class_embedding.shape[-1])


@torch.no_grad()
def patch_features(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Normalised features of every patch, (B, M, E).

    ViT: ln_post on all tokens times the projection, class token dropped. ResNet: the attention pool
    with every cell as a query, the mean token dropped. Methods: FedOTP (CVPR 2024), section 3.2.

    Raises:
        ModelError: the tower is neither.
    """
    visual: Any = backbone.model.visual
    with backbone.precision():
        pixels = pixels.to(backbone.device, backbone.dtype)
        if is_transformer(backbone):
            tokens = visual.ln_post(visual.transformer(visual._embeds(pixels)))[:, 1:]
            features = tokens @ visual.proj if visual.proj is not None else tokens
        elif hasattr(visual, "attnpool") and hasattr(visual, "layer4"):
            grid = visual.stem(pixels)
            for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
                grid = layer(grid)
            features = _all_queries(visual.attnpool, grid)
        else:
            raise ModelError("patch features need a ViT or a CLIP ResNet image tower")
    return F.normalize(features.to(backbone.dtype), dim=-1)


def _all_queries(pool: Any, grid: Tensor) -> Tensor:
    """The attention pool's output at every cell of a grid (B, C, H, W), (B, H W, E)."""
    cells = grid.flatten(2).transpose(1, 2)
    cells = torch.cat([cells.mean(1, keepdim=True), cells], 1)
    cells = cells + pool.positional_embedding.to(cells.dtype)
    heads = [
        part(cells).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        for part in (pool.q_proj, pool.k_proj, pool.v_proj)
    ]
    mixed = F.scaled_dot_product_attention(*heads)
    out: Tensor = pool.c_proj(mixed.transpose(1, 2).flatten(2))
    return out[:, 1:]


@torch.no_grad()
def image_tokens(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Class and patch tokens with their positions, before ln_pre, (B, 1 + M, W): cacheable."""
    visual: Any = backbone.model.visual
    visual_width(backbone)
    with backbone.precision():
        x = visual.conv1(pixels.to(backbone.device, backbone.dtype)).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        tokens: Tensor = torch.cat([first, x], 1) + visual.positional_embedding.to(x.dtype)
    return tokens.to(backbone.dtype)


def prompted_features(backbone: Backbone, tokens: Tensor, prompts: Tensor) -> Tensor:
    """Normalised class-token features of every image under every group of visual prompts.

    All groups go through the tower in one pass. What the first layer makes of the image alone does
    not depend on the prompts and is computed once, without gradient; in the last layer only the
    class token is computed.

    Args:
        tokens: (B, 1 + M, W), from ``image_tokens``.
        prompts: (G, l, W), or (G, B, l, W) for other prompts at each image; the only tensor with
            a gradient.

    Returns:
        (G, B, E).
    """
    visual: Any = backbone.model.visual
    groups, images = len(prompts), len(tokens)
    blocks = visual.transformer.resblocks
    with backbone.precision():
        with torch.no_grad():
            fixed = visual.ln_pre(tokens)  # (B, L, W)
        learned = visual.ln_pre(prompts.to(tokens.dtype))  # (G, l, W)
        x = _both(fixed, learned)
        for number, block in enumerate(blocks):
            heads = block.attn.num_heads
            if number == 0:
                with torch.no_grad():
                    own = qkv(block, fixed, heads)
                q, k, v = (
                    _both(a.transpose(1, 2).flatten(2), b.transpose(-2, -3).flatten(-2))
                    .reshape(groups * images, -1, heads, a.shape[-1])
                    .transpose(1, 2)
                    for a, b in zip(own, qkv(block, learned, heads), strict=True)
                )
            else:
                q, k, v = qkv(block, x, heads)
            if number == len(blocks) - 1:
                q, x = q[:, :, :1], x[:, :1]
            mixed = F.scaled_dot_product_attention(q, k, v)
            x = residual(block, x, mixed.transpose(1, 2).flatten(2))
        pooled = visual.ln_post(x[:, 0])
        if visual.proj is not None:
            pooled = pooled @ visual.proj
    return F.normalize(pooled.to(tokens.dtype), dim=-1).reshape(groups, images, -1)


def _both(fixed: Tensor, learned: Tensor) -> Tensor:
    """Every image (B, L, W) with every group, (G, l, W) or (G, B, l, W): (G B, L + l, W), learned
    tokens last."""
    groups, images = len(learned), len(fixed)
    left = fixed.expand(groups, -1, -1, -1)
    right = learned if learned.ndim == 4 else learned[:, None].expand(-1, images, -1, -1)
    return torch.cat([left, right], 2).flatten(0, 1)
