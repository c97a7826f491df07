"""What the attacks of benchmarks/privacy compute, and that all of them run.

An attack that finds nothing must find nothing because there is nothing: each piece is held against
a slow reference, and against data in which there is something, or nothing, to find.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tiny
from programs import ENV
from scipy.stats import norm
from test_comparators import batch_for, make

from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data.sets import generated_sets
from secure_fedprompt.clients.features import Features
from secure_fedprompt.clients.methods.base import Batch
from secure_fedprompt.clients.training import LocalTrainer

PRIVACY = Path(__file__).parents[1] / "benchmarks" / "privacy"


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Iterator[None]:
    """The folder whose scripts are programs, not a package."""
    sys.path.insert(0, str(PRIVACY))
    yield
    sys.path.remove(str(PRIVACY))


@pytest.fixture(scope="module")
def pool(bundled: Backbone) -> Any:
    from federations import Pool

    sets = generated_sets(3, ["sketch"], 8, 2, 0)
    train, test = (Features(bundled, s, "features", lambda *_: None, "") for s in sets)
    return Pool(bundled, sets, (train, test))


def complementing(rng: np.random.Generator, models: int, candidates: int) -> np.ndarray:
    """Who was trained on what, as ``membership.py`` draws it."""
    member = np.zeros((models, candidates), bool)
    for k in range(0, models, 2):
        member[k, rng.permutation(candidates)[: candidates // 2]] = True
        member[k + 1] = ~member[k]
    return member


def test_likelihood_ratios_find_what_there_is_and_nothing_else() -> None:
    """Two normal figures per candidate, with means of its own, that members shift by 0.8 and 0.6:
    the best AUC is Phi(1 / sqrt 2)."""
    from federations import auc
    from inference import likelihood_ratios

    rng = np.random.default_rng(0)
    member = complementing(rng, 64, 60)
    seen = rng.standard_normal((64, 60, 2)) + 5 * rng.standard_normal((60, 2))
    nothing = likelihood_ratios(seen, member)
    assert abs(auc(nothing[member], nothing[~member]) - 0.5) < 0.03
    found = likelihood_ratios(seen + member[:, :, None] * np.array([0.8, 0.6]), member)
    best = norm.cdf(1 / np.sqrt(2))
    assert best - 0.05 < auc(found[member], found[~member]) < best + 0.02


def test_likelihood_ratios_are_those_of_a_loop() -> None:
    from inference import likelihood_ratios

    rng = np.random.default_rng(1)
    member, seen = complementing(rng, 8, 5), rng.standard_normal((8, 5, 1))
    found = likelihood_ratios(seen, member)
    for k in range(8):
        others = [j for j in range(8) if j // 2 != k // 2]
        inside = [[seen[j, c, 0] for j in others if member[j, c]] for c in range(5)]
        outside = [[seen[j, c, 0] for j in others if not member[j, c]] for c in range(5)]
        deviations = [
            np.sqrt(np.mean(np.concatenate([np.array(g) - np.mean(g) for g in groups]) ** 2))
            for groups in (inside, outside)
        ]
        for c in range(5):
            logs = [
                norm.logpdf(seen[k, c, 0], np.mean(group), deviation)
                for group, deviation in zip((inside[c], outside[c]), deviations, strict=True)
            ]
            assert found[k, c] == pytest.approx(2 * (logs[0] - logs[1]), abs=1e-10)


def test_gradients_of_candidates_are_those_of_a_loop() -> None:
    from inference import gradients, projections

    backbone = tiny()
    method = make("promptfl", backbone)
    for p in method.parameters():
        p.data = p.data.double()
    batch = batch_for(method, backbone)
    found = gradients(method, Features.of(batch.images, batch.labels, "features"))
    for i, row in enumerate(found):
        loss = method.loss(Batch(batch.images[i : i + 1], batch.labels[i : i + 1]))
        (slope,) = torch.autograd.grad(loss, method.parameters())
        assert np.abs(row - slope.flatten().numpy()).max() < 1e-10
    down = projections(-found[2], found)
    assert down[2] == pytest.approx(np.linalg.norm(found[2]))
    assert down[2] == down.max()


@pytest.mark.parametrize("rows", [12, 40])
def test_the_regressions_strength_is_that_of_leaving_one_out(rows: int) -> None:
    """Fewer rows than columns, and more."""
    from inference import Regression

    rng = np.random.default_rng(rows)
    x, weights = rng.standard_normal((rows, 20)) + 3, rng.standard_normal((20, 3))
    y = x @ weights + rng.standard_normal((rows, 3))
    strengths = [1e-3, 0.1, 1.0, 10.0]

    def ridge(x: Any, y: Any, at: Any, penalty: float) -> Any:
        centred = x - x.mean(0)
        gram = centred.T @ centred + penalty * np.eye(20)
        return (at - x.mean(0)) @ np.linalg.solve(gram, centred.T @ (y - y.mean(0))) + y.mean(0)

    mean = (np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2).mean()
    missed = []
    for strength in strengths:
        # The penalty of the whole, though one is left out: as the shortcut has it.
        kept = [np.delete(np.arange(rows), i) for i in range(rows)]
        each = [ridge(x[k], y[k], x[i], strength * mean) - y[i] for i, k in enumerate(kept)]
        missed.append(np.mean(np.square(each)))
    best = strengths[int(np.argmin(missed))]
    new = rng.standard_normal((5, 20))
    assert np.allclose(Regression(x, y, strengths)(new), ridge(x, y, new, best * mean), atol=1e-8)


def test_the_record_of_masked_rounds_says_what_the_prompts_were(pool: Any) -> None:
    """No prompt is sent after the first: they follow from the sums on record, as at the clients."""
    from federations import CONTEXT

    rows = np.array_split(np.random.default_rng(0).permutation(len(pool.features[0])), 4)
    settings = {**CONTEXT, "rounds": 2, "epochs": 1, "lr": 0.02, "clip": 4.0, "metrics": "off"}
    with pool.federation({**settings, "protection": "none"}, rows, 0) as view:
        bare = [view.prompt(i) for i in (1, 2, 3)]
        updates = [view.update(1, f"client{k:03d}") for k in range(4)]
    with pool.federation({**settings, "protection": "masks"}, rows, 0) as view:
        assert not view.plans[2][1]
        masked = [view.prompt(i) for i in (1, 2, 3)]
        hidden = view.update(1, "client000")
    assert np.abs(bare[1] - bare[0]).max() > 1e-3
    assert np.allclose(masked, bare, atol=1e-5)
    assert np.allclose(np.mean(updates, 0), masked[1] - masked[0], atol=1e-6)
    assert np.abs(np.corrcoef(hidden, updates[0])[0, 1]) < 0.2


def test_an_image_is_found_from_its_gradient_alone(pool: Any) -> None:
    import images
    from federations import CONTEXT

    with pool.federation(
        {**CONTEXT, **images.GENTLE, "protection": "none"}, [np.arange(2)] * 3, 0
    ) as view:
        prompt, settings = view.prompt(1), view.settings
    own = np.arange(len(pool.features[0]))[::2]
    adversary = images.Adversary.prepare(pool, settings, prompt, own, 12)
    rows = np.array([1, 9, 17])
    labels, truth = pool.features[0].labels[rows], pool.features[0].images[rows]
    method = pool.method(settings, prompt)
    loss = method.loss(Batch(truth, labels))
    (slope,) = torch.autograd.grad(loss, list(method.shared.values()))
    modelled = adversary.gradient(truth[None], labels)[0]
    assert torch.allclose(modelled, slope.flatten(), atol=1e-4 * float(slope.abs().max()))
    torch.manual_seed(0)
    seen = adversary.gradient(truth[:1][None], labels[:1])[0].double().numpy()
    found = adversary.search(seen, labels[:1], 2, 300)
    right = adversary.centred(truth[:1], labels[:1]) @ adversary.centred(found, labels[:1]).T
    assert float(right) > 0.5
    every, of = pool.features[0].images, pool.features[0].labels
    everybody = np.arange(len(of))
    exact = images.scored(adversary, truth, rows, everybody, every, of)
    blind = images.scored(adversary, adversary.guessed(labels), rows, everybody, every, of)
    assert exact == pytest.approx((1, 1), abs=1e-5)
    assert blind[0] < 0.9


def test_a_gentle_epoch_sends_the_gradient(pool: Any) -> None:
    """However few images a step takes: what a server gets by a low rate."""
    import images
    from inference import gradients

    held = np.random.default_rng(0).permutation(len(pool.features[0]))
    case = images.Case("", 1, 8)
    assert case.steps == 4
    seen = images.observed(pool, case, held, 0)
    with pool.federation({**images.CONTEXT, **case.settings}, [held[:8]] * 3, 0) as view:
        method = pool.method(view.settings, view.prompt(1))
    true = gradients(method, pool.features[0].subset(held[:8])).mean(0)
    assert seen @ true / np.linalg.norm(seen) / np.linalg.norm(true) > 0.99
    assert np.linalg.norm(seen) == pytest.approx(np.linalg.norm(true), rel=0.05)


def test_bounds_on_groups_cut_the_long_one_and_no_other() -> None:
    from poisoned import by_groups, plain

    rng = np.random.default_rng(0)
    updates = list(rng.standard_normal((12, 30)))
    base = rng.standard_normal(30)
    assert np.allclose(by_groups(base, updates), plain(base, updates))
    updates[-1] = updates[-1] * 1000
    moved = by_groups(base, updates) - base
    lengths = [np.linalg.norm(np.sum(updates[i : i + 3], 0)) for i in range(0, 12, 3)]
    longest = np.sum(lengths[:3]) + 1.5 * np.median(lengths)
    assert np.linalg.norm(moved) * 12 <= longest
    assert np.linalg.norm(plain(base, updates) - base) * 12 > 10 * longest


def test_a_prompt_that_gets_less_right_is_not_adopted() -> None:
    from poisoned import Checked

    base, better, worse = np.zeros(2), np.ones(2), -np.ones(2)
    check = Checked(lambda prompt: 0.5 + 0.1 * float(prompt[0]))
    assert (check(base, [better, better]) == better).all()
    assert (check(base, [worse, worse]) == base).all()
    assert check.refused == 1


def test_a_malicious_client_moves_the_average_where_it_wants(pool: Any) -> None:
    import poisoned

    rows = np.array_split(np.random.default_rng(0).permutation(len(pool.features[0])), 4)
    settings = {**poisoned.CONTEXT, "rounds": 1, "epochs": 1, "lr": 0.02, "clip": poisoned.CLIP,
                "metrics": "off", "protection": "masks"}  # fmt: skip
    federation = poisoned.Federation(pool, settings, rows, 0)
    start = federation.learners[0].initial()

    def attacker() -> Any:
        return poisoned.Attacker(pool, rows[-1], 1, 0.2, 3, boost=4)

    trainers = [federation.trainer(k, LocalTrainer) for k in range(3)]
    last = federation.trainer(3, poisoned.MaliciousTrainer)
    last.attacker = attacker()
    with pool.run(settings, [*trainers, last], 0) as view:
        whole = view.prompt(2)
    alone = federation.run(attacker(), poisoned.plain)
    assert np.allclose(whole, alone, atol=1e-4)  # the protocol lets through what arithmetic does
    honest = federation.run(None, poisoned.plain)
    assert np.linalg.norm(whole - honest) > 0.5 * np.linalg.norm(honest - start)
    assert 0 < float(last.attacker.trigger.abs().max()) <= 0.2


def test_a_discriminator_learns_who_was_trained_on() -> None:
    """Where a member's text leans towards its image."""
    from federations import auc
    from final_prompt import Candidates, split, trained

    generator = torch.Generator().manual_seed(0)

    def one(strength: float) -> Any:
        images = F.normalize(torch.randn(80, 16, generator=generator), dim=1)
        member = (torch.arange(80) % 2).float()
        texts = torch.randn(80, 32, generator=generator)
        texts[:, 16:] += strength * member[:, None] * images * 4
        nothing = np.zeros(80)
        return Candidates(images, texts, member, nothing, nothing)

    for strength, low, high in ((1.0, 0.75, 1.0), (0.0, 0.35, 0.65)):
        judge = trained([one(strength) for _ in range(10)], 300, 0)
        new = [one(strength) for _ in range(4)]
        found = [auc(*split(judge.judged(c), c.member)) for c in new]
        assert low < np.mean(found) < high


