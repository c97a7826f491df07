"""What an audit must find, and must not find: whole runs with seeded faults."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from audited import (
    VICTIM,
    WIDTH,
    Spoiler,
    audited,
    failures,
    federate,
    read,
    relabel,
)
from rounds import identity, roster

from secure_fedprompt.__main__ import main
from secure_fedprompt.audit import summary
from secure_fedprompt.audit.findings import CHECKS, Level
from secure_fedprompt.host.recorder import Recorder
from secure_fedprompt.protocol import homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.transport import Frame


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
            return dataclasses.replace(message, survivors=b"\x07")
        if isinstance(message, m.Plan) and recipient == "c003":
            return dataclasses.replace(message, plan=dataclasses.replace(message.plan, clip=0.5))
        return message

    result = audited(tmp_path, tap, max_attempts=1, peers=())
    found = failures(result)
    assert ("plans", "two different plans of one round") in found
    assert any(c == "protection" and "2 different survivor lists" in text for c, text in found)


def test_a_survivor_list_of_nobody_shows(tmp_path: Path) -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.SurvivorList) and recipient == VICTIM:
            return dataclasses.replace(message, survivors=b"\xff")
        return message

    result = audited(tmp_path, tap, max_attempts=1, peers=())
    assert any(c == "protection" and "a survivor list of nobody" in x for c, x in failures(result))


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
    log.got(VICTIM, Frame.of(m.Rejoin()))
    log.sent(VICTIM, Frame.of(m.RoundEnd(b"r" * 16, 1, "")))
    log.got(VICTIM, Frame.read(b"\x04\xffcovert"))
    log.sent(VICTIM, Frame.read(b"\x04\xffcovert!"))
    log.close()
    (read_,) = read({"server": tmp_path}, "server")
    result = summary.audit(read_, [], "", None)
    text = f"8 bytes from {VICTIM} are no message of the catalogue"
    assert not [found for _, found in failures(result) if "8 bytes" in found]  # anybody may
    assert any(f.level == "warn" and f.text == text for f in result.findings)
    assert ("catalogue", f"9 bytes to {VICTIM} are no message of the catalogue") in failures(result)
    relabel(tmp_path / "audit", b'"type":"Rejoin"', b'"type":"Covert"')
    (read_,) = read({"server": tmp_path}, "server")
    result = summary.audit(read_, [], "", None)
    assert ("catalogue", "message type 'Covert' is not in the catalogue") in failures(result)
    told = "frame of record 1 is ('Rejoin', '', 0), the record says ('Covert', '', 0)"
    assert ("frames", told) in failures(result)


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
    by_kind = {row["type"]: row for row in rows["traffic"]}
    assert by_kind["MaskedUpload"]["frames"] == [12, 0]
    assert by_kind["CipherUpload"]["frames"] == [0, 12]
    assert main(words) == 0
    assert "CipherUpload" in capsys.readouterr().out
    _, bare = federate(tmp_path / "none", protection="none")
    assert main(["audit-diff", str(good["server"]), str(bare["server"])]) == 12
