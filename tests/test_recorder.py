"""The audit log on disk: chain, rotation, restarts; and heads over real sockets."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import identity, make_plan, roster

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

RUN = b"r" * 16


def made(folder: Path, mode: str = "full", limit: int = 1 << 24, name: str = "c001") -> Recorder:
    known = roster(3)
    return Recorder(folder, mode, limit, identity(name), known.by_name[name], known, lambda: 7.0)


def put(log: Recorder, *messages: m.Message, way: str = "out") -> None:
    for message in messages:
        (log.got if way == "in" else log.sent)("server", Frame.of(message))


def killed(log: Recorder) -> None:
    """Let go of the files without a closing record."""
    log._whole = False
    log.close()


def upload(number: int, size: int = 40) -> m.MaskedUpload:
    return m.MaskedUpload(RUN, number, hashlib.shake_128(bytes([number % 256])).digest(size))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed log of an opening, six frames and a closing record."""
    log = made(tmp_path / "log")
    put(log, m.Alive(), *(upload(i) for i in range(1, 6)))
    log.close()
    return tmp_path / "log"


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "audit-0000.jsonl").read_bytes().splitlines(keepends=True)


def rewrite(folder: Path, lines: list[bytes]) -> Log:
    (folder / "audit-0000.jsonl").write_bytes(b"".join(lines))
    return Log.read(folder)


def test_what_is_written_is_read_back(folder: Path) -> None:
    log = Log.read(folder)
    assert (log.name, log.role, log.opened, log.closed) == ("c001", "client", 1, True)
    assert log.modes == {"full"}
    assert not log.faults
    assert [entry.kind for entry in log.entries] == ["Alive"] + 5 * ["MaskedUpload"]
    assert [entry.round for entry in log.entries] == [0, 1, 2, 3, 4, 5]
    assert log.runs == [RUN.hex()]
    for entry, message in log.messages(RUN.hex()):
        assert message == upload(entry.round)
        assert entry.size == len(m.CATALOGUE.encode(message))
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o077 == 0


def test_the_chain_is_what_the_format_says(folder: Path) -> None:
    chain = bytes(32)
    for line in lines_of(folder):
        text, found = line.rstrip(b"\n").split(b"\t")
        chain = hashlib.blake2b(chain + text, digest_size=32).digest()
        assert chain.hex().encode() == found
        json.loads(text)


@pytest.mark.parametrize(
    ("spoil", "record", "what"),
    [
        (lambda x: [*x[:3], x[3].replace(b'"size":66', b'"size":67'), *x[4:]], 3, "altered"),
        (lambda x: [*x[:3], *x[4:]], 4, "records 3 to 3 are missing"),
        (lambda x: [*x[:3], x[4], x[3], *x[5:]], 4, "records 3 to 3 are missing"),
        (lambda x: [*x[:4], x[3], *x[4:]], 3, "moved or added"),
        (lambda x: [*x[:3], b"{}\t00\n", *x[4:]], 3, "not a record"),
        (lambda x: [*x[:2], x[2].replace(b'"way":"out",', b""), *x[3:]], 2, "not a record"),
    ],
)
def test_damage_is_located(folder: Path, spoil: Any, record: int, what: str) -> None:
    lines = lines_of(folder)
    spoilt = spoil(lines)
    assert spoilt != lines
    fault = rewrite(folder, spoilt).faults[0]
    assert fault.record == record
    assert what in fault.what
    assert fault.where.startswith("audit-0000.jsonl, line ")


