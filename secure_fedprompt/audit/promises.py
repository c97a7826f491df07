"""Whether a run keeps the promises of its row in "who learns what"."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from secure_fedprompt.audit import uniformity
from secure_fedprompt.audit.fields import TYPES
from secure_fedprompt.audit.findings import Finding, failed, noted, warned
from secure_fedprompt.audit.log import Entry, Log
from secure_fedprompt.audit.sums import check_sums
from secure_fedprompt.audit.terms import check_terms
from secure_fedprompt.host.recorder import MALFORMED
from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import SAME_START
from secure_fedprompt.protocol.errors import SecureFedPromptError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.plan import RoundPlan

UPLOADS = {"masks": "MaskedUpload", "bfv": "CipherUpload", "ckks": "CipherUpload",
           "none": "PlainUpload"}  # fmt: skip
MASKING = {"Advert", "Adverts", "Shares", "Inbox", "SurvivorList", "Consistent", "UnmaskRequest",
           "Reveal", "OpenedSum", "Complaint", "Evidence"}  # fmt: skip
KEYING = {"KeyAsk", "Accusation", "KeyRequest", "KeyGrant", "KeyBox"}
ENCRYPTING = {"CipherSum", "Consistent", "SumSigned", "Opened", "SealedRequest", "SealedPrompt"}
SELECTING = {cls.__name__ for cls in (*m.TO_HELPER, *m.FROM_HELPER, m.KeyShares, m.Outcome)}
COMMON = {"Plan", "RoundEnd", "Withdraw", "LogHead"}
ALLOWED = {
    "masks": COMMON | KEYING | MASKING | {"MaskedUpload"},
    "bfv": COMMON | KEYING | ENCRYPTING | {"CipherUpload"},
    "ckks": COMMON | KEYING | ENCRYPTING | {"CipherUpload"},
    "none": COMMON | {"PlainUpload"},
}
SEAL_HEADER = b"\x5e\xa1\x10"  # magic number, and 16 bytes of header
Decoded = Sequence[tuple[Entry, m.Message]]


def check_promises(log: Log, run: str) -> Iterator[Finding]:
    """All checks of one log for one run; payloads as far as they were kept."""
    entries = [entry for entry in log.entries if entry.run in ("", run)]
    decoded = list(log.messages(run))
    yield from _labels(log, entries)
    yield from _plans(log, run, entries, decoded)
    yield from check_terms(log, run, decoded)
    yield from _initial(log, run, entries, decoded)
    yield from _protection(log, run, entries)
    yield from _masks(log, run, decoded)
    yield from check_sums(log, run, decoded)
    yield from _keys(log, run, decoded)
    yield from _uniform(log, run, decoded)
    yield from _kept(log, run)


def _kept(log: Log, run: str) -> Iterator[Finding]:
    """What was not kept was not looked at; a log that says it is full must be."""
    lacking = [entry for entry in log.entries if entry.run == run and entry.place is None]
    if not lacking:
        return
    kinds = ", ".join(sorted({entry.kind for entry in lacking}))
    if log.modes == {"full"}:
        text = f"{len(lacking)} frames were not kept ({kinds}): nothing is known of their content"
        yield failed("frames", f"{log.name}: record {lacking[0].n}", text)
    else:
        text = f"{len(lacking)} frames are known by their headers only (set audit = 'full')"
        for check in ("frames", "keys", "uniformity"):
            yield warned(check, log.name, text)


def _labels(log: Log, entries: list[Entry]) -> Iterator[Finding]:
    """Types of the catalogue, from members, each with the run and round that it carries."""
    for entry in entries:
        where = f"{log.name}: record {entry.n}"
        if entry.kind == MALFORMED:
            way = "from" if entry.way == "in" else "to"
            text = f"{entry.size} bytes {way} {entry.peer} are no message of the catalogue"
            # Anybody may send anything, or be of another release: it is refused, and no message.
            yield (warned if entry.way == "in" else failed)("catalogue", where, text)
            continue
        elif entry.kind not in TYPES:
            text = f"message type {entry.kind!r} is not in the catalogue"
            yield failed("catalogue", where, text)
        else:
            fields = {field.name for field in dataclasses.fields(TYPES[entry.kind])}
            of_round = "round" in fields or "plan" in fields
            if ("run" in fields or of_round) != bool(entry.run) or (
                entry.kind != "LogHead" and of_round != bool(entry.round)
            ):
                text = f"{entry.kind} of run {entry.run[:8] or 'none'}, round {entry.round}"
                yield failed("catalogue", where, f"{text}: that type says it otherwise")
        role = log.members[entry.run].get(entry.peer, ("", ""))[0]
        if (role == "server") == (log.role == "server") or not role:
            text = f"{entry.peer} is nobody that {log.name} talks to, by its roster"
            yield failed("catalogue", where, text)


def _plans(log: Log, run: str, entries: list[Entry], decoded: Decoded) -> Iterator[Finding]:
    sent: dict[int, set[bytes]] = defaultdict(set)
    for _, message in decoded:
        if isinstance(message, m.Plan | m.HelperPlan):
            sent[message.plan.round].add(message.plan.digest)
    plans = {number: plan for (of, number), plan in log.plans.items() if of == run}
    for number, digests in sent.items():
        if number not in plans or plans[number].digest not in digests:
            text = "the plan on record is not the one that was sent"
            yield failed("plans", f"{log.name}: round {number}", text)
    for number in sorted({n for of, n in log.conflicts if of == run}):
        yield failed("plans", f"{log.name}: round {number}", "two different plans of one round")
    # The end of a round also reaches who lost its plan with a connection.
    used = {e.round for e in entries if e.run == run and e.kind not in ("LogHead", "RoundEnd")}
    for number in sorted(used - {0, *plans}):
        text = "frames of a round whose plan is not on record"
        yield failed("plans", f"{log.name}: round {number}", text)
    for number, plan in plans.items():
        if len(plan.cohort) < 3 or plan.quorum < 2:
            text = (
                f"cohort of {len(plan.cohort)}, quorum {plan.quorum}: a sum is a subtraction away"
            )
            yield failed("plans", f"{log.name}: round {number}", text)
    protections = {plan.protection for plan in plans.values()}
    if len(protections) > 1:
        text = f"the run changed its protection: {', '.join(sorted(protections))}"
        yield failed("plans", log.name, text)
    if unknown := protections - set(ALLOWED):
        yield failed("plans", log.name, f"protections unknown to this audit: {sorted(unknown)}")
    if not protections:
        yield failed("plans", log.name, "no plan of this run is on record")


def _initial(log: Log, run: str, entries: list[Entry], decoded: Decoded) -> Iterator[Finding]:
    """A starting prompt comes before the first plan, which begins from it."""
    first = min((e.n for e in entries if e.kind == "Plan" and e.run == run), default=None)
    plans = [plan for (of, _), plan in sorted(log.plans.items()) if of == run]
    base = next((plan.base_digest for plan in plans if plan.learning_round == 1), None)
    part = {name for plan in plans for name in plan.cohort}
    vectors = {e.n: bytes(x.vector) for e, x in decoded if isinstance(x, m.Initial)}
    asked = [e.n for e in entries if e.kind == "Initial" and (first is None or e.n < first)]
    begun = next((v for v in vectors.values() if digest(Purpose.BASE, v) == base), None)
    for entry in entries:
        if entry.kind != "Initial":
            continue
        where = f"{log.name}: record {entry.n}"
        who = entry.peer if entry.way == "in" else log.name
        vector = vectors.get(entry.n)
        same = vector is not None and begun is not None and _near(vector, begun)
        if first is not None and entry.n > first:
            text = f"a starting prompt of {who} in the middle of the run: it could hold an update"
            late = same or (vector is None and asked)  # it was slow, and another one's was taken
            yield (warned if late else failed)("protection", where, text)
        if vector is not None and base is not None and digest(Purpose.BASE, vector) != base:
            text = f"the run does not begin from the starting prompt of {who}"
            yield (failed if who in part and not same else warned)("protection", where, text)


def _near(one: bytes, other: bytes) -> bool:
    """Whether two starts differ by no more than those of two machines may."""
    if len(one) != len(other) or len(one) % 4:
        return False
    a, b = (np.frombuffer(data, "<f4") for data in (one, other))
    return bool(np.allclose(a, b, rtol=0, atol=SAME_START))


def _protection(log: Log, run: str, entries: list[Entry]) -> Iterator[Finding]:
    """Only messages of the row's protection, and one upload per client and round."""
    uploads = defaultdict[tuple[int, str], int](int)
    for entry in entries:
        plan = log.plans.get((run, entry.round))
        where = f"{log.name}: record {entry.n}, round {entry.round}"
        who = entry.peer if entry.way == "in" else log.name
        if entry.kind in UPLOADS.values():
            uploads[entry.round, who] += 1
            if plan is not None and who not in plan.cohort:
                yield failed("protection", where, f"an upload of {who}, who is not in the cohort")
        if entry.kind == "PlainUpload":
            text = f"update, image count and metrics of {who} in the clear"
            yield failed("protection", where, text)
        if plan is None or not entry.round:
            continue
        allowed = ALLOWED.get(plan.protection, COMMON) | (SELECTING if plan.selecting else set())
        if entry.kind not in allowed:
            text = f"{entry.kind} has no place in a round under {plan.protection}"
            yield failed("protection", where, text)
    for (number, who), count in uploads.items():
        if count > 1:
            text = f"{count} uploads of {who}: their difference may show what masks hide"
            yield failed("protection", f"{log.name}: round {number}", text)


