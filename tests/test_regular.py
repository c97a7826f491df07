"""A round on a k-regular graph: a client sees its neighbours, and a root of everybody else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import VerifyKey
from rounds import identity, make_parties, make_plan, make_updates, plain_sum
from test_complaints import altered_inbox

from secure_fedprompt.__main__ import main
from secure_fedprompt.memory import SimulatedRound, run_round
from secure_fedprompt.protocol import errors, keys, masking
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.server.rounds.base import Stage
from secure_fedprompt.server.rounds.masks import MaskedRound
from secure_fedprompt.server.rounds.unmasking import masks_to_remove

N = 40
PLAN = make_plan(N, degree=12, graph_seed=b"\7" * 32, quorum=27, threshold=8)
NEAR = masking.neighbourhoods(PLAN)
VICTIM = "c001"
PEER = NEAR.boxers(VICTIM)[0]
STRANGER = next(n for n in PLAN.cohort if n not in NEAR[VICTIM])


def run(
    tap: Callable[[str, str, m.Message], m.Message | None] = lambda s, r, x: x,
    plan: RoundPlan = PLAN,
    gone: dict[str, Stage] | None = None,
) -> SimulatedRound:
    return run_round(plan, make_parties(N), make_updates(plan), gone, tap)


def sent(outcome: SimulatedRound, kind: type, recipient: str) -> list[Any]:
    frames = (m.CATALOGUE.decode(f) for _, r, f in outcome.frames if r == recipient)
    return [x for x in frames if isinstance(x, kind)]


def test_what_a_client_is_sent_does_not_grow_with_the_others() -> None:
    gone = {"c005": Stage.ADVERTISING, "c007": Stage.COLLECTING}
    outcome = run(gone=gone)
    assert outcome.round.stage is Stage.DONE, outcome.round.reason
    survivors = [name for name in PLAN.cohort if name not in gone]
    assert outcome.round.integers is not None
    assert (outcome.round.integers == plain_sum(PLAN, make_updates(PLAN), survivors)).all()
    for name in survivors:
        (adverts,) = sent(outcome, m.Adverts, name)
        near = [n for n in NEAR[name] if n != "c005"]
        assert [a.name for a in adverts.adverts] == near
        assert len(adverts.proof) <= 2 * 6
        (request,) = sent(outcome, m.UnmaskRequest, name)
        assert len(request.signers) == PLAN.threshold
        assert {signed.name for signed in request.signers} <= set(near)


def of_stranger(outcome: SimulatedRound) -> m.Advert:
    return next(a for a in sent(outcome, m.Adverts, STRANGER)[0].adverts if a.name == STRANGER)


REFUSED: dict[str, tuple[type, Callable[[Any], Any], type[Exception], str]] = {
    "a stranger's advert": (
        m.Adverts,
        lambda a: dataclasses.replace(
            a, adverts=tuple(sorted((*a.adverts, of_stranger(run())), key=lambda x: x.name))
        ),
        errors.AdvertMismatchError, "not of our neighbours",
    ),
    "a shorter proof": (
        m.Adverts, lambda a: dataclasses.replace(a, proof=a.proof[:-1]),
        errors.AdvertMismatchError, "do not prove 13 leaves",
    ),
    "too few neighbours": (
        m.Adverts,
        lambda a: dataclasses.replace(a, adverts=tuple(
            x for i, x in enumerate(a.adverts) if x.name == VICTIM or i < 6)),
        errors.ThresholdError, "threshold 8",
    ),
    "too few signatures": (
        m.UnmaskRequest, lambda u: dataclasses.replace(u, signers=u.signers[:-1]),
        errors.ThresholdError, "7 signed the survivor list, 8 are needed",
    ),
    "a stranger's signature": (
        m.UnmaskRequest,
        lambda u: dataclasses.replace(u, signers=(
            *u.signers[:-1], dataclasses.replace(u.signers[-1], name=STRANGER))),
        errors.SurvivorError, "not asked for",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    kind, change, error, words = REFUSED[case]
    outcome = run(lambda s, r, x: change(x) if isinstance(x, kind) and r == VICTIM else x)
    assert isinstance(outcome.errors[VICTIM], error), outcome.errors
    assert words in str(outcome.errors[VICTIM])
    assert outcome.round.stage is Stage.DONE  # the others do without


def test_who_is_not_on_the_list_cannot_vouch_for_it() -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.UnmaskRequest) and recipient == VICTIM:
            first, *rest = message.signers
            return dataclasses.replace(
                message, signers=(dataclasses.replace(first, name=PEER), *rest)
            )
        return message

    outcome = run(tap, gone={PEER: Stage.COLLECTING})
    assert "not asked for" in str(outcome.errors[VICTIM])


def test_one_list_opens_no_arc_of_the_ring() -> None:
    """A server that leaves out two runs of k/2 places has cut the ring. It may then ask for the
    keys of the gaps' members, as if only the clients between them had survived."""
    ring = NEAR.ring
    gone = dict.fromkeys((*ring[:6], *ring[20:26]), Stage.COLLECTING)
    outcome = run(gone=gone)
    assert isinstance(outcome.round, MaskedRound)
    frames = [(s, m.CATALOGUE.decode(f)) for s, r, f in outcome.frames if not r]
    reveals = {s: x.shares for s, x in frames if isinstance(x, m.Reveal)}
    assert len(reveals) == 24
    beside = {ring[i] for i in (6, 19, 26, 39)}  # 7 of their 13 are left, and sign
    assert beside == outcome.errors.keys()
    of = outcome.round._adverts, outcome.round._shared, tuple(sorted(ring[6:20]))
    with pytest.raises(errors.BadShareError, match="shares of .* arrived, threshold is 8"):
        masks_to_remove(PLAN, *of, reveals)
    with pytest.raises(errors.PlanError, match="degree 12, threshold 7"):
        dataclasses.replace(PLAN, threshold=7).check()
    for n in (100, 200, 1000, 10_000):
        for corruption in (0.0, 0.05, 0.1, 0.33):
            k, t = masking.choose_degree(n, dropout=0.1, corruption=corruption)
            assert t >= k // 2 + 2


