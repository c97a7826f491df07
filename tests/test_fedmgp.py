"""FedMGP: visual prompts against a plain forward, diversity, selection, slots and write-back."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tiny
from rounds import make_plan
from torch import Tensor

from secure_fedprompt.clients import vision
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.methods.base import Batch
from secure_fedprompt.clients.methods.fedmgp import FedMGP, likeness, slot_similarity
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.clients.work import Work
from secure_fedprompt.protocol.errors import ConfigError, ModelError
from secure_fedprompt.protocol.selection.shares import integer_keys, order
from secure_fedprompt.protocol.settings import FedMGPSettings, MethodSettings
from secure_fedprompt.server.settings import ServerSettings, check_settings

NAMES = ("cat", "dog", "red ring")


def mgp(**changes: Any) -> MethodSettings:
    options = FedMGPSettings(**changes)
    return MethodSettings(method="fedmgp", lr=0.02, batch_size=8, fedmgp=options)


def plain_image_forward(backbone: Backbone, pixels: Tensor, prompts: Tensor) -> Tensor:
    """One group at a time through open_clip's own blocks, prompts behind the patches."""
    visual: Any = backbone.model.visual
    groups = []
    for group in prompts:
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        x = x + visual.positional_embedding
        x = torch.cat([x, group.expand(len(x), -1, -1)], 1)
        x = visual.transformer(visual.ln_pre(x))
        groups.append(F.normalize(visual.ln_post(x)[:, 0] @ visual.proj, dim=-1))
    return torch.stack(groups)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_prompted_features_equal_a_plain_forward_value_and_gradient(layers: int) -> None:
    backbone = tiny(vision_layers=layers)
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    prompts = torch.randn(4, 2, 32, dtype=torch.float64, requires_grad=True)
    tokens = vision.image_tokens(backbone, pixels)
    fast = vision.prompted_features(backbone, tokens, prompts)
    slow = plain_image_forward(backbone, pixels, prompts)
    assert fast.shape == (4, 3, 24)
    assert (fast - slow).abs().max() < 1e-10
    weights = torch.randn_like(fast)
    (a,) = torch.autograd.grad((fast * weights).sum(), prompts)
    (b,) = torch.autograd.grad((slow * weights).sum(), prompts)
    assert a.abs().max() > 1e-6
    assert (a - b).abs().max() < 1e-10


def test_text_groups_with_fixed_words_equal_single_prompts() -> None:
    """ctx, then the rest of "a photo of a", then the name: as if the words were the context."""
    backbone = tiny()
    ids = backbone.words("a photo of a")
    ctx = torch.randn(3, 2, 48, dtype=torch.float64)
    together = backbone.text_features(ctx, backbone.prompt_tokens(NAMES, 2, behind=ids[2:]))
    for g in range(3):
        whole = torch.cat([ctx[g], backbone.embed(ids[2:])])[None]
        alone = backbone.text_features(whole, backbone.prompt_tokens(NAMES, 4))
        assert (together[g] - alone[0]).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
def test_likeness_is_the_mean_over_pairs_of_groups(kind: str) -> None:
    features = F.normalize(torch.randn(4, 5, 7, dtype=torch.float64), dim=-1)
    pairs = list(itertools.combinations(range(4), 2))
    values = []
    for i, j in pairs:
        for r in range(5):
            a, b = features[i, r], features[j, r]
            values.append(
                {"cosine": a @ b, "l1": -(a - b).abs().mean(), "l2": -(a - b).norm()}[kind]
            )
    expected = torch.stack(values).mean()
    assert torch.allclose(likeness(features, kind), expected, atol=1e-10)


@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
def test_groups_repel_and_released_groups_attract(kind: str) -> None:
    start = F.normalize(torch.randn(3, 2, 8, dtype=torch.float64), dim=-1)
    for compat, apart in (("", True), ("released", False)):
        x = start.clone().requires_grad_()
        for _ in range(20):
            unit = F.normalize(x, dim=-1)
            (g,) = torch.autograd.grad(likeness(unit, kind, compat), x)
            x = (x - 0.3 * g).detach().requires_grad_()
        before, after = likeness(start, "cosine"), likeness(F.normalize(x, dim=-1), "cosine")
        assert (after < before) == apart


# -- selection -----------------------------------------------------------------------------------


def test_draws_follow_softmax_without_replacement_in_order() -> None:
    rng = np.random.default_rng(0)
    groups, slots = rng.standard_normal((4, 2, 6)), rng.standard_normal((2, 2, 6))
    tau = 0.3
    flat, glob = groups.reshape(4, -1), slots.reshape(2, -1)
    cosine = (flat @ glob.T) / np.outer(np.linalg.norm(flat, axis=1), np.linalg.norm(glob, axis=1))
    weights = np.exp(cosine.max(1) / tau)
    draws = 20_000
    counts = Counter(
        tuple(order(integer_keys(slot_similarity(groups, slots), tau, rng))[:2])
        for _ in range(draws)
    )
    for first, second in itertools.permutations(range(4), 2):
        p = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        deviation = np.sqrt(p * (1 - p) / draws)
        assert abs(counts[first, second] / draws - p) < 5 * deviation


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny(vision_layers=2)


