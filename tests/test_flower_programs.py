"""Apps of Flower in its simulation, and as SuperLink and SuperNodes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flower_app import STAGES
from flower_lab import made_rows

from secure_fedprompt.audit.command import main as audit
from secure_fedprompt.host.files import make_key
from secure_fedprompt.protocol.roster import Roster

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
ENV = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip
APP = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "lab"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr[simulation]>=1.25"]
[tool.flwr.app]
publisher = "lab"
[tool.flwr.app.components]
serverapp = "flower_app:server_app"
clientapp = "flower_app:client_app"
[tool.flwr.app.config]
rounds = 1
nodes = 1
lose = false
key = ""
roster = ""
run-dir = "run"
"""


def test_simulation_loses_a_node_in_each_stage(tmp_path: Path) -> None:
    config = {"rounds": len(STAGES), "nodes": 10, "lose": True, "key": "", "roster": "",
              "run-dir": str(tmp_path / "run")}  # fmt: skip
    script = tmp_path / "simulate.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from flwr.simulation import run_simulation\n"
        "import flower_app\n"
        "run_simulation(flower_app.server_app, flower_app.client_app, num_supernodes=10,\n"
        "               backend_config={'client_resources': {'num_cpus': 1}})\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, **ENV, "FLWR_HOME": str(tmp_path), "LAB": json.dumps(config)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (tmp_path / "run" / "average.txt").exists(), done.stdout + done.stderr
    rows = [r for r in made_rows(tmp_path) if r["outcome"] == "done"]
    assert [row["learning_round"] for row in rows] == [1, 2, 3, 4, 5]
    # The first may be the maker of the sums' key, and is then missed before there is a cohort.
    assert [len(row["cohort"]) - len(row["dropped"]) for row in rows] == [9, 9, 9, 10, 10]
    values = (tmp_path / "run" / "average.txt").read_text().split()
    means = [(55 - part) / 9 for part in (1, 2, 3)] + [5.5, 5.5]
    assert float(values[0]) == pytest.approx(sum(means) / 16, abs=1e-4)


def free_port() -> int:
    """Flower takes no port 0."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def start(*command: object, log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, **ENV, **env}, start_new_session=True,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def test_superlink_and_supernodes_with_files(tmp_path: Path) -> None:
    """Three, since a sum of two would tell each of them the other's update."""
    names = ("alice", "bob", "carol")
    members = [make_key(name, "client", tmp_path) for name in names]
    members.append(make_key("server", "server", tmp_path))
    (tmp_path / "roster.toml").write_text(Roster.of(tuple(members)).to_toml())
    app = tmp_path / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(APP)
    for name in ("flower_app.py", "flower_lab.py"):
        shutil.copy(HERE / name, app / name)
    home, link = tmp_path / "home", free_port()
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "lab"\n[superlink.lab]\naddress = "127.0.0.1:{link}"\n'
        "insecure = true\n"
    )
    env = {"FLWR_HOME": str(home)}
    running = [start(
        BIN / "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
        "--host", "127.0.0.1", "--port", link, log=tmp_path / "link.log", env=env,
    )]  # fmt: skip
    try:
        for part, name in enumerate(names):
            path = tmp_path / f"{name}.toml"
            path.write_text(
                f'key = "{name}.pem"\nroster = "roster.toml"\nstate_dir = "state-{name}"\n'
            )
            config = f'partition-id={part} secure-fedprompt="{path}"'
            running.append(start(
                BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}",
                "--host", "127.0.0.1", "--port", free_port(), "--node-config", config,
                log=tmp_path / f"{name}.log", env=env,
            ))  # fmt: skip
        given = (
            f'rounds=1 nodes=3 key="{tmp_path}/server.pem" roster="{tmp_path}/roster.toml" '
            f'run-dir="{tmp_path}/run"'
        )
        until = time.monotonic() + 60
        while True:  # until the SuperLink answers
            begun = subprocess.run(
                [str(BIN / "flwr"), "run", str(app), "lab", "-c", given, "--stream"],
                env={**os.environ, **ENV, **env}, capture_output=True, text=True, timeout=400,
                check=False,
            )  # fmt: skip
            if begun.returncode == 0 or time.monotonic() > until:
                break
        logs = begun.stdout + begun.stderr
        assert (tmp_path / "run" / "average.txt").exists(), logs[-3000:]
    finally:
        for process in reversed(running):
            end(process)
    values = (tmp_path / "run" / "average.txt").read_text().split()
    assert [float(value) for value in values] == [0.125] * 5
    rows = made_rows(tmp_path)
    assert [row["cohort"] for row in rows] == [list(names)]
    ends = [f"--peer={tmp_path}/state-{name}" for name in names]
    assert audit([str(tmp_path / "run"), *ends]) == 0
