"""What server, helper and owners of a secure selection refuse, and whose fault it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from federation import World
from rounds import OPEN, identity, make_plan, names
from selecting import (
    GROUPS,
    SECURE,
    SHAPES,
    SLOTS,
    Grouped,
    altered,
    expected_choices,
    federate,
    flipped,
    only,
    rounds,
    tampered,
)  # fmt: skip

from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import ConfigError, PlanError
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.layout import FILLED, Field, TensorSpec
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.selection.task import Selection
from secure_fedprompt.protocol.settings import FedMGPSettings
from secure_fedprompt.server.settings import ServerSettings, check_settings


def test_settings_that_do_not_fit_are_refused() -> None:
    for changes, says in (
        ({"method": "promptfl", "weights": "samples"}, "selection = 'secure': promptfl"),
        ({"fedmgp": FedMGPSettings(rule="random")}, "rule 'random' compares no keys"),
        ({"selection": "client", "selection_scope": "federation"}, "need selection = 'secure'"),
        ({"selection": "client", "helper": "c001"}, "need selection = 'secure'"),
        ({"selection_keep": 3}, "selection_keep = 3: needs selection_scope = 'federation'"),
        ({"fedmgp": FedMGPSettings(groups=2, slots=3)}, "fedmgp.slots = 3: at most"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_settings(ServerSettings(**{**SECURE, **changes}))
    check_settings(ServerSettings(**SECURE))


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"selections": ()}, "the server wants 'secure', but policy.selections allows only none"),
        ({"selections": ("secure-federation",)}, "allows only secure-federation"),
        ({"helpers": ("c003",)}, "the server wants 'c001', but policy.helpers allows only c003"),
        (
            {"client_helpers": False},
            "the server wants 'c001', a client, as helper: name it in policy",
        ),
        ({"min_fillers": 4}, "the server plans 3 fillers, but policy.min_fillers is 4"),
    ],
)
def test_policies_limit_selections_and_helpers(
    tmp_path: Path, policy: dict[str, Any], says: str
) -> None:
    federation = {"selection_scope": "federation"} if "min_fillers" in policy else {}
    world = federate(tmp_path, **federation)
    strict = Policy(**{**{f: getattr(OPEN, f) for f in OPEN.__struct_fields__}, **policy})
    session = world.sessions["c002"]
    session.party = dataclasses.replace(session.party, policy=strict)
    world.pump()
    assert says in str(world.errors["c002"])
    assert Policy().selections == ()
    assert not Policy().client_helpers


def selecting_plan(**changes: Any) -> Any:
    ready = m.Ready(bytes(16), "c001", bytes(32), bytes(32), bytes(32), bytes(64))
    selection = Selection(1, 2, GROUPS, SLOTS, 0, 0, ready.name, ready.seal_key, ready.signature)
    tensors = tuple(TensorSpec(k, (SLOTS, *s)) for k, s in SHAPES.items())
    base: dict[str, Any] = {
        "learning_round": 2, "rounds": 3, "selection": selection, "max_weight": 1
    }  # fmt: skip
    return make_plan(4, tensors=tensors, **{**base, **changes})


def test_plans_that_contradict_their_selection_are_refused() -> None:
    selecting_plan().check()
    with pytest.raises(PlanError, match="a selection in learning round 1"):
        selecting_plan(learning_round=1).check()
    one = dataclasses.replace(selecting_plan().selection, modalities=1)
    with pytest.raises(PlanError, match="not the slots"):
        selecting_plan(selection=one).check()
    wide = dataclasses.replace(selecting_plan().selection, scope=2, keep=3, fillers=3)
    with pytest.raises(PlanError, match="counters of filled slots"):
        selecting_plan(selection=wide).check()
    sized = selecting_plan().layout
    counts = tuple(Field(FILLED + k, (SLOTS,), 1.0, 32, 0, 0) for k in SHAPES)
    selecting_plan(selection=wide, layout=sized + counts).check()
    heavy = selecting_plan(selection=wide, layout=sized + counts, uniform=0)
    with pytest.raises(PlanError, match="weights are not uniform"):
        heavy.check()
    odd = tuple(dataclasses.replace(f, shape=(SLOTS + 1,)) for f in counts)
    with pytest.raises(PlanError, match="not one for each slot"):
        selecting_plan(selection=wide, layout=sized + odd).check()
    narrow = dataclasses.replace(selecting_plan().selection, slots=3)
    with pytest.raises(PlanError, match="not the slots"):
        selecting_plan(selection=narrow).check()


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        (m.HelperOffer, lambda f: altered(f, offer=altered(f.offer, point=b"\1" + bytes(31))), "PointError"),
        (m.HelperOffer, lambda f: altered(f, offer=altered(f.offer, session=bytes(32))), "SessionError"),
        (m.HelperAnswer, lambda f: altered(f, answer=altered(f.answer, points=flipped(f.answer.points, 31)[:-32] + bytes(32))), "PointError"),
        (m.HelperChoices, lambda f: altered(f, choices=altered(f.choices, execution=1)), "TweakError"),
        (m.HelperChoices, lambda f: altered(f, choices=altered(f.choices, columns=b"")), "FieldError"),
        (m.HelperChoices, lambda f: altered(f, refused=("c009",)), "sent it nothing"),
        (m.HelperTables, lambda f: altered(f, tables=altered(f.tables, seed=bytes(32))), "GarblingError"),
        (m.HelperTables, lambda f: altered(f, tables=altered(f.tables, tables=f.tables.tables[:-1])), "GarblingError"),
        (m.HelperInputs, lambda f: altered(f, boxes=f.boxes[48:96] + f.boxes[:48] + f.boxes[96:]), "AdvertMismatchError"),
        (m.HelperInputs, lambda f: altered(f, owners=f.owners[1:], boxes=f.boxes[48:]), ""),
        (m.HelperInputs, lambda f: altered(f, owners=f.owners[:2], boxes=f.boxes[:96]), "AdvertMismatchError"),
        (m.HelperOutcome, lambda f: altered(f, boxes=f.boxes[:-1]), "FieldError"),
    ],
)  # fmt: skip
def test_what_either_party_must_refuse_aborts_the_round_and_the_run_goes_on(
    tmp_path: Path, kind: type, change: Any, says: str
) -> None:
    world = tampered(tmp_path, only(kind, change))
    assert world.run.error is None
    aborted = [r for r in rounds(world) if r["outcome"] == "aborted"]
    assert len(aborted) == 1
    faults = [text for kind_, text in world.events if kind_ in ("fault", "left")]
    assert any("c001" in text and says in text for text in faults), faults
    expected = expected_choices(world)
    finished = [n for n in names(4) if world.sessions[n].final is not None]
    assert len(finished) >= 3
    assert all(world.toys[name].choices[-1] == expected[name] for name in finished)


@pytest.mark.parametrize("who", ["c001", "c003"])
@pytest.mark.parametrize("protection", ["masks", "bfv"])
def test_a_client_whose_shares_do_not_open_is_left_out_and_named(
    tmp_path: Path, who: str, protection: str
) -> None:
    """A bad box is its sender's fault, not the helper's."""

    def spoil(sender: str, recipient: str, message: m.Message) -> m.Message:
        bad = isinstance(message, m.KeyShares) and sender == who
        return altered(message, box=bytes(48)) if bad else message

    world = tampered(tmp_path, spoil, helper="c002", protection=protection)
    assert world.run.error is None
    assert [r["outcome"] for r in rounds(world)] == ["done", "done"]
    assert list(rounds(world)[1]["dropped"]) == [who]
    faults = [text for kind, text in world.events if kind == "fault"]
    assert any(f"{who}: SealError: the helper could not open" in text for text in faults)
    expected = expected_choices(world)
    assert all(world.toys[n].choices[-1] == expected[n] for n in names(4) if n != who)


def test_a_helper_that_refuses_a_client_is_not_the_next_one(tmp_path: Path) -> None:
    """It may be the client's fault, or its own, which nobody can tell."""
    helpers: list[str] = []

    def refuse(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.HelperPlan):
            helpers.append(recipient)
        if isinstance(message, m.HelperInputs) and recipient == "c001":
            size = len(message.boxes) // 4
            return altered(
                message, boxes=message.boxes[: -2 * size] + bytes(size) + message.boxes[-size:]
            )
        return message

    world = tampered(tmp_path, refuse, rounds=4)
    assert helpers[0] == "c001"
    assert "c001" not in helpers[1:]
    assert rounds(world)[-1]["dropped"] == {}


