"""Data that crossed in the clear, plans that bend the terms, hidden frames: no audit passes them.

What each row promises is written here once more, as literals: a mistake in the table that clients
and audit share would otherwise pass everywhere.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from audited import VICTIM, audited, failures, federate, read
from rounds import identity

from secure_fedprompt.audit import summary, uniformity
from secure_fedprompt.audit.findings import Level
from secure_fedprompt.audit.terms import _absences, _bent
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.protections import PROTECTIONS
from secure_fedprompt.protocol.terms import RunTerms

QUIET: dict[str, Any] = {"weights": "uniform", "metrics": "final"}
UPDATE = np.random.default_rng(1).normal(0, 0.1, 160).astype("<f4").tobytes()

# n -> (quorum, c) of masks on the complete graph, and pooled clients of bfv and ckks.
ROWS = {
    3: (3, 1, 1),
    4: (3, 1, 1),
    5: (4, 2, 2),
    10: (7, 3, 5),
    31: (21, 10, 19),
    100: (67, 33, 65),
}


@pytest.mark.parametrize("n", ROWS)
def test_the_rows_as_literals(n: int) -> None:
    from secure_fedprompt.server.settings import ServerSettings, quorum_of

    quorum, masks, pooled = ROWS[n]
    assert quorum_of(ServerSettings(), n) == quorum
    assert PROTECTIONS["masks"].tolerated(False, n, quorum) == masks
    assert (
        PROTECTIONS["bfv"].tolerated(False, n, quorum)
        == PROTECTIONS["ckks"].tolerated(False, n, quorum)
        == pooled
    )
    assert PROTECTIONS["masks"].tolerated(True, n, quorum) == min(n // 10, quorum - 2)
    assert PROTECTIONS["none"].tolerated(False, n, 1) == 0


@pytest.mark.parametrize(
    ("protection", "c", "says"),
    [("masks", 1, ""), ("masks", 2, "c = 2 is promised, quorum and graph give 1"),
     ("bfv", 1, ""), ("bfv", 0, "c = 0 is promised, quorum and graph give 1")],
)  # fmt: skip
def test_the_audit_counts_colluders_for_itself(
    tmp_path: Path, protection: str, c: int, says: str
) -> None:
    _, folders = federate(tmp_path, protection=protection, **QUIET)
    (log,) = read(folders, "server")
    run = log.runs[-1]
    ((n, terms),) = log.terms[run]
    changed = dataclasses.replace(terms, colluders=c)
    log.terms[run] = [(n, changed)]
    log.plans = {
        key: dataclasses.replace(plan, terms=changed.digest) for key, plan in log.plans.items()
    }
    found = [
        text for check, text in failures(summary.audit(log, [], run, None)) if check == "terms"
    ]
    assert (not found) if not says else says in found


def in_round(number: int, kind: type, change: Any, who: str = VICTIM) -> Any:
    """Alters the victim's frames of a kind in a round, as they pass both ends."""

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        same = isinstance(message, kind) and getattr(message, "round", 0) == number
        return change(message) if same and sender == who else message

    return tap


def test_an_initial_prompt_in_the_middle_of_a_run_shows(tmp_path: Path) -> None:
    """It carries the update, float32, in a message that is in the clear on purpose."""

    def leak(message: Any) -> m.Message:
        from secure_fedprompt.protocol.layout import TensorSpec

        return m.Initial(message.run, (TensorSpec("ctx", (10, 16)),), UPDATE)

    result = audited(tmp_path, in_round(2, m.Reveal, leak), **QUIET)
    text = f"a starting prompt of {VICTIM} in the middle of the run: it could hold an update"
    assert ("protection", text) in failures(result)


