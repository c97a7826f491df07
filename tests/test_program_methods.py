"""Protections and methods as processes: the same prompts, whichever protects them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from programs import LONG, python
from safetensors.numpy import load_file

from secure_fedprompt.commands import demo, demo_files


@pytest.mark.slow
def test_masked_equals_unprotected_training(finished: Path, tmp_path: Path) -> None:
    done = python("secure_fedprompt", "demo", "--run-dir", "d", "--rounds", "2",
                  "--protection", "none", "--json", "r.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NO PROTECTION" in done.stdout
    assert "saw every client's update" in done.stdout
    masked = load_file(finished / "d/server/run/prompts/global-0002.safetensors")["ctx"]
    plain = load_file(tmp_path / "d/server/run/prompts/global-0002.safetensors")["ctx"]
    assert 0 < np.abs(masked - plain).max() < 1e-4
    a = json.loads((finished / "result.json").read_text())["accuracy_after"]
    b = json.loads((tmp_path / "r.json").read_text())["accuracy_after"]
    assert abs(a - b) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("protection", ["bfv", "ckks"])
def test_encrypted_equals_masked_training_and_only_clients_read_it(
    finished: Path, tmp_path: Path, protection: str
) -> None:
    done = python("secure_fedprompt", "demo", "--run-dir", "d", "--rounds", "2",
                  "--protection", protection, "--json", "r.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All clients share one key" in " ".join(done.stdout.split())
    masked = load_file(finished / "d/server/run/prompts/global-0002.safetensors")["ctx"]
    (path,) = (tmp_path / "d/alice/state").glob("prompt-*.safetensors")
    encrypted = load_file(path)["ctx"]
    assert 0 < np.abs(masked - encrypted).max() < 1e-4
    a = json.loads((finished / "result.json").read_text())["accuracy_after"]
    b = json.loads((tmp_path / "r.json").read_text())["accuracy_after"]
    assert abs(a - b) < 0.01
    # The server's folder holds no prompt that it could read.
    assert encrypted.tobytes() not in b"".join(
        p.read_bytes() for p in (tmp_path / "d/server").rglob("*") if p.is_file()
    )
    shown = python("secure_fedprompt", "evaluate", "d/server/run", cwd=tmp_path)
    assert shown.returncode == 2
    assert "sealed" in shown.stderr
    assert "a client's prompt file" in shown.stderr


@pytest.mark.slow
def test_a_helper_process_selects_over_sockets(tmp_path: Path) -> None:
    selection = {
        "selection": "secure",
        "selection_scope": "federation",
        "helper": demo_files.HELPER,
    }
    few = {"generated_classes": 6, "per_class": 4, "test_per_class": 1, "shots": 4, "threads": 1,
           "partition": "iid", "styles": "sketch"}  # fmt: skip
    commands = demo_files.write_files(
        tmp_path / "f", "fedmgp", 3, 2, "masks", 0, for_server=selection, for_clients=few
    )
    with demo.processes(commands, tmp_path / "f", 3) as started:
        shown, _ = started[0].communicate(timeout=LONG)
        assert [process.wait(LONG) for process in started] == [0] * 5, shown
    assert "this server and the helper (notary) must not collude" in shown
    result = json.loads((tmp_path / "f/notary/result.json").read_text())
    assert result["selections"] == 1  # the first round has no slots to compare with
    rounds = json.loads((tmp_path / "f/server/result.json").read_text())["rounds"]
    assert [r["outcome"] for r in rounds] == ["done"] * 3
    assert "evaluating" in rounds[1]["seconds"]
    assert "evaluating" not in rounds[0]["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protection", "words"),
    [("bfv", ["--selection-scope", "federation"]), ("ckks", ["--helper", "process"])],
)
def test_secure_selection_under_encryption(
    tmp_path: Path, protection: str, words: list[str]
) -> None:
    done = python("secure_fedprompt", "demo", "--run-dir", "d", "--rounds", "2", "--method",
                  "fedmgp", "--selection", "secure", "--protection", protection, *words,
                  "--json", "r.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["accuracy_after"] > result["accuracy_before"] + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedotp", "fedmgp"])
def test_the_other_methods_run_as_processes(tmp_path: Path, method: str) -> None:
    done = python("secure_fedprompt", "demo", "--run-dir", "d", "--rounds", "2", "--method", method,
                  "--json", "r.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["accuracy_after"] > result["accuracy_before"] + 0.05
    (kept,) = (tmp_path / "d/bob/state").glob("private-*.safetensors")
    own = load_file(kept)
    (path,) = (tmp_path / "d/bob/state").glob("prompt-*.safetensors")
    prompt = load_file(path)
    sent = load_file(tmp_path / "d/server/run/prompts/global-0002.safetensors")
    assert not set(own) & set(sent)
    for name, values in own.items():  # nothing private reached the server's folder
        data = values.tobytes()
        if values.size > 10:
            assert data not in b"".join(
                p.read_bytes() for p in (tmp_path / "d/server").rglob("*") if p.is_file()
            )
        assert f"private.{name}" in prompt or "choice" in name  # used up by the final slots
    for where in (path, tmp_path / "d/server/run"):
        shown = python("secure_fedprompt", "evaluate", str(where), "--styles", "poster,sketch",
                       "--json", "e.json", cwd=tmp_path)  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        assert json.loads((tmp_path / "e.json").read_text())["accuracy"] > 0.2
