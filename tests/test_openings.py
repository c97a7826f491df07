"""One opened sum per base: crashes in the middle of an opening, second sums, second runs, bad boxes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from federation import Toy, World
from rounds import (
    identity,
    make_encrypted_plan,
    make_parties,
    make_plan,
    make_updates,
    names,
    roster,
)
from safetensors.numpy import load_file
from test_run import expected_prompt

from secure_fedprompt.clients.joining import ASKS
from secure_fedprompt.clients.journal import FileJournal, MemoryJournal
from secure_fedprompt.clients.rounds import encrypted
from secure_fedprompt.clients.rounds import masks as masks_round
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.memory import run_round
from secure_fedprompt.protocol import errors, masking
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.agreement_proof import AgreementProof, check
from secure_fedprompt.protocol.codec import decode_fields
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.keys import unseal
from secure_fedprompt.server.opening import Pending
from secure_fedprompt.server.rounds.base import Stage


def world_of(folder: Path, n: int = 4, **changes: Any) -> World:
    world = World(folder, n, **{"alive_seconds": 12.0, **changes})
    world.withdraws = True
    for name in names(n):
        world.join(name)
    return world


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


# -- crashes ---------------------------------------------------------------------------------------


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
    lists: list[int] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.SurvivorList):
            lists.append(message.round)
        return message

    world.tamper = tap
    for name in names(4):
        (world.reconnect if who == "the same processes" else world.join)(name)
    world.pump()
    assert world.run.error is None, world.run.error
    assert not world.errors
    done = [(r["round"], r["learning_round"]) for r in world.store.summary()["rounds"]]
    assert done == [(1, 1), (2, 2), (3, 3)]
    assert set(lists) == {3}  # the sum of round 2 was not asked for again
    assert pending.survivors == names(4)
    assert world.run.state.prompt is not None
    assert np.allclose(world.run.state.prompt, expected_prompt(world.toys, 2), atol=1e-5)
    assert not (tmp_path / "pending.bin").exists()


@pytest.mark.parametrize(
    ("kind", "who"),
    [
        (kind, who)
        for kind in (m.CipherSum, m.Opened, m.SealedRequest, m.SealedPrompt)
        for who in ("the same processes", "new processes")
        # Who restarts without having opened the sum has no key to open it with.
        if kind is not m.CipherSum or who == "the same processes"
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
    assert "learning round 1 was opened by some clients and not by enough" in str(world.run.error)
    rounds = world.store.summary()["rounds"]
    assert [r["outcome"] for r in rounds] == ["aborted"]  # nothing else was tried


@pytest.mark.parametrize("left", [1, 2])
def test_who_is_left_with_the_key_can_finish_an_opening(tmp_path: Path, left: int) -> None:
    """Under encryption a restarted client cannot open the sum that it is in: the key is gone."""
    world = world_of(tmp_path, protection="bfv", rounds=3)
    world.pump(nth(m.CipherSum, 2, 1))
    for name in names(4)[left:]:
        world.join(name)
    world.pump()
    assert world.run.error is None, world.run.error
    rounds = world.store.summary()["rounds"]
    assert [r["learning_round"] for r in rounds if r["outcome"] == "done"] == [1, 2, 3, 4]
    assert len({s.final.tobytes() for s in world.sessions.values()}) == 1


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


# -- the journal's files ---------------------------------------------------------------------------


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
    again.forget(plan.run)
    assert again.vector(plan) is None
    assert not list((tmp_path / "kept").iterdir())
    again.close()


def test_a_journal_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "journal.jsonl")
    with pytest.raises(errors.ConfigError, match="damaged"):
        journal._get("../../x")
    journal.close()


# -- second runs -----------------------------------------------------------------------------------


def spread(world: World) -> None:
    start = np.random.default_rng(0).normal(0, 0.02, 10).astype(np.float32)
    for toy in world.toys.values():
        toy.initial = lambda: start


def second(tmp_path: Path, first: World, n: int = 5, **changes: Any) -> World:
    world = World(tmp_path / "second", n, **{"alive_seconds": 12.0, "max_attempts": 2, **changes})
    world.journals, world.withdraws, world.clock = first.journals, True, 1.0
    spread(world)
    world.start_server()
    return world


def first_run(tmp_path: Path, n: int = 5) -> World:
    world = World(tmp_path / "first", n)
    spread(world)
    for name in names(n):
        world.join(name)
    world.pump()
    assert world.run.error is None
    return world


def test_a_second_run_of_the_same_files_is_no_nuisance(tmp_path: Path) -> None:
    world = second(tmp_path, first_run(tmp_path))
    for name in names(5):
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert not world.errors


def test_a_second_run_must_not_leave_out_a_few(tmp_path: Path) -> None:
    """Its first sum starts from the same prompt: less one client, the two could be subtracted."""
    world = second(tmp_path, first_run(tmp_path), gather_seconds=20.0)
    world.withdraws = True
    trained: list[str] = []
    for name in names(4):
        world.join(name)
        toy = world.toys[name]
        toy.run = lambda work, toy=toy: trained.append("") or type(toy).run(toy, work)
    world.pump()
    told = str(world.run.error)
    assert "c001, c002, c003, c004 would not take part (c001 withdrew: PolicyError: " in told
    assert "would single out c005: at least 4 clients must change together; begin from " in told
    assert "another prompt (other words in init, or another seed), or with the clients of" in told
    assert all(r["outcome"] == "aborted" for r in world.store.summary()["rounds"])
    assert not trained  # it is said before anything is done


def test_other_bounds_for_the_same_start_need_the_operators_word(tmp_path: Path) -> None:
    world = second(tmp_path, first_run(tmp_path), lr=0.5)
    for name in names(5):
        world.join(name)
    world.pump()
    assert set(world.errors) == set(names(5))
    (error,) = {str(e) for e in world.errors.values()}
    assert "from the same starting prompt with lr = 0.001 (now 0.5): if that is meant" in error
    leave = world.sessions["c001"].leave(world.errors["c001"])  # a run of another server, perhaps
    assert leave == m.Leave("AcceptanceError", ASKS)
    assert all(isinstance(e, errors.AcceptanceError) for e in world.errors.values())
    assert not world.store.summary()["rounds"]  # the terms were refused, not a plan
    word = error.split("--accept ")[1]
    assert world.run.state.terms is not None
    assert world.run.state.terms.digest.hex().startswith(word)

    other = World(tmp_path / "third", 5, lr=0.5)
    other.journals, other.clock = world.journals, 1.0
    spread(other)
    other.start_server()
    for name in names(5):
        other.join(name)
        other.sessions[name]._exempt = True  # as a simulation, or with the right word
    other.pump()
    assert other.run.error is None


def test_the_word_accepts_these_terms_and_no_others(tmp_path: Path) -> None:
    first = first_run(tmp_path)
    for word, good in (("0" * 16, False), ("", True)):
        world = second(tmp_path / word, first, lr=0.25)
        for name in names(5):
            world.join(name)
        world.pump(lambda w, message: isinstance(message, m.Terms))
        assert world.run.state.terms is not None
        right = world.run.state.terms.digest.hex()[:16]
        for session in world.sessions.values():
            session._accept = (right if good else word,)
        world.queue.clear()
        for client in world.run.clients.values():
            client.told = False
        world.pump()
        assert (world.run.error is None) is good


def test_counts_are_cut_off_in_the_same_place_in_every_run(tmp_path: Path) -> None:
    """They do not depend on a prompt: another start and another bound are enough to solve for them."""
    first = first_run(tmp_path)  # weights = "samples", max_weight 4096, from another start
    for changes, asked in (({"max_weight": 256, "seed": 1}, True), ({"max_seen": 5000}, True),
                           ({"weights": "uniform", "metrics": "off"}, False)):  # fmt: skip
        world = World(tmp_path / str(changes), 5, **changes)
        world.journals, world.clock = first.journals, 1.0
        start = np.random.default_rng(7).normal(0, 0.02, 10).astype(np.float32)
        for toy in world.toys.values():
            toy.initial = lambda start=start: start
            toy.weight = 1.0 if "metrics" in changes else toy.weight
        world.start_server()
        for name in names(5):
            world.join(name)
        world.pump()
        assert bool(world.errors) is asked, world.errors
        assert all("that counted samples up to 4096" in str(e) for e in world.errors.values())


def test_a_later_prompt_of_one_run_cannot_begin_another_under_other_bounds(tmp_path: Path) -> None:
    world = world_of(tmp_path / "1", 4, weights="uniform", metrics="off")
    world.pump()
    assert world.run.error is None
    other = World(tmp_path / "2", 4, weights="uniform", metrics="off", clip=0.5)
    other.journals, other.clock, other.withdraws = world.journals, 1.0, False
    prompt = load_file(tmp_path / "1" / "prompts" / "global-0001.safetensors")
    start = np.concatenate([prompt["ctx"].reshape(-1), prompt["extra"]])
    for toy in other.toys.values():
        toy.initial = lambda: start
    other.start_server()
    for name in names(4):
        other.join(name)
    other.pump()
    assert all(isinstance(e, errors.AcceptanceError) for e in other.errors.values())
    assert set(other.errors) == set(names(4))


def test_a_nudged_start_is_near_its_own_prompt_and_the_clients(tmp_path: Path) -> None:
    """The start may differ by 1e-5 from a client's own; what is near either of them is near."""
    journal, start = MemoryJournal(), np.linspace(-0.04, 0.04, 10).astype(np.float32)
    nudged, plan = start + np.float32(9e-6), make_plan(4, rounds=3)
    tolerance = 1e-4 * float(start.std())
    journal.begin_round(plan)
    assert not journal.note_base(plan, [nudged, start], tolerance, b"b")
    journal.record_survivors(plan, plan.cohort, b"")
    journal.record_reveal(plan)
    for number, prompt in ((2, nudged), (3, start)):
        now = dataclasses.replace(plan, round=number, learning_round=number,
                                  base_digest=bytes((number,)) * 32)  # fmt: skip
        journal.begin_round(now)
        assert journal.note_base(now, [prompt + np.float32(7e-9)], tolerance, b"c") == {b"b"}
        assert journal.near_lists(now) == [plan.cohort]
    far = dataclasses.replace(plan, round=9, learning_round=4, base_digest=b"9" * 32)
    journal.begin_round(far)
    assert not journal.note_base(far, [start + np.float32(5e-5)], tolerance, b"c")
    assert journal.near_lists(far) == []