@pytest.mark.parametrize("mode", ["full", "headers"])
@pytest.mark.parametrize("shift", [0.0, 1e-6, 1e-3])
def test_a_slow_client_with_the_same_start_is_no_leak(
    tmp_path: Path, shift: float, mode: str
) -> None:
    """It was asked, and another one's start was taken; its own comes after the first plan."""
    kept: list[m.Initial] = []

    def late(message: Any) -> m.Message:
        given = np.frombuffer(kept[0].vector, "<f4") + np.float32(shift)
        return dataclasses.replace(kept[0], vector=given.astype("<f4").tobytes())

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        kept.extend([message] if isinstance(message, m.Initial) else [])
        return in_round(2, m.Reveal, late)(sender, recipient, message)

    _, folders = federate(tmp_path, tap, mode=mode, **QUIET)
    (log,) = read(folders, "server")
    found = [t for _, t in failures(summary.audit(log, [], "", None)) if "starting prompt" in t]
    assert bool(found) is (shift > 1e-5 and mode == "full")


def test_a_plain_upload_under_another_run_id_shows(tmp_path: Path) -> None:
    leak = in_round(2, m.Reveal, lambda x: m.PlainUpload(b"x" * 16, 2, UPDATE))
    assert not audited(tmp_path, leak, **QUIET).kept
    _, folders = federate(tmp_path / "named", leak, **QUIET)
    (log,) = read(folders, "server")
    named = next(r for r in log.runs if not r.startswith("78787878"))
    found = [text for _, text in failures(summary.audit(log, [], named, None))]
    assert any("another run of this log, without a plan: NOT KEPT" in text for text in found)


def test_a_box_that_is_not_sealed_shows(tmp_path: Path) -> None:
    leak = in_round(1, m.SealedPrompt, lambda x: dataclasses.replace(x, box=UPDATE), "c001")
    result = audited(tmp_path, leak, protection="bfv", **QUIET)
    assert any(
        check == "uniformity" and "SealedPrompt.box, 640 words: not uniform" in text
        for check, text in failures(result)
    )


def test_shares_in_the_clear_show(tmp_path: Path) -> None:
    leak = in_round(1, m.Shares, lambda x: dataclasses.replace(x, boxes=UPDATE[: len(x.boxes)]))
    result = audited(tmp_path, leak, n=10, **QUIET)
    assert any(check == "uniformity" and "Shares.boxes" in text for check, text in failures(result))


def test_selection_keys_that_are_not_shared_show() -> None:
    from test_selection_refusals import selecting_plan

    plan = selecting_plan()
    keys = np.full(80, 5, "<u4")
    for share, good in ((keys, False), (np.random.default_rng(0).integers(0, 2**32, 80), True)):
        message = m.KeyShares(plan.run, 1, share.astype("<u4").tobytes(), bytes(48))
        payloads = [p for p in uniformity.boxes(message, plan, VICTIM) if "selection" in p.part]
        found = list(uniformity.check_uniformity(payloads))
        assert (Level.FAIL not in {f.level for f in found}) is good


def test_a_leave_that_one_end_hides_shows(tmp_path: Path) -> None:
    _, folders = federate(tmp_path, **QUIET)
    log, other = read(folders, "server", VICTIM)
    hello = next(e for e in log.entries if e.kind == "Hello" and e.peer == VICTIM)
    leave = dataclasses.replace(hello, n=hello.n, kind="Leave", digest="ab" * 32, place=None)
    log.entries.append(leave)
    found = failures(summary.audit(log, [other], "", None))
    assert ("cross-check", f"Leave from {VICTIM}, 1 time(s) more than {VICTIM} says") in found


def test_an_earlier_run_without_protection_is_not_passed_over(tmp_path: Path) -> None:
    _, folders = federate(tmp_path, protection="none", **QUIET)
    shutil.rmtree(tmp_path / "run")  # the logs stay
    federate(tmp_path, start=5.0, **QUIET)
    (log,) = read(folders, "server")
    first, last = log.runs
    result = summary.audit(log, [], "", None)
    assert result.run == last
    assert any("another run of this log, under none: NOT KEPT" in t for _, t in failures(result))
    named = summary.audit(log, [], last, None)
    assert named.kept
    assert any(first[:8] in f.where and f.level is Level.WARN for f in named.findings)


# -- terms -----------------------------------------------------------------------------------------


