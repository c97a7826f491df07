"""Every method through one door: it trains, uploads what it says, restarts, and joins a round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny
from rounds import make_parties, make_plan, vouched

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.features import encode
from secure_fedprompt.clients.methods.base import METHODS, Batch, Method, array, build
from secure_fedprompt.clients.methods.fedamp import FedAMP
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.clients.training import LocalTrainer, client_seed
from secure_fedprompt.clients.work import Work
from secure_fedprompt.commands.simulate import make_trainers
from secure_fedprompt.memory import run_round
from secure_fedprompt.prompt_file import read_prompt, write_prompt
from secure_fedprompt.protocol.errors import ConfigError, PlanError
from secure_fedprompt.protocol.settings import ComparatorSettings, FedMGPSettings, MethodSettings
from secure_fedprompt.server.settings import ServerSettings, check_settings

NAMES = ("cat", "dog", "red ring")
STILL = {"zeroshot", "coop"}  # what they upload never changes


def settings_of(name: str, **changes: Any) -> MethodSettings:
    few = {"fedmgp": FedMGPSettings(groups=2, slots=1)} if name == "fedmgp" else {}
    base: dict[str, Any] = {"method": name, "n_ctx": 4, "lr": 0.02, "batch_size": 8, **few}
    return MethodSettings(**{**base, **changes})


def make(name: str, backbone: Backbone | None = None, **changes: Any) -> Method:
    return build(settings_of(name, **changes), backbone or tiny(), NAMES)


def batch_for(method: Method, backbone: Backbone, count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=generator)
    return Batch(encode(backbone, pixels, method.needs), torch.arange(count) % 3)


@pytest.mark.parametrize("name", METHODS)
def test_state_loads_back_and_gradients_are_right(name: str) -> None:
    backbone = tiny()
    method = build(settings_of(name), backbone, NAMES)
    batch = batch_for(method, backbone)
    method.observe(batch.images, batch.labels)
    specs = {t.name: tuple(t.shape) for t in method.uploaded()}
    state = method.state()
    assert {k: v.shape for k, v in state.items()} == specs
    moved = {k: v + 0.01 for k, v in state.items()}
    method.begin(moved, 2)
    assert all(np.allclose(method.state()[k], moved[k]) for k in moved) or name == "zeroshot"
    assert method.logits(batch).shape == (6, 3)
    if not method.parameters():
        return
    for p in method.parameters():
        p.data = p.data.double()
    method.loss(batch).backward()
    for p in method.parameters():  # central differences along a random direction
        assert p.grad is not None
        direction = torch.randn_like(p)
        values = []
        for step in (1e-6, -1e-6):
            p.data += step * direction
            values.append(float(method.loss(batch).detach()))
            p.data -= step * direction
        slope = float((p.grad * direction).sum())
        if name == "fedotp":  # the plan is held fixed, so the slope is another
            continue
        assert abs((values[0] - values[1]) / 2e-6 - slope) < 1e-4 * max(1, abs(slope))


def test_fedamp_draws_clients_to_those_who_are_alike(bundled: Backbone) -> None:
    """Rows survive weights and an absentee; u_i is the formula."""
    train, test = sets.generated_sets(6, ["sketch"], 4, 2, 0)
    trainers = [LocalTrainer(bundled, train, test, k, seat=(k, 4)) for k in range(4)]
    learners = [trainer.prepare(settings_of("fedamp")) for trainer in trainers]
    for k, learner in enumerate(learners):
        method = learner.method
        assert isinstance(method, FedAMP)
        method.ctx.data += 0.1 * k
    taking, weights = learners[:3], (1.0, 2.0, 5.0)
    uploads = [t.method.contribution(np.random.default_rng(0)) for t in taking if t.method]
    mean = {
        key: np.average([u[key] for u in uploads], axis=0, weights=weights).astype(np.float32)
        for key in ("rows", "present")
    }
    prompts = [array(t.method.ctx)[0] for t in learners if isinstance(t.method, FedAMP)]
    first, absent = learners[0].method, learners[3].method
    assert isinstance(first, FedAMP)
    assert isinstance(absent, FedAMP)
    for method, own in ((first, 0), (absent, 3)):
        method.begin(mean, 2)
        others = [j for j in range(3) if j != own]
        xi = [
            0.5 / len(others) * np.exp(-np.square(prompts[own] - prompts[j]).sum()) for j in others
        ]
        expected = (1 - sum(xi)) * prompts[own] + sum(
            x * prompts[j] for x, j in zip(xi, others, strict=True)
        )
        assert np.allclose(method.anchor[0].numpy(), expected, atol=1e-5)
    assert not np.allclose(first.anchor[0].numpy(), prompts[0])


@pytest.mark.parametrize("name", ["fedotp", "fedmgp"])
def test_another_attempt_at_a_round_starts_where_the_first_did(
    name: str, bundled: Backbone
) -> None:
    train, test = sets.generated_sets(4, ["sketch"], 4, 2, 0)
    kept = []
    for attempts in ((1, 2), (2,)):
        trainer = LocalTrainer(bundled, train, test, 0)
        learner = trainer.prepare(settings_of(name))
        for number in attempts:
            plan = make_plan(3, tensors=learner.tensors(), max_weight=1, round=number)
            learner.run(Work(plan, learner.initial()))
        kept.append(learner.method.private())
    assert all(np.array_equal(kept[0][key], kept[1][key]) for key in kept[1])


def test_fedamp_is_refused_under_any_protection() -> None:
    with pytest.raises(ConfigError, match="protection = 'masks'.*every client's prompt"):
        check_settings(ServerSettings(method="fedamp"))
    check_settings(ServerSettings(method="fedamp", protection="none"))
    plan = replace(make_plan(3), method="fedamp")
    with pytest.raises(PlanError, match="shows every client's prompt"):
        plan.check()


@pytest.mark.parametrize("name", METHODS)
def test_it_joins_a_masked_round_and_what_it_keeps_survives(name: str, bundled: Backbone) -> None:
    train, test = sets.generated_sets(6, ["sketch"], 4, 2, 0)
    learners = []
    for seed in range(3):
        trainer = LocalTrainer(bundled, train, test, seed)
        learners.append(trainer.prepare(settings_of(name)))
    weight = 1 if name == "fedmgp" else 64
    plan = make_plan(3, tensors=learners[0].tensors(), max_weight=weight, clip=2.0)
    work = Work(plan, learners[0].initial())
    results = [learner.run(work) for learner in learners]
    outcome = run_round(plan, make_parties(3), dict(zip(plan.cohort, results, strict=True)))
    assert outcome.round.result is not None
    total, weights = outcome.round.result, sum(w for _, w in results)
    for spec in learners[0].tensors():
        expected = sum(w * np.clip(v[spec.name], -2, 2) for v, w in results) / weights
        assert np.allclose(total[spec.name] / weights, expected, atol=1e-3)
        # A bias of the keys shifts all of a query's scores alike, and changes nothing.
        assert (np.abs(expected).max() > 1e-6) == (name not in STILL and spec.name != "to_key.bias")
    method = learners[0].method
    assert method is not None
    kept = method.private()
    other = build(settings_of(name, seed=5), bundled, train.class_names)
    other.restore(kept)
    for key, values in other.private().items():
        assert np.array_equal(values, kept[key])
    assert not set(kept) & {t.name for t in learners[0].tensors()}


@pytest.mark.parametrize("name", sorted(STILL))
def test_who_shares_nothing_can_do_so_in_every_round(name: str, bundled: Backbone) -> None:
    train, test = sets.generated_sets(6, ["sketch"], 4, 2, 0)
    trainers = [LocalTrainer(bundled, train, test, seed) for seed in range(3)]
    learners = [trainer.prepare(settings_of(name)) for trainer in trainers]
    parties = make_parties(3)
    for number in (1, 2):
        plan = make_plan(
            3, tensors=learners[0].tensors(), round=number, learning_round=number, rounds=2,
            method=name,
        )  # fmt: skip
        vouched(parties, plan)
        work = Work(plan, learners[0].initial())
        updates = {n: t.run(work) for n, t in zip(plan.cohort, learners, strict=True)}
        outcome = run_round(plan, parties, updates)
        assert not outcome.errors
        assert outcome.round.result is not None


def test_zero_shot_is_the_models_own(bundled: Backbone) -> None:
    method = build(settings_of("zeroshot"), bundled, NAMES)
    image = torch.nn.functional.normalize(torch.randn(4, 128), dim=-1)
    expected = bundled.scale * image @ bundled.zero_shot_features(NAMES).T
    logits = method.logits(Batch(image, torch.zeros(4, dtype=torch.long)))
    assert torch.allclose(logits, expected, atol=1e-4)


def test_fedprox_pulls_towards_the_global_prompt() -> None:
    backbone = tiny()
    far = make("fedprox", backbone, compare=ComparatorSettings(prox_mu=0.5))
    plain = make("promptfl", backbone)
    batch = batch_for(far, backbone)
    far.begin({"ctx": far.state()["ctx"] + 1}, 2)
    plain.begin(far.state(), 2)
    assert torch.allclose(far.loss(batch), plain.loss(batch))  # at the global prompt
    (p,) = far.parameters()
    p.data += 0.1
    plain.parameters()[0].data += 0.1
    gap = far.loss(batch) - plain.loss(batch)
    assert torch.allclose(gap, torch.tensor(0.25 * 0.01 * p.numel()).double(), rtol=1e-3)
    slopes = [
        torch.autograd.grad(m.loss(batch), m.parameters()[0])[0] for m in (far, plain)
    ]  # a real gradient: mu (p - p_global)
    assert torch.allclose(slopes[0] - slopes[1], torch.full_like(p, 0.05), atol=1e-4)


def test_fedper_shares_half_of_the_tokens() -> None:
    method = make("fedper")
    own = method.parameters()[0].detach()[:, 2:].clone()
    method.begin({"ctx": np.full((1, 2, 48), 7, np.float32)}, 2)
    ctx = method.parameters()[0].detach()
    assert (ctx[:, :2] == 7).all()
    assert torch.equal(ctx[:, 2:], own)


def test_coop_ignores_the_aggregate() -> None:
    method = make("coop")
    own = method.parameters()[0].detach().clone()
    method.begin({"ctx": np.full((1, 4, 48), 7, np.float32)}, 2)
    assert torch.equal(method.parameters()[0], own)


def test_pfedprompts_cache_votes_for_the_neighbours_class() -> None:
    backbone = tiny()
    method = make("pfedprompt", backbone, compare=ComparatorSettings(cache_weight=1e4))
    batch = batch_for(method, backbone)
    before = method.logits(batch)
    method.observe(batch.images, batch.labels)
    assert not torch.allclose(method.logits(batch), before)
    far_apart = torch.eye(24, dtype=torch.float64)[:6]
    method.observe(far_apart, batch.labels)
    found = method.logits(Batch(far_apart, batch.labels)).argmax(1)
    assert (found == batch.labels).all()
    assert torch.allclose(
        method.loss(batch), torch.nn.functional.cross_entropy(before, batch.labels)
    )


def test_fine_tuning_happens_before_the_last_evaluation(bundled: Backbone) -> None:
    train, test = sets.generated_sets(6, ["sketch"], 6, 6, 0)
    seen = {}
    for name in ("promptfl", "promptfl-ft"):
        trainer = LocalTrainer(bundled, train, test, 0)
        learner = trainer.prepare(settings_of(name, epochs=6))
        plan = make_plan(3, tensors=learner.tensors(), learning_round=2)
        plan = make_plan(3, tensors=(), learning_round=2)
        seen[name] = float(learner.run(Work(plan, learner.initial()))[0]["loss"])
    assert seen["promptfl-ft"] < seen["promptfl"]


@pytest.mark.parametrize("counted", [True, False])
def test_the_fine_tuned_prompt_is_what_a_client_keeps(
    bundled: Backbone, tmp_path: Path, counted: bool
) -> None:
    """In memory, in its file, and after a restart; also where no round evaluates the last one."""
    train, test = sets.generated_sets(6, ["sketch"], 6, 6, 0)
    trainer = LocalTrainer(bundled, train, test, 0)
    trainer.keep = tmp_path
    learner = trainer.prepare(settings_of("promptfl-ft", epochs=6))
    final, run = learner.initial(), b"r" * 16
    if counted:
        plan = make_plan(3, tensors=(), learning_round=2, run=run)
        learner.run(Work(plan, final))
    learner.finish(final, run)
    (ctx,) = learner.method.parameters()
    assert np.abs(ctx.detach().numpy().reshape(-1) - final).max() > 1e-3
    write_prompt(tmp_path / "p.safetensors", learner)
    method = read_prompt(tmp_path / "p.safetensors").method(
        bundled, train.class_names, other_classes=False
    )
    assert torch.equal(method.parameters()[0], ctx)
    restarted = LocalTrainer(bundled, train, test, 0)
    restarted.keep = tmp_path
    again = restarted.prepare(settings_of("promptfl-ft", epochs=6))
    again.finish(final, run)
    assert torch.equal(again.method.parameters()[0], ctx)
    assert len(restarted.ledger.entries) == 0  # it did not train again
    again.method.begin({"ctx": final.reshape(1, -1, 128)}, 3)  # another round
    assert again.method.private() == {}


def test_clients_of_one_seed_draw_different_batches() -> None:
    seeds = [client_seed(7, f"client{k:03d}") for k in range(50)]
    assert len({*seeds, *(client_seed(8, f"client{k:03d}") for k in range(50))}) == 100


@pytest.mark.parametrize("name", ["promptfl", "fedotp", "fedmgp"])
def test_methods_train_under_autocast_with_float32_prompts(name: str, bundled: Backbone) -> None:
    """bf16 gradients point where those of float32 do, and nothing trained is in half precision."""
    half = Backbone(
        bundled.model, bundled.tokenizer, bundled.train_transform, bundled.test_transform, "bf16"
    )
    pixels = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for backbone in (bundled, half):
        method = build(settings_of(name), backbone, NAMES)
        batch = Batch(encode(backbone, pixels, method.needs), torch.arange(6) % 3)
        loss = method.loss(batch)
        gradients = torch.autograd.grad(loss, method.parameters())
        assert all(
            p.dtype == g.dtype == torch.float32
            for p, g in zip(method.parameters(), gradients, strict=True)
        )
        assert torch.isfinite(loss)
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert torch.isfinite(found[1]).all()
    assert torch.cosine_similarity(*found, dim=0) > 0.98
    assert not torch.equal(*found)


def test_every_client_of_a_simulation_has_its_own_seed(
    bundled: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "load", lambda *args: bundled)
    settings = ClientSettings(
        per_class=4, test_per_class=1, styles="sketch", parts=5, partition="iid", seed=3
    )
    seeds = {trainer.seed for trainer in make_trainers(settings).values()}
    assert seeds == {client_seed(3, f"client{k:03d}") for k in range(5)}


def test_what_another_method_kept_is_refused() -> None:
    method = make("fedotp")
    for wrong in ({}, {"own": np.zeros(1, np.float32)}, {"local": 0, "more": 0}):
        with pytest.raises(ConfigError, match=r"method 'fedotp' keeps \['local'\], found"):
            method.restore(wrong)  # type: ignore[arg-type]
