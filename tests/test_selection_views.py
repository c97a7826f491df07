"""What server and helper of a secure selection see says nothing about the keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from federation import World
from rounds import names
from selecting import (
    GROUPS,
    SECURE,
    Grouped,
    federate,
    rounds,
)  # fmt: skip

from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol import messages as m


class Recorded:
    """Frames of a round's selection, by who sees them."""

    def __init__(self, folder: Path, keys: np.ndarray, rounds: int = 3) -> None:
        world = World(folder, 3, helpers=("notary",),
                      **{**SECURE, "rounds": rounds, "helper": "notary"})  # fmt: skip
        world.toys = {name: Grouped(i, keys) for i, name in enumerate(names(3))}
        for name in (*names(3), "notary"):
            world.join(name)
        self.shares: list[np.ndarray] = []
        self.server: list[bytes] = []
        self.helper: list[bytes] = []
        self.world = world

        def watch(w: World, message: m.Message) -> bool:
            match message:
                case m.KeyShares():
                    self.shares.append(np.frombuffer(message.share, "<u4").reshape(2, GROUPS))
                    self.server.append(bytes(message.share) + bytes(message.box))
                case m.HelperChoices():
                    self.server.append(bytes(message.choices.columns))
                case m.HelperOutcome():
                    self.server.append(bytes(message.boxes))
                case m.HelperTables():
                    g = message.tables
                    self.helper.append(bytes(g.seed) + bytes(g.tables) + bytes(g.checks))
                case m.HelperInputs():
                    self.helper.append(bytes(message.boxes))
            return False

        world.pump(until=watch)
        assert world.run.error is None


LOW = np.zeros((2, GROUPS), np.uint32)
HIGH = np.full((2, GROUPS), 2**32 - 1, np.uint32)


def looks_uniform(data: bytes) -> bool:
    """Chi-square over byte values; 400 is 6.4 deviations above the mean of 255."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return bool(((counts - expected) ** 2 / expected).sum() < 400)


def test_neither_view_depends_on_the_keys(tmp_path: Path) -> None:
    """All keys equal and extreme: whatever depends on them would repeat or have a pattern."""
    for name, keys in (("low", LOW), ("high", HIGH)):
        seen = Recorded(tmp_path / name, keys)
        assert looks_uniform(b"".join(seen.server))
        assert looks_uniform(b"".join(seen.helper))
        words = np.stack(seen.shares).astype(np.int64)  # (clients x rounds, modality, group)
        assert len(words) == 6
        assert len(np.unique(words)) == words.size
        text, visual = words[:, 0].reshape(-1), words[:, 1].reshape(-1)
        joint = [text - visual, text + visual, words[:3].reshape(-1) - words[3:].reshape(-1)]
        for difference in joint:  # a seed used twice would make these equal or zero
            low = (difference % 2**32).astype("<u4")
            assert len(np.unique(low)) == low.size
            assert abs(np.unpackbits(low.view(np.uint8)).mean() - 0.5) < 5 * 0.5 / np.sqrt(
                8 * low.nbytes
            )


def test_sizes_do_not_depend_on_the_keys(tmp_path: Path) -> None:
    low, high = Recorded(tmp_path / "a", LOW), Recorded(tmp_path / "b", HIGH)
    assert [len(x) for x in low.server] == [len(x) for x in high.server]
    assert [len(x) for x in low.helper] == [len(x) for x in high.helper]


def test_nothing_random_comes_twice_in_rounds_and_attempts(tmp_path: Path) -> None:
    world = federate(tmp_path, 5, rounds=3)
    sent: dict[str, list[bytes]] = {}

    def watch(w: World, message: m.Message) -> bool:
        match message:
            case m.HelperOffer():
                parts = {"session": message.offer.session, "point": message.offer.point}
            case m.HelperAnswer():
                parts = {"answer": bytes(message.answer.points)[:32]}
            case m.HelperTables():
                parts = {"seed": message.tables.seed, "row": bytes(message.tables.tables)[:16]}
            case m.KeyShares():
                parts = {"share": bytes(message.share), "box": bytes(message.box)}
            case m.HelperChoices():
                parts = {"columns": bytes(message.choices.columns)[:32]}
            case m.Outcome():
                parts = {"outcome": bytes(message.box)}
            case _:
                return False
        for what, data in parts.items():
            sent.setdefault(what, []).append(data)
        return False

    world.pump(until=lambda w, x: watch(w, x) or isinstance(x, m.HelperTables))
    world.lost.add("c001")  # the first attempt at round 2 aborts
    world.pump(until=watch)
    assert world.run.error is None
    assert len(sent["seed"]) == 3
    for what, values in sent.items():
        assert len(set(values)) == len(values), what


def test_the_helpers_share_of_an_outcome_is_noise_to_everybody_else(tmp_path: Path) -> None:
    """The server's share of the same outcome differs from run to run: it is half of a secret."""
    halves = []
    for i in range(8):
        world = World(tmp_path / str(i), 3, **SECURE)
        world.clock = float(i)
        world.start_server()
        world.toys = {name: Grouped(k, LOW) for k, name in enumerate(names(3))}
        for name in names(3):
            world.join(name)

        def watch(w: World, message: m.Message) -> bool:
            if isinstance(message, m.Outcome):
                halves.append(bytes(message.share))
            return False

        world.pump(until=watch)
    bits = np.unpackbits(np.frombuffer(b"".join(halves), np.uint8))
    assert len(halves) == 24
    assert len(set(halves)) > 12
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))


def test_stages_are_named_in_the_record(tmp_path: Path) -> None:
    """The one that waits for training is called so, whichever frame ends it."""
    world = federate(tmp_path)
    world.pump()
    first, second = ([*r["seconds"]] for r in rounds(world))
    assert first[:5] == ["asking", "keying", "advertising", "sharing", "training"]
    assert second[:5] == ["advertising", "sharing", "training", "evaluating", "collecting"]


def test_errors_reach_no_secret(tmp_path: Path) -> None:
    world = federate(tmp_path)
    world.pump(until=lambda w, x: isinstance(x, m.HelperTables))
    selector = world.run.current._selector  # type: ignore[union-attr]
    for shown in (repr(selector._garbler), repr(world.sessions["c001"]._helper._work.evaluator)):
        assert "private" in shown
    assert issubclass(errors.GarblingError, errors.SelectionError)
