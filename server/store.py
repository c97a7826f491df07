"""The run folder: SQLite for what happened, safetensors for the prompts.

run.sqlite      state, rounds, traffic, events
pending.bin     a sum that is being opened, until it is
summed.bin      the last one that was, for clients that come back (masks)
prompts/        global-NNNN.safetensors after each learning round, global-0000 the start;
                sealed-NNNN.safetensors under bfv and ckks, which only the run's clients can open
server.json     the settings of the run (no keys)
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from secure_fedprompt.host.files import lock, write_durably, write_tensors, written
from secure_fedprompt.protocol.averaging import prompt_bytes
from secure_fedprompt.protocol.codec import VERSION, decode_fields, encode_fields
from secure_fedprompt.protocol.errors import ConfigError, DiskError, PromptFileError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.layout import TensorSpec, slices
from secure_fedprompt.protocol.messages import Nonce
from secure_fedprompt.protocol.protections import facts_of
from secure_fedprompt.protocol.terms import RunTerms
from secure_fedprompt.server.planning import RunState
from secure_fedprompt.server.rounds.base import Round
from secure_fedprompt.server.settings import ServerSettings

_SCHEMA = """
CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY CHECK (id = 1), body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, learning_round INTEGER, outcome TEXT, reason TEXT,
    cohort TEXT, dropped TEXT, faults TEXT, metrics TEXT, seconds TEXT, at REAL);
CREATE TABLE IF NOT EXISTS traffic (
    round INTEGER, peer TEXT, direction TEXT, type TEXT, frames INTEGER, bytes INTEGER,
    PRIMARY KEY (round, peer, direction, type));
