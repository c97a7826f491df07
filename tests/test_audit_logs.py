"""Logs that were cut, rewritten, forged or swapped, alone and against other ends."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from audited import (
    VICTIM,
    Spoiler,
    audited,
    copied,
    failures,
    federate,
    read,
    relabel,
)
from rounds import identity, roster

from secure_fedprompt.__main__ import main
from secure_fedprompt.audit import promises, summary
from secure_fedprompt.audit.findings import Level, collapsed, failed
from secure_fedprompt.audit.log import Log
from secure_fedprompt.host.recorder import Recorder, link
from secure_fedprompt.protocol import errors, homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import encode_fields
from secure_fedprompt.protocol.selection.task import Selection
from secure_fedprompt.protocol.transport import Frame

# -- logs that were touched ------------------------------------------------------------------------


def test_a_log_that_was_rewritten_with_its_chain_contradicts_its_heads(
    good: dict[str, Path], tmp_path: Path
) -> None:
    folders = copied(good, tmp_path)
    relabel(folders["server"] / "audit", b'"peer":"c003","type":"MaskedUpload"',
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
    result = summary.audit(log, [other], "", None)
    assert any("ends without a closing record" in f.text for f in result.findings
               if f.level is Level.OPEN)  # fmt: skip
    assert any(c == "heads" and "it was cut" in text for c, text in failures(result))


def test_a_log_without_an_end_is_kept_so_far_and_no_more(
    good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may belong to a process that runs: that is no broken promise, and no acquittal."""
    folders = copied(good, tmp_path)
    path = folders["server"] / "audit" / "audit-0000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for data in (b"".join(lines[:-1]), b"".join(lines[:-1]) + lines[-1][:20]):
        path.write_bytes(data)
        result = summary.audit(read(folders, "server")[0], [], "", None)
        assert (result.kept, result.finished, result.checks["chain"]) == (True, False, "open")
        assert main(["audit", str(folders["server"])]) == 13
        printed = capsys.readouterr()
        assert "NOT FINISHED; so far kept, as far as this log shows" in printed.out
        assert printed.err.startswith("UnfinishedLogError: server: ")
        assert printed.err.rstrip().endswith("; kept so far")


def test_repeated_findings_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [failed("plans", f"server: round {i}", "no such cohort") for i in range(250)]
    (one,) = collapsed(rows)
    assert one.where == "server: round 0"
    assert one.text == "no such cohort (and 249 more)"
    assert len(collapsed([*rows, failed("plans", "x", "another")])) == 2


def test_frames_that_one_end_hides_or_invents_show(good: dict[str, Path], tmp_path: Path) -> None:
    folders = copied(good, tmp_path)
    (client,) = read(folders, VICTIM)
    upload = next(e for e in client.entries if e.kind == "MaskedUpload")
    path = folders[VICTIM] / "audit"
    relabel(path, upload.digest.encode(), b"0" * 64)
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
    known = VICTIM if log.role == "server" else "server"
    hello = next(e for e in log.entries if e.kind == "Hello" and e.peer == known)
    log.entries.insert(at, dataclasses.replace(hello, way=way, peer=peer, place=None))


@pytest.mark.parametrize("asked", [False, True])
def test_a_lost_connection_explains_what_was_in_flight_and_no_more(
    good: dict[str, Path], asked: bool
) -> None:
    """Also where the server had to ask for the greeting of the next one."""
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
    if asked:
        rejoin = dataclasses.replace(gone, kind="Rejoin", run="", round=0, digest="0", place=None)
        log.entries.insert(place + 1, dataclasses.replace(rejoin, way="out", peer=VICTIM))
        other.entries.insert(at + 1, rejoin)
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
    renamed.members[renamed.runs[0]] = {**renamed.roster, VICTIM: ("client", "00" * 32)}
    found = failures(summary.audit(log, [renamed], "", None))
    assert any("give this name different keys" in text for _, text in found)


def test_a_head_signed_by_another_is_worth_nothing(good: dict[str, Path]) -> None:
    log, other = read(good, "server", VICTIM)
    for one in (log, other):
        one.members[one.runs[0]] = {**one.roster, VICTIM: one.roster["c001"]}
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
    about = {"format": "secure-fedprompt/audit/2/13", "name": "server", "role": "server",
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
        "unknown protection": {"protection": "veil"},
    }.items():
        log.plans[key] = dataclasses.replace(plan, **changes)
        found[name] = [text for _, text in failures(summary.audit(log, [], "", None))]
    assert "cohort of 2, quorum 2: a sum is a subtraction away" in found["small cohort"]
    assert "a sum over 4 clients, the quorum is 5" in found["larger quorum"]
    assert "an upload of c002, who is not in the cohort" in found["other cohort"]
    assert "the run changed its protection: masks, none" in found["other protection"]
    assert "protections unknown to this audit: ['veil']" in found["unknown protection"]
    assert "MaskedUpload has no place in a round under veil" in found["unknown protection"]


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
            return m.CipherUpload(
                message.run, message.round, bytes(32), (secret,), bytes(16), bytes(64)
            )
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


def test_who_only_asks_leaves_no_trace_that_contradicts(
    good: dict[str, Path], tmp_path: Path
) -> None:
    """'check' keeps no log, and may ask while its client runs."""
    folders = copied(good, tmp_path)
    log, other = read(folders, "server", VICTIM)
    member = roster(4).by_name["server"]
    again = Recorder(folders["server"] / "audit", "full", 1 << 30, identity("server"), member,
                     roster(4))  # fmt: skip
    probe = m.Probe("", bytes(32), bytes(32), roster(4).digest)
    again.got(VICTIM, Frame.of(probe))
    again.sent(VICTIM, Frame.of(m.Probed("", "", b"{}", "masks", 4, 3, 1)))
    again.close()
    log, other = read(folders, "server", VICTIM)
    result = summary.audit(log, [other], "", None)
    assert result.kept
    assert result.finished
    assert {row.kind for row in result.traffic} >= {"Probe", "Probed"}
