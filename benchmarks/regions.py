"""Three regions of a thousand clients each: a masked sum of masked sums. See docs/regions.md.

    python benchmarks/regions.py
    python benchmarks/regions.py --regions 4 --clients 250 --json out.json

Every region is a round on a k-regular graph with a server of its own, as in ``bench.scale``. The
regions' servers are then the clients of one more round, on the complete graph: what each uploads
is the ring vector that it opened, under masks that only the sum of all regions takes off. The
total is held against the inputs, every client's. Seconds are of the wall; regions run one after
another here, and side by side where they have machines.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from secure_fedprompt.bench import machine, masking, metered, scale
from secure_fedprompt.clients.rounds.base import Awaiting
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.clients.sum_key import SumKey
from secure_fedprompt.memory import Network
from secure_fedprompt.protocol import fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.layout import Vector, total_size
from secure_fedprompt.protocol.ring import Integers
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.rounds.base import Deadlines, Stage
from secure_fedprompt.server.rounds.masks import MaskedRound
from secure_fedprompt.server.serve import Outbox, post


def region(count: int, everybody: int, dim: int, workers: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A round of one region; the words of its sum, and what it took."""
    keys, key = metered.federation(count), SumKey.make(os.urandom)
    plan = masking.make_plan(count, dim, 32, "regular", keys[1], key, sized_for=everybody)
    gone = frozenset(list(keys[0])[count - count // 10 :])
    crowd = scale.Workers(keys, key.to_bytes(), dim, gone, workers)
    server = MaskedRound(plan, b"", keys[1], Deadlines(1, 1))
    begin = time.perf_counter()
    crowd.run(server)
    seconds = time.perf_counter() - begin
    assert server.stage is Stage.DONE, server.reason
    scale.checked(plan, crowd.reports(), count - len(gone))
    assert server.opened is not None
    words = np.zeros(total_size(plan.layout), np.uint32)
    fixedpoint.add_wire(plan.layout, server.opened.vector, words)
    return words, {"seconds": seconds, "survivors": count - len(gone), "degree": plan.degree}


class Joined(MaskedRound):
    """A round of regions: its sum counts their clients as contributors, not them."""

    def _finish(self, total: Vector, integers: Integers | None) -> Outbox:
        self.integers, self.stage = integers, Stage.DONE
        return []


def joined(parts: list[np.ndarray], everybody: int, dim: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The regions' sums, summed under masks; the integers, and what it took."""
    keys, key = metered.federation(len(parts)), SumKey.make(os.urandom)
    plan = masking.make_plan(len(parts), dim, 32, "complete", keys[1], key, sized_for=everybody)
    parties = metered.parties_of(keys)
    for party in parties.values():
        party.keyring.sums = key
    server = Joined(plan, b"", keys[1], Deadlines(1, 1))
    network, sizes = Network(wait=lambda clock: server.deadline), {"up": 0}
    states: dict[str, Any] = {}

    def member(name: str, words: np.ndarray) -> Any:
        def on(message: m.Message) -> list[m.Message]:
            if isinstance(message, m.Plan):
                states[name], replies = start(parties[name], message.plan)
            elif isinstance(message, m.OpenedSum | m.RoundEnd):
                return []
            else:
                states[name], replies = states[name].on(message)
            if isinstance(state := states[name], Awaiting):
                states[name], more = state.send(words.astype("<u4").tobytes())
                replies = replies + more
            sizes["up"] += sum(len(Frame.of(reply).data) for reply in replies)
            return replies

        return on

    for name, words in zip(parties, parts, strict=True):
        network.join(name, member(name, words))
    begin = time.perf_counter()
    post(network.hub, server, server.start(0.0), lambda: 0.0)
    network.run(server)
    seconds = time.perf_counter() - begin
    assert server.stage is Stage.DONE, server.reason
    assert server.integers is not None
    return server.integers, {"seconds": seconds, "bytes_up": sizes["up"] / len(parts)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--regions", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1000, help="in each region")
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    everybody, parts, rows = args.regions * args.clients, [], []
    for number in range(args.regions):
        words, row = region(args.clients, everybody, args.dim, args.workers)
        parts.append(words)
        rows.append(row)
        print(f"region {number + 1}: {row['survivors']:,} of {args.clients:,} clients in, "
              f"k = {row['degree']}, {row['seconds']:.1f} s", flush=True)  # fmt: skip
    integers, top = joined(parts, everybody, args.dim)
    survivors = sum(row["survivors"] for row in rows)
    layout = masking.layout_of(everybody, args.dim, 32)
    step = 2.0 ** -layout[0].frac
    found = integers[: args.dim] * step
    wrong = float(np.abs(found - survivors * masking.update_of(args.dim)).max())
    assert wrong <= survivors * step, wrong
    plain = np.zeros_like(parts[0])
    for words in parts:
        plain += words
    assert (fixedpoint.to_integers(layout, plain) == integers).all()
    print(f"all regions: {survivors:,} clients in one sum, {1e3 * top['seconds']:.0f} ms, "
          f"{top['bytes_up']:,.0f} bytes up from each region")  # fmt: skip
    if args.json:
        content = {"machine": machine.describe(), "clients": everybody, "regions": rows, "top": top}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
