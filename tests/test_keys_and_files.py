"""Key files, rosters, settings: what a user gets wrong, in one line each."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rounds import identity, roster

from secure_fedprompt import client, helper
from secure_fedprompt.__main__ import COMMANDS, main
from secure_fedprompt.clients.journal import FileJournal
from secure_fedprompt.clients.settings import ClientSettings, PrivacySettings
from secure_fedprompt.commands import keys as cli
from secure_fedprompt.host import command, files
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol.keys import Identity, Member, agree, seal, unseal
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.roster import Roster, member_to_toml
from secure_fedprompt.protocol.settings import FedMGPSettings, MethodSettings
from secure_fedprompt.server.__main__ import main as server_main
from secure_fedprompt.server.planning import RunState, terms_of
from secure_fedprompt.server.settings import ServerSettings, check_roster, check_settings


def flags(cls: type, words: list[str]) -> argparse.Namespace:
    parser = command.parser("x", "y", "z")
    command.add_flags(parser, cls)
    return parser.parse_args(words)


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


def test_settings_come_from_the_file_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('key = "a.pem"\nshots = 4\n[policy]\nmin_cohort = 5\nprotections = ["masks"]\n')
    words = ["--config", str(path), "--shots", "8", "--policy-min-survivors", "4", "--no-download",
             "--policy-protections", "masks,none"]  # fmt: skip
    settings = command.load(ClientSettings, flags(ClientSettings, words))
    key = str(tmp_path / "a.pem")  # beside the file
    assert (settings.key, settings.shots, settings.download) == (key, 8, False)
    assert (settings.policy.min_cohort, settings.policy.min_survivors) == (5, 4)
    assert settings.policy.protections == ("masks", "none")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rouds = 3", r"unknown key 'rouds'; did you mean 'rounds'\?"),
        ("rounds = 0", "rounds = 0: expected `int` >= 1"),
        ('rounds = "three"', "rounds = 'three': expected `int`, got `str`"),
        ('protection = "mask"', "protection = 'mask': must be one of masks, bfv, ckks, none"),
        ('[fedmgp]\nmodality = "x"', "fedmgp.modality = 'x': must be one of both, text, vision"),
        ("ring_bits = 40", "ring_bits = 40: expected `int` <= 32"),
        ("rounds = ", "cannot be read"),
    ],
)
def test_config_typos_name_file_key_value_and_remedy(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "server.toml"
    path.write_text(text)
    with pytest.raises(errors.ConfigError, match=words) as caught:
        command.load(ServerSettings, flags(ServerSettings, ["--config", str(path)]))
    assert "server.toml" in str(caught.value)


def test_settings_made_in_code_or_sent_are_held_against_the_same_types() -> None:
    known = "must be one of both, text, vision"
    wrong: Any = FedMGPSettings(modality="x")  # type: ignore[arg-type]
    for made, words in (
        (MethodSettings(fedmgp=wrong), f"^fedmgp.modality = 'x': {known}"),
        (MethodSettings(position="x"), "^position = 'x': must be one of end, middle, front"),  # type: ignore[arg-type]
        (MethodSettings(lr=0.0), "^lr = 0.0: expected `float` > 0.0"),
        (PrivacySettings(kind="x"), "^dp.kind = 'x': must be one of none, sample"),  # type: ignore[arg-type]
    ):
        with pytest.raises(errors.ConfigError, match=words):
            made.check()
    sent = MethodSettings(fedmgp=wrong).to_bytes()
    with pytest.raises(errors.ConfigError, match=f"^the server's settings .* = 'x': {known}"):
        MethodSettings.from_bytes(sent)
    for data in (b"[]", b"{", b"\xff", b"null"):
        with pytest.raises(errors.ConfigError, match="^the server's settings are not understood"):
            MethodSettings.from_bytes(data)


def test_policy_typos_too(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_text("[policy]\nmin_cohrt = 3")
    with pytest.raises(errors.ConfigError, match="'min_cohrt'; did you mean 'min_cohort'"):
        command.load(ClientSettings, flags(ClientSettings, ["--config", str(path)]))
    with pytest.raises(errors.ConfigError, match="does not exist"):
        command.load(ClientSettings, flags(ClientSettings, ["--config", "nowhere.toml"]))


@pytest.mark.parametrize("cls", [ServerSettings, ClientSettings])
def test_every_field_has_a_flag_with_help(cls: type) -> None:
    parser = command.parser("x", "y", "z")
    command.add_flags(parser, cls)
    actions = {a.dest: a for a in parser._actions}
    for name in cls.__struct_fields__:  # type: ignore[attr-defined]
        if name in ("policy", "dp", "fedotp", "fedmgp", "compare"):
            continue
        text = actions[name].help or ""
        assert len(text.split("(default")[0].strip()) > 5, f"--{name} has no help text"


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


def test_paths_of_a_file_belong_to_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started from anywhere, the same file names the same key, data and ledger."""
    folder, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    for made in (folder / "scans", folder / "CIFAR10", elsewhere):
        made.mkdir(parents=True)
    lines = ['key = "k.pem"', 'dataset = "scans"', 'model = "local-dir:clip"', 'class_list = "/c"']
    (folder / "c.toml").write_text("\n".join([*lines, 'pretrained = "w.safetensors"']))
    monkeypatch.chdir(elsewhere)
    words = ["--config", str(folder / "c.toml"), "--roster", "mine.toml"]
    made = command.load(ClientSettings, flags(ClientSettings, words))
    assert made.key == str(folder / "k.pem")
    assert made.state_dir == str(folder / "state" / "{name}")  # a default
    assert made.roster == "mine.toml"  # a flag: where the program is started
    assert made.dataset == str(folder / "scans")
    assert made.model == f"local-dir:{folder / 'clip'}"
    assert made.class_list == "/c"
    assert made.pretrained == str(folder / "w.safetensors")
    for name, meant in (
        ("generated", "generated"), ("DTD", "DTD"), ("CIFAR10", str(folder / "CIFAR10")),
        ("a/b", str(folder / "a/b")), ("x.zip", str(folder / "x.zip")),
    ):  # fmt: skip
        (folder / "c.toml").write_text(f'dataset = "{name}"\nmodel = "ViT-B-16"\n')
        made = command.load(ClientSettings, flags(ClientSettings, words))
        assert (made.dataset, made.model, made.pretrained) == (meant, "ViT-B-16", "")
    for name, meant in (("json", "json"), ("", ""), ("a.jsonl", str(folder / "a.jsonl"))):
        (folder / "c.toml").write_text(f'log = "{name}"')
        assert command.load(ClientSettings, flags(ClientSettings, words)).log == meant
    (folder / "s.toml").write_text('bind = "tcp://127.0.0.1:5570"')
    server = command.load(
        ServerSettings, flags(ServerSettings, ["--config", str(folder / "s.toml")])
    )
    assert server.run_dir == str(folder / "runs" / "{time}")
    monkeypatch.chdir(folder)
    assert (
        command.load(ClientSettings, flags(ClientSettings, ["--config", "c.toml"])).key
        == "client.pem"
    )
    assert command.load(ServerSettings, flags(ServerSettings, [])).run_dir == "runs/{time}"


