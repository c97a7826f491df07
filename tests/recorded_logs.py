"""Audit logs, written and rewritten."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rounds import identity, roster

from secure_fedprompt.audit.log import Log
from secure_fedprompt.host.recorder import Recorder
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.transport import Frame

RUN = b"r" * 16


def made(folder: Path, mode: str = "full", limit: int = 1 << 24, name: str = "c001") -> Recorder:
    known = roster(3)
    return Recorder(folder, mode, limit, identity(name), known.by_name[name], known, lambda: 7.0)


def put(log: Recorder, *messages: m.Message, way: str = "out") -> None:
    for message in messages:
        (log.got if way == "in" else log.sent)("server", Frame.of(message))


def upload(number: int, size: int = 40) -> m.MaskedUpload:
    return m.MaskedUpload(
        RUN, number, hashlib.shake_128(bytes([number % 256])).digest(size), bytes(16)
    )


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "audit-0000.jsonl").read_bytes().splitlines(keepends=True)


def rewrite(folder: Path, lines: list[bytes]) -> Log:
    (folder / "audit-0000.jsonl").write_bytes(b"".join(lines))
    return Log.read(folder)
