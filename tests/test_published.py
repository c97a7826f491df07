"""Methods against their published formulas, written out plainly, in float64."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tiny
from rounds import make_plan
from torch import Tensor, nn

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.features import encode
from secure_fedprompt.clients.methods.base import METHODS, Batch, Method, array, build
from secure_fedprompt.clients.methods.dpfpl import DPFPL
from secure_fedprompt.clients.methods.fedmgp import FedMGP, likeness
from secure_fedprompt.clients.methods.fedper import FedPer
from secure_fedprompt.clients.methods.fedpgp import FedPGP
from secure_fedprompt.clients.methods.fedtpg import FedTPG
from secure_fedprompt.clients.methods.promptfolio import PromptFolio
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.clients.steps import Steps
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.clients.work import Work
from secure_fedprompt.host import command
from secure_fedprompt.protocol.errors import ModelError
from secure_fedprompt.protocol.presets import published
from secure_fedprompt.protocol.schedule import rate
from secure_fedprompt.protocol.selection.shares import integer_keys, order
from secure_fedprompt.protocol.settings import (
    ComparatorSettings,
    FedMGPSettings,
    MethodSettings,
)
from secure_fedprompt.server.settings import ServerSettings, check_settings

NAMES = ("cat", "dog", "red ring")


def make(name: str, backbone: Backbone, **changes: Any) -> Method:
    method = build(MethodSettings(method=name, n_ctx=4, **changes), backbone, NAMES)
    for p in method.parameters():
        p.data = p.data.double()
    return method


def images(backbone: Backbone) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size = backbone.zero_shot_features(NAMES).shape[1]
    drawn = torch.randn(6, size, dtype=torch.float64, generator=generator)
    return Batch(F.normalize(drawn, dim=-1), torch.arange(6) % 3)


def texts(backbone: Backbone, *contexts: Tensor) -> list[Tensor]:
    """(C, E) of each context, one after the other."""
    tokens = backbone.prompt_tokens(NAMES, contexts[0].shape[-2])
    return [backbone.text_features(c.reshape(1, *c.shape[-2:]), tokens)[0] for c in contexts]


# -- FedMGP ----------------------------------------------------------------------------------------


def test_the_released_diversity_is_a_mean_distance_that_pulls_together() -> None:
    """abs(mean |f_i - f_j|) over pairs, rows and the embedding, whatever kind is asked for."""
    features = F.normalize(torch.randn(3, 5, 7, dtype=torch.float64), dim=-1)
    distances = [
        float((features[i, r] - features[j, r]).abs().sum() / 7)
        for i in range(3) for j in range(i) for r in range(5)
    ]  # fmt: skip
    for kind in ("cosine", "l1", "l2"):
        found = float(likeness(features, kind, "released"))
        assert abs(found - np.mean(distances)) < 1e-12
    same = features[:1].expand(3, 5, 7)
    assert abs(float(likeness(same, "l1", "released"))) < 1e-12


@pytest.mark.parametrize(("length", "worded"), [(2, True), (4, True), (5, False), (16, False)])
def test_prompts_longer_than_the_template_have_no_words_in_them(length: int, worded: bool) -> None:
    backbone = tiny()
    options = FedMGPSettings(groups=2, slots=1, length=length, modality="text")
    method = build(MethodSettings(method="fedmgp", fedmgp=options), backbone, NAMES)
    assert isinstance(method, FedMGP)
    words = array(backbone.embed(backbone.words("a photo of a")))[:length]
    off = array(method.prompts["text"])[:, : len(words)] - words
    if worded:
        assert 0.005 < off.std() < 0.02
    else:
        drawn = array(method.prompts["text"])
        assert abs(drawn.std() / backbone.word_scale - 1) < 0.2
        assert abs(np.corrcoef(drawn[0, : len(words)].ravel(), words.ravel())[0, 1]) < 0.3


def test_pairs_that_are_drawn_together_mostly_travel_together() -> None:
    """With equal similarities always; released code: 84% of first picks, drawn apart 20%."""
    rng = np.random.default_rng(0)
    near = 0.05 * rng.standard_normal((400, 2, 5))
    share = {}
    for paired in (False, True):
        firsts = [order(integer_keys(x, 1.0, rng, paired=paired))[:, 0] for x in near]
        share[paired] = np.mean([a == b for a, b in firsts])
    assert 0.1 < share[False] < 0.3
    assert share[True] > 0.8
    equal = np.zeros((2, 5))
    for _ in range(50):
        one, two = order(integer_keys(equal, 1.0, rng, paired=True))
        assert (one == two).all()
    method = FedMGP(MethodSettings(method="fedmgp", fedmgp=FedMGPSettings(
        groups=5, slots=2, pairing="together")), tiny(), NAMES)  # fmt: skip
    keys = [method.selection_keys(np.random.default_rng(i)).astype(np.int64) for i in range(60)]
    assert np.mean([k[0].argmax() == k[1].argmax() for k in keys]) > 0.8  # the secure one too


# -- comparators -----------------------------------------------------------------------------------


def test_promptfolio_mixes_features_and_leaves_their_length() -> None:
    backbone = tiny()
    method, batch = make("promptfolio", backbone), images(backbone)
    assert isinstance(method, PromptFolio)
    assert method.theta == 0.4
    shared, local = texts(backbone, method.ctx, method.local)
    expected = backbone.scale * batch.images @ (0.6 * shared + 0.4 * local).T
    assert torch.allclose(method.logits(batch), expected, atol=1e-10)


def test_fedpgp_contrasts_at_half_a_degree_with_placeholder_words() -> None:
    backbone = tiny()
    method, batch = make("fedpgp", backbone), images(backbone)
    assert isinstance(method, FedPGP)
    assert method.left.shape == (1, 4, 4)
    for part in (method.left, method.right):
        assert 0.01 < float(part.detach().std()) < 0.03  # neither starts at zero
    fixed = backbone.zero_shot_features(NAMES, "X X X X")
    shared, own = texts(backbone, method.ctx, method.ctx + method.left @ method.right)
    loss = F.cross_entropy(backbone.scale * batch.images @ own.T, batch.labels)
    near = torch.exp((shared * fixed).sum(-1) / 0.5)
    far = torch.exp((shared * own).sum(-1) / 0.5)
    contrast = -torch.log(near / (near + far)).mean()
    assert torch.allclose(method.loss(batch), loss + contrast, atol=1e-10)


def test_dpfpl_moves_its_local_prompt_by_the_gradients_of_its_factors() -> None:
    backbone = tiny()
    method = make("dpfpl", backbone, compare=ComparatorSettings(rank=2))
    batch = images(backbone)
    assert isinstance(method, DPFPL)
    left, right = (f.clone().requires_grad_() for f in method.factors())
    for one in (left.T, right):
        assert torch.allclose(one @ one.T, torch.eye(2).double(), atol=1e-10)
    residual = method.local.detach() - left.detach() @ right.detach()
    whole = method.ctx.detach() + method.local.detach()
    loss = F.cross_entropy(
        backbone.scale
        * batch.images
        @ texts(backbone, whole + left @ right - (left @ right).detach())[0].T,
        batch.labels,
    )
    assert torch.allclose(method.loss(batch), loss, atol=1e-10)
    assert residual.abs().max() > 1e-3
    by_left, by_right = torch.autograd.grad(loss, (left, right))
    expected = by_left @ right + left @ by_right - left @ (left.T @ by_left) @ right  # Yu et al.
    ctx, local = torch.autograd.grad(method.loss(batch), (method.ctx, method.local))
    assert torch.allclose(local[0], expected, atol=1e-10)
    assert not torch.allclose(local, ctx, atol=1e-3 * float(ctx.abs().max()))
    method.adopt({"ctx": array(method.ctx)})
    assert method.local.abs().max() == 0


@pytest.mark.parametrize(("n_ctx", "kept"), [(1, 1), (2, 1), (3, 1), (5, 2), (16, 8)])
def test_fedper_shares_the_first_half_rounded_down(n_ctx: int, kept: int) -> None:
    method = build(MethodSettings(method="fedper", n_ctx=n_ctx), tiny(), NAMES)
    assert isinstance(method, FedPer)
    assert method.uploaded()[0].shape[1] == kept


class Published(nn.Module):
    """FedTPG's translator of PyTorch's own parts."""

    def __init__(self, width: int, embedding: int, queries: int = 4) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.query, self.name = nn.LayerNorm(width), nn.LayerNorm(embedding)
        self.attention = nn.MultiheadAttention(width, 4, kdim=embedding, vdim=embedding)
        self.mixed = nn.LayerNorm(width)
        self.gated, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, names: Tensor) -> Tensor:
        context = self.name(names)
        x, _ = self.attention(self.query(self.queries), context, context)
        value, gate = self.gated(self.mixed(x)).chunk(2, -1)
        return x + self.down(value * F.gelu(gate))


def test_fedtpg_is_the_published_network() -> None:
    backbone = tiny()
    method, batch = make("fedtpg", backbone), images(backbone)
    assert isinstance(method, FedTPG)
    for p in method.parameters():  # also those that start at 0 and 1
        p.data += 0.1 * torch.randn_like(p)
    names = backbone.zero_shot_features(NAMES, "")
    w, net = method.shared, Published(backbone.width, names.shape[1]).double()
    with torch.no_grad():
        net.queries.copy_(w["queries"])
        for norm, name in ((net.query, "query"), (net.name, "name"), (net.mixed, "mixed")):
            norm.weight.copy_(w[f"{name}.scale"])
            norm.bias.copy_(w[f"{name}.shift"])
        parts = ("to_query", "to_key", "to_value")
        for weight, p in zip(("q", "k", "v"), parts, strict=True):
            getattr(net.attention, f"{weight}_proj_weight").copy_(w[p].T)
        net.attention.in_proj_bias.copy_(torch.cat([w[f"{p}.bias"] for p in parts]))
        for linear, name in ((net.attention.out_proj, "out"), (net.gated, "gated"), (net.down, "down")):  # fmt: skip
            linear.weight.copy_(w[name].T)
            linear.bias.copy_(w[f"{name}.bias"])
        expected = net(names)
    assert torch.allclose(method.context()[0], expected, atol=1e-10)
    (text,) = texts(backbone, expected)
    assert torch.allclose(method.logits(batch), backbone.scale * batch.images @ text.T, atol=1e-10)


def test_fedtpg_has_four_million_values_at_width_512() -> None:
    count = sum(p.numel() for p in Published(512, 512).parameters())
    assert round(count / 1e6, 1) == 4.2
    sizes = tiny().width, tiny().zero_shot_features(NAMES).shape[1]
    ours = sum(tensor.size for tensor in build(
        MethodSettings(method="fedtpg", compare=ComparatorSettings(queries=4)), tiny(), NAMES
    ).uploaded())  # fmt: skip
    assert ours == sum(p.numel() for p in Published(*sizes).parameters())


# -- starts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["promptfl", "fedotp"])
def test_random_contexts_have_the_scale_of_the_models_words(name: str, bundled: Backbone) -> None:
    """The bundled CLIP has words of 0.023, as "a photo of a" says; most of its table it never saw."""
    assert bundled.word_scale == 0.023
    table = bundled.text.token_embedding.weight
    assert float(table.detach().square().mean().sqrt()) < 0.005
    method = build(MethodSettings(method=name, n_ctx=16), bundled, NAMES)
    for p in method.parameters():
        assert abs(float(p.detach().std()) / 0.023 - 1) < 0.05


# -- schedules and presets -------------------------------------------------------------------------


def test_the_rate_warms_up_once_and_falls_with_the_learning_round() -> None:
    constant, cosine = MethodSettings(lr=0.1), MethodSettings(lr=0.1, schedule="cosine")
    assert {rate(constant, r, 10, e) for r in (1, 5, 10) for e in (0, 4)} == {0.1}
    assert rate(cosine, 1, 10, 0) == 1e-5
    assert rate(MethodSettings(lr=1e-6, schedule="cosine"), 1, 10, 0) == 1e-6
    assert rate(cosine, 1, 10, 1) == 0.1
    assert abs(rate(cosine, 6, 10, 0) - 0.05) < 1e-12
    falling = [rate(cosine, r, 10, 1) for r in range(1, 11)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] > 0


def test_training_takes_the_rate_of_its_round_and_epoch(
    bundled: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = sets.generated_sets(6, ["sketch"], 8, 2, 0)
    taken: list[float] = []
    step, take = torch.optim.SGD.step, Steps.take

    def watched(self: torch.optim.SGD, *args: Any) -> Any:  # of dp
        taken.append(self.param_groups[0]["lr"])
        return step(self, *args)

    def taking(self: Steps, batch: Batch) -> Tensor:
        taken.append(float(self.rate))
        return take(self, batch)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    monkeypatch.setattr(Steps, "take", taking)
    for private in (False, True):
        dp = PrivacySettings(kind="sample", noise_multiplier=1.0) if private else PrivacySettings()
        settings = MethodSettings(n_ctx=2, lr=0.01, schedule="cosine", epochs=2, batch_size=4)
        learner = LocalTrainer(bundled, train, test, 0, dp=dp).prepare(settings)
        for number, expected in ((1, {1e-5, 0.01}), (2, {0.005})):
            plan = make_plan(3, tensors=learner.tensors(), max_weight=1, round=number,
                             learning_round=number, rounds=2)  # fmt: skip
            taken.clear()
            learner.run(Work(plan, learner.initial()))
            assert {round(lr, 9) for lr in taken} == expected
            if not private and number == 1:
                half = len(taken) // 2
                assert np.allclose(taken, [1e-5] * half + [0.01] * half)


def test_a_preset_is_beneath_what_is_given() -> None:
    parser = argparse.ArgumentParser()
    command.add_flags(parser, ServerSettings)

    def load(*flags: str) -> ServerSettings:
        return command.load(ServerSettings, parser.parse_args(flags))

    plain = load("--method", "fedmgp", "--weights", "uniform")
    assert (plain.batch_size, plain.epochs) == (32, 1)
    mgp = load("--method", "fedmgp", "--preset", "published")
    assert (mgp.batch_size, mgp.epochs, mgp.weights, mgp.fedmgp.groups) == (8, 2, "uniform", 5)
    otp = load("--method", "fedotp", "--preset", "published", "--fedotp-eps", "0.1", "--lr", "0.1")
    assert (otp.fedotp.eps, otp.fedotp.gamma, otp.lr, otp.epochs) == (0.1, 0.8, 0.1, 5)
    assert load("--preset", "published").schedule == "cosine"
    assert load("--preset", "published", "--schedule", "constant").schedule == "constant"


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_is_valid_and_says_what_its_method_has(method: str) -> None:
    made = msgspec.convert({"method": method, **published(method)}, ServerSettings)
    check_settings(msgspec.structs.replace(made, protection="none"))
    own = {"fedotp", "fedmgp", "compare"} & set(published(method))
    assert own <= {method, "compare"}


# -- the whole tower -------------------------------------------------------------------------------


def test_fine_tuning_starts_as_zero_shot_and_moves_every_value_of_the_tower() -> None:
    backbone = tiny()
    method = make("finetune", backbone)
    pixels = torch.randn(
        6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    batch = Batch(encode(backbone, pixels, method.needs), torch.arange(6) % 3)
    zero = backbone.scale * backbone.image_features(pixels) @ backbone.zero_shot_features(NAMES).T
    assert torch.allclose(method.logits(batch), zero, atol=1e-5)
    before = method.state()
    steps = Steps(method, lr=0.01, momentum=0.0, weight_decay=0.0)
    losses = [float(steps.take(batch)) for _ in range(20)]
    assert losses[-1] < losses[0] / 2
    after = method.state()
    assert after["tower"].size == sum(p.numel() for p in backbone.model.visual.parameters())
    assert (after["tower"] != before["tower"]).mean() > 0.95
    frozen = np.concatenate([array(p).reshape(-1) for p in backbone.model.visual.parameters()])
    assert np.array_equal(frozen, before["tower"])  # the shared model is left as it was


def test_from_scratch_is_the_same_on_every_machine_and_knows_nothing() -> None:
    one, same, other = (
        build(MethodSettings(method="scratch", seed=seed), tiny(), NAMES).state()
        for seed in (0, 0, 1)
    )
    assert np.array_equal(one["tower"], same["tower"])
    assert not np.array_equal(one["tower"], other["tower"])
    assert not one["head"].any()
    loaded = build(MethodSettings(method="finetune"), tiny(), NAMES).state()["tower"]
    assert abs(np.corrcoef(one["tower"], loaded)[0, 1]) < 0.6  # norms are 1 in both
    backbone = tiny()
    method = make("scratch", backbone)
    drawn = torch.randn(
        6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    steps = Steps(method, lr=0.1, momentum=0.9, weight_decay=0.0)
    batch = Batch(encode(backbone, drawn, method.needs), torch.arange(6) % 3)
    losses = [float(steps.take(batch)) for _ in range(20)]
    assert abs(losses[0] - np.log(3)) < 1e-6
    assert losses[-1] < losses[0] / 2


def test_a_tower_that_is_too_large_to_upload_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from secure_fedprompt.clients.methods import whole

    monkeypatch.setattr(whole, "MAX_VALUES", 1000)
    with pytest.raises(ModelError, match="'finetune' would upload .* use a smaller model"):
        build(MethodSettings(method="finetune"), tiny(), NAMES)
