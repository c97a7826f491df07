"""DP-SGD on prompts: gradients against a loop, noise, sampling, the ledger, and refusals."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import stats
from test_comparators import NAMES, batch_for, settings_of
from torch import nn

from secure_fedprompt.clients import dp_sgd as privacy
from secure_fedprompt.clients.accounting import Steps, epsilon, noise_for, steps_of
from secure_fedprompt.clients.dp_sgd import Draws, PrivateTraining, SecureOptimizer
from secure_fedprompt.clients.methods.base import Batch, Method, build
from secure_fedprompt.clients.methods.dpfpl import DPFPL
from secure_fedprompt.protocol.errors import BudgetError
from secure_fedprompt.protocol.settings import ComparatorSettings, FedMGPSettings, FedOTPSettings

VARIANTS: dict[str, dict[str, Any]] = {
    "promptfl": {"method": "promptfl"},
    "fedotp": {"method": "fedotp", "fedotp": FedOTPSettings(transport="average")},
    "fedmgp": {"method": "fedmgp"},
    "text only": {"method": "fedmgp", "fedmgp": FedMGPSettings(groups=2, slots=1, modality="text")},
    "vision only": {"method": "fedmgp", "fedmgp": FedMGPSettings(groups=2, slots=1, modality="vision")},
    "l2": {"method": "fedmgp", "fedmgp": FedMGPSettings(groups=3, slots=1, diversity="l2")},
    "dpfpl": {"method": "dpfpl", "compare": ComparatorSettings(rank=2)},
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


def test_noise_of_dpfpl_stays_in_the_low_rank_where_its_local_prompt_learns() -> None:
    method, _ = make("dpfpl")
    assert isinstance(method, DPFPL)
    left, right = method.factors()
    before = [p.detach().clone() for p in (method.ctx, method.local)]
    trainer_of(method).step(Batch(torch.zeros(0, 24).double(), torch.zeros(0, dtype=torch.int64)))
    ctx, local = (p.detach() - b for p, b in zip((method.ctx, method.local), before, strict=True))
    outside = lambda moved: moved - left @ (left.T @ moved)  # noqa: E731
    beyond = lambda moved: outside(moved) - outside(moved) @ right.T @ right  # noqa: E731
    assert beyond(local).abs().max() < 1e-12
    assert beyond(ctx).abs().max() > 1e-3
    assert local.norm() > 1e-3


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
    for variant in ("promptfl", "fedotp", "fedmgp", "dpfpl"):
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
