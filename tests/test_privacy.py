"""DP-SGD on prompts: gradients against a loop, noise, sampling, the ledger, and refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from rich.console import Console
from rounds import later, make_parties, make_plan
from scipy import stats
from test_comparators import NAMES, batch_for, settings_of
from torch import nn

from secure_fedprompt import narration
from secure_fedprompt.__main__ import main
from secure_fedprompt.clients import dp_sgd as privacy
from secure_fedprompt.clients.accounting import Steps, epsilon, noise_for, steps_of
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import sets
from secure_fedprompt.clients.dp_sgd import Draws, PrivateTraining, SecureOptimizer
from secure_fedprompt.clients.features import predict
from secure_fedprompt.clients.learning import LocalLearner
from secure_fedprompt.clients.ledger import Entry, Ledger, Upload
from secure_fedprompt.clients.methods.base import METHODS, Batch, Method, build
from secure_fedprompt.clients.session import Session
from secure_fedprompt.clients.settings import PrivacySettings
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.clients.work import Work
from secure_fedprompt.host.log import Log
from secure_fedprompt.protocol import client_noise
from secure_fedprompt.protocol.errors import BudgetError, ConfigError
from secure_fedprompt.protocol.layout import METRICS
from secure_fedprompt.protocol.settings import FedMGPSettings, FedOTPSettings

SAMPLE = PrivacySettings(kind="sample", noise_multiplier=1.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "promptfl": {"method": "promptfl"},
    "fedotp": {"method": "fedotp", "fedotp": FedOTPSettings(transport="average")},
    "fedmgp": {"method": "fedmgp"},
    "text only": {"method": "fedmgp", "fedmgp": FedMGPSettings(groups=2, slots=1, modality="text")},
    "vision only": {"method": "fedmgp", "fedmgp": FedMGPSettings(groups=2, slots=1, modality="vision")},
    "l2": {"method": "fedmgp", "fedmgp": FedMGPSettings(groups=3, slots=1, diversity="l2")},
}  # fmt: skip


def make(variant: str, images: int = 6) -> tuple[Method, Batch]:
    """In float64, on a random CLIP."""
    changes = dict(VARIANTS[variant])
    backbone = tiny(vision_layers=2)
    method = build(settings_of(changes.pop("method"), **changes), backbone, NAMES)
    for p in method.parameters():
        p.data = p.data.double()
    return method, batch_for(method, backbone, images)


def trainer_of(method: Method, sigma: float = 1.0, clip: float = 1.0) -> PrivateTraining:
    optimiser = torch.optim.SGD(method.parameters(), lr=0.1)
    draws = Draws(os.urandom)
    return PrivateTraining(method, optimiser, draws, sigma=sigma, clip=clip, expected=4)


def gradients(method: Method, batch: Batch) -> list[torch.Tensor]:
    """Of the loss without its data-free part, image by image: the slow reference."""
    rows: list[list[torch.Tensor]] = []
    for i in range(len(batch.labels)):
        loss = method.loss(Batch(batch.images[i : i + 1], batch.labels[i : i + 1]))
        free = method.data_free_loss()
        loss = loss if free is None else loss - free
        rows.append(list(torch.autograd.grad(loss, method.parameters())))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("chunk", [2, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_images_are_those_of_a_loop(
    variant: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy, "CHUNK", chunk)
    method, batch = make(variant)
    training = trainer_of(method)
    training.backward(batch)
    for p, expected in zip(method.parameters(), gradients(method, batch), strict=True):
        assert expected.abs().max() > 1e-6
        assert (p.grad_sample - expected).abs().max() < 1e-10  # type: ignore[attr-defined]
    training.close()
    assert not any(hasattr(p, "grad_sample") for p in method.parameters())


@pytest.mark.filterwarnings("ignore:Full backward hook")  # Opacus' own, where inputs are data
def test_an_ordinary_layer_agrees_with_opacus_own_sampler() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(5, 3, dtype=torch.float64), nn.Linear(3, 2, bias=False).double()
    ours = privacy.PerImage(nn.Parameter(layer.weight.detach().clone()))
    opacus, wrapped = (GradSampleModule(each, loss_reduction="sum") for each in (layer, ours))
    opacus(x).square().sum().backward()
    rows = torch.zeros(5, dtype=torch.float64).requires_grad_()
    torch.einsum("bi,boi->bo", x, wrapped(rows)).square().sum().backward()
    assert torch.allclose(ours.value.grad_sample, layer.weight.grad_sample, atol=1e-10, rtol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["promptfl", "fedotp", "fedmgp"])
@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_a_step_is_clip_sum_noise_divide_and_then_the_free_terms(
    variant: str, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Draws, "normal", lambda self, shape: np.full(shape, 0.5))
    method, batch = make(variant)
    samples = gradients(method, batch)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples]).norm(dim=0)  # all tensors
    factor = (clip / (norms + 1e-6)).clamp(max=1)
    free = method.data_free_loss()
    extra = [torch.zeros_like(p) for p in method.parameters()]
    if free is not None:
        found = torch.autograd.grad(free, method.parameters(), allow_unused=True)
        extra = [e if f is None else f for e, f in zip(extra, found, strict=True)]
    before = [p.detach().clone() for p in method.parameters()]
    training = trainer_of(method, sigma=2.0, clip=clip)
    training.step(batch)
    for p, b, g, e in zip(method.parameters(), before, samples, extra, strict=True):
        total = torch.einsum("i,i...->...", factor, g) + 2.0 * clip * 0.5
        assert torch.allclose(p, b - 0.1 * (total / 4 + e), atol=1e-10, rtol=0)


def test_an_empty_batch_is_a_step_of_noise() -> None:
    method, batch = make("fedmgp")
    training = trainer_of(method, sigma=3.0, clip=2.0)
    before = [p.detach().clone() for p in method.parameters()]
    training.step(Batch(batch.images[:0], batch.labels[:0]))
    moved = torch.cat([(p - b).flatten() for p, b in zip(method.parameters(), before, strict=True)])
    assert 0.1 * 3 * 2 / 4 * 0.8 < moved.std() < 0.1 * 3 * 2 / 4 * 1.2 + 0.1
    training.step(batch)


def test_one_image_moves_the_sum_by_at_most_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring batches: sensitivity over all trained tensors together."""
    monkeypatch.setattr(Draws, "normal", lambda self, shape: np.zeros(shape))
    for variant in ("promptfl", "fedotp", "fedmgp"):
        moves = []
        for count in (5, 6):
            method, batch = make(variant)
            before = [p.detach().clone() for p in method.parameters()]
            trainer_of(method, clip=0.01).step(Batch(batch.images[:count], batch.labels[:count]))
            moved = zip(method.parameters(), before, strict=True)
            moves.append(torch.cat([(p - b).flatten() for p, b in moved]))
        change = (moves[1] - moves[0]).norm()
        assert 0 < change <= 0.1 * 0.01 / 4 * 1.0001