def test_all_but_a_threshold_less_one_of_a_neighbourhood_are_sealed_shares() -> None:
    """The others draw them: a secret is fixed by itself and threshold - 1 shares."""
    for plan in (PLAN, make_plan(10), make_plan(1), make_plan(2)):
        graph = masking.neighbourhoods(plan)
        for dealer in plan.cohort:
            drawing = set(graph[dealer]) - {dealer} - set(graph.boxed(dealer))
            assert len(drawing) == plan.threshold - 1
            assert len(graph.boxed(dealer)) == graph.boxes
            assert [n for n in plan.cohort if dealer in graph.boxed(n)] == [*graph.boxers(dealer)]


def test_a_drawn_share_is_of_one_pair_one_way_in_one_plan() -> None:
    cases = [
        (PLAN, "c001", "c004", bytes(32)), (PLAN, "c004", "c001", bytes(32)),
        (PLAN, "c001", "c007", bytes(32)), (PLAN, "c001", "c004", b"\1" * 32),
        (dataclasses.replace(PLAN, round=2), "c001", "c004", bytes(32)),
    ]  # fmt: skip
    elements = set[bytes]()
    for case in cases:
        share = masking.drawn_share(*case)
        assert len(share) == masking.SHARE
        elements |= {share[:32], share[32:], masking.seal_key(*case)}
    assert len(elements) == 3 * len(cases)


@pytest.mark.parametrize("how", ["withheld", "other root"])
def test_who_saw_other_adverts_signs_another_list(how: str) -> None:
    """One neighbour's advert withheld from one client: it would mask with fewer than they do."""

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Adverts) and recipient == VICTIM:
            if how == "withheld":
                kept = tuple(a for a in message.adverts if a.name != PEER)
                return dataclasses.replace(message, adverts=kept)
            return dataclasses.replace(message, proof=(bytes(32), *message.proof[1:]))
        if how == "withheld" and isinstance(message, m.Inbox) and recipient == VICTIM:
            at = NEAR.boxers(VICTIM).index(PEER) * m.BOX  # its box would be refused at once
            boxes = bytes(message.boxes[:at]) + bytes(message.boxes[at + m.BOX :])
            senders = m.members_bits(NEAR[VICTIM], set(NEAR[VICTIM]) - {PEER})
            return dataclasses.replace(message, senders=senders, boxes=boxes)
        return message

    outcome = run(tap)
    if how == "withheld":
        assert "who shared no keys with us" in str(outcome.errors[VICTIM])
        assert not outcome.opened  # by anybody: half of a mask is in the sum
    else:
        fault = outcome.round.faults[VICTIM]
        assert "signature of c001 on its survivors does not verify" in fault
    reveals = [s for s, r, f in outcome.frames
               if not r and isinstance(m.CATALOGUE.decode(f), m.Reveal)]  # fmt: skip
    assert VICTIM not in reveals


def test_an_altered_box_is_told_from_a_bad_one() -> None:
    outcome = run(altered_inbox(PLAN, (VICTIM,), PEER))
    assert "was altered on its way" in str(outcome.errors[VICTIM])
    assert not outcome.round.excluded
    (evidence,) = sent(outcome, m.Evidence, VICTIM)
    assert len(evidence.near) == 13


