"""Small CLIPs for tests: the bundled one in float64, and random ones of every architecture."""

from __future__ import annotations

import copy

import open_clip
import torch

from secure_fedprompt.clients.backbone import Backbone


def in_double(backbone: Backbone) -> Backbone:
    model = copy.deepcopy(backbone.model).double()
    return Backbone(model, backbone.tokenizer, backbone.train_transform, backbone.test_transform)


def tiny(
    custom_text: bool = False,
    quick_gelu: bool = False,
    linear: bool = False,
    vision_layers: int = 1,
    resnet: bool = False,
) -> Backbone:
    """A random CLIP of either open_clip class, in float64."""
    torch.manual_seed(0)
    if resnet:
        vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, head_width=16, image_size=64)
    else:
        vision = open_clip.CLIPVisionCfg(
            layers=vision_layers, width=32, head_width=16, patch_size=16, image_size=32
        )
    text = open_clip.CLIPTextCfg(
        width=48, heads=3, layers=3, proj_type="linear" if linear else None
    )
    if not linear:
        text = open_clip.CLIPTextCfg(width=48, heads=3, layers=3)
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = kind(24, vision, text, quick_gelu=quick_gelu).double()
    transform = open_clip.image_transform(vision.image_size, is_train=False)
    return Backbone(model, open_clip.get_tokenizer("ViT-B-32"), transform, transform)
