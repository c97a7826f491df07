"""What the server's audit log costs: CPU and disk of a masked round, by mode.

The frames of whole rounds (one process, no sockets) are recorded as the server's socket records
them, signed heads included. The shares are of the server's CPU in the protocol alone, and of a
round in which clients train for ten seconds.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from secure_fedprompt.bench import masking, metered
from secure_fedprompt.bench.chapter import Case, Chapter, Column, Samples
from secure_fedprompt.host.recorder import Recorder
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.keys import Identity, Member
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.transport import Frame

ROUND = 10.0  # seconds


def measure(case: Case, repeat: int) -> Samples:
    """Rounds after one that is not counted."""
    keys, own = metered.federation(case["clients"]), Identity.generate()
    member = Member.of(own, "server", "server")
    roster = Roster.of((*keys[1].members, member))
    whole = {**case, "dropped": 0.0, "ring_bits": 32, "graph": "complete"}
    rows = list[dict[str, float]]()
    for _ in range(repeat + 1):
        seen = list[tuple[str, str, bytes]]()
        figures = masking.one_round(whole, keys, lambda *frame: seen.append(frame))  # noqa: B023
        frames = [Frame.read(frame) for _, _, frame in seen]  # done anyway
        with tempfile.TemporaryDirectory() as folder:
            log = Recorder(Path(folder), case["mode"], 1 << 31, own, member, roster)
            begin = time.process_time()
            for (sender, recipient, _), frame in zip(seen, frames, strict=True):
                if isinstance(frame.message, m.RoundEnd):
                    log.sent(recipient, Frame.of(log.head(frame.message)))
                if sender:
                    log.got(sender, frame)
                else:
                    log.sent(recipient, frame)
            spent = time.process_time() - begin
            log.close()
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
        rows.append({
            "log_ms": 1e3 * spent, "us_per_frame": 1e6 * spent / len(seen),
            "percent_of_protocol": 1e5 * spent / figures["server_ms"],
            "percent_of_round": 100 * spent / ROUND, "kb_on_disk": size / 1e3,
        })  # fmt: skip
    return {name: [row[name] for row in rows[1:]] for name in rows[0]}


def cases(quick: bool) -> list[Case]:
    sizes = [(10, 8_192)] if quick else [(10, 8_192), (10, 1_000_000), (100, 8_192)]
    return [{"clients": n, "values": d, "mode": mode} for n, d in sizes
            for mode in ("headers", "full")]  # fmt: skip


CHAPTER = Chapter(
    name="audit-log",
    title="The audit log",
    about=__doc__,
    keys={"clients": "clients", "values": "values", "mode": "mode"},
    columns=(
        Column("log_ms", "log, ms CPU"), Column("us_per_frame", "us a frame", 2),
        Column("percent_of_protocol", "% of the protocol's CPU", 2),
        Column("percent_of_round", "% of a round of 10 s", 2), Column("kb_on_disk", "kB on disk"),
    ),
    cases=cases,
    measure=measure,
)  # fmt: skip
