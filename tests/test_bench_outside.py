"""What the benchmark book runs outside of itself: scripts of the repository, and other systems."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_bench import RESULTS
from test_docs import ROOT

from secure_fedprompt.bench import book, peers, scripts
from secure_fedprompt.protocol.errors import RunFailedError

SETTINGS = {"split": "", "comparators": "", "ablation": "", "scopes": "", "network_lr": "",
            "hub": "", "shown": ""}  # fmt: skip


def test_scripts_are_what_the_figures_on_record_come_from() -> None:
    """Each file on record is a chapter's or a script's, and its settings are the script's flags."""
    results = {script.result: script for script in scripts.table().values()}
    chapters = {f"{name}.json" for name in book.MODULES}
    found = {str(path.relative_to(RESULTS)) for path in RESULTS.rglob("*.json")}
    assert found - {scripts.NOTES} <= chapters | set(results)
    for name in found & set(results):
        content = json.loads((RESULTS / name).read_text())
        settings = content.get("settings") or content.get("protocol") or {}
        words = shlex.split(results[name].words)[1:]
        assert (ROOT / "benchmarks" / results[name].words.split()[0]).exists()
        given: dict[str, list[str]] = {}
        for word in words:
            if word.startswith("--"):
                given[word[2:].replace("-", "_")] = values = []
            else:
                values.append(word)
        for key, wanted in given.items():
            if not settings or key in SETTINGS:
                continue
            kept = settings[key] if isinstance(settings[key], list) else [settings[key]]
            same = [str(v) == w or float(v) == float(w) for v, w in zip(kept, wanted, strict=True)]
            assert all(same), (name, key, kept, wanted)
        if results[name].photos and settings:
            assert (settings["dataset"], settings["model"]) == results[name].photos, name


def test_a_script_is_run_once_for_the_same_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks" / "peers").mkdir(parents=True)
    table = '[good]\nwords = "one.py --n \'2 3\'"\nhours = 1\n[bad]\nwords = "two.py"\nhours = 1\n'
    table += '[pictures]\nwords = "one.py"\nhours = 1\nphotos = ["a.zip", "clip"]\n'
    (tmp_path / "benchmarks" / "scripts.toml").write_text(table)
    one = tmp_path / "benchmarks" / "one.py"
    one.write_text(
        "import sys, json\njson.dump(sys.argv[1:], open(sys.argv[sys.argv.index('--json') + 1], 'w'))"
    )
    (tmp_path / "benchmarks" / "two.py").write_text("raise SystemExit('no idea')")
    monkeypatch.setattr(book, "CHECKOUT", tmp_path)
    out, said = tmp_path / "out", list[str]()

    def run(photos: Path | None = None, again: bool = False) -> list[str]:
        said.clear()
        return scripts.Running(out, photos, again, said.append).run(scripts.chosen("all"))

    assert run() == ["bad: no idea", "pictures: --photos wants a folder with a.zip and clip"]
    assert json.loads((out / "good.json").read_text())[:2] == ["--n", "2 3"]
    assert not (out / "good.json.log").exists()
    assert (out / "bad.json.log").read_text() == "no idea\n"
    (tmp_path / "a.zip").touch()
    assert run(tmp_path) == ["bad: no idea", "pictures: --photos wants a folder with clip"]
    assert said[0] == "good: ran with this code: kept"
    (tmp_path / "clip").mkdir()
    assert run(tmp_path) == ["bad: no idea"]
    words = json.loads((out / "pictures.json").read_text())
    assert words[2:] == ["--dataset", f"{tmp_path}/a.zip", "--model", f"local-dir:{tmp_path}/clip"]
    assert not run(again=True)[0].startswith("good")
    assert said[0].startswith("good: about 60 min")
    one.write_text(one.read_text() + "\n# changed")
    run()
    assert said[0].startswith("good: about 60 min")


@pytest.mark.slow
def test_a_peer_is_run_as_its_script_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "benchmarks" / "peers"
    folder.mkdir(parents=True)
    monkeypatch.setattr(book, "CHECKOUT", tmp_path)
    script = folder / "flower_secagg.py"
    script.write_text(
        "import json, os, sys\ncase = json.loads(sys.argv[1])\nprint('chatter')\n"
        "assert os.environ['FLWR_TELEMETRY_ENABLED'] == '0'\n"
        "print(json.dumps({'wall_s': [case['shares'], case['threshold'], float(sys.argv[2])]}))\n"
    )
    case = {"clients": 100, "corruption": 0.1}
    python = Path(sys.executable)
    assert peers.measure("flower", python, case, 3) == {"wall_s": [43, 23, 3.0]}
    script.write_text("raise SystemExit('cannot do that')")
    with pytest.raises(RunFailedError, match=r"Flower SecAgg\+: cannot do that"):
        peers.measure("flower", python, case, 3)
    script.write_text("print('done')")
    with pytest.raises(RunFailedError, match=r"Flower SecAgg\+: it said nothing"):
        peers.measure("flower", python, case, 3)
    monkeypatch.setattr(peers, "PEERS", {
        "flower": replace(peers.PEERS["flower"], requires=("no such package",))
    })  # fmt: skip
    with pytest.raises(RunFailedError, match="no such package"):
        peers.python_of("flower", tmp_path / "venvs", lambda text: None)
    assert not (tmp_path / "venvs" / "flower" / "complete").exists()
