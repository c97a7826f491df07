"""Whole runs under masks: clients compute every prompt themselves, also after what went wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreed import everybody
from audited import VICTIM, audited, failures
from federation import World
from rounds import make_parties, names
from selecting import SECURE, Grouped
from watching import done, watched, world_of

from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.averaging import prompt_bytes
from secure_fedprompt.protocol.expand import Purpose, digest


def test_prompts_follow_from_sums_and_are_not_sent_again(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    seen = watched(world)
    everybody(world)
    assert world.run.error is None, world.run.error
    plans = [(r, x) for _, r, x in seen if isinstance(x, m.Plan)]
    assert {len(x.base) > 0 for _, x in plans if x.plan.learning_round == 1} == {True}
    assert {len(x.base) for _, x in plans if x.plan.learning_round > 1} == {0}
    final = prompt_bytes(world.run.state.prompt)
    for name in names(5):
        session = world.sessions[name]
        assert prompt_bytes(session.final) == final
        assert session.verified
        assert session.history[4]["accuracy"] == 1.0
        made = world.journals[name].made(session.run, 4)
        assert made == (digest(Purpose.BASE, final), True)
        assert not world.journals[name].kept_key(session.run)  # the run is over: it is not needed
    adverts = [x for s, _, x in seen if s and isinstance(x, m.Advert)]
    assert {x.vouches for x in adverts} == {1}
    assert len({x.key for x in adverts}) == 1
    checked = [r["checked"] for r in world.store.summary()["rounds"]]
    assert checked == [[*names(5)]] * 3 + [[]]  # nobody vouches after the last


def test_a_restarted_client_keeps_the_key_and_what_it_computed(tmp_path: Path) -> None:
    """After the sum, before the next plan; and before the sum, which it is sent once more."""
    for when, vouching in ((m.RoundEnd, [1, 0, 1]), (m.OpenedSum, [1, 1, 1, 1])):
        world = world_of(tmp_path / when.__name__)
        seen = watched(world)
        for name in names(5):
            world.join(name)
        world.pump(lambda w, x, kind=when: isinstance(x, kind) and x.round == 1)
        world.join("c003")
        world.pump()
        assert world.run.error is None, world.run.error
        assert {s for s, _, x in seen if isinstance(x, m.KeyAsk)} == {
            "c002",
            "c003",
            "c004",
            "c005",
        }
        assert sum(isinstance(x, m.KeyAsk) for s, _, x in seen if s == "c003") == 1
        adverts = [x for s, _, x in seen if s == "c003" and isinstance(x, m.Advert)]
        assert [x.vouches for x in adverts] == vouching  # 0: a round went by while it was away
        assert world.sessions["c003"].verified


def killed_before_it_tells(world: World) -> None:
    """The server stores the second sum, and its next process meets clients that were started anew."""
    for name in names(5):
        world.join(name)
    world.pump(lambda w, x: isinstance(x, m.OpenedSum) and x.round == 2)
    world.queue.clear()
    world.store.close()
    world.start_server()
    for name in names(5):
        world.join(name)


def test_sums_that_a_killed_server_told_nobody_are_told_after_its_restart(tmp_path: Path) -> None:
    """It has stored the sum, and tells nobody: everybody hears of it from its next process."""
    world = world_of(tmp_path)
    seen = watched(world)
    killed_before_it_tells(world)
    del seen[:]
    world.pump()
    assert world.run.error is None, world.run.error
    assert [lr for _, lr in done(world)] == [1, 2, 3, 4]
    again = [r for _, r, x in seen if isinstance(x, m.OpenedSum) and x.round == 2]
    assert sorted(again) == [*names(5)]
    adverts = [x for s, _, x in seen if s and isinstance(x, m.Advert)]
    assert {x.vouches for x in adverts} == {1}


def test_without_the_reminder_nobody_could_vouch_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secure_fedprompt.server.run.remind", lambda *_: [])
    world = world_of(tmp_path)
    world.withdraws = True
    killed_before_it_tells(world)
    world.pump()
    assert "aborted 3 times" in str(world.run.error)


def test_a_lost_sum_is_made_good_by_a_new_greeting(tmp_path: Path) -> None:
    """The server believes that a client computed the prompt; it says that it did not."""
    world = world_of(tmp_path)

    def tamper(sender: str, recipient: str, message: m.Message) -> m.Message:
        lost = isinstance(message, m.OpenedSum) and message.round == 1 and recipient == "c004"
        return m.Alive() if lost else message

    sessions = world.sessions
    world.tamper = tamper
    seen = watched(world)
    for name in names(5):
        world.join(name)
    plain = sessions["c004"].on

    def on(message: m.Message) -> Any:
        return [] if isinstance(message, m.Alive) else plain(message)

    sessions["c004"].on = on
    world.pump()
    assert world.run.error is None, world.run.error
    assert not world.errors
    greetings = [s for s, _, x in seen if isinstance(x, m.Hello)]
    assert greetings.count("c004") == 2
    adverts = {x.round: x.vouches for s, _, x in seen if s == "c004" and isinstance(x, m.Advert)}
    assert adverts[1] == 1
    assert world.sessions["c004"].verified


def test_who_greets_is_given_the_whole_prompt_again(tmp_path: Path) -> None:
    """Also within the seconds in which two greetings of one process count as one."""
    world = world_of(tmp_path)
    for name in names(5):
        world.join(name)
    world.pump(lambda w, x: isinstance(x, m.RoundEnd) and x.round == 1)
    server = world.run
    server.current = None
    before = server.clients["c002"]
    assert before.informed == 2
    server.on("c002", world.sessions["c002"].hello(), before.joined + 1)
    assert server.clients["c002"] is before
    assert before.informed == 0


@pytest.mark.parametrize("told", ["nothing", "the sum"])
def test_a_server_that_tells_no_sum_cannot_choose_the_prompt(tmp_path: Path, told: str) -> None:
    """It opens the first sum, says that the round is over, and goes on from what it likes."""
    world = world_of(tmp_path, policy=make_parties(5)["c001"].policy)
    world.withdraws = True
    if told == "nothing":
        world.tamper = lambda s, r, x: (
            m.RoundEnd(x.run, x.round, "") if isinstance(x, m.OpenedSum) else x
        )
    applied = world.run._apply

    def apply(current: Any) -> None:
        applied(current)
        world.run.state.prompt = world.run.state.prompt + np.float32(1)
        for client in world.run.clients.values():
            client.informed = 0

    world.run._apply = apply  # type: ignore[method-assign]
    everybody(world)
    assert isinstance(world.run.error, errors.SecureFedPromptError)
    assert [lr for _, lr in done(world)] == [1]
    kinds = {type(error) for error in world.errors.values()}
    assert kinds == {errors.AdvertMismatchError if told == "nothing" else errors.MismatchError}


def test_a_last_prompt_that_is_not_what_the_last_sum_gives_is_refused(tmp_path: Path) -> None:
    world = world_of(tmp_path, metrics="off")

    def tamper(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Finish) and recipient == "c002":
            return dataclasses.replace(message, vector=bytes(len(message.vector)))
        if isinstance(message, m.OpenedSum) and message.round == 3 and recipient == "c003":
            return m.RoundEnd(message.run, message.round, "")
        return message

    world.tamper = tamper
    everybody(world)
    assert isinstance(world.errors["c002"], errors.MismatchError)
    assert "final prompt is not the one" in str(world.errors["c002"])
    assert set(world.errors) == {"c002"}
    assert world.sessions["c003"].final is not None
    assert not world.sessions["c003"].verified  # it missed the last sum, and nobody vouches
    assert world.sessions["c001"].verified


def test_the_last_prompt_is_held_against_the_journal_without_terms_too(tmp_path: Path) -> None:
    """A client that is started again at the very end is told the end, and no terms."""
    world = world_of(tmp_path, metrics="off")
    for name in names(5):
        world.join(name)
    world.pump(lambda w, x: isinstance(x, m.Finish))
    world.join("c002")
    session, run = world.sessions["c002"], world.run.state
    session.on(m.Welcome(run.run, run.server_nonce, run.commitments,
                         world.settings.method_settings().to_bytes(), 0))  # fmt: skip
    assert session.terms is None
    with pytest.raises(errors.MismatchError, match="final prompt is not the one"):
        session.on(m.Finish(run.run, bytes(40), ""))
    session.on(m.Finish(run.run, prompt_bytes(run.prompt), ""))
    assert session.verified


def test_a_run_that_ends_early_has_no_verified_prompt(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    for name in names(5):
        world.join(name)
    world.pump(lambda w, x: isinstance(x, m.Plan) and x.plan.round == 3)
    session = world.sessions["c002"]
    session.on(m.Finish(session.run, bytes(40), ""))
    assert session.final is not None
    assert not session.verified


def test_who_did_not_sign_the_list_and_comes_back_while_it_is_opened_stays(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    gone = set[str]()

    def tamper(sender: str, recipient: str, message: m.Message) -> m.Message:
        for kind, name in ((m.SurvivorList, "c002"), (m.UnmaskRequest, "c005")):
            if isinstance(message, kind) and recipient == name and name not in gone:
                gone.add(name)
                world.lost.add(name)
        return message

    world.tamper = tamper
    for name in names(5):
        world.join(name)
    for name in ("c002", "c005"):  # the second is waited for
        until = world.clock + 10
        world.pump(lambda w, x, until=until: w.clock > until)
        world.reconnect(name)
    world.pump()
    assert not world.errors
    assert world.run.error is None, world.run.error
    assert len(done(world)) == 4


def test_a_sum_is_that_of_the_attempt_it_says_whatever_was_signed_before(tmp_path: Path) -> None:
    """The first attempt was signed and came to nothing; of the second c002 is told the sum only."""
    world, gone = world_of(tmp_path), set[str]()

    def tamper(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Consistent) and message.round == 1 and sender in ("c003", "c004"):
            return m.Alive()
        listed = isinstance(message, m.SurvivorList) and message.round == 2
        if listed and recipient == "c002" and not gone:
            gone.add(recipient)
            world.lost.add(recipient)
        return message

    world.tamper = tamper
    for name in names(5):
        world.join(name)
    world.pump(lambda w, x: isinstance(x, m.MaskedUpload) and x.round == 3)
    run = world.run.state.run
    assert world.journals["c002"].opening(run)
    assert world.journals["c002"].made(run, 2) == (b"", False)
    world.reconnect("c002")
    world.pump()
    assert not world.errors
    assert world.journals["c002"].made(run, 2)[1]


def test_terms_that_are_accepted_again_are_no_reason_to_send_the_sum_again(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    seen = watched(world)
    for name in names(5):
        world.join(name)
    world.pump(lambda w, x: isinstance(x, m.MaskedUpload) and x.round == 2)
    assert world.run.state.terms is not None
    accept = m.Accept(world.run.state.run, world.run.state.terms.digest)
    del seen[:]
    for _ in range(9):
        world.send("c004", accept)
    world.pump(lambda w, x: isinstance(x, m.SurvivorList))
    assert not [x for _, _, x in seen if isinstance(x, m.OpenedSum)]


def test_a_forged_sum_ends_the_run_and_the_server_is_told_nothing(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.withdraws = True
    world.tamper = lambda s, r, x: (
        dataclasses.replace(x, tag=bytes(16)) if isinstance(x, m.OpenedSum) and x.round == 2 else x
    )
    everybody(world)
    assert isinstance(world.run.error, errors.RunFailedError)
    assert {type(error) for error in world.errors.values()} == {errors.SumError}
    assert set(world.errors) == set(names(5))
    for name, error in world.errors.items():
        left = world.sessions[name].leave(error)  # type: ignore[arg-type]
        assert (left.error, left.reason) == ("Stopped", "")
        assert world.sessions[name].base is not None  # what the sums before gave is kept
        assert not world.journals[name].kept_key(world.run.state.run)


@pytest.mark.parametrize("protection", ["masks", "bfv"])
@pytest.mark.parametrize("scope", ["client", "federation"])
def test_slots_and_their_counters_are_under_the_tag(
    tmp_path: Path, protection: str, scope: str
) -> None:
    """FedMGP: every slot, zeros included, and how many clients filled it."""
    options = {"selection_scope": scope} | (
        {"selection_fillers": 1} if scope == "federation" else {}
    )
    world = World(tmp_path, 3, **{**SECURE, **options, "protection": protection})
    world.toys = {name: Grouped(k) for k, name in enumerate(names(3))}
    everybody(world)
    assert world.run.error is None, world.run.error
    assert not world.errors
    for name in names(3):
        assert world.sessions[name].verified
    assert {*map(len, (world.journals[n].made(world.run.state.run, 3)[0] for n in names(3)))} == {
        32
    }


# -- what a log shows ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["split", "members", "prompt"])
def test_a_sum_that_is_not_that_of_its_round_shows_in_the_log(tmp_path: Path, what: str) -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if not (isinstance(message, m.OpenedSum) and message.round == 1):
            return message
        if what == "split" and recipient == VICTIM:
            return dataclasses.replace(message, tag=bytes(16))
        if what == "members":
            return dataclasses.replace(message, members=b"\x07")
        if what == "prompt":
            return dataclasses.replace(message, vector=bytes(len(message.vector)))
        return message

    text = {
        "split": "2 different sums of one round were told",
        "members": "a sum of c001, c002, c003, for whom no survivor list was signed",
        "prompt": "the global prompt is not what the sum of learning round 1 gives",
    }
    options: dict[str, Any] = {"peers": (), "max_attempts": 1}
    assert ("protection", text[what]) in failures(audited(tmp_path / "bad", tap, **options))
    assert not failures(audited(tmp_path / "good", **options))
