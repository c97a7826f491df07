"""Whether what came back from the server is the sum that clients sent, as far as a log can tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from secure_fedprompt.audit.findings import Finding, failed
from secure_fedprompt.audit.log import Entry, Log
from secure_fedprompt.protocol import fixedpoint, layout
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import averaged, prompt_bytes
from secure_fedprompt.protocol.errors import SecureFedPromptError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.plan import RoundPlan

TAG_MODULUS = (1 << 61) - 1
_WORD = (1 << 64) - 1
Decoded = Sequence[tuple[Entry, m.Message]]


def check_sums(log: Log, run: str, decoded: Decoded) -> Iterator[Finding]:
    """All checks of sums that were told to clients."""
    yield from _tags(log, decoded)
    yield from _opened(log, run, decoded)
    yield from _prompts(log, run, decoded)


def _tags(log: Log, decoded: Decoded) -> Iterator[Finding]:
    """The tag that goes with an encrypted sum is that of the uploads on its list."""
    tags = dict[tuple[int, str], int]()
    for entry, message in decoded:
        if isinstance(message, m.CipherUpload) and entry.way == "in":
            tags.setdefault((message.round, entry.peer), _pair(message.tag))
        if not isinstance(message, m.CipherSum) or entry.way != "out":
            continue
        members = [tags.get((message.round, name)) for name in message.survivors]
        known = [tag for tag in members if tag is not None]
        low, high = (sum(tag >> s & _WORD for tag in known) % TAG_MODULUS for s in (0, 64))
        if len(known) == len(members) and _pair(message.tag) != low | high << 64:
            text = f"the tag of the sum to {entry.peer} is not that of its members' uploads"
            yield failed("protection", f"{log.name}: record {entry.n}", text)


def _pair(tag: bytes) -> int:
    """Two numbers of a tag in one."""
    return int.from_bytes(tag, "little")


def _opened(log: Log, run: str, decoded: Decoded) -> Iterator[Finding]:
    """Under masks everybody is told one sum of a round, over the survivors who signed for it."""
    told = defaultdict[int, set[bytes]](set)
    lists = defaultdict[int, set[bytes]](set)
    for entry, message in decoded:
        if isinstance(message, m.SurvivorList):
            lists[message.round].add(bytes(message.survivors))
        if not isinstance(message, m.OpenedSum):
            continue
        told[message.round].add(digest(Purpose.SUM, message.vector, message.tag, message.members))
        plan, where = log.plans.get((run, message.round)), f"{log.name}: record {entry.n}"
        if plan is None:
            continue
        try:
            members = m.members_of(plan.cohort, message.members)
        except SecureFedPromptError as error:
            yield failed("protection", where, f"a sum of nobody in particular: {error}")
            continue
        if lists[message.round] and bytes(message.members) not in lists[message.round]:
            text = f"a sum of {', '.join(members)}, for whom no survivor list was signed"
            yield failed("protection", where, text)
    for number, found in told.items():
        if len(found) > 1:
            text = f"{len(found)} different sums of one round were told"
            yield failed("protection", f"{log.name}: round {number}", text)


def _prompts(log: Log, run: str, decoded: Decoded) -> Iterator[Finding]:
    """The prompt of a learning round is what the sum before it makes of the one before."""
    bases = dict[int, bytes]()
    sums = dict[int, tuple[RoundPlan, m.OpenedSum]]()
    for _, message in decoded:
        if isinstance(message, m.Plan) and message.base:
            bases.setdefault(message.plan.learning_round, bytes(message.base))
        if isinstance(message, m.OpenedSum) and (plan := log.plans.get((run, message.round))):
            sums.setdefault(plan.learning_round, (plan, message))
    for number in sorted(sums):
        plan, opened = sums[number]
        if not plan.training or number not in bases:
            continue
        words = np.zeros(layout.total_size(plan.layout), np.uint32)
        try:
            fixedpoint.add_wire(plan.layout, opened.vector, words)
        except SecureFedPromptError as error:
            text = f"no sum: {error}"
            yield failed("protection", f"{log.name}: round {plan.round}", text)
            continue
        integers = fixedpoint.to_integers(plan.layout, words)
        total = layout.unflatten(plan.layout, fixedpoint.decode(plan.layout, integers))
        yield from _filled(f"{log.name}: round {plan.round}", plan, opened, total)
        base = np.frombuffer(bases[number], "<f4").astype(np.float32)
        following = prompt_bytes(averaged(base, plan.layout, total))
        bases.setdefault(number + 1, following)
        expected = digest(Purpose.BASE, following)
        for after in (p for (of, _), p in sorted(log.plans.items()) if of == run):
            if after.learning_round == number + 1 and after.base_digest != expected:
                text = f"the global prompt is not what the sum of learning round {number} gives"
                yield failed("protection", f"{log.name}: round {after.round}", text)


def _filled(
    where: str, plan: RoundPlan, opened: m.OpenedSum, total: dict[str, layout.Vector]
) -> Iterator[Finding]:
    """A slot is filled by as many as open it, less those that were lost since, or by nobody."""
    lost = len(plan.cohort) - int.from_bytes(opened.members, "little").bit_count()
    for name in (name for name in total if name.startswith(layout.FILLED)):
        few = [int(n) for n in total[name] if 0 < n < plan.selection.fillers - lost]
        if few:
            text = (
                f"a slot of {name.removeprefix(layout.FILLED)!r} is the mean of {min(few)}, it "
                f"opens for {plan.selection.fillers}: server, helper or a client cheated"
            )
            yield failed("protection", where, text)
