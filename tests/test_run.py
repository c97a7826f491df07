"""Whole runs in memory: admission, averaging, retries, late and returning clients, restart."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rounds import OPEN, entropy_from, identity, names, roster

from secure_fedprompt.clients.journal import FileJournal, MemoryJournal
from secure_fedprompt.clients.participant import Party
from secure_fedprompt.clients.session import Prompt, Session, Work
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.layout import TensorSpec, Values
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.settings import MethodSettings, ServerSettings
from secure_fedprompt.server.coordinator import Stage
from secure_fedprompt.server.run import Run, RunState
from secure_fedprompt.server.store import Store


class Toy:
    """A workload without a model: pulls the prompt towards the client's own target."""

    model_fingerprint, classes_digest, class_count = b"m" * 32, b"c" * 32, 7

    def __init__(self, target: float, weight: float) -> None:
        self.target, self.weight = target, weight

    def prepare(self, settings: MethodSettings) -> None:
        self.settings = settings

    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("ctx", (2, 3)), TensorSpec("extra", (4,)))

    def initial(self) -> Prompt:
        return np.full(10, 0.5, np.float32)

    def run(self, work: Work) -> tuple[Values, float]:
        values: dict[str, Any] = {k: np.float64(4) for k in ("seen", "correct", "loss")}
        if work.plan.training:
            step = 0.5 * (self.target - work.base) + 1e-6 * work.plan.round
            values |= {"ctx": step[:6].reshape(2, 3), "extra": step[6:]}
        return values, self.weight


class World:
    """A server and clients joined by a queue."""

    def __init__(self, folder: Path, n: int = 4, policy: Policy = OPEN, **changes: Any) -> None:
        waits = {"gather_seconds": 60.0, "training_seconds": 60.0}
        self.settings = ServerSettings(rounds=2, **{**waits, **changes})
        self.roster, self.folder, self.n, self.policy = roster(n), folder, n, policy
        self.clock, self.lost, self.errors = 0.0, set[str](), dict[str, Exception]()
        self.toys = {name: Toy(i / 10, 10.0 + i) for i, name in enumerate(names(n))}
        self.sessions: dict[str, Session] = {}
        self.journals = {name: MemoryJournal() for name in names(n)}
        self.queue: deque[tuple[str, str, m.Message]] = deque()
        self.start_server()

    def start_server(self) -> None:
        self.store = Store(self.folder, self.settings)
        self.events: list[tuple[str, Any]] = []
        self.store.on_event.append(lambda kind, value: self.events.append((kind, value)))
        state = self.store.load()
        self.run = Run(
            self.settings,
            self.roster,
            self.store,
            entropy_from(f"s{self.clock}"),
            state,
            self.clock,
        )

    def join(self, name: str, **hello: Any) -> None:
        entropy = entropy_from(f"{name} {self.clock}")
        party = Party(name, identity(name), self.roster, self.policy, self.journals[name], entropy)
        self.sessions[name] = Session(party, self.toys[name])
        self.lost.discard(name)
        message = dataclasses.replace(self.sessions[name].hello(), **hello)
        self.queue.append((name, "", message))

    def pump(self, until: Any = lambda world, message: False) -> None:
        """Deliver until the run is over, nothing moves, or ``until`` says stop."""
        idle = 0
        while not self.run.over or self.queue:
            if not self.queue:
                idle += 1
                if idle > 50:
                    raise AssertionError("nothing moves any more")
                self.clock += 5
                for name in set(self.sessions) - self.lost:
                    self.queue.append((name, "", m.Alive()))
                self.queue.extend(("", *out) for out in self.run.tick(self.clock))
                continue
            sender, recipient, message = self.queue.popleft()
            if not isinstance(message, m.Alive):
                idle = 0
            if until(self, message):
                return
            if sender in self.lost or recipient in self.lost:
                continue
            message = m.CATALOGUE.decode(m.CATALOGUE.encode(message))
            if sender:
                self.queue.extend(("", *out) for out in self.run.on(sender, message, self.clock))
                continue
            session = self.sessions[recipient]
            try:
                replies = session.on(message)
                if session.work is not None:
                    work = session.work
                    replies += session.trained(work, *self.toys[recipient].run(work))
            except errors.SecureFedPromptError as error:
                self.errors[recipient] = error
                replies = [m.Leave(type(error).__name__, str(error)[:500])]
            self.queue.extend((recipient, "", reply) for reply in replies)


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
        ({"classes_digest": b"x" * 32, "class_count": 9}, errors.MismatchError, "9 names.*has 7"),
        ({"method": "other"}, errors.MismatchError, "'other'.*'promptfl'"),
        ({"roster_digest": bytes(32)}, errors.RunFailedError, "same roster"),
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


