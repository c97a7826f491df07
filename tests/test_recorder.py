"""The audit log on disk: chain, rotation, restarts; and heads over real sockets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_logs import RUN, lines_of, made, put, rewrite, upload
from rounds import make_plan

from secure_fedprompt.audit.log import Log
from secure_fedprompt.host import recorder
from secure_fedprompt.host.recorder import Recorder
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m


def killed(log: Recorder) -> None:
    """Let go of the files without a closing record."""
    log._whole = False
    log.close()


def test_what_is_written_is_read_back(log_folder: Path) -> None:
    log = Log.read(log_folder)
    assert (log.name, log.role, log.opened, log.closed) == ("c001", "client", 1, True)
    assert log.modes == {"full"}
    assert not log.faults
    assert [entry.kind for entry in log.entries] == ["Alive"] + 5 * ["MaskedUpload"]
    assert [entry.round for entry in log.entries] == [0, 1, 2, 3, 4, 5]
    assert log.runs == [RUN.hex()]
    for entry, message in log.messages(RUN.hex()):
        assert message == upload(entry.round)
        assert entry.size == len(m.CATALOGUE.encode(message))
    for path in log_folder.iterdir():
        assert path.stat().st_mode & 0o077 == 0


def test_the_chain_is_what_the_format_says(log_folder: Path) -> None:
    chain = bytes(32)
    for line in lines_of(log_folder):
        text, found = line.rstrip(b"\n").split(b"\t")
        chain = hashlib.blake2b(chain + text, digest_size=32).digest()
        assert chain.hex().encode() == found
        json.loads(text)


@pytest.mark.parametrize(
    ("spoil", "record", "what"),
    [
        (lambda x: [*x[:3], x[3].replace(b'"size":82', b'"size":83'), *x[4:]], 3, "altered"),
        (lambda x: [*x[:3], *x[4:]], 4, "records 3 to 3 are missing"),
        (lambda x: [*x[:3], x[4], x[3], *x[5:]], 4, "records 3 to 3 are missing"),
        (lambda x: [*x[:4], x[3], *x[4:]], 3, "moved or added"),
        (lambda x: [*x[:3], b"{}\t00\n", *x[4:]], 3, "not a record"),
        (lambda x: [*x[:2], x[2].replace(b'"way":"out",', b""), *x[3:]], 2, "not a record"),
    ],
)
def test_damage_is_located(log_folder: Path, spoil: Any, record: int, what: str) -> None:
    lines = lines_of(log_folder)
    spoilt = spoil(lines)
    assert spoilt != lines
    fault = rewrite(log_folder, spoilt).faults[0]
    assert fault.record == record
    assert what in fault.what
    assert fault.where.startswith("audit-0000.jsonl, line ")


def test_a_cut_log_lacks_its_end(log_folder: Path) -> None:
    lines = lines_of(log_folder)
    assert not rewrite(log_folder, lines[:-1]).closed
    torn = rewrite(log_folder, [*lines[:-1], lines[-1][:-5]])
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


def test_a_frame_that_was_swapped_is_located(log_folder: Path) -> None:
    path = log_folder / "frames-0000.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    log = Log.read(log_folder)
    assert not log.faults
    log.check_frames()
    assert [fault.record for fault in log.faults] == [6]
    assert "MaskedUpload" in log.faults[0].what


def test_a_restart_goes_on_with_the_chain(log_folder: Path) -> None:
    lines = lines_of(log_folder)
    (log_folder / "audit-0000.jsonl").write_bytes(b"".join(lines[:-1]) + b'{"kind":"fra')
    log = made(log_folder)
    put(log, upload(9))
    log.close()
    read = Log.read(log_folder)
    assert not read.faults
    assert (read.opened, read.closed) == (2, True)
    assert [entry.n for entry in read.entries] == [1, 2, 3, 4, 5, 6, 8]
    assert b'"cut":12' in lines_of(log_folder)[7]


def test_a_carriage_return_is_damage_and_nothing_is_cut(log_folder: Path) -> None:
    path = log_folder / "audit-0000.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"way"', b'"w\ry"', 1))
    with pytest.raises(errors.ConfigError, match="damaged at line 2"):
        made(log_folder)
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


def test_a_damaged_log_is_not_continued(log_folder: Path) -> None:
    lines = lines_of(log_folder)
    (log_folder / "audit-0000.jsonl").write_bytes(b"".join([*lines[:3], *lines[4:]]))
    with pytest.raises(errors.ConfigError, match="damaged at line 4: move the folder"):
        made(log_folder)


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
    assert (tmp_path / "frames-0000.bin").stat().st_size == 2 * 82
    assert [entry.place for entry in Log.read(tmp_path).entries] == [(0, 0), (0, 0), (0, 82)]


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
    assert entry.size == 20_042


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("in the way")
    with pytest.raises(
        errors.ConfigError, match=r"audit log .* free the disk, or set audit = 'off'"
    ):
        made(tmp_path / "audit")


def test_what_is_remembered_of_kept_frames_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "RECENT", 5)
    log = made(tmp_path / "log")
    put(log, *(upload(i) for i in (*range(1, 20), 19, 1)))
    assert len(log._places) == 5
    log.close()
    read = Log.read(tmp_path / "log")
    assert (len(read.entries), read.faults) == (21, [])
    assert (tmp_path / "log" / "frames-0000.bin").stat().st_size == 20 * len(
        m.CATALOGUE.encode(upload(1))
    )