def test_a_gradient_sum_is_never_released_twice() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimiser = SecureOptimizer(
        torch.optim.SGD([p], lr=0.1), Draws(os.urandom), sigma=1, clip=1, expected=1
    )
    assert isinstance(optimiser, DPOptimizer)
    p.grad_sample = torch.ones(2, 3)  # type: ignore[attr-defined]
    optimiser.pre_step()
    with pytest.raises(ValueError, match="released twice"):
        optimiser.add_noise()


def test_an_image_with_a_broken_gradient_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draws, "normal", lambda self, shape: np.zeros(shape))
    moved = []
    for broken in (True, False):
        method, batch = make("promptfl")
        images = batch.images.clone()
        images[2] = float("inf")
        kept = Batch(images, batch.labels) if broken else Batch(
            batch.images[[0, 1, 3, 4, 5]], batch.labels[[0, 1, 3, 4, 5]])  # fmt: skip
        trainer_of(method).step(kept)
        moved.append(method.parameters()[0].detach().clone())
    assert torch.allclose(*moved, atol=1e-12)


def test_noise_is_added_before_anything_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the gradient's own grid must not show in the result."""
    p = nn.Parameter(torch.zeros(1))
    optimiser = SecureOptimizer(
        torch.optim.SGD([p], lr=1.0), Draws(os.urandom), sigma=1e-9, clip=1, expected=1
    )
    off = 0
    for _ in range(50):
        optimiser.zero_grad()
        p.grad_sample = torch.full((1, 1), 0.75)  # type: ignore[attr-defined]
        monkeypatch.setattr(optimiser._draws, "normal", lambda shape: np.full(shape, -0.75e9 + 1))
        optimiser.pre_step()
        assert p.grad is not None
        off += float(p.grad) % 2.0**-25 != 0
    assert off == 50


