"""Noise shares in the ring: exact sampling, bounded rounding, accounting, plans and whole runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import World
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import CTX, OPEN, entropy_from, make_parties, make_plan, names
from scipy import stats
from selecting import SECURE, Grouped

from secure_fedprompt.__main__ import main
from secure_fedprompt.memory import run_round
from secure_fedprompt.protocol import client_noise, fixedpoint
from secure_fedprompt.protocol import layout as lay
from secure_fedprompt.protocol.client_noise import Noise
from secure_fedprompt.protocol.errors import ConfigError, PlanError, PolicyError
from secure_fedprompt.protocol.layout import Field, TensorSpec
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.server.settings import ServerSettings, check_settings, noise_of

NOISE = Noise(1.0, 0.5, 3)


# -- rounding ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=300), st.integers(0, 20),
    st.floats(0.01, 3), st.integers(0, 2**32),
)  # fmt: skip
def test_rounded_norms_are_bounded(values: list[float], frac: int, clip: float, seed: int) -> None:
    vector = np.array(values)
    rounded = client_noise.conditionally_rounded(vector, frac, clip, entropy_from(str(seed)))
    norm = np.linalg.norm(rounded)
    assert norm <= client_noise.sensitivity(clip, frac, len(vector)) * (1 + 1e-12)
    assert norm <= math.ldexp(clip, frac) + math.sqrt(len(vector)) + 1e-9
    clipped = vector * min(1.0, clip / max(np.linalg.norm(vector), 1e-300))
    assert np.abs(rounded - np.ldexp(clipped, frac)).max() <= 1 + 1e-9


def test_rounding_is_unbiased_where_the_bound_is_wide() -> None:
    vector = np.full(50, 0.3)
    rounded = [client_noise.conditionally_rounded(vector, 0, 100.0, os.urandom) for _ in range(400)]
    assert abs(np.mean(rounded) - 0.3) < 5 * math.sqrt(0.21 / 20_000)


# -- accounting ----------------------------------------------------------------------------------


def layout_of(size: int, noise: Noise = NOISE, clients: int = 4) -> lay.Layout:
    return fixedpoint.size_layout(
        (TensorSpec("ctx", (size,)),), clients, clip=1.0, max_weight=1, max_seen=1, ring_bits=32,
        metrics=False, noise=noise.room,
    )  # fmt: skip


@pytest.mark.parametrize(("honest", "multiplier"), [(1, 0.3), (3, 1.0), (40, 2.0)])
def test_rho_is_the_theorem(honest: int, multiplier: float) -> None:
    """Kairouz, Liu and Steinke 2021, proposition 14, written out again with small variances."""
    noise = Noise(1.0, multiplier, honest)
    for frac in (2, 12):
        layout = (Field("ctx", (100,), 2.0, 32, frac, 1), *layout_of(1)[1:])
        variance = math.ceil((multiplier * 2**frac) ** 2 / honest)
        delta2 = min((2**frac + 10) ** 2, 4**frac + 25 + 2**frac + 5)
        tau = 10 * sum(math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, honest))
        total = honest * variance
        first = delta2 / total + tau * 100 / 2
        second = (math.sqrt(delta2 / total) + tau * 10) ** 2
        assert client_noise.concentrated(noise, layout) == pytest.approx(min(first, second) / 2)
    if honest > 1:  # where the sum of discrete Gaussians is not quite one
        rough = (Field("ctx", (10**6,), 2.0, 32, 1, 1), *layout_of(1)[1:])
        wide = Noise(1.0, 0.49 * math.sqrt(honest), honest)
        assert wide.variance(1) == 1
        total, delta = honest, client_noise.sensitivity(1.0, 1, 10**6)
        tau = 10 * sum(math.exp(-2 * math.pi**2 * k / (k + 1)) for k in range(1, honest))
        eps = min(
            math.sqrt(delta**2 / total + tau * 10**6 / 2), delta / math.sqrt(total) + tau * 1e3
        )
        assert client_noise.concentrated(wide, rough) == pytest.approx(eps**2 / 2)
        assert eps > 1.0001 * delta / math.sqrt(total)
    assert client_noise.concentrated(noise, layout_of(8192, noise)) == pytest.approx(
        1 / (2 * multiplier**2), rel=0.01
    )  # on a fine grid: that of the continuous Gaussian


def test_epsilon_of_zcdp_is_between_its_bounds() -> None:
    for rho in (0.001, 0.1, 1.0, 10.0):
        found = client_noise.epsilon(rho, 1e-5)
        assert found < rho + 2 * math.sqrt(rho * math.log(1e5))  # Bun and Steinke 2016
        sigma = math.sqrt(1 / (2 * rho))  # a Gaussian of this rho, exactly (Balle and Wang 2018)
        delta = stats.norm.cdf(0.5 / sigma - found * sigma) - math.exp(found) * stats.norm.cdf(
            -0.5 / sigma - found * sigma
        )
        assert delta < 1e-5
    assert client_noise.epsilon(0.0, 1e-5) == 0


# -- plans ---------------------------------------------------------------------------------------


def noisy_plan(count: int = 4, noise: Noise = NOISE, wide: bool = False, **changes: Any) -> Any:
    tensors = (TensorSpec("ctx", (8192,)),) if wide else CTX
    layout = fixedpoint.size_layout(
        tensors, count, clip=1.0, max_weight=1, max_seen=1, ring_bits=32, metrics=False,
        noise=noise.room,
    )  # fmt: skip
    return make_plan(count, max_weight=1, layout=layout, noise=noise, **changes)


def test_plans_with_noise_that_would_not_protect_are_refused() -> None:
    noisy_plan().check()
    narrow = dataclasses.replace(noisy_plan(), layout=layout_of(15, client_noise.NONE))
    for plan, says in (
        (noisy_plan(noise=Noise(1.0, 0.5, 4)), "relies on 4 clients, the quorum is 3"),
        (noisy_plan(noise=Noise(1.0, 0.0, 3)), "multiplier 0"),
        (noisy_plan(noise=Noise(0.0, 0.5, 3)), "at clip 0"),
        (noisy_plan(noise=Noise(1.0, 0.5, 0)), "fields of client noise without it"),
        (noisy_plan(protection="none"), "with protection 'none'"),
        (dataclasses.replace(noisy_plan(), uniform=0), "uniform 0"),
        (make_plan(4, max_weight=1, noise=NOISE), "metrics, which carry no noise"),
        (narrow, "no room for the noise"),
    ):
        with pytest.raises(PlanError, match=says):
            plan.check()
    turned = (*noisy_plan().layout[1:], noisy_plan().layout[0])
    with pytest.raises(PlanError, match="counters before updates"):
        dataclasses.replace(noisy_plan(), layout=turned).check()
    coarse = tuple(dataclasses.replace(f, frac=0) for f in noisy_plan(wide=True).layout)
    with pytest.raises(PlanError, match="worth .* on so coarse a grid"):
        dataclasses.replace(noisy_plan(), layout=coarse).check()
    two = tuple(dataclasses.replace(f, name=n, frac=f.frac - i) for i, (f, n) in enumerate(
        [(noisy_plan().layout[0], "a"), (noisy_plan().layout[0], "b")]))  # fmt: skip
    with pytest.raises(PlanError, match="different scales"):
        dataclasses.replace(noisy_plan(), layout=(*two, *noisy_plan().layout[1:])).check()


def test_settings_that_do_not_fit_noise_are_refused() -> None:
    good: dict[str, Any] = {"dp_noise": 1.0, "weights": "uniform", "metrics": "off"}
    check_settings(ServerSettings(**good))
    for key, value in (
        ("protection", "none"), ("weights", "samples"), ("metrics", "final"), ("graph", "regular"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{key} = .*dp_noise needs"):
            check_settings(ServerSettings(**{**good, key: value}))
    with pytest.raises(ConfigError, match="dp_colluders = 3: a sum may have only 3 clients"):
        noise_of(ServerSettings(**good, dp_colluders=3), 4)
    with pytest.raises(ConfigError, match="selection_scope = 'federation'.*dp_noise needs"):
        check_settings(ServerSettings(**{**SECURE, **good, "selection_scope": "federation"}))


def test_explain_prints_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "--dp-noise", "4", "--metrics", "off", "--clients", "10"]
    assert main(words) == 0
    assert "epsilon 3.617 " in (shown := capsys.readouterr().out)
    assert "if 4 clients of every sum add their noise: a quorum of 7 less 3" in shown
    assert "'secure-fedprompt simulate' prints it" in shown
    assert main([*words, "--metrics", "final"]) == 2
    assert main([*words, "--dp-colluders", "7"]) == 2
    capsys.readouterr()
    assert main(["explain", "--update-norm", "1"]) == 2
    assert "--update-norm 1: compares with --dp-noise" in capsys.readouterr().err
    assert main([*words, "--update-norm", "-1"]) == 2


def test_explain_says_whether_noise_is_of_any_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.json"

    def told(*words: str) -> tuple[dict[str, float], str]:
        base = ["explain", "--dp-noise", "0.5", "--metrics", "off", "--dim", "400", "--json"]
        assert main([*base, str(out), *words]) == 0
        return json.loads(out.read_text()), " ".join(capsys.readouterr().out.split())

    figures, _ = told("--clients", "10")
    noise, n = Noise(1.0, 0.5, 4), 10  # a quorum of seven less three; ten that add theirs
    layout = layout_of(400, noise, n)
    still = np.concatenate([np.zeros(400), [1.0, 1.0]])
    words = [client_noise.encode(layout, noise, still, os.urandom(32), os.urandom)
             for _ in range(n)]  # fmt: skip
    total = fixedpoint.to_integers(layout, np.sum(words, 0, dtype=np.uint32))
    norm = np.linalg.norm(fixedpoint.decode(layout, total)[:400] / n)
    assert abs(norm / figures["noise_norm"] - 1) < 5 / math.sqrt(800)
    assert figures["signal_norm"] == 1  # as long as the clip
    assert figures["signal_to_noise"] == pytest.approx(1 / figures["noise_norm"])

    least = int(figures["break_even_clients"])
    assert told("--clients", str(least))[0]["signal_to_noise"] >= 1
    assert told("--clients", str(least - 1))[0]["signal_to_noise"] < 1
    higher = told("--clients", "10", "--threshold", "9")[0]  # of these ten, not of fewer
    assert higher["break_even_clients"] == least
    drowned, says = told("--clients", "50", "--update-norm", "0.007")
    assert drowned["signal_norm"] == 0.007
    assert drowned["break_even_clients"] > 100 * least
    assert "dp_clip = 1 is 143 times the norm of updates" in says
    assert "set dp_clip near 0.007" in says
    assert "0.1 of the norm of updates: most of them is cut off" in told("--update-norm", "10")[1]
    assert "an average is mostly noise" in told("--clients", "3", "--update-norm", "1")[1]
    assert "warning" not in told("--clients", "500", "--update-norm", "1")[1]
    tiny, says = told("--update-norm", "1e-9")
    assert tiny["break_even_clients"] is None
    assert "more than 10,000,000 clients" in says


# -- rounds --------------------------------------------------------------------------------------


def test_a_masked_sum_is_the_rounded_updates_and_all_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, with shares that the test knows."""
    shares: list[np.ndarray] = []
    plain = client_noise.encode

    def spy(layout: Any, noise: Any, vector: Any, key: Any, entropy: Any) -> Any:
        words = plain(layout, noise, vector, key, entropy)
        shares.append(fixedpoint.to_integers(layout, words))
        return words

    monkeypatch.setattr(client_noise, "encode", spy)
    plan = noisy_plan()
    updates = {n: ({"ctx": np.full((3, 5), 0.1)}, 1.0) for n in plan.cohort}
    outcome = run_round(plan, make_parties(4), updates)
    assert outcome.round.integers is not None
    assert np.array_equal(outcome.round.integers, np.sum(shares, 0))
    assert outcome.round.result is not None
    assert outcome.round.result[lay.CONTRIBUTORS] == 4  # counters carry no noise


