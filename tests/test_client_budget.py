"""The budget of client-level privacy: counted before an upload leaves, and never exceeded."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from budgets import NONE, opened
from federation import Toy, World
from rounds import OPEN, names

from secure_fedprompt import client as client_program
from secure_fedprompt.clients.ledger import Entry, Ledger, Upload
from secure_fedprompt.clients.work import Work
from secure_fedprompt.commands import keys as cli
from secure_fedprompt.protocol import client_noise, errors, fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.errors import BudgetError
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.terms import RunTerms
from secure_fedprompt.server.run import Run

NOISY: dict[str, Any] = {
    "weights": "uniform", "metrics": "off", "dp_noise": 2.0, "dp_clip": 1.0, "rounds": 3,
}  # fmt: skip


def policy(**changes: Any) -> Policy:
    return Policy(**{**{f: getattr(OPEN, f) for f in OPEN.__struct_fields__}, **changes})


def federation(folder: Path, **changes: Any) -> World:
    world = World(folder, 4, **{**NOISY, **changes})
    world.withdraws = True
    return world


def everybody(world: World) -> World:
    for name in names(4):
        world.join(name)
    world.pump()
    return world


@pytest.mark.parametrize("protection", ["masks", "bfv"])
def test_each_upload_is_counted_once_before_it_leaves(tmp_path: Path, protection: str) -> None:
    world = federation(tmp_path / "w", protection=protection)
    path, sent = tmp_path / "privacy.jsonl", list[int]()

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if sender == "c001" and isinstance(message, m.MaskedUpload | m.CipherUpload):
            sent.append(len(Ledger.read(path).uploads))
        return message

    world.tamper = tap
    with opened(path) as ledger:
        world.ledgers["c001"] = ledger
        everybody(world)
    assert sent == [1, 2, 3]
    plan = world.run.state.terms.plan(world.run.state.terms.sample(1))  # type: ignore[union-attr]
    assert (plan.quorum, plan.noise.honest) == (3, 2)
    rho = client_noise.concentrated(plan.noise, plan.layout)
    assert rho == pytest.approx(1 / 8, rel=1e-4)  # 1 / (2 z^2), on a fine grid
    assert [(u.learning_round, u.rho) for u in world.ledgers["c002"].uploads] == [
        (1, rho), (2, rho), (3, rho)
    ]  # fmt: skip
    assert Ledger.read(path).uploads == world.ledgers["c002"].uploads


def test_another_attempt_repeats_the_same_noise_and_costs_nothing(tmp_path: Path) -> None:
    world, lost = federation(tmp_path, max_attempts=3), list[int]()

    def lose_once(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Consistent) and message.round == 1:
            lost.append(message.round)
            return m.Withdraw(message.run, message.round, "SealError", "")
        return message

    world.tamper = lose_once
    everybody(world)
    assert world.run.error is None
    assert len(lost) >= 2
    assert world.run.state.round == 4  # one more than learning rounds
    assert [u.learning_round for u in world.ledgers["c001"].uploads] == [1, 2, 3]


def test_sums_without_noise_count_as_infinite(tmp_path: Path) -> None:
    for number, changes in enumerate(({"dp_noise": 0.0}, {"dp_noise": 0.0, "metrics": "final"})):
        world = everybody(federation(tmp_path / str(number), **changes))
        assert world.run.error is None
        uploads = world.ledgers["c001"].uploads
        assert [u.rho for u in uploads] == [None] * (3 + number)  # counts are a sum as well
        assert world.ledgers["c001"].rho() == math.inf
    world = everybody(federation(tmp_path / "z", dp_noise=0.0, method="zeroshot"))
    assert {u.rho for u in world.ledgers["c001"].uploads} == {0.0}  # zeros tell nothing


def test_a_run_beyond_the_budget_is_refused_and_the_server_learns_no_figure(tmp_path: Path) -> None:
    whole = client_noise.epsilon(3 / 8, 1e-5)
    told: list[m.Leave] = []

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Leave):
            told.append(message)
        return message

    world = federation(tmp_path / "a", policy=policy(max_client_epsilon=0.99 * whole))
    world.tamper = tap
    everybody(world)
    assert all(isinstance(e, BudgetError) for e in world.errors.values())
    assert len(world.errors) == 4
    assert str(world.errors["c001"]).startswith("policy.max_client_epsilon = ")
    assert "the run's 3 rounds would make it" in str(world.errors["c001"])
    assert not any(ledger.uploads for ledger in world.ledgers.values())
    world = federation(tmp_path / "b", policy=policy(max_client_epsilon=1.01 * whole))
    everybody(world)
    assert world.run.error is None
    no_limit = policy(max_client_epsilon=1e6)
    for name, more in (("c", {}), ("d", {"metrics": "final", "method": "zeroshot"})):
        world = federation(tmp_path / name, policy=no_limit, dp_noise=0.0, **more)
        everybody(world)
        assert "would make it inf" in str(world.errors["c001"])


def test_a_client_leaves_without_the_reason(tmp_path: Path) -> None:
    """What is spent elsewhere is nobody's business."""
    world = federation(tmp_path, policy=policy(max_client_epsilon=0.1))
    everybody(world)
    session = world.sessions["c001"]
    assert session.leave(world.errors["c001"]) == m.Leave("Stopped", "")


