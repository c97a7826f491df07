"""``secure-fedprompt watch``: a running server's run folder, live in the terminal.

It reads ``run.sqlite`` only; a second pair of eyes cannot disturb the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from secure_fedprompt import show
from secure_fedprompt.commands import watch_remote
from secure_fedprompt.host import command
from secure_fedprompt.protocol.errors import RunFailedError
from secure_fedprompt.server.store import open_run, rounds_of, settings_of

EVENTS = 8  # last lines shown
END = ("finished", "failed")


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(
        "secure-fedprompt watch",
        "Follow a server's run: rounds, accuracy, bytes, and what happened last. Ends with the "
        "run; the exit code is 8 if the run failed.",
        "  secure-fedprompt watch runs/monday\n  secure-fedprompt watch runs/monday --once\n"
        "  secure-fedprompt watch http://192.0.2.10:9570   # its metrics_bind: sums, no names",
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN",
        help="the server's run_dir, or http://HOST:PORT of its metrics_bind",
    )
    parser.add_argument("--once", action="store_true", help="print the state and end")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds")
    args = parser.parse_args(argv)
    if args.every <= 0:
        parser.error(f"--every {args.every}: must be above 0")

    if args.run_dir.startswith(("http://", "https://")):
        return command.guard(
            lambda: watch_remote.main(args.run_dir, args.once, args.every, args.json), args
        )
    folder = Path(args.run_dir)

    def body() -> int:
        try:
            return follow(folder, args.once, args.every)
        finally:
            if (folder / "run.sqlite").exists():
                command.write_json(args.json, "watch", look(folder).summary)

    return command.guard(body, args)


@dataclass(frozen=True)
class Watched:
    """The run folder at one moment.

    Attributes:
        events: (at, kind, text), the last ones; ended: "", "finished" or "failed".
    """

    summary: dict[str, Any]
    events: list[tuple[float, str, str]]
    ended: str


def follow(
    folder: Path, once: bool, every: float, wait: Callable[[float], None] = time.sleep
) -> int:
    """Show the folder until its run ends.

    Raises:
        ConfigError: it is no run folder. RunFailedError: the run failed.
    """
    console, state = Console(highlight=False), look(folder)
    if once:
        console.print(render(state))
    else:
        with Live(render(state), console=console, auto_refresh=False) as live:
            while not state.ended:
                wait(every)
                state = look(folder)
                live.update(render(state), refresh=True)
    if state.ended == "failed":
        raise RunFailedError(
            next(text for _, kind, text in reversed(state.events) if kind == "failed")
        )
    return 0


def look(folder: Path) -> Watched:
    """Read the run folder.

    Raises:
        ConfigError: it is none.
    """
    with open_run(folder) as db:
        query = "SELECT at, kind, text FROM events ORDER BY rowid DESC LIMIT ?"
        events = db.execute(query, (EVENTS,)).fetchall()[::-1]
        rows = rounds_of(db)
    settings = settings_of(folder)
    summary = {"method": settings["method"], "protection": settings["protection"],
               "learning_rounds": settings["rounds"], "rounds": rows}  # fmt: skip
    ended = next((kind for _, kind, _ in reversed(events) if kind in END), "")
    return Watched(summary, events, ended)


def render(state: Watched) -> Group:
    """Table and last events."""
    done = sum(r["outcome"] == "done" for r in state.summary["rounds"])
    head = f"{done} sums done, {state.summary['learning_rounds']} learning rounds wanted"
    lines = [
        f"{time.strftime('%H:%M:%S', time.localtime(at))} [dim]{kind:>8}[/] {escape(text)}"
        for at, kind, text in state.events
    ]
    status = state.ended or "running"
    return Group(
        show.rounds_table(state.summary), Text(f"{status}; {head}"),
        *(Text.from_markup(x) for x in lines),
    )  # fmt: skip