def test_a_cut_log_lacks_its_end(folder: Path) -> None:
    lines = lines_of(folder)
    assert not rewrite(folder, lines[:-1]).closed
    torn = rewrite(folder, [*lines[:-1], lines[-1][:-5]])
    assert torn.torn
    assert not torn.closed


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_flipped_bit_goes_unnoticed(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        log = made(folder)
        put(log, m.Alive(), upload(1), upload(2))
        log.close()
        path = folder / data.draw(st.sampled_from(("audit-0000.jsonl", "frames-0000.bin")))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            found = Log.read(folder)
        except errors.ConfigError:  # the format's own name
            return
        found.check_frames()
        assert found.faults or found.torn or not found.closed


def test_a_frame_that_was_swapped_is_located(folder: Path) -> None:
    path = folder / "frames-0000.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    log = Log.read(folder)
    assert not log.faults
    log.check_frames()
    assert [fault.record for fault in log.faults] == [6]
    assert "MaskedUpload" in log.faults[0].what


def test_a_restart_goes_on_with_the_chain(folder: Path) -> None:
    lines = lines_of(folder)
    (folder / "audit-0000.jsonl").write_bytes(b"".join(lines[:-1]) + b'{"kind":"fra')
    log = made(folder)
    put(log, upload(9))
    log.close()
    read = Log.read(folder)
    assert not read.faults
    assert (read.opened, read.closed) == (2, True)
    assert [entry.n for entry in read.entries] == [1, 2, 3, 4, 5, 6, 8]
    assert b'"cut":12' in lines_of(folder)[7]


def test_a_carriage_return_is_damage_and_nothing_is_cut(folder: Path) -> None:
    path = folder / "audit-0000.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"way"', b'"w\ry"', 1))
    with pytest.raises(errors.ConfigError, match="damaged at line 2"):
        made(folder)
    assert path.stat().st_size == len(content)


def test_a_kill_while_a_segment_begins_is_survived(tmp_path: Path) -> None:
    log = made(tmp_path, limit=1 << 16)
    for i in range(20):
        put(log, upload(i, 1000))
    killed(log)
    last = max(int(path.stem[-4:]) for path in tmp_path.glob("audit-*"))
    assert last > 0
    for torn in (b"", b'{"kind":"segm'):
        (tmp_path / f"audit-{last + 1:04d}.jsonl").write_bytes(torn)
        (tmp_path / f"frames-{last + 1:04d}.bin").write_bytes(b"")
        again = made(tmp_path, limit=1 << 16)
        put(again, upload(99, 1000))
        killed(again)
        assert not Log.read(tmp_path).faults


def test_an_interrupted_record_is_not_closed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = made(tmp_path)
    put(log, upload(1))

    def interrupted(data: bytes) -> int:
        raise KeyboardInterrupt

    assert log._lines is not None
    lines = log._lines
    monkeypatch.setattr(log, "_lines", type("Torn", (), {"write": interrupted, "tell": lines.tell,
                                                         "close": lines.close}))  # fmt: skip
    with pytest.raises((KeyboardInterrupt, TypeError)):
        put(log, upload(2))
    log.close()
    log = made(tmp_path)
    put(log, upload(3))
    log.close()
    read = Log.read(tmp_path)
    assert not read.faults
    assert [entry.round for entry in read.entries] == [1, 3]


def test_the_bound_holds_over_restarts(tmp_path: Path) -> None:
    limit = 1 << 16
    for i in range(60):
        log = made(tmp_path, limit=limit)
        put(log, upload(i, 1000), upload(i + 100, 1000))
        log.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit + 4096
    assert not Log.read(tmp_path).faults


def test_every_plan_of_a_round_is_on_record(tmp_path: Path) -> None:
    import dataclasses

    plan = make_plan(3)
    other = dataclasses.replace(plan, clip=0.5)
    log = made(tmp_path, "headers")
    put(log, m.Plan(plan, b""), m.Plan(other, b""), m.Plan(plan, b""), way="in")
    log.close()
    read = Log.read(tmp_path)
    assert read.conflicts == [(plan.run.hex(), plan.round)]
    assert read.plans == {(plan.run.hex(), 1): plan}
    assert sum(b'"kind":"plan"' in line for line in lines_of(tmp_path)) == 2


def test_a_damaged_log_is_not_continued(folder: Path) -> None:
    lines = lines_of(folder)
    (folder / "audit-0000.jsonl").write_bytes(b"".join([*lines[:3], *lines[4:]]))
    with pytest.raises(errors.ConfigError, match="damaged at line 4: move the folder"):
        made(folder)


def test_headers_keep_no_frames_but_heads(tmp_path: Path) -> None:
    log = made(tmp_path, "headers")
    put(log, upload(1), log.head(m.RoundEnd(RUN, 1, "")))
    log.close()
    read = Log.read(tmp_path)
    assert [read.frame(entry) is not None for entry in read.entries] == [False, True]
    kept = (tmp_path / "frames-0000.bin").read_bytes()
    assert bytes(upload(1).vector) not in kept


def test_a_broadcast_is_kept_once(tmp_path: Path) -> None:
    log = made(tmp_path)
    put(log, upload(1), upload(1), upload(2))
    log.close()
    assert (tmp_path / "frames-0000.bin").stat().st_size == 2 * 66
    assert [entry.place for entry in Log.read(tmp_path).entries] == [(0, 0), (0, 0), (0, 66)]


def test_the_disk_use_is_bounded_and_the_rest_still_verifies(tmp_path: Path) -> None:
    limit = 1 << 16
    log = made(tmp_path, limit=limit)
    for i in range(300):
        put(log, upload(i, 1000))
        held = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert held <= limit + 2048
    log.close()
    read = Log.read(tmp_path)
    assert not read.faults
    assert read.first > 0
    assert read.chains[read.first]
    assert all(read.frame(entry) for entry in read.entries)
    numbers = sorted(tmp_path.glob("audit-*.jsonl"))
    numbers[1].unlink()
    assert any("missing" in fault.what for fault in Log.read(tmp_path).faults)


def test_a_frame_beyond_the_limit_is_recorded_and_not_kept(tmp_path: Path) -> None:
    log = made(tmp_path, limit=1 << 16)
    put(log, upload(1, 20_000))
    log.close()
    (entry,) = Log.read(tmp_path).entries
    assert entry.place is None
    assert entry.size == 20_026


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("in the way")
    with pytest.raises(
        errors.ConfigError, match=r"audit log .* free the disk, or set audit = 'off'"
    ):
        made(tmp_path / "audit")


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


def test_the_reader_in_the_documentation_agrees(folder: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "audit-log.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(program.splitlines()) <= 40
    assert "secure_fedprompt" not in program.replace("secure-fedprompt", "")
    script = tmp_path / "reader.py"
    script.write_text(program)

    def run() -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(script), str(folder)]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)

    good, log = run(), Log.read(folder)
    assert good.returncode == 0, good.stderr
    last = good.stdout.splitlines()[-1]
    assert last == f"8 records, 6 frames, head {log.chains[8]}"
    rewrite(folder, [line.replace(b'"round":3', b'"round":4') for line in lines_of(folder)])
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
    b'{"kind":"open","n":1,"at":0,"format":"secure-fedprompt/audit/2","name":"x"}',
    b'{"kind":["frame"],"n":1}',
    b'{"n":true,"kind":"close"}',
    b'{"n":' + b"9" * 5000 + b',"kind":"close"}',
    b"[" * 100_000,
    b'"text"',
    b"\xff\xfe\x00",
    b"",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_crafted_record_is_a_fault_and_no_crash(folder: Path, text: bytes) -> None:
    lines = lines_of(folder)
    first = lines[0].partition(b"\t")[2].strip()
    chain = hashlib.blake2b(bytes.fromhex(first.decode()) + text, digest_size=32).hexdigest()
    log = rewrite(folder, [lines[0], text + b"\t" + chain.encode() + b"\n"])
    assert log.faults
    log.check_frames()
    rewrite(folder, [text + b"\t" + chain.encode() + b"\n", *lines[1:]]).check_frames()
    assert Log.read(folder).faults


