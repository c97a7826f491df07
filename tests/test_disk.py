"""Disks that are full, read-only or held by somebody else: one line, and a store that opens again."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from federation import World
from recorded_logs import made, put
from rounds import make_plan, names
from test_killed_anywhere import SERVER, SETTINGS, Mortal, check

from secure_fedprompt import client, prompt_file
from secure_fedprompt.audit.log import Log
from secure_fedprompt.clients import file_journal, record_file
from secure_fedprompt.clients.file_journal import FileJournal
from secure_fedprompt.commands.watch import look
from secure_fedprompt.host import files
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.server import store
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import Store


class Failing(Mortal):
    """A world in which one write to a disk fails, and its party ends and is started again.

    Attributes:
        writes: that were tried.
    """

    def __init__(self, folder: Path, at: int, late: bool, **changes: Any) -> None:
        self.writes, self.at, self.late = 0, at, late
        self.failed = ""
        super().__init__(folder, **changes)

    @contextlib.contextmanager
    def written(self, what: object, remedy: str = "") -> Iterator[None]:
        self.writes += 1
        now = self.writes == self.at
        if now and not self.late:
            self.fail(what)
        yield
        if now and self.late:  # the bytes are there, and the program ends all the same
            self.fail(what)

    def fail(self, what: object) -> None:
        self.failed = str(what)
        raise errors.DiskError(f"{what} cannot be written (No space left on device)")

    def answer(self, name: str, message: m.Message) -> Any:
        replies = super().answer(name, message)
        if isinstance(self.errors.get(name), errors.DiskError):
            del self.errors[name]
            self.lost.discard(name)
            self.begin(name)
            return []
        return replies

    def pump(self, until: Any = lambda world, message: False) -> None:
        while True:
            try:
                return super().pump(until)
            except errors.DiskError:
                self.restart(SERVER)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(folder: Path, at: int, late: bool, **changes: Any) -> Failing:
        world = Failing.__new__(Failing)
        world.writes, world.at = 0, -1
        for module in (store, file_journal, record_file):
            monkeypatch.setattr(module, "written", lambda *a: Failing.written(world, *a))
        world.__init__(folder, -1, late, **changes)  # type: ignore[misc]
        world.writes, world.at = 0, at
        return world

    return make


def walk(failing: Any, tmp_path: Path, kind: str, step: int) -> set[str]:
    whole = failing(tmp_path / "whole", -1, False, **SETTINGS[kind])
    whole.pump()
    check(whole)
    whole.close()
    failed = set()
    for at in range(1, whole.writes, step):
        for late in (False, True):
            world = failing(tmp_path / f"{at}-{late}", at, late, **SETTINGS[kind])
            try:
                world.pump()
                check(world)
            except AssertionError as error:
                error.add_note(f"{kind}: write {at} of {whole.writes} failed, late: {late}")
                raise
            world.close()
            assert world.failed
            failed.add(Path(world.failed.split()[-1]).name)
    return failed


def test_a_write_fails_here_and_there(failing: Any, tmp_path: Path) -> None:
    failed = walk(failing, tmp_path, "masks", 17)
    assert {"server", "journal"} <= failed


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["masks", "bfv", "selection"] if "KILL_STEP" in os.environ else ["masks"]
)
def test_a_write_fails_anywhere(failing: Any, tmp_path: Path, kind: str) -> None:
    """At every one with KILL_STEP=1, under bfv and with secure selection too."""
    step = int(os.environ.get("KILL_STEP", "13"))
    assert len(walk(failing, tmp_path, kind, step)) >= 2


def test_a_full_disk_is_not_the_senders_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    world.join("c001")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_durably", full)
    monkeypatch.setattr(store, "write_tensors", full)
    for name in names(4)[1:]:
        world.join(name)
    with pytest.raises(errors.DiskError, match=r"run folder .* \(No space left on device\): free"):
        world.pump()
    assert not world.errors
    assert not [text for kind, text in world.events if kind in ("fault", "refused")]


def test_a_database_that_somebody_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCKED", 0.05)
    kept = Store(tmp_path, ServerSettings())
    backup = sqlite3.connect(tmp_path / "run.sqlite")
    backup.execute("BEGIN EXCLUSIVE")
    with pytest.raises(errors.DiskError, match=r"run folder .*database is locked.*to go on"):
        kept.event("joined", "c001")
    backup.rollback()
    kept.event("joined", "c001")
    kept.close()
    assert backup.execute("SELECT text FROM events").fetchall() == [("c001",)]
    backup.close()


def test_two_servers_cannot_share_a_run_folder(tmp_path: Path) -> None:
    first = Store(tmp_path, ServerSettings())
    with pytest.raises(errors.ConfigError, match="in use by another server: stop it"):
        Store(tmp_path, ServerSettings())
    first.close()
    Store(tmp_path, ServerSettings()).close()


def test_a_torn_settings_file_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was rewritten at each start: a full disk would have left an empty one."""
    Store(tmp_path, ServerSettings()).close()
    before = (tmp_path / "server.json").read_bytes()
    real = files.os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(errors.DiskError):
        Store(tmp_path, ServerSettings(bind="tcp://127.0.0.1:5999"))
    monkeypatch.setattr(files.os, "fsync", real)
    assert (tmp_path / "server.json").read_bytes() == before
    Store(tmp_path, ServerSettings()).close()


