"""Transport plans against POT and a plain loop; patch features; FedOTP's two prompts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F
from models import tiny
from rounds import make_plan
from torch import Tensor

from secure_fedprompt.clients import vision
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.kept import Kept
from secure_fedprompt.clients.methods.base import Batch
from secure_fedprompt.clients.methods.fedotp import FedOTP
from secure_fedprompt.clients.methods.transport import transport_plan, transported_similarity
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.clients.work import Work
from secure_fedprompt.protocol.errors import ConfigError, DataError
from secure_fedprompt.protocol.settings import FedOTPSettings, MethodSettings

NAMES = ("cat", "dog", "red ring")


def loop(similarity: np.ndarray, eps: float, gamma: float, mode: str, steps: int) -> np.ndarray:
    """The published updates for one image and class, in float64."""
    patches, prompts = similarity.shape
    kernel = np.exp((similarity - 1) / eps)
    capped = mode == "unbalanced"
    beta = (gamma if capped else 1.0) / prompts
    u, v = np.ones(patches), np.ones(prompts)
    for _ in range(steps):
        u = (1 / patches) / (kernel @ v)
        u = np.minimum(1, u) if capped else u
        v = beta / (kernel.T @ u)
    return u[:, None] * kernel * v


@pytest.mark.parametrize("mode", ["unbalanced", "classical"])
@pytest.mark.parametrize("eps", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 100])
def test_plans_are_the_published_updates(mode: str, eps: float, steps: int) -> None:
    similarity = torch.rand(2, 3, 16, 2, generator=torch.Generator().manual_seed(1)) * 0.6
    plan = transport_plan(similarity, eps=eps, gamma=0.8, mode=mode, iterations=steps, tolerance=0)
    for i in range(2):
        for c in range(3):
            expected = loop(similarity[i, c].double().numpy(), eps, 0.8, mode, steps)
            assert np.abs(plan[i, c].numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("prompts", [2, 3])
def test_plans_are_those_of_pot(eps: float, prompts: int) -> None:
    generator = torch.Generator().manual_seed(2)
    similarity = torch.rand(1, 1, 16, prompts, generator=generator) * 0.4
    cost = 1 - similarity[0, 0].double().numpy()
    rows = np.full(16, 1 / 16)
    options: dict[str, Any] = {"eps": eps, "gamma": 0.8, "iterations": 20_000, "tolerance": 0}
    partial = ot.partial.entropic_partial_wasserstein(
        rows, np.full(prompts, 0.8 / prompts), cost, eps, m=0.8, numItermax=20_000, stopThr=1e-14
    )
    ours = transport_plan(similarity, mode="unbalanced", **options)[0, 0].numpy()
    assert np.abs(ours - partial).max() < 1e-5
    assert (ours.sum(1) <= 1 / 16 + 1e-6).all()
    assert np.allclose(ours.sum(0), 0.8 / prompts, atol=1e-6)
    sinkhorn = ot.sinkhorn(
        rows, np.full(prompts, 1 / prompts), cost, eps, numItermax=20_000, stopThr=1e-14
    )
    ours = transport_plan(similarity, mode="classical", **options)[0, 0].numpy()
    assert np.abs(ours - sinkhorn).max() < 1e-5


@pytest.mark.parametrize("mode", ["unbalanced", "classical", "average"])
@pytest.mark.parametrize("eps", [0.001, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_is_ever_nan(mode: str, eps: float, dtype: torch.dtype) -> None:
    for low, high in ((-1.0, 1.0), (0.99, 1.0), (-1.0, -0.99)):
        similarity = torch.empty(2, 5, 49, 2).uniform_(low, high).to(dtype).requires_grad_()
        out = transported_similarity(similarity, mode=mode, eps=eps, gamma=0.8, iterations=100)
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(similarity.grad).all()  # type: ignore[arg-type]
        if mode != "average":
            mass = transport_plan(similarity, eps=eps, gamma=0.8, mode=mode).sum((-2, -1))
            assert torch.allclose(
                mass, torch.full_like(mass, 0.8 if mode == "unbalanced" else 1), atol=1e-3
            )


def test_the_gradient_reaches_the_similarity_alone() -> None:
    similarity = torch.rand(2, 3, 9, 2, dtype=torch.float64, requires_grad=True)
    out = transported_similarity(similarity, mode="unbalanced", eps=0.1, gamma=0.8)
    out.sum().backward()
    plan = transport_plan(similarity.detach(), eps=0.1, gamma=0.8).double()
    assert torch.allclose(similarity.grad, plan)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(10))
def test_stopping_early_changes_little_and_never_mixes_problems(seed: int) -> None:
    """In 400 draws the most that it changed was 3.7e-5; a batch differs by rounding alone."""
    drawn = torch.rand(1, 1, 16, 2, generator=torch.Generator().manual_seed(seed))
    easy, hard = torch.full((1, 1, 16, 2), 0.5), drawn * 0.5
    both = torch.cat([easy, hard])
    options: dict[str, Any] = {"eps": 0.05, "gamma": 0.8}
    alone = [transport_plan(x, **options) for x in (easy, hard)]
    assert torch.allclose(transport_plan(both, **options), torch.cat(alone), rtol=0, atol=1e-6)
    # With and without a look at the host: the same numbers.
    looked, blind = (transport_plan(both, early=early, **options) for early in (True, False))
    assert torch.equal(looked, blind)
    whole = transport_plan(both, iterations=100, tolerance=0, **options)
    assert (torch.cat(alone) - whole).abs().max() < 1e-3 / 16


# -- patches -------------------------------------------------------------------------------------


def test_vit_patches_are_projected_tokens() -> None:
    backbone = tiny(vision_layers=2)
    visual: Any = backbone.model.visual
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        x = visual.ln_post(visual.transformer(visual._embeds(pixels))) @ visual.proj
        pooled = backbone.model.encode_image(pixels)  # type: ignore[operator]
    assert torch.allclose(x[:, 0], pooled, atol=1e-12)  # the reference sees what the model sees
    patches = vision.patch_features(backbone, pixels)
    assert patches.shape == (3, 4, 24)
    assert torch.allclose(patches, F.normalize(x[:, 1:], dim=-1), atol=1e-12)


def test_resnet_patches_let_every_cell_query() -> None:
    backbone = tiny(resnet=True)
    visual: Any = backbone.model.visual
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    grid = visual.stem(pixels)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        grid = layer(grid)
    patches = vision.patch_features(backbone, pixels)
    assert patches.shape == (2, 4, 24)
    # open_clip's own pool, made to return every query instead of the mean token's.
    pool = visual.attnpool
    cells = grid.flatten(2).permute(2, 0, 1)
    cells = torch.cat([cells.mean(0, keepdim=True), cells]) + pool.positional_embedding[:, None]
    every, _ = F.multi_head_attention_forward(
        cells, cells, cells, cells.shape[-1], pool.num_heads, None,
        torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias, use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight, need_weights=False,
    )  # fmt: skip
    assert torch.allclose(every[0], visual(pixels), atol=1e-12)
    expected = F.normalize(every[1:].transpose(0, 1), dim=-1)
    assert torch.allclose(patches, expected, atol=1e-12)


# -- the method ----------------------------------------------------------------------------------


def otp(**changes: Any) -> MethodSettings:
    return MethodSettings(method="fedotp", n_ctx=4, lr=0.02, batch_size=16, **changes)


@pytest.mark.parametrize("transport", ["unbalanced", "classical", "average"])
def test_logits_are_those_of_a_plain_loop(transport: str) -> None:
    backbone = tiny()
    method = FedOTP(otp(fedotp=FedOTPSettings(transport=transport, eps=0.1)), backbone, NAMES)
    patches = F.normalize(torch.randn(3, 4, 24, dtype=torch.float64), dim=-1)
    logits = method.logits(Batch(patches, torch.zeros(3, dtype=torch.long)))
    texts = [backbone.text_features(p, method.tokens)[0] for p in (method.ctx, method.local)]
    for b in range(3):
        for c in range(3):
            s = torch.stack([patches[b] @ text[c] for text in texts], -1).detach().numpy()
            plan = np.full(s.shape, 1 / s.size)
            if transport != "average":
                plan = loop(s, 0.1, 0.8, transport, 100)
            expected = float(backbone.scale) * (plan * s).sum()
            assert math.isclose(float(logits[b, c].detach()), expected, abs_tol=1e-3)


def images(count: int = 6) -> tuple[Any, Any]:
    return sets.generated_sets(8, ["sketch"], count, 2, 0)


def test_the_local_prompt_is_never_uploaded_and_survives_a_restart(
    bundled: Backbone, tmp_path: Path
) -> None:
    settings = otp(epochs=1)
    trainer = LocalTrainer(bundled, *images(), seed=0)
    trainer.keep = tmp_path
    learner = trainer.prepare(settings)
    method = learner.method
    assert isinstance(method, FedOTP)
    start = method.local.detach().clone()
    plan = make_plan(3, tensors=learner.tensors(), max_weight=200)
    values, _ = learner.run(Work(plan, learner.initial()))
    assert [t.name for t in learner.tensors()] == ["ctx"]
    assert set(values) == {"ctx", "seen", "correct", "loss", "zero_shot"}
    assert values["ctx"].shape == (1, 4, 128)
    moved = method.local.detach().clone()
    assert (moved - start).abs().max() > 1e-4  # it is trained
    for name in ("seen", "correct", "loss"):
        assert values[name].shape == ()
    assert not np.allclose(values["ctx"], (moved - start).numpy())
    # Another process: the stored prompt is the one that goes on.
    (path,) = tmp_path.glob("private-*.safetensors")
    assert path.stat().st_mode & 0o077 == 0
    restarted = LocalTrainer(bundled, *images(), seed=0)
    restarted.keep = tmp_path
    again = restarted.prepare(settings)
    again.kept.restore(again.method, plan.run)
    assert isinstance(again.method, FedOTP)
    assert torch.equal(again.method.local, moved)
    with torch.no_grad():
        again.method.local.zero_()
    again.kept.restore(again.method, plan.run)  # once: what came after it counts
    assert not again.method.local.any()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="remove it to start afresh"):
        Kept(tmp_path).restore(again.method, plan.run)


def test_training_improves(bundled: Backbone) -> None:
    trainer = LocalTrainer(bundled, *images(12), seed=0)
    learner = trainer.prepare(otp(epochs=4, init="a photo of a"))
    plan = make_plan(3, tensors=learner.tensors(), max_weight=200)
    before, _ = learner.run(Work(plan, learner.initial()))
    after, _ = learner.run(Work(plan, learner.initial() + before["ctx"].reshape(-1)))
    assert after["loss"] < before["loss"]


def test_wrong_settings_name_the_key() -> None:
    with pytest.raises(ConfigError, match=r"fedotp\.transport = 'sideways'"):
        otp(fedotp=FedOTPSettings(transport="sideways")).check()


def test_both_prompts_get_gradients() -> None:
    backbone = tiny()
    method = FedOTP(otp(), backbone, NAMES)
    patches = F.normalize(torch.randn(3, 4, 24, dtype=torch.float64), dim=-1)
    method.loss(Batch(patches, torch.tensor([0, 1, 2]))).backward()
    gradients: list[Tensor] = [p.grad for p in method.parameters()]  # type: ignore[misc]
    assert all(float(g.abs().max()) > 0 for g in gradients)
    assert not torch.equal(*gradients)
