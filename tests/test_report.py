"""The report and the live view, from run folders."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import sqlite3
import subprocess
import time
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from audited import federate
from hypothesis import given
from hypothesis import strategies as st

from secure_fedprompt.__main__ import main
from secure_fedprompt.commands import watch
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.report import charts
from secure_fedprompt.report.gather import gather
from secure_fedprompt.report.page import page

EVIL = '<script>alert(1)</script> & "more"'


def run_folder(folder: Path, tap: Any = None, **changes: Any) -> Path:
    """A server's run_dir with its log."""
    world, logs = federate(folder, *([tap] if tap else []), **changes)
    world.store.close()
    shutil.move(logs["server"] / "audit", folder / "run" / "audit")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Consistent) and sender == "c002" and message.round == 1:
            return m.Withdraw(message.run, message.round, "PolicyError", EVIL)
        return message

    return run_folder(tmp_path_factory.mktemp("run"), tap, n=5)


class _Tags(HTMLParser):
    """Open tags must close, in order."""

    VOID = frozenset(("meta", "line", "rect", "circle", "polyline"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(run: Path) -> None:
    text = page(gather(run, [], [], None))
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe", "object", "base"}
    assert not [a for _, a in tags.seen if {"href", "src", "onload", "style"} & set(a)]
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert "@import" not in text
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert headings == ["What ran", "Who learned what", "Accuracy", "Bytes", "Time",
                        "Dropouts and faults", "Privacy spent", "Audit"]  # fmt: skip
    assert [a["aria-label"] for tag, a in tags.seen if tag == "svg"] == [
        "Accuracy of the global prompt by round",
        "kB up by message type and round, all clients together",
        "kB down by message type and round, all clients together",
        "Seconds by stage and round",
    ]
    ids = [a["id"] for _, a in tags.seen if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["aria-labelledby"] in ids for tag, a in tags.seen if tag == "section")


def test_what_others_wrote_is_text(run: Path) -> None:
    text = page(gather(run, [], [], None))
    assert EVIL not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;more&quot;" in text


def test_numbers_are_those_of_the_run_folder(run: Path) -> None:
    report = gather(run, [], [], None)
    with closing(sqlite3.connect(run / "run.sqlite")) as db:
        wanted = dict(
            db.execute("SELECT type, SUM(bytes) FROM traffic WHERE direction = 'up' GROUP BY 1")
        )
    assert {kind: sum(values) for kind, values in report.traffic["up"].items()} == wanted
    assert report.labels == ["1", "2", "final"]
    assert [round(v, 6) for v in report.accuracy if v is not None] == [1.0, 1.0, 1.0]
    assert ("1", "c002", f"withdrew: PolicyError: {EVIL}") in report.dropouts
    assert report.audit is not None
    assert any("5 clients, t = 4: this holds against a dishonest server that colludes with up to 2"
               in text for text in report.learned)  # fmt: skip


def test_what_is_learned_follows_the_protection(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, protection="bfv")
    report = gather(folder, [], [], None)
    assert report.accuracy == [None, None, None]
    assert "while no client colludes with the server" in " ".join(report.learned)
    assert "give a client&#x27;s result file" in page(report) or "give a client's" in page(report)
    client = tmp_path / "alice.json"
    history = {str(i): {"accuracy": 0.1 * i, "contributors": 4.0} for i in (1, 2, 3)}
    client.write_text(json.dumps({"opened": history}))
    assert gather(folder, [], [], client).accuracy == pytest.approx([0.1, 0.2, 0.3])
    client.write_text("[]")
    with pytest.raises(errors.ConfigError, match="--client-json"):
        gather(folder, [], [], client)


def test_an_unprotected_run_is_shown_as_broken(tmp_path: Path) -> None:
    text = page(gather(run_folder(tmp_path, protection="none"), [], [], None))
    assert '<p class="verdict broken">Audit: NOT KEPT: protection' in text
    assert "The server saw every client&#x27;s update" in text


def test_an_aborted_round_is_shown_with_its_reason(tmp_path: Path) -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Consistent) and message.round == 1:
            return m.Withdraw(message.run, message.round, "PolicyError", "too few")
        return message

    report = gather(run_folder(tmp_path, tap), [], [], None)
    assert report.labels == ["1 (aborted)", "1", "2", "final"]
    reason = "0 of 4 clients answered while consistency, 3 are needed"
    assert ("1 (aborted)", "", reason) in report.dropouts
    assert reason in page(report)


def test_client_noise_and_ledgers_are_spent(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, dp_noise=2.0, dp_clip=1.0, weights="uniform", metrics="off", n=5)
    spent = gather(folder, [], [], None).spent
    assert re.match(r"Client noise in 2 planned sums: epsilon [\d.]+ at delta 0.001", spent[0])
    from secure_fedprompt.clients.ledger import Entry, Ledger, Upload
    from secure_fedprompt.clients.settings import PrivacySettings

    dp = PrivacySettings(kind="sample", noise_multiplier=1.0)
    with contextlib.closing(Ledger(tmp_path / "alice" / "privacy.jsonl")) as ledger:
        ledger.reserve(Entry("ab", 1, 1.0, 0.1, 40), dp)
        ledger.release(Upload("ab", 1, 0.125), 0.0, 1e-5)
        spent = gather(folder, [], [tmp_path / "alice"], None).spent  # while the client runs
    (told,) = (text for text in spent if text.startswith("alice") and "1e-05" in text)
    assert re.search(r"40 steps of training, epsilon [\d.]+ \(prv\) for one image", told)
    assert "1 uploads, epsilon 2.166 (zCDP) for the client or zeros" in told
    with pytest.raises(errors.ConfigError, match=r"holds no privacy\.jsonl"):
        gather(folder, [], [tmp_path], None)


def test_the_command_writes_a_file_or_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.html"
    json_path = tmp_path / "r.json"
    assert main(["report", str(run), "-o", str(out), "--json", str(json_path)]) == 0
    assert json.loads(json_path.read_text())["audit"]["checks"]["chain"] == "pass"
    assert main(["watch", str(run), "--once", "--json", str(json_path)]) == 0
    assert len(json.loads(json_path.read_text())["rounds"]) == 3
    assert out.read_text().startswith("<!doctype html>")
    assert out.stat().st_size < 100_000
    assert main(["report", str(tmp_path), "-o", str(out)]) == 2
    assert "holds no run.sqlite" in capsys.readouterr().err
    assert main(["report", str(run), "-o", str(tmp_path / "no" / "r.html")]) == 2
    assert "--out" in capsys.readouterr().err


@given(st.floats(1e-9, 1e12))
def test_ticks_are_round_and_reach_the_top(top: float) -> None:
    found = charts.ticks(top)
    assert found[0] == 0
    assert found[-1] >= top * (1 - 1e-6)
    assert 3 <= len(found) <= 7
    step = found[1]
    assert float(f"{step:.2g}") == pytest.approx(step)


def test_many_series_are_summed_as_other() -> None:
    text = charts.stacked("t", ["a"], {f"s{i}": [float(i + 1)] for i in range(9)}, "")
    keys = re.findall(r"</span>(.*?)</li>", text)
    assert keys == ["s8", "s7", "s6", "s5", "s4", "other"]
    assert "other: 10" in text


def test_gaps_in_a_line_stay_gaps() -> None:
    text = charts.line("t", list("abcde"), [1.0, 2.0, None, 3.0, 4.0], "%")
    assert text.count("<polyline") == 2
    assert text.count("<circle") == 4


# -- watch -----------------------------------------------------------------------------------------


def test_watch_follows_a_run_to_its_end(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)

    def add(kind: str, text: str) -> None:
        with closing(sqlite3.connect(folder / "run.sqlite")) as db, db:
            db.execute("INSERT INTO events VALUES (?,?,?)", (time.time(), kind, text))

    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        add(*(("left", "c003 left") if len(waits) < 3 else ("finished", "prompt x")))

    assert watch.follow(folder, False, 0.5, wait) == 0
    assert waits == [0.5] * 3
    state = watch.look(folder)
    assert state.ended == "finished"
    assert [text for _, _, text in state.events][-2:] == ["c003 left", "prompt x"]
    add("failed", "too few clients")
    with pytest.raises(errors.RunFailedError, match="too few clients"):
        watch.follow(folder, False, 0.5, wait)


def test_watch_once_returns_what_became_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Consistent):
            return m.Withdraw(message.run, message.round, "SealError", "bad")
        return message

    folder = run_folder(tmp_path, tap)
    assert main(["watch", str(folder), "--once"]) == 8
    printed = capsys.readouterr()
    assert "failed;" in printed.out
    assert printed.err.startswith("RunFailedError: learning round 1 aborted 3 times")