def test_file_names_are_not_trusted(folder: Path) -> None:
    for name in ("audit-x.jsonl", "audit-99999999999999.jsonl", "audit-0001.jsonl.bak"):
        (folder / name).write_bytes(b"")
    assert not Log.read(folder).faults
    (folder / "audit-999999999.jsonl").write_bytes(b"")
    assert "segments 1 to 999999998 are missing" in Log.read(folder).faults[-1].what


def test_a_log_without_an_owner_is_a_fault(folder: Path) -> None:
    text = b'{"kind":"close","n":0,"at":0}'
    chain = hashlib.blake2b(bytes(32) + text, digest_size=32).hexdigest().encode()
    (fault,) = rewrite(folder, [text + b"\t" + chain + b"\n"]).faults
    assert fault.what == "no record says whose log this is"


def test_a_frame_of_a_run_is_from_its_own_members(tmp_path: Path) -> None:
    """Not from those of another run in the same log."""
    server = roster(4).by_name["server"]
    for run, known in ((b"a" * 16, roster(4)), (b"b" * 16, roster(3))):
        log = Recorder(tmp_path, "full", 1 << 24, identity("server"), server, known)
        for name in ("c001", "c004"):
            log.got(name, Frame.of(m.MaskedUpload(run, 1, bytes(8))))
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
    other = m.MaskedUpload(b"s" * 16, 1, b"")
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
    assert Log.read(tmp_path).faults[-1].what == "within a run, c003 became another"
    made(tmp_path, name="c002").close()
    assert Log.read(tmp_path).faults[-1].what == "the log changes its owner"
