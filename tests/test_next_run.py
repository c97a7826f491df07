"""The next run of the same federation: what clients remember, and what they ask their operator."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from federation import World
from interrupted import second, spread, world_of
from rounds import (
    make_plan,
    names,
)
from safetensors.numpy import load_file

from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m


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
    assert "this one would single somebody out: begin from another prompt (other words in" in told
    assert "c005" not in told  # who took part elsewhere is not for this server
    assert "would single out c005: at least 4 clients must" in str(world.sessions["c001"].declined)
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
    assert leave == m.Leave("AcceptanceError", errors.AcceptanceError.told)
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
        other.sessions[name].exempt = True  # as a simulation, or with the right word
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
            session.accept = (right if good else word,)
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
