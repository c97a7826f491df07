"""A hostile client against the server program, one trick in each round: it is dropped by name, and
the others finish every round."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from crowd import Crowd, Member, whole
from programs import ENV, LONG

from secure_fedprompt.commands import demo_files
from secure_fedprompt.protocol import chunks
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.agreement_proof import NO_PROOF

Chunks = list[bytes]
Trick = Callable[[m.Message], Chunks]
RAW = bytes((chunks.FIRST + chunks.LAST,))


def instead(kind: type, act: Callable[[Any], Any]) -> Trick:
    """Change one kind of message; ``act`` makes another message of it, chunks, or None."""

    def trick(message: m.Message) -> Chunks:
        if not isinstance(message, kind):
            return whole(message)
        made = act(message)
        return whole(made) if isinstance(made, m.Printable) else list(made or ())

    return trick


def altered(kind: type, field: str, change: Callable[[Any], Any]) -> Trick:
    return instead(
        kind, lambda x: dataclasses.replace(x, **{field: change(bytes(getattr(x, field)))})
    )


def flipped(data: bytes) -> bytes:
    return bytes((data[0] ^ 1,)) + data[1:]


TRICKS: dict[str, tuple[Trick, str]] = {
    "garbage": (instead(m.Advert, lambda x: [RAW + b"garbage"]), "left dave: UnknownVersionError"),
    "an unknown type": (
        instead(m.Advert, lambda x: [whole(x)[0][:2] + b"\xff" + whole(x)[0][3:]]),
        "left dave: UnknownTypeError",
    ),
    "a cut frame": (instead(m.Shares, lambda x: [whole(x)[0][:-1]]), "left dave: TruncatedError"),
    "a longer frame": (
        instead(m.Shares, lambda x: [whole(x)[0] + b"\0"]), "left dave: TrailingBytesError",
    ),
    "no chunk": (instead(m.Shares, lambda x: [b"\x09x"]), "left dave: FieldError"),
    "a bad signature": (
        altered(m.Advert, "signature", flipped), "dave: SignatureError: signature of dave",
    ),
    "another round's advert": (
        instead(m.Advert, lambda x: dataclasses.replace(x, round=x.round - 1)),
        r"dave \(advertising\) dropped",
    ),
    "another run's advert": (altered(m.Advert, "run", flipped), r"dave \(advertising\) dropped"),
    "no advert": (instead(m.Advert, lambda x: None), r"dave \(advertising\) dropped"),
    "out of order": (
        instead(m.Shares, lambda x: m.Consistent(x.run, x.round, bytes(64))),
        "dave: UnexpectedMessageError",
    ),
    "a short upload": (altered(m.MaskedUpload, "vector", lambda v: v[:-8]), "dave: FieldError"),
    "half an upload": (
        instead(m.MaskedUpload, lambda x: whole(x)[:2]), r"dave \(training\) dropped",
    ),
    "an upload twice": (instead(m.MaskedUpload, lambda x: whole(x) * 2), "nobody dropped"),
    "a chunk larger than any": (
        instead(m.MaskedUpload, lambda x: [b"\1" + bytes(2 * chunks.CHUNK)]),
        r"dave \(training\) dropped",
    ),
    "a list signed badly": (
        altered(m.Consistent, "signature", flipped), "dave: SignatureError: signature of dave",
    ),
    "a bad share": (altered(m.Reveal, "shares", flipped), "4 clients in"),  # three do
    "leaving and staying": (
        instead(m.Advert, lambda x: [*whole(m.Leave("Stopped", "")), *whole(x)]),
        "left dave: stopped, and did not say why",
    ),
    "a false accusation": (
        instead(m.Shares, lambda x: m.Accusation(x.run, x.round, "alice", NO_PROOF)),
        "dave: complains about 'alice', who sent it no box",
    ),
    "a frame without an end": (
        instead(m.Advert, lambda x: [b"\1" + bytes(1000), *[b"\0" + bytes(chunks.CHUNK)] * 200]),
        "left dave: FloodError: more was sent than a round takes",
    ),
}  # fmt: skip


ROUNDS = 2 * len(TRICKS) + 4  # he misses one when he has to come back


@pytest.mark.slow
def test_every_trick_is_answered_by_name(tmp_path: Path) -> None:
    folder, tricks = tmp_path / "f", list(TRICKS)
    words, *_ = demo_files.write_files(
        folder, "promptfl", 4, ROUNDS, "masks", 0,
        for_server={"metrics": "off", "stage_seconds": 2.0, "training_seconds": 2.0,
                    "gather_seconds": 2.0, "log": str(tmp_path / "server.jsonl")},
    )  # fmt: skip
    address = tomllib.loads((folder / "server" / "server.toml").read_text())["bind"]
    began: dict[int, str] = {}

    def hostile(message: m.Message) -> Iterable[bytes]:
        number = message.round if isinstance(message, m.OfRound) else 0
        if number > 1 and number not in began and tricks:
            began[number] = tricks.pop(0)
        if number not in began:
            return whole(message)
        trick, said = TRICKS[began[number]]
        made = trick(message)
        dave.again = bool(tricks) and made != whole(message) and said.startswith("left dave")
        return made

    others = [Member(folder, name, address) for name in ("alice", "bob", "carol")]
    others[0].late["dave"] = 0.5  # for him to come back
    dave = Member(folder, "dave", address, hostile)
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, env=ENV)
    try:
        with Crowd([*others, dave]):
            assert server.wait(LONG) == 0, (tmp_path / "server.log").read_text()[-3000:]
    finally:
        server.kill()
    said = (tmp_path / "server.log").read_text()
    rows = json.loads((folder / "server" / "result.json").read_text())["rounds"]
    assert not tricks, f"not tried: {tricks}"
    assert "Traceback" not in said
    done = [row["learning_round"] for row in rows if row["outcome"] == "done"]
    assert done == list(range(1, ROUNDS + 1))
    events = [json.loads(line) for line in (tmp_path / "server.jsonl").read_text().splitlines()]
    ends = {e["round"]: i for i, e in enumerate(events) if e["event"] == "round"}
    unsaid = dict[str, str]()
    for number, trick in began.items():
        between = events[ends.get(number - 1, 0) : ends[number] + 3]
        told = "\n".join(e["words"] for e in between)
        if not re.search(TRICKS[trick][1], told):
            unsaid[trick] = told
        assert events[ends[number]]["outcome"] == "done", trick
        assert set(events[ends[number]]["dropped"]) <= {"dave"}, trick
    assert not unsaid, "\n".join(f"{k}: {v}" for k, v in unsaid.items())
    for other in others:
        assert other.over, other.errors
        assert not other.errors
