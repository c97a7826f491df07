"""Runs with clients, servers and files that misbehave."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import World
from rounds import identity, later, make_plan, names

from secure_fedprompt.clients.file_journal import FileJournal
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.server.planning import RunState
from secure_fedprompt.server.rounds.base import Stage


def test_file_journal_survives_a_crash_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = FileJournal(path)
    run = b"r" * 16
    plan = make_plan(3, run=run)
    journal.begin_round(plan)
    journal.claim_upload(run, 1)
    journal.keep_vector(plan, b"vector")
    journal.record_survivors(plan, ("a", "b"), b"opening")
    journal.record_reveal(plan)
    journal.close()
    whole, kept = path.read_bytes(), {p: p.read_bytes() for p in (tmp_path / "kept").iterdir()}
    ends = [i for i, byte in enumerate(whole) if byte == 10]  # a whole record counts without it
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        for file, data in kept.items():
            file.write_bytes(data)
        journal = FileJournal(path)
        complete = sum(end <= cut for end in ends)
        assert journal.knows(run) is (complete >= 1)
        if complete >= 1:
            with pytest.raises(errors.ReplayError):
                journal.begin_round(plan)
        if complete >= 2:
            with pytest.raises(errors.UpdateReusedError):
                journal.claim_upload(run, 1)
        assert journal.vector(plan) == (b"vector" if complete >= 3 else None)
        again = dataclasses.replace(plan, round=2, attempt=2)
        if complete >= 5:
            assert journal.near_lists(again) == [("a", "b")]
            with pytest.raises(errors.OpenedError, match="opened in round 1"):
                journal.begin_round(again)
            with pytest.raises(errors.OpenedError, match="opened before"):
                journal.begin_round(dataclasses.replace(again, rounds=2, learning_round=2))
            journal.begin_round(later(plan))
        else:
            assert journal.near_lists(again) == []  # signed, and nothing was opened
            journal.begin_round(again)
        journal.close()
        FileJournal(path).close()


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    good = '{"event":"upload","run":"00","round":1}\n'
    path.write_text(good + "nonsense\n")
    with pytest.raises(errors.ConfigError, match="line 2 is damaged"):
        FileJournal(path)


def test_malformed_initial_prompts_do_not_stop_the_server(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    spoiled: list[bool] = []
    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if isinstance(message, m.Initial) and not spoiled:
            spoiled.append(True)
            message = dataclasses.replace(message, vector=b"\0" * 7)
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    world.pump()
    assert spoiled
    assert world.run.error is None
    assert Stage.DONE in {r["outcome"] for r in world.store.summary()["rounds"]}


def test_run_state_defaults() -> None:
    assert RunState().learning_round == 1


def test_what_leaves_with_an_error_says_nothing_private(tmp_path: Path) -> None:
    """Errors about data or updates keep their text; errors about the server's own frames carry it."""
    world = World(tmp_path)
    world.join("c001")
    session = world.sessions["c001"]
    for private in (
        errors.DataError("image patients/smith.png cannot be read"),
        errors.UpdateError("update value 3 is nan"),
        errors.ModelError("class names 'hiv' and 'tbc'"),
    ):
        left = session.leave(private)
        assert (left.error, left.reason) == ("Stopped", "")
    told = session.leave(errors.PolicyError("plan has a cohort of 2"))
    assert (told.error, told.reason) == ("PolicyError", "plan has a cohort of 2")


@pytest.mark.parametrize("vector", [b"", b"\0" * 39, np.full(10, np.nan, "<f4").tobytes()])
def test_a_malformed_final_prompt_is_refused(tmp_path: Path, vector: bytes) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.Plan))
    with pytest.raises(errors.FieldError, match="final prompt"):
        world.sessions["c001"].on(m.Finish(world.run.state.run, vector, ""))


def test_a_client_without_a_starting_prompt_is_passed_over(tmp_path: Path) -> None:
    world = World(tmp_path, clients=4, min_clients=3, gather_seconds=500.0)
    for name in names(4):
        world.join(name)
    original = world.run.on
    world.run.on = lambda s, msg, now: (  # type: ignore[method-assign]
        [] if s == "c001" and isinstance(msg, m.Initial | m.Ready) else original(s, msg, now)
    )
    world.pump()
    assert world.run.error is None
    assert world.store.summary()["rounds"][0]["cohort"] == ["c002", "c003", "c004"]


@pytest.mark.parametrize(
    "tensors",
    [
        (TensorSpec("weight", (10,)),),
        (TensorSpec("a", (5,)), TensorSpec("a", (5,))),
        (TensorSpec("a", (2**32 - 1, 2**32 - 1, 2**32 - 1)),),
        (TensorSpec("a", (10,)), TensorSpec("b", (2**32 - 1, 2**32 - 1, 0))),
        (TensorSpec("__metadata__", (10,)),),
    ],
)
def test_unusable_tensors_are_refused_and_never_stored(tmp_path: Path, tensors: Any) -> None:
    world = World(tmp_path, clients=4)
    for name in names(4):
        world.join(name)
    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if sender == "c001" and isinstance(message, m.Initial):
            message = dataclasses.replace(message, tensors=tensors)
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    world.pump()
    assert world.run.error is None
    assert [t.name for t in world.run.state.tensors] == ["ctx", "extra"]


def test_a_forgotten_client_is_asked_to_join_again(tmp_path: Path) -> None:
    world = World(tmp_path, alive_seconds=10.0, gather_seconds=1000.0)
    world.join("c001")
    world.pump(lambda w, message: isinstance(message, m.Alive))
    world.queue.clear()
    world.clock += 60
    world.run.tick(world.clock)
    assert not world.run.clients
    assert world.run.on("c001", m.Alive(), world.clock) == [("c001", m.Rejoin())]
    assert isinstance(world.sessions["c001"].on(m.Rejoin())[0], m.Hello)