def test_a_helper_that_makes_wrong_outcomes_is_replaced(tmp_path: Path) -> None:
    """Whoever opens such an outcome withdraws; the blame is the helper's."""

    def spoil(sender: str, recipient: str, message: m.Message) -> m.Message:
        bad = isinstance(message, m.HelperOutcome) and sender == "c001"
        return altered(message, boxes=bytes(len(message.boxes))) if bad else message

    world = World(tmp_path, 4, **SECURE)
    world.tamper, world.withdraws = spoil, True
    world.toys = {name: Grouped(i) for i, name in enumerate(names(4))}
    for name in names(4):
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert [r["outcome"] for r in rounds(world)] == ["done", "aborted", "done"]
    assert "c001" in world.run.unhelpful
    expected = expected_choices(world)
    assert all(world.toys[n].choices[-1] == expected[n] for n in names(4))


def test_a_helper_whose_own_keys_come_too_late_still_helps(tmp_path: Path) -> None:
    world = federate(tmp_path, 5)
    kept: list[Any] = []

    def late(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.KeyShares) and sender == "c001" and not kept:
            kept.append(message)
            return m.Alive()
        if isinstance(message, m.HelperTables) and len(kept) == 1:
            kept.append(None)
            world.send("c001", kept[0])
        return message

    world.tamper = late
    world.pump()
    assert world.run.error is None
    assert [r["outcome"] for r in rounds(world)] == ["done", "done"]
    assert list(rounds(world)[1]["dropped"]) == ["c001"]