@pytest.mark.parametrize("what", ["near", "proof", "fewer"])
def test_evidence_on_other_adverts_is_refused(what: str) -> None:
    """A box of somebody else, relayed as ours, would be accused, and opened by the accusation."""
    altered = altered_inbox(PLAN, (VICTIM,), PEER)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Evidence):
            match what:
                case "near":
                    return dataclasses.replace(message, near=(bytes(32), *message.near[1:]))
                case "proof":
                    return dataclasses.replace(message, proof=(bytes(32), *message.proof[1:]))
            return dataclasses.replace(message, near=message.near[1:])
        return altered(sender, recipient, message)

    outcome = run(tap)
    assert isinstance(outcome.errors[VICTIM], errors.AdvertMismatchError)
    assert not any(isinstance(m.CATALOGUE.decode(f), m.Accusation) for _, _, f in outcome.frames)


def test_a_dealer_of_a_bad_box_is_excluded() -> None:
    """Also if one to whom it would have sealed is not there, and places move by one."""
    root, gone = [], {NEAR.boxed(PEER)[0]: Stage.ADVERTISING}

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Shares) and sender == PEER:
            count = len(message.boxes) // m.BOX
            assert count == NEAR.boxes - 1
            made = dataclasses.replace(
                message, boxes=b"".join(m.BOX * bytes((i,)) for i in range(count))
            )
            body = made.body(PLAN, root[0])
            return dataclasses.replace(made, signature=identity(PEER).sign(Purpose.BOXES, body))
        return message

    honest = run(gone=gone)
    root.append(honest.round._tree.root)  # type: ignore[attr-defined]
    outcome = run(tap, gone=gone)
    assert outcome.round.excluded == PEER
    assert "sealed a box for" in outcome.round.reason


def test_a_threshold_of_neighbours_vouches_for_a_prompt_that_was_missed() -> None:
    plan = dataclasses.replace(PLAN, round=2, learning_round=2, rounds=2, base_digest=b"2" * 32)
    near = masking.neighbourhoods(plan)[VICTIM]
    for vouching, fine in ((8, True), (7, False)):
        parties = make_parties(N)
        strangers = [n for n in plan.cohort if n not in near]
        for name in [*[n for n in near if n != VICTIM][:vouching], *strangers]:
            parties[name].journal.note_made(plan.run, 2, plan.base_digest, own=True)
        outcome = run_round(plan, parties, make_updates(plan))
        assert (VICTIM not in outcome.errors) == fine
        if not fine:
            assert "7 clients vouch" in str(outcome.errors[VICTIM])
            assert "needs 8" in str(outcome.errors[VICTIM])


def test_explain_says_what_the_graph_stands_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, base = tmp_path / "told.json", ["explain", "--graph", "regular", "--clients"]
    assert main([*base, "1000", "--json", str(out)]) == 0
    told = json.loads(out.read_text())
    k, t = masking.choose_degree(1000, dropout=0.1, corruption=0.1)
    assert (told["degree"], told["threshold"]) == (k, t) == (52, 28)
    said = " ".join(capsys.readouterr().out.split())
    assert "k = 52, of whom t = 28" in said
    assert "3 colluders among a client's neighbours and a dishonest server" in said
    assert main([*base, "12"]) == 2
    assert "no k-regular graph of 12 clients" in capsys.readouterr().err


def test_adverts_that_are_refused_leave_nothing_in_the_journal() -> None:
    plan = dataclasses.replace(PLAN, round=2, learning_round=2, rounds=2, base_digest=b"2" * 32)
    for spoiled in (True, False):
        parties = make_parties(N)
        for name in set(plan.cohort) - {VICTIM}:
            parties[name].journal.note_made(plan.run, 2, plan.base_digest, own=True)

        def tap(sender: str, recipient: str, message: m.Message, bad: bool = spoiled) -> m.Message:
            if bad and isinstance(message, m.Adverts) and recipient == VICTIM:
                return dataclasses.replace(message, proof=())
            return message

        outcome = run_round(plan, parties, make_updates(plan), tap=tap)
        assert (VICTIM in outcome.errors) == spoiled
        known = b"" if spoiled else plan.base_digest
        assert parties[VICTIM].journal.made(plan.run, 2) == (known, False)


def test_a_remembered_signature_is_good_for_its_own_body_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keys, "_verified", keys._verified)  # and back afterwards
    keys.remember_signatures(4)
    signer, checked = identity(VICTIM), list[bytes]()
    monkeypatch.setattr(
        keys, "VerifyKey", lambda public: checked.append(public) or VerifyKey(public)
    )
    signature = signer.sign(Purpose.ADVERT, b"body")
    for _ in range(3):
        keys.verify(signer.public(), Purpose.ADVERT, b"body", signature, VICTIM)
    assert len(checked) == 1
    for public, purpose, body, other in (
        (signer.public(), Purpose.ADVERT, b"bodY", signature),
        (signer.public(), Purpose.SURVIVORS, b"body", signature),
        (identity(PEER).public(), Purpose.ADVERT, b"body", signature),
        (signer.public(), Purpose.ADVERT, b"body", bytes(64)),
    ):
        for _ in range(2):  # a bad one is never remembered
            with pytest.raises(errors.SignatureError):
                keys.verify(public, purpose, body, other, VICTIM)