@pytest.mark.parametrize("kept", ["", "[]", "{}", '{"method": "promptfl", "protection": 1}'])
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, kept: str) -> None:
    Store(tmp_path, ServerSettings()).close()
    (tmp_path / "server.json").write_text(kept)
    words = "run folder .*: the settings in server.json cannot be read .*: restore that file from"
    with pytest.raises(errors.ConfigError, match=words):
        Store(tmp_path, ServerSettings())
    with pytest.raises(errors.ConfigError, match=words):
        look(tmp_path)


def test_a_damaged_database_is_told_from_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "run.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(errors.DiskError, match="not a database.*: restore it from a copy"):
        Store(tmp_path, ServerSettings())


@pytest.mark.parametrize("path", [Path("/proc/nothing"), Path("/dev/null")])
def test_folders_that_cannot_be_written(path: Path) -> None:
    """Root can write read-only folders; these nobody can."""
    with pytest.raises(errors.DiskError, match="run folder .* cannot be written"):
        Store(path / "run", ServerSettings())
    with pytest.raises(errors.DiskError, match=r"state_dir .* cannot be written .*choose another"):
        FileJournal(path / "state" / "journal.jsonl")


def test_a_journal_that_could_not_be_written_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = FileJournal(tmp_path / "journal.jsonl")
    plan, real = make_plan(3), record_file.os.fsync
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_file.os, "fsync", full)
    with pytest.raises(errors.DiskError, match="journal cannot be written"):
        journal.begin_round(plan)
    assert calls
    assert not (tmp_path / "journal.jsonl").read_bytes()
    monkeypatch.setattr(record_file.os, "fsync", real)
    journal.begin_round(plan)  # nothing was added
    journal.close()
    again = FileJournal(tmp_path / "journal.jsonl")
    assert again.knows(plan.run)
    with pytest.raises(errors.ReplayError):
        again.begin_round(plan)
    again.close()


def test_a_final_prompt_that_cannot_be_written_is_held_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def write(path: Path, learner: object) -> None:
        tried.append(path)
        if len(tried) < 3:
            raise errors.DiskError("prompt cannot be written")

    monkeypatch.setattr(prompt_file, "write_prompt", write)
    monkeypatch.setattr(client, "AGAIN", 0.0)
    ended: list[int] = []  # after how many attempts
    journal = SimpleNamespace(finish=lambda run: ended.append(len(tried)))
    session: Any = SimpleNamespace(
        final=b"", run=bytes(16), learner=SimpleNamespace(finish=lambda final, run: None),
        party=SimpleNamespace(journal=journal),
    )  # fmt: skip
    told: list[str] = []
    log: Any = SimpleNamespace(error=lambda event, words: told.append(event))
    assert client.save(session, tmp_path, log, 60.0) == tried[0]
    assert (len(tried), told) == (3, ["disk"])
    assert ended == [3]  # until it is saved, it can be asked for again
    tried.clear()
    with pytest.raises(errors.DiskError):  # patience is over
        client.save(session, tmp_path, log, -1.0)


class Full:
    """A file on a disk without room, whose buffer keeps what it could not write."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def flush(self) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        self._file.close()
        raise OSError(28, "No space left on device")


def test_an_audit_log_on_a_full_disk_ends_in_one_line_and_opens_again(tmp_path: Path) -> None:
    log = made(tmp_path / "log")
    put(log, m.Alive())
    log._lines = Full(log._lines)
    with pytest.raises(errors.DiskError, match=r"audit log .*No space left.*audit = 'off'"):
        put(log, m.Alive())
    with pytest.raises(errors.DiskError, match="audit log"):
        log.close()
    again = made(tmp_path / "log")
    put(again, m.Alive())
    again.close()
    read = Log.read(tmp_path / "log")
    assert (read.opened, len(read.entries), read.faults) == (2, 3, [])


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_changes_no_chain(tmp_path: Path, jump: float) -> None:
    clock = [1e9]
    log = made(tmp_path / "log")
    log._now = lambda: clock[0]
    put(log, m.Alive())
    clock[0] += jump
    put(log, m.Alive())
    log.close()
    read = Log.read(tmp_path / "log")
    assert (len(read.entries), read.faults, read.closed) == (2, [], True)
