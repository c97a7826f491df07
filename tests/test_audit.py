"""What an audit must find, and must not find: whole runs with seeded faults."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audited import WIDTH, Tap, federate, read, untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import identity, make_encrypted_plan, make_plan, roster

from secure_fedprompt.__main__ import main
from secure_fedprompt.audit import fields, private, promises, summary, uniformity
from secure_fedprompt.audit.findings import CHECKS, Level
from secure_fedprompt.audit.log import Log
from secure_fedprompt.audit.private import Private
from secure_fedprompt.protocol import errors, fixedpoint, homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import MAX_FRAME, encode_fields
from secure_fedprompt.protocol.recorder import Recorder, link
from secure_fedprompt.protocol.selection.task import Selection

VICTIM = "c002"


def audited(
    folder: Path, tap: Tap = untouched, *, peers: tuple[str, ...] = (VICTIM,), **changes: Any
) -> summary.Audit:
    """The server's log of a run, held against those of clients."""
    _, folders = federate(folder, tap, **changes)
    log, *others = read(folders, "server", *peers)
    return summary.audit(log, others, "", None)


def failures(result: summary.Audit) -> list[tuple[str, str]]:
    return [(f.check, f.text) for f in result.findings if f.level is Level.FAIL]


@pytest.mark.parametrize("protection", ["masks", "bfv", "ckks"])
def test_a_good_run_passes_every_check(tmp_path: Path, protection: str) -> None:
    result = audited(tmp_path, peers=("c001", "c002", "c003", "c004"), protection=protection)
    assert failures(result) == []
    assert result.kept
    assert result.checks == {**dict.fromkeys(CHECKS, "pass"), "private values": "not run"}
    assert result.protection == protection
    assert "in agreement with c001, c002, c003, c004" in summary.verdict(result)
    assert not [f for f in result.findings if f.level is Level.WARN]


def test_one_log_alone_is_only_consistent_in_itself(tmp_path: Path) -> None:
    result = audited(tmp_path, peers=())
    assert result.kept
    assert result.checks["cross-check"] == "not run"
    assert "internally consistent only" in summary.verdict(result)


def test_headers_alone_leave_payloads_unseen_and_say_so(tmp_path: Path) -> None:
    result = audited(tmp_path, mode="headers")
    assert result.kept
    assert result.checks["uniformity"] == "warn"
    assert result.checks["frames"] == result.checks["keys"] == "warn"
    assert result.checks["plans"] == result.checks["protection"] == "labels only"
    assert any("known by their headers only" in f.text for f in result.findings)
    assert "by the frames' labels only" in summary.verdict(result)


def test_none_fails_loudly(tmp_path: Path) -> None:
    result = audited(tmp_path, protection="none")
    assert not result.kept
    assert len([text for _, text in failures(result) if "c003 in the clear" in text]) == 3
    assert summary.verdict(result).startswith("NOT KEPT: protection")


# -- seeded faults ---------------------------------------------------------------------------------


def words_of(plan: Any, message: m.MaskedUpload) -> np.ndarray:
    total = np.zeros(sum(f.size for f in plan.layout), np.uint32)
    fixedpoint.add_wire(plan.layout, message.vector, total)
    return total


class Spoiler:
    """Replaces the victim's masked upload."""

    def __init__(self, how: str) -> None:
        self.how, self.plan, self.first, self.masks = how, None, None, None

    def __call__(self, sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Plan):
            self.plan = message.plan
        if not isinstance(message, m.MaskedUpload) or not self.plan.training:
            return message
        rng = np.random.default_rng(self.plan.round)
        steps = rng.normal(0, 2.0**14, WIDTH + 6).astype(np.int64)  # an update in fixed point
        match self.how:
            case "unmasked" if sender == VICTIM:
                words = steps.astype(np.uint32)
            case "mask of two rounds" if sender == VICTIM:
                if self.masks is None:
                    self.masks = words_of(self.plan, message)
                words = self.masks + steps.astype(np.uint32)
            case "mask of two clients" if sender in ("c001", VICTIM):
                if self.masks is None:
                    self.masks = words_of(self.plan, message)
                words = self.masks + steps.astype(np.uint32) * np.uint32(sender == VICTIM)
            case "mask of far clients" if sender in ("c001", "c003"):
                if self.masks is None:
                    self.masks = words_of(self.plan, message)
                words = self.masks + steps.astype(np.uint32) * np.uint32(sender == "c003")
            case _:
                return message
        return dataclasses.replace(message, vector=fixedpoint.to_wire(self.plan.layout, words))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("unmasked", "ctx, 160 words: not uniform"),
        ("mask of two rounds", "differs too little from round 1: a mask was used twice"),
        ("mask of two clients", "differs too little from c001's: one mask for both"),
        ("mask of far clients", "differs too little from c001's: one mask for both"),
    ],
)
def test_masks_that_are_missing_or_used_twice_show(tmp_path: Path, how: str, said: str) -> None:
    # max_attempts: the garbled sums may abort rounds, the frames are on record all the same
    result = audited(tmp_path, Spoiler(how), max_attempts=2, peers=())
    assert result.checks["uniformity"] == "fail"
    assert any(check == "uniformity" and said in text for check, text in failures(result))