def test_impossible_settings_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="no round can be planned for 4.*ring bits"):
        World(tmp_path, ring_bits=8)


def test_the_server_can_pin_model_and_classes(tmp_path: Path) -> None:
    world = World(tmp_path, clients=3, model_fingerprint="6d6d")
    world.join("c001", model_fingerprint=b"x" * 32)
    for name in names(4)[1:]:
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert "the server wants 6d6d" in str(world.errors["c001"])


def test_a_finished_run_that_was_not_marked_so_just_finishes(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    world.pump()
    world.store.close()
    world.start_server()
    for name in names(4):
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert len(world.store.summary()["rounds"]) == 3


def test_a_suspect_sits_out_one_attempt(tmp_path: Path) -> None:
    world = World(tmp_path, clients=4)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.Advert))
    current = world.run.current
    assert current is not None
    current.stage, current.reason, current.suspect = Stage.ABORTED, "BadShareError: ...", "c002"
    world.queue.clear()
    plans = [x for _, x in world.run._after([], world.clock) if isinstance(x, m.Plan)]
    assert plans[0].plan.cohort == ("c001", "c003", "c004")
    assert "c002" in world.run.clients


def test_two_processes_cannot_share_a_journal(tmp_path: Path) -> None:
    first = FileJournal(tmp_path / "j")
    with pytest.raises(errors.ConfigError, match="in use by another client"):
        FileJournal(tmp_path / "j")
    first.close()
    FileJournal(tmp_path / "j").close()


def test_a_peers_bad_box_costs_a_round_and_not_the_run(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.Plan))
    session = world.sessions["c001"]
    plan = next(x.message for _, _, x in world.queue if isinstance(x.message, m.Plan))

    def begin(number: int) -> None:
        again = dataclasses.replace(plan.plan, round=number, attempt=number)
        session.on(m.Plan(again, plan.base))

    bad = errors.SealError("sealed shares from c003 do not open")
    begin(1)
    (withdrawn,) = session.withdraw(bad)
    assert isinstance(withdrawn, m.Withdraw)
    assert (withdrawn.round, withdrawn.error) == (1, "SealError")
    assert session.round is None
    begin(2)
    session.withdraw(bad)
    begin(3)
    with pytest.raises(errors.SealError):  # three in a row: something is wrong for good
        session.withdraw(bad)
    begin(4)
    session._withdrawn = 0
    with pytest.raises(errors.TermsError):  # the plan itself: not a matter of one round
        session.withdraw(errors.TermsError("plan's clip is 2"))


def signed_head(name: str, by: str, run: bytes) -> m.LogHead:
    head = m.LogHead(run, 1, 7, b"h" * 32, bytes(64))
    return dataclasses.replace(head, signature=identity(by).sign(Purpose.LOG_HEAD, head.body(name)))


@pytest.mark.parametrize(("by", "good"), [("c002", True), ("c003", False)])
def test_a_log_head_must_be_signed_by_its_sender(tmp_path: Path, by: str, good: bool) -> None:
    world = World(tmp_path, n=4)
    for name in names(4):
        world.join(name)
    sent: list[bool] = []

    def until(world: World, message: m.Message) -> bool:
        if isinstance(message, m.Advert) and not sent:
            sent.append(True)
            world.send("c002", signed_head("c002", by, world.run.state.run))
        return False

    world.pump(until)
    assert sent
    faults = [text for kind, text in world.events if kind == "fault"]
    told = "c002: SignatureError: signature of c002 on its log head does not verify"
    assert (told in faults) is not good
    assert world.run.error is None


@pytest.mark.parametrize(("by", "good"), [("server", True), ("c003", False)])
def test_a_servers_log_head_must_be_signed_by_it(tmp_path: Path, by: str, good: bool) -> None:
    world = World(tmp_path, n=4, helpers=("notary",))
    head = signed_head("server", by, b"r" * 16)
    for name in ("c001", "notary"):
        world.join(name)
        if good:
            assert world.sessions[name].on(head) == []
        else:
            with pytest.raises(errors.SignatureError, match="server on its log head"):
                world.sessions[name].on(head)


def test_one_more_share_tells_a_bad_one_from_good_ones(tmp_path: Path) -> None:
    """Four of five answer, one with bad shares: nothing fits until the fifth comes back."""
    world = World(tmp_path, 5, alive_seconds=12.0, stage_seconds=10.0, gather_seconds=120.0)
    for name in names(5):
        world.join(name)

    def tamper(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.UnmaskRequest) and recipient == "c005" and message.round == 1:
            world.lost.add("c005")
        if isinstance(message, m.Reveal) and sender == "c001" and message.round == 1:
            bad = bytes([bytes(message.shares)[0] ^ 1]) + bytes(message.shares)[1:]
            return dataclasses.replace(message, shares=bad)
        return message

    world.tamper = tamper
    world.pump(lambda w, message: w.clock > 40)
    assert world.run.current is not None
    assert world.run.current.stage is Stage.UNMASKING
    world.tamper = lambda sender, recipient, message: message
    world.reconnect("c005")
    world.pump()
    assert world.run.error is None
    faults = [text for kind, text in world.events if kind == "fault"]
    assert any("c001: BadShareError: relayed shares that disagree" in text for text in faults)
    assert world.store.summary()["rounds"][0]["outcome"] == "done"
