"""Each claim of the README's "who learns what" table, as a test that fails if it is false."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
from rounds import make_parties, make_plan, make_updates, plain_sum

from secure_fedprompt.memory import SimulatedRound, run_round
from secure_fedprompt.protocol import fixedpoint, layout, masking, messages, shamir
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.messages import CATALOGUE
from secure_fedprompt.protocol.plan import NO_KEY
from secure_fedprompt.protocol.protections import default_threshold, tolerated_colluders
from secure_fedprompt.server.rounds.base import Stage

BIG = (TensorSpec("ctx", (16, 256)),)


def uploads(outcome: SimulatedRound) -> dict[str, bytes]:
    found = {}
    for sender, recipient, frame in outcome.frames:
        message = CATALOGUE.decode(frame)
        if not recipient and isinstance(message, messages.MaskedUpload):
            found[sender] = bytes(message.vector)
    return found


def test_the_server_sees_uniform_words_not_updates() -> None:
    """Masked words of a constant update pass a chi-square test per byte; unmasked they fail it."""
    plan = make_plan(4, tensors=BIG)
    updates = make_updates(plan)
    for values, _ in updates.values():
        values["ctx"] = np.full((16, 256), 0.25)
    sent = uploads(run_round(plan, make_parties(4), updates))

    def statistic(data: bytes) -> float:
        counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        return float(((counts - len(data) / 256) ** 2 / (len(data) / 256)).sum())

    for data in sent.values():
        assert statistic(data[:16384]) < 400  # mean 255, deviation 22.6
    plain = fixedpoint.encode(plan.layout, np.full(layout.total_size(plan.layout), 0.25), bytes(32))
    assert statistic(fixedpoint.to_wire(plan.layout, plain)[:16384]) > 10_000


def test_the_same_update_gives_unrelated_uploads_in_two_rounds() -> None:
    plan = make_plan(4, tensors=BIG)
    first = uploads(run_round(plan, make_parties(4, seed="a"), make_updates(plan)))
    again = dataclasses.replace(plan, round=2)
    second = uploads(run_round(again, make_parties(4, seed="b"), make_updates(plan)))
    for name in first:
        a, b = (np.frombuffer(x[name][:16384], "<u4") for x in (first, second))
        assert np.count_nonzero(a == b) < 5
        difference = (a - b).view(np.uint8)
        counts = np.bincount(difference, minlength=256)
        assert ((counts - 64) ** 2 / 64).sum() < 400


def test_no_frame_carries_counts_metrics_weights_or_updates_in_the_clear() -> None:
    plan = make_plan(4, tensors=BIG)
    updates = make_updates(plan)
    secrets: dict[str, list[bytes]] = {}
    for i, (name, (values, _)) in enumerate(updates.items()):
        weight, seen, correct, loss = 41.0 + i, 83.0 + i, 57.0 + i, 123.456 + i
        values |= {
            k: np.float64(v) for k, v in (("seen", seen), ("correct", correct), ("loss", loss))
        }
        updates[name] = (values, weight)
        secrets[name] = [
            struct.pack(f, v) for v in (weight, seen, correct, loss) for f in ("<d", "<f")
        ]
        secrets[name] += [struct.pack(f, x) for x in values["ctx"].flat[:50] for f in ("<d", "<f")]
        fields = [f for f in plan.layout if not f.update and f.name in values]
        words = [
            int(values[f.name] * 2**f.frac) for f in fields if values[f.name] * 2**f.frac > 2**14
        ]
        secrets[name] += [struct.pack("<I", w) for w in words]
    outcome = run_round(plan, make_parties(4), updates)
    everything = b"\xff".join(frame for _, _, frame in outcome.frames)
    for name, needles in secrets.items():
        assert len(needles) > 100
        for needle in needles:
            assert needle not in everything, f"{name}: {needle.hex()}"

    # The same search finds them without protection: the test can fail.
    open_plan = dataclasses.replace(plan, protection="none", key=NO_KEY)
    clear = run_round(open_plan, make_parties(4), updates)
    everything = b"\xff".join(frame for _, _, frame in clear.frames)
    assert all(any(needle in everything for needle in needles) for needles in secrets.values())


def test_the_server_learns_the_sum_and_so_do_those_who_are_in_it() -> None:
    plan = make_plan(5, tensors=BIG)
    updates = make_updates(plan)
    outcome = run_round(plan, make_parties(5), updates, {"c002": Stage.COLLECTING})
    expected = plain_sum(plan, updates, [n for n in plan.cohort if n != "c002"])
    assert outcome.round.integers is not None
    assert (outcome.round.integers == expected).all()
    assert set(outcome.opened) == set(plan.cohort) - {"c002"}
    for opened in outcome.opened.values():
        assert (opened.integers == expected).all()
    told = [r for _, r, f in outcome.frames if isinstance(CATALOGUE.decode(f), messages.OpenedSum)]
    assert sorted(told) == sorted(outcome.opened)
    others = [f for _, r, f in outcome.frames if r
              and not isinstance(CATALOGUE.decode(f), messages.OpenedSum)]  # fmt: skip
    assert max(map(len, others)) < 4 * 16 * 256  # none could hold even the masked sum


@pytest.mark.parametrize("n", [3, 4, 5, 10, 31])
def test_tolerated_colluders_are_what_the_table_prints(n: int) -> None:
    """c = min(2t - n - 1, t - 2): up to c, no split view and no sum of one honest client; c + 1 has one."""
    t = default_threshold(n)
    c = tolerated_colluders(n, t)

    def can_split(colluders: int) -> bool:  # both lists signed by all colluders and half the honest
        honest = n - colluders
        return 2 * t <= honest + 2 * colluders

    def can_single_out(colluders: int) -> bool:  # a sum of t updates, all but one of them theirs
        return colluders >= t - 1

    assert not can_split(c)
    assert not can_single_out(c)
    assert can_split(c + 1) or can_single_out(c + 1)
    assert c < t  # and the colluders' own shares give no secret


def test_fewer_than_t_shares_open_no_mask() -> None:
    """The server with every frame and t - 1 clients' shares cannot verify any candidate seed."""
    plan = make_plan(5)
    parties = make_parties(5)
    outcome = run_round(plan, parties, make_updates(plan), {"c001": Stage.UNMASKING})
    reveals = {
        s: CATALOGUE.decode(f).shares
        for s, r, f in outcome.frames
        if not r and isinstance(CATALOGUE.decode(f), messages.Reveal)
    }
    adverts = {
        s: CATALOGUE.decode(f)
        for s, r, f in outcome.frames
        if not r and isinstance(CATALOGUE.decode(f), messages.Advert)
    }
    senders = list(reveals)[: plan.threshold - 1]
    for count, expected in ((plan.threshold - 1, False), (plan.threshold, True)):
        senders = list(reveals)[:count]
        points = [plan.points[s] for s in senders]
        shares = [int.from_bytes(reveals[s][:32], "little") for s in senders]
        seed = shamir.combine(shamir.basis(points), shares)
        check = masking.seed_check(plan, "c001", adverts["c001"].commitment)
        assert check(seed) is expected