def test_a_message_of_another_protection_shows(tmp_path: Path) -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.MaskedUpload) and sender == VICTIM:
            vector = np.array([0.25] * WIDTH + [17.0] * 6).tobytes()  # n_k among them
            return m.PlainUpload(message.run, message.round, vector)
        return message

    result = audited(tmp_path, tap)
    found = [text for check, text in failures(result) if check == "protection"]
    assert "PlainUpload has no place in a round under masks" in found
    assert f"update, image count and metrics of {VICTIM} in the clear" in found


@pytest.mark.parametrize("protection", ["masks", "bfv"])
def test_a_secret_key_that_is_shipped_shows(tmp_path: Path, protection: str) -> None:
    scheme = homomorphic.scheme("bfv", homomorphic.choose("bfv", 4))
    maker = homomorphic.sealapi().KeyGenerator(scheme.context)
    secret = scheme.save(maker.secret_key())

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Finish) and recipient == VICTIM:
            return dataclasses.replace(message, vector=b"some padding" + secret)
        return message

    result = audited(tmp_path, tap, protection=protection, peers=())
    assert ("keys", "Finish holds a SEAL object, and should hold none: a key?") in failures(result)


def test_a_context_with_a_secret_key_shows(tmp_path: Path) -> None:
    scheme = homomorphic.scheme("bfv", homomorphic.choose("bfv", 4))
    secret = scheme.save(homomorphic.sealapi().KeyGenerator(scheme.context).secret_key())

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.KeyGrant):
            return dataclasses.replace(message, context=secret)
        return message

    result = audited(tmp_path, tap, protection="bfv", peers=())
    assert any(c == "keys" and "SecretKeyError: the context holds a secret key" in text
               for c, text in failures(result))  # fmt: skip


def test_two_survivor_lists_and_two_plans_show(tmp_path: Path) -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.SurvivorList) and recipient == VICTIM:
            return dataclasses.replace(message, survivors=message.survivors[:-1])
        if isinstance(message, m.Plan) and recipient == "c003":
            return dataclasses.replace(message, plan=dataclasses.replace(message.plan, clip=0.5))
        return message

    result = audited(tmp_path, tap, max_attempts=1, peers=())
    found = failures(result)
    assert ("plans", "two different plans of one round") in found
    assert any(c == "protection" and "2 different survivor lists" in text for c, text in found)


def test_a_client_on_both_lists_shows(tmp_path: Path) -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.UnmaskRequest) and recipient == VICTIM:
            return dataclasses.replace(message, dropped=("c001",))
        return message

    result = audited(tmp_path, tap, max_attempts=1, peers=())
    text = "c001 on the lists of survivors and of dropped clients"
    assert ("protection", text) in failures(result)


def test_a_second_upload_shows(tmp_path: Path) -> None:
    _, folders = federate(tmp_path)
    (log,) = read(folders, "server")
    frame = next(e for e in log.entries if e.kind == "MaskedUpload" and e.peer == VICTIM)
    log.entries.append(dataclasses.replace(frame, n=9999))
    result = summary.audit(log, [], "", None)
    assert any("2 uploads of c002" in text for _, text in failures(result))


def test_a_type_outside_the_catalogue_shows(tmp_path: Path) -> None:
    known = roster(4)
    log = Recorder(
        tmp_path / "audit", "full", 1 << 20, identity("server"), known.by_name["server"], known
    )
    log.record("in", VICTIM, m.Rejoin(), m.CATALOGUE.encode(m.Rejoin()))
    log.record(
        "out",
        VICTIM,
        m.RoundEnd(b"r" * 16, 1, ""),
        m.CATALOGUE.encode(m.RoundEnd(b"r" * 16, 1, "")),
    )
    log.record("in", VICTIM, None, b"\x04\xffcovert")
    log.close()
    (read_,) = read({"server": tmp_path}, "server")
    result = summary.audit(read_, [], "", None)
    assert ("catalogue", f"8 bytes from {VICTIM} are no message of the catalogue") in failures(
        result
    )
    _relabel(tmp_path / "audit", b'"type":"Rejoin"', b'"type":"Covert"')
    (read_,) = read({"server": tmp_path}, "server")
    result = summary.audit(read_, [], "", None)
    assert ("catalogue", "message type 'Covert' is not in the catalogue") in failures(result)
    told = "frame of record 1 is ('Rejoin', '', 0), the record says ('Covert', '', 0)"
    assert ("frames", told) in failures(result)


