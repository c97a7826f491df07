"""The key that sums are checked with: who gets it, what it outlives, and when there is another."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path

import msgspec
import pytest
from federation import Toy, World
from rounds import identity, make_parties, make_plan, make_updates, names, roster
from watching import done, watched, world_of

from secure_fedprompt.clients.file_journal import FileJournal
from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.sum_key import SumKey
from secure_fedprompt.memory import run_round
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.plan import NO_KEY, RoundPlan
from secure_fedprompt.server.results import check_vouchers
from secure_fedprompt.server.rounds.base import Stage


def test_the_key_is_dealt_once_and_late_joiners_get_the_same(tmp_path: Path) -> None:
    world = world_of(tmp_path, gather_seconds=5.0)
    seen = watched(world)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, x: isinstance(x, m.RoundEnd) and x.round == 1)
    key = world.run.state.key
    world.join("c005")
    world.pump()
    assert world.run.error is None, world.run.error
    assert world.run.state.key == key != NO_KEY
    asked = [(s, x.round) for s, _, x in seen if isinstance(x, m.KeyAsk)]
    assert {name for name, number in asked if number == 1} == {"c002", "c003", "c004"}
    late = {(s, number) for s, number in asked if number > 1}
    assert {name for name, _ in late} == {"c005"}
    ((_, first),) = late
    vouching = {x.name: x.vouches for s, _, x in seen if s and isinstance(x, m.Advert)
                and x.round == first}  # fmt: skip
    assert vouching == {**dict.fromkeys(names(4), 1), "c005": 0}
    assert world.sessions["c005"].verified


def keying() -> tuple[RoundPlan, dict[str, Party]]:
    """A first round, in which c001 makes the key."""
    parties = make_parties(4)
    for party in parties.values():
        party.keyring.drop()
    made = {"key": NO_KEY, "maker": "c001", "election": 1, "grants": names(4)[1:]}
    return make_plan(4, **made), parties


def test_a_grant_of_a_sum_key_has_nothing_beside_it() -> None:
    plan, parties = keying()

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.KeyGrant):
            message = dataclasses.replace(message, context=b"parameters")
            return m.signed(message, identity("c001"), Purpose.KEY_GRANT, plan)
        return message

    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    assert "a grant of a sum key with 10 bytes of parameters" in outcome.round.faults["c001"]
    assert outcome.round.stage is Stage.ABORTED


def test_an_advert_with_another_key_is_refused_by_the_server() -> None:
    plan, parties = keying()

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Advert) and sender == "c004":
            message = dataclasses.replace(message, key=bytes(32))
            return m.signed(message, identity("c004"), Purpose.ADVERT, plan)
        return message

    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    assert "KeyMismatchError: c004 uses key 0000" in outcome.round.faults["c004"]
    assert set(outcome.opened) == {"c001", "c002", "c003"}
    assert not {"c001", "c002", "c003"} & set(outcome.errors)


def test_a_complaint_about_a_key_needs_a_proof() -> None:
    """About boxes there is evidence to ask for; a grant is signed on its own."""
    plan, parties = keying()

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Advert) and sender == "c004":
            return m.Complaint(plan.run, plan.round, "c001")
        return message

    outcome = run_round(plan, parties, make_updates(plan), tap=tap)
    assert outcome.round.faults["c004"] == "a complaint without a proof"
    assert set(outcome.opened) == {"c001", "c002", "c003"}


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_maker_of_a_key_that_is_none_is_excluded_and_not_its_accuser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    world = world_of(tmp_path)
    world.withdraws = True
    make = SumKey.make
    monkeypatch.setattr(SumKey, "make", lambda entropy: SumKey(entropy(size)))
    for name in names(5):
        world.join(name)
    world.pump(lambda w, x: isinstance(x, m.RoundEnd) and x.round == 1)
    monkeypatch.setattr(SumKey, "make", make)
    world.pump()
    assert world.run.state.excluded == ("c001",)
    assert "c001 sealed a box for" in world.store.summary()["rounds"][0]["reason"]
    assert world.run.error is None, world.run.error
    assert len(done(world)) == 4


def grown(world: World, n: int) -> World:
    """The server, stopped after a learning round, starts again with a larger roster."""
    world.store.close()
    world.clock += 1.0
    world.roster, world.n = roster(n), n
    for name in names(n):
        world.toys.setdefault(name, Toy(0.5, 10.0))
        world.journals.setdefault(name, MemoryJournal())
    world.settings = msgspec.structs.replace(world.settings, stop_after=0)
    for group in (world.sessions, world.errors, world.lost):
        group.clear()
    world.start_server()
    for name in names(n):
        world.join(name)
    world.pump()
    return world


@pytest.mark.parametrize(("heard", "threshold"), [(True, 0), (False, 0), (True, -1)])
def test_a_roster_that_grows_gets_another_key(tmp_path: Path, heard: bool, threshold: int) -> None:
    """Also if nobody heard the last sum: it is checked with the key of the roster that made it."""
    world = world_of(tmp_path, 4, stop_after=1, threshold=threshold)
    for name in names(4):
        world.join(name)
    world.pump(lambda w, x: not heard and isinstance(x, m.OpenedSum))
    before = world.run.state.key
    world.queue.clear()
    grown(world, 5)
    assert world.run.error is None, world.run.error
    assert world.run.state.key not in (before, NO_KEY)
    assert [lr for _, lr in done(world)] == [1, 2, 3, 4]
    assert all(world.sessions[name].verified for name in names(5))
    assert world.run.state.terms is not None
    assert world.run.state.terms.quorum == (5 if threshold else 4)


def test_a_roster_that_grows_too_fast_is_refused_with_the_reason(tmp_path: Path) -> None:
    world = world_of(tmp_path, 4, stop_after=1)
    for name in names(4):
        world.join(name)
    world.pump()
    with pytest.raises(errors.ConfigError, match="12 clients on the roster 6 must vouch .* 4 can"):
        grown(world, 12)
    state, terms = world.run.state, world.run.state.terms
    assert terms is not None
    ten = dataclasses.replace(terms, clients=10, quorum=7, colluders=3)
    check_vouchers(state, ten, names(10))
    with pytest.raises(errors.ConfigError, match="4 must vouch .* and 3 can"):
        check_vouchers(state, ten, names(11)[1:])  # who has left can vouch for nothing
    grown(world, 10)
    assert world.run.error is None, world.run.error


def test_who_is_excluded_takes_the_key_with_it(tmp_path: Path) -> None:
    """A client that deals bad boxes is out: the others make another key without it."""
    from secure_fedprompt.clients.rounds import masks

    world = world_of(tmp_path)
    seen = watched(world)
    plain = masks.seal
    for name in names(5):
        world.join(name)
    world.pump(lambda w, x: isinstance(x, m.RoundEnd) and x.round == 1)
    before = world.run.state.key
    with pytest.MonkeyPatch.context() as patch:

        def seal(key: bytes, data: bytes, context: bytes) -> bytes:
            bad = context.endswith(b"c002\0c001")
            return plain(key, bytes(len(data)) if bad else data, context)[:: -1 if bad else 1]

        patch.setattr(masks, "seal", seal)
        world.pump()
    assert world.run.state.excluded == ("c002",)
    assert world.run.error is None, world.run.error
    assert world.run.state.key not in (before, NO_KEY)
    last = max(x.round for _, _, x in seen if isinstance(x, m.KeyGrant))
    granted = [g.recipient for _, _, x in seen if isinstance(x, m.KeyGrant) and x.round == last
               for g in x.grants]  # fmt: skip
    assert granted == ["c003", "c004", "c005"]


def test_a_key_outlives_a_restart_with_its_roster_and_no_other(tmp_path: Path) -> None:
    run = b"r" * 16
    party = make_parties(3)["c001"]
    journal = FileJournal(tmp_path / "journal.jsonl")
    kept = dataclasses.replace(party, journal=journal)
    journal.keep_key(run, party.roster.digest + b"s" * 32)
    (path,) = (tmp_path / "kept").glob("sums-*")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept.keyring.sums = None
    kept.recall(b"o" * 16)
    assert kept.keyring.digest == NO_KEY
    kept.recall(run)
    assert kept.keyring.sums is not None
    assert kept.keyring.sums.to_bytes() == b"s" * 32
    grown = dataclasses.replace(make_parties(4)["c001"], journal=journal)
    grown.keyring.sums = None
    grown.recall(run)
    assert grown.keyring.sums is None
    journal.distrust(run)
    assert not path.exists()
    journal.close()
