"""What a peer, or a file, may hand to us: each target takes any bytes and may only refuse them.

``python tests/fuzz/run.py TARGET CORPUS [libFuzzer options]`` runs one under atheris;
``scripts/fuzz`` runs all. A target that raises anything but our own errors has found a bug.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from secure_fedprompt.audit.log import Log
from secure_fedprompt.clients.rounds import encrypted, unmasking
from secure_fedprompt.flower.mod import _form
from secure_fedprompt.host.recorder import START, Recorder, link
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import decode_fields, encode_fields
from secure_fedprompt.protocol.errors import SecureFedPromptError
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.protocol.terms import RunTerms
from secure_fedprompt.protocol.transport import Frame
from secure_fedprompt.server.opening import Pending
from secure_fedprompt.server.results import LastSum

Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {}
_RECORDED: dict[str, Any] = {}


def target(function: Target) -> Target:
    """Have a function fuzzed, under its name."""

    def guarded(data: bytes) -> None:
        try:
            function(data)
        except SecureFedPromptError as error:
            assert str(error), "a refusal without words"

    TARGETS[function.__name__] = guarded
    return guarded


@target
def frame(data: bytes) -> None:
    """A frame; what is one has one encoding."""
    message = m.CATALOGUE.decode(data)
    assert m.CATALOGUE.encode(message) == data


@target
def settings(data: bytes) -> None:
    """A run's settings; what is understood has one form."""
    made = MethodSettings.from_bytes(data)
    assert MethodSettings.from_bytes(made.to_bytes()) == made


@target
def roster(data: bytes) -> None:
    """A roster file."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    Roster.from_toml(text, "roster.toml")


@target
def kept(data: bytes) -> None:
    """What server and clients keep of a round: the first byte says what."""
    kinds: tuple[type, ...] = (
        unmasking._Kept, Pending, LastSum, RunTerms, encrypted._Kept,
    )  # fmt: skip
    kind = kinds[data[0] % len(kinds)] if data else kinds[0]
    found = decode_fields(kind, data[1:])
    assert encode_fields(found) == data[1:]
    if isinstance(found, RunTerms):
        found.check()


@target
def log(data: bytes) -> None:
    """An audit log whose chain is right, whatever is in its records, one on each line."""
    lines, chain = b"", START
    for text in data.split(b"\n"):
        chain = link(chain, text)
        lines += text + b"\t" + chain.hex().encode() + b"\n"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "audit-0000.jsonl").write_bytes(lines)
        read = Log.read(Path(folder))
        for entry, message in read.messages():
            assert entry
            assert message


@target
def form(data: bytes) -> None:
    """What a server says of a Flower app."""
    found = _form(data)
    if sum(shape.size for shape in found.averaged) > 1 << 12:
        return
    flat = np.zeros(sum(shape.size for shape in found.averaged), np.float32)
    if not found.kept:
        assert list(found.arrays(flat)) == list(found.order)


def recorded() -> dict[str, Any]:
    """A good run: a world's factory, and the frames to one client and to the server, in order."""
    if not _RECORDED:
        from federation import World
        from rounds import names

        world = World(Path(tempfile.mkdtemp()), 3, rounds=1, metrics="off", weights="uniform")
        frames: list[tuple[str, str, bytes]] = []

        def tamper(sender: str, recipient: str, message: m.Message) -> m.Message:
            frames.append((sender, recipient, bytes(m.CATALOGUE.encode(message))))
            return message

        world.tamper = tamper
        for name in names(3):
            world.join(name)
        world.pump()
        _RECORDED["frames"] = frames
        _RECORDED["World"], _RECORDED["names"] = World, names(3)
    return _RECORDED


def _altered(data: bytes, to: str) -> None:
    """One frame of a run is another one: the first two bytes say which."""
    found = recorded()
    world = found["World"](Path(tempfile.mkdtemp()), 3, rounds=1, metrics="off", weights="uniform")
    world.withdraws = True
    at = int.from_bytes(data[:2], "little") % len(found["frames"])
    seen = [0]

    def tamper(sender: str, recipient: str, message: m.Message) -> m.Message:
        seen[0] += 1
        if seen[0] >= at and recipient == to and not seen[1:]:
            seen.append(1)
            return m.CATALOGUE.decode(data[2:])
        return message

    world.tamper = tamper
    try:
        for name in found["names"]:
            world.join(name)
        world.pump()
    except AssertionError as error:  # the toy network's own patience
        assert "nothing moves" in str(error) or "for ever" in str(error)
    finally:
        world.store.close()


@target
def client(data: bytes) -> None:
    """A frame to a client, in the middle of a run."""
    _altered(data, "c001")


@target
def server(data: bytes) -> None:
    """A frame to the server, in the middle of a run."""
    _altered(data, "")


def _records(frames: list[tuple[str, str, bytes]]) -> bytes:
    """Of a small audit log."""
    from rounds import identity
    from rounds import roster as some_members

    members = some_members(3)
    folder = Path(tempfile.mkdtemp())
    made = Recorder(folder, "headers", 1 << 20, identity("c001"), members.by_name["c001"], members)
    for sender, recipient, data in frames:
        if "c001" in (sender, recipient):
            act = made.got if recipient == "c001" else made.sent
            act("server", Frame.read(data))
    made.close()
    lines = (folder / "audit-0000.jsonl").read_bytes().splitlines()
    return b"\n".join(line.partition(b"\t")[0] for line in lines)


def seeds() -> dict[str, list[bytes]]:
    """A few good inputs of each target."""
    from rounds import roster as some_members

    frames = recorded()["frames"]
    kinds: dict[str, tuple[int, bytes]] = {}
    for number, (_, _, data) in enumerate(frames):
        kinds.setdefault(type(m.CATALOGUE.decode(data)).__name__, (number, data))
    terms = next(m.CATALOGUE.decode(d) for _, d in kinds.values()
                 if isinstance(m.CATALOGUE.decode(d), m.Terms))  # fmt: skip
    assert isinstance(terms, m.Terms)
    to_client = [(n, d) for n, (s, r, d) in enumerate(frames) if r == "c001"]
    to_server = [(n, d) for n, (s, r, d) in enumerate(frames) if r == ""]
    at = lambda pairs: [n.to_bytes(2, "little") + d for n, d in pairs if len(d) < 4096]  # noqa: E731
    shape = {"kind": "train", "record": "arrays", "order": ["w"], "kept": {}, "configs": {},
             "averaged": [{"name": "w", "dtype": "float32", "shape": [2, 3]}],
             "weighted_by": "num-examples"}  # fmt: skip
    return {
        "frame": [data for _, data in kinds.values() if len(data) < 4096],
        "settings": [MethodSettings().to_bytes()],
        "roster": [some_members(3).to_toml().encode()],
        "kept": [b"\x03" + encode_fields(terms.terms)],
        "log": [_records(frames)],
        "form": [msgspec.json.encode(shape)],
        "client": at(to_client),
        "server": at(to_server),
    }