def _relabel(folder: Path, old: bytes, new: bytes) -> None:
    """Rewrite records and the chain with them, as an owner could."""
    path, chain, lines = folder / "audit-0000.jsonl", bytes(32), []
    content = path.read_bytes()
    assert old in content
    for line in content.splitlines():
        text = line.partition(b"\t")[0].replace(old, new)
        chain = link(chain, text)
        lines.append(text + b"\t" + chain.hex().encode() + b"\n")
    path.write_bytes(b"".join(lines))


# -- logs that were touched ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    return federate(folder)[1]


def copied(good: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    import shutil

    for name, folder in good.items():
        shutil.copytree(folder, tmp_path / name)
    return {name: tmp_path / name for name in good}


def test_a_log_that_was_rewritten_with_its_chain_contradicts_its_heads(
    good: dict[str, Path], tmp_path: Path
) -> None:
    folders = copied(good, tmp_path)
    _relabel(folders["server"] / "audit", b'"peer":"c003","type":"MaskedUpload"',
             b'"peer":"c004","type":"MaskedUpload"')  # fmt: skip
    log, other = read(folders, "server", VICTIM)
    assert not log.faults
    assert not log.torn
    alone = summary.audit(log, [], "", None)  # its own copies of the heads that it signed
    assert alone.checks["heads"] == "fail"
    both = summary.audit(log, [other], "", None)
    assert any("server signed another log: records before" in text for _, text in failures(both))
    where = {f.where for f in both.findings if f.check == "heads" and f.level is Level.FAIL}
    assert any(w.startswith(f"{VICTIM}: record") for w in where)


def test_a_log_that_was_cut_is_shorter_than_what_it_signed(
    good: dict[str, Path], tmp_path: Path
) -> None:
    folders = copied(good, tmp_path)
    path = folders["server"] / "audit" / "audit-0000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    log, other = read(folders, "server", VICTIM)
    found = failures(summary.audit(log, [other], "", None))
    assert any(c == "chain" and "ends without a closing record" in text for c, text in found)
    assert any(c == "heads" and "it was cut" in text for c, text in found)


def test_frames_that_one_end_hides_or_invents_show(good: dict[str, Path], tmp_path: Path) -> None:
    folders = copied(good, tmp_path)
    (client,) = read(folders, VICTIM)
    upload = next(e for e in client.entries if e.kind == "MaskedUpload")
    path = folders[VICTIM] / "audit"
    _relabel(path, upload.digest.encode(), b"0" * 64)
    log, other = read(folders, "server", VICTIM)
    found = failures(summary.audit(log, [other], "", None))
    assert any(c == "cross-check" and "1 time(s) more than c002 says" in text for c, text in found)
    assert any(c == "cross-check" and "never arrived, though later frames of the same connection did" in text
               for c, text in found)  # fmt: skip


def test_frames_in_another_order_show(good: dict[str, Path], tmp_path: Path) -> None:
    log, other = read(good, "server", VICTIM)
    rows = [i for i, e in enumerate(other.entries) if e.kind in ("Advert", "Shares")][:2]
    one, two = rows
    other.entries[one], other.entries[two] = other.entries[two], other.entries[one]
    found = failures(summary.audit(log, [other], "", None))
    assert any(c == "cross-check" and "another order" in text for c, text in found)


def reconnected(log: Log, at: int, peer: str, way: str) -> None:
    """Put another Hello into a log."""
    hello = next(e for e in log.entries if e.kind == "Hello")
    log.entries.insert(at, dataclasses.replace(hello, way=way, peer=peer, place=None))


def test_a_lost_connection_explains_what_was_in_flight_and_no_more(good: dict[str, Path]) -> None:
    log, other = read(good, "server", VICTIM)
    gone = next(e for e in other.entries if e.kind == "Adverts")
    at = other.entries.index(gone)
    other.entries.remove(gone)
    text = f"1 Adverts to {VICTIM} never arrived"
    assert any(text in t for _, t in failures(summary.audit(log, [other], "", None)))
    place = next(
        i for i, e in enumerate(log.entries) if e.digest == gone.digest and e.peer == VICTIM
    )
    reconnected(log, place + 1, VICTIM, "in")
    reconnected(other, at, "server", "out")
    result = summary.audit(log, [other], "", None)
    assert not failures(result)
    assert any(text in f.text and f.level is Level.WARN for f in result.findings)


def test_a_server_that_forgets_a_client_altogether_shows(
    good: dict[str, Path], tmp_path: Path
) -> None:
    log, other = read(good, "server", VICTIM)
    log.entries = [e for e in log.entries if (e.way, e.peer) != ("in", VICTIM)]
    found = failures(summary.audit(log, [other], "", None))
    assert (
        "heads",
        f"no signed head of {VICTIM} is in the log of server: nothing ties it down",
    ) in found
    assert any("never arrived, though server went on to a later round" in t for _, t in found)


def test_a_log_of_somebody_else_is_refused(good: dict[str, Path], tmp_path: Path) -> None:
    _, strangers = federate(tmp_path, n=3)
    log, _ = read(good, "server", VICTIM)
    (stranger,) = read(strangers, VICTIM)
    found = failures(summary.audit(log, [stranger], "", None))
    assert any(c == "cross-check" and "the log does not hold run" in text for c, text in found)
    renamed = read(good, VICTIM)[0]
    renamed.roster[VICTIM] = ("client", "00" * 32)
    found = failures(summary.audit(log, [renamed], "", None))
    assert any("give this name different keys" in text for _, text in found)


def test_a_head_signed_by_another_is_worth_nothing(good: dict[str, Path]) -> None:
    log, other = read(good, "server", VICTIM)
    log.roster[VICTIM] = other.roster[VICTIM] = log.roster["c001"]
    found = failures(summary.audit(log, [other], "", None))
    assert any("bears no valid signature of c002" in text for _, text in found)


def forged(folder: Path, records: list[dict[str, Any]], mode: str = "full") -> Log:
    """A log whose chain its owner made up."""
    known = roster(4)
    folder = folder / "audit"
    folder.mkdir(parents=True, exist_ok=True)
    members = [
        {"name": x.name, "role": x.role, "identity": x.identity.hex()} for x in known.members
    ]
    about = {"format": "secure-fedprompt/audit/1", "name": "server", "role": "server",
             "mode": mode, "roster": members}  # fmt: skip
    chain, lines = bytes(32), []
    for n, record in enumerate([{"kind": "open", "cut": 0, **about}, *records, {"kind": "close"}]):
        full = {"n": n, "at": 1.0, **record}
        if record["kind"] == "segment":
            full = {**about, **full}
        text = json.dumps(full).encode()
        chain = link(chain, text)
        lines.append(text + b"\t" + chain.hex().encode() + b"\n")
    (folder / "audit-0000.jsonl").write_bytes(b"".join(lines))
    return Log.read(folder)


def frame(kind: str, run: str = "ab" * 16, number: int = 1, **changes: Any) -> dict[str, Any]:
    return {"kind": "frame", "way": "in", "peer": VICTIM, "type": kind, "run": run, "round": number,
            "size": 10, "digest": "0" * 64, **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([frame("MaskedUpload")], "no plan of this run is on record"),
        ([frame("MaskedUpload")], "frames of a round whose plan is not on record"),
        (
            [frame("RoundEnd"), frame("PlainUpload", run="", number=0)],
            "that type says it otherwise",
        ),
        (
            [frame("RoundEnd"), frame("PlainUpload", run="", number=0)],
            "metrics of c002 in the clear",
        ),
        ([frame("RoundEnd", peer="mallory")], "mallory is nobody that server talks to"),
        ([frame("RoundEnd", peer="server")], "server is nobody that server talks to"),
        ([frame("RoundEnd")], "2 frames were not kept (RoundEnd)"),
        ([{"kind": "segment", "segment": 0, "previous": "0" * 64}], "a segment begins here"),
    ],
)
def test_a_forged_log_is_not_acquitted(
    tmp_path: Path, records: list[dict[str, Any]], said: str
) -> None:
    log = forged(tmp_path, [frame("RoundEnd"), *records])
    result = summary.audit(log, [], "", None)
    assert any(said in text for _, text in failures(result)), failures(result)


