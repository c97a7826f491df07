"""What error rates of an adversary say about epsilon.

A mechanism that claims noise sigma (with sampling rate q, over T steps) has a trade-off curve
f(alpha): whoever tells "with" from "without" at a false positive rate alpha misses at least
f(alpha) of those that are there (f-DP: Dong, Roth and Su, JRSS-B 2022). Rates that lie below the
curve refute the claim. The curve is computed here from the distribution of the privacy loss, by
FFT, independently of the accountants. A whole curve sees more than one (epsilon, delta): Nasr et
al. (USENIX Security 2023, section 5) come close to the true epsilon with a thousand observations,
where (epsilon, delta) alone would need hundreds of thousands.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom, norm

Array = NDArray[np.float64]
_STEP = 2e-3  # grid of the privacy loss, or finer
_TAIL = 9.0  # deviations of the noise that the grid covers
_THIN = 1e-5  # distance of a curve's points
_GRID, _REACH = 1.0025, 480  # noise multipliers that are tried, around the claimed one


@dataclass(frozen=True)
class Claim:
    """T steps of a Gaussian mechanism with sensitivity 1 on a Poisson sample.

    Attributes:
        sigma: noise; rate: q, 1 takes everybody; steps: T.
        copies: of the image that is there or not, each sampled by itself (group privacy).
    """

    sigma: float
    rate: float = 1.0
    steps: int = 1
    copies: int = 1

    @property
    def _chances(self) -> Array:
        """That 0, 1, ... copies are in a step."""
        return np.asarray(binom.pmf(np.arange(self.copies + 1), self.copies, self.rate))

    def loss(self, seen: Array) -> Array:
        """Log-likelihood ratio of "with" against "without" of what was seen in single steps."""
        found = np.full(seen.shape, -np.inf)
        for j, chance in enumerate(self._chances):
            if chance:
                gain = (2 * j * seen - j * j) / (2 * self.sigma**2)
                found = np.logaddexp(found, np.log(chance) + gain)
        return found

    def _masses(self) -> tuple[Array, Array]:
        """How likely each loss is "with" and "without", from the largest loss down."""
        # One step: a normal variate on a fine grid, its loss, and how likely it is.
        x = np.linspace(-_TAIL * self.sigma, self.copies + _TAIL * self.sigma, 400_001)
        single = [np.diff(norm.cdf((x - j) / self.sigma)) for j in range(self.copies + 1)]
        present, absent = np.asarray(self._chances @ np.array(single)), single[0]
        loss = self.loss((x[:-1] + x[1:]) / 2)
        # Composition: losses add. The grid wraps around, so it must hold all T of them.
        mean = float(present @ loss)
        spread = float(np.sqrt(present @ (loss - mean) ** 2))
        reach = self.steps * abs(mean) + 12 * spread * np.sqrt(self.steps) + 40
        step = min(_STEP, spread / 100)
        size = 1 << int(np.ceil(np.log2(2 * reach / step)))
        place = np.rint(loss / step).astype(np.int64) % size
        p, q = (np.fft.irfft(np.fft.rfft(np.bincount(place, part, size)) ** self.steps, size)
                for part in (present, absent))  # fmt: skip
        losses = np.fft.fftfreq(size, 1 / size) * step
        order = np.argsort(losses)[::-1]  # thresholds from high to low
        p, q, at = (np.clip(part[order], lowest, None)
                    for part, lowest in ((p, 0), (q, 0), (losses, -np.inf)))  # fmt: skip
        # Each of them is exact where it is large; the other follows from the loss.
        ratio = np.exp(-np.abs(at))
        return np.where(at > 0, p, q * ratio), np.where(at > 0, p * ratio, q)

    @functools.cache  # noqa: B019 (few, and used again and again)
    def curve(self) -> tuple[Array, Array]:
        """f as points (alpha, beta), alpha growing, no closer to each other than they need be."""
        p, q = self._masses()
        alpha, beta_ = np.cumsum(q), np.append(np.cumsum(p[::-1])[::-1][1:], 0.0)
        kept = np.append(np.diff(np.floor((alpha - beta_) / _THIN)) > 0, True)
        return alpha[kept], beta_[kept]

    def epsilon(self, delta: float) -> float:
        """What the curve says, whichever of "with" and "without" is the truth."""
        p, q = self._masses()

        def exceeds(value: float) -> bool:
            gains = (np.cumsum(a - np.exp(value) * b) for a, b in ((p, q), (q[::-1], p[::-1])))
            return any(float(gain.max()) > delta for gain in gains)

        low, high = 0.0, 500.0
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (middle, high) if exceeds(middle) else (low, middle)
        return high


def most(errors: int, trials: int, confidence: float) -> float:
    """Clopper-Pearson upper bound of a rate."""
    return 1.0 if errors == trials else float(beta.ppf(confidence, errors + 1, trials - errors))


@dataclass(frozen=True)
class Rates:
    """Upper bounds of an adversary's errors, each at half of what the confidence leaves.

    Attributes:
        false: takes "without" for "with"; missed: takes "with" for "without".
    """

    false: float
    missed: float

    @classmethod
    def of(cls, inside: Array, outside: Array, threshold: float, confidence: float) -> Rates:
        each = 1 - (1 - confidence) / 2
        return cls(
            most(int((outside > threshold).sum()), len(outside), each),
            most(int((inside <= threshold).sum()), len(inside), each),
        )

    def refute(self, claim: Claim) -> bool:
        """Whether no mechanism that keeps the claim errs so little."""
        alpha, beta_ = claim.curve()
        return self.missed < float(np.interp(self.false, alpha, beta_, 1.0, 0.0))


def least_refuted(rates: Rates, claim: Claim) -> float:
    """The smallest noise that the rates refute: there is less than that. Infinite if none is."""
    grid = [claim.sigma * _GRID**k for k in range(-_REACH, _REACH + 1)]
    at = bisect.bisect_left(
        grid, True, key=lambda sigma: rates.refute(Claim(sigma, claim.rate, claim.steps))
    )
    return grid[at] if at < len(grid) else float("inf")


def measured(inside: Array, outside: Array, claim: Claim, confidence: float) -> Rates:
    """Error rates at the best threshold: chosen on one half of the scores, judged on the other."""
    rng = np.random.default_rng(0)
    inside, outside = rng.permutation(inside), rng.permutation(outside)
    first = np.concatenate([inside[::2], outside[::2]])
    candidates = np.quantile(first, np.linspace(0.02, 0.98, 49))
    chosen = min(candidates, key=lambda threshold: least_refuted(
        Rates.of(inside[::2], outside[::2], threshold, confidence), claim))  # fmt: skip
    return Rates.of(inside[1::2], outside[1::2], chosen, confidence)