def test_a_survivors_mask_key_is_never_revealed() -> None:
    """Reveals hold self-mask shares of survivors only: no t of them give a mask key."""
    plan = make_plan(4)
    outcome = run_round(plan, make_parties(4), make_updates(plan))
    decoded = [(s, r, CATALOGUE.decode(f)) for s, r, f in outcome.frames]
    adverts = {s: x for s, r, x in decoded if not r and isinstance(x, messages.Advert)}
    reveals = {s: x.shares for s, r, x in decoded if not r and isinstance(x, messages.Reveal)}
    points = [plan.points[s] for s in list(reveals)[:3]]
    for i, owner in enumerate(plan.cohort):
        part = slice(32 * i, 32 * i + 32)
        shares = [int.from_bytes(reveals[s][part], "little") for s in list(reveals)[:3]]
        value = shamir.combine(shamir.basis(points), shares)
        assert masking.seed_check(plan, owner, adverts[owner].commitment)(value)
        assert not masking.key_check(adverts[owner].mask_key)(value)


def test_without_protection_the_server_sees_every_update() -> None:
    plan = make_plan(3, protection="none")
    updates = make_updates(plan)
    outcome = run_round(plan, make_parties(3), updates)
    frame = next(f for s, r, f in outcome.frames if s == "c001" and not r)
    vector = np.frombuffer(CATALOGUE.decode(frame).vector, "<f8")
    values, weight = updates["c001"]
    assert np.allclose(vector[:15], np.clip(values["ctx"], -1, 1).reshape(-1) * weight)