def test_a_forged_rotation_does_not_erase_a_run(good: dict[str, Path], tmp_path: Path) -> None:
    folders = copied(good, tmp_path)
    (log,) = read(folders, "server")
    path = folders["server"] / "audit"
    head = (path / "audit-0000.jsonl").read_bytes().splitlines()[0].partition(b"\t")[0]
    about = json.loads(head)
    del about["cut"]
    rows = [{**about, "kind": "segment", "n": 10**6, "segment": 1, "previous": "0" * 64},
            {"kind": "dropped", "n": 10**6 + 1, "at": 1.0, "segment": 0}]  # fmt: skip
    rows += [
        {"kind": "plan", "at": 1.0, "plan": encode_fields(plan).hex()}
        for plan in log.plans.values()
    ]
    rows += [
        {**frame("Finish", log.runs[0], 0), "way": "out", "at": 1.0},
        {"kind": "close", "at": 1.0},
    ]
    chain, lines = bytes(32), []
    for i, row in enumerate(rows):
        text = json.dumps({**row, "n": 10**6 + i}).encode()
        chain = link(chain, text)
        lines.append(text + b"\t" + chain.hex().encode() + b"\n")
    for old in path.iterdir():
        old.unlink()
    (path / "audit-0001.jsonl").write_bytes(b"".join(lines))
    log, *others = read(folders, "server", "c001", VICTIM)
    assert not log.faults
    found = failures(summary.audit(log, others, "", None))
    assert any("the beginning of this run was dropped" in text for _, text in found)
    assert any("no signed head" in text or "this log begins at" in text for _, text in found)