def test_a_simulation_does_not_go_on_in_a_finished_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["simulate", "--parts", "3", "--rounds", "1", "--per-class", "2", "--run-dir",
             str(tmp_path / "r"), "--styles", "photo", "--json", str(tmp_path / "o.json")]  # fmt: skip
    assert main(words) == 0
    summary = json.loads((tmp_path / "o.json").read_text())
    assert summary["update_norm"]["low"] <= summary["update_norm"]["median"]
    assert not any(row["seconds"] for row in summary["rounds"])  # of a clock that jumps
    assert "seconds by stage" not in capsys.readouterr().out
    assert main(words) == 2
    assert "holds a finished run: choose another" in capsys.readouterr().err


def test_watch_once_shows_rounds_and_events(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "running; 3 sums done, 2 learning rounds wanted" in shown
    assert "100.0%" in shown
    assert main(["watch", str(run / "prompts"), "--once"]) == 2
    assert "holds no run.sqlite" in capsys.readouterr().err


# -- in a browser ----------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_chromium_shows_it_from_a_file_without_a_complaint(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    out.write_text(page(gather(run, [], [], None)))
    assert CHROMIUM is not None

    def chromium(*words: str) -> subprocess.CompletedProcess[str]:
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update",
                 "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}")  # fmt: skip
        return subprocess.run([CHROMIUM, *flags, *words, out.as_uri()], capture_output=True,
                              text=True, timeout=120, check=True)  # fmt: skip

    dom = chromium("--dump-dom")
    assert "CONSOLE" not in dom.stderr
    assert dom.stdout.count("<section") == 8
    sizes = {}
    for name, words in {"wide": ("--window-size=1000,3000",),
                        "phone": ("--window-size=390,4000",),
                        "dark": ("--window-size=1000,3000", "--force-dark-mode")}.items():  # fmt: skip
        shot = tmp_path / f"{name}.png"
        done = chromium(*words, f"--screenshot={shot}")
        assert "CONSOLE" not in done.stderr
        sizes[name] = shot.read_bytes()
    from io import BytesIO

    from PIL import Image

    corner = {
        name: Image.open(BytesIO(data)).convert("L").getpixel((2, 2))
        for name, data in sizes.items()
    }
    assert corner["wide"] == 255
    assert corner["dark"] < 60
    chromium(f"--print-to-pdf={tmp_path / 'r.pdf'}")
    assert (tmp_path / "r.pdf").read_bytes()[:5] == b"%PDF-"