def with_plan(**changes: Any) -> Any:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Plan) and message.plan.round == 2:
            return dataclasses.replace(message, plan=dataclasses.replace(message.plan, **changes))
        return message

    return tap


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clip": 0.5}, "clip 0.5 instead of 1.0"),
        ({"quorum": 4, "threshold": 4}, "quorum 4 instead of 3"),
        ({"rounds": 9}, "rounds 9 instead of 2"),
        ({"settings_digest": bytes(32)}, "settings 0000000000000000 instead of"),
        ({"attempt": 10, "learning_round": 1}, "learning round 1 from two different prompts"),
        ({"attempt": 3, "learning_round": 3, "rounds": 3}, "rounds 3 instead of 2"),
    ],
)
def test_a_plan_that_bends_the_terms_shows_at_every_client(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    """As in the attack that passed: what the server sent is what the client received."""
    result = audited(tmp_path, with_plan(**changes), **QUIET)
    assert any(check == "terms" and says in text for check, text in failures(result))
    (log,) = read({VICTIM: tmp_path / VICTIM}, VICTIM)
    alone = summary.audit(log, [], "", None)
    assert any(check == "terms" and says in text for check, text in failures(alone))


@pytest.mark.parametrize("protection", ["masks", "bfv"])
@pytest.mark.parametrize("missing", ["", "the first", "the others"])
def test_who_missed_one_of_two_sums_is_named(tmp_path: Path, protection: str, missing: str) -> None:
    lost: list[str] = []
    leaves = m.RoundEnd if missing == "the others" else (m.MaskedUpload, m.CipherUpload)

    def until(world: Any, message: m.Message) -> bool:
        if missing == "the first" and len(lost) == 1 and isinstance(message, m.RoundEnd):
            lost.append("back")
            world.join("c004")
        if missing and not lost and isinstance(message, leaves):
            lost.append("c004")
            world.lose("c004")
            world.lost.add("c004")
        return False

    _, folders = federate(tmp_path, until=until, protection=protection, rounds=3, **QUIET)
    (log,) = read(folders, "server")
    result = summary.audit(log, [], "", None)
    said = [f.text for f in result.findings if "one of two successive sums" in f.text]
    assert len(said) == bool(missing)
    assert all("not in the other: c004. The sums'" in text for text in said)
    assert result.kept


@pytest.mark.parametrize(("left", "told"), [(4, True), (5, False)])
def test_as_many_as_hide_each_other_are_not_named(left: int, told: bool) -> None:
    """c + 2 of them, as on a regular graph that tolerates fewer."""
    everybody = tuple(f"c{i}" for i in range(30))
    plans: Any = {
        number: SimpleNamespace(learning_round=number, rounds=2, cohort=everybody, colluders=3)
        for number in (1, 2)
    }
    sums: Any = [
        (None, m.CipherSum(b"r" * 16, number, names, (), bytes(16), ()))
        for number, names in ((1, everybody), (2, everybody[left:]))
    ]
    log: Any = SimpleNamespace(name="server")
    assert bool(list(_absences(log, plans, sums))) == told


@pytest.mark.parametrize(
    ("regular", "allowed", "attempt", "bent"),
    [(0, 200, 11, False), (0, 200, 200, False), (0, 255, 201, True), (0, 7, 8, True),
     (1, 10, 10, False), (1, 200, 11, True)],
)  # fmt: skip
def test_a_round_may_be_tried_as_often_as_clients_allow(
    tmp_path: Path, regular: int, allowed: int, attempt: int, bent: bool
) -> None:
    """And no more, whatever terms say that somebody signed."""
    _, folders = federate(tmp_path, **QUIET)
    (log,) = read(folders, "server")
    (run,) = log.runs
    plan = dataclasses.replace(log.plans[run, 1], attempt=attempt)
    terms = dataclasses.replace(log.terms[run][0][1], regular=regular, attempts=allowed)
    assert (f"attempt {attempt}" in list(_bent(plan, terms))) is bent


def test_bounds_of_counters_are_held_against_the_terms(tmp_path: Path) -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Plan) and message.plan.round == 2:
            layout = tuple(
                dataclasses.replace(f, bound=7.0) if f.name == "seen" else f
                for f in message.plan.layout
            )
            return dataclasses.replace(
                message, plan=dataclasses.replace(message.plan, layout=layout)
            )
        return message

    result = audited(tmp_path, tap)
    assert any("field seen of shape () and bound 7" in text for _, text in failures(result))