def test_plans_that_protect_nobody_and_sums_below_their_quorum_show(good: dict[str, Path]) -> None:
    (log,) = read(good, "server")
    (key, plan) = next(iter(log.plans.items()))
    found = {}
    for name, changes in {
        "small cohort": {"cohort": ("c001", "c002"), "quorum": 2, "threshold": 2},
        "larger quorum": {"quorum": 5},
        "other cohort": {"cohort": ("c001", "c003", "c004")},
        "other protection": {"protection": "none"},
    }.items():
        log.plans[key] = dataclasses.replace(plan, **changes)
        found[name] = [text for _, text in failures(summary.audit(log, [], "", None))]
    assert "cohort of 2, quorum 2: a sum is a subtraction away" in found["small cohort"]
    assert "a sum over 4 clients, the quorum is 5" in found["larger quorum"]
    assert "an upload of c002, who is not in the cohort" in found["other cohort"]
    assert "the run changed its protection: masks, none" in found["other protection"]


def test_heads_of_records_that_are_gone_show(good: dict[str, Path]) -> None:
    log, other = read(good, "server", VICTIM)
    log.first = 10**6
    found = failures(summary.audit(log, [other], "", None))
    assert any("this log begins at 1000000" in text for check, text in found if check == "heads")


def test_payloads_are_judged_whatever_mode_a_log_claims(tmp_path: Path) -> None:
    _, folders = federate(tmp_path, Spoiler("unmasked"), max_attempts=2)
    (log,) = read(folders, "server")
    log.modes.add("headers")
    assert summary.audit(log, [], "", None).checks["uniformity"] == "fail"


def test_a_key_beside_ciphertexts_and_a_ciphertext_among_masks_show(tmp_path: Path) -> None:
    scheme = homomorphic.scheme("bfv", homomorphic.choose("bfv", 4))
    secret = scheme.save(homomorphic.sealapi().KeyGenerator(scheme.context).secret_key())

    def beside(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherSum) and recipient == VICTIM:
            return dataclasses.replace(message, ciphertexts=(*message.ciphertexts, secret))
        return message

    def behind(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.CipherSum) and recipient == VICTIM:
            first, *rest = message.ciphertexts
            return dataclasses.replace(message, ciphertexts=(bytes(first) + secret, *rest))
        return message

    def among(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.MaskedUpload) and sender == VICTIM:
            return m.CipherUpload(message.run, message.round, bytes(32), (secret,), bytes(64))
        return message

    for i, (tap, protection, said) in enumerate((
        (beside, "bfv", "no ciphertext"), (behind, "bfv", "with something behind it"),
        (among, "masks", "CipherUpload has no place in a round under masks"),
    )):  # fmt: skip
        result = audited(tmp_path / str(i), tap, protection=protection, peers=(), max_attempts=1)
        assert any(said in text for _, text in failures(result)), said


def test_only_a_server_and_others_are_held_together(good: dict[str, Path], tmp_path: Path) -> None:
    for which, said in ((("server", "server"), "two logs of one owner"),
                        (("c001", VICTIM), "do not talk to each other")):  # fmt: skip
        log, other = read(good, *which)
        with pytest.raises(errors.ConfigError, match=said):
            summary.audit(log, [other], "", None)


def test_a_roster_that_the_auditor_trusts_is_held_against_the_logs(good: dict[str, Path]) -> None:
    (log,) = read(good, "server")
    assert summary.audit(log, [], "", None, roster(4)).kept
    result = summary.audit(log, [], "", None, roster(3))
    assert ("heads", "its roster is not the one that was given") in failures(result)


def test_a_client_that_took_part_in_two_runs_is_audited_for_each(tmp_path: Path) -> None:
    _, first = federate(tmp_path)
    import shutil

    shutil.move(first["server"], tmp_path / "monday")
    shutil.rmtree(tmp_path / "run")
    _, second = federate(tmp_path, start=1e6)
    log, other = read(second, "server", VICTIM)
    assert len(other.runs) == 2
    assert not failures(summary.audit(log, [other], "", None))
    monday = Log.read(tmp_path / "monday")
    assert not failures(summary.audit(monday, [other], "", None))


