"""The fast text forward equals open_clip's, value and gradient; PromptFL trains; models load."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from models import in_double, tiny
from torch import Tensor

from secure_fedprompt.clients import backbone as backbone_module
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.features import Features, encode, predict
from secure_fedprompt.clients.methods.base import Batch, build
from secure_fedprompt.clients.methods.promptfl import PromptFL
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.protocol.errors import ConfigError, ModelError
from secure_fedprompt.protocol.settings import MethodSettings

NAMES = ("striped red circle", "plain heart", "dotted dark orange ring on paper")
BUNDLED = Path(__file__).parent.parent / "secure_fedprompt" / "bundled_clip"


@pytest.fixture(scope="module")
def double(bundled: Backbone) -> Backbone:
    return in_double(bundled)


def reference(backbone: Backbone, ctx: Tensor, position: str) -> Tensor:
    """A plain forward over all 77 tokens, one prompt at a time, by open_clip's own modules."""
    text, n = backbone.text, ctx.shape[1]
    groups = []
    for g in range(len(ctx)):
        rows = []
        for name in NAMES:
            words = backbone.words(name.replace("_", " ") + ".")
            sos, eot = backbone.tokenizer([""])[0][:2].tolist()
            embed = text.token_embedding
            name_part, dot = embed(torch.tensor(words[:-1])), embed(torch.tensor(words[-1:]))
            half = n // 2
            middle = {
                "end": [ctx[g], name_part],
                "middle": [ctx[g][:half], name_part, ctx[g][half:]],
                "front": [name_part, ctx[g]],
            }[position]
            x = torch.cat([embed(torch.tensor([sos])), *middle, dot, embed(torch.tensor([eot]))])
            end = len(x) - 1
            x = F.pad(x, (0, 0, 0, 77 - len(x)))[None] + text.positional_embedding
            x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask))[0, end]
            projection = text.text_projection
            rows.append(projection(x) if callable(projection) else x @ projection)
        groups.append(F.normalize(torch.stack(rows), dim=-1))
    return torch.stack(groups)


def test_equals_encode_text_on_a_written_prompt(double: Backbone) -> None:
    tokens = double.tokenizer([f"a photo of a {name}." for name in NAMES])
    with torch.no_grad():
        expected = F.normalize(double.model.encode_text(tokens), dim=-1)  # type: ignore[operator]
    assert (double.zero_shot_features(NAMES) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("kind", ["bundled", "clip", "custom", "quick", "linear"])
def test_equals_a_77_token_forward_and_backward(kind: str, position: str, double: Backbone) -> None:
    backbone = {
        "bundled": lambda: double,
        "clip": lambda: tiny(False),
        "custom": lambda: tiny(True),
        "quick": lambda: tiny(False, quick_gelu=True),
        "linear": lambda: tiny(True, linear=True),
    }[kind]()
    rng = np.random.default_rng(1)
    start = torch.from_numpy(rng.normal(0, 0.3, (2, 5, backbone.width)))
    results = []
    for forward in (
        lambda ctx: backbone.text_features(ctx, backbone.prompt_tokens(NAMES, 5, position)),
        lambda ctx: reference(backbone, ctx, position),
    ):
        ctx = start.clone().requires_grad_(True)
        features = forward(ctx)
        pull = torch.from_numpy(np.random.default_rng(2).normal(size=tuple(features.shape)))
        (gradient,) = torch.autograd.grad((features * pull).sum(), ctx)
        results.append((features.detach(), gradient))
    (fast, fast_gradient), (slow, slow_gradient) = results
    assert fast.shape == (2, len(NAMES), slow.shape[-1])
    assert (fast - slow).abs().max() < 1e-10
    assert (fast_gradient - slow_gradient).abs().max() < 1e-10
    assert slow_gradient.abs().max() > 1e-3


def test_the_model_is_frozen_and_fingerprinted(bundled: Backbone) -> None:
    assert not any(p.requires_grad for p in bundled.model.parameters())
    changed = copy.deepcopy(bundled.model)
    with torch.no_grad():
        changed.logit_scale += 1e-3
    other = Backbone(changed, bundled.tokenizer, bundled.train_transform, bundled.test_transform)
    assert other.fingerprint != bundled.fingerprint
    assert Backbone.load("bundled", device="cpu").fingerprint == bundled.fingerprint


def test_unseen_words_that_embed_alike_are_refused(bundled: Backbone) -> None:
    bundled.check_class_names(NAMES)
    with pytest.raises(ModelError, match=r"'zebra' and 'giraffe'|'giraffe' and 'zebra'"):
        bundled.check_class_names(("zebra", "giraffe"))


def test_a_prompt_that_is_too_long_is_refused(bundled: Backbone) -> None:
    with pytest.raises(ModelError, match="text tower takes 77"):
        bundled.prompt_tokens(NAMES, 72)


def test_local_folders_load_and_pickles_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(BUNDLED, folder)
    assert Backbone.load(f"local-dir:{folder}", device="cpu").width == 128
    weights = folder / "open_clip_model.safetensors"
    weights.rename(tmp_path / "model.pt")
    with pytest.raises(ModelError, match="lacks open_clip_model.safetensors"):
        Backbone.load(f"local-dir:{folder}")
    with pytest.raises(ModelError, match=r"only \.safetensors"):
        Backbone.load("ViT-B-32", str(tmp_path / "model.pt"))
    with pytest.raises(ModelError, match="pretrained = '': weights of ViT-B-32 are openai"):
        Backbone.load("ViT-B-32")
    with pytest.raises(ModelError, match="knows no such model"):
        Backbone.load("ViT-Z-99", "openai")
    weights.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="does not load"):
        Backbone.load(f"local-dir:{folder}")


