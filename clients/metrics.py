"""Figures of federated prompt papers.

Local: a client's own test images, told apart among all base classes. Base: all clients' base test
images. Novel: classes that nobody trained on. HM and CM join them (FedMGP, NeurIPS 2025).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


def accuracy(labels: Labels, guesses: Labels) -> float:
    return float((labels == guesses).mean())


def macro_f1(labels: Labels, guesses: Labels) -> float:
    """Mean F1 over the labels that are present."""
    scores = []
    for label in np.unique(labels):
        hit = np.count_nonzero((labels == label) & (guesses == label))
        total = np.count_nonzero(labels == label) + np.count_nonzero(guesses == label)
        scores.append(2 * hit / total)
    return float(np.mean(scores))


def harmonic_mean(base: float, novel: float) -> float:
    """HM = 2 Base Novel / (Base + Novel); 0 if both are."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def combined_mean(local: float, base: float, novel: float) -> float:
    """CM = (Local + HM) / 2."""
    return (local + harmonic_mean(base, novel)) / 2
