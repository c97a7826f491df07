"""The demo, as a user runs it, and the commands that its results are for."""

from __future__ import annotations

import base64
import contextlib
import glob
import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from programs import ENV, LONG, python
from safetensors.numpy import load_file

import secure_fedprompt
from secure_fedprompt.__main__ import main
from secure_fedprompt.commands import demo_files
from secure_fedprompt.protocol.keys import Identity


def test_demo_learns_and_reports(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["method"] == "promptfl"
    assert result["protection"] == "masks"
    assert result["accuracy_after"] >= result["accuracy_before"] + 0.05
    assert result["seconds"] < 90
    assert 2_000 < result["bytes_up_per_client"] < 20_000
    assert result["bytes_down_per_client"] > 0
    rounds = result["rounds"]
    assert [(r["learning_round"], r["outcome"]) for r in rounds] == [
        (1, "done"),
        (2, "done"),
        (3, "done"),
    ]
    shown = (finished / "stdout").read_text()
    assert "the server saw 3 sums over at least 4 clients each, and could not see" in shown
    assert "python -m secure_fedprompt.client --config d/alice/client.toml" in shown


def test_every_client_counts_what_it_contributed_to(finished: Path) -> None:
    for name in ("alice", "bob", "carol", "dave"):
        result = json.loads((finished / "d" / name / "result.json").read_text())
        assert (result["format"], result["rounds_done"]) == ("secure-fedprompt/client/1", 3)


def test_the_line_that_the_demo_ends_with_works(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On its own pictures, whose names are what they show."""
    shown = (finished / "stdout").read_text()
    assert "this takes about 16 s on two cores, all in d" in shown
    words = shown.strip().splitlines()[-1].partition("secure-fedprompt ")[2].split()
    monkeypatch.chdir(finished)
    files = sorted(glob.glob(words[2]))
    assert len(files) == demo_files.SAMPLES
    assert main([words[0], words[1], *files, "--json", "predicted.json"]) == 0
    assert "prompt" in words[1]
    found = json.loads(Path("predicted.json").read_text())
    best = {row["image"]: next(iter(row["classes"])) for row in found["predictions"]}
    right = [best[file].replace(" ", "-") in file for file in files]
    assert sum(right) >= 2  # 32 classes


def test_a_sites_own_figures_are_in_its_own_log_only(finished: Path) -> None:
    told = {p.parent.name: p.read_text() for p in (finished / "d").glob("*/output.log")}
    for name in ("alice", "bob", "carol", "dave"):
        assert len(re.findall(r"info      of our \d+ test images the global", told[name])) == 3
        assert len(re.findall(r"training loss \d\.\d+ -> \d\.\d+", told[name])) == 2
    assert "test images" not in told["server"]


def test_demo_leaves_ordinary_files_and_no_secrets_on_screen(finished: Path) -> None:
    shown = (finished / "stdout").read_text()
    logs = "".join(p.read_text() for p in (finished / "d").glob("*/output.log"))
    for key in (finished / "d").glob("*/*.pem"):
        assert key.stat().st_mode & 0o077 == 0
        body = "".join(key.read_text().splitlines()[1:-1])[:40]
        assert body not in shown + logs
    assert (finished / "d" / "roster.toml").exists()
    assert len(list((finished / "d").glob("*/*.toml"))) == 10


def test_the_demo_passes_its_audit_held_against_every_client(finished: Path) -> None:
    (record,) = (finished / "d" / "alice" / "state").glob("private-record-*.jsonl")
    assert record.stat().st_mode & 0o077 == 0
    peers = [f"--peer=d/{name}/state" for name in ("alice", "bob", "carol", "dave")]
    done = python("secure_fedprompt", "audit", "d/server/run", *peers, "--secrets", str(record),
                  "--json", "audit.json", cwd=finished)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((finished / "audit.json").read_text())
    assert set(result["checks"].values()) == {"pass"}
    assert not [f for f in result["findings"] if f["level"] != "note"]
    with contextlib.closing(sqlite3.connect(finished / "d/server/run/run.sqlite")) as db:
        counted = dict(db.execute("SELECT type, SUM(frames) FROM traffic GROUP BY type"))
    logged = {row["type"]: 0 for row in result["traffic"]}
    for row in result["traffic"]:
        logged[row["type"]] += row["frames"]
    assert logged == counted
    values = [json.loads(line) for line in record.read_text().splitlines()][1]["values"]
    counters = {"seen", "correct", "loss", "zero_shot"}
    assert set(values) == {"ctx", "weighted ctx", "local prompt", *counters}


def test_no_key_is_in_an_audit_log(finished: Path) -> None:
    logs = b"".join(p.read_bytes() for p in (finished / "d").rglob("audit/*"))
    assert len(logs) > 100_000
    for path in (finished / "d").glob("*/*.pem"):
        key = Identity.from_pem(path.read_bytes(), str(path), 0o600)
        assert key.public().hex().encode() in logs  # the roster
        for secret in (key.signing.private_bytes_raw(), key.curve.private_bytes_raw()):
            for form in (secret, secret.hex().encode(), base64.b64encode(secret)[:40]):
                assert form not in logs


def test_every_frame_was_counted(finished: Path) -> None:
    with contextlib.closing(sqlite3.connect(finished / "d/server/run/run.sqlite")) as db:
        kinds = dict(db.execute("SELECT type, SUM(frames) FROM traffic GROUP BY type"))
    for kind, count in (("MaskedUpload", 12), ("Reveal", 12), ("Plan", 12), ("Hello", 4)):
        assert kinds[kind] == count
    assert "PlainUpload" not in kinds


def test_evaluate_and_predict_use_the_result(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(finished / "d/server/run"), finished / "eval.json"
    words = ["--styles", "poster,sketch", "--test-per-class", "4", "--json", str(out)]
    assert main(["evaluate", run, *words]) == 0
    result = json.loads(out.read_text())
    assert result["images"] == 256
    assert result["accuracy"] > 0.7
    assert 0 < result["macro_f1"] <= 1
    assert len(result["per_class"]) == 32

    from PIL import Image

    from secure_fedprompt.clients.data import generated

    image = finished / "heart.png"
    Image.fromarray(generated.render("plain blue heart", "poster", 3)).save(image)
    prompt = next((finished / "d/alice/state").glob("prompt-*.safetensors"))
    capsys.readouterr()
    assert main(["predict", str(prompt), str(image), "--json", str(out)]) == 0
    assert "blue heart" in capsys.readouterr().out.split(",")[0]
    assert main(["predict", run, str(image)]) == 2  # a server's file names no classes
    assert "names no classes" in capsys.readouterr().err
    assert main(["predict", str(prompt), str(finished / "result.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["evaluate", run, "--generated-classes", "24"]) == 2
    assert "another class list" in capsys.readouterr().err


def test_a_prompt_for_another_model_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.numpy import save_file

    folder = tmp_path / "clip"
    shutil.copytree(Path(secure_fedprompt.__file__).parent / "bundled_clip", folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["logit_scale"] = np.asarray(weights["logit_scale"] + np.float16(0.5))
    save_file(weights, folder / "open_clip_model.safetensors")
    words = ["evaluate", str(finished / "d/server/run"), "--model", f"local-dir:{folder}"]
    assert main(words) == 2
    assert "trained on a model with fingerprint" in capsys.readouterr().err


def test_a_finished_folder_is_not_overwritten(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = python("secure_fedprompt.server", "--config", "d/server/server.toml", cwd=finished)
    assert done.returncode == 2
    assert "holds a finished run: choose another run_dir" in done.stderr
    assert main(["demo", "--run-dir", str(finished / "d")]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_the_printed_commands_rerun_by_hand(finished: Path, tmp_path: Path) -> None:
    """The same files, other folders for what is written: the same run again, up to rounding."""
    lines = [
        line.split()[1:]
        for line in (finished / "stdout").read_text().splitlines()
        if line.startswith("  python -m secure_fedprompt.")
    ]
    assert len(lines) == 5
    started = []
    for i, words in enumerate(lines):
        extra = (
            ["--state-dir", str(tmp_path / str(i))] if i else ["--run-dir", str(tmp_path / "run")]
        )
        started.append(subprocess.Popen([sys.executable, *words, *extra], cwd=finished, env=ENV))
    assert [process.wait(LONG) for process in started] == [0] * 5
    again = load_file(tmp_path / "run/prompts/global-0002.safetensors")["ctx"]
    before = load_file(finished / "d/server/run/prompts/global-0002.safetensors")["ctx"]
    assert np.abs(again - before).max() < 1e-4
