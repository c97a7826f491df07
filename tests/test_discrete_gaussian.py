"""Exact noise: distributions, and the fast coins against arithmetic with as many digits as needed."""

from __future__ import annotations

import math
import os
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from secure_fedprompt.protocol import discrete_gaussian as noise
from secure_fedprompt.protocol.discrete_gaussian import Uniform
from secure_fedprompt.protocol.expand import keystream

KEY = bytes(range(32))


def source() -> Uniform:
    return Uniform(os.urandom(32))


def chi_square(values: np.ndarray, pmf: Any, low: int, high: int) -> float:
    """p-value of integers against a distribution, tails pooled."""
    table = np.array([(values == x).sum() for x in range(low, high + 1)], float)
    expected = np.array([pmf(x) for x in range(low, high + 1)]) * len(values)
    rest, left = len(values) - table.sum(), len(values) - expected.sum()
    statistic = ((table - expected) ** 2 / expected).sum() + (rest - left) ** 2 / max(left, 1e-9)
    return float(stats.chi2.sf(statistic, len(table)))


def gaussian(variance: int) -> Any:
    reach = math.ceil(20 * math.sqrt(variance))
    norm = 1 / sum(math.exp(-(x**2) / (2 * variance)) for x in range(-reach, reach + 1))
    return lambda x: norm * math.exp(-(x**2) / (2 * variance))


# -- uniform numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1, 2, 3, 255, 256, 257, 70_000, 2**40 + 1])
def test_integers_below_a_bound_are_uniform(bound: int) -> None:
    count = 100_000
    drawn = source().below(bound, count)
    assert len(drawn) == count
    assert 0 <= drawn.min() <= drawn.max() < bound
    edges = sorted({bound * i // 16 for i in range(17)})
    table = np.histogram(drawn, [*edges[:-1], bound])[0]
    expected = np.diff(edges) * count / bound
    assert stats.chi2.sf(((table - expected) ** 2 / expected).sum(), max(1, len(table) - 1)) > 1e-6


def test_numbers_do_not_repeat_when_more_are_read() -> None:
    first, whole = Uniform(KEY), np.frombuffer(keystream(KEY, 8 * 3000), "<u8")
    read = np.concatenate([first.words(1000), first.words(1), first.words(1999)])
    assert np.array_equal(read, whole)


# -- coins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "bottom"), [(0, 1), (1, 3), (1, 1), (7, 2), (10, 1)])
@pytest.mark.parametrize("slack", [noise.SLACK, 1e9])
def test_coins_have_the_probability_of_their_exponent(
    top: int, bottom: int, slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "SLACK", slack)  # 1e9: every coin is decided exactly
    p, count = math.exp(-top / bottom), 200_000 if slack < 1 else 20_000
    coins = source().coins(np.full(count, top / bottom), lambda at: (top, bottom))
    assert abs(coins.sum() - count * p) <= 5.5 * math.sqrt(count * p * (1 - p)) + 1e-9


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**80), st.integers(1, 2**70), st.integers(-3, 3), st.integers(0, 2**20),
)  # fmt: skip
def test_a_coin_is_decided_by_the_real_numbers(top: int, bottom: int, near: int, seed: int) -> None:
    """U next to exp(-top / bottom), as far as 64 bits go, and read on where that does not decide."""
    top %= 60 * bottom
    with localcontext() as context:
        context.prec = 200
        level = (Decimal(-top) / Decimal(bottom)).exp()
        word = min(max(int(level * 2**64) + near, 0), 2**64 - 1)
        key = seed.to_bytes(32, "little")
        following = np.frombuffer(keystream(key, 64), "<u8")
        exact = Decimal(word)
        for i, more in enumerate(following, start=1):
            exact += Decimal(int(more)) / Decimal(2) ** (64 * i)
        expected = exact / 2**64 < level
    assert Uniform(key)._decide(word, top, bottom) is expected


@pytest.mark.parametrize("variance", [1, 2, 7, 1000, 10**6 + 3, 2**44, 2**56])
def test_fast_and_exact_coins_give_the_same_noise(
    variance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: floating point decides nothing that exact arithmetic would decide otherwise."""
    fast = noise.discrete_gaussian(KEY, variance, 2000)
    decided = list[int]()
    exact = Uniform._decide

    def spy(self: Uniform, word: int, top: int, bottom: int) -> bool:
        decided.append(word)
        return exact(self, word, top, bottom)

    monkeypatch.setattr(Uniform, "_decide", spy)
    assert np.array_equal(fast, noise.discrete_gaussian(KEY, variance, 2000))
    assert not decided
    monkeypatch.setattr(noise, "SLACK", 1e9)
    assert np.array_equal(fast, noise.discrete_gaussian(KEY, variance, 2000))
    assert len(decided) > 8000


def test_exponents_beyond_floating_point_are_decided_exactly() -> None:
    asked = list[int]()

    def exact(at: int) -> tuple[int, int]:
        asked.append(at)
        return 3000, 1

    assert not Uniform(KEY).coins(np.array([0.5, 3000.0, 1e300]), exact)[1:].any()
    assert asked == [1, 2]


# -- distributions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 4, 100])
def test_laplace_noise_is_exact(scale: int) -> None:
    drawn = noise.discrete_laplace(source(), scale, 400_000)
    norm = (math.exp(1 / scale) - 1) / (math.exp(1 / scale) + 1)
    assert len(drawn) > 400_000 / 3
    pmf = lambda x: norm * math.exp(-abs(x) / scale)  # noqa: E731
    assert chi_square(drawn, pmf, -4 * scale, 4 * scale) > 1e-6


@pytest.mark.parametrize("variance", [1, 2, 5, 40, 1000])
def test_gaussian_noise_is_exact(variance: int) -> None:
    drawn = noise.discrete_gaussian(os.urandom(32), variance, 300_000)
    reach = math.ceil(3 * math.sqrt(variance))
    assert chi_square(drawn, gaussian(variance), -reach, reach) > 1e-6


def test_gaussian_noise_is_exact_where_every_coin_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "SLACK", 1e9)
    drawn = noise.discrete_gaussian(os.urandom(32), 5, 10_000)
    assert chi_square(drawn, gaussian(5), -6, 6) > 1e-6


def test_wide_gaussian_noise_has_its_variance() -> None:
    deviation = 2**21 + 0.5
    drawn = noise.discrete_gaussian(os.urandom(32), int(deviation**2), 100_000)
    assert stats.kstest(drawn / deviation, "norm").pvalue > 1e-6
    assert stats.chisquare(np.bincount(drawn & 7, minlength=8)).pvalue > 1e-6  # low digits too


@pytest.mark.parametrize("count", [0, 1, 7, 50_000])
def test_as_many_values_as_wanted(count: int) -> None:
    values = noise.discrete_gaussian(KEY, 9, count)
    assert values.shape == (count,)
    assert values.dtype == np.int64
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03 if count > 9 else True