def test_server_and_helper_logs_in_one_place_are_warned_of(good: dict[str, Path]) -> None:
    log, other = read(good, "server", VICTIM)
    assert not list(promises.check_pooled([log, other]))
    chosen = Selection(1, 1, 5, 2, 0, 0, VICTIM, bytes(32), bytes(64))
    key = next(iter(log.plans))
    log.plans[key] = dataclasses.replace(log.plans[key], selection=chosen)
    (found,) = promises.check_pooled([log, other])
    assert found.level is Level.WARN
    assert "open every selection share" in found.text
    other.modes.clear()
    assert not list(promises.check_pooled([log, other]))


def test_differences_are_taken_modulo_q() -> None:
    q = 18014398504409161
    one, two = (
        uniformity.Payload("c", r, "x", np.array([w], np.uint64), q) for r, w in ((1, 5), (2, 3))
    )
    assert uniformity._difference(one, two).tolist() == [q - 2]


def test_many_tests_together_give_few_false_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniformity, "p_value", lambda words, modulus: 4e-7)
    one = uniformity.Payload("c", 1, "x", np.zeros(100, np.uint64), 1 << 32)
    two = uniformity.Payload("d", 1, "x", np.zeros(100, np.uint64), 1 << 32)
    assert [f.level for f in uniformity.check_uniformity([one])] == [Level.FAIL, Level.NOTE]
    assert [f.level for f in uniformity.check_uniformity([one, two])] == [Level.NOTE]  # three tests


def test_small_fields_are_tested_together() -> None:
    zeros = [
        uniformity.Payload(f"c{i}", 1, "weight", np.zeros(20, np.uint64), 1 << 32) for i in range(4)
    ]
    assert [f.level for f in uniformity.check_uniformity(zeros)] == [Level.FAIL, Level.NOTE]
    (note,) = uniformity.check_uniformity(zeros[:3])
    assert note.text == "60 words of small fields are too few to test"


# -- private values --------------------------------------------------------------------------------


def record_of(
    folder: Path, values: dict[str, Any], classes: tuple[str, ...] = ("lighthouse",)
) -> Private:
    path = folder / "private.jsonl"
    private.write_head(path, VICTIM, classes, {"training images": 1234})
    private.write_round(path, 1, values)
    assert path.stat().st_mode & 0o077 == 0
    return Private.read(path)


FLOATS = np.random.default_rng(5).normal(0, 1, 12)


def forms() -> dict[str, bytes]:
    single = FLOATS.astype("<f4")
    bits = int.from_bytes(FLOATS[:3].tobytes(), "big") << 3
    return {
        "float64": FLOATS[4:5].astype("<f8").tobytes(),
        "float64 big-endian": FLOATS[4:5].astype(">f8").tobytes(),
        "float32": single[3:5].tobytes(),
        "float32 big-endian": FLOATS[3:5].astype(">f4").tobytes(),
        "float16": FLOATS[2:8].astype("<f2").tobytes(),
        "bfloat16": (single[2:8].view(np.uint32) >> 16).astype(">u2").tobytes(),
        "float64 at a bit's offset": bits.to_bytes(25, "big"),
        "float64 at a bit's offset, least significant first": (
            int.from_bytes(FLOATS[:3].tobytes(), "little") << 3
        ).to_bytes(25, "little"),
        "class name": b"LightHouse",
        "class name in UTF-16": "lighthouse".encode("utf-16-le"),
    }


@pytest.mark.parametrize("form", list(forms()))
def test_private_values_are_found_in_every_form(tmp_path: Path, form: str) -> None:
    noise = np.random.default_rng(1).bytes(301)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Finish) and recipient == VICTIM and form:
            return dataclasses.replace(message, vector=noise + forms()[form] + noise)
        return message

    _, folders = federate(tmp_path, tap)
    known = record_of(tmp_path, {"ctx": FLOATS})
    (log,) = read(folders, "server")
    result = summary.audit(log, [], "", known)
    found = [text for check, text in failures(result) if check == "private values"]
    assert any(form.split(maxsplit=1)[0] in text for text in found), found
    assert len(found) <= 2


