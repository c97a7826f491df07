"""Secure selection inside rounds: same choice as in the clear, dropouts, refusals, and views."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import World
from rounds import OPEN, identity, make_plan, names

from secure_fedprompt.clients.session import Work
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import Prompt
from secure_fedprompt.protocol.errors import ConfigError, PlanError
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.layout import FILLED, Field, TensorSpec
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.selection import shares
from secure_fedprompt.protocol.selection.task import Selection
from secure_fedprompt.protocol.settings import FedMGPSettings, MethodSettings, ServerSettings
from secure_fedprompt.server.coordinator import Stage
from secure_fedprompt.server.planning import check_settings

GROUPS, SLOTS, SHAPES = 4, 2, {"text": (3,), "visual": (5,)}
SECURE: dict[str, Any] = {
    "method": "fedmgp", "weights": "uniform", "selection": "secure", "rounds": 2, "metrics": False,
    "fedmgp": FedMGPSettings(groups=GROUPS, slots=SLOTS),
}  # fmt: skip


class Grouped:
    """A workload of fixed groups and keys: round 1 sends the first groups."""

    model_fingerprint, classes_digest, class_count = b"m" * 32, b"c" * 32, 7

    def __init__(self, seed: int, keys: np.ndarray | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.groups = {k: rng.uniform(-0.4, 0.4, (GROUPS, *s)) for k, s in SHAPES.items()}
        drawn = rng.integers(0, 2**32, (2, GROUPS)).astype(np.uint32)
        self.keys = drawn if keys is None else keys
        self.choices: list[Any] = []
        self.trained = 0

    def prepare(self, settings: MethodSettings) -> None:
        self.settings = settings

    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(k, (SLOTS, *s)) for k, s in SHAPES.items())

    def initial(self) -> Prompt:
        return np.full(16, 0.25, np.float32)

    def run(self, work: Work) -> Any:
        if work.plan.selecting and work.choice is None:
            self.trained += 1
            return self.keys
        choice = work.choice or (np.arange(SLOTS),) * 2
        self.choices.append([c.tolist() for c in choice])
        values, at = {}, 0
        for (name, shape), chosen in zip(SHAPES.items(), choice, strict=True):
            size = SLOTS * int(np.prod(shape))
            base = work.base[at : at + size].reshape(SLOTS, *shape)
            at += size
            values[name] = np.zeros_like(base)
            sent = self.groups[name][chosen]
            values[name][: len(chosen)] = sent + 1e-3 * work.plan.round - base[: len(chosen)]
            if work.plan.selection.federation:
                values[FILLED + name] = (np.arange(SLOTS) < len(chosen)).astype(np.float64)
        return values, 1.0


def federate(folder: Path, n: int = 4, helpers: tuple[str, ...] = (), **changes: Any) -> World:
    world = World(folder, n, helpers=helpers, **{**SECURE, **changes})
    world.toys = {name: Grouped(i) for i, name in enumerate(names(n))}
    for name in (*names(n), *helpers):
        world.join(name)
    return world


def expected_choices(world: World, keep: int = 0, fillers: int = 3) -> dict[str, list[list[int]]]:
    """By the plain sort: each client's own best, or as many of them as are among the best of all,
    in slots that enough clients fill."""
    own = {name: shares.order(toy.keys) for name, toy in world.toys.items()}
    if not keep:
        return {name: best[:, :SLOTS].tolist() for name, best in own.items()}
    found: dict[str, list[list[int]]] = {name: [] for name in world.toys}
    for modality in range(2):
        flat = np.concatenate([toy.keys[modality] for toy in world.toys.values()])
        winners = shares.order(flat)[:keep] // GROUPS
        counts = [min(SLOTS, int((winners == i).sum())) for i in range(len(world.toys))]
        opened = sum(sum(c > k for c in counts) >= fillers for k in range(SLOTS))
        for name, count in zip(world.toys, counts, strict=True):
            found[name].append(own[name][modality][: min(count, opened)].tolist())
    return found


def slots_of(world: World, prompt: np.ndarray) -> dict[str, np.ndarray]:
    found, at = {}, 0
    for name, shape in SHAPES.items():
        size = SLOTS * int(np.prod(shape))
        found[name] = prompt[at : at + size].reshape(SLOTS, *shape)
        at += size
    return found


def rounds(world: World) -> list[dict[str, Any]]:
    return [value for kind, value in world.events if kind == "round"]


@pytest.mark.parametrize("protection", ["masks", "bfv", "ckks", "none"])
@pytest.mark.parametrize(("scope", "keep"), [("client", 0), ("federation", 8)])
def test_the_circuit_chooses_what_the_plain_sort_does_and_slots_are_its_means(
    tmp_path: Path, protection: str, scope: str, keep: int
) -> None:
    world = federate(tmp_path, protection=protection, selection_scope=scope, selection_keep=keep)
    world.pump()
    if keep:  # clients fill different numbers of slots
        shown = [len(c) for choice in expected_choices(world, keep).values() for c in choice]
        assert len(set(shown)) > 1
    assert not world.errors
    assert world.run.error is None
    expected = expected_choices(world, keep)
    assert {name: toy.choices[1] for name, toy in world.toys.items()} == expected
    first = {
        k: np.mean([t.groups[k][:SLOTS] for t in world.toys.values()], 0) + 1e-3 for k in SHAPES
    }
    final = slots_of(world, world.sessions["c001"].final)
    for i, name in enumerate(SHAPES):
        for slot in range(SLOTS):
            sent = [
                world.toys[c].groups[name][expected[c][i][slot]] + 2e-3
                for c in world.toys if len(expected[c][i]) > slot
            ]  # fmt: skip
            mean = np.mean(sent, 0) if sent else first[name][slot]
            assert np.allclose(final[name][slot], mean, atol=1e-5)


def test_a_slot_that_nobody_fills_keeps_its_value(tmp_path: Path) -> None:
    world = federate(tmp_path, selection_scope="federation", selection_keep=1, selection_fillers=1)
    world.pump()
    first = {
        k: np.mean([t.groups[k][:SLOTS] for t in world.toys.values()], 0) + 1e-3 for k in SHAPES
    }
    final = slots_of(world, world.sessions["c002"].final)
    expected = expected_choices(world, 1, 1)
    for i, name in enumerate(SHAPES):
        assert np.allclose(final[name][1], first[name][1], atol=1e-5)
        (owner, group), = ((c, e[i][0]) for c, e in expected.items() if e[i])  # fmt: skip
        assert np.allclose(final[name][0], world.toys[owner].groups[name][group] + 2e-3, atol=1e-5)


def test_a_slot_of_too_few_fillers_is_closed_to_all(tmp_path: Path) -> None:
    """Two of four clients hold all of the largest keys: with three fillers asked, nobody sends."""
    world = federate(tmp_path, selection_scope="federation", selection_keep=4)
    for name, toy in world.toys.items():
        toy.keys[:] = 2**31 + toy.keys // 2 if name in ("c001", "c003") else toy.keys // 2
    world.pump()
    assert all(toy.choices[1] == [[], []] for toy in world.toys.values())
    final, shown = world.sessions["c002"].final, rounds(world)
    first = [t.groups[k][:SLOTS] for k in SHAPES for t in world.toys.values()]
    mean = np.concatenate([np.mean(first[:4], 0).reshape(-1), np.mean(first[4:], 0).reshape(-1)])
    assert np.allclose(final, mean + 1e-3, atol=1e-5)
    assert shown[1]["outcome"] == "done"


# -- who is lost ---------------------------------------------------------------------------------


@pytest.mark.parametrize("protection", ["masks", "bfv"])
@pytest.mark.parametrize("kind", [*m.TO_HELPER, *m.FROM_HELPER])
def test_a_helper_lost_at_any_message_is_replaced(
    tmp_path: Path, kind: type, protection: str
) -> None:
    world = federate(tmp_path, 5, protection=protection)
    world.pump(until=lambda w, message: isinstance(message, kind))
    world.lost.add("c001")
    world.pump()
    assert world.run.error is None
    aborted = [r for r in rounds(world) if r["outcome"] == "aborted"]
    assert len(aborted) == 1
    assert "helper c001 failed" in aborted[0]["reason"]
    expected = expected_choices(world)
    for name in names(5)[1:]:
        assert world.toys[name].choices[-1] == expected[name]
    late = kind in (m.HelperInputs, m.HelperChoices, m.HelperTables, m.HelperOutcome)
    assert world.toys["c002"].trained == 2 or not late  # everything anew, keys and shares included


@pytest.mark.parametrize("protection", ["masks", "bfv", "none"])
@pytest.mark.parametrize("kind", [m.KeyShares, m.HelperChoices, m.Outcome])
def test_a_client_lost_around_the_selection_costs_nothing(
    tmp_path: Path, kind: type, protection: str
) -> None:
    world = federate(tmp_path, 5, protection=protection)

    def lose(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, kind):
            world.lost.add("c005")
        return message

    world.tamper = lose
    world.pump()
    assert world.run.error is None
    assert [r["outcome"] for r in rounds(world)] == ["done", "done"]
    assert list(rounds(world)[1]["dropped"]) == ["c005"]
    expected = expected_choices(world)
    assert all(world.toys[name].choices[-1] == expected[name] for name in names(4))


def test_a_helper_process_of_its_own_helps_and_takes_part_in_no_sum(tmp_path: Path) -> None:
    world = federate(tmp_path, helpers=("notary",), helper="notary")
    world.pump()
    assert world.run.error is None
    assert world.sessions["notary"].helped == 1
    assert world.sessions["notary"].over
    assert [r["metrics"]["contributors"] for r in rounds(world)] == [4, 4]


def test_a_helper_process_can_reconnect_between_rounds(tmp_path: Path) -> None:
    world = federate(tmp_path, helpers=("notary",), helper="notary", rounds=3)
    world.pump(until=lambda w, message: isinstance(message, m.Outcome))
    world.join("notary")  # restarted: another run key
    world.pump()
    assert world.run.error is None
    assert world.sessions["notary"].helped >= 1


def test_without_its_configured_helper_the_run_waits_and_then_says_so(tmp_path: Path) -> None:
    world = federate(tmp_path, helpers=("notary",), helper="notary")
    world.lost.add("notary")
    world.pump()
    assert "helper 'notary' is not there: start it" in str(world.run.error)
    assert len(rounds(world)) == 1


def test_a_helper_lost_in_every_attempt_ends_the_run_with_a_reason(tmp_path: Path) -> None:
    world = federate(tmp_path, helpers=("notary",), helper="notary", max_attempts=2)

    def lose(w: World, message: m.Message) -> bool:
        if isinstance(message, m.HelperInputs):
            w.join("notary")
        return False

    world.pump(until=lose)
    assert "aborted 2 times: helper notary failed" in str(world.run.error)


# -- what is refused -----------------------------------------------------------------------------


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
        ({"selections": ()}, "plan wants 'secure', but policy.selections allows only none"),
        ({"selections": ("secure-federation",)}, "allows only secure-federation"),
        ({"helpers": ("c003",)}, "plan wants 'c001', but policy.helpers allows only c003"),
        ({"min_fillers": 4}, "plan has 3 fillers, but policy.min_fillers is 4"),
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


def selecting_plan(**changes: Any) -> Any:
    ready = m.Ready(bytes(16), "c001", bytes(32), bytes(32), bytes(64))
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


def altered(message: m.Message, **changes: Any) -> m.Message:
    return dataclasses.replace(message, **changes)  # type: ignore[type-var]


def flipped(data: bytes | memoryview, at: int = 0) -> bytes:
    data = bytes(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def tampered(folder: Path, tamper: Any, **changes: Any) -> World:
    """A federation whose frames are altered on their way."""
    world = World(folder, 4, **{**SECURE, **changes})
    world.tamper = tamper
    world.toys = {name: Grouped(i) for i, name in enumerate(names(4))}
    for name in names(4):
        world.join(name)
    world.pump()
    return world


def only(kind: type, change: Any, who: str = "") -> Any:
    """A tamperer of frames of one kind in the first attempt at the second round."""

    def tamper(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, kind) and message.round == 2 and (not who or recipient == who):  # type: ignore[attr-defined]
            return change(message)  # type: ignore[no-any-return]
        return message

    return tamper


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        (m.HelperOffer, lambda f: altered(f, offer=altered(f.offer, point=b"\1" + bytes(31))), "PointError"),
        (m.HelperOffer, lambda f: altered(f, offer=altered(f.offer, session=bytes(32))), "SessionError"),
        (m.HelperAnswer, lambda f: altered(f, answer=altered(f.answer, points=flipped(f.answer.points, 31)[:-32] + bytes(32))), "PointError"),
        (m.HelperChoices, lambda f: altered(f, choices=altered(f.choices, execution=1)), "TweakError"),
        (m.HelperChoices, lambda f: altered(f, choices=altered(f.choices, columns=b"")), "FieldError"),
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
            world.queue.append(("c001", "", kept[0]))
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
    assert "does not name us" in refused(altered(plan, plan=foreign))
    strict = dataclasses.replace(session.party, policy=Policy())
    session._helper.party = strict
    assert "min_cohort" in refused(
        altered(plan, plan=altered(plan.plan, cohort=names(1), quorum=1, threshold=1))
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
            body = m.Ready(message.plan.run, "c001", b"\t" + bytes(31), bytes(32), bytes(64))
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
    assert any("c002" in text and "SignatureError" in text for text in faults), faults
    assert world.toys["c002"].trained == 0


# -- views ---------------------------------------------------------------------------------------


class Recorded:
    """Frames of a round's selection, by who sees them."""

    def __init__(self, folder: Path, keys: np.ndarray, rounds: int = 3) -> None:
        world = World(folder, 3, helpers=("notary",),
                      **{**SECURE, "rounds": rounds, "helper": "notary"})  # fmt: skip
        world.toys = {name: Grouped(i, keys) for i, name in enumerate(names(3))}
        for name in (*names(3), "notary"):
            world.join(name)
        self.shares: list[np.ndarray] = []
        self.server: list[bytes] = []
        self.helper: list[bytes] = []
        self.world = world

        def watch(w: World, message: m.Message) -> bool:
            match message:
                case m.KeyShares():
                    self.shares.append(np.frombuffer(message.share, "<u4").reshape(2, GROUPS))
                    self.server.append(bytes(message.share) + bytes(message.box))
                case m.HelperChoices():
                    self.server.append(bytes(message.choices.columns))
                case m.HelperOutcome():
                    self.server.append(bytes(message.boxes))
                case m.HelperTables():
                    g = message.tables
                    self.helper.append(bytes(g.seed) + bytes(g.tables) + bytes(g.checks))
                case m.HelperInputs():
                    self.helper.append(bytes(message.boxes))
            return False

        world.pump(until=watch)
        assert world.run.error is None


