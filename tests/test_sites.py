"""From an invitation to files that a federation starts with, and what is refused on the way."""

from __future__ import annotations

import io
import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secure_fedprompt.__main__ import main
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.commands import sites
from secure_fedprompt.host import command, files
from secure_fedprompt.protocol.keys import spoken
from secure_fedprompt.protocol.policy import Policy
from secure_fedprompt.server.settings import ServerSettings, check_roster

ADDRESS = "tcp://192.0.2.10:5571"


def started(folder: Path, *more: str) -> Path:
    out = folder / "server"
    assert main(["init", "--address", ADDRESS, "--clients", "5", "--out", str(out), *more]) == 0
    return out


def loaded(cls: Any, path: Path) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_flags(parser, cls)
    return command.load(cls, parser.parse_args(["--config", str(path)]))


def test_what_is_written_is_what_the_programs_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = started(tmp_path, "--method", "fedmgp", "--rounds", "3")
    assert stat.S_IMODE((server / "server.pem").stat().st_mode) == 0o600
    entries = []
    for name in ("alice", "bob", "carol", "dave", "erin"):
        out = tmp_path / name
        assert (
            main(
                [
                    "join",
                    str(server / "invitation.toml"),
                    "--name",
                    name,
                    "--dataset",
                    "scans/",
                    "--model",
                    "ViT-B-16",
                    "--pretrained",
                    "openai",
                    "--out",
                    str(out),
                ]
            )
            == 0
        )
        entries.append(str(out / f"{name}.entry.toml"))
    capsys.readouterr()
    assert main(["admit", *entries, "--roster", str(server / "roster.toml")]) == 0
    said = capsys.readouterr().out
    roster = files.read_roster(str(server / "roster.toml"))
    assert len(roster.members) == 6
    for member in roster.with_role("client"):
        assert f"{member.name:20} {spoken(member.identity)}" in said
    assert f"5 clients, {spoken(roster.digest)}" in said
    made = loaded(ServerSettings, server / "server.toml")
    assert (made.method, made.rounds, made.clients, made.threshold) == ("fedmgp", 3, 5, -1)
    assert made.bind == "tcp://0.0.0.0:5571"
    check_roster(made, roster)
    client = loaded(ClientSettings, tmp_path / "alice" / "client.toml")
    assert client.server == ADDRESS
    assert (client.model, client.pretrained) == ("ViT-B-16", "openai")
    assert client.policy == Policy(
        protections=("masks",), methods=("fedmgp",), min_cohort=5, min_survivors=-1
    )
    identity, _, me, other = files.whoami(client.key, str(server / "roster.toml"), "client")
    assert me.identity == identity.public()
    assert other.name == "server"
    assert main(["admit", *entries, "--roster", str(server / "roster.toml")]) == 0  # once more
    assert len(files.read_roster(str(server / "roster.toml")).members) == 6