def test_a_budget_that_ends_within_a_run_leaves_zeros_and_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others count on the noise; the update stays at home."""
    world = federation(tmp_path, policy=policy(max_client_epsilon=8.0), dp_noise=0.5, dp_clip=4.0)
    world.toys = {n: Toy(10.0 if n == "c001" else 0.5, 1.0) for n in names(4)}
    sums = watch_sums(monkeypatch)

    def overspent(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Plan) and recipient == "c001":
            world.ledgers["c001"].release(Upload("ff", 1, 50.0), 0.0, 1e-5)  # by another process
        return message

    world.tamper = overspent
    assert world.policy.max_client_epsilon
    with monkeypatch.context() as patched:
        patched.setattr(Policy, "check_budget", lambda *args: None)
        everybody(world)
    assert world.run.error is None
    assert isinstance(world.sessions["c001"].failed_because, BudgetError)
    assert world.ledgers["c001"].rho(lambda run: run != "ff") == 0.0
    values = np.array(sums)
    assert abs(values.mean()) < 5 * 0.5 * 4 * math.sqrt(4 / 2) / math.sqrt(values.size)
    assert values.std() > 0.8 * 0.5 * 4 * math.sqrt(4 / 2)  # four shares, two are counted on


def watch_sums(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The opened sums of updates, as the server sees them."""
    sums, applied = list[Any](), Run._apply

    def apply(self: Run, done: Any) -> None:
        sums.append(fixedpoint.decode(done.plan.layout, done.integers)[:10])
        applied(self, done)

    monkeypatch.setattr(Run, "_apply", apply)
    return sums


def test_zeros_after_a_failure_cost_nothing(tmp_path: Path) -> None:
    world = federation(tmp_path)

    def fails(work: Work) -> Any:
        raise errors.UpdateError("no memory")

    world.toys["c001"].run = fails
    everybody(world)
    assert world.run.error is None
    assert not world.ledgers["c001"].uploads
    assert len(world.ledgers["c002"].uploads) == 3


def test_what_was_spent_in_this_run_already_is_not_planned_twice(tmp_path: Path) -> None:
    terms = federation_terms(tmp_path)
    one = policy().cost(terms.plan(terms.sample(1)))
    limited = policy(max_client_epsilon=client_noise.epsilon(4 * one, 1e-5) * (1 + 1e-9))
    limited.check_budget(terms, 0.0, 0.0)
    limited.check_budget(terms, 0.0, 2 * one)  # a client that came back after two rounds
    limited.check_budget(terms, one, 3 * one)
    for others, own in ((1.01 * one, 0.0), (0.0, 4.01 * one), (math.inf, 0.0)):
        with pytest.raises(BudgetError):
            limited.check_budget(terms, others, own)
    policy().check_budget(terms, math.inf, math.inf)  # no limit


def federation_terms(folder: Path) -> RunTerms:
    terms = everybody(federation(folder)).run.state.terms
    assert terms is not None
    return terms


def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program, with a server that is not there."""
    monkeypatch.chdir(tmp_path)
    members = (
        cli.make_key("server", "server", tmp_path),
        cli.make_key("alice", "client", tmp_path),
    )
    Path("roster.toml").write_text(Roster.of(members).to_toml())
    with opened(tmp_path / "state" / "alice" / "privacy.jsonl") as ledger:
        ledger.reserve(Entry("ab", 1, 0.0, 0.5, 3), NONE)
    words = ["--key", "alice.pem", "--dp-kind", "sample", "--dp-target-epsilon", "8"]
    assert client_program.main(words) == 11
    assert "in 1 rounds without dp, so that epsilon is infinite" in capsys.readouterr().err


def test_a_server_that_runs_again_and_again_gets_no_more_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that could plan sums as it liked averaged the noise of thousands of them away. Now a
    run has as many as its terms say, and all runs together what the client's owner allows."""
    sums = watch_sums(monkeypatch)
    planned = client_noise.epsilon(3 / 8, 1e-5)
    limit = 2.5 * planned
    worlds = [federation(tmp_path / "0", policy=policy(max_client_epsilon=limit))]
    everybody(worlds[0])
    for number in range(1, 12):
        again = federation(tmp_path / str(number), policy=worlds[0].policy, gather_seconds=1e6)
        again.journals, again.ledgers = worlds[0].journals, worlds[0].ledgers
        again.clock = 1e3 * number  # or all nonces would be the same
        worlds.append(everybody(again))
    ledger = worlds[0].ledgers["c001"]
    assert len(sums) == len(ledger.uploads)
    spent = client_noise.epsilon(ledger.rho(), 1e-5)
    assert planned < spent <= limit
    done = [world.run.error is None for world in worlds]
    assert done == sorted(done, reverse=True)
    assert 1 < sum(done) < 12
    assert all(isinstance(error, BudgetError) for error in worlds[-1].errors.values())


@pytest.mark.parametrize("bend", ["rounds", "frozen"])
def test_a_server_gets_no_more_sums_in_a_run_than_its_terms_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bend: str
) -> None:
    """It plans for ever, or repeats a learning round with a nudge of its prompt."""
    sums, applied = watch_sums(monkeypatch), Run._apply
    world = federation(tmp_path, max_attempts=2)

    def apply(self: Run, done: Any) -> None:
        before, number = self.state.prompt, self.state.learning_round
        applied(self, done)
        if bend == "rounds":
            self.settings = self.settings.__class__(**{**NOISY, "rounds": 10_000})
        elif len(sums) < 50:
            self.state.prompt, self.state.learning_round = before + np.float32(5e-7), number

    monkeypatch.setattr(Run, "_apply", apply)
    with contextlib.suppress(AssertionError, errors.SecureFedPromptError):
        everybody(world)
    assert len(sums) == (3 if bend == "rounds" else 1)
    assert world.ledgers["c001"].rho() <= 3 / 8 * 1.001