def test_a_configured_helper_is_never_benched(tmp_path: Path) -> None:
    world = federate(tmp_path, helper="c001")
    world.run.benched = {"c001"}
    world.pump()
    assert world.run.error is None
    assert rounds(world)[1]["outcome"] == "done"


def test_frames_for_a_helper_outside_a_round_are_ignored(tmp_path: Path) -> None:
    world = federate(tmp_path)
    frames: list[Any] = []
    world.pump(until=lambda w, x: isinstance(x, m.HelperInputs) and not frames.append(x))
    session = world.sessions["c001"]
    session.hello()
    assert session.on(frames[0]) == []


def test_repeated_refusals_of_outcomes_end_the_client(tmp_path: Path) -> None:
    """Each tells the server one bit: three in a row are enough."""

    def flip(sender: str, recipient: str, message: m.Message) -> m.Message:
        wrong = isinstance(message, m.Outcome) and recipient == "c003"
        return altered(message, share=flipped(message.share)) if wrong else message

    world = World(tmp_path, 5, **{**SECURE, "rounds": 8})
    world.tamper, world.withdraws = flip, True
    world.toys = {name: Grouped(i) for i, name in enumerate(names(5))}
    for name in names(5):
        world.join(name)
    world.pump()
    assert isinstance(world.errors["c003"], errors.GarblingError)
    assert world.toys["c003"].trained == 3
    told = [text for _, text in world.events if isinstance(text, str) and "c003: withdrew" in text]
    assert told
    assert all("order" not in text for text in told)  # not what was wrong with it


def test_refusals_in_one_learning_round_add_up(tmp_path: Path) -> None:
    """The server has an upload in between, and gives that attempt up: keys stay the same in all."""
    world, told = World(tmp_path, 5, **{**SECURE, "max_attempts": 0}), list[str]()

    def flip(sender: str, recipient: str, message: m.Message) -> m.Message:
        wrong = isinstance(message, m.Outcome) and recipient == "c003" and len(told) % 3 != 2
        return altered(message, share=flipped(message.share)) if wrong else message

    world.tamper, world.withdraws, original = flip, True, world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        current = world.run.current
        answers = sender == "c003" and isinstance(message, m.Withdraw | m.MaskedUpload)
        if answers and current and current.plan.selecting:
            told.append(type(message).__name__)
            return world.run._after(current._abort("once more"), now)
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    world.toys = {name: Grouped(i) for i, name in enumerate(names(5))}
    for name in names(5):
        world.join(name)
    world.pump()
    assert told == ["Withdraw", "Withdraw", "MaskedUpload"]
    assert isinstance(world.errors["c003"], errors.GarblingError)


