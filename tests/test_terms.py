"""Attacks of a dishonest server that bends what its sums mean, against the real state machines.

Each of them read private numbers from a client that took every plan as it came. Where it says so,
the defence is taken away to show that the attack would still work without it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreed import everybody, federation, signed
from federation import World
from rounds import make_plan, names, roster

from secure_fedprompt.clients.work import Update, Work
from secure_fedprompt.protocol import errors, fixedpoint
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.client_noise import Noise
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.protocol.terms import RunTerms, nonces_digest
from secure_fedprompt.server import settings as server_settings


def begun(tmp_path: Path, n: int = 10, **changes: Any) -> tuple[Any, Any]:
    """A client that waits for its terms, and the honest ones."""
    world = World(tmp_path, n, Policy(), **{"weights": "uniform", "metrics": "final", **changes})
    sent: list[m.Terms] = []

    def until(world: World, message: m.Message) -> bool:
        return isinstance(message, m.Terms) and not sent.append(message)  # type: ignore[func-returns-value]

    for name in names(n):
        world.join(name)
    world.pump(until)
    return world, sent[0]


def with_settings(message: m.Terms, **changes: Any) -> m.Terms:
    settings = MethodSettings(**changes)
    return signed(message, settings=settings.to_bytes())


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a smaller federation": (
        {"clients": 3, "quorum": 3, "colluders": 1}, errors.TermsError, "3 clients, the roster has 10"),
    "a slightly smaller one": (
        {"clients": 8, "quorum": 6, "colluders": 3}, errors.TermsError, "8 clients, the roster"),
    "a quorum of a smaller one": ({"quorum": 5}, errors.TermsError, "quorum 5 of 10"),
    "another c than the quorum gives": ({"colluders": 5}, errors.TermsError, "they tolerate 3"),
    "hardly any clip": ({"clip": 0.001}, errors.PolicyError, "policy.min_clip is 0.1"),
    "little room for counts": ({"max_seen": 10}, errors.PolicyError, "policy.min_seen is 4096"),
    "little room for weights": (
        {"weights": "samples", "max_weight": 3}, errors.PolicyError, "policy.min_weight is 256"),
    "no protection": (
        {"protection": "none", "colluders": 0}, errors.PolicyError, "policy.protections"),
    "a sparse graph": ({"regular": 1, "colluders": 1, "dropout": 0.0, "corruption": 0.1,
                        "attempts": 10}, errors.TermsError, "no k-regular graph"),
    "endless rounds": ({"rounds": 5000}, errors.PolicyError, "policy.max_rounds"),
    "201 attempts": ({"attempts": 201}, errors.TermsError, "201 attempts"),
    "eleven graphs": ({"regular": 1, "colluders": 1, "attempts": 11}, errors.TermsError, "1 to 10"),
    "another roster": ({"roster_digest": bytes(32)}, errors.RosterMismatchError, "same roster"),
    "another start": ({"start": bytes(32)}, errors.TermsError, "starting prompt"),
    "a sum that overflows": (
        {"clip": 1e6, "ring_bits": 8}, errors.TermsError, "do not fit a 8-bit ring|steps for clip"),
    "a huge clip": ({"clip": 1e305}, errors.TermsError, "clip = 1e.305 is out of range"),
    "no ring": ({"ring_bits": 0}, errors.TermsError, "ring_bits = 0"),
    "more corruption than clients": ({"corruption": 1e308}, errors.TermsError, "corruption"),
    "endless noise": (
        {"noise": Noise(1e300, 1e300, 3)}, errors.TermsError, "noise = .* is out of range"),
    "noise that clips everything": (
        {"noise": Noise(0.002, 0.05, 7), "metrics": "off"}, errors.PolicyError, "policy.min_clip"),
    "another federation": ({"clients": 65535}, errors.TermsError, "65535 clients"),
    "no tensors": ({"tensors": ()}, errors.TermsError, "tensors"),
    "a tensor of everything": (
        {"tensors": (TensorSpec("ctx", (1 << 30,)),)}, errors.TermsError, "tensors"),
    "a hold past the deadline": ({"upload_after": 1e4}, errors.TermsError, "upload_after"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_terms_that_promise_less_are_refused(tmp_path: Path, case: str) -> None:
    changes, error, words = REFUSED[case]
    world, message = begun(tmp_path)
    session = world.sessions["c002"]
    with pytest.raises(error, match=words):
        session.on(signed(message, **changes))
    assert session.terms is None
    (accept,) = session.on(message)  # the honest ones are taken, and what was refused left no trace
    assert isinstance(accept, m.Accept)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [({"lr": 1e38, "weight_decay": 0.0}, "max_lr"), ({"momentum": 1.5}, "max_momentum"),
     ({"weight_decay": 1e9, "lr": 1e-10}, "max_weight_decay"), ({"epochs": 1000}, "max_epochs"),
     ({"batch_size": 1025}, "max_batch_size")],
)  # fmt: skip
def test_training_that_asks_whether_a_gradient_overflows_is_refused(
    tmp_path: Path, changes: dict[str, Any], limit: str
) -> None:
    policy = Policy(max_epochs=50)
    world = World(tmp_path, 5, policy, weights="uniform", metrics="final", **changes)
    everybody(world)
    assert set(world.errors) == set(names(5))
    assert all(f"policy.{limit}" in str(error) for error in world.errors.values())


def test_a_client_says_what_may_be_counted_of_it() -> None:
    """Who is in a sum learns what it counts, so clients choose too."""
    policy = Policy(colluders=0)
    for metrics in ("off", "final"):
        policy.check_terms(make_terms(metrics=metrics), 4)
    with pytest.raises(errors.PolicyError, match=r"policy\.metrics allows only off, final"):
        policy.check_terms(make_terms(metrics="rounds"), 4)
    Policy(colluders=0, metrics=()).check_terms(make_terms(metrics="rounds"), 4)
    for weights in ("samples", "bucket"):
        with pytest.raises(errors.PolicyError, match=r"policy\.weights allows only uniform"):
            policy.check_terms(make_terms(weights=weights), 4)
        Policy(colluders=0, weights=()).check_terms(make_terms(weights=weights), 4)


def test_noise_is_asked_of_every_sum() -> None:
    """An evaluation is an exact sum of counts, which no noise covers."""
    terms = make_terms(metrics="final")
    Policy(colluders=0).check_terms(terms, 4)
    with pytest.raises(errors.PolicyError, match="exact sums without noise.*metrics must be 'off'"):
        Policy(colluders=0, min_noise=0.5).check_terms(terms, 4)
    open_ = Policy(colluders=0, min_noise=0.5, protections=("none", "masks"))
    for protection in ("none", "masks"):
        with pytest.raises(errors.PolicyError, match=r"worth 0, .* policy\.min_noise is 0\.5"):
            open_.check_terms(make_terms(metrics="off", protection=protection), 4)


def make_terms(**changes: Any) -> RunTerms:
    from secure_fedprompt.server.planning import RunState, terms_of
    from secure_fedprompt.server.settings import ServerSettings

    state = RunState(run=b"r" * 16, model_fingerprint=b"m" * 32, classes_digest=b"c" * 32)
    state.tensors = (TensorSpec("ctx", (2, 3)),)
    state.start = state.prompt = np.zeros(6, np.float32)
    return terms_of(ServerSettings(**changes), roster(4), state)


def test_a_training_setting_reaches_only_the_runs_whose_terms_hold_it() -> None:
    one, two = make_terms(lr=0.1), make_terms(lr=0.2)
    assert one.digest != two.digest
    assert one.bounds != two.bounds
    assert make_terms(rounds=3).bounds == make_terms(rounds=4).bounds


def test_the_smallest_ring_is_chosen_when_terms_are_made() -> None:
    assert make_terms(ring_bits=0).ring_bits == 21  # four clients of weight 1
    assert make_terms(ring_bits=0, weights="samples", max_weight=4096).ring_bits == 32
    with pytest.raises(errors.ConfigError, match="ring_bits = 5: 8 to 32, or 0"):
        server_settings.check_settings(server_settings.ServerSettings(ring_bits=5))


def test_every_field_of_the_terms_is_in_their_digest() -> None:
    terms = make_terms()
    seen = {terms.digest}
    for field in dataclasses.fields(terms):
        value = getattr(terms, field.name)
        match value:
            case bytes():
                changed: Any = b"\1" + value[1:]
            case str():
                changed = value + "x"
            case int():
                changed = value + 1
            case float():
                changed = value + 0.25
            case tuple():
                changed = value + value[:1] or ("c001",)
            case _:
                changed = dataclasses.replace(value, multiplier=1.0)
        seen.add(dataclasses.replace(terms, **{field.name: changed}).digest)
    assert len(seen) == 1 + len(dataclasses.fields(terms))


def test_terms_change_only_with_a_roster_that_the_client_has_too() -> None:
    before = make_terms()
    grown = dataclasses.replace(before, roster_digest=b"g" * 32, clients=5, quorum=4, colluders=2)
    grown.succeed(before)
    for changes in ({"clip": 0.5}, {"rounds": 11}, {"nonces": bytes(32)}, {"settings": b"{}"}):
        with pytest.raises(errors.TermsError, match=f"changed in {next(iter(changes))}"):
            dataclasses.replace(grown, **changes).succeed(before)  # type: ignore[arg-type]
    with pytest.raises(errors.TermsError, match="its roster did not"):
        dataclasses.replace(before, clients=5).succeed(before)


def test_settings_that_are_not_text_are_a_named_error() -> None:
    with pytest.raises(errors.ConfigError, match="not understood"):
        MethodSettings.from_bytes(b'{"method": "\xff\xfe"}')


def test_nonces_are_committed_before_any_is_known(tmp_path: Path) -> None:
    world, message = begun(tmp_path, n=4)
    session = world.sessions["c002"]
    committed = {n.name: n.nonce for n in session._commitments}
    for nonce in message.nonces:
        assert committed[nonce.name] == m.commitment(nonce.name, nonce.nonce)
        assert committed[nonce.name] != nonce.nonce
    other = tuple(m.Nonce(n.name, bytes(32)) if n.name == "c003" else n for n in message.nonces)
    with pytest.raises(errors.TermsError, match="not the one that its client committed to"):
        session.on(dataclasses.replace(message, nonces=other))
    fewer = dataclasses.replace(message, nonces=message.nonces[1:])
    with pytest.raises(errors.TermsError, match="digest of other nonces"):
        session.on(fewer)


@pytest.mark.parametrize(("graph", "refused"), [("regular", True), ("complete", False)])
def test_no_nonce_of_a_regular_graph_is_left_out(tmp_path: Path, graph: str, refused: bool) -> None:
    """The server could pick the subset of nonces whose graph it likes best."""
    world, message = begun(tmp_path, 40, graph=graph, max_dropout=0.0, max_corruption=0.0)
    fewer = message.nonces[1:]
    less = dataclasses.replace(signed(message, nonces=nonces_digest(fewer)), nonces=fewer)
    party, commitments = world.sessions["c002"].party, world.sessions["c002"]._commitments
    party.check_terms(message, commitments)
    if refused:
        with pytest.raises(errors.TermsError, match="were left out"):
            party.check_terms(less, commitments)
    else:  # where no graph follows from them, a client that is gone need not stop the others
        party.check_terms(less, commitments)


def test_a_regular_graph_follows_from_all_nonces_and_each_attempt_has_its_own() -> None:
    from secure_fedprompt.protocol.plan import PlanInputs

    terms = dataclasses.replace(make_terms(), regular=1, clients=200, quorum=134, colluders=20,
                                dropout=0.05, corruption=0.1)  # fmt: skip
    cohort = tuple(f"{i:03d}" for i in range(200))
    chosen = cohort, bytes(32), "c001", 1, b"k" * 32

    def seed(learning_round: int, attempt: int, of: RunTerms = terms) -> bytes:
        return of.plan(PlanInputs(1, attempt, learning_round, *chosen)).graph_seed

    seeds = {seed(r, a) for r in (1, 2) for a in (1, 2)}
    seeds |= {seed(1, 1, dataclasses.replace(terms, nonces=b"n" * 32))}
    assert len(seeds) == 5
    plan = terms.plan(PlanInputs(1, 1, 1, *chosen))
    with pytest.raises(errors.TermsError, match="graph_seed"):
        terms.admit(dataclasses.replace(plan, graph_seed=b"s" * 32))
    with pytest.raises(errors.TermsError, match="degree|threshold"):
        terms.admit(dataclasses.replace(plan, degree=plan.degree - 2))


def test_who_does_not_open_a_nonce_is_left_out_and_all_draw_new_ones(tmp_path: Path) -> None:
    """Else the server could pick the set of nonces that gives the graph it likes."""
    world = World(tmp_path, 40, graph="regular", max_dropout=0.0, max_corruption=0.0,
                  gather_seconds=20.0, training_seconds=30.0, alive_seconds=1e9)  # fmt: skip
    original, seen = world.run.on, list[bytes]()

    def on(sender: str, message: m.Message, now: float) -> Any:
        if isinstance(message, m.Hello) and sender == "c001":
            seen.append(message.commitment)
        if sender == "c007" and isinstance(message, m.Ready):
            world.lost.add("c007")
            return []
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    everybody(world)
    assert world.run.error is None, world.run.error
    assert any("c007 did not open a nonce" in str(v) for _, v in world.events)
    assert len(set(seen)) == 2
    assert "c007" not in {n.name for n in world.run.state.commitments}


def test_a_tiny_frame_that_announces_millions_of_values_costs_only_its_sender(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, 64)
    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if sender == "c001" and isinstance(message, m.Initial):
            huge = (TensorSpec("ctx", (1 << 25,)),)
            message = dataclasses.replace(message, tensors=huge, vector=bytes(16))
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    everybody(world)
    assert world.run.error is None
    assert any("c001: FieldError" in str(v) for k, v in world.events if k == "fault")
    assert len(world.store.summary()["rounds"][0]["cohort"]) == 63


def test_a_refused_upload_leaves_nothing_in_the_sum() -> None:
    plan = make_plan(4, ring_bits=22, max_weight=1,
                     tensors=(TensorSpec("a", (5,)), TensorSpec("b", (3,))))  # fmt: skip
    total = np.zeros(sum(f.size for f in plan.layout), np.uint32)
    good = bytearray(fixedpoint.to_wire(plan.layout, np.full(len(total), 77, np.uint32)))
    sizes = [fixedpoint.packed_size(f.size, f.bits) for f in plan.layout]
    good[sizes[0] + sizes[1] - 1] |= 0xC0  # bits behind the second tensor's last value
    with pytest.raises(errors.FieldError, match="bits set behind"):
        fixedpoint.add_wire(plan.layout, bytes(good), total)
    assert not total.any()


def test_an_aborted_attempt_is_repeated_word_for_word_under_fresh_masks(tmp_path: Path) -> None:
    world = World(tmp_path, n=3, alive_seconds=1e9)
    trained: list[int] = []
    for toy in world.toys.values():
        run = toy.run
        toy.run = lambda work, run=run: trained.append(work.plan.round) or run(work)
    uploads: dict[int, bytes] = {}
    vectors: dict[int, Any] = {}
    original = world.run.on

    def on(sender: str, message: m.Message, now: float) -> Any:
        if sender == "c001" and isinstance(message, m.MaskedUpload):
            uploads[message.round] = bytes(message.vector)
            vectors[message.round] = dict(world.journals["c001"]._blobs)
        if sender == "c002" and isinstance(message, m.MaskedUpload) and message.round == 1:
            return []
        return original(sender, message, now)

    world.run.on = on  # type: ignore[method-assign]
    everybody(world)
    assert world.run.error is None
    assert uploads[1] != uploads[2]
    name = next(n for n in vectors[1] if n.startswith("vector"))
    assert vectors[1][name] == vectors[2][name]
    assert vectors[2][name] != vectors[3][name]
    assert sorted(trained) == [1] * 3 + [3] * 3 + [4] * 3  # nothing was trained for round 2


@pytest.mark.parametrize("protection", ["masks", "bfv"])
@pytest.mark.parametrize("how", ["raises", "nan", "infinity"])
def test_a_failure_of_training_looks_like_any_other_upload(
    tmp_path: Path, how: str, protection: str
) -> None:
    def run(folder: str, fail: bool) -> tuple[World, list[tuple[str, int]]]:
        world = World(tmp_path / folder, 4, protection=protection, weights="uniform",
                      metrics="final", rounds=1)  # fmt: skip
        sent: list[tuple[str, int]] = []

        def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
            if sender == "c002":
                sent.append((type(message).__name__, len(m.CATALOGUE.encode(message))))
            return message

        world.tamper = tap
        toy, train = world.toys["c002"], world.toys["c002"].run

        def failing(work: Work) -> Any:
            if not work.plan.training or not fail:
                return train(work)
            if how == "raises":
                raise errors.UpdateError("CUDA out of memory")
            bad = np.nan if how == "nan" else np.inf
            return Update({"ctx": np.full((2, 3), bad), "extra": np.zeros(4)}, 1.0)

        toy.run = failing
        for other in world.toys.values():
            other.weight = 1.0
        everybody(world)
        return world, sent

    _, expected = run("good", False)
    bad, sent = run("bad", True)
    assert bad.run.error is None
    assert not bad.errors
    sizes = {k: n for k, n in expected if k != "CipherUpload"}
    assert [k for k, _ in sent] == [k for k, _ in expected]
    assert {k: n for k, n in sent if k != "CipherUpload"} == sizes
    assert bad.sessions["c002"].failed_because is not None
    assert bad.store.summary()["rounds"][0]["metrics"]["contributors"] == 4
    start = np.full(10, 0.5)
    others = [0.5 * (t.target - start) for n, t in bad.toys.items() if n != "c002"]
    assert np.allclose(bad.sessions["c001"].final, start + np.sum(others, 0) / 4, atol=1e-5)


def test_weights_in_buckets_hide_all_but_the_power_of_two(tmp_path: Path) -> None:
    world = federation(tmp_path, weights="bucket", rounds=1)
    everybody(world)
    first = world.store.summary()["rounds"][0]
    assert first["metrics"]["weight"] == 4 + 8 + 8 + 16 + 32
