"""What a client refuses, each with its own error: an active server gets nothing more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rounds import OPEN, entropy_from, identity, make_parties, make_plan, make_updates, roster

from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.party import Party, refusal
from secure_fedprompt.clients.rounds.base import Awaiting
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.memory import run_round
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.keys import Identity, Member
from secure_fedprompt.protocol.policy import Policy, check_isolation
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.server.rounds.base import Stage

N = 5
VICTIM = "c001"
Change = Callable[[Any], Any]


def replace(**changes: Any) -> Change:
    return lambda message: dataclasses.replace(message, **changes)


def swap_key(adverts: m.Adverts) -> m.Adverts:
    """The server's own key in place of a peer's: a man in the middle."""
    middle = Identity.generate().curve_public()
    first, second, *rest = adverts.adverts
    forged = dataclasses.replace(second, mask_key=middle)
    return dataclasses.replace(adverts, adverts=(first, forged, *rest))


def copy_keys(adverts: m.Adverts) -> m.Adverts:
    """Two peers under one key: their masks would cancel."""
    a, b, c, *rest = adverts.adverts
    clone = dataclasses.replace(c, mask_key=b.mask_key)
    return dataclasses.replace(adverts, adverts=(a, b, clone, *rest))


def rename(adverts: m.Adverts) -> m.Adverts:
    a, b, *rest = adverts.adverts
    return dataclasses.replace(adverts, adverts=(a, dataclasses.replace(b, name="c0015"), *rest))


def flip(data: bytes | memoryview, at: int = 0) -> bytes:
    raw = bytearray(data)
    raw[at] ^= 1
    return bytes(raw)


REFUSALS: dict[str, tuple[type, Change, type[Exception], str]] = {
    "substituted key": (m.Adverts, swap_key, errors.SignatureError, "c002"),
    "cloned key": (m.Adverts, copy_keys, errors.AdvertMismatchError, "share a key"),
    "advert of a stranger": (m.Adverts, rename, errors.AdvertMismatchError, "not of our neighbours"),
    "own advert withheld": (
        m.Adverts, lambda a: dataclasses.replace(a, adverts=a.adverts[1:]),
        errors.AdvertMismatchError, "our own advert",
    ),
    "own advert altered": (
        m.Adverts,
        lambda a: dataclasses.replace(a, adverts=(
            dataclasses.replace(a.adverts[0], commitment=bytes(32)), *a.adverts[1:])),
        errors.AdvertMismatchError, "our own advert",
    ),
    "too few adverts": (
        m.Adverts, lambda a: dataclasses.replace(a, adverts=a.adverts[:3]),
        errors.ThresholdError, "3 neighbours advertised, threshold 4",
    ),
    "adverts doubled": (
        m.Adverts, lambda a: dataclasses.replace(a, adverts=(*a.adverts, a.adverts[-1])),
        errors.AdvertMismatchError, "doubled",
    ),
    "truncated inbox": (
        m.Inbox, lambda i: dataclasses.replace(i, boxes=i.boxes[:-1]),
        errors.AdvertMismatchError, "inbox of",
    ),
    "inbox from a stranger": (
        m.Inbox, replace(senders=b"\x3f"), errors.FieldError, "1 bytes of members",
    ),
    "inbox without us": (
        m.Inbox, replace(senders=b"\x1e"), errors.AdvertMismatchError, "inbox without us",
    ),
    "inbox without who boxes us": (
        m.Inbox, replace(senders=b"\x1d"),
        errors.AdvertMismatchError, "inbox of 80 bytes, 0 of the senders box us",
    ),
    "inbox too small": (
        m.Inbox, replace(senders=b"\x07"), errors.ThresholdError, "threshold is 4",
    ),
    "survivors too few": (
        m.SurvivorList, replace(survivors=b"\x07"), errors.ThresholdError, "quorum",
    ),
    "survivors without us": (
        m.SurvivorList, replace(survivors=b"\x1e"),
        errors.SurvivorError, "leaves out",
    ),
    "survivor from outside": (
        m.SurvivorList, replace(survivors=b"\x3f"), errors.FieldError, "1 bytes of members",
    ),
    "survivors of a larger cohort": (
        m.SurvivorList, replace(survivors=b"\x1f\0"), errors.FieldError, "2 bytes of members",
    ),
    "too few signatures": (
        m.UnmaskRequest, lambda u: dataclasses.replace(u, signers=u.signers[:3]),
        errors.ThresholdError, "4 are needed",
    ),
    "proof of more than there is": (
        m.Adverts, replace(proof=(bytes(32),)), errors.AdvertMismatchError, "do not prove",
    ),
    "one signature twice": (
        m.UnmaskRequest,
        lambda u: dataclasses.replace(u, signers=(*u.signers[:3], u.signers[0])),
        errors.SurvivorError, "twice",
    ),
    "signature of another list": (
        m.UnmaskRequest,
        lambda u: dataclasses.replace(u, signers=(
            *u.signers[:-1],
            dataclasses.replace(u.signers[-1], signature=flip(u.signers[-1].signature, 5)))),
        errors.SignatureError, "survivors",
    ),
    "message of an earlier round": (m.Inbox, replace(round=0), errors.ReplayError, "earlier round"),
    "message of another run": (m.Inbox, replace(run=b"\1" * 16), errors.ReplayError, "another run"),
    "message of a later round": (
        m.Inbox, replace(round=2), errors.UnexpectedMessageError, "round 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str) -> None:
    kind, change, error, words = REFUSALS[case]
    plan = make_plan(N)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        return change(message) if recipient == VICTIM and isinstance(message, kind) else message

    outcome = run_round(plan, make_parties(N), make_updates(plan), tap=tap)
    assert type(outcome.errors[VICTIM]) is error
    assert words in str(outcome.errors[VICTIM])
    assert set(outcome.errors) == {VICTIM}  # nobody else is disturbed


def test_without_tampering_nobody_refuses() -> None:
    plan = make_plan(N)
    outcome = run_round(plan, make_parties(N), make_updates(plan))
    assert not outcome.errors
    assert outcome.round.stage is Stage.DONE


def test_split_survivor_lists_open_nothing() -> None:
    """Two halves see different lists: no list gets a quorum of signatures."""
    plan = make_plan(6)  # quorum 5

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.SurvivorList) and recipient > "c003":
            return dataclasses.replace(message, survivors=b"\x3e")
        return message

    outcome = run_round(plan, make_parties(6), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.ABORTED
    revealed = [f for _, to, f in outcome.frames if not to and f[1] == m.CATALOGUE.encode(
        m.Reveal(bytes(16), 1, b""))[1]]  # fmt: skip
    assert not revealed


def advance(party: Party, plan: Any = None) -> Awaiting:
    """A client alone in the world, ready to upload."""
    plan = plan or make_plan(1)
    state, replies = start(party, plan)
    (advert,) = replies
    assert isinstance(advert, m.Advert)
    state, _ = state.on(m.Adverts(plan.run, plan.round, (advert,), ()))
    state, _ = state.on(m.Inbox(plan.run, plan.round, b"\1", b""))
    assert isinstance(state, Awaiting)
    return state


def test_second_unmask_second_upload_and_replayed_round() -> None:
    plan, party = make_plan(1), make_parties(1)["c001"]
    ready = advance(party)
    values, weight = make_updates(plan)["c001"]
    uploaded, _ = ready.upload(values, weight)
    with pytest.raises(errors.UpdateReusedError, match="round 1"):
        ready.upload(values, weight)
    agreed, (consistent,) = uploaded.on(m.SurvivorList(plan.run, 1, b"\1"))
    assert isinstance(consistent, m.Consistent)
    signers = (m.Signed("c001", consistent.signature),)
    request = m.UnmaskRequest(plan.run, 1, signers)
    revealed, _ = agreed.on(request)
    with pytest.raises(errors.SecondUnmaskError):
        revealed.on(request)
    with pytest.raises(errors.ReplayError, match="not after round 1"):
        start(party, plan)


def test_a_nan_update_is_refused_before_anything_is_claimed() -> None:
    plan, party = make_plan(1), make_parties(1)["c001"]
    values, weight = make_updates(plan)["c001"]
    ready = advance(party)
    with pytest.raises(errors.UpdateError, match="lower the learning rate"):
        ready.upload({**values, "ctx": np.full((3, 5), np.nan)}, weight)
    ready.upload(values, weight)


def test_the_survivor_list_is_on_record_before_its_signature_leaves() -> None:
    class Broken(MemoryJournal):
        def record_survivors(self, *args: Any) -> None:
            raise OSError("disk full")

    plan = make_plan(1)
    party = dataclasses.replace(make_parties(1)["c001"], journal=Broken())
    uploaded, _ = advance(party).upload(*make_updates(plan)["c001"])
    with pytest.raises(OSError, match="disk full"):
        uploaded.on(m.SurvivorList(plan.run, 1, b"\1"))


BAD_PLANS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unsorted cohort": ({"cohort": ("c002", "c001", "c003", "c004", "c005")}, errors.PlanError, "sorted"),
    "unknown member": (
        {"cohort": ("c001", "c002", "c003", "c004", "zed")}, errors.RosterError, "zed"),
    "server in the cohort": (
        {"cohort": ("c001", "c002", "c003", "c004", "server")}, errors.RosterError, "server"),
    "other roster": ({"roster_digest": bytes(32)}, errors.RosterMismatchError, "same roster"),
    "protection unknown": ({"protection": "hope"}, errors.PlanError, "hope"),
    "protection not allowed": ({"protection": "none", "key": bytes(32)}, errors.PolicyError, "protections"),
    "threshold apart from quorum": ({"threshold": 3}, errors.PlanError, "differ"),
    "too few survivors": ({"quorum": 2, "threshold": 2}, errors.PlanError, "at least 4"),
    "a smaller federation": (
        {"members": 3, "cohort": ("c001", "c002", "c003"), "quorum": 3, "threshold": 3},
        errors.PolicyError, "policy.colluders asks for 2"),
    "201 attempts": ({"attempt": 201}, errors.PlanError, "at most 200"),
    "t too small": ({"quorum": 3, "threshold": 3}, errors.PlanError, "quorum 3 and cohort 5"),
    "degree odd": ({"degree": 3, "quorum": 4}, errors.PlanError, "degree"),
    "regular graph": ({"degree": 2, "threshold": 3}, errors.PolicyError, "graphs"),
    "weights too large for the ring": ({"max_weight": 2**31}, errors.PlanError, "bound"),
    "zero clip": ({"clip": 0.0}, errors.PlanError, "clip"),
    "too many rounds": ({"rounds": 5000}, errors.PolicyError, "max_rounds"),
    "round beyond the run": ({"learning_round": 3}, errors.PlanError, "learning round"),
    "we are not in it": ({"cohort": ("c002", "c003", "c004", "c005")}, errors.UnexpectedMessageError, "c001"),
    "updates in an evaluation": ({"learning_round": 2}, errors.PlanError, "evaluation"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_plans(case: str) -> None:
    changes, error, words = BAD_PLANS[case]
    party = make_parties(N, Policy())["c001"]
    plan = make_plan(N)
    with pytest.raises(error, match=words):
        start(party, dataclasses.replace(plan, **changes))
    start(party, plan)  # a refusal leaves no trace: the good plan is accepted


def test_overflowing_layout_is_refused() -> None:
    plan = make_plan(N)
    wide = dataclasses.replace(plan.layout[0], frac=24)
    with pytest.raises(errors.OverflowPlanError, match="can exceed"):
        dataclasses.replace(plan, layout=(wide, *plan.layout[1:])).check()


def test_colluders_and_small_cohorts() -> None:
    policy = Policy(min_survivors=1, min_threshold=1)
    with pytest.raises(
        errors.PolicyError, match=r"tolerates 3 colluders, .*asks for 4 \(9 clients"
    ):
        policy.check_plan(make_plan(6), 9)
    policy.check_plan(make_plan(6), 6)
    with pytest.raises(errors.PolicyError, match=r"policy\.colluders asks for 4 "):
        Policy(colluders=4).check_plan(make_plan(6), 6)
    Policy(colluders=3).check_plan(make_plan(6), 9)
    with pytest.raises(errors.PolicyError, match="attempt 3000"):
        policy.check_plan(make_plan(6, round=3000), 6)
    with pytest.raises(errors.PolicyError, match="min_cohort"):
        Policy().check_plan(make_plan(2), 2)


def test_lists_of_one_prompt_must_not_isolate_a_few() -> None:
    everybody = tuple("abcdefghij")
    check_isolation(everybody, [], 3)
    check_isolation(everybody, [everybody], 3)
    with pytest.raises(errors.IsolationError, match="single out j: at least 5 clients"):
        check_isolation(everybody[:-1], [everybody], 3)
    check_isolation(everybody[:5], [everybody], 3)
    with pytest.raises(errors.IsolationError, match="single out g, h, i, j: at least 5"):
        check_isolation(everybody[:6], [everybody], 3)
    with pytest.raises(errors.IsolationError):  # pairs differ by five, the three together by less
        check_isolation(everybody[3:8], [everybody, everybody[:5]], 3)
    check_isolation(everybody[:5], [everybody, everybody[5:]], 3)


def test_a_sybil_with_a_stolen_name_is_not_on_the_roster() -> None:
    fake = Identity.generate()
    member = Member.of(fake, "c002", "client")
    with pytest.raises(errors.RosterError, match="c002"):
        roster(N).add(member)
    stolen = dataclasses.replace(Member.of(identity("c002"), "c002", "client"), name="c009")
    with pytest.raises(errors.RosterError, match="does not verify"):
        Roster.of((stolen,))


def test_policy_of_tests_is_wider_than_the_default() -> None:
    """The other tests run under OPEN; the default must refuse what they use."""
    entropy_from("unused")
    with pytest.raises(errors.PolicyError):
        Policy().check_plan(make_plan(1), 1)
    OPEN.check_plan(make_plan(1), 1)


@pytest.mark.parametrize(
    ("named", "code"),
    [("RosterMismatchError", 7), ("MismatchError", 7), ("NotOnRosterError", 4),
     ("KeyInUseError", 14), ("TooFewClientsError", 8), ("KeyFileError", 8), ("SystemExit", 8)],
)  # fmt: skip
def test_a_servers_refusal_ends_with_the_code_of_the_table(named: str, code: int) -> None:
    """And only with one that a server may name."""
    error = refusal(m.Refused(named, "because of it"))
    assert (error.exit_code, str(error)) == (code, "server refuses us: because of it")