def test_clients_remember_their_own_start_beside_the_runs(tmp_path: Path) -> None:
    world = World(tmp_path, 4, rounds=1)
    spread(world)
    own = world.toys["c002"].initial()
    nudged = own + np.float32(9e-6)
    world.toys["c001"].initial = lambda: nudged  # who is asked for it
    for name in names(4):
        world.join(name)
    world.pump()
    assert world.run.error is None
    kept = world.journals["c002"]._blobs
    assert nudged.tobytes() in [v for k, v in kept.items() if k.startswith("base-")]
    assert [v for k, v in kept.items() if k.startswith("start-")] == [own.tobytes()]


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


# -- bad boxes -------------------------------------------------------------------------------------


class Spoiler:
    """Dealers that seal garbage for some, and sign it."""

    def __init__(self, victims: dict[str, tuple[int, ...]]) -> None:
        self.victims, self.plan, self.adverts = victims, None, b""

    def __call__(self, sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Plan):
            self.plan = message.plan
        if isinstance(message, m.Adverts):
            self.adverts = m.adverts_digest(message.adverts)
        if not isinstance(message, m.Shares) or sender not in self.victims:
            return message
        boxes = bytearray(message.boxes)
        for i in self.victims[sender]:
            boxes[m.BOX * i] ^= 1
        made = dataclasses.replace(message, boxes=bytes(boxes))
        signature = identity(sender).sign(Purpose.BOXES, made.body(self.plan, self.adverts))
        return dataclasses.replace(made, signature=signature)


