"""Epsilon from below: what an adversary finds through the code that clients run.

The audit itself is in benchmarks/privacy; here it is quick, and almost sure of what it says.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from secure_fedprompt.clients.accounting import Steps, epsilon, noise_for, steps_of
from secure_fedprompt.protocol.client_noise import Noise

SURE = 1 - 1e-6


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Iterator[None]:
    """The folder whose scripts are programs, not a package."""
    folder = str(Path(__file__).parents[1] / "benchmarks" / "privacy")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(0.9, 0.2, 20), (2.0, 0.05, 300), (1, 1, 4)])
def test_the_curve_gives_the_epsilon_of_the_accountant(
    sigma: float, rate: float, steps: int
) -> None:
    """Two independent ways to compose: theirs is an upper bound, within 0.03 of ours."""
    from tradeoff import Claim

    for delta in (1e-3, 1e-5):
        upper = epsilon([Steps(sigma, rate, steps)], delta, "prv")
        assert upper - 0.03 < Claim(sigma, rate, steps).epsilon(delta) <= upper


@pytest.mark.slow
def test_copies_of_an_image_are_less_protected() -> None:
    """The figures of docs/differential-privacy.md: 400 images, batches of 32, 4 epochs, 10
    rounds, epsilon 8 at delta 1e-4."""
    from tradeoff import Claim

    rate, steps = steps_of(400, 32, 4)
    sigma = noise_for(8.0, 1e-4, rate, 10 * steps, [], "prv")
    found = [Claim(sigma, rate, 10 * steps, copies).epsilon(1e-4) for copies in (1, 2, 3)]
    assert found == pytest.approx([7.99, 19.6, 34.3], abs=0.1)


def test_the_curve_of_a_gaussian_is_known() -> None:
    """G_mu(alpha) = Phi(Phi^-1(1 - alpha) - mu) (Dong, Roth and Su 2022, equation 6)."""
    from tradeoff import Claim

    alpha, beta = Claim(2.0, 1.0, 16).curve()
    inner = (alpha > 1e-6) & (alpha < 1 - 1e-6)
    assert np.abs(beta[inner] - norm.cdf(norm.isf(alpha[inner]) - 2.0)).max() < 2e-3


def test_rates_of_the_mechanism_itself_are_not_refuted_and_better_ones_are() -> None:
    from tradeoff import Claim, least_refuted, measured

    rng, claim = np.random.default_rng(1), Claim(1.0)
    outside, inside = rng.normal(0, 1, 40_000), rng.normal(1, 1, 40_000)
    rates = measured(inside, outside, claim, SURE)
    assert not rates.refute(claim)
    assert 1.0 < least_refuted(rates, claim) < 1.15
    assert measured(inside + 0.2, outside, claim, SURE).refute(claim)
    blind = measured(rng.normal(0, 1, 1000), rng.normal(0, 1, 1000), claim, SURE)
    assert least_refuted(blind, claim) == math.inf


@pytest.mark.parametrize(
    "fault", ["", *(pytest.param(f, marks=pytest.mark.slow) for f in ("noise x 0.9", "clip x 1.1"))]
)
def test_an_audit_of_private_training(fault: str) -> None:
    from epsilon_audit import audit_images, faulty
    from tradeoff import Claim

    claim = Claim(0.8, 0.5, 4)
    with faulty(fault):
        least, flagged = audit_images(claim, 500, 160 if fault else 80, SURE)
    assert flagged is bool(fault)
    assert 0.85 < least / claim.sigma < 1.2  # an audit that finds much less is of no use


@pytest.mark.parametrize(
    "fault",
    [
        "",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("noise x 0.7", "counts on colluders")),
    ],
)
def test_an_audit_of_client_noise(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left once the colluders' shares are subtracted must be all of the noise."""
    from dirac import observe_clients, scores
    from tradeoff import Claim, least_refuted, measured

    from secure_fedprompt.protocol import client_noise

    if fault.startswith("noise"):
        drawn = client_noise.discrete_gaussian
        less: Any = lambda key, variance, count: drawn(key, variance // 2, count)  # noqa: E731
        monkeypatch.setattr(client_noise, "discrete_gaussian", less)
    claim = Claim(0.4, 1.0, 1)
    noise = Noise(0.5, 0.4, 43 if fault.startswith("counts") else 23)
    seen = observe_clients(43, 20, noise, 260 if fault else 130, 1)
    rates = measured(*scores(claim, seen), claim, SURE)
    assert rates.refute(claim) is bool(fault)
    assert least_refuted(rates, claim) / claim.sigma < 1.5  # seen: 1.13 to 1.26


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    ["", *(pytest.param(f, marks=pytest.mark.skipif("LONG" not in os.environ, reason="LONG=1 runs it"))
           for f in ("noise x 0.9", "clip x 1.1"))],
)  # fmt: skip
def test_a_long_audit_of_client_noise(fault: str) -> None:
    from epsilon_audit import audit_clients, faulty
    from tradeoff import Claim

    claim = Claim(0.8, 1.0, 2)
    with faulty(fault):
        _, flagged = audit_clients(claim, 43, 10, 1600, SURE)
    assert flagged is bool(fault)