def test_too_few_clients_before_the_deadline(tmp_path: Path) -> None:
    world = World(tmp_path, gather_seconds=20.0)
    world.join("c001")
    world.join("c002")
    world.pump()
    with pytest.raises(errors.TooFewClientsError, match=r"2 of at least 3 clients \(c001, c002\)"):
        raise world.run.error or AssertionError
    assert isinstance(world.errors["c001"], errors.RunFailedError)


def test_fewer_than_expected_go_on_after_the_deadline(tmp_path: Path) -> None:
    world = World(tmp_path, gather_seconds=20.0)
    for name in names(3):
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert world.run.state.nonces[-1].name == "c003"


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
    assert "2 of 3 clients answered while collecting" in rounds[0]["reason"]
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
        m.Welcome(state.run, state.server_nonce, state.nonces, b"{}", 0), server_nonce=bytes(32)
    )
    with pytest.raises(errors.ReplayError, match="run id"):
        session.on(forged)
    other = [m.Nonce("c002", bytes(32))]
    late = m.Welcome(m.run_id(bytes(32), other), bytes(32), tuple(other), b"{}", 0)
    strict = dataclasses.replace(session.party, policy=Policy(allow_late_join=False))
    with pytest.raises(errors.PolicyError, match="allow_late_join"):
        Session(strict, world.toys["c001"]).on(late)


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
    session, good = world.sessions["c001"], plans[0]
    changed = {
        "method": ({"method": "fedotp"}, "'fedotp'"),
        "settings": ({"settings_digest": bytes(32)}, "settings"),
        "model": ({"model_fingerprint": bytes(32)}, "model"),
        "classes": ({"classes_digest": bytes(32)}, "classes"),
    }
    for changes, words in changed.values():
        with pytest.raises(errors.MismatchError, match=words):
            session.on(m.Plan(dataclasses.replace(good.plan, **changes), good.base))
    with pytest.raises(errors.MismatchError, match="global prompt"):
        session.on(m.Plan(good.plan, bytes(len(good.base))))
    layout = (dataclasses.replace(good.plan.layout[0], shape=(3, 2)), *good.plan.layout[1:])
    with pytest.raises(errors.MismatchError, match="tensors"):
        session.on(m.Plan(dataclasses.replace(good.plan, layout=layout), good.base))
    assert session.on(good)


def test_the_starting_prompt_must_be_what_settings_and_model_give(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.toys["c001"].initial = lambda: np.zeros(10, np.float32)  # type: ignore[method-assign]
    for name in names(4):
        world.join(name)
    world.pump()
    assert "starting prompt" in str(world.errors["c002"])


def test_file_journal_survives_a_crash_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = FileJournal(path)
    run = b"r" * 16
    journal.begin_round(run, 1)
    journal.claim_upload(run, 1, b"u" * 32)
    journal.record_survivors(run, 1, ("a", "b"))
    journal.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = FileJournal(path)
        complete = sum(end <= cut for end in ends)
        assert journal.knows(run) is (complete >= 1)
        if complete >= 1:
            with pytest.raises(errors.ReplayError):
                journal.begin_round(run, 1)
        if complete >= 2:
            with pytest.raises(errors.UpdateReusedError):
                journal.claim_upload(run, 2, b"u" * 32)
        assert list(journal.survivor_lists(run)) == ([("a", "b")] if complete >= 3 else [])
        journal.begin_round(run, 2)
        journal.close()
        FileJournal(path).close()


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event":"round","run":"00","round":1}\nnonsense\n')
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


def test_a_client_stays_in_one_run_with_one_set_of_settings(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.Plan))
    session, state = world.sessions["c001"], world.run.state
    good = m.Welcome(
        state.run, state.server_nonce, state.nonces, world.settings.method_settings().to_bytes(), 0
    )
    assert session.on(good) == [m.Ready(state.run)]
    other = world.settings.method_settings()
    changed = msgspec.structs.replace(other, lr=0.7).to_bytes()
    with pytest.raises(errors.MismatchError, match="settings changed"):
        session.on(dataclasses.replace(good, settings=changed))
    nonces = (*state.nonces, m.Nonce("x", bytes(32)))
    with pytest.raises(errors.ReplayError, match="another run"):
        session.on(m.Welcome(m.run_id(bytes(32), nonces), bytes(32), nonces, good.settings, 0))


