"""What the server's audit log costs: CPU and disk of a masked round, by mode.

    python benchmarks/bench_audit.py --json audit.json

The frames of whole rounds (one process, no sockets) are recorded as the server's socket records
them, signed heads included. The share is of the server's CPU in the protocol alone, and of a round
in which clients train for ten seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import bench_masking
import machine
import metered
import numpy as np

from secure_fedprompt.host.recorder import Recorder
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.keys import Identity, Member
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.rounds.base import Deadlines
from secure_fedprompt.server.rounds.masks import MaskedRound

ROUND = 10.0  # seconds


def measure(n: int, dim: int, mode: str, repeat: int) -> dict[str, object]:
    """Medians over ``repeat`` rounds after one that is not counted."""
    keys = metered.federation(n)
    update = np.random.default_rng(0).normal(0, 0.05, dim)
    values = {"ctx": update, **{k: np.float64(64) for k in ("seen", "correct", "loss")}}
    own = Identity.generate()
    roster = Roster.of((*keys[1].members, Member.of(own, "server", "server")))
    log_s, server_s, size, frames = list[float](), list[float](), 0, 0
    for number in range(repeat + 1):
        plan = bench_masking.make_plan(n, dim, 32, "complete", keys[1], number + 1)
        server = MaskedRound(plan, b"", keys[1], Deadlines(1, 1))
        seen: list[tuple[str, str, bytes]] = []
        meter = metered.run(
            server, metered.parties_of(keys), values, 64.0,
            passed=lambda *frame: seen.append(frame),  # noqa: B023
        )  # fmt: skip
        messages = [Frame.read(frame) for _, _, frame in seen]  # done anyway
        with tempfile.TemporaryDirectory() as folder:
            member = roster.by_name["server"]
            log = Recorder(Path(folder), mode, 1 << 31, own, member, roster)
            begin = time.process_time()
            for (sender, recipient, _), frame in zip(seen, messages, strict=True):
                if isinstance(frame.message, m.RoundEnd):
                    log.sent(recipient, Frame.of(log.head(frame.message)))
                log.got(sender, frame) if sender else log.sent(recipient, frame)
            log_s.append(time.process_time() - begin)
            log.close()
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
        server_s.append(meter.total(""))
        frames = len(seen)
    spent, protocol = machine.spread(log_s[1:]), machine.spread(server_s[1:])
    row = {
        "clients": n, "dim": dim, "mode": mode, "frames": frames, "log_s": spent,
        "server_s": protocol, "bytes_on_disk": size,
        "of_protocol_cpu": spent["median"] / protocol["median"],
        "of_a_round": spent["median"] / ROUND, "us_per_frame": 1e6 * spent["median"] / frames,
    }  # fmt: skip
    print(
        f"{n:4} clients {dim:9,} values {mode:8} {frames:5} frames {1e3 * spent['median']:7.1f} ms "
        f"({1e3 * spent['min']:.1f}-{1e3 * spent['max']:.1f}), {row['us_per_frame']:.0f} us a "
        f"frame, {row['of_protocol_cpu']:.0%} of the protocol's CPU, {row['of_a_round']:.2%} of a "
        f"round, {size / 1e6:.2f} MB",
        flush=True,
    )
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = [
        measure(n, dim, mode, args.repeat)
        for n, dim in ((10, 8_192), (100, 8_192), (10, 1_000_000))
        for mode in ("headers", "full")
    ]
    if args.json:
        content = {"machine": machine.describe(), "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