def _masks(log: Log, run: str, decoded: Decoded) -> Iterator[Finding]:
    """One survivor list a round for everybody, of its cohort and long enough."""
    lists: dict[int, set[bytes]] = defaultdict(set)
    for _, message in decoded:
        if isinstance(message, m.SurvivorList):
            lists[message.round].add(bytes(message.survivors))
    for number, found in lists.items():
        where = f"{log.name}: round {number}"
        if len(found) > 1:
            text = f"{len(found)} different survivor lists: sums over both could be subtracted"
            yield failed("protection", where, text)
        plan = log.plans.get((run, number))
        if plan is None:
            continue
        for bits in found:
            try:
                survivors = m.members_of(plan.cohort, bits)
            except SecureFedPromptError as error:
                yield failed("protection", where, f"a survivor list of nobody: {error}")
                continue
            if len(survivors) < plan.quorum:
                text = f"a sum over {len(survivors)} clients, the quorum is {plan.quorum}"
                yield failed("protection", where, text)


def _keys(log: Log, run: str, decoded: Decoded) -> Iterator[Finding]:
    """SEAL objects only where the catalogue has ciphertexts, and contexts that are public."""
    for entry, message in decoded:
        plan = log.plans.get((run, entry.round))
        where = f"{log.name}: record {entry.n}, round {entry.round}"
        frame = log.frame(entry) or b""
        if isinstance(message, m.KeyGrant):
            context = bytes(message.context)
            frame = frame.replace(context, b"", 1)
            yield from _context(where, plan, context, entry.peer)
        if isinstance(message, m.CipherUpload | m.CipherSum):
            for data in message.ciphertexts:
                yield from _ciphertext(where, plan, bytes(data))
                frame = frame.replace(bytes(data), b"", 1)
        if _holds_seal(frame):
            text = f"{type(message).__name__} holds a SEAL object, and should hold none: a key?"
            yield failed("keys", where, text)