def with_slots(method: FedMGP, learning_round: int, fill: float = 0.5) -> None:
    method.begin(
        {m: np.full(s.shape, fill, np.float32) for m, s in method.slots.items()}, learning_round
    )


def test_round_one_sends_the_same_random_groups_of_both_kinds(backbone: Backbone) -> None:
    chosen = set()
    for seed in range(30):
        method = FedMGP(mgp(), backbone, NAMES)
        with_slots(method, 1, 0.0)
        sent = method.contribution(np.random.default_rng(seed))
        assert (method.choice["text"] == method.choice["visual"]).all()
        chosen.add(tuple(method.choice["text"]))
        for m, prompts in method.prompts.items():
            assert (sent[m] == prompts.detach().numpy()[method.choice[m]]).all()
    assert len(chosen) > 10


def test_later_rounds_choose_apart_and_near_the_slots(backbone: Backbone) -> None:
    method = FedMGP(mgp(tau=1e-4), backbone, NAMES)
    slots = {m: p.detach().numpy()[[3, 1]] for m, p in method.prompts.items()}
    slots["visual"] = method.prompts["visual"].detach().numpy()[[4, 0]]
    method.begin(slots, 2)
    method.contribution(np.random.default_rng(0))
    assert set(method.choice["text"]) == {1, 3}
    assert set(method.choice["visual"]) == {0, 4}


def test_slots_overwrite_the_groups_that_were_sent_for_them(backbone: Backbone) -> None:
    method = FedMGP(mgp(), backbone, NAMES)
    with_slots(method, 1, 0.0)
    method.contribution(np.random.default_rng(1))
    before = {m: p.detach().clone() for m, p in method.prompts.items()}
    choice = {m: c.copy() for m, c in method.choice.items()}
    filled = {
        m: np.stack([np.full(s.shape[1:], 10.0 + k, np.float32) for k in range(len(s))])
        for m, s in method.slots.items()
    }
    method.begin(filled, 2)
    for m, prompts in method.prompts.items():
        for k, group in enumerate(choice[m]):
            assert (prompts[group] == 10.0 + k).all()
        others = [g for g in range(5) if g not in choice[m]]
        assert torch.equal(prompts[others], before[m][others])
    # A client that was absent has sent nothing, and nothing is overwritten.
    after = {m: p.detach().clone() for m, p in method.prompts.items()}
    with_slots(method, 3, 99.0)
    assert all(torch.equal(p, after[m]) for m, p in method.prompts.items())


def test_an_aborted_round_writes_nothing_back(backbone: Backbone) -> None:
    method = FedMGP(mgp(), backbone, NAMES)
    with_slots(method, 1, 0.0)
    method.contribution(np.random.default_rng(1))
    before = {m: p.detach().clone() for m, p in method.prompts.items()}
    with_slots(method, 1, 0.0)  # the same round again
    assert all(torch.equal(p, before[m]) for m, p in method.prompts.items())
    assert not method.choice


@pytest.mark.parametrize(("rule", "first"), [("fixed", [0, 1]), ("all", [0, 1, 2, 3, 4])])
def test_rules_without_a_draw(backbone: Backbone, rule: str, first: list[int]) -> None:
    method = FedMGP(mgp(rule=rule), backbone, NAMES)
    with_slots(method, 2)
    sent = method.contribution(np.random.default_rng(0))
    assert method.choice["text"].tolist() == first
    assert sent["visual"].shape[0] == len(first) == method.uploaded()[1].shape[0]


def test_the_random_rule_ignores_similarity(backbone: Backbone) -> None:
    drawn: Counter[int] = Counter()
    method = FedMGP(mgp(rule="random", tau=1e-4), backbone, NAMES)
    for seed in range(200):
        slots = {m: p.detach().numpy()[:2] for m, p in method.prompts.items()}
        method.begin(slots, 2)
        method.contribution(np.random.default_rng(seed))
        drawn.update(method.choice["text"].tolist())
        method.choice = {}
    assert min(drawn[g] for g in range(5)) > 50


# -- the whole method -----------------------------------------------------------------------------


