"""One opened sum per base: crashes in the middle of an opening, second sums, second runs, bad boxes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from federation import Toy, World
from interrupted import world_of
from rounds import (
    make_parties,
    make_plan,
    make_updates,
    names,
    roster,
)
from test_run import expected_prompt

from secure_fedprompt.clients.file_journal import FileJournal
from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.memory import run_round
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import decode_fields
from secure_fedprompt.server.opening import Pending
from secure_fedprompt.server.rounds.base import Stage


def restart(world: World) -> None:
    world.store.close()
    world.queue.clear()
    world.clock += 100
    world.start_server()


def nth(kind: type, round_: int, count: int) -> Any:
    seen: list[m.Message] = []

    def until(world: World, message: m.Message) -> bool:
        if isinstance(message, kind) and getattr(message, "round", 0) == round_:
            seen.append(message)
        return len(seen) == count

    return until


@pytest.mark.parametrize("who", ["the same processes", "new processes"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", [m.UnmaskRequest, m.Reveal])
def test_a_server_killed_while_a_sum_opens_finishes_that_sum(
    tmp_path: Path, kind: type, count: int, who: str
) -> None:
    world = world_of(tmp_path)
    world.pump(nth(kind, 2, count))
    pending = decode_fields(Pending, world.run.state.pending)
    restart(world)
    uploads: list[int] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.MaskedUpload):
            uploads.append(message.round)
        return message

    world.tamper = tap
    for name in names(4):
        (world.reconnect if who == "the same processes" else world.join)(name)
    world.pump()
    assert world.run.error is None, world.run.error
    assert not world.errors
    done = [(r["round"], r["learning_round"]) for r in world.store.summary()["rounds"]]
    assert done == [(1, 1), (2, 2), (3, 3)]
    assert set(uploads) == {3}  # the sum of round 2 was not asked for again
    assert pending.survivors == names(4)
    assert world.run.state.prompt is not None
    assert np.allclose(world.run.state.prompt, expected_prompt(world.toys, 2), atol=1e-5)
    assert not (tmp_path / "pending.bin").exists()


@pytest.mark.parametrize(
    ("kind", "who"),
    [
        (kind, who)
        for kind in (
            m.CipherSum,
            m.Consistent,
            m.SumSigned,
            m.Opened,
            m.SealedRequest,
            m.SealedPrompt,
        )
        for who in ("the same processes", "new processes")
        # Who restarts without having opened the sum has no key to open it with.
        if kind not in (m.CipherSum, m.Consistent, m.SumSigned) or who == "the same processes"
    ],
)
def test_a_server_killed_while_clients_open_a_sum_finishes_that_sum(
    tmp_path: Path, kind: type, who: str
) -> None:
    world = world_of(tmp_path, protection="bfv")
    world.pump(nth(kind, 2, 1))
    restart(world)
    sums: list[int] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherUpload):
            sums.append(message.round)
        return message

    world.tamper = tap
    for i, name in enumerate(names(4)):
        (world.join if who == "new processes" and not i else world.reconnect)(name)
    world.pump()
    assert world.run.error is None, world.run.error
    assert set(sums) <= {3}
    assert [r["learning_round"] for r in world.store.summary()["rounds"]] == [1, 2, 3]


def test_reveals_are_repeated_and_never_another_one(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump(nth(m.Reveal, 2, 1))
    restart(world)
    first: dict[str, bytes] = {}

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Reveal):
            assert first.setdefault(f"{sender} {message.round}", bytes(message.shares)) == bytes(
                message.shares
            )
        return message

    world.tamper = tap
    for _ in range(3):
        for name in names(4):
            world.join(name)
        world.pump(nth(m.Reveal, 2, 2))
    world.pump()
    assert world.run.error is None


def test_a_request_that_crossed_a_greeting_may_come_again(tmp_path: Path) -> None:
    """It was answered, to a server that did not listen: the same answer is given once more."""
    world = world_of(tmp_path)
    requests: list[m.UnmaskRequest] = []

    def until(w: World, message: m.Message) -> bool:
        return isinstance(message, m.UnmaskRequest) and not requests.append(message)  # type: ignore[func-returns-value]

    world.pump(until)  # that of c001
    session = world.sessions["c001"]
    world.reconnect("c001")
    (first,) = session.on(requests[0])
    world.pump()
    assert world.run.error is None
    assert not world.errors
    assert isinstance(first, m.Reveal)
    assert world.store.summary()["rounds"][0]["outcome"] == "done"


def test_a_key_that_nobody_asks_for_any_more_holds_up_nobody(tmp_path: Path) -> None:
    world = world_of(tmp_path, protection="bfv", rounds=3)
    world.pump(nth(m.RoundEnd, 1, 4))
    world.join("c004")  # without the key: the plan grants it
    world.pump(nth(m.KeyAsk, 2, 1))
    world.lost.add("c004")
    world.pump()
    assert world.run.error is None, world.run.error
    second = world.store.summary()["rounds"][1]
    assert (second["outcome"], list(second["dropped"])) == ("done", ["c004"])


def test_an_opening_waits_for_who_can_finish_it_and_then_says_so(tmp_path: Path) -> None:
    world = world_of(tmp_path, n=4)
    world.pump(nth(m.UnmaskRequest, 1, 1))
    world.lost |= {"c003", "c004"}
    world.pump()
    assert "learning round 1 was signed or opened by some clients and not by enough" in str(
        world.run.error
    )
    rounds = world.store.summary()["rounds"]
    assert [r["outcome"] for r in rounds] == ["aborted"]  # nothing else was tried


@pytest.mark.parametrize("left", [0, 1, 2])
def test_who_is_left_with_the_key_can_finish_an_opening(tmp_path: Path, left: int) -> None:
    """Under encryption a restarted client cannot open the sum that it is in: the key is gone. It
    says so, and is not waited for."""
    world = world_of(tmp_path, protection="bfv", rounds=3)
    world.pump(nth(m.SumSigned, 2, left + 1))
    for name in names(4)[left:]:
        world.join(name)
    world.pump()
    assert world.clock < 15
    rounds = world.store.summary()["rounds"]
    assert all("KeyLostError" in rounds[1]["faults"][name] for name in names(4)[left:])
    if left < 2:  # one alone could say anything
        assert f"{left} of 4 clients could open the sum, 2 must agree" in str(world.run.error)
        return
    assert world.run.error is None, world.run.error
    assert [r["learning_round"] for r in rounds if r["outcome"] == "done"] == [1, 2, 3, 4]
    assert len({s.final.tobytes() for s in world.sessions.values()}) == 1


@pytest.mark.parametrize("protection", ["bfv", "ckks"])
@pytest.mark.parametrize("when", ["before it signs", "after it has signed"])
def test_a_client_that_has_lost_the_key_signs_the_sum_that_others_open(
    tmp_path: Path, when: str, protection: str
) -> None:
    """One is gone, and without the signature of the one that is killed there is no quorum."""
    world = world_of(tmp_path, protection=protection, rounds=3)
    world.pump(nth(m.CipherUpload, 2, 4))  # that of c004 is lost
    world.lose("c004")
    world.lost.add("c004")
    world.pump(nth(m.CipherSum, 2, 1))  # that of c001 is lost
    if when == "after it has signed":
        (sum_,) = [m_ for to, m_ in sums_under_way(world) if to == "c002"]
        world.sessions["c002"].on(sum_)
    world.join("c002")
    world.reconnect("c001")
    world.pump()
    assert world.run.error is None, world.run.error
    rounds = world.store.summary()["rounds"]
    assert [(r["learning_round"], r["outcome"]) for r in rounds] == [
        (number, "done") for number in (1, 2, 3, 4)
    ]
    assert [s.verified for s in world.sessions.values()] == [True] * 3 + [False]


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_restarted_client_signs_no_sum_that_singles_somebody_out(
    tmp_path: Path, shift: float
) -> None:
    """Of a prompt as near to this one another list has been signed before: it is known again, and
    told from one of a far prompt."""
    world = world_of(tmp_path, n=5, protection="bfv", metrics="off", weights="uniform")
    world.pump(nth(m.CipherSum, 1, 1))
    plan, journal = world.run.current.plan, world.journals["c002"]  # type: ignore[union-attr]
    near = dataclasses.replace(plan, run=b"r" * 16, base_digest=b"n" * 32)
    base = journal.base(plan)
    assert base is not None
    journal.begin_round(near)
    bounds = journal._notes[plan.run.hex(), plan.base_digest.hex()].bounds
    journal.note_base(near, [base + np.float32(shift)], 0.0, bounds)
    journal.record_survivors(near, names(4), b"")
    journal._notes.clear()  # a new process
    world.join("c002")
    left: list[m.Message] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c002" and isinstance(message, m.Withdraw | m.Consistent):
            left.append(message)
        return message

    world.tamper = tap
    world.pump(lambda w, message: bool(left))
    (withdrawn,) = left
    if shift:
        assert isinstance(withdrawn, m.Consistent)
        return
    assert isinstance(withdrawn, m.Withdraw)
    assert withdrawn.error == "IsolationError"
    assert withdrawn.reason == errors.IsolationError.told


def sums_under_way(world: World) -> list[tuple[str, m.CipherSum]]:
    found = [(to, frame.opened()) for _, to, frame in world.queue]
    return [(to, message) for to, message in found if isinstance(message, m.CipherSum)]


def test_no_second_sum_of_a_learning_round_is_opened(tmp_path: Path) -> None:
    plan, parties = make_plan(5), make_parties(5)
    assert run_round(plan, parties, make_updates(plan)).round.stage is Stage.DONE
    again = dataclasses.replace(plan, round=2, attempt=2)
    outcome = run_round(again, parties, make_updates(plan))
    assert outcome.round.stage is Stage.ABORTED
    assert all(isinstance(e, errors.OpenedError) for e in outcome.errors.values())
    assert len(outcome.errors) == 5


def test_a_list_that_was_signed_is_opened_or_replaced_and_never_both(tmp_path: Path) -> None:
    """Signed in round 1, revealed in round 2 of the same base: the old list opens nothing more."""
    plan, parties = make_plan(5), make_parties(5)
    lost = {f"c00{i}": Stage.CONSISTENCY for i in (1, 2)}
    first = run_round(plan, parties, make_updates(plan), lost)
    assert first.round.stage is Stage.ABORTED
    again = dataclasses.replace(plan, round=2, attempt=2)
    assert run_round(again, parties, make_updates(plan)).round.stage is Stage.DONE
    with pytest.raises(errors.OpenedError, match="opened in round 2"):
        parties["c003"].journal.record_reveal(plan)


def test_what_is_kept_is_private_and_goes_when_the_learning_round_ends(tmp_path: Path) -> None:
    journal, plan = FileJournal(tmp_path / "journal.jsonl"), make_plan(4)
    journal.begin_round(plan)
    journal.keep_vector(plan, b"words")
    journal.record_survivors(plan, plan.cohort, b"shares")
    files = list((tmp_path / "kept").iterdir())
    assert len(files) == 2
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    journal.close()
    again = FileJournal(tmp_path / "journal.jsonl")
    assert again.vector(plan) == b"words"
    assert again.opening(plan.run) == b"shares"
    assert again.vector(dataclasses.replace(plan, terms=b"t" * 32)) is None
    again.begin_round(dataclasses.replace(plan, round=2, attempt=2))
    assert again.vector(plan) == b"words"
    again.begin_round(dataclasses.replace(plan, round=3, learning_round=2, base_digest=b"b" * 32))
    assert again.vector(plan) is None
    assert not list((tmp_path / "kept").iterdir())
    again.close()


def test_a_journal_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "journal.jsonl")
    with pytest.raises(errors.ConfigError, match="damaged"):
        journal._get("../../x")
    journal.close()


def test_a_list_is_on_record_before_what_can_open_it(monkeypatch: pytest.MonkeyPatch) -> None:
    journal, plan = MemoryJournal(), make_plan(4)
    journal.begin_round(plan)

    def killed(name: str, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "_put", killed)
    with pytest.raises(KeyboardInterrupt):
        journal.record_survivors(plan, plan.cohort, b"shares")
    assert [names_ for _, _, names_ in journal._bases[plan.base_digest.hex()].lists] == [
        plan.cohort
    ]
    assert journal.opening(plan.run) is None


def test_a_kept_vector_is_of_its_run_and_whole() -> None:
    journal, plan = MemoryJournal(), make_plan(4, run=b"r" * 16)
    twin = make_plan(4, run=b"r" * 8 + b"s" * 8)
    journal.keep_vector(plan, b"one")
    journal.keep_vector(twin, b"two")
    assert (journal.vector(plan), journal.vector(twin)) == (b"one", b"two")
    journal._put(f"vector-{plan.run.hex()}", b"another")
    assert journal.vector(plan) is None


def stopped(tmp_path: Path, after: int = 1, protection: str = "masks") -> World:
    world = world_of(tmp_path, n=4, rounds=3, stop_after=after, protection=protection)
    world.pump()
    assert world.run.stopped
    assert all("as it was asked to" in str(e) for e in world.errors.values())
    world.errors, world.lost = {}, set()
    world.settings = msgspec.structs.replace(world.settings, stop_after=0)
    world.roster = roster(5)
    return world


def test_under_encryption_a_roster_stays(tmp_path: Path) -> None:
    """Who leaves would keep what opens and seals prompts, and could lend it to the server."""
    world = stopped(tmp_path, protection="bfv")
    before = world.run.state.terms
    assert before is not None
    with pytest.raises(errors.ConfigError, match="under bfv a run keeps its roster.*start_prompt"):
        restart(world)
    grown = dataclasses.replace(before, roster_digest=roster(5).digest)  # nor do clients take it
    with pytest.raises(errors.TermsError, match="keeps its roster"):
        grown.succeed(before)


def test_a_site_can_be_added_between_two_learning_rounds(tmp_path: Path) -> None:
    """The server is started again with a larger roster; clients that have it too go on."""
    world = stopped(tmp_path)
    before = world.run.state.terms
    restart(world)
    after = world.run.state.terms
    assert before is not None
    assert after is not None
    assert (after.clients, after.quorum, after.colluders) == (5, 4, 2)
    world.toys["c005"], world.journals["c005"] = Toy(0.9, 14.0), MemoryJournal()
    for name in names(5):
        world.join(name)
    world.pump()
    assert world.run.error is None, world.run.error
    assert not world.errors
    rounds = world.store.summary()["rounds"]
    assert [r["learning_round"] for r in rounds if r["outcome"] == "done"] == [1, 2, 3, 4]
    assert rounds[-1]["cohort"] == list(names(5))
    assert any("roster" in kind and "5 clients, quorum 4, c = 2" in str(v)
               for kind, v in world.events)  # fmt: skip


def test_a_client_goes_on_under_a_larger_roster_only_with_that_roster(tmp_path: Path) -> None:
    world = stopped(tmp_path)
    restart(world)
    for name in names(4):
        world.reconnect(name)  # the same processes, with the old file
    world.pump()
    assert all("copy the same roster file" in str(e) for e in world.errors.values())
    assert set(world.errors) == set(names(4))


def test_a_roster_does_not_change_in_the_middle_of_a_learning_round(tmp_path: Path) -> None:
    """Old and new quorum need not share an honest client: each could open a sum of one prompt."""
    world = world_of(tmp_path, n=4)
    world.pump(nth(m.Advert, 2, 1))
    world.roster = roster(5)
    with pytest.raises(errors.ConfigError, match="learning round 2 has begun.*--stop-after 2"):
        restart(world)
    plan, parties = make_plan(4), make_parties(4)
    start(parties["c001"], plan)
    grown = dataclasses.replace(plan, round=2, attempt=2, terms=b"t" * 32)
    with pytest.raises(errors.ReplayError, match="begun under other terms"):
        start(parties["c001"], grown)


def test_the_memory_journal_keeps_the_same_rules() -> None:
    assert FileJournal.begin_round is MemoryJournal.begin_round
    assert FileJournal.record_reveal is MemoryJournal.record_reveal
    assert FileJournal.near_lists is MemoryJournal.near_lists
