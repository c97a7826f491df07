"""What a program tells its operator: lines on the terminal, and in a file if one is wanted.

A line has a time, a level, an event and words. A terminal gets the time of day and colours;
whatever is no terminal gets date, zone and level, and whole lines. ``json`` makes each line an
object with the facts that are in the words. Lines may hold what only this machine's operator may
know, such as a client's own accuracy: files are made with mode 0600.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.text import Text

from secure_fedprompt.protocol.errors import ConfigError, SecureFedPromptError

JSON = "json"
LINES = ".jsonl"  # how the name of a file of objects ends
EVERY = 30.0  # seconds between two lines of progress
STYLES = {"warning": "yellow", "error": "bold red", "debug": "dim"}


class Log:
    """The log of one program; a context manager that notes how the program ended.

    Args:
        program: "server", "client", "helper" or "check".
        to: a file to append to, besides the terminal: of objects if it ends in .jsonl, else of
            text. "json" puts objects on standard output instead of text.
        level: "debug", "info", "warning" or "error": what is below is left out.
        console: of the terminal.

    Attributes:
        name: who the program is on the roster, once it knows.
        live: whether lines of the terminal may be replaced.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(
        self, program: str, to: str = "", level: str = "info", console: Console | None = None
    ) -> None:
        self.console = console or Console(highlight=False)
        self.program, self.name = program, ""
        self.live = self.console.is_terminal and to != JSON
        self._status: Status | None = None
        self._doing = ""
        self._logger = logging.Logger(program, level.upper())
        terminal: logging.Handler = _Terminal(self.console)
        if to == JSON:
            terminal = _Objects(sys.stdout)
        elif to:
            self._logger.addHandler(_file(to))
        self._logger.addHandler(terminal)
        self.listeners = list[Callable[[str, dict[str, Any]], None]]()  # told of every event

    def debug(self, event: str, words: str, **facts: Any) -> None:
        self._tell(logging.DEBUG, event, words, facts)

    def info(self, event: str, words: str, **facts: Any) -> None:
        self._tell(logging.INFO, event, words, facts)

    def warning(self, event: str, words: str, **facts: Any) -> None:
        self._tell(logging.WARNING, event, words, facts)

    def error(self, event: str, words: str, **facts: Any) -> None:
        self._tell(logging.ERROR, event, words, facts)

    def _tell(self, level: int, event: str, words: str, facts: dict[str, Any]) -> None:
        who = {"program": self.program, "name": self.name}
        extra = {"event": event, "facts": facts, "who": who}
        self._logger.log(level, "%s", words, extra=extra)
        for listener in tuple(self.listeners):
            listener(event, facts)

    def doing(self, words: str) -> None:
        """What goes on now, on a line of the terminal that the next one replaces."""
        if words == self._doing or not self.live:
            return
        self._doing = words
        if self._status is None:
            self._status = self.console.status(Text(words))
            self._status.start()
        self._status.update(Text(words))

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()
        for handler in self._logger.handlers:
            with contextlib.suppress(OSError):
                handler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Note in the file why the program ends; the terminal is told by whoever catches it."""
        if kind is not None:
            for handler in self._logger.handlers:
                handler.setLevel(logging.CRITICAL if isinstance(handler, _Terminal) else 0)
            words = f"{kind.__name__}: {' '.join(str(error).split())}".removesuffix(": ")
            code = error.exit_code if isinstance(error, SecureFedPromptError) else None
            self.error("ended", words, error=kind.__name__, exit_code=code)
        self.close()


class Bars:
    """How far something is: bars on a terminal, elsewhere a line every half a minute.

    A context manager; ``on`` is told what is done, how much of it, and of how much.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), console=log.console, transient=True,
            disable=not log.live,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._what, self._told = "", 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def on(self, what: str, done: int, total: int) -> None:
        if not self._log.live:
            if what != self._what:
                self._what, self._told = what, time.monotonic()
            if done < total and time.monotonic() - self._told > EVERY:
                self._told = time.monotonic()
                self._log.info("progress", f"{what}: {done} of {total}", done=done, total=total)
            return
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(what))


def _line(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="seconds")
    return f"{at} {record.levelname.lower():7} {_words(record)}"


def _words(record: logging.LogRecord) -> str:
    """Whatever a peer put into it, one line that steers no terminal."""
    return "".join(c if c.isprintable() else " " for c in record.getMessage())


def _object(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
    facts: dict[str, Any] = getattr(record, "facts", {})
    who: dict[str, str] = getattr(record, "who", {})
    event = getattr(record, "event", "")
    head = {"time": at, "level": record.levelname.lower(), **who, "event": event}
    return json.dumps({**head, "words": _words(record), **facts}, default=str)


class _Terminal(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if not self._console.is_terminal:
            self._console.print(Text(_line(record)), soft_wrap=True)
            return
        at = datetime.fromtimestamp(record.created).strftime("%H:%M:%S ")
        style = STYLES.get(record.levelname.lower(), "")
        self._console.print(Text.assemble((at, "dim"), (_words(record), style)), soft_wrap=True)


class _Objects(logging.StreamHandler[TextIO]):
    def format(self, record: logging.LogRecord) -> str:
        return _object(record)


class _File(WatchedFileHandler):
    """Goes on in a new file when the old one is moved, and without one when the disk is full."""

    failed = False

    def _open(self) -> TextIOWrapper:
        opener = lambda path, flags: os.open(path, flags, 0o600)  # noqa: E731
        return open(self.baseFilename, "a", encoding="utf-8", opener=opener)

    def format(self, record: logging.LogRecord) -> str:
        return _object(record) if self.baseFilename.endswith(LINES) else _line(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            print(f"log = {self.baseFilename!r} cannot be written: {sys.exception()}; going on "
                  "without it", file=sys.stderr)  # fmt: skip


def _file(path: str) -> logging.Handler:
    try:
        return _File(path)
    except OSError as error:
        raise ConfigError(
            f"log = {path!r}: cannot be written ({error.strerror}); name a file in a folder that "
            "exists, or 'json'"
        ) from None