def test_a_dealer_of_bad_boxes_is_excluded_and_its_victims_are_not(tmp_path: Path) -> None:
    """Two clients that spoil boxes each round would be left alone with their target."""
    world = World(tmp_path, 10, alive_seconds=12.0)
    world.withdraws = True
    world.tamper = Spoiler({"c001": (2, 3, 4), "c002": (5, 6, 7)})
    for name in names(10):
        world.join(name)
    world.pump()
    assert world.run.error is None, world.run.error
    assert set(world.errors) == {"c001", "c002"}
    assert sorted(world.run.state.excluded) == ["c001", "c002"]
    rounds = [r for r in world.store.summary()["rounds"] if r["outcome"] == "done"]
    assert [r["cohort"] for r in rounds] == [list(names(10)[2:])] * 3
    aborted = [r["reason"] for r in world.store.summary()["rounds"] if r["outcome"] == "aborted"]
    assert all("sealed a box for" in reason for reason in aborted)
    world.join("c001")  # it is not admitted again
    assert world.run.over


def altered_inbox(victims: tuple[str, ...], dealer: str = "c001") -> Any:
    """A server that flips a bit in what a dealer sealed for some."""

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Inbox) and recipient in victims and dealer in message.senders:
            boxes = bytearray(message.boxes)
            boxes[m.BOX * message.senders.index(dealer)] ^= 1
            return dataclasses.replace(message, boxes=bytes(boxes))
        return message

    return tap


