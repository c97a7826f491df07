"""A server that tells something else than the sum, under masks: it worked, and is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rounds import (
    SUMS,
    entropy_from,
    later,
    make_parties,
    make_plan,
    make_updates,
    names,
    vouched,
)
from rounds import plain_sum as reference

from secure_fedprompt.clients.rounds.masks import MaskedAwaiting
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.clients.rounds.unmasking import Revealed
from secure_fedprompt.memory import SimulatedRound, run_round
from secure_fedprompt.protocol import errors, fixedpoint, mersenne, sum_tag
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import add_masks, keystream
from secure_fedprompt.protocol.messages import CATALOGUE
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.sum_tag import TagKey
from secure_fedprompt.server.rounds.base import Stage

Change = Callable[[RoundPlan, m.OpenedSum], dict[str, Any]]
N = 4


def moved(plan: RoundPlan, told: m.OpenedSum) -> bytes:
    """The same sum, but that one value of the update is larger by one step."""
    words = np.zeros(sum(field.size for field in plan.layout), np.uint32)
    fixedpoint.add_wire(plan.layout, told.vector, words)
    words[3] += 1
    return fixedpoint.to_wire(plan.layout, words)


FORGED: dict[str, Change] = {
    "a changed average": lambda plan, told: {"vector": moved(plan, told)},
    "a prompt of its own": lambda plan, told: {"vector": bytes(len(told.vector))},
    "another tag": lambda plan, told: {"tag": bytes(15) + b"\x01"},
    "a tag that is none": lambda plan, told: {"tag": b"\xff" * 16},
    "fewer members": lambda plan, told: {"members": b"\x07"},
    "no members": lambda plan, told: {"members": b"\x00"},
    "members beyond the cohort": lambda plan, told: {"members": b"\x1f"},
    "nobody's sum, which is nothing": lambda plan, told: {
        "vector": bytes(len(told.vector)),
        "tag": bytes(16),
        "members": b"\x00",
    },
    "members of a larger cohort": lambda plan, told: {"members": b"\x0f\x00"},
    "a cut vector": lambda plan, told: {"vector": told.vector[:-1]},
}


def told(
    plan: RoundPlan, change: Change, only: str = "", parties: Any = None, **options: Any
) -> tuple[SimulatedRound, dict[str, Any]]:
    """A round of a server that tells clients something else, all of them or one."""
    parties = make_parties(N) if parties is None else parties

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.OpenedSum) and only in ("", recipient):
            return dataclasses.replace(message, **change(plan, message))
        return message

    return run_round(plan, parties, make_updates(plan, 1), tap=tap, **options), parties


@pytest.mark.parametrize("what", FORGED)
def test_what_is_not_the_sum_is_refused(what: str) -> None:
    plan = make_plan(N)
    outcome, parties = told(plan, FORGED[what])
    assert {name: type(error) for name, error in outcome.errors.items()} == dict.fromkeys(
        names(N), errors.SumError
    )
    assert not outcome.opened
    for party in parties.values():
        assert party.keyring.sums is None
        assert not party.journal.kept_key(plan.run)
        with pytest.raises(errors.SumError, match="over for this client"):
            start(party, later(plan, 9))


def test_the_sum_of_a_subset_is_refused_under_the_list_of_all() -> None:
    """And under any list but its own, also where the subset is what was signed."""
    plan = make_plan(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.OpenedSum):
            return dataclasses.replace(message, members=b"\x1f")
        return message

    gone = {"c005": Stage.COLLECTING}
    outcome = run_round(plan, make_parties(5), make_updates(plan), gone, tap)
    assert {type(error) for error in outcome.errors.values()} == {errors.SumError}
    assert set(outcome.errors) == set(names(4))


def test_who_lost_the_list_has_the_tag_to_go_by() -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message | None:
        if isinstance(message, m.SurvivorList) and recipient == "c001":
            return None
        if isinstance(message, m.OpenedSum) and recipient == "c001":
            return dataclasses.replace(message, members=b"\x17")
        return message

    plan = make_plan(5)
    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert set(outcome.errors) == {"c001"}
    assert "not the sum of what 4 clients tagged" in str(outcome.errors["c001"])


@pytest.mark.parametrize(
    ("members", "listed", "what"),
    [(b"\x03", True, "a sum of others"), (b"\x1e", True, "a sum of others"),
     (b"\x1e", False, "a sum of others"), (b"\x13", False, "of 3 clients")],
)  # fmt: skip
def test_a_sum_is_of_a_quorum_and_of_oneself_whatever_its_tag(
    monkeypatch: pytest.MonkeyPatch, members: bytes, listed: bool, what: str
) -> None:
    """Also to who has lost the list: a tag is no reason to take another."""
    monkeypatch.setattr(TagKey, "holds", lambda *_: True)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message | None:
        if not listed and isinstance(message, m.SurvivorList) and recipient == "c001":
            return None
        if isinstance(message, m.OpenedSum) and recipient == "c001":
            return dataclasses.replace(message, members=members)
        return message

    plan = make_plan(5)
    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert what in str(outcome.errors["c001"])
    assert isinstance(outcome.errors["c001"], errors.SumError)


def test_nobodys_sum_has_a_tag_that_anybody_could_make() -> None:
    key, nothing = SUMS.tags(make_plan(3)), np.zeros(3, np.int64)
    assert not key.holds((), nothing, np.zeros(2, np.uint64))
    assert (key.linear(nothing) == 0).all()


def test_who_has_checked_a_sum_takes_no_other_of_its_round() -> None:
    plan, parties, kept = make_plan(N), make_parties(N), list[m.OpenedSum]()
    run_round(plan, parties, make_updates(plan), tap=lambda s, r, x: (
        kept.append(x) or x if isinstance(x, m.OpenedSum) else x))  # fmt: skip
    party = parties["c002"]
    state = Revealed(party, plan, names(N))
    checked, _ = state.on(kept[0])
    again, _ = checked.report(b"prompt")  # type: ignore[attr-defined]
    again.on(kept[0])
    with pytest.raises(errors.SumError, match="others than those whose list"):
        again.on(dataclasses.replace(kept[0], members=b"\x07"))
    journal = parties["c003"].journal
    journal.note_made(plan.run, 2, b"1" * 32, own=False)
    journal.note_made(plan.run, 2, b"2" * 32, own=True)
    journal.note_made(plan.run, 2, b"2" * 32, own=False)
    assert journal.made(plan.run, 2) == (b"2" * 32, True)
    with pytest.raises(errors.OpenedError, match="a second prompt for learning round 2"):
        journal.note_made(plan.run, 2, b"3" * 32, own=True)


def test_who_was_told_a_sum_helps_to_open_no_other_of_its_prompt() -> None:
    """Also if it did not help to open that one."""
    plan, parties = make_plan(5), make_parties(5)
    outcome = run_round(plan, parties, make_updates(plan), tap=lambda s, r, x: (
        None if isinstance(x, m.UnmaskRequest) and r == "c002" else x))  # fmt: skip
    assert "c002" in outcome.opened
    with pytest.raises(errors.OpenedError, match="a second one could be subtracted"):
        start(parties["c002"], dataclasses.replace(plan, round=2, attempt=2))


def test_without_tags_a_crafted_prompt_would_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TagKey, "holds", lambda *_: True)
    plan = make_plan(N)
    outcome, _ = told(plan, FORGED["a prompt of its own"])
    assert not outcome.errors
    assert all((opened.integers == 0).all() for opened in outcome.opened.values())


def test_the_sum_of_another_round_is_refused() -> None:
    plan, parties = make_plan(N), make_parties(N)
    sums: list[m.OpenedSum] = []

    def keep(plan: RoundPlan, message: m.OpenedSum) -> dict[str, Any]:
        sums.append(message)
        return {}

    told(plan, keep, parties=parties)
    again = vouched(parties, later(plan, 2))
    outcome, _ = told(
        again, lambda _, honest: {"vector": sums[0].vector, "tag": sums[0].tag}, parties=parties
    )
    assert {type(error) for error in outcome.errors.values()} == {errors.SumError}
    assert set(outcome.errors) == set(names(N))


def test_who_is_told_something_else_than_the_rest_leaves_alone() -> None:
    plan = make_plan(N)
    outcome, parties = told(plan, FORGED["a changed average"], only="c002")
    assert set(outcome.errors) == {"c002"}
    assert set(outcome.opened) == {"c001", "c003", "c004"}
    assert parties["c002"].keyring.sums is None
    assert parties["c001"].keyring.sums is not None


def test_a_wrong_tag_of_one_client_is_refused_by_all_and_names_nobody() -> None:
    """It cannot be told from a server that lies: docs/sum-tags.md says so."""
    plan = make_plan(N)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.MaskedUpload) and sender == "c003":
            return dataclasses.replace(message, tag=bytes(16))
        return message

    outcome = run_round(plan, make_parties(N), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.DONE
    assert {type(e) for e in outcome.errors.values()} == {errors.SumError}
    assert set(outcome.errors) == set(names(N))
    assert not any("c003" in str(error) for error in outcome.errors.values())


def test_the_server_refuses_a_tag_that_is_none() -> None:
    plan = make_plan(N)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.MaskedUpload) and sender == "c003":
            return dataclasses.replace(message, tag=b"\xff" * 16)
        return message

    outcome = run_round(plan, make_parties(N), make_updates(plan), tap=tap)
    assert "FieldError: a tag of a sum" in outcome.round.faults["c003"]
    assert set(outcome.opened) == {"c001", "c002", "c004"}


# -- the tag is masked -----------------------------------------------------------------------------


def evaluation() -> RoundPlan:
    """A round of counters alone: few unknowns, whoever knows an equation solves it."""
    return make_plan(N, tensors=(), rounds=0, max_weight=1)


def guessed(plan: RoundPlan, tag: bytes, victim: str, mask: Any) -> list[tuple[int, int]]:
    """What a server and a client that gave it K, and the mask of the pair, find: counts of right
    answers and of images that a tag fits."""
    key = SUMS.tags(plan)
    target = mersenne.add(sum_tag.from_bytes(tag), mersenne.negative(mask))
    names_ = [field.name for field in plan.layout]
    found = []
    for seen, correct in itertools.product(range(1, 40), repeat=2):
        vector = np.zeros(len(names_), np.int64)
        for name, value in {
            "weight": 1, "contributors": 1, "seen": seen, "correct": correct,
        }.items():  # fmt: skip
            vector[names_.index(name)] = value
        if (key.tag(victim, vector) == target).all():
            found.append((seen, correct))
    return found


@pytest.mark.parametrize("masked", [True, False])
def test_a_tag_gives_the_server_and_a_client_no_equation_on_one_update(
    monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    if not masked:  # the attack works on a tag in the clear
        monkeypatch.setattr(sum_tag, "mask", lambda *_: np.zeros(sum_tag.TAGS, np.uint64))
    plan, colluder, victim = evaluation(), "c001", "c003"
    keys: dict[str, bytes] = {}
    plain = MaskedAwaiting._send

    def send(self: MaskedAwaiting, data: bytes) -> Any:
        if self.party.name == colluder:
            keys.update(self.pairs)
        return plain(self, data)

    monkeypatch.setattr(MaskedAwaiting, "_send", send)
    values = {"seen": np.float64(31), "correct": np.float64(17), "loss": np.float64(0)}
    outcome = run_round(plan, make_parties(N), dict.fromkeys(names(N), (values, 1.0)))
    assert not outcome.errors
    uploads = {s: x for s, _, f in outcome.frames if isinstance(x := CATALOGUE.decode(f), m.MaskedUpload)}  # fmt: skip
    size = 4 * len(plan.layout)
    drawn = keystream(keys[victim], size + sum_tag.MASK)[size:]
    own = sum_tag.mask(drawn, 0) if masked else np.zeros(sum_tag.TAGS, np.uint64)
    found = guessed(plan, uploads[victim].tag, victim, own)
    assert found == ([] if masked else [(31, 17)])
    assert outcome.round.integers is not None
    assert outcome.round.integers[0] == 4


def test_masks_of_tags_are_the_next_bytes_of_the_masks_of_words() -> None:
    """By the definition, one key after the other, with Python's integers."""
    plan = make_plan(N)
    entropy, size = entropy_from("masks"), sum(field.size for field in plan.layout)
    plus, minus = [entropy(32) for _ in range(3)], [entropy(32) for _ in range(2)]
    expected = [0, 0]
    for sign, keys in ((1, plus), (-1, minus)):
        for key in keys:
            drawn = keystream(key, 4 * size + 32)[4 * size :]
            for i in range(2):
                number = int.from_bytes(drawn[16 * i : 16 * i + 16], "little")
                expected[i] = (expected[i] + sign * number) % mersenne.P
    after = add_masks(np.zeros(size, np.uint32), plus, minus, sum_tag.MASK)
    assert sum_tag.mask(after, len(plus)).tolist() == expected


@pytest.mark.parametrize("count", [3, 5, 9])
def test_tags_of_a_round_unmask_to_that_of_the_sum(count: int) -> None:
    """Against the definition, with somebody who drops out and another who does not reveal."""
    plan = make_plan(count)
    gone = {} if count == 3 else {"c002": Stage.COLLECTING, "c003": Stage.UNMASKING}
    updates = make_updates(plan, count)
    outcome = run_round(plan, make_parties(count), updates, gone if count == 9 else dict(
        itertools.islice(gone.items(), 1)))  # fmt: skip
    assert not outcome.errors
    who = [name for name in plan.cohort if outcome.round.dropped.get(name) is None]
    (told_,) = {
        CATALOGUE.decode(f) for _, _, f in outcome.frames
        if isinstance(CATALOGUE.decode(f), m.OpenedSum)
    }  # fmt: skip
    assert m.members_of(plan.cohort, told_.members) == tuple(who)
    key = SUMS.tags(plan)
    expected = mersenne.total(np.stack([key.offsets[key.places[name]] for name in who]))
    expected = mersenne.add(expected, key.linear(reference(plan, updates, who)))
    assert told_.tag == sum_tag.to_bytes(expected)
