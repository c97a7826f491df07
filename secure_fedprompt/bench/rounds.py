"""A round from end to end: seconds of learning, protecting, wire and waiting, by processes.

Server and four clients are the real programs on loopback, with the demo's data and settings. What
each second went to is read from the audit logs of both ends, which share this machine's clock, and
from the clients' own logs, which say how long local work took:

    learning     local work, in the client's own words: training, its own test images
    protecting   from a frame that arrives at a client to its answer, less local work; and at the
                 server from the last frame that it waited for to its own
    wire         from one end's log to the other's
    waiting      at the server, for the frames of other clients

They add up to the client's round, from the plan that leaves the server to the end that arrives, to
the millisecond of the logs. "protecting" includes what any round needs, as the row without
protection shows. Five processes share the cores: a machine for each has less to wait for.
"""

from __future__ import annotations

import bisect
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from secure_fedprompt.audit.log import Entry, Log
from secure_fedprompt.bench.chapter import Case, Chapter, Column, Samples
from secure_fedprompt.commands import demo, demo_files

CLIENTS = 4
PARTS = ("learning", "protecting", "wire", "waiting")
END = "RoundEnd"
BESIDE = ("Alive", "LogHead")  # frames that no round waits for


def measure(case: Case, repeat: int) -> Samples:
    """A run of two rounds more: the first one grants keys, the last one trains nothing. A sample is
    the mean of all clients in a round."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        commands = demo_files.write_files(
            folder, case["method"], CLIENTS, repeat + 1, case["protection"], 0,
            for_server={"audit": "headers", "metrics": "final", "selection": case["selection"],
                        "selection_scope": "client"},
            for_clients={"audit": "headers", "log": "client.jsonl"},
        )  # fmt: skip
        with demo.processes(commands, folder, CLIENTS, piped=False) as started:
            demo.check_ends(started, folder)
        server = by_client(folder / "server" / "run")
        rounds = [
            [split(by_client(own / "state")["server"], server[own.name], server, number, seconds)
             for own, seconds in local_seconds(folder, number)]
            for number in range(2, repeat + 2)
        ]  # fmt: skip
    means = [{k: statistics.fmean(one[k] for one in same) for k in same[0]} for same in rounds]
    shares = [100 * mean["protecting_s"] / mean["seconds"] for mean in means]
    return {**{k: [mean[k] for mean in means] for k in means[0]}, "protecting_percent": shares}


def local_seconds(folder: Path, learning_round: int) -> list[tuple[Path, float]]:
    """Each client's folder, and what it says of its training."""
    found = []
    for log in sorted(folder.glob("*/client.jsonl")):
        lines = map(json.loads, log.read_text().splitlines())
        sent = [x for x in lines if x["event"] == "sent" and "local_seconds" in x]
        (said,) = [x["local_seconds"] for x in sent if x["learning_round"] == learning_round]
        found.append((log.parent, said))
    return found


def by_client(folder: Path) -> dict[str, list[Entry]]:
    """Frames in the order of the log, by peer."""
    found: dict[str, list[Entry]] = {}
    for entry in Log.read(folder).entries:
        if entry.kind not in BESIDE:
            found.setdefault(entry.peer, []).append(entry)
    return found


def round_of(entries: Sequence[Entry], number: int) -> list[Entry]:
    """The frames of a round, up to its end."""
    own = [entry for entry in entries if entry.round == number]
    return own[: next(i for i, entry in enumerate(own) if entry.kind == END) + 1]


def split(
    own: Sequence[Entry], theirs: Sequence[Entry], server: Mapping[str, Sequence[Entry]],
    number: int, learned: float,
) -> dict[str, float]:  # fmt: skip
    """Where the seconds of a client's round went.

    Args:
        own: the client's frames. theirs: the server's with it. server: with everybody.
        learned: seconds of local work among them.
    """
    own, at_server = round_of(own, number), {e.digest: e.at for e in theirs}
    arrived = sorted(e.at for entries in server.values() for e in entries
                     if e.round == number and e.way == "in")  # fmt: skip
    begun = now = at_server[own[0].digest]
    parts = dict.fromkeys(PARTS, 0.0)

    def up_to(part: str, moment: float) -> None:
        nonlocal now
        parts[part] += max(0.0, moment - now)
        now = max(now, moment)

    for frame in own:
        there = at_server[frame.digest]
        if frame.way == "out":
            up_to("protecting", frame.at)
            up_to("wire", there)
        else:
            waited_for = bisect.bisect_right(arrived, there)
            up_to("waiting", arrived[waited_for - 1] if waited_for else there)
            up_to("protecting", there)
            up_to("wire", frame.at)
    parts["learning"] = learned
    parts["protecting"] -= learned
    return {"seconds": now - begun, **{f"{k}_s": v for k, v in parts.items()}}


def cases(quick: bool) -> list[Case]:
    made = [("promptfl", "none", "client"), ("promptfl", "masks", "client")]
    if not quick:
        made += [("promptfl", "bfv", "client"), ("promptfl", "ckks", "client")]
        made += [("fedotp", "masks", "client"), ("fedmgp", "masks", "client"),
                 ("fedmgp", "masks", "secure")]  # fmt: skip
    return [dict(zip(("method", "protection", "selection"), row, strict=True)) for row in made]


CHAPTER = Chapter(
    name="rounds",
    title="A round from end to end",
    about=__doc__,
    keys={"method": "method", "protection": "protection", "selection": "selection"},
    columns=(
        Column("seconds", "seconds"), Column("learning_s", "learning"),
        Column("protecting_s", "protecting", 2), Column("wire_s", "wire", 2),
        Column("waiting_s", "waiting", 2), Column("protecting_percent", "protecting, %", 2),
    ),
    cases=cases,
    measure=measure,
    repeat=8,
)  # fmt: skip