def test_the_noise_of_a_sum_has_at_least_the_planned_deviation() -> None:
    """With exactly ``honest`` uploads; the update itself is clipped to norm C."""
    noise = Noise(2.0, 0.25, 3)
    layout = layout_of(2000, noise)
    vector = np.concatenate([np.full(2000, 0.5), [1.0, 1.0]])
    words = [
        client_noise.encode(layout, noise, vector, os.urandom(32), os.urandom) for _ in range(3)
    ]
    total = fixedpoint.to_integers(layout, np.sum(words, 0, dtype=np.uint32))
    values = fixedpoint.decode(layout, total)[:2000]
    signal = 3 * 2.0 / math.sqrt(2000)  # each clipped from norm 22 to 2
    assert abs(values.mean() - signal) < 5 * 0.5 / math.sqrt(2000)
    assert abs(values.std() / 0.5 - 1) < 5 / math.sqrt(4000)


@pytest.mark.parametrize("protection", ["masks", "bfv", "ckks"])
@pytest.mark.parametrize("selection", ["client", "secure"])
def test_whole_runs_carry_noise(tmp_path: Path, protection: str, selection: str) -> None:
    world = World(tmp_path, 4, **{
        **SECURE, "selection": selection, "protection": protection, "dp_noise": 0.02,
        "dp_clip": 3.0, "min_clients": 3,
    })  # fmt: skip
    world.toys = {name: Grouped(i) for i, name in enumerate(names(4))}
    for name in names(4):
        world.join(name)
    world.pump()
    assert world.run.error is None
    sent = [world.toys[n].choices[-1] for n in names(4)]
    at, gaps = 0, []
    for i, (kind, shape) in enumerate((("text", 3), ("visual", 5))):
        chosen = [
            world.toys[n].groups[kind][c[i]] + 2e-3 for n, c in zip(names(4), sent, strict=True)
        ]
        found = world.sessions["c001"].final[at : at + 2 * shape].reshape(2, shape)
        at += 2 * shape
        gaps.append((found - np.mean(chosen, 0)).reshape(-1))
    error = np.concatenate(gaps)
    assert 0.45 < error.std() / (0.06 * math.sqrt(4 / 3) / 4) < 1.9  # four shares, three counted on