def test_every_key_of_the_policy_is_spelled_out_and_explained(tmp_path: Path) -> None:
    server = started(tmp_path)
    assert (
        main(
            [
                "join",
                str(server / "invitation.toml"),
                "--name",
                "alice",
                "--dataset",
                "x/",
                "--out",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    text = (tmp_path / "a" / "client.toml").read_text().partition("[policy]\n")[2]
    for name in Policy.__struct_fields__:
        blocks = [
            block
            for block in text.split("\n\n")
            if f"\n{name} = " in block or f"\n# {name} = " in block
        ]
        assert len(blocks) == 1, name
        assert blocks[0].startswith("# "), name
    assert "\n# colluders = -1\n" in text
    assert "\nmin_cohort = 5\n" in text
    # Without the comment signs it says the same: defaults are what is commented out.
    lines = [line.removeprefix("# ") if " = " in line and line.startswith("# ") and
             line[2:].split(" = ")[0] in Policy.__struct_fields__ else line
             for line in (tmp_path / "a" / "client.toml").read_text().splitlines()]  # fmt: skip
    (tmp_path / "a" / "all.toml").write_text("\n".join(lines))
    whole, short = (loaded(ClientSettings, tmp_path / "a" / f"{n}.toml") for n in ("all", "client"))
    assert whole.policy == short.policy


@pytest.mark.parametrize(
    ("words", "threshold", "quorum", "says"),
    [("--clients 5", -1, 5, "5 of 5 sites: no site can be told"),
     ("--clients 5 --missing 1", 0, 4, "4 of 5 sites: a round goes on without 1"),
     ("--clients 10", -1, 10, "10 of 10 sites: no site"),
     ("--clients 11", 0, 8, "8 of 11 sites: a round goes on without 3"),
     ("--clients 11 --missing 2", 9, 9, "9 of 11 sites"),
     ("--clients 5 --protection bfv", 0, 4, "4 of 5 sites")],
)  # fmt: skip
def test_few_sites_are_all_in_every_sum_unless_told_otherwise(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    threshold: int,
    quorum: int,
    says: str,
) -> None:
    server = started(tmp_path, *words.split())
    assert f"quorum        {says}" in capsys.readouterr().out
    assert loaded(ServerSettings, server / "server.toml").threshold == threshold
    invitation, _ = sites.read_invitation(server / "invitation.toml")
    assert invitation.quorum == quorum
    join = ["join", str(server / "invitation.toml"), "--name", "a", "--dataset", "x"]
    told = [*words.split()[2:], *(["--missing", "9"] if "11" in words else [])]
    assert main([*join, *told, "--out", str(tmp_path / "a")]) == 0
    policy = loaded(ClientSettings, tmp_path / "a" / "client.toml").policy
    assert policy.min_survivors == (-1 if threshold == -1 else quorum)


def test_other_protections_are_a_sites_own_word(tmp_path: Path) -> None:
    server = started(tmp_path, "--protection", "bfv")
    words = ["join", str(server / "invitation.toml"), "--name", "a", "--dataset", "x",
             "--out", str(tmp_path / "a")]  # fmt: skip
    assert main(words) == 2
    assert not (tmp_path / "a").exists()
    assert main([*words, "--protection", "bfv"]) == 0
    assert loaded(ClientSettings, tmp_path / "a" / "client.toml").policy.protections == ("bfv",)


def test_the_server_of_an_invitation_is_the_one_of_its_roster(tmp_path: Path) -> None:
    server = started(tmp_path)
    invitation, member = sites.read_invitation(server / "invitation.toml")
    assert invitation.server == ADDRESS
    assert files.read_roster(str(server / "roster.toml")).members == (member,)
    assert b"PRIVATE" not in (server / "invitation.toml").read_bytes()


@given(st.binary(min_size=32, max_size=32), st.integers(0, 79))
def test_words_differ_in_every_bit_that_they_stand_for(public: bytes, bit: int) -> None:
    import hashlib

    said = spoken(public)
    assert [len(word) for word in said.split("-")] == [5] * 5
    value = int.from_bytes(hashlib.sha256(public).digest()[:10], "big")
    back = 0
    for word in said.split("-"):
        for letters, letter in zip(("bdfghjklmnprstvz", "aiou") * 2 + ("bdfghjklmnprstvz",), word,
                                   strict=True):  # fmt: skip
            back = back * len(letters) + letters.index(letter)
    assert back == value


def test_a_number_is_said_as_its_source_has_it() -> None:
    """127.0.0.1 is lusab-babad in Wilkerson's paper."""
    from secure_fedprompt.protocol import keys

    class Known:
        @staticmethod
        def sha256(_: bytes) -> Any:
            return type("H", (), {"digest": lambda self: bytes((127, 0, 0, 1)) + bytes(28)})()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "hashlib", Known)
        assert keys.spoken(b"").startswith("lusab-babad-babab")


WRONG: dict[str, tuple[list[str], str]] = {
    "no address": (["init", "--clients", "5"], "--address: give it"),
    "no clients": (["init", "--address", ADDRESS], "--clients: give it"),
    "address": (["init", "--address", "http://x", "--clients", "5"], "tcp://HOST:PORT"),
    "port": (["init", "--address", "tcp://x:99999", "--clients", "5"], "tcp://HOST:PORT"),
    "two": (["init", "--address", ADDRESS, "--clients", "2"], "at least 3"),
    "missing": (["init", "--address", ADDRESS, "--clients", "5", "--missing", "2"], "0 to 1 of 5"),
    "less": (["init", "--address", ADDRESS, "--clients", "5", "--missing", "-1"], "0 to 1 of 5"),
    "method": (["init", "--address", ADDRESS, "--clients", "5", "--method", "x"], "method = 'x'"),
    "no file": (["join", "nowhere.toml", "--name", "a", "--dataset", "x"], "cannot be read"),
    "no name": (["join", "server/invitation.toml", "--dataset", "x"], "--name: give it"),
    "bad name": (["join", "server/invitation.toml", "--name", "a b", "--dataset", "x"], "name 'a b'"),
    "no toml": (["join", "bad.toml", "--name", "a", "--dataset", "x"], "is no invitation"),
    "a roster": (["join", "server/roster.toml", "--name", "a", "--dataset", "x"], "is no invitation"),
    "fewer": (
        ["join", "fewer.toml", "--name", "a", "--dataset", "x"],
        "lets sums do without 1 of 5 sites, whose updates can be told by that; this site agrees to 0"),
    "lone": (["join", "lone.toml", "--name", "a", "--dataset", "x"], "threshold = 3 of 5 clients"),
    "altered": (["join", "altered.toml", "--name", "a", "--dataset", "x"], "does not verify"),
    "a client": (["join", "of-client.toml", "--name", "a", "--dataset", "x"], "must name one member"),
    "no protection": (
        ["join", "open.toml", "--name", "a", "--dataset", "x"], "no protection: the server sees every"),
    "brackets": (["init", "--address", "tcp://[x", "--clients", "5"], "tcp://HOST:PORT"),
    "no roster": (["admit", "server/server.entry.toml"], "no such file"),
    "another server": (
        ["admit", "other/server.entry.toml", "--roster", "server/roster.toml"], "a roster names one"),
    "again": (["init", "--address", ADDRESS, "--clients", "5", "--out", "server"], "exists"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("never asked\n"))
    started(tmp_path)
    text = Path("server/invitation.toml").read_text()
    Path("bad.toml").write_text("a = [")
    Path("open.toml").write_text(text.replace('protection = "masks"', 'protection = "none"'))
    Path("fewer.toml").write_text(text.replace("threshold = -1\n", ""))
    Path("lone.toml").write_text(text.replace("threshold = -1", "threshold = 3"))
    Path("altered.toml").write_text(text.replace('name = "server"', 'name = "sorver"'))
    main(["keygen", "--name", "server", "--role", "server", "--out", "other"])
    main(["keygen", "--name", "alice"])
    head = text.partition("[[member]]")[0]
    Path("of-client.toml").write_text(head + Path("alice.entry.toml").read_text())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    words, expected = WRONG[case]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert len(said.strip().splitlines()) == 1
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("name", ["server.toml", "roster.toml", "invitation.toml"])
def test_nothing_is_written_over(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    assert main(["init", "--address", ADDRESS, "--clients", "5", "--out", str(tmp_path)]) == 2
    assert f"{name} exists" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}


def test_at_a_terminal_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"{ADDRESS}\n4\n"))
    assert main(["init", "--out", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    assert loaded(ServerSettings, tmp_path / "server.toml").clients == 4
    (row,) = json.loads((tmp_path / "out.json").read_text())["members"]
    assert row["spoken"] == spoken(
        files.read_roster(str(tmp_path / "roster.toml")).members[0].identity
    )
    monkeypatch.setattr(sys, "stdin", Terminal("many\n"))
    assert main(["init", "--address", ADDRESS, "--out", str(tmp_path / "b")]) == 2