def test_candidates_of_a_published_prompt_mix_members_and_others(pool: Any) -> None:
    """Alike but for that: sorted by class, an attack would find the classes."""
    import final_prompt

    args = SimpleNamespace(clients=3, rounds=1, epochs=1, lr=0.02)
    of = np.arange(24)
    for alone, seeds in ((True, 6), (False, 1)):
        case = final_prompt.Case("", "none", alone, final_prompt.NO_DP, {})
        classes = []
        for seed in range(seeds):
            found = final_prompt.published(pool, case, args, of, seed)
            inside = found.member.numpy() > 0
            assert inside.sum() == len(inside) / 2
            assert found.images.shape == (len(inside), 128)
            assert found.texts.shape == (len(inside), 256)
            rows = (found.images[:, None] == pool.features[0].images[None]).all(2).int().argmax(1)
            labels = pool.features[0].labels[rows].numpy()
            classes.append(labels[inside].mean() - labels[~inside].mean())
        assert abs(np.mean(classes)) < 0.7


def test_games_are_judged_by_shadows() -> None:
    from crafted import judged

    shadows = np.array([0.0, 1.0, 0.2, 1.2])
    inside, outside = judged(np.array([0.1, 1.1, 0.0, 0.9]), shadows)
    assert inside.min() > 1 > -1 > outside.max()
    same = judged(np.array([0.1, 1.1, 0.0, 0.9]) * 7 + 3, shadows * 7 + 3)  # another target
    assert np.allclose(same, (inside, outside))


