"""Members join, leave and change their keys while a run goes on."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from federation import World
from programs import LONG, Federation
from rounds import names

from secure_fedprompt.audit.command import main as audit
from secure_fedprompt.host.files import make_key, read_roster
from secure_fedprompt.protocol.roster import Roster
from secure_fedprompt.server.reload import Reload


def write(path: Path, roster: Roster) -> None:
    """As an operator copies a file: at once."""
    partial = path.with_suffix(".new")
    partial.write_text(roster.to_toml())
    partial.replace(path)


@pytest.mark.slow
def test_members_come_and_go_while_programs_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dave joins, then leaves; Bob's key is another one from then on."""
    federation = Federation(tmp_path, 4, rounds=8, audit="full", lr=0.001, upload_after=1.0)
    folder = federation.folder
    places = sorted(folder.rglob("roster.toml"))
    everybody = read_roster(str(places[0]))
    order = {federation.name(i): i for i in range(5)}
    first, *others = sorted(set(order) - {"server"})
    last = others[-1]
    without = Roster(tuple(x for x in everybody.members if x.name != last))
    for place in places:
        write(place, without)
    config = folder / "server" / "server.toml"
    lines = [x for x in config.read_text().splitlines() if not x.startswith("clients")]
    config.write_text("\n".join(lines) + "\n")
    try:
        for name, i in order.items():
            if name != last:
                federation.start(i)
        federation.wait_for("server", "round 1/8")
        for place in places:
            write(place, everybody)
        federation.started["server"].send_signal(signal.SIGHUP)
        federation.start(order[last])
        federation.wait_for("server", "going on with the changed roster")
        federation.wait_for(first, "going on with the changed")
        federation.wait_for("server", "4 clients in")
        again = folder / "again"
        again.mkdir()
        moved = make_key(first, "client", again)
        changed = Roster(tuple(
            moved if x.name == first else x for x in everybody.members if x.name != last
        ))  # fmt: skip
        for place in places:
            write(place, changed)
        federation.started[first].kill()
        federation.started[first].wait()
        key = next((folder / first).glob("*.pem"))
        shutil.copy(again / f"{first}.pem", key)
        federation.started["server"].send_signal(signal.SIGHUP)
        federation.wait_for("server", "resuming 3 clients")
        federation.start(order[first])
        codes = {name: federation.started[name].wait(LONG) for name in order}
    finally:
        federation.stop()
    assert codes.pop(last) in (4, 7)
    assert set(codes.values()) == {0}, codes
    sizes = [len(row["cohort"]) for row in federation.rounds() if row["outcome"] == "done"]
    assert sizes[0] == 3
    assert 4 in sizes
    assert sizes[-1] == 3
    ends = [f"--peer={folder / name / 'state'}" for name in (first, *others)]
    assert audit([str(folder / "server" / "run"), *ends]) == 0
    assert f"{first} has another key from here on" in capsys.readouterr().out


class Words:
    """What a server's operator reads."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def info(self, event: str, text: str, **_: object) -> None:
        self.said.append(text)

    error = warning = debug = info


def test_a_roster_that_a_run_cannot_go_on_with_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, 5, rounds=3)
    for name in names(5):
        world.join(name)
    path, log = tmp_path / "roster.toml", Words()
    path.write_text(world.run.roster.to_toml())
    settings = world.run.settings
    given = type(settings)(**{
        **{name: getattr(settings, name) for name in settings.__struct_fields__},
        "roster": str(path),
    })  # fmt: skip
    asked = Reload(given, lambda: given, log)  # type: ignore[arg-type]
    asked.look(world.run)
    assert log.said == []
    for text, words in (
        (world.run.roster.to_toml(), "as it was"),
        ("no toml", "the run goes on as it was: roster"),
        (Roster(world.run.roster.members[:3]).to_toml(), "the run goes on as it was"),
    ):
        path.write_text(text)
        asked._ask()
        asked.look(world.run)
        assert words in log.said.pop()
        assert not world.run.pausing