def test_a_server_that_alters_boxes_learns_no_key_by_it() -> None:
    """Complaints would open boxes of everybody else to it. The dealer signed another box."""
    plan = make_plan(7)  # quorum 5
    tap = altered_inbox(("c004", "c005"))
    outcome = run_round(plan, make_parties(7), make_updates(plan), tap=tap)
    kinds = [type(m.CATALOGUE.decode(f)) for _, _, f in outcome.frames]
    assert kinds.count(m.Complaint) == kinds.count(m.Evidence) == 2
    assert m.Accusation not in kinds
    assert set(outcome.errors) == {"c004", "c005"}
    assert all("was altered on its way" in str(e) for e in outcome.errors.values())
    assert outcome.round.stage is Stage.DONE  # the others went on
    assert not outcome.round.excluded


@pytest.mark.parametrize(
    "what", ["signature", "boxes of another round", "other adverts", "boxes for others"]
)
def test_evidence_must_be_what_the_dealer_signed_for_these_adverts(what: str) -> None:
    """A server that shows two clients different adverts, or old boxes, must not get a proof."""
    plan, parties = make_plan(5), make_parties(5)
    if what == "boxes of another round":
        kept: list[m.Shares] = []
        run_round(plan, parties, make_updates(plan), tap=lambda s, r, x: (
            kept.append(x) or x if isinstance(x, m.Shares) and s == "c001" else x))  # fmt: skip
        plan = dataclasses.replace(plan, round=2, learning_round=2, rounds=2, base_digest=b"2" * 32)

    flip = altered_inbox(("c003",))

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Evidence):
            match what:
                case "signature":
                    return dataclasses.replace(message, signature=bytes(64))
                case "other adverts":
                    dealt = m.Shares(plan.run, plan.round, message.boxes, bytes(64))
                    body = dealt.body(plan, b"a" * 32)
                    signature = identity("c001").sign(Purpose.BOXES, body)
                    return dataclasses.replace(message, signature=signature)
                case "boxes of another round":
                    old = kept[0]
                    return dataclasses.replace(message, boxes=old.boxes, signature=old.signature)
        if isinstance(message, m.Adverts) and what == "boxes for others" and recipient == "c001":
            fewer = tuple(a for a in message.adverts if a.name != "c002")  # places move by one
            return dataclasses.replace(message, adverts=fewer)
        return flip(sender, recipient, message)

    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    kinds = [type(m.CATALOGUE.decode(f)) for _, _, f in outcome.frames]
    assert m.Accusation not in kinds
    if what != "boxes for others":
        assert isinstance(outcome.errors["c003"], errors.SignatureError)


