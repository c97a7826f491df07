"""Both ends of a log over real sockets, its reader, and records that somebody crafted."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from recorded_logs import RUN, lines_of, made, put, rewrite, upload
from rounds import identity, roster

from secure_fedprompt.audit.compare import check_pair
from secure_fedprompt.audit.findings import Level
from secure_fedprompt.audit.log import Log
from secure_fedprompt.audit.promises import check_promises
from secure_fedprompt.clients.link import CurveLink
from secure_fedprompt.host.recorded import RecordedHub, RecordedLink
from secure_fedprompt.host.recorder import Recorder, recorder
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.keys import Member
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.hub import CurveHub


def test_off_keeps_nothing(tmp_path: Path) -> None:
    known = roster(3)
    assert recorder(tmp_path, "off", 1, identity("c001"), known.by_name["c001"], known) is None
    assert not list(tmp_path.iterdir())


def test_heads_cross_real_sockets_and_tie_both_logs(tmp_path: Path) -> None:
    ends = {name: made(tmp_path / name, "headers", name=name) for name in ("server", "c001")}
    finish = m.Finish(RUN, b"", "")
    server = CurveHub("tcp://127.0.0.1:*", identity("server"), roster(3))
    with closing(server):
        hub = RecordedHub(server, ends["server"])
        assert not hub.send("c001", Frame.of(finish))  # nobody there: nothing is recorded
        key = identity("server").curve_public()
        with closing(CurveLink(server.address, key, identity("c001"), 20.0)) as client:
            client.connect()
            link = RecordedLink(client, ends["c001"])
            link.send(Frame.of(m.Alive()))
            ((name, frame),) = _until(lambda: list(hub.poll(0.05)))
            assert (name, frame.message) == ("c001", m.Alive())
            for message in (m.RoundEnd(RUN, 1, ""), finish):
                assert hub.send("c001", Frame.of(message))
                first = _until(lambda: link.receive(0.05)).message
                assert isinstance(first, m.LogHead)
                second = _until(lambda: link.receive(0.05)).message
                assert second == message
                ((_, frame),) = _until(lambda: list(hub.poll(0.05)))
                answer = frame.message
                assert isinstance(answer, m.LogHead)
                assert answer.round == first.round == getattr(message, "round", 0)
    for log in ends.values():
        log.close()
    logs = [Log.read(tmp_path / name) for name in ("server", "c001")]
    assert [entry.kind for entry in logs[1].entries] == [
        "Alive",
        "LogHead",
        "RoundEnd",
        "LogHead",
        "LogHead",
        "Finish",
        "LogHead",
    ]
    assert not [f for f in check_pair(*logs, RUN.hex()) if f.level is not Level.NOTE]


def _until(look: Any) -> Any:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if found := look():
            return found
    raise AssertionError("nothing came")


def test_the_reader_in_the_documentation_agrees(log_folder: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "audit-log.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(program.splitlines()) <= 40
    assert "secure_fedprompt" not in program.replace("secure-fedprompt", "")
    script = tmp_path / "reader.py"
    script.write_text(program)

    def run() -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(script), str(log_folder)]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)

    good, log = run(), Log.read(log_folder)
    assert good.returncode == 0, good.stderr
    last = good.stdout.splitlines()[-1]
    assert last == f"8 records, 6 frames, head {log.chains[8]}"
    rewrite(log_folder, [line.replace(b'"round":3', b'"round":4') for line in lines_of(log_folder)])
    bad = run()
    assert bad.returncode == 1
    assert "record 4" in bad.stdout


HOSTILE = [
    b'{"kind":"frame","n":1,"at":0,"way":"out","peer":"server","type":"Alive","run":"","round":0,'
    b'"size":-1,"digest":"","offset":0}',
    b'{"kind":"frame","n":1,"at":0,"way":"out","peer":"server","type":"Alive","run":"","round":0,'
    b'"size":1e3,"digest":"","offset":-5}',
    b'{"kind":"frame","n":1,"at":0,"way":"out","peer":"server","type":"Alive","run":"","round":0,'
    b'"size":' + b"9" * 40 + b',"digest":""}',
    b'{"kind":"plan","n":1,"at":0,"plan":"zz"}',
    b'{"kind":"plan","n":1,"at":0,"plan":"00ff"}',
    b'{"kind":"segment","n":1,"at":0,"previous":7}',
    b'{"kind":"open","n":1,"at":0,"format":"secure-fedprompt/audit/2/13","name":"x"}',
    b'{"kind":["frame"],"n":1}',
    b'{"n":true,"kind":"close"}',
    b'{"n":' + b"9" * 5000 + b',"kind":"close"}',
    b"[" * 100_000,
    b'"text"',
    b"\xff\xfe\x00",
    b"",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_crafted_record_is_a_fault_and_no_crash(log_folder: Path, text: bytes) -> None:
    lines = lines_of(log_folder)
    first = lines[0].partition(b"\t")[2].strip()
    chain = hashlib.blake2b(bytes.fromhex(first.decode()) + text, digest_size=32).hexdigest()
    log = rewrite(log_folder, [lines[0], text + b"\t" + chain.encode() + b"\n"])
    assert log.faults
    log.check_frames()
    rewrite(log_folder, [text + b"\t" + chain.encode() + b"\n", *lines[1:]]).check_frames()
    assert Log.read(log_folder).faults


def test_file_names_are_not_trusted(log_folder: Path) -> None:
    for name in ("audit-x.jsonl", "audit-99999999999999.jsonl", "audit-0001.jsonl.bak"):
        (log_folder / name).write_bytes(b"")
    assert not Log.read(log_folder).faults
    (log_folder / "audit-999999999.jsonl").write_bytes(b"")
    assert "segments 1 to 999999998 are missing" in Log.read(log_folder).faults[-1].what


def test_a_log_without_an_owner_is_a_fault(log_folder: Path) -> None:
    text = b'{"kind":"close","n":0,"at":0}'
    chain = hashlib.blake2b(bytes(32) + text, digest_size=32).hexdigest().encode()
    (fault,) = rewrite(log_folder, [text + b"\t" + chain + b"\n"]).faults
    assert fault.what == "no record says whose log this is"


def test_a_frame_of_a_run_is_from_its_own_members(tmp_path: Path) -> None:
    """Not from those of another run in the same log."""
    server = roster(4).by_name["server"]
    for run, known in ((b"a" * 16, roster(4)), (b"b" * 16, roster(3))):
        log = Recorder(tmp_path, "full", 1 << 24, identity("server"), server, known)
        for name in ("c001", "c004"):
            log.got(name, Frame.of(m.MaskedUpload(run, 1, bytes(8), bytes(16))))
        log.close()
    read = Log.read(tmp_path)
    found = {
        run: [f.text for f in check_promises(read, run.hex()) if f.check == "catalogue"]
        for run in (b"a" * 16, b"b" * 16)
    }
    assert found[b"a" * 16] == []
    assert found[b"b" * 16] == ["c004 is nobody that server talks to, by its roster"]


def test_two_processes_do_not_write_one_log(tmp_path: Path) -> None:
    first = made(tmp_path)
    with pytest.raises(errors.ConfigError, match="in use by another process"):
        made(tmp_path)
    put(first, upload(1))
    first.close()
    made(tmp_path).close()
    assert not Log.read(tmp_path).faults


def test_a_roster_may_grow_between_runs_and_an_owner_not_change(tmp_path: Path) -> None:
    put(log := made(tmp_path), upload(1))
    log.close()
    wider, member = roster(4), roster(4).by_name["c001"]
    log = Recorder(tmp_path, "full", 1 << 24, identity("c001"), member, wider)
    other = m.MaskedUpload(b"s" * 16, 1, b"", bytes(16))
    put(log, other)
    log.close()
    read = Log.read(tmp_path)
    assert not read.faults
    assert [len(read.rosters[run]) for run in read.runs] == [4, 5]
    put(log := made(tmp_path), upload(2), other)
    log.close()
    read = Log.read(tmp_path)
    assert not read.faults  # members came and went: the terms tell whether they might
    assert [run for run, _ in read.steps] == [other.run.hex()]
    new = Member.of(identity("new"), "c003", "client")
    for members in (roster(2).members, (*roster(1).members, new)):
        log = Recorder(tmp_path, "full", 1 << 24, identity("c001"), member, Roster.of(members))
        put(log, other)
        log.close()
    read = Log.read(tmp_path)
    assert not read.faults
    ((run, number, name, before),) = read.renewed
    assert (run, name) == (other.run.hex(), "c003")
    assert read.identity(run, name, number - 1) == before
    assert read.identity(run, name, number) == new.identity.hex() != before
    assert read.identity(run, "nobody", 1) == ""
    made(tmp_path, name="c002").close()
    assert Log.read(tmp_path).faults[-1].what == "the log changes its owner"