@given(st.integers(1, 90), st.integers(0, 3))
def test_labels_of_rounds_do_not_collide_on_a_phone(rounds: int, aborted: int) -> None:
    labels = [f"{i}\N{MULTIPLICATION SIGN}" for i in range(1, aborted + 1)]
    labels += [*map(str, range(1, rounds + 1)), "final"]
    text = charts.stacked("t", labels, {"a": [1.0] * len(labels)}, "")
    found = re.findall(r'<text x="([\d.]+)" y="\d+" text-anchor="middle">([^<]+)', text)
    assert found[0][1] == "final"
    spans = sorted((float(x) - 5.5 * len(label), float(x) + 5.5 * len(label)) for x, label in found)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
    assert spans[-1][1] <= charts.WIDTH
    assert len(found) >= min(len(labels), 8)


def test_words_are_wrapped_and_numbers_stand_below_each_other() -> None:
    text = charts.table(("round", "who", "bytes"), [("1", "alice", "12"), ("2", "", "3.5")], "t")
    assert '<th scope="col" class="words">who</th><th scope="col">bytes</th>' in text
    assert '<td class="words">alice</td><td>12</td>' in text


def test_the_accuracy_is_drawn_beside_zero_shot(run: Path) -> None:
    text = page(gather(run, [], [], None))
    assert "and zero-shot" not in text  # not counted in this one
    drawn = charts.line("t", ["1", "2"], [50.0, 80.0], "%", ("zero-shot", 68.8))
    (y,) = re.findall(r'class="level" x1="84" x2="628" y1="([\d.]+)"', drawn)
    heights = [float(cy) for cy in re.findall(r'cy="([\d.]+)"', drawn)]
    assert heights[1] < float(y) < heights[0]
    assert "zero-shot 68.8%</text>" in drawn


