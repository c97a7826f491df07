"""The benchmark book: what it keeps, what it goes on with, what it calls worse, what pages show."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import ENV
from test_docs import ROOT

from secure_fedprompt.audit.log import Entry
from secure_fedprompt.bench import (
    book,
    compare,
    curves,
    machine,
    masking,
    pages,
    peers,
    rounds,
    runner,
    scripts,
)
from secure_fedprompt.bench.chapter import Case, Chapter, Column, Curve, Samples
from secure_fedprompt.commands import bench
from secure_fedprompt.protocol.errors import ConfigError

RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def squares(case: Case, repeat: int) -> Samples:
    if case["n"] == 13:
        raise ValueError("no thirteenth")
    return {"ms": [float(case["n"] ** 2 + k) for k in range(repeat)], "rate": [1.0 / case["n"]]}


MADE = Chapter(
    name="squares", title="Squares", about="n times n", keys={"n": "n", "kind": "kind"},
    columns=(Column("ms", "ms"), Column("rate", "rate", 2, less=False)),
    cases=lambda quick: [{"n": n, "kind": "a"} for n in ((2, 4) if quick else (2, 4, 8, 13))],
    measure=squares,
    curves=(Curve("by n", "n", "ms", {"kind": "a"}, lambda case, known: case["n"] * known["one"]),),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _chapter(monkeypatch: pytest.MonkeyPatch) -> None:
    real = book.chapter
    monkeypatch.setattr(book, "chapter", lambda name: MADE if name == "squares" else real(name))


def measured(out: Path, **more: Any) -> tuple[list[str], list[str]]:
    """Run the chapter; what was said, and what failed."""
    said = list[str]()
    options: dict[str, Any] = {"quick": False, "repeat": 1, "peers": None, "again": False} | more
    failed = runner.Runner(out, say=said.append, **options).run(["squares"])
    return said, failed


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "squares.json").read_text())["rows"]
    return rows


def test_a_case_that_fails_is_named_and_the_others_are_on_record(tmp_path: Path) -> None:
    said, failed = measured(tmp_path)
    assert failed == ["squares, n 13, kind a: no thirteenth"]
    assert [row["case"]["n"] for row in rows_of(tmp_path)] == [2, 4, 8]
    row = rows_of(tmp_path)[0]
    assert row["figures"]["ms"] == {"min": 4.0, "median": 4.0, "max": 4.0, "count": 1}
    assert row["machine"] in json.loads((tmp_path / "squares.json").read_text())["machines"]
    assert any("FAILED: squares, n 13" in line for line in said)


def test_started_again_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(tmp_path, quick=True)
    before = rows_of(tmp_path)
    said, _ = measured(tmp_path)
    assert "2 of 4 cases are on record" in said[0]
    assert rows_of(tmp_path)[:2] == before
    assert "[1/2] squares: n 8" in said[1]
    measured(tmp_path, quick=True, repeat=2)  # more repetitions than are there
    assert rows_of(tmp_path)[0]["figures"]["ms"]["count"] == 2
    said, _ = measured(tmp_path, quick=True, again=True)
    assert said[0].startswith("[1/2]")
    monkeypatch.setattr(machine, "code_of", lambda *folders: "other code")
    said, _ = measured(tmp_path, quick=True)
    assert said[0].startswith("[1/2]")
    monkeypatch.setattr(machine, "describe", lambda: {"processor": "another"})
    said, _ = measured(tmp_path, quick=True)
    assert said[0].startswith("[1/2]")
    content = json.loads((tmp_path / "squares.json").read_text())
    assert {"processor": "another"} in content["machines"].values()
    assert len(content["machines"]) == 2  # that of n = 8 is still there
    assert "about 0 min left" in said[0]


def test_the_code_has_another_name_when_any_of_it_changes(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "aside").mkdir()
    (tmp_path / "package" / "linked").symlink_to("../aside")
    (tmp_path / "package" / "a.py").write_text("a")
    seen = {machine.code_of(tmp_path / "package")}
    for path, text in (("package/a.py", "b"), ("aside/b.py", "c"), ("aside/b.py", "d")):
        (tmp_path / path).write_text(text)
        seen.add(machine.code_of(tmp_path / "package"))
    assert len(seen) == 4
    (tmp_path / "package" / "notes.txt").write_text("no code")
    assert machine.code_of(tmp_path / "package") in seen


def test_another_file_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "squares.json").write_text('{"rows": []}')
    with pytest.raises(ConfigError, match=r"squares.json is not of the form .* another --out"):
        measured(tmp_path)
    (tmp_path / "squares.json").write_text("{")
    with pytest.raises(ConfigError, match=r"squares.json cannot be read"):
        measured(tmp_path)


def content_of(low: float, middle: float, high: float, rate: float = 1.0) -> dict[str, Any]:
    figures = {"ms": {"min": low, "median": middle, "max": high},
               "rate": {"min": rate, "median": rate, "max": rate}}  # fmt: skip
    return {"machines": {"m": {}}, "rows": [
        {"case": {"n": 2, "kind": "a"}, "by": "ours", "figures": figures, "machine": "m"}
    ]}  # fmt: skip


def test_what_got_worse_by_more_than_the_spread_is_named() -> None:
    was = content_of(9, 10, 11)
    assert compare.compare(MADE, was, content_of(10, 12, 14)) == ([], [])
    worse, better = compare.compare(MADE, was, content_of(11.5, 12, 14))
    assert worse == ["squares, n 2, kind a (ours): ms 10.0 (9.00 to 11.0) -> 12.0 (11.5 to 14.0), "
                     "1.20 times"]  # fmt: skip
    assert better == []
    assert compare.compare(MADE, was, content_of(5, 6, 8.5))[1] == [
        "squares, n 2, kind a (ours): ms 10.0 (9.00 to 11.0) -> 6.00 (5.00 to 8.50), 0.60 times"
    ]
    worse, _ = compare.compare(MADE, was, content_of(9, 10, 11, rate=0.9))  # more would be better
    assert worse == ["squares, n 2, kind a (ours): rate 1.0 -> 0.90, 0.90 times"]
    other = content_of(20, 20, 20)
    other["rows"][0]["case"]["n"] = 3
    assert compare.compare(MADE, was, other) == ([], [])
    assert compare.machines(was, was)
    other["rows"][0]["machine"] = "another"
    assert not compare.machines(was, other)


@given(st.floats(0.5, 2.5), st.floats(1e-3, 1e3))
def test_an_exponent_is_found(power: float, factor: float) -> None:
    rows = [
        {"case": {"n": n, "kind": "a"}, "by": "ours",
         "figures": {"ms": dict.fromkeys(("min", "median", "max"), factor * n**power)}}
        for n in (8, 2, 32)
    ]  # fmt: skip
    found = curves.fit(MADE.curves[0], rows, {"one": 2.0})
    assert found is not None
    assert found["exponent"] == pytest.approx(power, abs=1e-3)
    assert found["factor"] == pytest.approx(factor, rel=1e-6)
    assert found["error"] == 0
    assert found["at"] == [2, 8, 32]
    assert found["limit"] == [4, 16, 64]
    others = [{**row, "by": "a peer"} for row in rows]
    assert curves.fit(MADE.curves[0], [*rows[:2], *others], {}) is None


def test_curves_are_drawn_the_same_every_time(tmp_path: Path) -> None:
    measured(tmp_path)
    content = {"rows": rows_of(tmp_path)}
    assert not curves.draw(MADE, content, tmp_path / "a.svg")
    content["fits"] = [curves.fit(MADE.curves[0], content["rows"], {"one": 1.0})]
    for name in ("a.svg", "b.svg"):
        assert curves.draw(MADE, content, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(("value", "count", "text"), [
    (0.0, 3, "0"), (1234.5, 3, "1,234"), (99.96, 3, "100.0"), (12.345, 3, "12.3"),
    (0.012345, 2, "0.012"), (100.0, 3, "100"), (1e-9, 2, "1e-09"), (2.0, 3, "2.00"),
])  # fmt: skip
def test_numbers_are_shown_with_their_digits(value: float, count: int, text: str) -> None:
    assert runner.digits(value, count) == text


def test_a_table_has_what_its_mark_asks_for(tmp_path: Path) -> None:
    measured(tmp_path, repeat=2)
    page = "before\n<!-- bench squares; rows: n=2|8; columns: ms -->\nold\n<!-- end of bench -->\n"
    new = pages.written(page, tmp_path)
    assert new == (
        "before\n<!-- bench squares; rows: n=2|8; columns: ms -->\n\n"
        "| n | ms |\n|---|---|\n| 2 | 4.50 (4.00 to 5.00) |\n| 8 | 64.5 (64.0 to 65.0) |\n\n"
        "<!-- end of bench -->\n"
    )
    assert pages.written(new, tmp_path) == new
    with pytest.raises(ConfigError, match="1 tables and 0 ends"):
        pages.written(page.replace("end of", "END"), tmp_path)


def test_a_linked_number_is_held_against_its_row(tmp_path: Path) -> None:
    measured(tmp_path, repeat=2)
    page = tmp_path / "page.md"
    right = "[4.5 ms](squares.json#n=2&kind=a:ms), [65](squares.json#n=8:ms.max), " \
            "[50%](squares.json#n=2:rate*100), [about 0.0045 s](squares.json#n=2:ms/1000)"  # fmt: skip
    page.write_text(right)
    assert pages.wrong(page) == []
    for said, found in (
        ("[4.6 ms](squares.json#n=2:ms)", "the row has 4.5"),
        ("[4.50 ms](squares.json#n=4:ms)", "the row has 16.5"),
        ("[51%](squares.json#n=2:rate*100)", "the row has 50"),
        ("[4.5](squares.json#kind=a:ms)", "3 rows match"),
        ("[4.5](squares.json#n=3:ms)", "0 rows match"),
        ("[4.5](squares.json#n=2:seconds.x)", "not subscriptable"),
        ("[4.5](squares.json#n=2:other)", "other"),
        ("[4.5](gone.json#n=2:ms)", "No such file"),
        ("[none](squares.json#n=2:ms)", "the row has 4.5"),
    ):
        page.write_text(f"{right} {said}")
        (line,) = pages.wrong(page)
        assert found in line, line


def test_parts_of_a_round_add_up() -> None:
    """Two clients; times in tenths, so that each part can be read off."""

    def entry(at: float, way: str, digest: str, peer: str = "") -> Entry:
        kind = "RoundEnd" if digest.startswith("end") else "Some"
        return Entry(0, at, way, peer, kind, "", 7, 10, digest, None)

    bob = [entry(0.0, "out", "plan"), entry(5.0, "in", "up"), entry(9.5, "out", "end")]
    eve = [entry(0.0, "out", "plan2"), entry(9.0, "in", "up2"), entry(9.5, "out", "end2")]
    own = [entry(0.5, "in", "plan"), entry(4.8, "out", "up"), entry(9.9, "in", "end"),
           entry(20.0, "in", "next")]  # fmt: skip
    found = rounds.split(own, bob, {"bob": bob, "eve": eve}, 7, 4.0)
    assert found == pytest.approx({
        "seconds": 9.9, "learning_s": 4.0, "waiting_s": 4.0,
        "protecting_s": 0.3 + 0.5,  # the client's own work, and the server's after eve's frame
        "wire_s": 0.5 + 0.2 + 0.4,
    })  # fmt: skip


def test_names_that_do_not_exist_are_told_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="--only maskin: no such chapter; there are primitives, "):
        runner.names_of("selection,maskin")
    assert runner.names_of("selection, masking") == ["masking", "selection"]
    assert runner.names_of("") == list(book.MODULES)
    with pytest.raises(ConfigError, match="--scripts label: no such script; there are all, "):
        scripts.chosen("label")
    assert scripts.chosen("all") == list(scripts.table().values())


def test_chapters_are_well_formed() -> None:
    for name in book.MODULES:
        made = book.chapter(name)
        assert made.name == name
        full = made.cases(False)
        assert all(case in full for case in made.cases(True)), name
        assert all(list(case) == list(made.keys) for case in full)
        keys = {column.key for column in made.columns}
        assert all(curve.y in keys and curve.x in made.keys for curve in made.curves)
        assert set(made.peers) <= set(peers.PEERS)
        for peer in made.peers:
            assert (ROOT / "benchmarks/peers" / peers.PEERS[peer].script).exists()


def test_a_package_without_its_repository_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(book, "CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for flags, words in (
        (["--compare"], "--compare: give a folder; only the repository has figures"),
        (["--scripts", "soak"], "--scripts: they are in the repository"),
        (["--write"], "--write: the pages are in the repository"),
        (["--compare", "gone"], "--compare gone: no such folder"),
        (["--repeat", "-1"], "--repeat -1: at least 1"),
    ):
        assert bench.main(["--only", "none", *flags]) == 2
        assert words in capsys.readouterr().err


def test_the_page_says_what_each_chapter_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert bench.main(["--quick", "--only", "primitives", "--out", str(out), "--repeat", "1"]) == 0
    page = (out / "book.md").read_text()
    assert "## What this machine's arithmetic costs" in page
    assert "| threads |" not in page  # one case: nothing to tell apart
    assert str(machine.describe()["processor"]) in page
    assert bench.main(["--only", "none", "--out", str(out)]) == 0
    assert (out / "book.md").read_text() == page  # of what is on record, measured now or not
    assert bench.main(["--only", "none", "--out", str(out), "--write"]) == 2
    assert "where links lead" in capsys.readouterr().err
    again = ["--quick", "--only", "primitives", "--out", str(out), "--repeat", "1"]
    result = out / "result.json"
    assert bench.main([*again, "--compare", str(out), "--json", str(result)]) == 0
    assert "primitives: the same, within the spread" in capsys.readouterr().out
    assert json.loads(result.read_text())["worse"] == []
    content = json.loads((out / "primitives.json").read_text())
    for figure in content["rows"][0]["figures"].values():
        figure.update(dict.fromkeys(("min", "median", "max"), figure["min"] / 1e6))
    older = tmp_path / "older"
    older.mkdir()
    (older / "primitives.json").write_text(json.dumps(content))
    assert bench.main([*again, "--compare", str(older)]) == bench.WORSE
    assert "WORSE: primitives, threads 1 (ours): X25519, us" in capsys.readouterr().out


def test_what_others_do_is_seen() -> None:
    """On a machine of several cores: a process that burns one of them is somebody else's work until
    it has ended and is ours."""
    seen = machine.Others()
    code = "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]):
        deadline = time.monotonic() + 1.2
        while time.monotonic() < deadline:
            pass
        share = seen.share()
    assert share is None or share > 0.3


def test_limits_are_below_what_was_measured() -> None:
    """A limit is arithmetic that cannot be left out: no figure on record is below it."""
    for path in RESULTS.glob("*.json"):
        for found in json.loads(path.read_text()).get("fits", []):
            made = book.chapter(path.stem)
            (curve,) = (c for c in made.curves if c.name == found["curve"])
            rows = curves.members(curve, book.read(path)["rows"])
            for row, limit in zip(rows, found["limit"], strict=bool(found["limit"])):
                assert row["figures"][curve.y]["median"] > 0.9 * limit, (path.name, curve.name)


def test_the_masking_limit_counts_what_it_says() -> None:
    known = {"x25519_us": 30.0, "ed25519_verify_us": 50.0, "aes_bytes_per_us": 1000.0,
             "add_bytes_per_us": 10_000.0}  # fmt: skip
    case = {"clients": 10, "values": 1000}
    assert masking.client_limit(case, known) == pytest.approx((10 * 110 + 10 * 4) / 1e3)
    assert masking.server_limit(case, known) == pytest.approx(10 * (50 + 4 + 0.4) / 1e3)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_the_figures_on_record(page: Path) -> None:
    assert pages.wrong(page) == []
    text = page.read_text()
    assert pages.written(text, RESULTS) == text, "secure-fedprompt bench --only none --write"


@pytest.mark.slow
def test_the_quick_book_as_a_user_runs_it(tmp_path: Path) -> None:
    """Killed in the middle, started again: all chapters in under five minutes."""
    words = [sys.executable, "-m", "secure_fedprompt", "bench", "--quick"]
    env, begin = {**ENV, "PYTHONUNBUFFERED": "1"}, time.monotonic()
    with subprocess.Popen(words, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("[4/"):
                os.kill(first.pid, signal.SIGKILL)
                break
    done = subprocess.run(words, cwd=tmp_path, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "3 of " in done.stdout.splitlines()[1]
    assert time.monotonic() - begin < 300
    out = tmp_path / bench.OUT
    for name in book.MODULES:
        made = book.chapter(name)
        if not made.cases(True):
            continue
        rows = book.read(out / f"{name}.json")["rows"]
        measured = [row["case"] for row in rows if row["by"] == "ours"]
        assert sorted(measured, key=str) == sorted(made.cases(True), key=str)
        keys = {column.key for column in made.columns}
        for row in rows:
            assert set(row["figures"]) <= keys, name
            assert all(np.isfinite(f["median"]) for f in row["figures"].values())
    shares = {row["case"]["protection"]: row["figures"] for row in
              book.read(out / "rounds.json")["rows"]}  # fmt: skip
    for figures in shares.values():
        parts = sum(figures[f"{part}_s"]["median"] for part in rounds.PARTS)
        assert parts == pytest.approx(figures["seconds"]["median"], rel=0.2)
