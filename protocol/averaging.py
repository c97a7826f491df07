"""From the sum of a round to the next global prompt and the aggregate metrics.

Under masks the server does this, under homomorphic encryption every client does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from secure_fedprompt.protocol import layout as lay

Prompt = NDArray[np.float32]
SAME_START = 1e-5  # initial prompts of two machines may differ by this much


def prompt_bytes(prompt: Prompt) -> bytes:
    """As on the wire: float32 little-endian."""
    return prompt.astype("<f4").tobytes()


def averaged(prompt: Prompt, layout: lay.Layout, total: Mapping[str, lay.Vector]) -> Prompt:
    """FedAvg: global + sum(n_k * delta_k) / sum(n_k). McMahan et al. 2017, Algorithm 1.

    Where clients fill only some slots of a tensor, each slot is divided by the number of clients
    that filled it, and keeps its value if nobody did.

    Saturated to finite float32: a malicious ring vector must not leave a file that none can use.
    """
    moved = np.empty(len(prompt))
    for field, place in lay.slices(field for field in layout if field.update):
        divisor = np.asarray(total.get(lay.FILLED + field.name, total[lay.WEIGHT])).reshape(-1, 1)
        rows = total[field.name].reshape(len(divisor), -1)
        np.divide(rows, np.maximum(divisor, 1), out=moved[place].reshape(rows.shape))
    moved += prompt
    limit = float(np.finfo(np.float32).max)
    return np.clip(moved, -limit, limit, out=moved).astype(np.float32)


def metrics_of(total: Mapping[str, lay.Vector]) -> dict[str, float]:
    """The aggregate metrics of a round; accuracy and loss are the incoming prompt's."""
    metrics = {
        "weight": float(total[lay.WEIGHT]),
        "contributors": float(total[lay.CONTRIBUTORS]),
    }
    if lay.SEEN in total and (seen := float(total[lay.SEEN])) > 0:
        metrics |= {
            "accuracy": float(total[lay.CORRECT]) / seen,
            "loss": float(total[lay.LOSS]) / seen,
            "seen": seen,
            "clipped": float(total.get(lay.CLIPPED, 0.0)),
        }
        if zero := float(total.get(lay.ZERO_SHOT, 0.0)):
            metrics["zero_shot"] = zero / seen
    return metrics
