"""Run folders as a table, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import secure_fedprompt as sfp
from secure_fedprompt.__main__ import main
from secure_fedprompt.commands.runs import COLUMNS

SMALL: dict[str, Any] = {
    "clients": 4, "rounds": 2, "generated_classes": 4, "per_class": 6, "test_per_class": 3,
    "styles": "sketch", "n_ctx": 2, "epochs": 1, "batch_size": 8, "seed": 1, "threads": 1,
    "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended, and one that was killed after its first round and has lost its log."""
    folder = tmp_path_factory.mktemp("runs")

    def killed(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    sfp.simulate(**SMALL, run_dir=str(folder / "monday"))
    (folder / "deep" / "down").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        sfp.simulate(**SMALL, run_dir=str(folder / "deep/down/tuesday"), on_round=killed)
    shutil.rmtree(folder / "deep/down/tuesday/audit")
    return folder


def test_runs_are_listed_with_how_far_they_came(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.json"
    assert main(["runs", str(runs), "--audit", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["run_folders"]
    said = capsys.readouterr().out
    by_name = {Path(row["folder"]).name: row for row in rows}
    assert set(by_name) == {"monday", "tuesday"}
    monday, tuesday = by_name["monday"], by_name["tuesday"]
    assert (monday["state"], tuesday["state"]) == ("finished", "unfinished")
    assert (monday["rounds_done"], tuesday["rounds_done"]) == (2, 1)
    assert monday["learning_rounds"] == 2
    assert 0 <= monday["accuracy"] <= 1
    assert monday["bytes_up"] > 500
    assert "kept, as far as this log shows" in monday["verdict"]
    assert "audit" in tuesday["verdict"]  # it has no log
    (line,) = [line for line in said.splitlines() if "monday" in line]
    assert line.split()[-1] == "kept"
    (line,) = [line for line in said.splitlines() if "tuesday" in line]
    assert line.rstrip().endswith("unfinished  not audited")
    assert "promptfl" in line
    assert main(["runs", str(runs / "monday")]) == 0
    assert "audit" not in capsys.readouterr().out


def test_rounds_are_exported_as_they_are_in_the_folder(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.csv"
    assert main(["export", str(runs), "-o", str(out)]) == 0
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert tuple(rows[0]) == COLUMNS
    monday = [row for row in rows if row["folder"].endswith("monday")]
    assert [row["learning_round"] for row in monday] == ["1", "2", "3"]
    assert all(row["in_sum"] == row["cohort"] == "4" for row in monday)
    assert all(0 <= float(row["accuracy"]) <= 1 for row in monday)
    assert float(monday[0]["bytes_up"]) > float(monday[2]["bytes_up"]) > 100
    capsys.readouterr()
    assert main(["export", str(runs), "-o", "-"]) == 0
    assert list(csv.DictReader(io.StringIO(capsys.readouterr().out))) == rows
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main(["export", str(runs), "-o", str(tmp_path / "all.parquet")]) == 0
    table = parquet.read_table(tmp_path / "all.parquet").to_pylist()
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in table] == rows


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["runs", "nowhere"], "holds no run"),
        (["export", "nowhere", "-o", "x.csv"], "holds no run"),
        (["export", "{runs}", "-o", "x.xls"], ".csv or .parquet"),
        (["export", "{runs}", "-o", "no/where.csv"], "cannot be written"),
        (["runs", "{broken}"], "run.sqlite cannot be read"),
        (["watch", "{broken}"], "run.sqlite cannot be read"),
        (["report", "{broken}"], "run.sqlite cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], expected: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.sqlite").write_bytes(b"no database" * 100)
    words = [word.format(runs=runs, broken=tmp_path / "broken") for word in words]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert len(said.strip().splitlines()) == 1