def test_a_dealer_that_signs_nothing_is_excluded() -> None:
    plan = make_plan(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Shares) and sender == "c002":
            boxes = bytes(len(message.boxes))
            return dataclasses.replace(message, boxes=boxes, signature=bytes(64))
        return message

    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert outcome.round.excluded == "c002"
    assert "c002 did not sign the boxes that it dealt" in outcome.round.reason


def test_who_complains_falsely_is_excluded_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = masks_round.unseal

    def unseal(key: bytes, box: bytes, context: bytes, sender: str) -> bytes:
        if sender == "c003" and context.endswith(b"c002"):
            raise errors.SealError("so it says")
        return plain(key, box, context, sender)

    monkeypatch.setattr(masks_round, "unseal", unseal)
    plan = make_plan(5)
    outcome = run_round(plan, make_parties(5), make_updates(plan))
    assert outcome.round.stage is Stage.ABORTED
    assert outcome.round.excluded == "c002"
    assert "c002 says falsely that a box of c003 is bad" in outcome.round.reason
    assert not any(isinstance(m.CATALOGUE.decode(f), m.SurvivorList) for _, _, f in outcome.frames)


def test_an_accusation_shows_one_agreement_and_no_key() -> None:
    """It opens the box of this dealer for this accuser, and the one the other way."""
    plan, parties = make_plan(5), make_parties(5)
    spoiler = Spoiler({"c001": (0,)})
    outcome = run_round(plan, parties, make_updates(plan), tap=spoiler)
    assert outcome.round.excluded == "c001"
    frames = [(s, m.CATALOGUE.decode(f)) for s, r, f in outcome.frames if not r]
    adverts = {s: x for s, x in frames if isinstance(x, m.Advert)}
    (accusation,) = [x for _, x in frames if isinstance(x, m.Accusation)]
    own, other = adverts["c002"].seal_key, adverts["c001"].seal_key
    context = accusation.body(plan, "c002")
    shared = check(accusation.proof, own, other, context)
    key = masking.seal_key(plan, "c003", "c002", shared)
    sent = {s: bytes(x.boxes) for s, x in frames if isinstance(x, m.Shares)}
    with pytest.raises(errors.SealError):  # a box of another dealer
        unseal(key, sent["c003"][m.BOX : 2 * m.BOX], masking.seal_context(plan, "c003", "c002"), "")
    for wrong in (
        accusation.body(plan, "c003"),
        accusation.body(dataclasses.replace(plan, round=2), "c002"),
        dataclasses.replace(accusation, dealer="c003").body(plan, "c002"),
    ):
        with pytest.raises(errors.SignatureError):
            check(accusation.proof, own, other, wrong)


