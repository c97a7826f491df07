"""Key files, rosters, settings: what a user gets wrong, in one line each."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from flagged import flags
from hypothesis import given
from hypothesis import strategies as st
from rounds import identity, roster

from secure_fedprompt.__main__ import COMMANDS, main
from secure_fedprompt.clients.file_journal import FileJournal
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.commands import keys as cli
from secure_fedprompt.host import command, files
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol.keys import Identity, Member, agree, seal, spoken, unseal
from secure_fedprompt.protocol.roster import Roster, member_to_toml
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.server.settings import ServerSettings


def test_keygen_writes_a_private_key_and_a_public_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keygen", "--name", "alice", "--out", str(tmp_path)]) == 0
    key, entry = tmp_path / "alice.pem", tmp_path / "alice.entry.toml"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    made = files.read_identity(str(key))
    (member,) = Roster.from_toml(entry.read_text(), "entry").members
    assert (member.identity, member.curve) == (made.public(), made.curve_public())
    shown = capsys.readouterr().out
    private = made.signing.private_bytes_raw().hex()
    assert private not in shown + entry.read_text()
    assert "PRIVATE" not in shown
    assert main(["keygen", "--name", "alice", "--out", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert files.read_identity(str(key)).public() == made.public()  # nothing was lost


def test_identity_prints_nothing() -> None:
    made = Identity.generate()
    assert repr(made) == str(made) == "Identity(<private>)"


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda p: p.unlink(), "no such file; make one with"),
        (lambda p: p.chmod(0o644), "open to others.*0644.*chmod 600"),
        (lambda p: p.write_bytes(b"hello"), "holds no private key: name NAME.pem, not the public"),
        (lambda p: p.write_bytes(p.read_bytes()[: len(p.read_bytes()) // 2]), "does not hold"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"MC4C", b"MC4D")), "cannot be read"),
    ],
)
def test_bad_key_files(tmp_path: Path, prepare: object, words: str) -> None:
    cli.make_key("bob", "client", tmp_path)
    path = tmp_path / "bob.pem"
    prepare(path)  # type: ignore[operator]
    with pytest.raises(errors.KeyFileError, match=words):
        files.read_identity(str(path))


def test_roster_add_list_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.chdir(tmp_path)
    for name, role in (("server", "server"), ("alice", "client"), ("bob", "client")):
        cli.make_key(name, role, tmp_path)
    assert main(["roster", "add", "server.entry.toml", "alice.entry.toml"]) == 0
    assert main(["roster", "add", "bob.entry.toml"]) == 0
    assert main(["roster", "check"]) == 0
    assert [m.name for m in files.read_roster("roster.toml").members] == [
        "alice",
        "bob",
        "server",
    ]
    before = Path("roster.toml").read_text()
    capsys.readouterr()
    assert main(["roster", "list"]) == 0
    words = spoken(files.read_roster("roster.toml").digest)
    assert f"(3 members, signatures good)  {words}" in capsys.readouterr().out
    assert main(["roster", "add", "bob.entry.toml"]) == 0
    assert "bob is on roster.toml already, with this very key" in capsys.readouterr().out
    assert Path("roster.toml").read_text() == before
    (tmp_path / "other").mkdir()
    cli.make_key("bob", "client", tmp_path / "other")
    assert main(["roster", "add", "other/bob.entry.toml"]) == 2  # the name, with another key
    assert "another key: if that is lost, take it off first ('secure-fed" in capsys.readouterr().err
    assert Path("roster.toml").read_text() == before
    assert main(["roster", "remove", "carol"]) == 2
    assert "'carol' is not on roster.toml, which has alice, bob" in capsys.readouterr().err
    assert main(["roster", "remove"]) == 2
    assert main(["roster", "remove", "bob"]) == 0
    assert [m.name for m in files.read_roster("roster.toml").members] == ["alice", "server"]


def test_json_can_go_to_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["keygen", "--name", "alice", "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["name"] == "alice"
    assert "fingerprint" in printed.err
    assert main(["keygen", "--name", "bob", "--json", "no/where.json"]) == 2
    assert "--json no/where.json: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--method", "fedmgq"], "method = 'fedmgq': must be one of .*; did you mean 'fedmgp'"),
     (["--model-fingerprint", "xyz"], "model_fingerprint = 'xyz'")],
)  # fmt: skip
def test_names_of_methods_are_those_that_exist(words: list[str], says: str) -> None:
    with pytest.raises(errors.ConfigError, match=says):
        command.load(ServerSettings, flags(ServerSettings, words))


def test_a_key_of_a_table_is_sent_there(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("min_cohort = 4")
    with pytest.raises(
        errors.ConfigError, match=r"'min_cohort'; it belongs into the table \[policy\]"
    ):
        command.load(ClientSettings, flags(ClientSettings, ["--config", str(path)]))


def test_files_with_a_method_of_no_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('method = "fedmpg"')
    with pytest.raises(errors.ConfigError, match="method = 'fedmpg': must be one of promptfl, "):
        command.load(ServerSettings, flags(ServerSettings, ["--config", str(path)]))


def test_roster_entries_are_bound_by_their_signature() -> None:
    members = roster(3).members
    text = "".join(member_to_toml(member) for member in members)
    assert Roster.from_toml(text, "r").digest == roster(3).digest
    promoted = text.replace('name = "c002"\nrole = "client"', 'name = "c002"\nrole = "server"')
    with pytest.raises(errors.RosterError, match="c002.*does not verify"):
        Roster.from_toml(promoted, "r")
    with pytest.raises(errors.RosterError, match="role 'admin'"):
        Roster.from_toml(text.replace('role = "client"', 'role = "admin"', 1), "r")
    with pytest.raises(errors.RosterError, match="not 32 bytes"):
        Roster.from_toml(text.replace('curve = "', 'curve = "AA', 1), "r")
    with pytest.raises(errors.RosterError, match="lacks or does not know"):
        Roster.from_toml(text.replace('role = "client"\n', "", 1), "r")
    with pytest.raises(errors.RosterError, match="not TOML"):
        Roster.from_toml("[[member", "r")
    with pytest.raises(errors.RosterError, match=r"name '\.\./x'"):
        Roster.of((Member.of(identity("x"), "../x", "client"),))


def test_a_copied_entry_under_another_name_is_refused() -> None:
    twin = Member.of(identity("c001"), "mallory", "client")
    with pytest.raises(errors.RosterError, match="same identity"):
        roster(3).add(twin)


@given(st.text(max_size=300))
def test_any_text_as_a_roster_is_a_roster_error_or_empty(text: str) -> None:
    try:
        assert Roster.from_toml(text, "x").members == ()
    except errors.RosterError as error:
        assert "x" in str(error)


def test_seals_open_only_under_key_and_context() -> None:
    a, b = Identity.generate().curve, Identity.generate().curve
    key = agree(a, b.public_key().public_bytes_raw(), "b")
    assert key == agree(b, a.public_key().public_bytes_raw(), "a")
    box = seal(key, b"share", b"run1")
    assert unseal(key, box, b"run1", "a") == b"share"
    for other in ((bytes(32), box, b"run1"), (key, box[:-1], b"run1"), (key, box, b"run2")):
        with pytest.raises(errors.SealError, match="sealed by a"):
            unseal(*other, "a")
    with pytest.raises(errors.SealError, match="not a usable curve point"):
        agree(a, bytes(32), "mallory")


def test_method_settings_are_canonical_and_closed() -> None:
    settings = MethodSettings(lr=0.5)
    assert MethodSettings.from_bytes(settings.to_bytes()) == settings
    with pytest.raises(errors.ConfigError, match="not understood"):
        MethodSettings.from_bytes(b'{"method":"promptfl","surprise":1}')


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_unknown_command_and_error_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dmeo"]) == 2
    assert "unknown command 'dmeo'" in capsys.readouterr().err
    assert main(["roster", "list", "--roster", "nowhere.toml"]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("RosterError: roster = 'nowhere.toml'")
    assert captured.count("\n") == 1


def test_exit_codes_are_those_of_the_tree() -> None:
    """The tree in the docstring and the classes agree."""
    tree = errors.__doc__ or ""
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, errors.SecureFedPromptError):
            assert name in tree, f"{name} is missing in the tree"
    assert errors.NotOnRosterError.exit_code == 4
    assert errors.WrongServerKeyError.exit_code == 5
    assert errors.UnreachableError.exit_code == 3


def test_check_does_not_disturb_a_client_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    members = (
        cli.make_key("server", "server", tmp_path),
        cli.make_key("alice", "client", tmp_path),
    )
    Path("roster.toml").write_text(Roster.of(members).to_toml())
    words = ["check", "--key", "alice.pem", "--per-class", "1", "--test-per-class", "1",
             "--patience", "0.5"]  # fmt: skip
    with contextlib.closing(FileJournal(tmp_path / "state" / "alice" / "journal.jsonl")):
        assert main(words) == 0
        assert "alice runs now" in " ".join(capsys.readouterr().out.split())
    assert main(words) == 3  # nobody is there


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--policy-client-delta", "1"), ("--policy-client-delta", "0"), ("--policy-min-noise", "-1"),
     ("--policy-max-client-epsilon", "-2"), ("--policy-noise-colluders", "-2")],
)  # fmt: skip
def test_policies_that_mean_nothing_are_refused(flag: str, value: str) -> None:
    key = flag.removeprefix("--policy-").replace("-", "_")
    with pytest.raises(errors.ConfigError, match=rf"policy\.{key} = "):
        command.load(ClientSettings, flags(ClientSettings, [flag, value]))


def test_a_process_with_a_key_leaves_no_dump_and_shows_no_memory(tmp_path: Path) -> None:
    cli.make_key("alice", "client", tmp_path)
    ask = (
        "import ctypes, resource, sys; from secure_fedprompt.host.files import read_identity\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)\n"
        "read_identity(sys.argv[1])\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE)[0], ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    words = [sys.executable, "-c", ask, str(tmp_path / "alice.pem")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0" if sys.platform == "linux" else "-1"]
