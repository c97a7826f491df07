"""Auditing epsilon from below: an audit that fails when there is less noise than claimed.

    python benchmarks/privacy/epsilon_audit.py --json epsilon_audit.json

Canaries in gradient space run through the trainer, and through the noise, of real clients
(``dirac.py``), and an adversary tells "with" from "without" by likelihood ratios. With 95%
confidence its error rates refute all noise multipliers above some value (``tradeoff.py``); the
epsilon of that one is what the audit finds. It lies below what the accountant says if the code is
right, and close to it if the audit is good. The same audit of code that is wrong, with a tenth less
noise, or a clip a tenth too long, must say so.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import plots
from dirac import LONG, observe_clients, observe_images, scores
from federations import parser, save
from tradeoff import Claim, least_refuted, measured

from secure_fedprompt.clients.accounting import Steps, epsilon, noise_for
from secure_fedprompt.clients.dp_sgd import Draws, SecureOptimizer
from secure_fedprompt.protocol import client_noise
from secure_fedprompt.protocol.client_noise import Noise

BATCHES, EPOCHS = 5, 4  # a fifth of the images in a step, twenty steps
QUORUM, COLLUDERS = 67, 33  # as of a hundred clients


@contextlib.contextmanager
def faulty(fault: str) -> Iterator[None]:
    """Code with less protection than it claims."""
    draw, clip = Draws.normal, SecureOptimizer.clip_and_accumulate
    noise, rounded = client_noise.discrete_gaussian, client_noise.conditionally_rounded

    def longer(self: Any) -> None:
        self.max_grad_norm *= 1.1
        clip(self)
        self.max_grad_norm /= 1.1

    faults: dict[str, list[Any]] = {
        "": [],
        "noise x 0.9": [
            mock.patch.object(Draws, "normal", lambda self, shape: 0.9 * draw(self, shape)),
            mock.patch.object(
                client_noise, "discrete_gaussian",
                lambda key, variance, count: noise(key, int(0.81 * variance), count),
            ),
        ],
        "clip x 1.1": [
            mock.patch.object(SecureOptimizer, "clip_and_accumulate", longer),
            mock.patch.object(
                client_noise, "conditionally_rounded",
                lambda vector, frac, clip, entropy: rounded(vector, frac, 1.1 * clip, entropy),
            ),
        ],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for patch in faults[fault]:
            stack.enter_context(patch)
        yield


def audit_images(claim: Claim, images: int, runs: int, confidence: float) -> tuple[float, bool]:
    """Smallest noise multiplier that is refuted, and whether the claimed one is."""
    batch = round(claim.rate * images)
    seen = observe_images(images, batch, round(claim.steps * claim.rate), claim.sigma, 0.5, runs)
    rates = measured(*scores(claim, seen), claim, confidence)
    return least_refuted(rates, claim), rates.refute(claim)


def audit_clients(
    claim: Claim, quorum: int, colluders: int, runs: int, confidence: float
) -> tuple[float, bool]:
    """The same for client noise; ``claim.steps`` are the rounds of a run."""
    noise = Noise(0.5, claim.sigma, quorum - colluders)
    seen = observe_clients(quorum, colluders, noise, runs, claim.steps)
    rates = measured(*scores(claim, seen), claim, confidence)
    return least_refuted(rates, claim), rates.refute(claim)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--epsilon", type=float, default=8.0)
    made.add_argument("--delta", type=float, default=1e-3)
    made.add_argument("--observations", type=int, nargs="*", default=[1000, 10_000, 100_000])
    made.add_argument("--rounds", type=int, default=4, help="of whole clients")
    made.add_argument("--confidence", type=float, default=0.95)
    args = made.parse_args()
    rows: list[dict[str, Any]] = []
    rate, steps = 1 / BATCHES, BATCHES * EPOCHS
    sample = Claim(noise_for(args.epsilon, args.delta, rate, steps, [], "prv"), rate, steps)
    whole = Claim(
        noise_for(args.epsilon, args.delta, 1.0, args.rounds, [], "prv"), 1.0, args.rounds
    )
    for kind, claim in (("one image", sample), ("one client", whole)):
        upper = _epsilon(claim, claim.sigma, args.delta)
        for fault in ("", "noise x 0.9", "clip x 1.1"):
            for count in args.observations:
                begin = time.monotonic()
                with faulty(fault):
                    if kind == "one image":
                        images = min(count, 500)
                        found, flagged = audit_images(
                            claim, images, count // images, args.confidence
                        )
                    else:
                        found, flagged = audit_clients(
                            claim, QUORUM, COLLUDERS, -(-count // (QUORUM - COLLUDERS)),
                            args.confidence,
                        )  # fmt: skip
                low = _epsilon(claim, found, args.delta)
                rows.append({"kind": kind, "code": fault or "as it is", "observations": count,
                             "noise_multiplier": claim.sigma, "epsilon": upper, "found": low,
                             "flagged": flagged, "seconds": time.monotonic() - begin})  # fmt: skip
                print(f"{kind}, {rows[-1]['code']:11}  {count:6} observations  accountant "
                      f"{upper:.2f}  audit >= {low:.2f}  {'FLAGGED' if flagged else ''}  "
                      f"{rows[-1]['seconds']:.0f} s", flush=True)  # fmt: skip
                save(args, rows, longest_gradient=LONG)
    shown = [{"row": f"{r['kind']}, {r['code']}, {r['observations']}", "epsilon": r["epsilon"],
              "found": r["found"]} for r in rows]  # fmt: skip
    plots.bars(args.json, shown, "row", {"epsilon": "accountant: at most",
                                         "found": "audit: at least"})  # fmt: skip
    return 0


def _epsilon(claim: Claim, sigma: float, delta: float) -> float:
    return epsilon([Steps(sigma, claim.rate, claim.steps)], delta, "prv") if sigma < 1e6 else 0.0


if __name__ == "__main__":
    sys.exit(main())