def test_readmes_files_are_good_and_survive_one_loss() -> None:
    """Those of "On a LAN", read as the programs read them, with five clients on the roster."""
    text = (Path(__file__).parents[1] / "README.md").read_text().partition("## On a LAN")[2]
    blocks = [part.partition("```")[0] for part in text.split("```toml\n")[1:3]]
    server, client = (
        msgspec.convert(tomllib.loads(block), kind)
        for block, kind in zip(blocks, (ServerSettings, ClientSettings), strict=True)
    )
    check_settings(server)
    check_roster(server, roster(5))
    state = RunState(run=b"r" * 16, model_fingerprint=b"m" * 32, classes_digest=b"c" * 32)
    state.tensors = (TensorSpec("ctx", (4, 3)),)
    state.start = state.prompt = np.zeros(12, np.float32)
    terms = terms_of(server, roster(5), state)
    terms.check()
    client.policy.check_terms(terms, 5)
    for cohort in (5, 4):
        chosen = dataclasses.replace(terms.sample(1), cohort=terms.sample(1).cohort[:cohort])
        client.policy.check_plan(terms.plan(chosen), 5)


def test_every_flag_has_a_help_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *args: Any) -> None:
        parsers.append(self)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    programs = [lambda name=name: main([name]) for name in COMMANDS]
    for program in [*programs, client.main, helper.main, server_main]:
        with contextlib.suppress(SystemExit):
            program()
    assert len(parsers) == len(COMMANDS) + 3
    for parser in parsers:
        seen: dict[str, str] = {}
        for action in parser._actions:
            name = action.dest
            text = (action.help or "").partition(" (default")[0].strip()
            assert text, f"{parser.prog} {name} has no help"
            assert text not in seen, f"{parser.prog}: {name} and {seen[text]} share a help"
            seen[text] = name


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