def test_settings_that_cannot_work_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="helper = 'nobody'"):
        federate(tmp_path / "a", helper="nobody")
    with pytest.raises(ConfigError, match="5 fillers of a slot from 4 clients"):
        federate(tmp_path / "b", selection_scope="federation", selection_fillers=5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: altered(f, box=flipped(f.box)), "SealError"),
        (lambda f: altered(f, share=flipped(f.share)), "GarblingError"),
        (lambda f: altered(f, share=b""), "FieldError"),
    ],
)
def test_an_altered_outcome_costs_its_owner_the_round(
    tmp_path: Path, change: Any, says: str
) -> None:
    world = tampered(tmp_path, only(m.Outcome, change, "c003"))
    second = next(r for r in rounds(world) if r["learning_round"] == 2)
    assert second["outcome"] == "done"
    assert list(second["dropped"]) == ["c003"]
    told = [str(v) for k, v in world.events if k in ("fault", "left")] + [str(world.errors)]
    assert any(says in text for text in told)


def test_an_outcome_of_another_owner_does_not_open(tmp_path: Path) -> None:
    boxes: dict[str, Any] = {}

    def swap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Outcome):
            boxes.setdefault(recipient, message)
            if recipient == "c003" and "c002" in boxes:
                return boxes["c002"]  # type: ignore[no-any-return]
        return message

    world = tampered(tmp_path, swap)
    second = next(r for r in rounds(world) if r["learning_round"] == 2)
    assert list(second["dropped"]) == ["c003"]
    assert any("SealError" in str(v) for _, v in world.events)


def test_a_helper_refuses_a_second_selection_of_a_round_and_a_foreign_plan(tmp_path: Path) -> None:
    world = federate(tmp_path, helpers=("notary",), helper="notary")
    plans: list[m.HelperPlan] = []
    world.pump(until=lambda w, x: isinstance(x, m.HelperPlan) and not plans.append(x))
    session, (plan,) = world.sessions["notary"], plans

    def refused(message: m.Message) -> str:
        (reply,) = session.on(message)
        assert isinstance(reply, m.Withdraw)
        return f"{reply.error}: {reply.reason}"

    foreign = altered(plan.plan, selection=altered(plan.plan.selection, helper="c001"))  # type: ignore[arg-type]
    assert "not one of the terms'" in refused(altered(plan, plan=foreign))

    class AnyPlan:
        def admit(self, plan: Any) -> None:
            pass

    session._terms = AnyPlan()  # what the helper refuses even if the terms allowed it
    assert "does not name us" in refused(altered(plan, plan=foreign))
    strict = dataclasses.replace(session.party, policy=Policy())
    session._helper.party = strict
    assert "min_cohort" in refused(
        altered(plan, plan=altered(plan.plan, cohort=names(1), members=1, quorum=1, threshold=1))
    )  # type: ignore[arg-type]
    other = altered(plan.plan, run=b"r" * 16)  # type: ignore[arg-type]
    assert (
        session.on(altered(plan, run=other.run, plan=other)) == []
    )  # not the run that welcomed us
    assert "another round than its frame" in refused(altered(plan, plan=other))
    stranger = altered(plan.plan, cohort=("c001", "c002", "c003", "zoe"))  # type: ignore[arg-type]
    assert "'zoe' is not a client" in refused(altered(plan, plan=stranger))
    assert isinstance(session.on(plan)[0], m.HelperOffer)
    assert "ReplayError: a second selection" in refused(plan)
    session._helper._begin(altered(plan, run=other.run, plan=other))  # even if it were: no way back
    assert "ReplayError: a second selection" in refused(plan)
    assert session.on(m.HelperInputs(plan.run, plan.round, (), b"")) == []  # late


def test_a_client_takes_no_helper_key_that_its_owner_did_not_sign(tmp_path: Path) -> None:
    def forge(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Plan) and message.plan.selecting and recipient == "c002":
            public = b"\t" + bytes(31)
            body = m.Ready(message.plan.run, "c001", public, bytes(32), bytes(32), bytes(64))
            signature = identity("server").sign(
                Purpose.RUN_KEY, body.body(message.plan.roster_digest)
            )
            chosen = altered(
                message.plan.selection, helper_key=body.seal_key, helper_signature=signature
            )  # type: ignore[arg-type]
            return altered(message, plan=altered(message.plan, selection=chosen))  # type: ignore[arg-type]
        return message

    world = tampered(tmp_path, forge)
    faults = [text for kind, text in world.events if kind in ("fault", "left")]
    told = "signature of c001 on its run key does not verify"  # not that of an advert, later
    assert any("c002" in text and told in text for text in faults), faults
    assert world.toys["c002"].trained == 0
