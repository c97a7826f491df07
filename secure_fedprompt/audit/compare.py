"""Holding logs against themselves and against each other: chains, signed heads, frames."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from secure_fedprompt.audit.findings import Finding, failed, noted, unfinished, warned
from secure_fedprompt.audit.log import Entry, Log
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import SignatureError
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import verify


def check_log(log: Log, run: str) -> Iterator[Finding]:
    """Whether a log is consistent in itself: chain, kept frames, and the heads that it signed."""
    log.check_frames()
    for fault in log.faults:
        check = "frames" if fault.where.startswith("frames") else "chain"
        yield failed(check, f"{log.name}: {fault.where}", fault.what)
    if log.torn:
        yield unfinished(
            "chain", f"{log.name}: last line", "the log ends within a record: cut, or the process "
            "writes it now, or was killed meanwhile",
        )  # fmt: skip
    if not log.closed:
        yield unfinished(
            "chain", f"{log.name}: record {max(log.chains, default=0)}", "the log ends without a "
            "closing record: cut, or the process was killed or still runs",
        )  # fmt: skip
    if log.cut:
        text = f"{log.cut} bytes of unfinished lines were removed when a process started again"
        yield warned("chain", log.name, text)
    if log.first:
        yield noted("chain", log.name, f"records before {log.first} were dropped to save disk")
        if not any(entry.run == run and entry.kind == "Welcome" for entry in log.entries):
            text = "the beginning of this run was dropped: raise audit_mb to keep a run whole"
            yield failed("chain", f"{log.name}: record {log.first}", text)
    for entry, head in _heads(log, run):
        if entry.way == "out":
            yield from _check_head(log, log, log.name, entry, head)


def check_pair(server: Log, other: Log, run: str) -> Iterator[Finding]:
    """Whether the logs of a server and of another end tell the same story of a run."""
    for one, two in ((server, other), (other, server)):
        known = one.members.get(run, {}).get(two.name)
        if known is None or known != two.members.get(run, {}).get(two.name):
            yield failed(
                "cross-check", f"{two.name} in the log of {one.name}",
                "the two rosters give this name different keys, or one of them none",
            )  # fmt: skip
            return
    for one, two in ((server, other), (other, server)):
        heads = [(e, h) for e, h in _heads(one, run) if (e.way, e.peer) == ("in", two.name)]
        for entry, head in heads:
            yield from _check_head(two, one, two.name, entry, head)
        if not heads:
            text = f"no signed head of {two.name} is in the log of {one.name}: nothing ties it down"
            yield failed("heads", one.name, text)
    yield from _cross_check(server, other, run)
    yield from _cross_check(other, server, run)


def _heads(log: Log, run: str) -> Iterator[tuple[Entry, m.LogHead]]:
    for entry, message in log.messages(run, "LogHead"):
        if isinstance(message, m.LogHead):
            yield entry, message


def _check_head(
    of: Log, held_by: Log, name: str, entry: Entry, head: m.LogHead
) -> Iterator[Finding]:
    """A signed head, as ``held_by`` has it, against the log that it is the head of."""
    where = f"{held_by.name}: record {entry.n}"
    try:
        key = bytes.fromhex(held_by.identity(entry.run, name, entry.n))
        verify(key, Purpose.LOG_HEAD, head.body(name), head.signature, name)
    except (SignatureError, ValueError):
        yield failed("heads", where, f"the head of {name}'s log bears no valid signature of {name}")
        return
    if head.records < of.first:
        text = f"{name} signed records up to {head.records}, this log begins at {of.first}"
        yield failed("heads", where, text)
    elif head.records not in of.chains:
        last = max(of.chains, default=0)
        text = f"{name} signed a log of {head.records} records, this one has {last}: it was cut"
        yield failed("heads", where, text)
    elif of.chains[head.records] != head.chain.hex():
        text = f"{name} signed another log: records before {head.records} were rewritten since"
        yield failed("heads", where, text)


def _cross_check(sender: Log, receiver: Log, run: str) -> Iterator[Finding]:
    """Frames from one end to the other: nothing may arrive that was not sent, nor out of order,
    and what did not arrive must have been in flight when a connection ended."""
    sent, own = _passed(sender, run, "out", receiver.name)
    came, used = _passed(receiver, run, "in", sender.name)
    # Whoever was killed may have greeted, or been greeted, on a connection that carried no more.
    got = [(c, e) for c, e in came if c in used or e.run]
    known = Counter(_content(e) for _, e in sent)
    for content, extra in (Counter(_content(e) for _, e in got) - known).items():
        entry = next(e for _, e in got if _content(e) == content)
        text = f"{entry.kind} from {sender.name}, {extra} time(s) more than {sender.name} says"
        yield failed("cross-check", f"{receiver.name}: record {entry.n}", text)
    rows = _aligned(sent, got)
    if rows is None:
        where = f"{sender.name} to {receiver.name}"
        yield failed("cross-check", where, "frames of a run arrived in another order than sent")
        return
    heard, _ = _passed(sender, run, "in", receiver.name)
    # A Rejoin asks for the greeting that a new connection lacks: it is not of the one before.
    last = {c: i for i, (c, e) in enumerate(sent) if i in rows and e.kind != "Rejoin"}
    lost = [(i, c, e) for i, (c, e) in enumerate(sent) if i not in rows and (c in own or e.run)]
    hidden = [e for i, c, e in lost if i < last.get(c, -1)]
    answered = [
        e for i, c, e in lost
        if i >= last.get(c, -1) and any(_went_on(e, f) for d, f in heard if d == c)
    ]  # fmt: skip
    excused = [e for _, _, e in lost if e not in hidden and e not in answered]
    for entries, why in (
        (hidden, "never arrived, though later frames of the same connection did"),
        (answered, f"never arrived, though {receiver.name} went on to a later round"),
    ):
        if entries:
            where = f"{sender.name}: record {entries[0].n}"
            yield failed("cross-check", where, f"{_kinds(entries)} to {receiver.name} {why}")
    if excused:
        where = f"{sender.name}: record {excused[0].n}"
        text = f"{_kinds(excused)} to {receiver.name} never arrived: a connection had ended"
        yield warned("cross-check", where, text)


def _went_on(lost: Entry, heard: Entry) -> bool:
    """Whether a frame that the sender got later, on the same connection, is of a later round. A
    signed head, for which nobody waits, may have crossed those of the next one, or the last."""
    if lost.kind == "LogHead":
        return heard.n > lost.n and heard.round > lost.round + 1
    return heard.n > lost.n and (heard.round > lost.round or heard.kind == "Finish")


def _kinds(entries: list[Entry]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in Counter(e.kind for e in entries).items())


def _content(entry: Entry) -> tuple[str, str, int, int]:
    """What both ends must say of a frame."""
    return entry.digest, entry.kind, entry.round, entry.size


# What says nothing, and what passes between the server and 'check', which keeps no log.
Numbered = list[tuple[int, Entry]]  # frames with their connections
MOST_STEPS = 2_000_000  # looking for a story: a second or two
UNLOGGED = ("Alive", "Probe", "Probed")


def _passed(log: Log, run: str, way: str, peer: str) -> tuple[Numbered, set[int]]:
    """Frames of a run to or from a peer, and those of no run, with the number of their connection;
    and the connections that carried the run.

    Every connection begins with the client's Hello.
    """
    found, connection = [], 0
    hello = "in" if log.role == "server" else "out"
    used: set[int] = set()  # connections of the run: what they carried beside it counts as well
    for entry in log.entries:
        if entry.peer != peer:
            continue
        connection += entry.kind == "Hello" and entry.way == hello
        if entry.run == run:
            used.add(connection)
        if entry.way == way and entry.run in ("", run) and entry.kind not in UNLOGGED:
            found.append((connection, entry))
    return found, used


def _aligned(sent: Numbered, got: Numbered) -> set[int] | None:
    """Places of the sent frames that arrived, or None if they came in another order.

    Frames may be alike, as greetings are: if there is a story in which each connection lost nothing
    but its end, it is taken.
    """
    if (rows := _prefixes(sent, got)) is not None:
        return rows
    places = defaultdict[tuple[str, str, int, int], list[int]](list)
    for i, (_, entry) in enumerate(sent):
        places[_content(entry)].append(i)
    at, rows = 0, set[int]()
    for _, entry in got:
        later = [i for i in places.get(_content(entry), ()) if i >= at]
        if later:
            rows.add(later[0])
            at = later[0] + 1
        elif _content(entry) in places:
            return None
    return rows


def _prefixes(sent: Numbered, got: Numbered) -> set[int] | None:
    """Places of the sent frames that arrived if that is a beginning of each connection, one after
    the other; None if there is no such story. As much as possible of a connection is tried first.
    """
    parts: list[list[int]] = []
    for i, (connection, entry) in enumerate(sent):
        if not i or connection != sent[i - 1][0] or entry.kind == "Rejoin":
            parts.append([])
        parts[-1].append(i)
    said, heard = ([_content(e) for _, e in frames] for frames in (sent, got))
    taken, starts, dead, at = list[int](), list[int](), set[tuple[int, int]](), 0
    for _ in range(MOST_STEPS):
        number = len(taken)
        if number == len(parts) and at == len(heard):
            return {i for part, count in zip(parts, taken, strict=True) for i in part[:count]}
        if number < len(parts) and (number, at) not in dead:
            part, same = parts[number], 0
            most = min(len(part), len(heard) - at)
            while same < most and said[part[same]] == heard[at + same]:
                same += 1
            starts.append(at)
            taken.append(same)
            at += same
            continue
        while taken and not taken[-1]:
            taken.pop()
            at = starts.pop()
            dead.add((len(taken), at))
        if not taken:
            return None
        taken[-1] -= 1
        at -= 1
    return None
