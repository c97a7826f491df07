"""One opened sum per base: crashes in the middle of an opening, second sums, second runs, bad boxes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Toy, World
from rounds import identity, make_encrypted_plan, make_parties, make_plan, make_updates, names
from test_run import expected_prompt

from secure_fedprompt.clients import encrypted, participant
from secure_fedprompt.clients.journal import FileJournal, MemoryJournal
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import decode_fields
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.server.coordinator import Stage
from secure_fedprompt.server.opening import Pending
from secure_fedprompt.simulate import run_round


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


@pytest.mark.parametrize("who", ["the same processes", "new processes"])
@pytest.mark.parametrize("kind", [m.CipherSum, m.Opened, m.SealedRequest, m.SealedPrompt])
def test_a_server_killed_while_clients_open_a_sum_finishes_that_sum(
    tmp_path: Path, kind: type, who: str
) -> None:
    world = world_of(tmp_path, protection="bfv")
    world.pump(nth(kind, 2, 1))
    opened = world.journals["c001"]._runs[world.run.state.run.hex()].opened
    if who == "new processes" and len(opened) < 2:
        return  # who restarts without having opened the sum has no key to open it with
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


def test_an_opening_waits_for_who_can_finish_it_and_then_says_so(tmp_path: Path) -> None:
    world = world_of(tmp_path, n=4)
    world.pump(nth(m.UnmaskRequest, 1, 1))
    world.lost |= {"c003", "c004"}
    world.pump()
    assert "learning round 1 was opened by some clients and not by enough" in str(world.run.error)
    rounds = world.store.summary()["rounds"]
    assert [r["outcome"] for r in rounds] == ["aborted"]  # nothing else was tried


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
    line = (
        '{"event":"vector","run":"00","terms":"","base":"","learning_round":1,"file":"../../x"}\n'
    )
    (tmp_path / "journal.jsonl").write_text(line)
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
    for name in names(4):
        world.join(name)
    world.pump()
    faults = [text for kind, text in world.events if kind == "fault"]
    assert any("IsolationError" in text and "single out c005" in text for text in faults)
    assert world.run.error is not None
    assert all(r["outcome"] == "aborted" for r in world.store.summary()["rounds"])


def test_other_bounds_for_the_same_start_need_the_operators_word(tmp_path: Path) -> None:
    world = second(tmp_path, first_run(tmp_path), lr=0.5)
    for name in names(5):
        world.join(name)
    world.pump()
    assert set(world.errors) == set(names(5))
    (error,) = {str(e) for e in world.errors.values()}
    assert all(isinstance(e, errors.AcceptanceError) for e in world.errors.values())
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


# -- bad boxes -------------------------------------------------------------------------------------


def spoiled(plan: Any, message: m.Shares, dealer: str, victims: tuple[int, ...]) -> m.Shares:
    boxes = bytearray(message.boxes)
    for i in victims:
        boxes[m.BOX * i] ^= 1
    made = dataclasses.replace(message, boxes=bytes(boxes))
    signature = identity(dealer).sign(Purpose.BOXES, made.body(plan))
    return dataclasses.replace(made, signature=signature)


def test_a_dealer_of_bad_boxes_is_excluded_and_its_victims_are_not(tmp_path: Path) -> None:
    """Two clients that spoil boxes each round would be left alone with their target."""
    world = World(tmp_path, 10, alive_seconds=12.0)
    world.withdraws = True
    bad = {"c001": (2, 3, 4), "c002": (5, 6, 7)}

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Shares) and sender in bad and world.run.current:
            return spoiled(world.run.current.plan, message, sender, bad[sender])
        return message

    world.tamper = tap
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


def test_who_complains_falsely_is_excluded_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = participant.unseal

    def unseal(key: bytes, box: bytes, context: bytes, sender: str) -> bytes:
        if sender == "c003" and context.endswith(b"c002"):
            raise errors.SealError("so it says")
        return plain(key, box, context, sender)

    monkeypatch.setattr(participant, "unseal", unseal)
    plan = make_plan(5)
    outcome = run_round(plan, make_parties(5), make_updates(plan))
    assert outcome.round.stage is Stage.ABORTED
    assert outcome.round.excluded == "c002"
    assert "c002 says falsely that a box of c003 is bad" in outcome.round.reason
    assert not any(isinstance(m.CATALOGUE.decode(f), m.SurvivorList) for _, _, f in outcome.frames)


@pytest.mark.parametrize("secret", [bytes(range(32)), bytes(32)])
def test_a_complaint_with_another_key_excludes_its_sender(secret: bytes) -> None:
    plan = make_plan(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c004" and isinstance(message, m.MaskedUpload):
            return m.Complaint(plan.run, plan.round, "c001", secret)
        return message

    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert outcome.round.excluded == "c004"


def test_a_complaint_about_nobody_costs_its_sender_alone() -> None:
    plan = make_plan(5)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c004" and isinstance(message, m.MaskedUpload):
            return m.Complaint(plan.run, plan.round, "c009", bytes(32))
        return message

    outcome = run_round(plan, make_parties(5), make_updates(plan), tap=tap)
    assert outcome.round.stage is Stage.DONE
    assert outcome.round.dropped == {"c004": "collecting"}
    assert "c009" in outcome.round.faults["c004"]


def test_a_published_key_is_of_the_dead_attempt_alone() -> None:
    """What the complaint shows opens the accuser's boxes of this attempt, and nothing later."""
    plan, parties = make_plan(5), make_parties(5)
    adverts: dict[int, m.Advert] = {}
    shown: list[m.Complaint] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Shares) and sender == "c001":
            return spoiled(plan, message, sender, (0,))
        if isinstance(message, m.Advert) and sender == "c002":
            adverts[message.round] = message
        if isinstance(message, m.Complaint):
            shown.append(message)
        return message

    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    assert outcome.round.excluded == "c001"
    again = dataclasses.replace(plan, round=2, attempt=2)
    _, (advert,) = participant.start(parties["c002"], again)
    assert isinstance(advert, m.Advert)
    from secure_fedprompt.server.opening import public_of

    assert public_of(shown[0].secret) == adverts[1].seal_key
    assert advert.seal_key != adverts[1].seal_key
    assert advert.mask_key not in (adverts[1].mask_key, adverts[1].seal_key)


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
    assert "3 of 10 clients answered while collecting, 7 are needed" in outcome.round.reason
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


