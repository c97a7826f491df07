"""Recorded rounds: the good one must come out the same, the bad ones must fail as recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_vectors
import pytest
from federation import Toy
from rounds import entropy_from, identity, make_parties, make_updates, roster

from secure_fedprompt.clients.journal import MemoryJournal
from secure_fedprompt.clients.party import Party
from secure_fedprompt.clients.rounds.base import Awaiting, State
from secure_fedprompt.clients.rounds.start import start
from secure_fedprompt.clients.session import Session
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.messages import CATALOGUE
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.server.rounds.base import Deadlines, Stage
from secure_fedprompt.server.rounds.masks import MaskedRound

FOLDER = Path(__file__).parent / "vectors"


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


def test_the_good_round_is_reproduced_byte_for_byte() -> None:
    vector = load("round_ok")
    frames, total = make_vectors.good_round()
    assert make_vectors.plan().digest.hex() == vector["plan_digest"]
    assert [[s, r, f.hex()] for s, r, f in frames] == vector["frames"]
    assert total == vector["sum"]


COUNTED = Policy(metrics=(), weights=())


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("client_*.json")))
def test_client_refuses(name: str) -> None:
    vector = load(name)
    plan = make_vectors.plan()
    party = make_parties(5, seed="vectors")[vector["client"]]
    updates = make_updates(plan, 7)
    state: State | None = None

    def take(raw: str) -> None:
        nonlocal state
        message = CATALOGUE.decode(bytes.fromhex(raw))
        if isinstance(message, m.Plan):
            state, _ = start(party, message.plan)
        else:
            assert state is not None
            state, _ = state.on(message)
        if isinstance(state, Awaiting):
            state, _ = state.upload(*updates[party.name])

    for raw in vector["frames"][:-1]:
        take(raw)
    with pytest.raises(getattr(errors, vector["error"])):
        take(vector["frames"][-1])


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("session_*.json")))
def test_a_client_refuses_what_bends_the_terms(name: str) -> None:
    vector = load(name)
    own = vector["client"]
    party = Party(
        own, identity(own), roster(4), COUNTED, MemoryJournal(), entropy_from(f"{own} 0.0 1")
    )
    session = Session(party, Toy(0.1, 11.0))
    session.hello()
    *before, last = (CATALOGUE.decode(bytes.fromhex(raw)) for raw in vector["frames"])
    for message in before:
        assert session.on(message)
    with pytest.raises(errors.SecureFedPromptError) as refused:
        session.on(last)
    assert type(refused.value).__name__ == vector["error"], refused.value
    assert session.work is None


def test_without_bending_the_run_begins() -> None:
    """The vectors fail for what was bent, and for nothing else."""
    own = make_vectors.SESSION
    party = Party(
        own, identity(own), roster(4), COUNTED, MemoryJournal(), entropy_from(f"{own} 0.0 1")
    )
    session = Session(party, Toy(0.1, 11.0))
    session.hello()
    for raw in make_vectors.a_run():
        assert session.on(CATALOGUE.decode(raw))
    assert session.round is not None


def test_server_refuses_a_bad_share() -> None:
    vector = load("server_bad_share")
    server = MaskedRound(make_vectors.plan(), b"", roster(5), Deadlines(1, 1))
    server.start(0.0)
    for sender, raw in vector["frames"]:
        if server.stage is Stage.COLLECTING and len(server.waiting) == 1:
            server.tick(server.deadline)  # the dropped client never uploads
        server.on(sender, CATALOGUE.decode(bytes.fromhex(raw)), 0.0)
    assert server.stage is Stage.ABORTED
    assert server.reason.startswith(vector["error"])


def test_there_is_a_vector_for_each_failure() -> None:
    found = {p.stem for p in FOLDER.glob("*.json")}
    expected = {f"client_{name}" for name in make_vectors.BAD}
    expected |= {f"session_{name}" for name in make_vectors.BENT}
    assert found == expected | {
        *("round_ok", "client_second_unmask", "client_second_sum", "client_altered_box"),
        "server_bad_share",
    }