def batch_for(method: FedMGP, backbone: Backbone) -> Batch:
    pixels = torch.randn(
        6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    encode = vision.image_tokens if method.needs == "tokens" else lambda b, p: b.image_features(p)
    return Batch(encode(backbone, pixels), torch.tensor([0, 1, 2, 0, 1, 2]))


def test_the_loss_is_the_mean_over_pairs_plus_diversity(backbone: Backbone) -> None:
    method = FedMGP(mgp(diversity_weight=0.7), backbone, NAMES)
    batch = batch_for(method, backbone)
    text, images = method.features(batch)
    losses = [
        F.cross_entropy(backbone.scale * images[g] @ text[g].T, batch.labels) for g in range(5)
    ]
    spread = (likeness(text, "cosine") + likeness(images, "cosine")) / 2
    expected = torch.stack(losses).mean() + 0.7 * spread
    assert torch.allclose(method.loss(batch), expected, atol=1e-10)


def test_the_five_ways_to_predict(backbone: Backbone) -> None:
    method = FedMGP(mgp(), backbone, NAMES)
    batch = batch_for(method, backbone)
    logits = method.group_logits(*method.features(batch)).detach()
    expected = {
        "mean": logits.mean(0),
        "single": logits[0],
        "max": torch.stack([logits[int(logits[:, b].amax(1).argmax()), b] for b in range(6)]),
    }
    for mode, values in expected.items():
        method.options = FedMGPSettings(inference=mode)
        assert torch.allclose(method.logits(batch), values, atol=1e-10), mode
    text, images = method.features(batch)
    for mode, finish in (
        ("feature", lambda x: x),
        ("feature-unit", lambda x: F.normalize(x, dim=-1)),
    ):
        method.options = FedMGPSettings(inference=mode)
        mean = [finish(x.mean(0)) for x in (images, text)]
        expected = backbone.scale * mean[0] @ mean[1].T
        assert torch.allclose(method.logits(batch), expected, atol=1e-10), mode


@pytest.mark.parametrize("modality", ["both", "text", "vision"])
@pytest.mark.parametrize(("groups", "slots", "length"), [(1, 1, 1), (5, 2, 2), (3, 3, 6)])
def test_every_ablation_trains_what_it_names(
    backbone: Backbone, modality: str, groups: int, slots: int, length: int
) -> None:
    settings = mgp(groups=groups, slots=slots, length=length, modality=modality)
    method = FedMGP(settings, backbone, NAMES)
    names = {"both": ["text", "visual"], "text": ["text"], "vision": ["visual"]}[modality]
    assert [t.name for t in method.uploaded()] == names
    assert all(t.shape[:2] == (slots, length) for t in method.uploaded())
    method.loss(batch_for(method, backbone)).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in method.parameters())  # type: ignore[union-attr]
    assert method.logits(batch_for(method, backbone)).shape == (6, 3)


def test_starts_differ_by_group_and_hold_the_words(backbone: Backbone) -> None:
    method = FedMGP(mgp(), backbone, NAMES)
    words = backbone.embed(backbone.words("a photo of a"))[:2]
    text = method.prompts["text"].detach()
    assert 0.005 < float((text - words).std()) < 0.02
    assert len({text[g].numpy().tobytes() for g in range(5)}) == 5
    again = FedMGP(mgp(), backbone, NAMES)
    assert torch.equal(again.prompts["visual"], method.prompts["visual"])


def test_a_client_that_trains_changes_its_visual_prompts_and_keeps_them(tmp_path: Path) -> None:
    bundled = Backbone.load("bundled", device="cpu")
    train, test = sets.generated_sets(6, ["sketch"], 4, 2, 0)
    settings = msgspec.structs.replace(mgp(groups=3), epochs=1)
    trainer = LocalTrainer(bundled, train, test, seed=0)
    trainer.keep = tmp_path
    learner = trainer.prepare(settings)
    method = learner.method
    assert isinstance(method, FedMGP)
    start = method.prompts["visual"].detach().clone()
    plan = make_plan(3, tensors=learner.tensors(), max_weight=1)
    values, _ = learner.run(Work(plan, learner.initial()))
    trained = method.prompts["visual"].detach().clone()
    assert ((trained - start).abs().amax((1, 2)) > 1e-5).all()
    sent = method.choice["visual"]
    assert np.allclose(values["visual"], trained.numpy()[sent], atol=1e-6)  # the base was zero
    restarted = LocalTrainer(bundled, train, test, seed=0)
    restarted.keep = tmp_path
    again = restarted.prepare(settings)
    again.kept.restore(again.method, plan.run)
    assert isinstance(again.method, FedMGP)
    assert torch.equal(again.method.prompts["visual"], trained)
    assert (again.method.choice["visual"] == sent).all()
    # The next aggregate lands in the groups that were sent, also after the restart.
    slots = {m: np.full(s.shape, 0.25, np.float32) for m, s in method.slots.items()}
    again.method.begin(slots, 2)
    assert (again.method.prompts["visual"][torch.from_numpy(sent)] == 0.25).all()


def test_slots_without_groups_still_predict(backbone: Backbone) -> None:
    method = FedMGP(mgp(), backbone, NAMES)
    method.adopt({m: np.full(s.shape, 0.1, np.float32) for m, s in method.slots.items()})
    assert method.logits(batch_for(method, backbone)).shape == (6, 3)
    assert len(method.prompts["text"]) == 2


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fedmgp\.slots = 6: at most fedmgp\.groups = 5"):
        mgp(slots=6).check()
    with pytest.raises(ConfigError, match=r"fedmgp\.rule = 'best'"):
        mgp(rule="best").check()
    with pytest.raises(ModelError, match="ViT"):
        FedMGP(mgp(), tiny(resnet=True), NAMES)
    assert FedMGP(mgp(modality="text"), tiny(resnet=True), NAMES).needs == "features"
    with pytest.raises(ConfigError, match="weights = 'uniform'"):
        check_settings(ServerSettings(method="fedmgp", weights="samples"))
    check_settings(ServerSettings(method="fedmgp", weights="uniform"))
