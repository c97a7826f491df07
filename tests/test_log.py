"""What programs tell their operators: levels, files, objects, and nothing that steers a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from secure_fedprompt.host import log as module
from secure_fedprompt.host.log import Bars, Log
from secure_fedprompt.protocol.errors import ConfigError, RunFailedError

STAMPED = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d "


def pipe() -> Console:
    return Console(file=io.StringIO(), width=20)


def text_of(log: Log) -> str:
    return str(log.console.file.getvalue())  # type: ignore[attr-defined]


def terminal() -> Console:
    return Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)


def test_what_is_no_terminal_gets_whole_lines_with_date_and_level() -> None:
    with Log("server", console=pipe()) as log:
        log.info("joined", "joined alice, and this line is longer than the console is wide")
        log.warning("lost", "lost [bold]bob[/]")
        log.debug("round", "not shown")
    first, second = text_of(log).splitlines()
    assert re.fullmatch(STAMPED + "info    joined alice, .* wide", first)
    assert re.fullmatch(STAMPED + r"warning lost \[bold\]bob\[/\]", second)


def test_a_terminal_gets_the_time_of_day_and_what_goes_on() -> None:
    with Log("server", console=terminal()) as log:
        log.doing("waiting for clients: 1 of 4 (alice)")
        log.info("joined", "joined alice")
        log.doing("waiting for clients: 2 of 4 (alice, bob)")
    text = text_of(log)
    assert re.search(r"\d\d:\d\d:\d\d joined alice", text)
    assert "2 of 4 (alice, bob)" in text
    assert not re.search(STAMPED, text)


def test_a_file_is_private_appended_to_and_goes_on_after_rotation(tmp_path: Path) -> None:
    path = tmp_path / "client.log"
    old = os.umask(0)
    try:
        with Log("client", str(path), console=pipe()) as log:
            log.info("a", "first")
            assert path.stat().st_mode & 0o777 == 0o600
            path.rename(tmp_path / "client.log.1")
            log.info("a", "second")
            assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)
    with Log("client", str(path), console=pipe()) as log:
        log.info("a", "third")
    assert [line[-6:].strip() for line in path.read_text().splitlines()] == ["second", "third"]
    assert (tmp_path / "client.log.1").read_text().endswith("info    first\n")


def test_objects_hold_the_facts_and_how_the_program_ended(tmp_path: Path) -> None:
    path = tmp_path / "client.jsonl"
    log = Log("client", str(path), "warning", pipe())

    def program() -> None:
        with log:
            log.name = "alice"
            log.info("sent", "not told at this level")
            log.warning("link", "no connection\nFAKE: line", tries=3)
            raise RunFailedError("too few\n clients")

    with pytest.raises(RunFailedError):
        program()
    first, second = map(json.loads, path.read_text().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", first.pop("time"))
    assert first == {
        "level": "warning", "program": "client", "name": "alice", "event": "link",
        "words": "no connection FAKE: line", "tries": 3,
    }  # fmt: skip
    assert (second["event"], second["error"], second["exit_code"]) == ("ended", "RunFailedError", 8)
    assert second["words"] == "RunFailedError: too few clients"
    assert "too few" not in text_of(log)  # the command line says it


def test_objects_on_standard_output_come_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with Log("client", "json", console=terminal()) as log, Bars(log) as bars:
        log.doing("nothing")
        bars.on("training", 1, 2)
        log.info("joined", "joined")
    printed = capsys.readouterr()
    assert [json.loads(line)["event"] for line in printed.out.splitlines()] == ["joined"]
    assert not text_of(log)


def test_a_peer_steers_no_terminal_and_fakes_no_line() -> None:
    with Log("server", console=pipe()) as log:
        log.warning(
            "left", "left bob: \x1b[2Jgone\r\n2026-01-01T00:00:00+00:00 info    all good\x9b"
        )
    assert len(text_of(log).splitlines()) == 1
    assert not {"\x1b", "\r", "\x9b"} & set(text_of(log))


def test_a_reader_that_has_gone_ends_a_command_without_a_word() -> None:
    code = (
        "import argparse, sys; from secure_fedprompt.host import command\n"
        "def body():\n"
        "    while True: print('line ' * 100)\n"
        "sys.exit(command.guard(body, argparse.Namespace(debug=False)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(30) == 141


def test_progress_is_a_bar_or_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    with Log("client", console=terminal()) as log, Bars(log) as bars:
        for done in range(1, 9):
            bars.on("round 1/3: training", done, 8)
    assert "round 1/3: training" in text_of(log)
    monkeypatch.setattr(module, "EVERY", 0.0)
    with Log("client", console=pipe()) as log, Bars(log) as bars:
        for done in range(1, 4):
            bars.on("reading images", done, 3)
    assert [line[-6:] for line in text_of(log).splitlines()] == ["1 of 3", "2 of 3"]


def test_a_log_that_cannot_be_written_is_an_error_and_later_costs_the_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"log = .*missing/a.log.*cannot be written \(No such"):
        Log("client", str(tmp_path / "missing" / "a.log"))
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Log("client", "/dev/full", console=pipe()) as log:
        log.info("a", "first")
        log.info("a", "second")
    assert text_of(log).count("\n") == 2
    told = capsys.readouterr().err
    assert told.count("cannot be written") == 1
    assert "No space left" in told
