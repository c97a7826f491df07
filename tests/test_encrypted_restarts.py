"""Clients under bfv and ckks that were all started again: what opens prompts is kept, and only that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from federation import World
from rounds import later, make_encrypted_plan, names
from test_encrypted_run import finished_alike, world_of

from secure_fedprompt.clients.cohort_key import CohortKey
from secure_fedprompt.clients.rounds.encrypted import KIND
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.server.planning import elect
from secure_fedprompt.server.rounds.base import Stage


def test_the_key_that_opens_uploads_is_never_on_a_disk(tmp_path: Path) -> None:
    world, kept = world_of(tmp_path), dict[str, bytes]()

    def until(w: World, message: m.Message) -> bool:
        for journal in w.journals.values():
            kept.update({f"{len(kept)} {k}": v for k, v in journal._blobs.items()})
        return isinstance(message, m.Finish)

    world.pump(until)
    held = world.sessions["c002"].party.keyring.cohort
    assert any(held.prompt_key in data for data in kept.values())
    for part in (held._secret, held._secret[200:232], held._secret[-32:]):
        assert not any(part in data for data in kept.values())


@pytest.mark.parametrize("kept", [(), ("c002",), names(4)])
def test_when_all_clients_were_started_again(tmp_path: Path, kept: tuple[str, ...]) -> None:
    """The key is gone with their memory. Who has kept what opens the prompt makes a new one."""
    world = world_of(tmp_path, max_attempts=0)
    world.withdraws = True
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    run, before = world.run.state.run, world.run.state.key
    world.queue.clear()
    for name in names(4):
        if name not in kept:  # its folder is lost as well
            world.journals[name]._drop(f"sums-{run.hex()}")
        world.join(name)  # all are new processes
    world.pump()
    if kept:
        finished_alike(world, 4)
        assert world.run.state.key != before
        assert world.run.state.maker == kept[0]
        return
    with pytest.raises(errors.RunFailedError, match="open the sealed prompt is left"):
        raise world.run.error or AssertionError


def test_what_has_opened_a_prompt_is_kept(tmp_path: Path) -> None:
    """By a client whose folder was lost as well; not before."""
    world = world_of(tmp_path, rounds=3)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    journal, run = world.journals["c003"], world.run.state.run
    journal._drop(f"sums-{run.hex()}")
    world.join("c003")
    kept: list[bytes] = []

    def until(w: World, message: m.Message) -> bool:
        kept.append(journal.kept_key(run))
        return isinstance(message, m.Consistent) and message.round == 3

    world.pump(until)
    made = world.sessions["c003"].party.keyring.cohort
    assert kept[0] == b""
    assert journal.kept_key(run) == made.prompt_key


def test_a_key_of_which_nobody_heard_is_forgotten(tmp_path: Path) -> None:
    """Its maker is killed as it grants it; what another one makes is what prompts open with."""
    world = world_of(tmp_path, rounds=3, max_attempts=0)
    world.withdraws = True
    world.pump(lambda w, message: isinstance(message, m.KeyGrant))
    world.lose("c001")
    world.lost.add("c001")
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 2)
    world.join("c001")
    world.pump()
    finished_alike(world, 4)


def test_restarts_of_all_leave_somebody_to_make_a_key(tmp_path: Path) -> None:
    """Each time at once, and once more while they are asked whether they need it."""
    world = world_of(tmp_path, rounds=4, max_attempts=0)
    world.withdraws = True
    for number in (1, 2, 3):
        rounds = len(world.store.summary()["rounds"])
        world.pump(lambda w, message, n=number: w.run.state.learning_round > n)
        for kind in (m.Accept, m.KeyAsk):
            world.queue.clear()
            for name in names(4):
                world.lose(name)
                world.join(name)
            world.pump(lambda w, message, kind=kind: isinstance(message, kind))
        assert len(world.store.summary()["rounds"]) > rounds
    world.run.unfit.clear()
    for name in names(4):
        world.lose(name)
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.KeyAsk))
    world.queue.clear()
    for name in names(4):
        world.lose(name)
    assert world.run.current is None
    assert not world.run.unfit  # that nobody asked is not its maker's fault
    for name in names(4):
        world.join(name)
    world.run.unfit = {"c001"}
    world.pump()
    assert not world.run.unfit
    finished_alike(world, 4)


def test_who_has_a_burnt_key_is_not_thought_to_open_the_prompt(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    state, bad = world.run.state, b"b" * 32
    good = state.key
    current: Any = SimpleNamespace(
        plan=SimpleNamespace(cohort=names(4), maker="c001"), key=bad, holders=set(), faults={},
        refusals=set(), burnt=True, keyed=True, unasked=False, stage=Stage.ABORTED,
    )  # fmt: skip
    state.keys = (*state.keys, bad)
    world.run._note_holders(current)
    assert state.keys == (good,)
    assert world.run.unfit == {"c001"}
    for held, unfit, maker in (
        ({"c003": good, "c004": bad}, set(), "c003"),
        ({"c003": good, "c004": bad}, {"c003"}, "c001"),  # who was started again
        ({"c004": bad}, set(), "c001"),
    ):
        elect(state, names(4), held, "", unfit)
        assert state.maker == maker
    state.commitments = tuple(nonce for nonce in state.commitments if nonce.name != "c001")
    elect(state, names(4), {}, "")
    assert state.maker == "c002"  # c001 came late


def test_nobody_takes_a_key_under_which_its_prompt_does_not_open(tmp_path: Path) -> None:
    """All were started again, and the first to make a new key has kept something else."""
    world = world_of(tmp_path, max_attempts=0)
    world.withdraws = True
    world.pump(lambda w, message: isinstance(message, m.RoundEnd) and message.round == 1)
    world.queue.clear()
    run = world.run.state.run
    world.journals["c001"].keep_key(run, b"x" * 32)
    for name in names(4):
        world.join(name)
    world.pump()
    rounds = world.store.summary()["rounds"]
    faults = {name: f for row in rounds for name, f in row["faults"].items()}
    assert set(faults) == {"c001"}
    assert world.run.state.maker == "c002"
    assert world.run.error is None, world.run.error
    plan, party = later(make_encrypted_plan(4, "bfv"), run=run), world.sessions["c003"].party
    made = party.keyring.cohort
    other = CohortKey.make(made.scheme, party.entropy, b"y" * 32)
    for held in (made, None):  # nor do others, should c001 be up to something
        party.keyring.cohort = held
        party.journal.keep_key(run, made.prompt_key)
        with pytest.raises(errors.KeyMismatchError, match="grants a key under which"):
            KIND.keep(party, plan, other)
        assert party.journal.kept_key(run) == made.prompt_key
    assert [r["learning_round"] for r in rounds if r["outcome"] == "done"] == [1, 2, 3]


def test_a_client_killed_in_the_last_opening_has_the_final_prompt(tmp_path: Path) -> None:
    world = world_of(tmp_path, metrics="off")
    world.pump(lambda w, message: isinstance(message, m.SumSigned) and message.round == 2)
    world.join("c004")
    world.pump()
    finished_alike(world, 4)
    assert not world.journals["c004"].kept_key(world.run.state.run)
    assert world.journals["c004"].opening(world.run.state.run) is None


def test_a_final_prompt_that_is_not_sealed_is_refused(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.pump(lambda w, message: isinstance(message, m.Finish))
    session = world.sessions["c002"]
    with pytest.raises(errors.SealError):
        session.on(m.Finish(session.run, bytes(40), ""))
    with pytest.raises(errors.SealError):
        session.on(m.Finish(session.run, bytes(56), ""))
    assert not session.over  # that was no end
    kept = world.journals["c003"]
    kept._drop(f"sums-{session.run.hex()}")
    kept._put(f"opening-{session.run.hex()}", b"of a round")
    world.sessions["c003"].party.keyring.cohort = None
    with pytest.raises(errors.RunFailedError, match="before this client was given its key"):
        world.sessions["c003"].on(m.Finish(session.run, bytes(40), ""))
    assert kept.opening(session.run) is None
    assert world.sessions["c003"].over


@pytest.mark.parametrize(("n", "killed"), [(3, ("c001",)), (4, ("c001", "c002"))])
def test_before_anything_is_sealed_any_key_will_do(
    n: int, killed: tuple[str, ...], tmp_path: Path
) -> None:
    """Killed in the first training: a maker that was started again makes another prompt key."""
    world = world_of(tmp_path, n=n, rounds=3, max_attempts=0)
    world.withdraws = True
    world.pump(lambda w, message: isinstance(message, m.CipherUpload))
    for name in killed:
        world.forget(name)
        world.lose(name)
        world.join(name)
    world.pump()
    finished_alike(world, n)


def test_a_grant_that_was_lost_with_its_connection_splits_nobody(tmp_path: Path) -> None:
    world = world_of(tmp_path, n=3, rounds=3, max_attempts=0)
    world.withdraws = True
    world.pump(lambda w, message: isinstance(message, m.KeyGrant))
    world.forget("c001")
    world.lose("c001")
    world.reconnect("c001")
    world.pump()
    finished_alike(world, 3)


def test_as_many_as_may_pool_what_they_know_choose_no_prompt(tmp_path: Path) -> None:
    """All but three of seven lose the key while a sum is opened, and these say what they like."""
    world, forged = world_of(tmp_path, n=7, rounds=1, metrics="off", max_attempts=1), list[bytes]()
    world.withdraws = True

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender and isinstance(message, m.Opened):
            key = world.sessions[sender].party.keyring.cohort
            forged[:] = [key.seal_prompt(message.run, 2, bytes(40))]
            return m.Opened(message.run, message.round, digest(Purpose.BASE, forged[0]))
        if sender and isinstance(message, m.SealedPrompt):
            return m.SealedPrompt(message.run, message.round, forged[0])
        return message

    world.tamper = tap
    seen: list[str] = []

    def three(w: World, message: m.Message) -> bool:
        if isinstance(message, m.SumSigned):
            seen.append("")
        return len(seen) == 3

    world.pump(three)
    for name in names(7)[3:]:
        world.lose(name)
        world.join(name)
    world.pump()
    (row,) = world.store.summary()["rounds"]
    assert row["outcome"] == "aborted"
    assert "3 of 7 clients could open the sum, 4 must agree" in row["reason"]