def test_policies_look_through_a_plan_to_what_its_noise_is_worth() -> None:
    strict = {f: getattr(OPEN, f) for f in OPEN.__struct_fields__}
    policy = Policy(**{**strict, "min_noise": 0.5})
    two = Noise(1.0, 0.5, 2)  # of a quorum of three, since one may subtract its own
    policy.check_plan(noisy_plan(noise=two), 4)
    with pytest.raises(PolicyError, match=r"worth 0\.408, if 2 of 3 clients add theirs"):
        policy.check_plan(noisy_plan(), 4)  # counts on all three
    Policy(**{**strict, "min_noise": 0.5, "noise_colluders": 0}).check_plan(noisy_plan(), 4)
    with pytest.raises(PolicyError, match=r"worth 0, if 0 of 3 clients"):
        Policy(**{**strict, "min_noise": 0.5, "noise_colluders": 3}).check_plan(noisy_plan(), 4)
    with pytest.raises(PolicyError, match=r"worth 0, if 0 of 3 clients"):
        policy.check_plan(make_plan(4, max_weight=1, layout=layout_of(15, client_noise.NONE)), 4)
    last = make_plan(4, max_weight=1, tensors=(), learning_round=2)  # an evaluation
    with pytest.raises(PolicyError, match="metrics, which carry no noise"):
        policy.check_plan(last, 4)
    coarse = tuple(dataclasses.replace(f, frac=0) for f in noisy_plan(wide=True).layout)
    with pytest.raises(PolicyError, match=r"worth 0\.0"):
        policy.check_plan(dataclasses.replace(noisy_plan(noise=two), layout=coarse), 4)