def _ciphertext(where: str, plan: RoundPlan | None, data: bytes) -> Iterator[Finding]:
    """One ciphertext of the plan's parameter set, and nothing behind it."""
    if plan is None or not plan.encrypted:
        yield failed("keys", where, "a ciphertext in a round without encryption")
        return
    try:
        homomorphic.scheme(plan.protection, plan.parameters).ciphertext(data)
    except SecureFedPromptError as error:
        yield failed("keys", where, f"no ciphertext: {error}")
        return
    if int.from_bytes(data[8:16], "little") != len(data):
        yield failed("keys", where, f"a ciphertext with something behind it, {len(data)} bytes")


def _holds_seal(frame: bytes) -> bool:
    """Whether the header of a SEAL object is anywhere: magic, header size, and a size that fits."""
    at = frame.find(SEAL_HEADER)
    while at >= 0:
        size = int.from_bytes(frame[at + 8 : at + 16], "little")
        if 16 < size <= len(frame) - at:
            return True
        at = frame.find(SEAL_HEADER, at + 1)
    return False


def _context(where: str, plan: RoundPlan | None, data: bytes, peer: str) -> Iterator[Finding]:
    if plan is not None and plan.protection == "masks":
        if data:
            yield failed("keys", where, f"{peer} adds {len(data)} bytes to a grant of a sum key")
        return
    if plan is None or not plan.encrypted:
        yield failed("keys", where, f"a key grant by {peer} in a round without a key")
        return
    try:
        homomorphic.scheme(plan.protection, plan.parameters).check_context(data)
    except SecureFedPromptError as error:
        yield failed("keys", where, f"{type(error).__name__}: {error}")


def _uniform(log: Log, run: str, decoded: Decoded) -> Iterator[Finding]:
    found: list[uniformity.Payload] = []
    for entry, message in decoded:
        plan = log.plans.get((run, entry.round))
        who = entry.peer if entry.way == "in" else log.name
        if plan is None:
            continue
        try:
            found += uniformity.payloads(message, plan, who)
            found += uniformity.boxes(message, plan, who)
        except SecureFedPromptError as error:
            where = f"{log.name}: record {entry.n}, round {entry.round}"
            yield failed("uniformity", where, f"upload of {who} is not what the plan says: {error}")
    yield from uniformity.check_uniformity(found)


def check_pooled(logs: Sequence[Log]) -> Iterator[Finding]:
    """What logs must not lie together."""
    full = {log.name: log.role for log in logs if "full" in log.modes}
    plans = [plan for log in logs for plan in log.plans.values() if plan.selecting]
    if "server" in full.values() and {plan.selection.helper for plan in plans} & set(full):
        text = (
            "server and helper logs with frames in one place open every selection share: audit "
            "them apart, or delete one"
        )
        yield warned("keys", ", ".join(log.name for log in logs), text)


def row_of(log: Log, run: str) -> Iterator[Finding]:
    """The row of the table that was checked."""
    plans = [plan for (of, _), plan in log.plans.items() if of == run]
    kinds = {plan.selection.kind for plan in plans if plan.selecting}
    for protection in {plan.protection for plan in plans}:
        chosen = f", selection {', '.join(sorted(kinds))}" if kinds else ""
        yield noted("protection", log.name, f"row: {protection}{chosen}")
