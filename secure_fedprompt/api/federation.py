"""``Federation``: server and clients as processes of this machine, started from Python."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from secure_fedprompt import show
from secure_fedprompt.api.history import History
from secure_fedprompt.clients.settings import ClientSettings, PrivacySettings
from secure_fedprompt.commands import demo, demo_files
from secure_fedprompt.host import command
from secure_fedprompt.prompt_file import read_prompt
from secure_fedprompt.protocol.errors import ConfigError, RunFailedError
from secure_fedprompt.server.settings import ServerSettings, check_settings

SECONDS = 3600.0


class Federation:
    """A federation over real sockets: keys, roster and settings files in a folder, as an operator
    would write them, and one process each.

    With a ``with`` block the processes start at its beginning, and none outlives it::

        with Federation(clients=4, rounds=3) as run:
            history = run.wait()

    Args:
        folder: for everything, new or empty; a new one in the working folder if it is not given.
        method, clients, rounds, protection, seed: as in ``simulate``; 3 clients or more.
        dp: the clients' [dp] table.
        for_server, for_clients: any other of their settings; the images are the demo's, generated,
            unless ``for_clients`` says otherwise.

    Attributes:
        folder: where the files are; server/output.log and NAME/output.log are what they said.
        commands: what is run.

    Raises:
        ConfigError: a setting is wrong, or the folder is in use.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        method: str = "promptfl",
        clients: int = 4,
        rounds: int = 5,
        protection: str = "masks",
        seed: int = 0,
        dp: dict[str, Any] | None = None,
        for_server: dict[str, Any] | None = None,
        for_clients: dict[str, Any] | None = None,
    ) -> None:
        demo.check(clients, rounds)
        planned = {**demo_files.defaults(method, bool(dp)), "method": method, "rounds": rounds,
                   "protection": protection, **(for_server or {})}  # fmt: skip
        check_settings(command.build(ServerSettings, planned, "for_server"))
        command.build(ClientSettings, {**demo_files.DATA, **(for_clients or {})}, "for_clients")
        command.build(PrivacySettings, dict(dp or {}), "dp").check()
        if folder is None:
            folder = tempfile.mkdtemp(prefix="federation-", dir=Path.cwd())
        self.folder, self.clients = Path(folder).absolute(), clients
        demo.check_folder(self.folder)
        self.commands = demo_files.write_files(
            self.folder, method, clients, rounds, protection, seed,
            for_server=for_server, for_clients=for_clients, dp=dp,
        )  # fmt: skip
        self._stack = contextlib.ExitStack()
        self._processes = list[subprocess.Popen[str]]()

    def __enter__(self) -> Federation:
        """Start everybody."""
        self._processes = self._stack.enter_context(
            demo.processes(self.commands, self.folder, self.clients, piped=False)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End whoever is still there."""
        self._stack.close()

    def wait(
        self,
        seconds: float = SECONDS,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> History:
        """Wait until everybody is done.

        Args:
            seconds: at most.
            on_line: called with what the server says.

        Raises:
            ConfigError: outside of the ``with`` block.
            RunFailedError: a process failed, with its own last line, or is not done in time.
        """
        if not self._processes:
            raise ConfigError("Federation.wait: the processes start with the 'with' block")
        deadline = time.monotonic() + seconds
        with (self.folder / "server" / "output.log").open() as said:
            for process in self._processes:
                while process.poll() is None:
                    if time.monotonic() > deadline:
                        raise RunFailedError(f"not done within {seconds:g} s: see {self.folder}")
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.1)
                    for line in said:
                        on_line(line.rstrip("\n"))
        demo.check_ends(self._processes, self.folder)
        return self._history()

    def _history(self) -> History:
        """From what server and first client wrote at the end."""
        name = demo_files.NAMES[0]
        summary = json.loads((self.folder / "server" / "result.json").read_text())
        told = json.loads((self.folder / name / "result.json").read_text())
        show.add_history(summary, told["opened"])
        tensors = read_prompt(self.prompt).tensors
        shared = {name: t for name, t in tensors.items() if not name.startswith("private.")}
        return History.of(summary, shared)

    @property
    def prompt(self) -> Path:
        """The first client's file of the final prompt, for ``secure-fedprompt predict``.

        Raises:
            RunFailedError: there is none yet.
        """
        folder = self.folder / demo_files.NAMES[0] / "state"
        for path in folder.glob("prompt-*.safetensors"):
            return path
        raise RunFailedError(f"no final prompt in {folder} yet")
