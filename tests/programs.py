"""Programs started as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from secure_fedprompt.commands import demo_files

LONG = 150.0


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True, text=True, timeout=LONG, env=ENV, check=False, **options,
    )  # fmt: skip


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