def test_learning_rounds_do_not_go_back_and_the_run_does_not_grow(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    plans: list[m.Plan] = []
    world.pump(lambda w, message: isinstance(message, m.Plan) and not plans.append(message))  # type: ignore[func-returns-value]
    session, plan = world.sessions["c001"], plans[0]
    session.on(plan)
    for changes in ({"rounds": 9}, {"learning_round": 2, "rounds": 9}):
        with pytest.raises(errors.ReplayError, match="after 1 of 2"):
            session.on(m.Plan(dataclasses.replace(plan.plan, round=2, **changes), plan.base))


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
        [] if s == "c001" and isinstance(msg, m.Initial) else original(s, msg, now)
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


def test_impossible_settings_fail_the_run_and_blame_nobody(tmp_path: Path) -> None:
    world = World(tmp_path, ring_bits=8)
    for name in names(4):
        world.join(name)
    world.pump()
    with pytest.raises(errors.RunFailedError, match="no round can be planned.*ring bits"):
        raise world.run.error or AssertionError
    assert not [text for kind, text in world.events if kind == "fault"]


def test_the_server_can_pin_model_and_classes(tmp_path: Path) -> None:
    world = World(tmp_path, clients=3, model_fingerprint="6D6D")
    world.join("c001", model_fingerprint=b"x" * 32)
    for name in names(4)[1:]:
        world.join(name)
    world.pump()
    assert world.run.error is None
    assert "the server wants 6D6D" in str(world.errors["c001"])


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


def test_a_client_that_is_still_encoding_is_not_planned_for(tmp_path: Path) -> None:
    """It says Alive but is not Ready: the round begins without it, and it joins a later one."""
    world = World(tmp_path)
    held: list[m.Message] = []
    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if sender == "c004" and isinstance(message, m.Ready) and now < 70:
            held.append(message)
            return []
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    for name in names(4):
        world.join(name)
    world.pump()
    assert held
    assert world.run.error is None
    assert world.store.summary()["rounds"][0]["cohort"] == ["c001", "c002", "c003"]
    assert not world.store.summary()["rounds"][0]["dropped"]


def test_nobody_is_asked_twice_for_the_starting_prompt(tmp_path: Path) -> None:
    world = World(tmp_path, gather_seconds=2000.0)
    asked: list[str] = []
    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if isinstance(message, m.Initial):
            asked.append(sender)
            return []
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    for name in names(4):
        world.join(name)
    world.pump()
    assert asked == list(names(4))
    assert "no client sent a usable starting prompt" in str(world.run.error)


def test_greetings_of_one_process_are_counted_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, message: isinstance(message, m.Advert))
    assert world.run.current is not None
    twin = m.Hello(
        world.run.clients["c002"].nonce, "", b"m" * 32, b"c" * 32, 7, world.roster.digest
    )
    ((_, welcome),) = world.run.on("c002", twin, world.clock)
    assert isinstance(welcome, m.Welcome)
    assert "c002" in world.run.current.waiting
    assert len(world.run.on("c009", m.Alive(), world.clock)) == 1
    assert not world.run.on("c009", m.Alive(), world.clock)  # one Rejoin is enough


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
    plan = next(x for _, to, x in [*world.queue, ("", "c001", None)] if isinstance(x, m.Plan))

    def begin(number: int) -> None:
        session.on(m.Plan(dataclasses.replace(plan.plan, round=number), plan.base))

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
    with pytest.raises(errors.PolicyError):  # the plan itself: not a matter of one round
        session.withdraw(errors.PolicyError("plan has a cohort of 2"))