LOW = np.zeros((2, GROUPS), np.uint32)
HIGH = np.full((2, GROUPS), 2**32 - 1, np.uint32)


def looks_uniform(data: bytes) -> bool:
    """Chi-square over byte values; 400 is 6.4 deviations above the mean of 255."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return bool(((counts - expected) ** 2 / expected).sum() < 400)


def test_neither_view_depends_on_the_keys(tmp_path: Path) -> None:
    """All keys equal and extreme: whatever depends on them would repeat or have a pattern."""
    for name, keys in (("low", LOW), ("high", HIGH)):
        seen = Recorded(tmp_path / name, keys)
        assert looks_uniform(b"".join(seen.server))
        assert looks_uniform(b"".join(seen.helper))
        words = np.stack(seen.shares).astype(np.int64)  # (clients x rounds, modality, group)
        assert len(words) == 6
        assert len(np.unique(words)) == words.size
        text, visual = words[:, 0].reshape(-1), words[:, 1].reshape(-1)
        joint = [text - visual, text + visual, words[:3].reshape(-1) - words[3:].reshape(-1)]
        for difference in joint:  # a seed used twice would make these equal or zero
            low = (difference % 2**32).astype("<u4")
            assert len(np.unique(low)) == low.size
            assert abs(np.unpackbits(low.view(np.uint8)).mean() - 0.5) < 5 * 0.5 / np.sqrt(
                8 * low.nbytes
            )


def test_sizes_do_not_depend_on_the_keys(tmp_path: Path) -> None:
    low, high = Recorded(tmp_path / "a", LOW), Recorded(tmp_path / "b", HIGH)
    assert [len(x) for x in low.server] == [len(x) for x in high.server]
    assert [len(x) for x in low.helper] == [len(x) for x in high.helper]


def test_nothing_random_comes_twice_in_rounds_and_attempts(tmp_path: Path) -> None:
    world = federate(tmp_path, 5, rounds=3)
    sent: dict[str, list[bytes]] = {}

    def watch(w: World, message: m.Message) -> bool:
        match message:
            case m.HelperOffer():
                parts = {"session": message.offer.session, "point": message.offer.point}
            case m.HelperAnswer():
                parts = {"answer": bytes(message.answer.points)[:32]}
            case m.HelperTables():
                parts = {"seed": message.tables.seed, "row": bytes(message.tables.tables)[:16]}
            case m.KeyShares():
                parts = {"share": bytes(message.share), "box": bytes(message.box)}
            case m.HelperChoices():
                parts = {"columns": bytes(message.choices.columns)[:32]}
            case m.Outcome():
                parts = {"outcome": bytes(message.box)}
            case _:
                return False
        for what, data in parts.items():
            sent.setdefault(what, []).append(data)
        return False

    world.pump(until=lambda w, x: watch(w, x) or isinstance(x, m.HelperTables))
    world.lost.add("c001")  # the first attempt at round 2 aborts
    world.pump(until=watch)
    assert world.run.error is None
    assert len(sent["seed"]) == 3
    for what, values in sent.items():
        assert len(set(values)) == len(values), what


def test_the_helpers_share_of_an_outcome_is_noise_to_everybody_else(tmp_path: Path) -> None:
    """The server's share of the same outcome differs from run to run: it is half of a secret."""
    halves = []
    for i in range(8):
        world = World(tmp_path / str(i), 3, **SECURE)
        world.clock = float(i)
        world.start_server()
        world.toys = {name: Grouped(k, LOW) for k, name in enumerate(names(3))}
        for name in names(3):
            world.join(name)

        def watch(w: World, message: m.Message) -> bool:
            if isinstance(message, m.Outcome):
                halves.append(bytes(message.share))
            return False

        world.pump(until=watch)
    bits = np.unpackbits(np.frombuffer(b"".join(halves), np.uint8))
    assert len(halves) == 24
    assert len(set(halves)) > 12
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))


def test_stages_are_named_in_the_record(tmp_path: Path) -> None:
    world = federate(tmp_path)
    world.pump()
    assert {Stage.SELECTING, Stage.EVALUATING} <= set(rounds(world)[1]["seconds"])
    assert not {Stage.SELECTING, Stage.EVALUATING} & set(rounds(world)[0]["seconds"])


def test_errors_reach_no_secret(tmp_path: Path) -> None:
    world = federate(tmp_path)
    world.pump(until=lambda w, x: isinstance(x, m.HelperTables))
    selector = world.run.current._selector  # type: ignore[union-attr]
    for shown in (repr(selector._garbler), repr(world.sessions["c001"]._helper._work.evaluator)):
        assert "private" in shown
    assert issubclass(errors.GarblingError, errors.SelectionError)
