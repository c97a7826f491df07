"""The real programs: processes, sockets, files, exit codes. One demo serves several tests."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from programs import ENV, LONG, python

from secure_fedprompt import client
from secure_fedprompt.__main__ import main
from secure_fedprompt.commands import keys as cli
from secure_fedprompt.protocol.roster import Roster


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


def test_mistakes_in_files_are_one_line_before_anything_is_sent(
    federation: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    f = federation()  # nobody is started
    cli.make_key("mallory", "client", tmp_path)
    one_class = tmp_path / "one" / "cat"
    one_class.mkdir(parents=True)
    (one_class / "x.png").write_bytes(b"not an image")
    open_key = tmp_path / "open.pem"
    open_key.write_bytes((f.folder / "alice/alice.pem").read_bytes())
    open_key.chmod(0o644)
    config = f.commands[1][3:5]
    for number, (extra, words) in enumerate((
        (["--key", "nowhere.pem"], "no such file; make one with"),
        (["--key", str(open_key)], "chmod 600"),
        (["--key", str(tmp_path / "mallory.pem")], "is not on the roster: add its entry"),
        (["--roster", "nowhere.toml"], "no such file; who runs the server sends it"),
        (["--dataset", str(tmp_path / "one")], "has one class, 'cat'"),
        (["--dataset", str(tmp_path / "nothing")], "no such file or folder"),
        (["--model", "local-dir:nowhere"], "lacks open_clip_config.json"),
    )):  # fmt: skip
        state = ["--state-dir", str(tmp_path / f"state{number}"), "--threads", "0"]
        assert client.main([*config, *extra, *state]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1, said
        assert words in said[0], extra


@pytest.mark.slow
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
    cases: list[tuple[list[str], int, str]] = [
        (["--key", str(tmp_path / "mallory.pem"), "--roster", str(with_stranger)], 4, "refuses our key"),
        (["--roster", str(wrong_server)], 5, "probably not this server's"),
        (["--server", "tcp://127.0.0.1:9", "--patience", "1"], 3, "unreachable"),
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


@pytest.mark.slow
def test_too_few_clients_end_the_run_on_both_sides(federation: Any) -> None:
    f = federation(gather_seconds=5.0, patience=2.0)
    f.start(1)
    f.wait_for("alice", "training and")  # her model is loaded, and she waits for the server
    f.start(0)
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
