"""Whole runs in memory: admission, averaging, retries, late and returning clients, restart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from federation import Toy, World
from rounds import names

from secure_fedprompt.clients.session import Session
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import Store, rounds_of


def expected_prompt(toys: Mapping[str, Toy], rounds: int) -> np.ndarray:
    prompt = np.full(10, 0.5)
    total = sum(toy.weight for toy in toys.values())
    for r in range(1, rounds + 1):
        steps = [toy.weight * (0.5 * (toy.target - prompt) + 1e-6 * r) for toy in toys.values()]
        prompt = prompt + sum(steps) / total
    return prompt


def test_a_run_averages_with_weights_and_ends_everywhere(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert world.run.state.prompt is not None
    assert np.allclose(world.run.state.prompt, expected_prompt(world.toys, 2), atol=1e-5)
    finals = [session.final for session in world.sessions.values()]
    assert all(final is not None and (final == world.run.state.prompt).all() for final in finals)
    summary = world.store.summary()
    assert [r["learning_round"] for r in summary["rounds"]] == [1, 2, 3]
    assert summary["accuracy_after"] == 1.0
    assert (tmp_path / "prompts" / "global-0002.safetensors").exists()
    assert not (tmp_path / "prompts" / "global-0003.safetensors").exists()


def test_a_round_is_told_without_reading_those_before(tmp_path: Path) -> None:
    """Or a thousandth round would cost a thousand times the first."""
    world, told = World(tmp_path, rounds=3), list[Any]()
    world.store.on_event.append(lambda kind, value: told.append(value) if kind == "round" else None)
    read = list[str]()
    world.store._db.set_trace_callback(read.append)
    for name in names(4):
        world.join(name)
    world.pump()
    selects = [q for q in read if "FROM rounds WHERE" in q or "FROM traffic" in q]
    world.store._db.set_trace_callback(None)
    assert [row["round"] for row in told] == [1, 2, 3, 4]
    assert len(selects) == 8
    for number, query in enumerate(selects):
        assert f"BETWEEN {1 + number // 2} AND {1 + number // 2}" in query
    alone = [rounds_of(world.store._db, row["round"])[0] for row in told]
    assert alone == rounds_of(world.store._db)
    said = [row["checked"] for row in alone]
    assert [row | {"checked": []} for row in told] == [row | {"checked": []} for row in alone]
    assert said[0] == list(names(4))


def test_uniform_weights_hide_counts(tmp_path: Path) -> None:
    world = World(tmp_path, weights="uniform")
    for toy in world.toys.values():
        toy.weight = 1.0
    for name in names(4):
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert all(r["metrics"]["weight"] == 4 for r in world.store.summary()["rounds"])


@pytest.mark.parametrize(
    ("hello", "error", "words"),
    [
        (
            {"model_fingerprint": b"x" * 32},
            errors.MismatchError,
            "7878787878787878.*6d6d6d6d6d6d6d6d",
        ),
        ({"classes_digest": b"x" * 32}, errors.MismatchError, "7878787878787878.*6363636363636363"),
        ({"method": "other"}, errors.MismatchError, "'other'.*'promptfl'"),
        ({"roster_digest": bytes(32)}, errors.RosterMismatchError, "same roster"),
    ],
)
def test_a_mismatch_is_refused_with_both_values(
    tmp_path: Path, hello: dict[str, Any], error: type[Exception], words: str
) -> None:
    world = World(tmp_path, clients=3)
    world.join("c001")
    world.join("c004", **hello)
    world.join("c002")
    world.join("c003")
    world.pump()
    assert world.run.error is None  # the others finish
    assert set(world.errors) == {"c004"}
    with pytest.raises(error, match=words):
        raise world.errors["c004"]


@pytest.mark.parametrize("kind", [m.Advert, m.Shares, m.MaskedUpload, m.Consistent, m.Reveal])
def test_a_client_lost_at_any_message_costs_nothing(tmp_path: Path, kind: type) -> None:
    world = World(tmp_path, alive_seconds=12.0)
    for name in names(4):
        world.join(name)

    def lose(world: World, message: m.Message) -> bool:
        return False

    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if sender == "c002" and isinstance(message, kind) and message.round == 1:
            world.lost.add("c002")
            return []
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    world.pump(lose)
    assert world.run.error is None
    rounds = world.store.summary()["rounds"]
    assert all(r["outcome"] == "done" for r in rounds)
    early = kind in (m.Advert, m.Shares, m.MaskedUpload)
    assert rounds[0]["metrics"]["contributors"] == (3 if early else 4)
    assert rounds[-1]["cohort"] == ["c001", "c003", "c004"]


def test_an_aborted_round_is_tried_again_with_fresh_keys_and_number(tmp_path: Path) -> None:
    world = World(tmp_path, n=3, alive_seconds=1e9)
    for name in names(3):
        world.join(name)
    adverts: list[m.Advert] = []
    dropped: list[bool] = []

    def until(world: World, message: m.Message) -> bool:
        if isinstance(message, m.Advert):
            adverts.append(message)
        return False

    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if sender == "c002" and isinstance(message, m.MaskedUpload) and not dropped:
            dropped.append(True)
            return []
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    world.pump(until)
    assert world.run.error is None
    rounds = world.store.summary()["rounds"]
    assert [(r["round"], r["learning_round"], r["outcome"]) for r in rounds] == [
        (1, 1, "aborted"), (2, 1, "done"), (3, 2, "done"), (4, 3, "done"),
    ]  # fmt: skip
    assert "2 of 3 clients answered while training" in rounds[0]["reason"]
    keys = [a.mask_key for a in adverts] + [a.seal_key for a in adverts]
    assert len(set(keys)) == len(keys)


def test_rounds_that_keep_aborting_fail_the_run(tmp_path: Path) -> None:
    world = World(tmp_path, n=3, alive_seconds=1e9, max_attempts=2)
    for name in names(3):
        world.join(name)
    original = world.run.on
    world.run.on = lambda s, msg, now: (  # type: ignore[method-assign]
        [] if s == "c002" and isinstance(msg, m.Shares) else original(s, msg, now)
    )
    world.pump()
    with pytest.raises(errors.RunFailedError, match=r"round 1 aborted 2 times: 2 of 3 clients"):
        raise world.run.error or AssertionError
    assert all("round 1 aborted" in str(e) for e in world.errors.values())


def test_a_returning_client_joins_the_next_round(tmp_path: Path) -> None:
    world = World(tmp_path, alive_seconds=12.0)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.SurvivorList))
    world.queue.clear()
    for name in names(4):
        world.join(name)  # all reconnect: the open round is lost, the next has everybody
    world.pump()
    rounds = world.store.summary()["rounds"]
    assert rounds[0]["outcome"] == "aborted"
    assert len(rounds[-1]["cohort"]) == 4
    assert world.run.error is None


def test_a_restarted_server_goes_on_with_the_next_round_number(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.MaskedUpload) and message.round == 2)
    before = world.run.state
    world.store.close()
    world.queue.clear()
    world.clock += 100
    world.start_server()
    assert world.run.state.run == before.run
    assert world.run.state.round == 2
    assert world.run.state.prompt is not None
    assert before.prompt is not None
    assert (world.run.state.prompt == before.prompt).all()
    for name in names(4):
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert [(r["round"], r["learning_round"]) for r in world.store.summary()["rounds"]] == [
        (1, 1), (3, 2), (4, 3),
    ]  # fmt: skip
    assert np.allclose(world.run.state.prompt, expected_prompt(world.toys, 2), atol=1e-5)


def test_a_run_folder_keeps_its_settings(tmp_path: Path) -> None:
    settings = ServerSettings(rounds=2)
    Store(tmp_path, settings).close()
    Store(tmp_path, msgspec.structs.replace(settings, bind="tcp://127.0.0.1:1")).close()
    with pytest.raises(errors.ConfigError, match=r"begun with rounds = 2, now it is 3"):
        Store(tmp_path, msgspec.structs.replace(settings, rounds=3))
    assert "server.pem" not in (tmp_path / "server.json").read_text()


def test_a_run_id_holds_every_clients_nonce(tmp_path: Path) -> None:
    world = World(tmp_path)
    session = None
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.Welcome))
    state = world.run.state
    session = world.sessions["c001"]
    forged = dataclasses.replace(
        m.Welcome(state.run, state.server_nonce, state.commitments, b"{}", 0),
        server_nonce=bytes(32),
    )
    with pytest.raises(errors.ReplayError, match="run id"):
        session.on(forged)
    other = [m.Nonce("c002", bytes(32))]
    late = m.Welcome(m.run_id(bytes(32), other), bytes(32), tuple(other), b"{}", 0)
    strict = dataclasses.replace(session.party, policy=Policy(allow_late_join=False))
    with pytest.raises(errors.PolicyError, match="allow_late_join"):
        Session(strict, world.toys["c001"]).on(late)


def test_who_asks_is_told_whether_there_was_something_to_compare(tmp_path: Path) -> None:
    def asked(**settings: str) -> m.Probed:
        (tmp_path / str(len(settings))).mkdir(exist_ok=True)
        world = World(tmp_path / str(len(settings)), **settings)
        if not settings:
            probe = m.Probe("", b"m" * 32, b"c" * 32, world.roster.digest)
            ((_, first),) = world.run.on("c002", probe, 0.0)
            assert (first.compared, first.error) == (0, "")  # nobody has said which it is
            world.join("c001")
            world.pump(lambda w, message: bool(w.run.clients))
        other = m.Probe("", b"m" * 32, b"x" * 32, world.roster.digest)
        ((_, found),) = world.run.on("c002", other, 0.0)
        return found

    found = asked()
    assert (found.compared, found.error) == (1, "MismatchError")
    assert (
        "the run's, as c001 was first to say, has 6363636363636363: name the same" in found.reason
    )
    assert "classes_digest in the server's file says which list is right" in found.reason
    pinned = asked(model_fingerprint="6d" * 32, classes_digest="63" * 32)
    assert (pinned.compared, pinned.error) == (1, "MismatchError")
    assert "the server wants 6363" in pinned.reason


def test_clients_check_plan_and_prompt_against_their_own(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    plans: list[m.Plan] = []

    def until(w: World, message: m.Message) -> bool:
        if isinstance(message, m.Plan):
            plans.append(message)
        return bool(plans)

    world.pump(until)
    session, good = world.sessions["c002"], plans[0]
    changed = {
        "method": ({"method": "fedotp"}, "'fedotp'"),
        "settings": ({"settings_digest": bytes(32)}, "settings"),
        "model": ({"model_fingerprint": bytes(32)}, "model"),
        "classes": ({"classes_digest": bytes(32)}, "classes"),
    }
    for changes, words in changed.values():
        with pytest.raises(errors.TermsError, match=words):
            session.on(m.Plan(dataclasses.replace(good.plan, **changes), good.base))
    with pytest.raises(errors.MismatchError, match="global prompt"):
        session.on(m.Plan(good.plan, bytes(len(good.base))))
    layout = (dataclasses.replace(good.plan.layout[0], shape=(3, 2)), *good.plan.layout[1:])
    with pytest.raises(errors.TermsError, match="layout"):
        session.on(m.Plan(dataclasses.replace(good.plan, layout=layout), good.base))
    assert session.on(good)


def test_the_starting_prompt_must_be_what_settings_and_model_give(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.toys["c001"].initial = lambda: np.zeros(10, np.float32)  # type: ignore[method-assign]
    for name in names(4):
        world.join(name)
    world.pump()
    assert set(world.errors) == {"c001"}  # whoever sent it is named, and the others go on
    assert "starting prompt of c001 is not the run's" in str(world.errors["c001"])
    assert any("c001: its starting prompt is not what c002" in str(v) for _, v in world.events)
    assert world.run.error is None
    assert world.store.summary()["rounds"][-1]["cohort"] == ["c002", "c003", "c004"]


def test_a_client_that_computes_another_start_is_told_so_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    world.toys["c003"].initial = lambda: np.zeros(10, np.float32)  # type: ignore[method-assign]
    for name in names(4):
        world.join(name)
    world.pump()
    assert set(world.errors) == {"c003"}
    assert "starting prompt of c003" in str(world.errors["c003"])
    assert world.run.error is None


def test_a_probe_is_answered_and_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, 4)
    good = m.Probe("", b"m" * 32, b"c" * 32, world.roster.digest)

    def ask(**changes: Any) -> m.Probed:
        ((name, answer),) = world.run.on("c001", dataclasses.replace(good, **changes), 0.0)
        assert name == "c001"
        assert isinstance(answer, m.Probed)
        return answer

    first = ask()
    assert (first.error, first.protection, first.clients, first.quorum) == ("", "masks", 4, 3)
    assert MethodSettings.from_bytes(first.settings) == world.settings.method_settings()
    assert ask(model_fingerprint=bytes(32)).error == ""  # the first to join says which it is
    assert not world.run.clients
    assert not world.run.state.model_fingerprint
    world.join("c002")
    world.pump(lambda w, message: bool(w.run.clients))
    assert ask().error == ""
    for changes, error in (
        ({"model_fingerprint": bytes(32)}, "MismatchError"),
        ({"classes_digest": bytes(32)}, "MismatchError"),
        ({"roster_digest": bytes(32)}, "RosterMismatchError"),
        ({"method": "coop"}, "MismatchError"),
    ):
        assert ask(**changes).error == error
    assert set(world.run.clients) == {"c002"}
    assert not [text for kind, text in world.events if kind == "refused"]