def test_counts_in_text_and_in_the_wrong_field_show(tmp_path: Path) -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Leave) and sender == VICTIM:
            return m.Leave("Finished", "trained on 1234 images")
        if isinstance(message, m.Hello) and sender == VICTIM:
            return dataclasses.replace(message, class_count=1234)
        return message

    _, folders = federate(tmp_path, tap, until=lambda world, message: False)
    classes = tuple(f"lighthouse {i}" for i in range(7))
    known = record_of(tmp_path, {"ctx": FLOATS}, classes)
    (log,) = read(folders, VICTIM)
    log.entries = [e for e in log.entries if e.kind in ("Leave", "Hello", "Ready", "Welcome")]
    found = failures(summary.audit(log, [], log.runs[-1], known)) if log.runs else []
    hello = [text for _, text in found if "class_count" in text]
    assert hello == ["class_count is 1234, the class list has 7"]


def test_a_count_in_a_reason_shows(tmp_path: Path) -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Consistent) and sender == VICTIM and message.round == 1:
            return m.Withdraw(message.run, message.round, "PolicyError", "1234 images, too few")
        return message

    _, folders = federate(tmp_path, tap)
    known = record_of(tmp_path, {"ctx": FLOATS}, tuple("abcdefg"))
    (log,) = read(folders, "server")
    found = failures(summary.audit(log, [], "", known))
    assert [text for check, text in found if check == "private values"] == [
        "reason says 1234, as many as this client has training images"
    ]


def test_a_good_run_shows_nothing_private_and_an_open_one_everything(tmp_path: Path) -> None:
    for protection, hits in (("masks", 0), ("none", 2)):
        world, folders = federate(tmp_path / protection, protection=protection)
        toy = world.toys[VICTIM]
        weighted = toy.run(type("Work", (), {"plan": make_plan(4), "base": np.full(WIDTH, 0.5)})())
        assert weighted
        uploads = [
            msg for e, msg in read(folders, VICTIM)[0].messages() if isinstance(msg, m.PlainUpload)
        ]
        values = {
            f"upload {i}": np.frombuffer(u.vector, "<f8")[:WIDTH] for i, u in enumerate(uploads[:2])
        }
        known = record_of(tmp_path / protection, values or {"ctx": FLOATS}, tuple("abcdefg"))
        (log,) = read(folders, "server")
        found = failures(summary.audit(log, [], "", known))
        assert len([1 for check, _ in found if check == "private values"]) == hits


def test_a_file_that_is_no_private_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content in ("", "{}", '{"format": "other"}', "[1]"):
        path.write_text(content)
        with pytest.raises(errors.ConfigError, match="no private record"):
            Private.read(path)


# -- statistics and sizes --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1 << 8, 1 << 22, 1 << 32, 18014398504409161]), st.integers(80, 5000))
def test_uniform_words_pass(modulus: int, count: int) -> None:
    words = np.random.default_rng(count).integers(0, modulus, count, dtype=np.uint64)
    assert uniformity.p_value(words, modulus) > 1e-6


@pytest.mark.parametrize("modulus", [1 << 22, 1 << 32, 18014398504409161])
def test_small_or_clustered_words_fail(modulus: int) -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, modulus >> 6, 200).astype(np.uint64)
    signed = np.where(rng.random(200) < 0.5, small, np.uint64(modulus) - 1 - small)
    for words in (small, signed, np.zeros(200, np.uint64)):
        assert uniformity.p_value(words.astype(np.uint64), modulus) < 1e-9


