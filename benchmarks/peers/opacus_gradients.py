"""Gradients of every image by Opacus, for the chapter "training", in its own environment.

    python opacus_gradients.py '{"model": PATH, "batch": 32, "classes": 32, "tokens": 16}' REPEAT

A CLIP whose only trained parameter is a context of prompt tokens, of a module of its own; Opacus
has no rule for such a module, so its ``GradSampleModule`` takes the general way (functorch), as its
documentation says. Image features are computed once, as in our chapter; the text side is the public
way, all tokens of open_clip's context. The gradients are held against a loop of backward passes.
``model`` is a folder in open_clip's form. Prints samples of milliseconds.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from torch import Tensor, nn


class Prompted(nn.Module):
    """Logits (B, C) of image features (B, E) under a trained context (n, d). Constants are plain
    attributes: Opacus refuses a trained module with buffers."""

    def __init__(self, model: Any, tokenizer: Any, names: list[str], tokens: int) -> None:
        super().__init__()
        self.text = model.transformer.requires_grad_(False)
        self.norm = model.ln_final.requires_grad_(False)
        ids = tokenizer([" ".join(["x"] * tokens) + f" {name}." for name in names])
        self.ends = ids.argmax(1)
        with torch.no_grad():
            self.embedded = model.token_embedding(ids)
        self.positions = model.positional_embedding.detach()
        self.mask = model.attn_mask
        self.projection = model.text_projection.detach()
        self.scale = float(model.logit_scale.exp())
        self.ctx = nn.Parameter(0.02 * torch.randn(tokens, self.embedded.shape[2]))

    def forward(self, images: Tensor) -> Tensor:
        count, long = len(self.ctx), self.embedded.shape[1]
        x = torch.cat([
            self.embedded[:, :1], self.ctx.expand(len(self.embedded), -1, -1),
            self.embedded[:, 1 + count : long],
        ], 1)  # fmt: skip
        x = self.norm(self.text(x + self.positions, attn_mask=self.mask))
        pooled = x[torch.arange(len(x)), self.ends] @ self.projection
        return self.scale * images @ F.normalize(pooled, dim=1).T


def main() -> None:
    warnings.simplefilter("ignore")
    case, repeat = json.loads(sys.argv[1]), min(3, int(sys.argv[2]))  # it takes minutes
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name = f"local-dir:{case['model']}"
    model = open_clip.create_model(name, device="cpu").eval()
    names = [f"class {i}" for i in range(case["classes"])]
    made = Prompted(model, open_clip.get_tokenizer(name), names, case["tokens"])
    images = F.normalize(torch.randn(case["batch"], made.projection.shape[1]), dim=1)
    labels = torch.arange(case["batch"]) % case["classes"]
    wanted = []
    begin = time.perf_counter()
    for image, label in zip(images, labels, strict=True):
        made.ctx.grad = None
        F.cross_entropy(made(image[None]), label[None]).backward()
        wanted.append(made.ctx.grad.clone())
    loop = time.perf_counter() - begin
    private, seconds = GradSampleModule(made, loss_reduction="sum", force_functorch=True), []
    for _ in range(repeat + 1):
        made.ctx.grad = made.ctx.grad_sample = None
        begin = time.perf_counter()
        F.cross_entropy(private(images), labels, reduction="sum").backward()
        seconds.append(time.perf_counter() - begin)
    gap = float((made.ctx.grad_sample - torch.stack(wanted)).abs().max())
    assert gap < 1e-3 * float(torch.stack(wanted).abs().max()), gap
    print(json.dumps({"ms": [1e3 * s for s in seconds[1:]], "other_ms": [1e3 * loop]}))


if __name__ == "__main__":
    main()