CREATE TABLE IF NOT EXISTS events (at REAL, kind TEXT, text TEXT);
CREATE TABLE IF NOT EXISTS checked (learning_round INTEGER PRIMARY KEY, clients TEXT);
"""
_LAST = (1 << 32) - 1  # a number that no round has
TROUBLE = (
    "waiting",
    "left",
    "lost",
    "fault",
    "refused",
    "excluded",
    "roster",
    "failed",
)  # kinds of events
BEST = "best.safetensors"  # in a run folder
LOCKED = 30.0  # seconds that somebody else, a backup perhaps, may hold the database
_FREE = {  # not in a run's terms
    "key", "roster", "bind", "run_dir", "start_prompt", "clients", "min_clients",
    "gather_seconds", "patience", "alive_seconds", "max_attempts", "stop_after", "audit",
    "audit_mb", "metrics_bind", "track", "log", "log_level",
}  # fmt: skip


@contextlib.contextmanager
def open_run(folder: Path) -> Iterator[sqlite3.Connection]:
    """The database of a run folder, to read only.

    Raises:
        ConfigError: there is none, or what is read of it is damaged.
    """
    path = folder / "run.sqlite"
    if not path.exists():
        raise ConfigError(f"{folder} is no server's run_dir: it holds no run.sqlite")
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        ) as db:
            yield db
    except (sqlite3.Error, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"run folder {folder}: {path.name} cannot be read ({error})") from None


class _Needed(msgspec.Struct):
    """What every reader of a run's settings asks for."""

    method: str
    protection: str
    rounds: int


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a run folder, and the wire version that it was begun with.

    Raises:
        ConfigError: they cannot be read.
    """
    path = folder / "server.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        msgspec.convert(found, _Needed)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"run folder {folder}: the settings in {path.name} cannot be read ({error}): "
            "restore that file from a copy, or use another run_dir"
        ) from None
    return found


def rounds_of(db: sqlite3.Connection, only: int | None = None) -> list[dict[str, Any]]:
    """All attempted rounds, or one, as dictionaries, with bytes by direction and peer, and with the
    clients that have said that a sum is right."""
    names = ("round", "learning_round", "outcome", "reason", "cohort", "dropped", "faults",
             "metrics", "seconds", "at")  # fmt: skip
    rows: dict[int, dict[str, Any]] = {}
    span = (0, _LAST) if only is None else (only, only)
    query = "SELECT * FROM rounds WHERE round BETWEEN ? AND ? ORDER BY round"
    for values in db.execute(query, span):
        row = dict(zip(names, values, strict=True))
        for name in ("cohort", "dropped", "faults", "metrics", "seconds"):
            row[name] = json.loads(row[name])
        rows[row["round"]] = {**row, "bytes": {"up": {}, "down": {}}}
    query = (
        "SELECT round, peer, direction, SUM(bytes) FROM traffic WHERE round BETWEEN ? AND ? "
        "GROUP BY 1, 2, 3"
    )
    for number, peer, direction, size in db.execute(query, span):
        if number in rows:
            rows[number]["bytes"][direction][peer] = size
    said = dict[int, list[str]]()
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'checked'").fetchone():
        query = (
            "SELECT learning_round, clients FROM rounds JOIN checked USING (learning_round) "
            "WHERE round BETWEEN ? AND ?"
        )
        said = {number: json.loads(who) for number, who in db.execute(query, span)}
    for row in rows.values():
        row["checked"] = said.get(row["learning_round"], []) if row["outcome"] == "done" else []
    return list(rows.values())


def started(settings: ServerSettings) -> ServerSettings:
    """The settings with ``start``, if there is a ``start_prompt``.

    Raises:
        PromptFileError: it cannot be read.
    """
    if not settings.start_prompt:
        return settings
    path = Path(settings.start_prompt)
    if path.is_dir():
        found = sorted(path.glob("prompts/global-*.safetensors"))
        if not found or any(path.glob("prompts/sealed-*")):
            raise PromptFileError(
                f"start_prompt = {settings.start_prompt!r}: this folder holds no prompt that the "
                "server can read: name a client's prompt file"
            )
        path = found[-1]
    try:
        with safe_open(path, "np") as file:
            layout = json.loads((file.metadata() or {})["layout"])
            parts = [np.asarray(file.get_tensor(spec["name"])).reshape(-1) for spec in layout]
        flat = np.concatenate(parts).astype(np.float32)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise PromptFileError(f"start_prompt = {str(path)!r} is no prompt file: {line}") from None
    return msgspec.structs.replace(settings, start=digest(Purpose.BASE, prompt_bytes(flat)).hex())


class Store:
    """A run on disk.

    Raises:
        ConfigError: the folder holds a finished run, or one with other settings; another server
            uses it; or it cannot be written. After such an error all that was stored before is
            there, and a server started again goes on from it.
    """

    def __init__(self, folder: Path, settings: ServerSettings) -> None:
        self.folder = folder
        with self._writing():
            (folder / "prompts").mkdir(parents=True, exist_ok=True)
            self._held = os.open(folder / "prompts", os.O_RDONLY)
        try:
            lock(
                self._held, f"run folder {folder} is in use by another server: stop it, or use "
                "another run_dir",
            )  # fmt: skip
            with self._writing():
                self._db = sqlite3.connect(folder / "run.sqlite", timeout=LOCKED)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.executescript(_SCHEMA)
                self._keep_settings(settings)
        except ConfigError:
            os.close(self._held)
            raise
        self._traffic: dict[tuple[int, str, str, str], list[int]] = {}
        self.on_event: list[Any] = []
        self._summed = b""  # what the file holds
        self._wrote: tuple[Path, bytes] | None = None  # the last prompt, and where

    def _writing(self) -> AbstractContextManager[None]:
        return written(f"run folder {self.folder}", "free the disk, then start again to go on")

    def _keep_settings(self, settings: ServerSettings) -> None:
        path = self.folder / "server.json"
        now = {**msgspec.to_builtins(settings), "wire": VERSION}
        if path.exists():
            before = settings_of(self.folder)
            if before.get("wire") != VERSION:
                raise ConfigError(
                    f"run folder {self.folder} was begun by another release (wire version "
                    f"{before.get('wire', 'not noted')}, this is {VERSION}): finish it with that "
                    "one, or use another run_dir"
                )
            for name in sorted(set(now) - _FREE):
                if before.get(name) != now[name]:
                    raise ConfigError(
                        f"run folder {self.folder} was begun with {name} = {before.get(name)!r}, "
                        f"now it is {now[name]!r}: use the old value, or another run_dir"
                    )
        self._settings = {k: v for k, v in now.items() if k != "key"}
        kept = json.dumps(self._settings, indent=1) + "\n"
        if not path.exists() or path.read_text() != kept:
            write_durably(path, kept.encode())

    def load(self) -> RunState:
        """The stored state, or a new one."""
        row = self._db.execute("SELECT body FROM state").fetchone()
        if row is None:
            return RunState()
        body = json.loads(row[0])
        state = RunState(
            run=bytes.fromhex(body["run"]),
            server_nonce=bytes.fromhex(body["server_nonce"]),
            commitments=tuple(decode_fields(Nonce, bytes.fromhex(n)) for n in body["commitments"]),
            opened={name: bytes.fromhex(nonce) for name, nonce in body["opened"].items()},
            terms=decode_fields(RunTerms, bytes.fromhex(body["terms"])) if body["terms"] else None,
            attempt=body["attempt"],
            excluded=tuple(body["excluded"]),
            round=body["round"],
            learning_round=body["learning_round"],
            tensors=tuple(decode_fields(TensorSpec, bytes.fromhex(t)) for t in body["tensors"]),
            model_fingerprint=bytes.fromhex(body["model_fingerprint"]),
            classes_digest=bytes.fromhex(body["classes_digest"]),
            maker=body["maker"],
            election=body["election"],
            key=bytes.fromhex(body["key"]),
            keys=tuple(bytes.fromhex(key) for key in body["keys"]),
        )
        if body["pending"]:
            state.pending = (self.folder / "pending.bin").read_bytes()
        if body["summed"]:
            state.summed = (self.folder / "summed.bin").read_bytes()
        if state.tensors:
            number = min(state.learning_round - 1, self._settings["rounds"])
            if number and body["sealed"]:
                box = self._read(self.prompt_path(number, sealed=True), ["sealed"])
                state.sealed, number = box.astype(np.uint8).tobytes(), 0
            names = [tensor.name for tensor in state.tensors]
            state.prompt = self._read(self.prompt_path(number), names).astype(np.float32)
            state.start = self._read(self.prompt_path(0), names).astype(np.float32)
        return state

    @property
    def finished(self) -> bool:
        return (
            self._db.execute("SELECT 1 FROM events WHERE kind = 'finished'").fetchone() is not None
        )

    # -- the RunStore ------------------------------------------------------------------------------

    def save(self, state: RunState) -> None:
        with self._writing():
            self._save(state)

    def _save(self, state: RunState, round: Round | None = None, row: Sequence[Any] = ()) -> None:
        """Files first, then the database in one step: it says which of them count."""
        if state.prompt is not None:
            self._write_prompt(state)
        pending = self.folder / "pending.bin"
        if state.pending:
            write_durably(pending, state.pending)
        if state.summed and state.summed is not self._summed:
            write_durably(self.folder / "summed.bin", state.summed)
            self._summed = state.summed
        body = {
            "run": state.run.hex(),
            "server_nonce": state.server_nonce.hex(),
            "commitments": [encode_fields(n).hex() for n in state.commitments],
            "opened": {name: nonce.hex() for name, nonce in state.opened.items()},
            "terms": encode_fields(state.terms).hex() if state.terms else "",
            "attempt": state.attempt,
            "excluded": list(state.excluded),
            "pending": bool(state.pending),
            "summed": bool(state.summed),
            "round": state.round,
            "learning_round": state.learning_round,
            "tensors": [encode_fields(t).hex() for t in state.tensors],
            "model_fingerprint": state.model_fingerprint.hex(),
            "classes_digest": state.classes_digest.hex(),
            "maker": state.maker,
            "election": state.election,
            "key": state.key.hex(),
            "keys": [key.hex() for key in state.keys],
            "sealed": bool(state.sealed),
        }
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO state VALUES (1, ?)", (json.dumps(body),))
            if round is not None:
                self._db.execute("INSERT OR REPLACE INTO rounds VALUES (?,?,?,?,?,?,?,?,?,?)", row)
                said = [(number, json.dumps(names)) for number, names in round.checked.items()]
                self._db.executemany("INSERT OR REPLACE INTO checked VALUES (?,?)", said)
        if not state.pending:
            pending.unlink(missing_ok=True)

    def round_over(self, round: Round, metrics: Mapping[str, float], state: RunState) -> None:
        plan = round.plan
        row = (plan.round, plan.learning_round, str(round.stage), round.reason,
               *(json.dumps(x) for x in (plan.cohort, round.dropped, round.faults, dict(metrics),
                                         round.seconds)), time.time())  # fmt: skip
        with self._writing():
            self._save(state, round, row)
            self._keep_best(plan.learning_round - 1, metrics)
        self.flush_traffic()
        (told,) = rounds_of(self._db, plan.round)
        for listener in self.on_event:
            listener("round", told)

    def event(self, kind: str, text: str) -> None:
        with self._writing(), self._db:
            self._db.execute("INSERT INTO events VALUES (?,?,?)", (time.time(), kind, text))
        for listener in self.on_event:
            listener(kind, text)

    # -- traffic ---------------------------------------------------------------------------------

    def count(self, round: int, peer: str, direction: str, kind: str, size: int) -> None:
        """Count one frame; written to disk at the end of the round."""
        cell = self._traffic.setdefault((round, peer, direction, kind), [0, 0])
        cell[0] += 1
        cell[1] += size

    def flush_traffic(self) -> None:
        with self._writing(), self._db:
            self._db.executemany(
                "INSERT INTO traffic VALUES (?,?,?,?,?,?) ON CONFLICT DO UPDATE SET "
                "frames = frames + excluded.frames, bytes = bytes + excluded.bytes",
                [(*key, *cell) for key, cell in self._traffic.items()],
            )
        self._traffic.clear()

    # -- prompts and reading ---------------------------------------------------------------------

    def prompt_path(self, learning_round: int, sealed: bool = False) -> Path:
        kind = "sealed" if sealed else "global"
        return self.folder / "prompts" / f"{kind}-{learning_round:04d}.safetensors"

    def _write_prompt(self, state: RunState) -> None:
        settings = self._settings
        number = min(state.learning_round - 1, settings["rounds"])  # an evaluation changes nothing
        path = self.prompt_path(number, bool(state.sealed))
        metadata = {
            "format": "secure-fedprompt/1",
            "method": settings["method"],
            "settings": json.dumps(settings),
            "model_fingerprint": state.model_fingerprint.hex(),
            "classes_digest": state.classes_digest.hex(),
            "layout": json.dumps([asdict(t) for t in state.tensors]),
            "learning_round": str(number),
        }
        assert state.prompt is not None
        now = path, state.sealed or state.prompt.tobytes()
        if now == self._wrote and path.exists():
            return
        tensors = dict[str, NDArray[Any]]()
        if state.sealed:
            tensors["sealed"] = np.frombuffer(state.sealed, np.uint8)
        for spec, part in slices(() if state.sealed else state.tensors):
            tensors[spec.name] = state.prompt[part].reshape(spec.shape).copy()
        write_tensors(path, tensors, metadata)
        self._wrote = now

    def _keep_best(self, number: int, metrics: Mapping[str, float]) -> None:
        """A copy of the prompt with the best accuracy, once rounds have counted it."""
        if self._settings["metrics"] != "rounds":
            return
        found = (json.loads(text) for (text,) in self._db.execute("SELECT metrics FROM rounds"))
        scores = [metrics.get("accuracy", 0.0) for metrics in found]
        path = self.prompt_path(number)
        if metrics.get("accuracy", 0.0) and metrics["accuracy"] >= max(scores) and path.exists():
            write_durably(self.folder / BEST, path.read_bytes())

    def _read(self, path: Path, names: list[str]) -> NDArray[Any]:
        try:
            with safe_open(path, "np") as file:
                parts = [np.asarray(file.get_tensor(name)).reshape(-1) for name in names]
        except (OSError, SafetensorError) as error:
            raise PromptFileError(f"prompt file {path} cannot be read: {error}") from None
        return np.concatenate(parts)

    def summary(self) -> dict[str, Any]:
        """The run as JSON: what ``--json`` writes and the demo shows."""
        settings = self._settings
        sealed = facts_of(settings["protection"]).encrypted
        rounds = rounds_of(self._db)
        scores = [r["metrics"]["accuracy"] for r in rounds if "accuracy" in r["metrics"]]
        done = [r for r in rounds if r["outcome"] == "done"]
        up, down = ([b for r in done for b in r["bytes"][way].values()] for way in ("up", "down"))
        clients = max((len(r["cohort"]) for r in rounds), default=0)
        return {
            "run": self.load().run.hex(),
            "method": settings["method"],
            "protection": settings["protection"],
            "learning_rounds": settings["rounds"],
            "rounds": rounds,
            "accuracy_before": scores[0] if scores else None,
            "accuracy_after": scores[-1] if scores else None,
            "zero_shot": next(
                (r["metrics"]["zero_shot"] for r in done if "zero_shot" in r["metrics"]), None
            ),
            "bytes_up_per_client": sum(up) // max(clients, 1),
            "bytes_down_per_client": sum(down) // max(clients, 1),
            "prompt": str(self.prompt_path(settings["rounds"], sealed)),
        }

    def close(self) -> None:
        if self._held < 0:
            return
        with contextlib.suppress(DiskError):  # nothing but counts of bytes
            self.flush_traffic()
        self._db.close()
        os.close(self._held)
        self._held = -1