def test_p_values_are_uniform_under_the_null() -> None:
    rng = np.random.default_rng(1)
    found = np.array([
        uniformity.p_value(rng.integers(0, 1 << 32, 400, dtype=np.uint64), 1 << 32)
        for _ in range(2000)
    ])  # fmt: skip
    assert np.abs(np.quantile(found, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.05


def test_residues_of_a_ciphertext_are_what_is_tested() -> None:
    plan = make_encrypted_plan(4, "bfv")
    scheme = homomorphic.scheme("bfv", plan.parameters)
    seal = homomorphic.sealapi()
    secret = seal.KeyGenerator(scheme.context).secret_key()
    encryptor = seal.Encryptor(scheme.context, secret)
    fresh = scheme.save(encryptor.encrypt_symmetric(seal.Plaintext("0")))
    message = m.CipherUpload(plan.run, 1, bytes(32), (fresh,), bytes(64))
    halves = list(uniformity.payloads(message, plan, VICTIM))
    assert [half.part for half in halves] == ["ciphertext 0.0", "ciphertext 0.1"]
    for half in halves:
        assert len(half.words) == plan.parameters.degree
        assert half.words.max() < half.modulus
        assert half.modulus.bit_length() == 54
        assert uniformity.p_value(half.words, half.modulus) > 1e-6
    assert not list(uniformity.payloads(message, make_plan(4), VICTIM))


def test_every_message_has_a_decision_about_its_fields() -> None:
    for cls, hidden in fields.PROTECTED.items():
        assert cls in m.CATALOGUE.types.values()
        assert set(hidden) <= {f.name for f in dataclasses.fields(cls)}
    opaque = {  # blobs that are in the clear on purpose
        "Initial.vector", "PlainUpload.vector", "Plan.base", "Finish.vector", "Reveal.shares",
        "Welcome.settings", "KeyGrant.context",
    }  # fmt: skip
    for cls in m.CATALOGUE.types.values():
        for field in dataclasses.fields(cls):
            blob = (
                "Blob" in str(field.type)
                or field.type in ("Vector",)
                or "Vector" in str(field.type)
            )
            decided = (
                field.name in fields.PROTECTED.get(cls, {})
                or f"{cls.__name__}.{field.name}" in opaque
            )
            assert not blob or decided, f"{cls.__name__}.{field.name}"


def test_sizes_by_the_plan_are_those_of_real_frames(good: dict[str, Path]) -> None:
    (log,) = read(good, "server")
    rows = {(row.kind, row.way): row for row in summary.traffic(log, log.runs[-1])}
    for kind in ("MaskedUpload", "Adverts", "Inbox", "Shares", "Reveal", "UnmaskRequest",
                 "SurvivorList", "Consistent", "Advert", "LogHead", "RoundEnd"):  # fmt: skip
        found = [row for (k, _), row in rows.items() if k == kind]
        assert found, kind
        for row in found:
            assert row.expected == row.bytes, kind
    assert fields.fixed_size(m.Hello) is None
    assert fields.fixed_size(m.Alive) == 0
    assert fields.expected_size(m.Finish, make_plan(4), VICTIM) is None
    upper = fields.expected_size(m.CipherUpload, make_encrypted_plan(4, "bfv"), VICTIM)
    assert upper is not None
    assert upper < MAX_FRAME


# -- the command -----------------------------------------------------------------------------------


def test_the_command_prints_and_judges(
    good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["audit", str(good["server"]), "--peer", str(good[VICTIM])]
    assert main([*words, "--json", str(tmp_path / "a.json")]) == 0
    shown = capsys.readouterr().out
    assert "kept, as far as this log shows: the promises of masks; in agreement with c002" in shown
    assert "MaskedUpload: in the clear run, round; vector under pairwise and self masks" in shown
    assert "it proves no secrecy" in shown or "proves no secrecy" in shown
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["kept"] is True
    assert content["format"] == "secure-fedprompt/audit-result/1"
    assert main([*words, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"]["chain"] == "pass"
    assert main([*words, "--format", "sarif"]) == 0
    sarif = json.loads(capsys.readouterr().out)
    assert sarif["version"] == "2.1.0"
    assert {rule["id"] for rule in sarif["runs"][0]["tool"]["driver"]["rules"]} == set(CHECKS)


def test_the_command_fails_with_one_line_and_its_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folders = federate(tmp_path, protection="none")
    assert main(["audit", str(folders["server"])]) == 12
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"AuditError: \[protection\] server: record \d+, round 1: .* in the clear\n", error
    )
    assert main(["audit", str(tmp_path)]) == 2
    assert "holds no audit log" in capsys.readouterr().err
    assert main(["audit", str(folders["server"]), "--run", "zz"]) == 2
    assert "--run 'zz'" in capsys.readouterr().err


def test_diff_sets_two_runs_side_by_side(
    good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folders = federate(tmp_path, protection="bfv")
    words = ["audit-diff", str(good["server"]), str(folders["server"])]
    assert main([*words, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["protections"] == ["masks", "bfv"]
    by_kind = {row["message"]: row for row in rows["traffic"]}
    assert by_kind["MaskedUpload"]["frames"] == [12, 0]
    assert by_kind["CipherUpload"]["frames"] == [0, 12]
    assert main(words) == 0
    assert "CipherUpload" in capsys.readouterr().out
    _, bare = federate(tmp_path / "none", protection="none")
    assert main(["audit-diff", str(good["server"]), str(bare["server"])]) == 12


def test_frames_that_a_full_log_lacks_and_plans_that_it_invents_show(
    good: dict[str, Path], tmp_path: Path
) -> None:
    (log,) = read(good, "server")
    upload = next(i for i, e in enumerate(log.entries) if e.kind == "MaskedUpload")
    log.entries[upload] = dataclasses.replace(log.entries[upload], place=None)
    key = next(iter(log.plans))
    log.plans[key] = dataclasses.replace(log.plans[key], clip=0.25)
    found = failures(summary.audit(log, [], "", None))
    kept = "1 frames were not kept (MaskedUpload): nothing is known of their content"
    assert ("frames", kept) in found
    assert ("plans", "the plan on record is not the one that was sent") in found