def test_a_site_can_be_added_while_a_run_goes_on(tmp_path: Path) -> None:
    """The server is started again with a larger roster; clients that have it too go on."""
    from rounds import roster

    world = world_of(tmp_path, n=4, rounds=3)
    world.pump(nth(m.Advert, 2, 1))
    before = world.run.state.terms
    world.roster = roster(5)
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
    from rounds import roster

    world = world_of(tmp_path, n=4, rounds=3)
    world.pump(nth(m.Advert, 2, 1))
    world.roster = roster(5)
    restart(world)
    for name in names(4):
        world.reconnect(name)  # the same processes, with the old file
    world.pump()
    assert all("copy the same roster file" in str(e) for e in world.errors.values())
    assert set(world.errors) == set(names(4))


def test_a_run_does_not_grow_in_the_middle_of_an_opening(tmp_path: Path) -> None:
    from rounds import roster

    world = world_of(tmp_path, n=4)
    world.pump(nth(m.UnmaskRequest, 2, 1))
    world.roster = roster(5)
    with pytest.raises(errors.ConfigError, match="let that round end with the old roster"):
        restart(world)


def test_the_memory_journal_keeps_the_same_rules() -> None:
    assert FileJournal.begin_round is MemoryJournal.begin_round
    assert FileJournal.record_reveal is MemoryJournal.record_reveal
    assert FileJournal.near_lists is MemoryJournal.near_lists
