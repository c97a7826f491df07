"""What a client's images have been spent on: a durable record of DP-SGD steps, and epsilon.

A line is appended and synced to the disk *before* the steps that it stands for, so a client that is
killed at any point has counted too much or right, never too little. What happened (steps) is kept
apart from how it is counted (Opacus' accountants). All runs in one ``state_dir`` are counted
together: they are about the same images.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from secure_fedprompt.clients.privacy_settings import PrivacySettings
from secure_fedprompt.protocol.errors import BudgetError, ConfigError

# Opacus' default orders end at 63, too low for small epsilons: it warns, and its PRV accountant,
# which bounds its grid with them, cannot be told others. So they are widened where both look.
ORDERS = [1 + x / 10.0 for x in range(1, 100)] + [*range(11, 64)] + [2**k for k in range(6, 13)]
_TOLERANCE = 0.005  # relative, of a noise multiplier that is searched for
_MAX_SIGMA = 64.0  # with more noise nothing is learned


@dataclass(frozen=True)
class Steps:
    """``count`` steps with noise multiplier ``sigma`` and sampling probability ``rate``."""

    sigma: float
    rate: float
    count: int


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of the ledger: the steps that an attempt at a round may take."""

    run: str
    round: int
    sigma: float
    rate: float
    steps: int


def epsilon(history: Sequence[Steps], delta: float, accountant: str = "prv") -> float:
    """Epsilon at ``delta`` of Poisson-subsampled Gaussian steps, add/remove one image.

    Args:
        accountant: "rdp" (Mironov, Talwar and Zhang 2019) or "prv" (Gopi, Lee and Wutschitz 2021),
            whose upper bound is taken.
    """
    from opacus.accountants import PRVAccountant, RDPAccountant

    if not history:
        return 0.0
    if any(step.sigma == 0 for step in history):
        return float("inf")
    counted: dict[tuple[float, float], int] = {}
    for step in history:
        key = step.sigma, step.rate
        counted[key] = counted.get(key, 0) + step.count
    chosen = RDPAccountant() if accountant == "rdp" else PRVAccountant()
    chosen.history = [(sigma, rate, count) for (sigma, rate), count in counted.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # logarithms of zero far out in a tail
        RDPAccountant.DEFAULT_ALPHAS = ORDERS
        return float(chosen.get_epsilon(delta))


def noise_for(
    target: float, delta: float, rate: float, count: int, before: Sequence[Steps], accountant: str
) -> float:
    """The smallest noise multiplier with which ``count`` more steps stay within ``target``.

    Raises:
        BudgetError: what was spent before leaves no room for any.
    """

    def within(sigma: float) -> bool:
        return epsilon([*before, Steps(sigma, rate, count)], delta, accountant) <= target

    low, high = 0.0, 0.5
    if accountant == "prv":  # slow, but never above the other: begin where that one ends
        high = noise_for(target, delta, rate, count, before, "rdp")
        low = 0.8 * high
    while not within(high):
        low, high = high, 2 * high
        if high > _MAX_SIGMA:
            spent = epsilon(before, delta, accountant)
            raise BudgetError(
                f"target_epsilon = {target:g}: epsilon {spent:.3g} at delta {delta:g} is spent "
                f"already, which leaves no room for {count} steps with a noise multiplier below "
                f"{_MAX_SIGMA:g}; raise it, or stop here"
            )
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


class Ledger:
    """The record in one file, or in memory for simulations.

    Raises:
        ConfigError: the file is not a ledger.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries: list[Entry] = []
        lines = path.read_bytes().splitlines(keepends=True) if path and path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                self.entries.append(msgspec.json.decode(line, type=Entry))
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    # Cut by a crash while it was written: nothing was done for it yet.
                    assert path is not None
                    os.truncate(path, path.stat().st_size - len(line))
                    break
                raise ConfigError(
                    f"{path} line {number} is no entry of a privacy ledger: {error}; restore it "
                    "from a copy, since what it counted is spent"
                ) from None

    @property
    def history(self) -> list[Steps]:
        return [Steps(e.sigma, e.rate, e.steps) for e in self.entries]

    def sigma_of(self, run: str) -> float | None:
        """The noise multiplier with which a run began."""
        return next((e.sigma for e in self.entries if e.run == run), None)

    def reserve(self, entry: Entry, settings: PrivacySettings) -> None:
        """Count steps before they are taken; durable on return.

        Raises:
            BudgetError: they would exceed ``target_epsilon``, with the figures.
        """
        after = [*self.history, Steps(entry.sigma, entry.rate, entry.steps)]
        if settings.target_epsilon:
            needed = epsilon(after, settings.delta, settings.accountant)
            if needed > settings.target_epsilon:
                spent = epsilon(self.history, settings.delta, settings.accountant)
                raise BudgetError(
                    f"target_epsilon = {settings.target_epsilon:g}: epsilon {spent:.3g} at delta "
                    f"{settings.delta:g} is spent, this round would make it {needed:.3g}; raise "
                    "it, or stop here"
                )
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(json.dumps(msgspec.to_builtins(entry)).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            folder = os.open(self.path.parent, os.O_RDONLY)  # the file's name must last as well
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self.entries.append(entry)


def steps_of(images: int, batch_size: int, epochs: int) -> tuple[float, int]:
    """Sampling probability and steps of one round over so many images."""
    rate = min(1.0, batch_size / images)
    return rate, max(1, round(epochs / rate))
