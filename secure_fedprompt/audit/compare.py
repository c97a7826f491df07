"""Holding logs against themselves and against each other: chains, signed heads, frames."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from secure_fedprompt.audit.findings import Finding, failed, noted, warned
from secure_fedprompt.audit.log import Entry, Log
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import SignatureError
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import verify


def check_log(log: Log) -> Iterator[Finding]:
    """Whether a log is consistent in itself: chain, kept frames, and the heads that it signed."""
    log.check_frames()
    for fault in log.faults:
        check = "frames" if fault.where.startswith("frames") else "chain"
        yield failed(check, f"{log.name}: {fault.where}", fault.what)
    if log.torn:
        yield failed(
            "chain", f"{log.name}: last line", "the log ends within a record: cut, or the process "
            "was killed while it wrote",
        )  # fmt: skip
    if not log.closed:
        yield failed(
            "chain", f"{log.name}: record {max(log.chains, default=0)}", "the log ends without a "
            "closing record: cut, or the process was killed or still runs",
        )  # fmt: skip
    if log.first:
        yield noted("chain", log.name, f"records before {log.first} were dropped to save disk")
    for entry, head in _heads(log):
        if entry.way == "out":
            yield from _check_head(log, log, log.name, entry, head)


def check_pair(log: Log, other: Log) -> Iterator[Finding]:
    """Whether two logs of one run tell the same story."""
    for one, two in ((log, other), (other, log)):
        known = one.roster.get(two.name)
        if known is None or known != two.roster.get(two.name):
            yield failed(
                "cross-check", f"{two.name} in the log of {one.name}",
                "the two rosters give this name different keys, or one of them none",
            )  # fmt: skip
            return
        found = 0
        for entry, head in _heads(one):
            if entry.way == "in" and entry.peer == two.name:
                found += 1
                yield from _check_head(two, one, two.name, entry, head)
        if not found:
            text = f"no signed head of {two.name} is in the log of {one.name}: nothing ties it down"
            yield warned("heads", one.name, text)
        yield from _cross_check(one, two)


def _heads(log: Log) -> Iterator[tuple[Entry, m.LogHead]]:
    for entry, message in log.messages():
        if isinstance(message, m.LogHead):
            yield entry, message


def _check_head(
    of: Log, held_by: Log, name: str, entry: Entry, head: m.LogHead
) -> Iterator[Finding]:
    """A signed head, as ``held_by`` has it, against the log that it is the head of."""
    where = f"{held_by.name}: record {entry.n}"
    _, identity = held_by.roster.get(name, ("", ""))
    try:
        key = bytes.fromhex(identity)
        verify(key, Purpose.LOG_HEAD, head.body(name), head.signature, name)
    except (SignatureError, ValueError):
        yield failed("heads", where, f"the head of {name}'s log bears no valid signature of {name}")
        return
    if head.records < of.first:
        return  # of records that were dropped
    if head.records not in of.chains:
        last = max(of.chains, default=0)
        text = f"{name} signed a log of {head.records} records, this one has {last}: it was cut"
        yield failed("heads", where, text)
    elif of.chains[head.records] != head.chain.hex():
        text = f"{name} signed another log: records before {head.records} were rewritten since"
        yield failed("heads", where, text)


def _cross_check(sender: Log, receiver: Log) -> Iterator[Finding]:
    """Frames from one end to the other: nothing may arrive that was not sent, nor out of order."""
    runs = set(sender.runs) & set(receiver.runs)
    sent = [e for e in sender.entries if (e.way, e.peer) == ("out", receiver.name)]
    got = [e for e in receiver.entries if (e.way, e.peer) == ("in", sender.name)]
    if sender.first or receiver.first:  # of a dropped part the other end may still know
        known = {e.digest for e in sent}
        got = got[next((i for i, e in enumerate(got) if e.digest in known), len(got)) :]
    for digest, extra in (Counter(e.digest for e in got) - Counter(e.digest for e in sent)).items():
        entry = next(e for e in got if e.digest == digest)
        text = f"{entry.kind} from {sender.name}, {extra} time(s) more than {sender.name} says"
        yield failed("cross-check", f"{receiver.name}: record {entry.n}", text)
    lost = _missing([e for e in sent if e.run in runs], [e for e in got if e.run in runs])
    if lost is None:
        where = f"{sender.name} to {receiver.name}"
        yield failed("cross-check", where, "frames of a run arrived in another order than sent")
        return
    middle, tail = lost
    for entries, what in ((middle, "never arrived"), (tail, "at the end never arrived")):
        if not entries:
            continue
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(e.kind for e in entries).items())
        text = f"{kinds} to {receiver.name} {what}"
        client = sender if sender.role != "server" else receiver
        hellos = sum(e.kind == "Hello" and e.way == "out" for e in client.entries)
        where = f"{sender.name}: record {entries[0].n}"
        if entries is middle and hellos < 2 and client.opened < 2:
            yield failed("cross-check", where, text + ", and the connection was never lost")
        else:
            yield warned("cross-check", where, text + ": a connection was lost, or ended")


def _missing(sent: list[Entry], got: list[Entry]) -> tuple[list[Entry], list[Entry]] | None:
    """Sent frames that did not arrive, before and after the last that did; None if unordered."""
    places = defaultdict[str, list[int]](list)
    for i, entry in enumerate(sent):
        places[entry.digest].append(i)
    at, lost = 0, list[Entry]()
    for entry in got:
        later = [i for i in places.get(entry.digest, ()) if i >= at]
        if not later:
            if entry.digest in places:
                return None
            continue  # said above
        lost += sent[at : later[0]]
        at = later[0] + 1
    return lost, sent[at:]
