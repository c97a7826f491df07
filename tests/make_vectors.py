"""Write the test vectors: ``python tests/make_vectors.py``.

``round_ok.json`` is a whole round of five clients, one of which drops out before uploading, with
every frame in hex, from fixed entropy. The other files hold, each, the client's frames up to one
frame that it must refuse, and the name of the error.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from federation import World
from rounds import identity, make_parties, make_plan, make_updates, names

from secure_fedprompt.memory import run_round
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import VERSION
from secure_fedprompt.protocol.expand import Purpose
from secure_fedprompt.protocol.messages import CATALOGUE
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.server.rounds.base import Stage
from secure_fedprompt.server.rounds.masks import MaskedRound

FOLDER = Path(__file__).parent / "vectors"
CLIENT, DROPPED = "c001", "c003"
SESSION = "c002"
Frames = list[tuple[str, str, bytes]]


def plan() -> RoundPlan:
    return make_plan(5)


def good_round() -> tuple[Frames, list[int]]:
    p = plan()
    outcome = run_round(
        p, make_parties(5, seed="vectors"), make_updates(p, 7), {DROPPED: Stage.COLLECTING}
    )
    assert outcome.round.integers is not None
    return outcome.frames, outcome.round.integers.tolist()


def sum_of_another_round() -> m.OpenedSum:
    """It holds, in its own."""
    p = dataclasses.replace(plan(), round=2)
    outcome = run_round(p, make_parties(5, seed="another"), make_updates(p, 8))
    assert isinstance(outcome.round, MaskedRound)
    assert outcome.round.opened is not None
    return outcome.round.opened


# name -> (the frame to spoil, how, the error)
BAD: dict[str, tuple[type, Callable[[Any], Any], str]] = {
    "wrong_threshold": (
        m.SurvivorList, lambda s: dataclasses.replace(s, survivors=b"\x07"), "ThresholdError"),
    "replayed_round": (m.Inbox, lambda i: dataclasses.replace(i, round=0), "ReplayError"),
    "bad_signature": (
        m.UnmaskRequest,
        lambda u: dataclasses.replace(u, signers=(
            *u.signers[:-1], dataclasses.replace(u.signers[-1], signature=bytes(64)))),
        "SignatureError"),
    "truncated": (m.Adverts, lambda a: CATALOGUE.encode(a)[:-1], "TruncatedError"),
    "trailing_bytes": (m.Adverts, lambda a: CATALOGUE.encode(a) + b"\0", "TrailingBytesError"),
    "unknown_version": (m.Adverts, lambda a: b"\xfe" + CATALOGUE.encode(a)[1:], "UnknownVersionError"),
    "wrong_tag": (m.OpenedSum, lambda o: dataclasses.replace(o, tag=bytes(16)), "SumError"),
    "wrong_sum": (
        m.OpenedSum,
        lambda o: dataclasses.replace(o, vector=bytes((o.vector[0] ^ 1,)) + bytes(o.vector[1:])),
        "SumError"),
    "wrong_list": (m.OpenedSum, lambda o: dataclasses.replace(o, members=b"\x1f"), "SumError"),
    "replayed_sum": (
        m.OpenedSum, lambda o: dataclasses.replace(sum_of_another_round(), round=o.round), "SumError"),
    "unknown_type": (m.Adverts, lambda a: bytes((VERSION, 0xFF)) + CATALOGUE.encode(a)[2:], "UnknownTypeError"),
}  # fmt: skip


def plan_of(**changes: Any) -> Callable[[m.Plan], m.Plan]:
    return lambda p: dataclasses.replace(p, plan=dataclasses.replace(p.plan, **changes))


def signed(message: m.Terms, **changes: Any) -> m.Terms:
    terms = dataclasses.replace(message.terms, **changes)
    signature = identity("server").sign(Purpose.TERMS, terms.digest)
    return dataclasses.replace(message, terms=terms, signature=signature)


# The same for a whole run: what a client must refuse although the server signed it.
BENT: dict[str, tuple[type, Callable[[Any], Any], str]] = {
    "terms_unsigned": (m.Terms, lambda t: dataclasses.replace(t, signature=bytes(64)), "SignatureError"),
    "terms_other_nonce": (
        m.Terms,
        lambda t: dataclasses.replace(t, nonces=(m.Nonce("c001", bytes(32)), *t.nonces[1:])),
        "TermsError"),
    "terms_low_quorum": (m.Terms, lambda t: signed(t, quorum=2), "TermsError"),
    "terms_wrong_colluders": (m.Terms, lambda t: signed(t, colluders=2), "TermsError"),
    "terms_huge_rate": (
        m.Terms, lambda t: signed(t, settings=bytes(t.terms.settings).replace(b"0.001", b"1e+38")),
        "TermsError"),
    "terms_little_room": (m.Terms, lambda t: signed(t, clip=0.01), "PolicyError"),
    "plan_other_terms": (m.Plan, plan_of(terms=bytes(32)), "TermsError"),
    "plan_other_clip": (m.Plan, plan_of(clip=0.5), "TermsError"),
    "plan_other_weight": (m.Plan, plan_of(max_weight=2), "TermsError"),
    "plan_other_metrics": (m.Plan, lambda p: plan_of(layout=p.plan.layout[:-1])(p), "TermsError"),
    "plan_small_cohort": (m.Plan, plan_of(cohort=("c001", "c002")), "TermsError"),
    "plan_lower_quorum": (
        m.Plan, plan_of(cohort=("c001", "c002", "c003"), members=3, quorum=3, threshold=3),
        "TermsError"),
    "plan_second_round_first": (m.Plan, plan_of(learning_round=2), "ReplayError"),
    "plan_attempt_201": (m.Plan, plan_of(attempt=201), "TermsError"),
}  # fmt: skip


def a_run() -> list[bytes]:
    """Frames to one client from the welcome to the first plan, from fixed entropy."""
    frames: list[bytes] = []

    def record(sender: str, recipient: str, message: m.Message) -> m.Message:
        if recipient == SESSION:
            frames.append(CATALOGUE.encode(message))
        return message

    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        world.tamper = record
        for name in names(4):
            world.join(name)
        world.pump(lambda w, message: isinstance(message, m.Plan) and bool(frames)
                   and isinstance(CATALOGUE.decode(frames[-1]), m.Plan))  # fmt: skip
        world.store.close()
    return frames


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    frames, total = good_round()
    as_hex = [[s, r, f.hex()] for s, r, f in frames]
    write("round_ok", {"plan_digest": plan().digest.hex(), "frames": as_hex, "sum": total})
    received = [frame for _, recipient, frame in frames if recipient == CLIENT]
    for name, (kind, spoil, error) in BAD.items():
        until: list[str] = []
        for frame in received:
            message = CATALOGUE.decode(frame)
            if isinstance(message, kind):
                spoiled = spoil(message)
                raw = spoiled if isinstance(spoiled, bytes) else CATALOGUE.encode(spoiled)
                until.append(raw.hex())
                break
            until.append(frame.hex())
        write(f"client_{name}", {"client": CLIENT, "frames": until, "error": error})
    for name, (kind, spoil, error) in BENT.items():
        until = []
        for frame in a_run():
            message = CATALOGUE.decode(frame)
            if isinstance(message, kind):
                until.append(CATALOGUE.encode(spoil(message)).hex())
                break
            until.append(frame.hex())
        write(f"session_{name}", {"client": SESSION, "frames": until, "error": error})
    request = next(f for f in received if isinstance(CATALOGUE.decode(f), m.UnmaskRequest))
    until = [f.hex() for f in received[: received.index(request) + 1]] + [request.hex()]
    write("client_second_unmask", {"client": CLIENT, "frames": until, "error": "SecondUnmaskError"})
    # A second sum of the learning round that it has helped to open.
    again = m.Plan(dataclasses.replace(plan(), round=2, attempt=2), b"")
    until = [f.hex() for f in received[: received.index(request) + 1]] + [
        CATALOGUE.encode(again).hex()
    ]
    write("client_second_sum", {"client": CLIENT, "frames": until, "error": "OpenedError"})
    # A box that does not open, and evidence that its dealer did not sign.
    until = []
    for frame in received:
        message = CATALOGUE.decode(frame)
        if isinstance(message, m.Inbox):
            boxes = bytes([message.boxes[0] ^ 1]) + bytes(message.boxes[1:])
            until.append(CATALOGUE.encode(dataclasses.replace(message, boxes=boxes)).hex())
            break
        until.append(frame.hex())
    sealed = bytes(m.BOX * 4)
    evidence = m.Evidence(plan().run, plan().round, "c002", sealed, bytes(64), (), ())
    until.append(CATALOGUE.encode(evidence).hex())
    write("client_altered_box", {"client": CLIENT, "frames": until, "error": "SignatureError"})
    # The server's side: all frames to it, with one bad share at the bare threshold.
    to_server = [[s, f.hex()] for s, r, f in frames if not r]
    for row in reversed(to_server):
        message = CATALOGUE.decode(bytes.fromhex(row[1]))
        if isinstance(message, m.Reveal):
            shares = bytes([message.shares[0] ^ 1]) + bytes(message.shares[1:])
            row[1] = CATALOGUE.encode(dataclasses.replace(message, shares=shares)).hex()
            break
    write("server_bad_share", {"frames": to_server, "error": "BadShareError"})


def write(name: str, content: dict[str, Any]) -> None:
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=0) + "\n")


if __name__ == "__main__":
    main()
