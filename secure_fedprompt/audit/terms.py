"""Whether a run's terms promise their row, and whether its plans and sums kept to them.

Written without the code that clients enforce the terms with: a mistake there must not be repeated
here. What a plan says is held against the terms field by field.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator

from secure_fedprompt.audit.findings import Finding, failed, noted, warned
from secure_fedprompt.audit.log import Entry, Log
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import FieldError, SignatureError
from secure_fedprompt.protocol.expand import Purpose, tag
from secure_fedprompt.protocol.keys import verify
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.terms import RunTerms

Decoded = list[tuple[Entry, m.Message]]
MOST_ATTEMPTS = 200  # at one learning round
MOST_GRAPHS = 10  # on a regular graph, of which each attempt has another
LOSS = 20.0  # a test image's loss counts as so much at most
OPENING = ("Reveal", "Opened", "PlainUpload")  # what opens a sum, or is one


def check_terms(log: Log, run: str, decoded: Decoded) -> Iterator[Finding]:
    """Terms, plans and openings of one run in one log."""
    known = log.terms.get(run, [])
    plans = sorted((n, plan) for (of, n), plan in log.plans.items() if of == run)
    if not known:
        if plans:
            yield failed("terms", log.name, "plans of a run whose terms are not on record")
        return
    yield from _signed(log, run, decoded)
    yield from _steps(log, run, [terms for _, terms in known])
    for n, terms in known:
        yield from _promises(f"{log.name}: record {n}", terms)
    by_digest = {terms.digest: terms for _, terms in known}
    for number, plan in plans:
        where = f"{log.name}: round {number}"
        if plan.terms not in by_digest:
            yield failed("terms", where, "the plan is under terms that are not on record")
            continue
        for what in _bent(plan, by_digest[plan.terms]):
            yield failed("terms", where, f"the plan bends the terms: {what}")
    yield from _order(log, plans)
    yield from _openings(log, run, plans)
    yield from _absences(log, dict(plans), decoded)


def _signed(log: Log, run: str, decoded: Decoded) -> Iterator[Finding]:
    servers = [(n, key) for n, (role, key) in log.rosters[run].items() if role == "server"]
    for entry, message in decoded:
        if not isinstance(message, m.Terms):
            continue
        name, key = servers[0] if servers else ("server", "")
        try:
            verify(bytes.fromhex(key), Purpose.TERMS, message.terms.digest, message.signature, name)
        except (SignatureError, ValueError):
            text = "terms without a valid signature of the server"
            yield failed("terms", f"{log.name}: record {entry.n}", text)


def _steps(log: Log, run: str, known: list[RunTerms]) -> Iterator[Finding]:
    """Terms change with the roster, and in nothing else."""
    for of, number, name, old in log.renewed:
        if of == run:
            yield warned(
                "terms", f"{log.name}: record {number}", f"{name} has another key from here on, "
                f"the one before was {old[:16]}: ask {name} whether that was meant",
            )  # fmt: skip
    for before, after in itertools.pairwise(known):
        if before.digest == after.digest:
            continue
        free = ("roster_digest", "clients", "quorum", "colluders", "makers", "helpers")
        changed = [
            name for name in RunTerms.__dataclass_fields__
            if getattr(before, name) != getattr(after, name)
        ]  # fmt: skip
        if wrong := sorted(set(changed) - set(free)):
            yield failed("terms", log.name, f"terms of the run changed in {', '.join(wrong)}")
        elif "roster_digest" not in changed:
            yield failed("terms", log.name, "terms of the run changed, and its roster did not")
        else:
            yield noted(
                "terms", log.name, f"the roster changed within the run: {before.clients} clients "
                f"and c = {before.colluders} became {after.clients} and c = {after.colluders}",
            )  # fmt: skip


def _promises(where: str, terms: RunTerms) -> Iterator[Finding]:
    """The row of the table: how many must be in a sum, and how many may collude."""
    n, t = terms.clients, terms.quorum
    if terms.protection == "none":
        return
    if t < 2 * n // 3 + 1 or t > n:
        text = f"a quorum of {t} of {n} clients, the row promises {2 * n // 3 + 1}"
        yield failed("terms", where, text)
    if terms.protection in ("bfv", "ckks"):
        c = t - 2
    elif terms.regular:
        c = min(math.floor(terms.corruption * n), t - 2)
    else:
        c = min(2 * t - n - 1, t - 2)
    if terms.colluders != max(0, c):
        text = f"c = {terms.colluders} is promised, quorum and graph give {max(0, c)}"
        yield failed("terms", where, text)
    if terms.weights != "uniform" or terms.metrics == "rounds":
        what = [f"weights = {terms.weights}"] * (terms.weights != "uniform")
        what += ["metrics in every round"] * (terms.metrics == "rounds")
        text = f"{' and '.join(what)}: a dropout between two sums can reveal a client's counts"
        yield noted("terms", where, text)


def _bent(plan: RoundPlan, terms: RunTerms) -> Iterator[str]:
    """Every way in which a plan says something else than its terms."""
    training = plan.learning_round <= terms.rounds
    selecting = bool(terms.selection) and 1 < plan.learning_round <= terms.rounds
    settings = hashlib.sha256(
        tag(Purpose.SETTINGS) + len(terms.settings).to_bytes(8, "little") + bytes(terms.settings)
    ).digest()
    same: dict[str, tuple[object, object]] = {
        "run": (plan.run, terms.run),
        "rounds": (plan.rounds, terms.rounds),
        "protection": (plan.protection, terms.protection),
        "settings": (plan.settings_digest, settings),
        "model": (plan.model_fingerprint, terms.model_fingerprint),
        "classes": (plan.classes_digest, terms.classes_digest),
        "roster": (plan.roster_digest, terms.roster_digest),
        "clients": (plan.members, terms.clients),
        "quorum": (plan.quorum, terms.quorum),
        "clip": (plan.clip, terms.clip),
        "max_weight": (plan.max_weight, terms.max_weight),
        "uniform": (plan.uniform, int(terms.weights == "uniform")),
        "bucket": (plan.bucket, int(terms.weights == "bucket")),
        "graph": (plan.degree > 0, terms.regular == 1 and terms.protection == "masks"),
        "selection": (plan.selection.scope, terms.selection if selecting else 0),
        "noise": (
            (plan.noise.clip, plan.noise.multiplier, plan.noise.honest),
            (terms.noise.clip, terms.noise.multiplier, terms.noise.honest) if training
            else (0.0, 0.0, 0),
        ),
    }  # fmt: skip
    for what, (said, agreed) in same.items():
        if said != agreed:
            yield f"{what} {_short(said)} instead of {_short(agreed)}"
    if not terms.quorum <= len(plan.cohort) <= terms.clients:
        yield f"a cohort of {len(plan.cohort)}"
    if plan.learning_round > terms.rounds + (terms.metrics != "off"):
        yield f"learning round {plan.learning_round} of {terms.rounds}"
    most = MOST_GRAPHS if terms.regular else MOST_ATTEMPTS
    if not 1 <= plan.attempt <= min(most, terms.attempts):
        yield f"attempt {plan.attempt}"
    if terms.protection in ("masks", "bfv", "ckks") and plan.maker not in terms.makers:
        yield f"key maker {plan.maker}"
    if selecting and plan.selection.helper not in terms.helpers:
        yield f"helper {plan.selection.helper}"
    if terms.regular and terms.protection == "masks":
        numbers = f"{plan.learning_round} {plan.attempt}".encode()
        parts = terms.run, terms.nonces, numbers
        seed = hashlib.sha256(tag(Purpose.GRAPH))
        for part in parts:
            seed.update(len(part).to_bytes(8, "little") + part)
        if plan.graph_seed != seed.digest():
            yield "a graph that does not follow from the nonces"
    yield from _layout(plan, terms, training)


def _layout(plan: RoundPlan, terms: RunTerms, training: bool) -> Iterator[str]:
    """Shapes and bounds of every field, and room for N clients."""
    fields = {f.name: f for f in plan.layout}
    room = 12.0 * terms.noise.multiplier * terms.noise.clip
    room = room / math.sqrt(terms.noise.honest) if terms.noise.honest and training else 0.0
    counted = terms.metrics == "rounds" or (terms.metrics == "final" and not training)
    bounds: dict[str, tuple[tuple[int, ...], float]] = {
        "weight": ((), float(terms.max_weight)), "contributors": ((), 1.0),
    }  # fmt: skip
    if training:
        bounds |= {
            t.name: (tuple(t.shape), terms.clip * terms.max_weight + room) for t in terms.tensors
        }
    if counted:
        seen = float(terms.max_seen)
        bounds |= dict.fromkeys(("seen", "correct", "zero_shot"), ((), seen))
        bounds |= {"loss": ((), LOSS * seen)}
        if training:
            bounds |= {"clipped": ((), float(sum(t.size for t in terms.tensors)))}
    filled = {name for name in fields if name.startswith("filled.")}
    if set(fields) - filled != set(bounds):
        yield f"fields {', '.join(sorted(set(fields) ^ set(bounds)))} in the upload or missing"
    for name, (shape, bound) in bounds.items():
        field = fields.get(name)
        if field is None:
            continue
        if tuple(field.shape) != shape or not math.isclose(field.bound, bound, rel_tol=1e-12):
            yield f"field {name} of shape {tuple(field.shape)} and bound {field.bound:g}"
        if terms.clients * math.ceil(field.bound * 2.0**field.frac) >= 1 << (field.bits - 1):
            yield f"field {name} can overflow"


def _order(log: Log, plans: list[tuple[int, RoundPlan]]) -> Iterator[Finding]:
    """Learning rounds and attempts only grow, each learning round from one prompt of its own."""
    last, bases = (0, 0), dict[int, bytes]()
    for number, plan in plans:
        where = f"{log.name}: round {number}"
        place = plan.learning_round, plan.attempt
        if place <= last:
            text = f"learning round {place[0]}, attempt {place[1]} after {last[0]}, {last[1]}"
            yield failed("terms", where, text)
        last = max(last, place)
        before = bases.setdefault(plan.learning_round, plan.base_digest)
        if before != plan.base_digest:
            text = f"learning round {plan.learning_round} from two different prompts"
            yield failed("terms", where, text)
    if log.role == "server" and plans and plans[0][1].learning_round != 1 and not log.first:
        text = f"the run begins with learning round {plans[0][1].learning_round}"
        yield failed("terms", log.name, text)


def _openings(log: Log, run: str, plans: list[tuple[int, RoundPlan]]) -> Iterator[Finding]:
    """One opened sum for each learning round, and for each prompt."""
    of = dict(plans)
    by_round = defaultdict[int, set[int]](set)
    by_base = defaultdict[bytes, set[int]](set)
    for entry in log.entries:
        if entry.run == run and entry.kind in OPENING and entry.round in of:
            plan = of[entry.round]
            by_round[plan.learning_round].add(entry.round)
            if plan.method not in ("zeroshot", "coop"):
                by_base[plan.base_digest].add(entry.round)
    for number, rounds in by_round.items():
        if len(rounds) > 1 and of[min(rounds)].protection != "none":
            text = f"sums of rounds {_list(rounds)} were opened for learning round {number}"
            yield failed("terms", log.name, f"{text}: they can be subtracted")
    for rounds in by_base.values():
        if len({of[r].learning_round for r in rounds}) > 1:
            text = f"sums of rounds {_list(rounds)} were opened for one prompt"
            yield failed("terms", log.name, f"{text}: they can be subtracted")


def _absences(log: Log, of: dict[int, RoundPlan], decoded: Decoded) -> Iterator[Finding]:
    """Who is told by being in one of two successive sums only, among fewer than c + 2."""
    lists = dict[int, set[str]]()
    for _, message in decoded:
        if not isinstance(message, m.OpenedSum | m.CipherSum) or message.round not in of:
            continue
        plan = of[message.round]
        if plan.learning_round > plan.rounds:
            continue
        if isinstance(message, m.CipherSum):
            lists[plan.learning_round] = set(message.survivors)
            continue
        with contextlib.suppress(FieldError):  # of whom it is not is said elsewhere
            lists[plan.learning_round] = set(m.members_of(plan.cohort, message.members))
    least = max((plan.colluders for plan in of.values()), default=0) + 2
    told = set[str]()
    for number in lists.keys() & {n - 1 for n in lists}:
        now, then = lists[number], lists[number + 1]
        told |= set().union(*(some for some in (now - then, then - now) if len(some) < least))
    if told:
        yield noted(
            "terms", log.name, f"in one of two successive sums and not in the other: "
            f"{', '.join(sorted(told))}. The sums' difference is that update, up to what the "
            "others' changed by in between: little, if the learning rate is low (threshold = -1 "
            "asks for everybody in every sum)",
        )  # fmt: skip


def _list(rounds: set[int]) -> str:
    return ", ".join(map(str, sorted(rounds)))


def _short(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else str(value)