@pytest.mark.parametrize("who", ["a peer that sent no box", "nobody"])
def test_a_complaint_about_nobody_costs_its_sender_alone(who: str) -> None:
    plan = make_plan(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c004" and isinstance(message, m.MaskedUpload):
            return m.Complaint(plan.run, plan.round, "c004" if "peer" in who else "c009")
        return message

    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.DONE
    assert outcome.round.dropped == {"c004": "training"}
    assert "who sent it no box" in outcome.round.faults["c004"]


def test_an_accusation_without_a_proof_excludes_its_sender() -> None:
    plan = make_plan(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c004" and isinstance(message, m.MaskedUpload):
            nothing = AgreementProof(bytes(32), bytes(32), bytes(32))
            return m.Accusation(plan.run, plan.round, "c001", nothing)
        return message

    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert outcome.round.excluded == "c004"


# -- bad grants ------------------------------------------------------------------------------------


def test_a_maker_that_seals_garbage_is_excluded_and_nothing_is_opened_over_a_few(
    tmp_path: Path,
) -> None:
    """The maker gives the key to a mate and the target only; seven others would withdraw."""
    world = World(tmp_path, 10, protection="bfv", alive_seconds=12.0)
    world.withdraws = True
    sums: list[tuple[str, ...]] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherSum):
            sums.append(message.survivors)
        if not (isinstance(message, m.KeyGrant) and sender == "c001") or not world.run.current:
            return message
        plan, made = world.run.current.plan, []
        for grant in message.grants:
            garbage = dataclasses.replace(grant, box=os.urandom(len(grant.box)))
            body = garbage.body(plan, message.key)
            signature = identity("c001").sign(Purpose.KEY_GRANT, body)
            good = grant.recipient in ("c002", "c003")
            made.append(grant if good else dataclasses.replace(garbage, signature=signature))
        changed = dataclasses.replace(message, grants=tuple(made))
        signature = identity("c001").sign(Purpose.KEY_GRANT, changed.body(plan))
        return dataclasses.replace(changed, signature=signature)

    world.tamper = tap
    for name in names(10):
        world.join(name)
    world.pump()
    assert world.run.error is None, world.run.error
    assert set(world.errors) == {"c001"}
    assert world.run.state.excluded == ("c001",)
    assert "c001 sealed a box for" in world.store.summary()["rounds"][0]["reason"]
    assert set(sums) == {names(10)[1:]}


def test_no_sum_is_opened_over_a_few_even_if_most_withdraw() -> None:
    plan = make_encrypted_plan(10, "bfv")
    gone = dict.fromkeys(names(10)[3:], Stage.COLLECTING)
    outcome = run_round(plan, make_parties(10), make_updates(plan), gone)
    assert outcome.round.stage is Stage.ABORTED
    assert "3 of 10 clients answered while training, 7 are needed" in outcome.round.reason
    assert not outcome.opened


def test_a_false_complaint_about_a_grant_burns_the_key_and_excludes_the_accuser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = encrypted.unseal

    def unseal(key: bytes, box: bytes, context: bytes, sender: str) -> bytes:
        if context.endswith(b"c003"):
            raise errors.SealError("so it says")
        return plain(key, box, context, sender)

    monkeypatch.setattr(encrypted, "unseal", unseal)
    plan = make_encrypted_plan(4, "bfv")
    outcome = run_round(plan, make_parties(4), make_updates(plan))
    assert outcome.round.stage is Stage.ABORTED
    assert outcome.round.excluded == "c003"
    assert outcome.round.burnt  # type: ignore[attr-defined]  # the server could read the box


def test_each_grant_is_sealed_to_a_key_of_its_own_keying() -> None:
    plan = make_encrypted_plan(4, "bfv")
    asks: dict[str, bytes] = {}

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.KeyAsk):
            asks[f"{sender} {message.round}"] = message.seal_key
        return message

    parties = make_parties(4)
    run_round(plan, parties, make_updates(plan), {"c001": Stage.KEYING}, tap)
    again = dataclasses.replace(plan, round=2, attempt=2)
    run_round(again, parties, make_updates(plan), tap=tap)
    runs = {p.keyring.secret.public_key().public_bytes_raw() for p in parties.values()}
    assert len(set(asks.values())) == 6
    assert not runs & set(asks.values())


def stopped(tmp_path: Path, after: int = 1) -> World:
    world = world_of(tmp_path, n=4, rounds=3, stop_after=after)
    world.pump()
    assert world.run.stopped
    assert all("as it was asked to" in str(e) for e in world.errors.values())
    world.errors, world.lost = {}, set()
    world.settings = msgspec.structs.replace(world.settings, stop_after=0)
    world.roster = roster(5)
    return world


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
