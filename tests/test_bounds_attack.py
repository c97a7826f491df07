"""The attack that read every update through varied bounds, and lists that solve for one client."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreed import everybody, federation
from federation import World
from rounds import OPEN, names

from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.rounds.masks import Advertised
from secure_fedprompt.protocol import errors, fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.terms import RunTerms
from secure_fedprompt.server import run as server_run
from secure_fedprompt.server.run import Run

COUNTED = Policy(metrics=(), weights=())


def frozen(monkeypatch: pytest.MonkeyPatch, bend: Callable[[Any, int], Any]) -> list[Any]:
    """A server that keeps the prompt, but for a nudge, and bends every plan. Returns its sums."""
    sums: list[Any] = []
    planned, applied = server_run.round_plan, Run._apply

    def plan(state: Any, *args: Any) -> Any:
        made = planned(state, *args)
        return bend(made, state.learning_round) if made.training else made

    def apply(self: Run, done: Any) -> None:
        before = self.state.prompt
        sums.append((done.plan, done.integers))
        applied(self, done)
        assert before is not None
        self.state.prompt = before + np.float32(5e-7)
        for client in self.clients.values():
            client.informed = 0

    monkeypatch.setattr(server_run, "round_plan", plan)
    monkeypatch.setattr(Run, "_apply", apply)
    return sums


def believing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that take any prompt: they would refuse one that is not what the last sum gives."""
    monkeypatch.setattr(MemoryJournal, "note_made", lambda *_, own: None)
    monkeypatch.setattr(Advertised, "_check_prompt", lambda *_: None)


def with_weight(plan: Any, number: int) -> Any:
    layout = fixedpoint.size_layout(
        [TensorSpec("ctx", (2, 3)), TensorSpec("extra", (4,))], 5, clip=plan.clip,
        max_weight=number, max_seen=65536, ring_bits=32, metrics=True,
    )  # fmt: skip
    return dataclasses.replace(plan, max_weight=number, layout=layout)


def solved(sums: list[Any]) -> np.ndarray:
    """Every client's update, up to order, from sums of min(n_i, B) u_i: second differences in B
    jump where B passes an n_i, by u_i."""
    by_bound = {
        plan.max_weight: fixedpoint.decode(plan.layout, integers)[:10]
        for plan, integers in sums
        if plan.training
    }
    bounds = sorted(by_bound)
    slope = np.array([by_bound[b + 1] - by_bound[b] for b in bounds[:-1]])
    jumps = slope[:-1] - slope[1:]
    found = jumps[np.linalg.norm(jumps, axis=1) > 0.1]
    return np.array(found)


def test_a_bound_that_grows_from_plan_to_plan_would_open_every_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack, with clients that take every plan as it comes."""
    monkeypatch.setattr(RunTerms, "admit", lambda self, plan: None)
    believing(monkeypatch)
    sums = frozen(monkeypatch, with_weight)
    world = everybody(federation(tmp_path, policy=OPEN))
    assert world.run.error is None
    found = solved(sums)
    assert len(found) == 5  # those with 7, 11, 12, 20 and 33 images
    for toy, update in zip(world.toys.values(), found, strict=True):
        cosine = update @ toy.update / np.linalg.norm(update) / np.linalg.norm(toy.update)
        assert cosine > 0.9999


BENT: dict[str, Callable[[Any, int], Any]] = {
    "max_weight": with_weight,
    "clip": lambda plan, number: dataclasses.replace(plan, clip=1.0 - number / 50),
    "layout": lambda plan, number: dataclasses.replace(
        plan,
        layout=tuple(
            dataclasses.replace(f, bound=float(number)) if f.name in ("seen", "correct") else f
            for f in plan.layout
        ),
    ),
    "rounds": lambda plan, number: dataclasses.replace(plan, rounds=plan.rounds + number),
}


@pytest.mark.parametrize(
    ("field", "weights"),
    [(field, w) for field in BENT for w in ("samples", "uniform")
     if (field, w) != ("max_weight", "uniform")],
)  # fmt: skip
def test_no_bound_varies_from_sum_to_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, weights: str
) -> None:
    sums = frozen(monkeypatch, BENT[field])
    world = everybody(federation(tmp_path, weights=weights, policy=COUNTED))
    assert not sums
    assert set(world.errors) == set(names(5))
    for error in world.errors.values():
        assert isinstance(error, errors.TermsError)
        assert f"plan's {field} is" in str(error)


def test_a_prompt_that_hardly_moves_gives_sums_over_the_same_clients_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nudge of 5e-7 dodges the digest of the base. Lists may then not differ by a few."""
    believing(monkeypatch)
    sums = frozen(monkeypatch, lambda plan, number: plan)
    world = federation(tmp_path, n=5, rounds=3, max_attempts=2, policy=COUNTED)
    for toy in world.toys.values():  # a start that has a deviation, 0.02 as in the methods
        spread = np.random.default_rng(0).normal(0, 0.02, 10).astype(np.float32)
        toy.initial = lambda spread=spread: spread
    everybody_but_one_in_round_two(world)
    assert len(sums) == 1
    told = [text for kind, text in world.events if kind == "fault"]
    assert any(errors.IsolationError.told in t for t in told), told


def everybody_but_one_in_round_two(world: World) -> None:
    world.withdraws = True
    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if sender == "c005" and isinstance(message, m.MaskedUpload) and message.round > 1:
            return []
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    everybody(world)


def test_lists_that_differ_in_pairs_solve_nothing() -> None:
    """Ten clients, lists of eight: eleven of them, any two four apart, would solve all ten."""
    from itertools import combinations

    from secure_fedprompt.protocol.policy import check_isolation

    lists = [tuple(n for n in names(10) if n not in out) for out in combinations(names(10), 2)]
    chosen = [one for one in lists if all(len(set(one) ^ set(two)) >= 4 or one == two
              for two in lists[:5])][:11]  # fmt: skip
    signed: list[tuple[str, ...]] = []
    for one in [names(10), *chosen]:
        try:
            check_isolation(one, signed, 3)
        except errors.IsolationError:
            continue
        signed.append(one)
    assert signed == [names(10)]