def test_a_text_tower_that_is_not_causal_is_refused() -> None:
    vision = open_clip.CLIPVisionCfg(
        layers=1, width=32, head_width=16, patch_size=16, image_size=32
    )
    text = open_clip.CLIPTextCfg(width=48, heads=3, layers=1, no_causal_mask=True, pool_type="last")
    model = open_clip.CustomTextCLIP(24, vision, text)
    transform = open_clip.image_transform(32, is_train=False)
    with pytest.raises(ModelError, match="not causal"):
        Backbone(model, open_clip.get_tokenizer("ViT-B-32"), transform, transform)


def test_cuda_is_asked_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no GPU here"):
        Backbone.load("bundled", device="cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prompts_stay_float32_under_autocast(precision: str, bundled: Backbone) -> None:
    backbone = Backbone(
        bundled.model, bundled.tokenizer, bundled.train_transform, bundled.test_transform, precision
    )
    method = PromptFL(MethodSettings(), backbone, NAMES)
    loss = method.loss(Batch(F.normalize(torch.randn(3, 128), dim=-1), torch.arange(3)))
    loss.backward()
    assert method.ctx.dtype == method.ctx.grad.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.isfinite(method.ctx.grad).all()  # type: ignore[arg-type]


def test_initial_contexts(bundled: Backbone) -> None:
    a, b, c = (PromptFL(MethodSettings(seed=s), bundled, NAMES).state()["ctx"] for s in (0, 0, 1))
    assert a.shape == (1, 16, 128)
    assert (a == b).all()
    assert (a != c).any()
    assert abs(float(a.std()) - bundled.word_scale) < 0.001
    words = PromptFL(MethodSettings(n_ctx=4, init="a photo of a"), bundled, NAMES)
    image = F.normalize(torch.randn(5, 128), dim=-1)
    batch = Batch(image, torch.zeros(5, dtype=torch.long))
    expected = bundled.scale * image @ bundled.zero_shot_features(NAMES).T
    assert torch.allclose(words.logits(batch), expected, atol=1e-4)
    with pytest.raises(ConfigError, match="4 tokens, n_ctx is 16"):
        PromptFL(MethodSettings(init="a photo of a"), bundled, NAMES)
    with pytest.raises(ConfigError, match="'fedx'"):
        build(MethodSettings(method="fedx"), bundled, NAMES)


def test_training_improves_and_only_the_context_moves(bundled: Backbone) -> None:
    from rounds import make_plan

    from secure_fedprompt.clients.work import Work

    train, test = sets.generated_sets(24, ["sketch"], 8, 6, 0)
    trainer = LocalTrainer(bundled, train, test, seed=0)
    learner = trainer.prepare(
        MethodSettings(n_ctx=4, init="a photo of a", lr=0.02, epochs=6, batch_size=16)
    )
    before = bundled.fingerprint
    plan = make_plan(3, tensors=learner.tensors(), max_weight=200, max_seen=200)
    values, weight = learner.run(Work(plan, learner.initial()))
    assert weight == len(train) == 192
    assert values["ctx"].shape == (1, 4, 128)
    assert np.abs(values["ctx"]).max() > 1e-3
    assert values["seen"] == 144
    assert learner.figures.first_loss > learner.figures.last_loss > 0  # type: ignore[operator]
    guesses, losses = predict(
        learner.method, Features(bundled, test, "features", trainer.progress, "")
    )
    assert (guesses == test.labels).sum() >= values["correct"] + 10
    assert losses.sum() < values["loss"]
    del bundled.__dict__["fingerprint"]
    assert bundled.fingerprint == before


def test_the_training_loss_is_the_mean_over_the_images(bundled: Backbone) -> None:
    """Whatever the size of the last batch."""
    from rounds import make_plan

    from secure_fedprompt.clients.work import Work

    train, test = sets.generated_sets(5, ["sketch"], 5, 1, 0)
    trainer = LocalTrainer(bundled, train, test, seed=0)
    learner = trainer.prepare(
        MethodSettings(n_ctx=4, init="a photo of a", lr=1e-9, epochs=1, batch_size=6)
    )
    learner.run(Work(make_plan(3, tensors=learner.tensors()), learner.initial()))
    _, losses = predict(learner.method, trainer._features["features"][0])
    assert len(train) == 25
    assert learner.figures.first_loss == pytest.approx(losses.mean(), rel=1e-4)
    assert learner.figures.first_loss == learner.figures.last_loss


def test_augmentation_draws_new_views_and_is_reproducible(bundled: Backbone) -> None:
    train, test = sets.generated_sets(4, ["photo"], 4, 1, 0)
    one = train.image(0)
    views = [bundled.train_transform(one) for _ in range(2)]
    assert views[0].shape == bundled.test_transform(one).shape == (3, 64, 64)
    assert not torch.equal(views[0], views[1])
    from rounds import make_plan

    from secure_fedprompt.clients.work import Work

    results = []
    for augment, seed in ((True, 1), (True, 1), (True, 2), (False, 1)):
        trainer = LocalTrainer(bundled, train, test, seed, augment)
        learner = trainer.prepare(MethodSettings(n_ctx=4, lr=0.01, epochs=1, batch_size=8))
        plan = make_plan(3, tensors=learner.tensors())
        results.append(learner.run(Work(plan, learner.initial()))[0]["ctx"])
    assert np.array_equal(results[0], results[1])
    assert all(not np.array_equal(results[0], other) for other in results[2:])


@pytest.mark.parametrize("needs", ["features", "patches"])
def test_views_that_are_kept_are_what_fresh_ones_could_be(bundled: Backbone, needs: str) -> None:
    train, test = sets.generated_sets(3, ["photo"], 4, 1, 0)
    trainer = LocalTrainer(bundled, train, test, 1, augment=True)
    trainer.views = 3
    kept = trainer.kept_views(needs)
    assert kept.shape[:2] == (3, len(train))
    assert not torch.equal(kept[0], kept[1])
    with torch.random.fork_rng(devices=[]):  # by the definition, one after the other
        torch.manual_seed(int(trainer.draws(1 << 33).integers(2**62)))
        pixels = [bundled.train_transform(train.image(i)) for i in range(len(train))]
    assert torch.allclose(kept[0], encode(bundled, torch.stack(pixels), needs), atol=1e-6)
    images, _ = trainer.features(needs)
    order = np.array([3, 0, 2, 1])
    for _ in range(5):
        for batch, rows in zip(
            trainer.batches(images, order, 3), (order[:3], order[3:]), strict=True
        ):
            assert batch.labels.tolist() == train.labels[rows].tolist()
            for image, row in zip(batch.images, rows, strict=True):
                assert any(torch.equal(image, view[row]) for view in kept)
    again = LocalTrainer(bundled, train, test, 1, augment=True)
    again.views = 3
    assert torch.equal(again.kept_views(needs), kept)


def test_cached_features_equal_fresh_ones(bundled: Backbone) -> None:
    train, _ = sets.generated_sets(4, ["photo"], 2, 1, 0)
    features = Features(bundled, train, "features", lambda *_: None, "")
    pixels = torch.stack([bundled.test_transform(train.image(i)) for i in range(len(train))])
    assert torch.equal(features.images, bundled.image_features(pixels))
    part = features.subset(np.array([5, 2]))
    assert torch.equal(part.images, features.images[[5, 2]])
    assert part.labels.tolist() == train.labels[[5, 2]].tolist()


def test_the_bundled_model_is_a_real_stand_in(bundled: Backbone) -> None:
    """Room to learn, and one style clearly worse (see its card)."""
    accuracy = {}
    for style in ("photo", "neon"):
        _, test = sets.generated_sets(32, [style], 1, 4, 3)
        features = Features(bundled, test, "features", lambda *_: None, "")
        text = bundled.zero_shot_features(test.class_names)
        accuracy[style] = float(
            ((features.images @ text.T).argmax(1) == features.labels).float().mean()
        )
    assert 0.4 < accuracy["photo"] < 0.9
    assert accuracy["neon"] < accuracy["photo"] - 0.3
    config = json.loads((BUNDLED / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 64
    assert (BUNDLED / "open_clip_model.safetensors").stat().st_size < 20_000_000


@pytest.mark.parametrize(
    ("name", "pretrained", "says"),
    [("ViT-B-61", "openai", r"open_clip knows no such model; near it are ViT-B-16(, [^,]+){4}$"),
     ("ViT-B-16", "opnai", "pretrained = 'opnai': weights of ViT-B-16 are openai, "),
     ("ViT-B-16", "", "pretrained = '': weights of ViT-B-16 are openai, "),
     ("ViT-B-16", "weights.pt", r"only \.safetensors files are loaded")],
)  # fmt: skip
def test_names_that_nobody_knows_are_told_from_those_near(
    name: str, pretrained: str, says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        Backbone.load(name, pretrained, "cpu")


def test_a_hub_out_of_reach_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tries again for a minute, nor hides what is in the cache."""
    tried: list[object] = []

    def refuse(address: object, timeout: float) -> None:
        tried.append(address)
        raise OSError("no route")

    def create(name: str, **options: object) -> None:
        assert constants.HF_HUB_OFFLINE
        raise RuntimeError("Failed to download weights for tag 'openai'")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(backbone_module, "getproxies", dict)
    monkeypatch.setattr(backbone_module.socket, "create_connection", refuse)
    monkeypatch.setattr(backbone_module.open_clip, "create_model_and_transforms", create)
    with pytest.raises(ModelError, match="does not reach the model hub, and its cache lacks"):
        Backbone.load("ViT-B-16", "openai", "cpu")
    assert len(tried) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(backbone_module, "getproxies", lambda: {"https": "proxy"})
    with pytest.raises(ModelError) as caught:  # behind a proxy nobody can tell: it is tried
        Backbone.load("ViT-B-16", "openai", "cpu")
    assert "does not reach" not in str(caught.value)
    assert len(tried) == 1
