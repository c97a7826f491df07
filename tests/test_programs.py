"""The real programs: processes, sockets, files, exit codes. One demo serves several tests."""

from __future__ import annotations

import base64
import contextlib
import glob
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import secure_fedprompt
from secure_fedprompt.__main__ import main
from secure_fedprompt.commands import demo, demo_files
from secure_fedprompt.commands import keys as cli
from secure_fedprompt.protocol.keys import Identity
from secure_fedprompt.protocol.roster import Roster

LONG = 150.0
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True, text=True, timeout=LONG, env=ENV, check=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished demo of four clients and two rounds."""
    folder = tmp_path_factory.mktemp("demo")
    done = python("secure_fedprompt", "demo", "--run-dir", "d", "--rounds", "2",
                  "--audit", "full", "--json", "result.json", cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


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


class Federation:
    """A server and clients started as the demo prints them, one by one."""

    def __init__(
        self,
        folder: Path,
        clients: int = 4,
        rounds: int = 2,
        protection: str = "masks",
        **server: Any,
    ) -> None:
        self.folder = folder / "f"
        self.commands = demo_files.write_files(
            self.folder, "promptfl", clients, rounds, protection, 0
        )
        config = self.folder / "server" / "server.toml"
        values = {**server}
        lines = [
            line for line in config.read_text().splitlines() if line.split(" ")[0] not in values
        ]
        config.write_text(
            "\n".join(lines + [f"{k} = {json.dumps(v)}" for k, v in values.items()]) + "\n"
        )
        self.started: dict[str, subprocess.Popen[str]] = {}

    def name(self, i: int) -> str:
        return Path(self.commands[i][4]).parent.name

    def start(self, i: int, *extra: str) -> subprocess.Popen[str]:
        name = self.name(i)
        log = (self.folder / name / "output.log").open("a")
        with log:
            self.started[name] = subprocess.Popen(
                [*self.commands[i], *extra],
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=ENV,
            )
        return self.started[name]

    def log(self, name: str) -> str:
        return (self.folder / name / "output.log").read_text()

    def wait_for(self, name: str, words: str) -> None:
        deadline = time.monotonic() + LONG
        while words not in self.log(name):
            assert time.monotonic() < deadline, self.log(name)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.started[name].wait(0.05)
                assert words in self.log(name), self.log(name)

    def rounds(self) -> list[dict[str, Any]]:
        result = json.loads((self.folder / "server" / "result.json").read_text())
        rows: list[dict[str, Any]] = result["rounds"]
        return rows

    def stop(self) -> None:
        for process in self.started.values():
            process.kill()
            process.wait()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Any]:
    made: list[Federation] = []

    def make(**options: Any) -> Federation:
        made.append(Federation(tmp_path, **options))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.mark.slow
def test_a_site_joins_between_two_rounds_and_another_leaves(
    federation: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """And every log of it, on its own and against the others, passes its audit."""
    f = federation(clients=5, rounds=3)
    path = f.folder / "roster.toml"
    whole = Roster.from_toml(path.read_text(), "")

    def phase(names: str, *flags: str) -> set[int]:
        members = [x for x in whole.members if x.role == "server" or x.name[0] in names]
        path.write_text(Roster.of(tuple(members)).to_toml())
        f.start(0, "--clients", str(len(names)), *flags)
        running = [f.start(i) for i in range(1, 6) if f.name(i)[0] in names]
        assert f.started["server"].wait(LONG) == 0, f.log("server")
        return {client.wait(LONG) for client in running}

    assert phase("abcd", "--stop-after", "1") == {8}
    assert phase("abcde", "--stop-after", "2") == {8}
    assert phase("abce") == {0}
    assert "the server stopped after learning round 2, as it was asked to" in f.log("dave")
    assert [len(r["cohort"]) for r in f.rounds()] == [4, 5, 4, 4]
    states = [str(f.folder / name / "state") for name in ("alice", "bob", "carol", "dave", "erin")]
    peers = [f"--peer={state}" for state in states]
    assert main(["audit", str(f.folder / "server" / "run"), *peers]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 clients and c = 1 became 5 and c = 2" in said
    assert "5 clients and c = 2 became 4 and c = 1" in said
    assert "in agreement with alice, bob, carol, dave, erin" in said
    assert [main(["audit", state]) for state in states] == [0] * 5


@pytest.mark.slow
@pytest.mark.parametrize("protection", ["masks", "bfv"])
def test_a_killed_server_and_a_killed_client_resume_the_run(
    federation: Any, protection: str
) -> None:
    f = federation(rounds=3, alive_seconds=6.0, gather_seconds=60.0, protection=protection)
    for i in range(5):
        f.start(i)
    f.wait_for("server", "round 1/3")
    f.started["server"].send_signal(signal.SIGKILL)
    f.started["server"].wait()
    f.started["bob"].send_signal(signal.SIGKILL)
    f.started["bob"].wait()
    f.start(0)
    f.start(2)
    assert f.started["server"].wait(LONG) == 0, f.log("server")
    assert "resuming" in f.log("server")
    for name in ("alice", "bob", "carol", "dave"):
        assert f.started[name].wait(LONG) == 0, f.log(name)
    rounds = f.rounds()
    done = [r["learning_round"] for r in rounds if r["outcome"] == "done"]
    assert done == [1, 2, 3, 4]
    numbers = [r["round"] for r in rounds]
    assert numbers == sorted(set(numbers))  # no round number was used twice
    assert len(rounds[-1]["cohort"]) == 4


@pytest.mark.slow
def test_a_client_killed_in_the_middle_is_dropped_and_the_run_ends(federation: Any) -> None:
    f = federation(rounds=3, alive_seconds=4.0)
    for i in range(5):
        f.start(i)
    f.wait_for("server", "round 1/3")
    f.started["dave"].send_signal(signal.SIGKILL)
    assert f.started["server"].wait(LONG) == 0, f.log("server")
    rounds = f.rounds()
    assert [r["learning_round"] for r in rounds if r["outcome"] == "done"] == [1, 2, 3, 4]
    assert rounds[-1]["cohort"] == ["alice", "bob", "carol"]


@pytest.mark.slow
def test_a_spent_budget_is_told_to_its_owner_and_to_nobody_else(federation: Any) -> None:
    f = federation(rounds=3, alive_seconds=6.0)
    config = f.folder / "alice" / "client.toml"
    dp = '\n[dp]\nkind = "sample"\ntarget_epsilon = 0.5\ndelta = 1e-3\nretries = 0\n'
    config.write_text(config.read_text() + dp)
    spent = {"run": "00", "round": 1, "sigma": 4.0, "rate": 0.25, "steps": 4000}
    (f.folder / "alice" / "state").mkdir(exist_ok=True)
    ledger = f.folder / "alice" / "state" / "privacy.jsonl"
    ledger.write_text(json.dumps(spent) + "\n")
    for i in range(5):
        f.start(i)
    assert f.started["server"].wait(LONG) == 0, f.log("server")
    assert f.started["alice"].wait(LONG) == 11, f.log("alice")
    assert f.log("alice").strip().splitlines()[-1].startswith("BudgetError: target_epsilon = 0.5")
    assert "a zero update is sent in its place" in " ".join(f.log("alice").split())
    assert list((f.folder / "alice" / "state").glob("prompt-*.safetensors"))  # nothing is lost
    assert [r["metrics"]["contributors"] for r in f.rounds()] == [4, 4, 4, 4]
    told = f.log("server") + "".join(f.log(name) for name in ("bob", "carol", "dave"))
    for word in ("Budget", "epsilon", "failed"):
        assert word not in told


def test_mistakes_are_one_line_and_an_exit_code(
    federation: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each wrong client is told what is wrong; the server goes on waiting for right ones."""
    f = federation(gather_seconds=LONG)
    f.start(0)
    f.wait_for("server", "waiting for 4 clients")
    alice = f.commands[1][2:]
    roster = Roster.from_toml((f.folder / "roster.toml").read_text(), "r")
    stranger = cli.make_key("mallory", "client", tmp_path)
    with_stranger = tmp_path / "other.toml"
    with_stranger.write_text(roster.add(stranger).to_toml())
    impostor = cli.make_key("server", "server", tmp_path)
    wrong_server = tmp_path / "wrong.toml"
    others = tuple(m for m in roster.members if m.role == "client")
    wrong_server.write_text(Roster.of((*others, impostor)).to_toml())
    one_class = tmp_path / "one" / "cat"
    one_class.mkdir(parents=True)
    (one_class / "x.png").write_bytes(b"not an image")
    open_key = tmp_path / "open.pem"
    open_key.write_bytes((f.folder / "alice/alice.pem").read_bytes())
    open_key.chmod(0o644)
    cases: list[tuple[list[str], int, str]] = [
        (["--key", "nowhere.pem"], 2, "no such file; make one with"),
        (["--key", str(open_key)], 2, "chmod 600"),
        (["--key", str(tmp_path / "mallory.pem")], 2, "is not on the roster: add its entry"),
        (["--key", str(tmp_path / "mallory.pem"), "--roster", str(with_stranger)], 4, "refuses our key"),
        (["--roster", str(wrong_server)], 5, "probably not this server's"),
        (["--server", "tcp://127.0.0.1:9", "--patience", "1"], 3, "unreachable"),
        (["--dataset", str(tmp_path / "one")], 2, "has one class, 'cat'"),
        (["--dataset", str(tmp_path / "nothing")], 2, "no such file or folder"),
        (["--model", "local-dir:nowhere"], 2, "lacks open_clip_config.json"),
        (["--generated-classes", "24"], 7, "name the same classes in the same order"),
    ]  # fmt: skip
    # The first hello fixes model and classes: bob's comes first.
    f.start(2)
    f.wait_for("server", "joined bob")

    def attempt(number: int) -> subprocess.CompletedProcess[str]:
        return python(*alice, *cases[number][0], "--state-dir", str(tmp_path / f"state{number}"))

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(attempt, range(len(cases))))
    for (extra, code, words), done in zip(cases, results, strict=True):
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.stdout
        assert done.returncode == code, (extra, done.stdout, done.stderr)
        assert words in last, (extra, last)
        assert "Traceback" not in done.stderr
    assert f.started["server"].poll() is None
    busy = python(*f.commands[0][2:], "--run-dir", str(tmp_path / "second"))
    assert busy.returncode == 6
    assert "the port is in use" in busy.stderr
    check = python("secure_fedprompt", "check", *alice[1:])
    assert check.returncode == 0, check.stdout + check.stderr
    assert "answers and admits us" in check.stdout
    told = " ".join(check.stdout.split())
    assert "promptfl under masks, 4 clients, quorum 3: roster, model, classes and policy" in told
    assert "images opened, 32 classes" in told
    dp = ["--dp-kind", "sample", "--dp-target-epsilon", "1", "--dp-delta"]
    for extra, code, words in (
        (["--generated-classes", "24"], 7, "the server would refuse us: class list of alice"),
        (["--policy-protections", "bfv"], 10, "allows only bfv"),
        (["--method", "fedmgp"], 7, "method of alice is 'fedmgp', the run's is 'promptfl'"),
        (["--policy-max-lr", "0.001"], 10, "failed run the server plans lr 0.02, but policy.max"),
        ([*dp, "1e-4", "--dp-noise-multiplier", "0.2"], 11, "failed run target_epsilon = 1: "),
        ([*dp, "0.5"], 2, "failed data dp.delta = 0.5: with 201 images it must be below"),
        (["--model", "nothing-32"], 2, "failed model model = 'nothing-32'"),
        (["--key", "nowhere.pem"], 2, "no such file"),
    ):
        assert main(["check", *alice[1:], *extra]) == code
        assert words in " ".join(capsys.readouterr().out.split())
    assert "joined alice" not in f.log("server")  # who only asks does not join


def test_too_few_clients_end_the_run_on_both_sides(federation: Any) -> None:
    f = federation(gather_seconds=18.0, patience=2.0)
    for i in (0, 1):
        f.start(i)
    assert f.started["server"].wait(LONG) == 8
    assert "for clients, 2 s at most: 1 of at least 3 clients (alice)" in f.log("server")
    assert "1 of at least 3 clients (alice) after " in f.log("server")
    assert f.started["alice"].wait(LONG) == 8
    assert "start more clients" in f.log("alice")


def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "secure_fedprompt", "demo", "--run-dir", "d"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV,
    )  # fmt: skip
    assert running.stdout is not None
    for line in running.stdout:
        if "waiting for" in line:
            break
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    if not children.exists():
        running.kill()
        pytest.skip("needs /proc")
    pids = [int(pid) for pid in children.read_text().split()]
    assert len(pids) == 5
    running.send_signal(signal.SIGINT)
    rest = running.communicate(timeout=60)[0]
    assert running.returncode == 130
    assert "interrupted" in rest
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


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
