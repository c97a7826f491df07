"""Where a client of a Flower app keeps what is its own: on its disk, or in a simulation's memory.

A SuperNode names its client's file in ``--node-config 'secure-fedprompt="client.toml"'``: key,
roster, policy, state_dir and the audit log are those of every other client. In Flower's simulation
there is nobody to protect from anybody: keys are made as nodes are met, and the server's roster is
believed. That is only so where its Ray workers call.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
from flwr.app import ConfigRecord, Context

from secure_fedprompt.clients.ledger import NAME, Ledger
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.flower.form import Form
from secure_fedprompt.flower.kept import FileShelf, MemoryShelf, Shelf, Tape, TapeError
from secure_fedprompt.flower.player import Member
from secure_fedprompt.host import command
from secure_fedprompt.host.files import replace_private, whoami
from secure_fedprompt.host.recorder import Recorder, recorder
from secure_fedprompt.protocol.codec import decode_fields, encode_fields
from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.protocol.keys import Identity
from secure_fedprompt.protocol.keys import Member as Entry
from secure_fedprompt.protocol.methods import FOREIGN
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.protocol.roster import Roster

KEY = "secure-fedprompt"  # in a SuperNode's config, and in a context's state
ENV = "SECURE_FEDPROMPT_CLIENT"  # likewise, where a node's config cannot be set
_TAPE = "flower.tape"
_WORKER = "flwr.simulation.ray_transport.ray_actor"
_POLICY = Policy(
    methods=tuple(FOREIGN),
    protections=("masks",),
    graphs=("complete", "regular"),
    colluders=0,
    metrics=(),
    weights=(),
    min_clip=0.0,
    min_weight=1,
)


class Kept(msgspec.Struct):
    """What is kept of a run between two calls.

    Attributes:
        form: of the app. tape: of the session, while there is a run.
        seconds: that training ever took. weight: of the last update. planned: when the last plan
            came, seconds since 1970.
    """

    form: Form
    tape: Tape | None
    seconds: float = 0.0
    weight: float = 1.0
    planned: float = 0.0


@dataclass
class Site:
    """One client, for one call.

    Attributes:
        recorder: of its audit log, or None.
        hold_seconds: before which nothing is uploaded, whatever the terms say.
    """

    member: Member
    shelf: Shelf
    ledger: Ledger
    recorder: Recorder | None = None
    hold_seconds: float = 0.0

    def load(self) -> Kept:
        """What was kept of the run under way.

        Raises:
            TapeError: nothing, or it cannot be read.
        """
        try:
            return msgspec.msgpack.decode(self._read(), type=Kept)
        except msgspec.MsgspecError as error:
            raise TapeError(f"nothing usable was kept of this run: {error}") from None

    def keep(self, kept: Kept) -> None:
        """Before anything leaves that follows from it."""
        self._write(msgspec.msgpack.encode(kept))

    def _read(self) -> bytes:
        raise NotImplementedError

    def _write(self, data: bytes) -> None:
        raise NotImplementedError


@dataclass
class DiskSite(Site):
    folder: Path = Path()

    def _read(self) -> bytes:
        try:
            return (self.folder / _TAPE).read_bytes()
        except OSError:
            return b""

    def _write(self, data: bytes) -> None:
        replace_private(self.folder / _TAPE, data)


@dataclass
class MemorySite(Site):
    context: Context | None = None

    def _read(self) -> bytes:
        assert self.context is not None
        return bytes(self.context.state.config_records[KEY].get("tape", b""))

    def _write(self, data: bytes) -> None:
        assert self.context is not None
        assert isinstance(self.shelf, MemoryShelf)
        record = self.context.state.config_records[KEY]
        record["tape"], record["shelf"] = data, self.shelf.to_bytes()


class Opener(Protocol):
    """How a site is opened for a call."""

    def __call__(self, context: Context) -> contextlib.AbstractContextManager[Site]: ...


@contextlib.contextmanager
def open_site(context: Context) -> Iterator[Site]:
    """This node's client.

    Raises:
        ConfigError: the node does not say whose it is; KeyFileError, RosterError
    """
    path = context.node_config.get(KEY) or os.environ.get(ENV)
    if path is None and simulated():
        yield in_memory(context)
        return
    if not isinstance(path, str):
        raise ConfigError(
            f"this node has no client file: start it with --node-config '{KEY}=\"client.toml\"', "
            f"or with {ENV} in its environment ('secure-fedprompt join' writes one)"
        )
    settings = command.load(ClientSettings, argparse.Namespace(config=path))
    identity, roster, me, _ = whoami(settings.key, settings.roster, "client")
    folder = Path(settings.state_dir.replace("{name}", me.name))
    policy = settings.policy
    if not policy.methods:  # who else chooses the next prompt has to be allowed by name
        policy = msgspec.structs.replace(policy, methods=("flower",))
    member = Member(me.name, identity, roster, policy, settings.accept)
    with contextlib.ExitStack() as stack:
        shelf = FileShelf(folder / "journal.jsonl")
        stack.callback(shelf.close)
        ledger = Ledger(folder / NAME)
        stack.callback(ledger.close)
        frames = recorder(folder, settings.audit, settings.audit_mb, identity, me, roster)
        if frames is not None:
            stack.callback(frames.close)
        yield DiskSite(member, shelf, ledger, frames, settings.hold_seconds, folder)


def simulated() -> bool:
    """Whether we are called by a worker of Flower's simulation: no server can make it look so, and
    neither does an app that uses Ray for itself."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == _WORKER:
            return True
        frame = frame.f_back
    return False


def enrol(context: Context) -> bytes:
    """Simulation: this node's entry for the roster; its key is made when it is first asked."""
    records = context.state.config_records
    if KEY not in records:
        records[KEY] = ConfigRecord({"key": Identity.generate().to_pem()})
    return encode_fields(Entry.of(_key(context), f"node-{context.node_id}", "client"))


def believe(context: Context, entries: list[bytes]) -> None:
    """Simulation: take the server's roster."""
    context.state.config_records[KEY]["roster"] = entries


def _key(context: Context) -> Identity:
    pem = context.state.config_records[KEY]["key"]
    assert isinstance(pem, bytes)
    return Identity.from_pem(pem, "of a simulated node", 0o600)


def in_memory(context: Context) -> MemorySite:
    """The site of a simulated node that is enrolled.

    Raises:
        ConfigError: it is not.
    """
    record = context.state.config_records.get(KEY, ConfigRecord())
    entries = record.get("roster")
    if not isinstance(entries, list):
        raise ConfigError("a simulated node was not enrolled: SecureGrid does that")
    roster = Roster.of(tuple(decode_fields(Entry, entry) for entry in entries))
    member = Member(f"node-{context.node_id}", _key(context), roster, _POLICY, exempt=True)
    shelf = MemoryShelf(record.get("shelf", b""))
    return MemorySite(member, shelf, Ledger(), context=context)