# -- randomness ----------------------------------------------------------------------------------


def test_noise_is_normal_and_sampling_is_poisson() -> None:
    draws = Draws(os.urandom)
    noise = draws.normal((300, 200)).reshape(-1)
    assert stats.kstest(noise, "norm").pvalue > 1e-6
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * len(noise))
    counts = np.array([len(draws.poisson(50, 0.3)) for _ in range(4000)])
    table = np.bincount(counts, minlength=51)
    expected = 4000 * stats.binom.pmf(np.arange(51), 50, 0.3)
    keep = expected > 5
    statistic = ((table[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    assert stats.chi2.sf(statistic, keep.sum() - 1) > 1e-6
    assert len(draws.poisson(10, 1.0)) == 10


def test_no_seed_of_torch_or_numpy_determines_noise_or_sampling() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        draws = Draws(os.urandom)
        found.append((draws.normal((4,)), draws.uniform(4)))
    assert not np.array_equal(found[0][0], found[1][0])
    assert not np.array_equal(found[0][1], found[1][1])


def test_uniform_numbers_never_reach_zero_or_one() -> None:
    for byte, edge in ((b"\0", 0.0), (b"\xff", 1.0)):
        draws = Draws(os.urandom)
        draws._stream.read = lambda size, byte=byte: np.frombuffer(byte * size, np.uint8)  # type: ignore[method-assign, misc]
        value = draws.uniform(1)[0]
        assert abs(value - edge) < 1e-15
        assert 0 < value < 1
        assert np.isfinite(draws.normal((2,))).all()


# -- accounting and the ledger -------------------------------------------------------------------


def test_epsilon_agrees_with_known_figures() -> None:
    """Abadi et al. 2016, section 4: q = 0.01, sigma = 4, 10,000 steps, delta 1e-5 give 1.26."""
    steps = [Steps(4.0, 0.01, 10_000)]
    rdp = epsilon(steps, 1e-5, "rdp")
    assert 0.8 * 1.26 < rdp < 1.26  # the conversion of Balle et al. 2020 is tighter
    assert epsilon(steps, 1e-5, "prv") < rdp
    # A Gaussian mechanism without sampling: Balle and Wang 2018, analytic.
    exact = next(
        e for e in np.arange(0.5, 9, 0.001)
        if stats.norm.cdf(0.5 - e) - np.exp(e) * stats.norm.cdf(-0.5 - e) <= 1e-5
    )  # fmt: skip
    assert exact <= epsilon([Steps(1.0, 1.0, 1)], 1e-5, "prv") < exact + 0.05


def test_orders_are_wide_enough_for_small_epsilons() -> None:
    """Opacus warns where its best order is the last one; warnings are errors here."""
    assert epsilon([Steps(50.0, 0.01, 10)], 1e-5, "rdp") < 0.01
    assert epsilon([], 1e-5) == 0
    assert epsilon([Steps(0.0, 0.5, 1)], 1e-5) == float("inf")


@pytest.mark.parametrize("accountant", ["rdp", pytest.param("prv", marks=pytest.mark.slow)])
def test_noise_is_just_enough_for_the_target(accountant: str) -> None:
    before = [Steps(2.0, 0.1, 50)]
    sigma = noise_for(3.0, 1e-5, 0.1, 100, before, accountant)
    within = epsilon([*before, Steps(sigma, 0.1, 100)], 1e-5, accountant)
    assert 2.9 < within <= 3.0
    with pytest.raises(BudgetError, match="epsilon .* is spent already"):
        noise_for(0.01, 1e-5, 0.1, 100, before, accountant)


def test_steps_of_a_round() -> None:
    assert steps_of(320, 32, 4) == (0.1, 40)
    assert steps_of(10, 32, 2) == (1.0, 2)


# -- a client ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> Backbone:
    return Backbone.load("bundled", device="cpu")


_open: list[Ledger] = []


def open_ledger(folder: Path) -> Ledger:
    """Of a client that is started, after the last one there ended."""
    close_ledgers()
    _open.append(Ledger(folder / "privacy.jsonl"))
    return _open[-1]


@pytest.fixture(autouse=True)
def close_ledgers_in_the_end() -> Iterator[None]:
    yield
    close_ledgers()


def close_ledgers() -> None:
    while _open:
        _open.pop().close()


def private_client(bundled: Backbone, folder: Path, method: str, **dp: Any) -> LocalLearner:
    train, test = sets.generated_sets(4, ["sketch"], 4, 2, 0)
    settings = PrivacySettings(**{"kind": "sample", "noise_multiplier": 1.0, **dp})
    trainer = LocalTrainer(bundled, train, test, 0, dp=settings)
    trainer.keep = folder
    trainer.ledger = open_ledger(folder)
    return trainer.prepare(settings_of(method, epochs=2))


@pytest.mark.parametrize("method", ["promptfl", "fedotp", "fedmgp"])
def test_a_client_trains_privately_and_keeps_metrics_to_itself(
    bundled: Backbone, tmp_path: Path, method: str
) -> None:
    learner = private_client(bundled, tmp_path, method)
    plan = make_plan(3, tensors=learner.tensors(), max_weight=1, rounds=2)
    values, _ = learner.run(Work(plan, learner.initial()))  # type: ignore[misc]
    assert [float(values[k]) for k in ("seen", "correct", "loss")] == [0, 0, 0]
    assert all(np.abs(values[t.name]).max() > 0 for t in learner.tensors())
    (entry,) = Ledger.read(tmp_path / "privacy.jsonl").entries
    assert (entry.sigma, entry.rate, entry.steps) == (1.0, 0.5, 4)
    other, _ = private_client(bundled, tmp_path / "b", method).run(Work(plan, learner.initial()))  # type: ignore[misc]
    name = learner.tensors()[0].name
    assert not np.array_equal(values[name], other[name])  # the same seed, other noise


@pytest.mark.slow
def test_a_budget_lasts_for_the_run_and_then_refuses(bundled: Backbone, tmp_path: Path) -> None:
    learner = private_client(
        bundled, tmp_path, "promptfl", noise_multiplier=0.0, target_epsilon=4.0, retries=0,
        accountant="rdp",
    )  # fmt: skip
    for number in (1, 2, 3):
        plan = make_plan(
            3, tensors=learner.tensors(), round=number, learning_round=number, rounds=3
        )
        learner.run(Work(plan, learner.initial()))
    spent = epsilon(Ledger.read(tmp_path / "privacy.jsonl").history, 1e-5, "rdp")
    assert 3.8 < spent <= 4.0
    plan = make_plan(3, tensors=learner.tensors(), round=4, learning_round=3, rounds=3)
    with pytest.raises(
        BudgetError,
        match=r"target_epsilon = 4: epsilon (4|3\.[89]\d?) at delta 1e-05 is spent, this round",
    ):
        learner.run(Work(plan, learner.initial()))
    again = private_client(bundled, tmp_path, "promptfl", noise_multiplier=0.0, target_epsilon=3.5)
    new = make_plan(3, tensors=learner.tensors(), run=b"n" * 16)
    with pytest.raises(BudgetError, match="is spent already"):
        again.run(Work(new, learner.initial()))


def test_more_noise_applies_at_once_and_less_never(bundled: Backbone, tmp_path: Path) -> None:
    for number, (asked, used) in enumerate([(1.0, 1.0), (4.0, 4.0), (0.5, 1.0)], start=1):
        learner = private_client(bundled, tmp_path, "promptfl", noise_multiplier=asked)
        plan = make_plan(3, tensors=learner.tensors(), round=number, learning_round=1, rounds=9)
        learner.run(Work(plan, learner.initial()))
        assert learner.sigma == used


def test_clients_in_one_process_have_ledgers_of_their_own(
    bundled: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a state folder, as in simulations, nothing is shared and nothing is written."""
    monkeypatch.chdir(tmp_path)
    train, test = sets.generated_sets(4, ["sketch"], 4, 2, 0)
    trainers = [LocalTrainer(bundled, train, test, 0, dp=SAMPLE) for _ in range(2)]
    for trainer in trainers:
        learner = trainer.prepare(settings_of("promptfl"))
        learner.run(Work(make_plan(3, tensors=learner.tensors()), learner.initial()))
    assert [len(trainer.ledger.entries) for trainer in trainers] == [1, 1]
    assert not list(tmp_path.iterdir())


def test_the_budget_is_checked_before_any_step(
    bundled: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = private_client(bundled, tmp_path, "promptfl")
    seen: list[int] = []

    def spy(self: PrivateTraining, batch: Batch) -> None:
        seen.append(len(Ledger.read(tmp_path / "privacy.jsonl").entries))

    monkeypatch.setattr(PrivateTraining, "step", spy)
    learner.run(Work(make_plan(3, tensors=learner.tensors()), learner.initial()))
    assert seen == [1] * 4


def test_delta_must_be_below_one_over_the_number_of_images(bundled: Backbone) -> None:
    images, test = sets.generated_sets(8, ["photo"], 4, 1, 0)
    for delta, refused in ((1 / 32, True), (0.99 / 32, False)):
        dp = PrivacySettings(kind="sample", noise_multiplier=1.0, delta=delta)
        assert len(images) == 32
        if refused:  # before anybody is asked
            with pytest.raises(
                ConfigError, match=r"dp\.delta = 0\.03125: with 32 images .* below 0\.031"
            ):
                LocalTrainer(bundled, images, test, dp=dp)
        else:
            LocalTrainer(bundled, images, test, dp=dp).prepare(settings_of("promptfl"))


def test_noise_that_exceeds_the_budget_is_said_before_a_run_is_joined(
    bundled: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=r"target_epsilon = 2: .* this round would make it"):
        private_client(bundled, tmp_path, "promptfl", noise_multiplier=0.5, target_epsilon=2.0)
    private_client(bundled, tmp_path / "b", "promptfl", noise_multiplier=5.0, target_epsilon=9.0)
    train, test = sets.generated_sets(4, ["sketch"], 4, 2, 0)
    dp = PrivacySettings(kind="sample", noise_multiplier=0.5, target_epsilon=2.0)
    again = LocalTrainer(bundled, train, test, 0, dp=dp)
    again.resuming = True  # to leave now would tell the server what is spent
    again.prepare(settings_of("promptfl", epochs=2))


@pytest.mark.parametrize(
    "method",
    sorted(set(METHODS) - {"promptfl", "fedotp", "fedmgp", "coop", "fedper"}),
)
def test_methods_without_losses_of_single_images_are_refused(
    bundled: Backbone, tmp_path: Path, method: str
) -> None:
    with pytest.raises(ConfigError, match=r"dp\.kind = 'sample'"):
        private_client(bundled, tmp_path, method)


def test_settings_that_contradict_each_other_are_refused() -> None:
    for changes, says in (
        ({"kind": "sample"}, "without dp.target_epsilon and dp.noise_multiplier: set one"),
        ({"kind": "much"}, "dp.kind = 'much'"),
        ({"target_epsilon": 8.0}, "set kind = 'sample'"),
        ({"accountant": "gdp"}, "dp.accountant = 'gdp'"),
    ):
        with pytest.raises(ConfigError, match=says):
            PrivacySettings(**changes).check()  # type: ignore[arg-type]
    PrivacySettings().check()
    PrivacySettings(kind="sample", target_epsilon=1, noise_multiplier=1).check()


def test_privacy_plan_and_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.json"
    words = ["privacy", "plan", "--images", "400", "--epochs", "4", "--delta", "1e-4"]
    assert main([*words, "--target-epsilon", "8", "--json", str(out)]) == 0
    plan = json.loads(out.read_text())
    assert plan["steps"] == 500
    both = plan["epsilon_by_accountant"]
    assert 7.8 < both["prv"] <= 8 < both["rdp"]
    assert plan["epsilon"] == both[plan["accountant"]]
    capsys.readouterr()
    assert main([*words, "--noise-multiplier", "1", "--images", "5000"]) == 0
    assert "it would allow to publish" not in (shown := capsys.readouterr().out)
    assert "noise multiplier 1: epsilon" in shown
    assert main([*words, "--noise-multiplier", "1", "--images", "50000"]) == 0
    assert "it would allow to publish" in " ".join(capsys.readouterr().out.split())
    assert main(words) == 2
    assert main(["privacy", "status", str(tmp_path)]) == 2
    assert "has not trained" in capsys.readouterr().err
    ledger = open_ledger(tmp_path)
    for run in ("ab" * 16, "cd" * 16):
        ledger.reserve(Entry(run, 1, 1.5, 0.1, 40), SAMPLE)
        ledger.release(Upload(run, 1, 0.02), 0.0, 1e-5)
    status = ["privacy", "status", str(tmp_path), "--json", str(out)]
    assert main(status) == 0  # while the client runs
    shown = capsys.readouterr().out
    assert "run abababab: 1 rounds, 40 steps, noise multiplier 1.5: epsilon" in shown
    assert f"; 1 uploads, client epsilon {client_noise.epsilon(0.02, 1e-5):.4g}" in shown
    told = json.loads(out.read_text())
    assert told["epsilon"] == epsilon([Steps(1.5, 0.1, 80)], 1e-5)
    assert told["client_epsilon"] == client_noise.epsilon(0.04, 1e-5)
    ledger.reserve(Entry("ef" * 16, 1, 0.0, 0.1, 40), PrivacySettings())
    ledger.release(Upload("ef" * 16, 1, None), 0.0, 1e-5)
    assert main(status) == 0
    shown = capsys.readouterr().out
    assert "run efefefef: 1 rounds, 40 steps without dp; 1 uploads, no noise" in shown
    assert json.loads(out.read_text())["client_epsilon"] is None
    assert "one image more or less: epsilon inf" in shown
    assert "this client or zeros in its place: epsilon inf" in shown


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("kind", ["none", "sample"])
def test_a_clients_own_figures_stay_with_it(
    bundled: Backbone, tmp_path: Path, kind: str, wanted: bool
) -> None:
    """Where no round counts, and under dp, they are taken and not sent."""
    noise = {"noise_multiplier": 1.0 if kind == "sample" else 0.0}
    learner = private_client(bundled, tmp_path, "promptfl", kind=kind, **noise)
    learner.client.local_metrics = wanted
    plan = make_plan(3, tensors=learner.tensors(), max_weight=1, rounds=2)
    uncounted = dataclasses.replace(
        plan, layout=tuple(f for f in plan.layout if f.name not in METRICS)
    )
    sent, _ = learner.run(Work(uncounted, learner.initial()))  # type: ignore[misc]
    assert set(sent) == {t.name for t in learner.tensors()}
    own = learner.figures
    learner.method.begin({"ctx": learner.initial().reshape(sent["ctx"].shape)}, 1)
    guesses, losses = predict(learner.method, learner.client._features["features"][1])
    labels = learner.client._sets[1].labels
    counted = (len(labels), int((guesses == labels).sum()), float(losses.mean()))
    assert (own.images, own.correct, own.loss) == (counted if wanted else (0, 0, None))
    assert (own.first_loss is None) is (kind == "sample")  # Opacus' steps do not tell
    sent, _ = learner.run(Work(later(plan), learner.initial()))  # type: ignore[misc]
    assert (float(sent["seen"]) > 0) is (kind == "none")
    assert (learner.figures.images > 0) is (wanted or kind == "none")
    told = io.StringIO()
    log = Log("client", console=Console(file=told))
    narration.sent(log, session_of(learner), Work(plan, learner.initial()), 1.0)
    assert ("of our 8 test images the global prompt got" in told.getvalue()) is bool(
        learner.figures.images
    )
    assert ("training loss" in told.getvalue()) is (kind == "none")
    assert "clipped" not in told.getvalue()
    learner.clipped = 3
    narration.sent(log, session_of(learner), Work(plan, learner.initial()), 1.0)
    assert f"warning 3 values clipped to {plan.clip:g}" in told.getvalue()


def session_of(learner: LocalLearner) -> Session[LocalLearner]:
    session = Session(next(iter(make_parties(3).values())), learner.client)
    session._learner = learner
    return session