def test_two_sums_of_one_learning_round_show(tmp_path: Path) -> None:
    _, folders = federate(tmp_path, **QUIET)
    (log,) = read(folders, "server")
    run = log.runs[-1]
    plan = log.plans[run, 2]
    again = dataclasses.replace(plan, learning_round=1, attempt=2,
                                base_digest=log.plans[run, 1].base_digest)  # fmt: skip
    log.plans[run, 2] = again
    found = [text for check, text in failures(summary.audit(log, [], run, None))]
    assert "sums of rounds 1, 2 were opened for learning round 1: they can be subtracted" in found


def test_terms_must_be_signed_and_stay(tmp_path: Path) -> None:
    def unsigned(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Terms) and recipient == VICTIM:
            return dataclasses.replace(message, signature=bytes(64))
        return message

    result = audited(tmp_path / "1", unsigned, **QUIET)
    assert ("terms", "terms without a valid signature of the server") in failures(result)

    def changed(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Terms) and recipient == VICTIM:
            terms = dataclasses.replace(message.terms, clip=0.75)
            signature = identity("server").sign(Purpose.TERMS, terms.digest)
            return dataclasses.replace(message, terms=terms, signature=signature)
        return message

    result = audited(tmp_path / "2", changed, **QUIET)
    assert ("terms", "terms of the run changed in clip") in failures(result)


def test_a_roster_that_grew_is_a_step_and_a_quorum_that_did_not_follow_is_not(
    tmp_path: Path,
) -> None:
    _, folders = federate(tmp_path, **QUIET)
    (log,) = read(folders, "server")
    run = log.runs[-1]
    ((n, before),) = log.terms[run]

    def judged(after: RunTerms) -> list[str]:
        log.terms[run] = [(n, before), (n + 1, after)]
        result = summary.audit(log, [], run, None)
        assert (result.checks["terms"] == "fail") is bool(failures(result))
        return [text for _, text in failures(result)]

    grown = dataclasses.replace(before, roster_digest=b"g" * 32, clients=5, quorum=4, colluders=2)
    assert judged(grown) == []
    assert judged(dataclasses.replace(grown, quorum=3)) == [
        "a quorum of 3 of 5 clients, the row promises 4",
        "c = 2 is promised, quorum and graph give 0",
    ]
    assert judged(dataclasses.replace(grown, max_seen=5)) == [
        "terms of the run changed in max_seen"
    ]


def test_every_field_of_a_plan_is_held_against_something(tmp_path: Path) -> None:
    """Whatever a plan says, the audit or the plan's own check notices if it says something else."""
    from secure_fedprompt.audit.terms import _bent

    _, folders = federate(tmp_path, **QUIET)
    (log,) = read(folders, "server")
    run = log.runs[-1]
    ((_, terms),) = log.terms[run]
    plan = log.plans[run, 2]
    assert not list(_bent(plan, terms))
    free = {  # what a round chooses, or what ``RoundPlan.check`` ties to other fields
        "terms", "round", "attempt", "learning_round", "cohort", "base_digest", "threshold",
        "graph_seed", "parameters", "maker", "election", "key", "grants", "method",
    }  # fmt: skip
    for field in dataclasses.fields(RoundPlan):
        value = getattr(plan, field.name)
        match value:
            case bytes():
                other: Any = b"\7" * len(value)
            case str():
                other = value + "x"
            case int() | float():
                other = value + 1
            case tuple():
                other = value[:-1]
            case _:
                first = dataclasses.fields(value)[0].name
                other = dataclasses.replace(value, **{first: 1})
        said = list(_bent(dataclasses.replace(plan, **{field.name: other}), terms))
        assert said or field.name in free, field.name