def test_the_cost_of_a_sum_counts_on_nobody_whose_noise_can_be_subtracted() -> None:
    strict = {f: getattr(OPEN, f) for f in OPEN.__struct_fields__}
    plan = noisy_plan()  # terms that count on all three of a quorum
    for colluders, shares in ((-1, 2), (0, 3), (2, 1)):
        policy = Policy(**{**strict, "noise_colluders": colluders})
        found = policy.cost(plan)
        assert found == client_noise.concentrated(plan.noise, plan.layout, shares)
        assert found == pytest.approx(1 / (2 * 0.5**2) * 3 / shares, rel=1e-4)
    assert Policy(**{**strict, "noise_colluders": 3}).cost(plan) == math.inf
    assert Policy().cost(make_plan(4, max_weight=1)) == math.inf
    none = make_plan(4, max_weight=1, layout=layout_of(15, client_noise.NONE), method="zeroshot")
    assert Policy().cost(none) == 0


def test_noise_that_colluders_could_subtract_is_not_counted_on() -> None:
    good: dict[str, Any] = {"dp_noise": 1.0, "weights": "uniform", "metrics": "off"}
    for clients, quorum, c in ((2, 2, 1), (3, 3, 1), (4, 3, 1), (10, 7, 3), (100, 67, 33)):
        assert noise_of(ServerSettings(**good), clients).honest == quorum - c
        assert noise_of(ServerSettings(**good, dp_colluders=0), clients).honest == quorum
        encrypted = ServerSettings(**good, protection="bfv")  # the same quorum as in the terms
        assert noise_of(encrypted, clients).honest == quorum - c


def test_a_policy_can_ask_for_noise(tmp_path: Path) -> None:
    strict = {f: getattr(OPEN, f) for f in OPEN.__struct_fields__}
    world = World(
        tmp_path, 4, Policy(**{**strict, "min_noise": 1.0}), **{**SECURE, "dp_noise": 0.5}
    )
    world.toys = {name: Grouped(i) for i, name in enumerate(names(4))}
    for name in names(4):
        world.join(name)
    world.pump()
    told = "plan's noise multiplier is worth 0.5, if 2 of 3 clients add theirs, but policy.min_no"
    assert told in str(world.errors["c001"])