def test_bytes_of_an_attempt_that_a_kill_cut_off_are_with_the_next(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, n=5)
    with closing(sqlite3.connect(folder / "run.sqlite")) as db:
        db.execute("UPDATE rounds SET round = 4 WHERE round = 3")
        for number, size in ((0, 1), (1, 10), (3, 1000), (9, 100)):
            db.execute(
                "INSERT INTO traffic VALUES (?, 'c001', 'up', 'Shares', 1, ?)", (number, size)
            )
        db.commit()
    assert gather(folder, [], [], None).traffic["up"]["Shares"] == [11, 0, 1100]


def test_many_bytes_are_megabytes(run: Path) -> None:
    report = gather(run, [], [], None)
    assert "kB up by message" in page(report)
    many = {way: {"Plan": [2e6, 3e6, 4e6]} for way in ("up", "down")}
    text = page(dataclasses.replace(report, traffic=many))
    assert "MB up by message" in text
    assert ", Plan: 4 MB</title>" in text


def test_why_a_client_was_missing_is_said(tmp_path: Path) -> None:
    """By its own words, or the server's; the rest of the trouble has its time."""
    folder = run_folder(tmp_path, n=5)
    with closing(sqlite3.connect(folder / "run.sqlite")) as db:
        (at,) = db.execute("SELECT at FROM rounds WHERE round = 2").fetchone()
        gone = json.dumps({"c004": "training", "c005": "sharing", "c001": "training"})
        db.execute("UPDATE rounds SET dropped = ? WHERE round = 2", (gone,))
        db.execute("UPDATE rounds SET at = at - 100 WHERE round = 1")
        db.execute("UPDATE rounds SET at = at + 100 WHERE round > 2")
        for when, kind, text in (
            (at - 200, "lost", "c005, silent for 99 s"), (at - 1, "lost", "c004, silent for 16 s"),
            (at - 1, "left", "c005: stopped, and did not say why: its own log does"),
            (at + 50, "left", "c001: KeyInUseError: two processes"),
        ):  # fmt: skip
            db.execute("INSERT INTO events VALUES (?,?,?)", (when, kind, text))
        db.commit()
    rows = gather(folder, [], [], None).dropouts
    assert ("2", "c004", "dropped while training (lost: silent for 16 s)") in rows
    why = "left: stopped, and did not say why: its own log does"
    assert ("2", "c005", f"dropped while sharing ({why})") in rows
    assert ("2", "c001", "dropped while training (no word of it)") in rows
    others = [text for _, who, text in rows if not who]
    assert others == ["lost: c005, silent for 99 s", "left: c001: KeyInUseError: two processes"]