def test_the_pages_tables_are_the_figures_on_record() -> None:
    from summary import PAGE, TABLES, written

    page = PAGE.read_text()
    assert written(page) == page
    assert all(made().count("\n") > 4 for made in TABLES.values())


SCRIPTS = {
    "membership": "--models 8 --candidates 16 --epochs 1 --epsilons 8",
    "labels": "--method fedotp --runs 2 --shadows 3 --epochs 1 --epsilons 8",
    "final_prompt": "--runs 2 --shadows 6 --epochs 1 --rounds 1 --steps 100 --epsilons 8",
    "crafted": "--targets 1 --games 2 --shadows 2 --images 8 --epochs 1 --steps 3 --seeds 2 "
    "--epsilons 8",
    "images": "--runs 1 --images 1 --steps 20 --shown 1",
    "poisoned": "--runs 1 --clients 3 --rounds 1 --steps 2",
    "subtraction": "--runs 1 --images 8 --clients 3",
    "reconstruction": "--runs 1 --epochs 1 --rounds 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_attack_runs(name: str, tmp_path: Path) -> None:
    """As its page says, but for the sizes: protocols change, and what reads records must follow."""
    words = [*SCRIPTS[name].split(), "--classes", "4", "--per-class", "16"]
    path = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(PRIVACY / f"{name}.py"), *words, "--json", str(path)],
        capture_output=True, text=True, timeout=300, env=ENV, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert rows
    assert all(row["view" if name != "reconstruction" else "guess"] in done.stdout for row in rows)
    assert path.with_suffix(".svg").exists()
