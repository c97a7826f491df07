"""Settings: files, flags, types, help and paths."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from flagged import flags
from rounds import roster

from secure_fedprompt import client, helper
from secure_fedprompt.__main__ import COMMANDS, main
from secure_fedprompt.clients.settings import ClientSettings, PrivacySettings
from secure_fedprompt.host import command
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol.errors import PolicyError
from secure_fedprompt.protocol.layout import TensorSpec
from secure_fedprompt.protocol.settings import FedMGPSettings, MethodSettings
from secure_fedprompt.server.__main__ import main as server_main
from secure_fedprompt.server.planning import RunState, terms_of
from secure_fedprompt.server.settings import ServerSettings, check_roster, check_settings


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


def test_readmes_files_are_good_and_ask_for_everybody() -> None:
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
    assert (terms.quorum, terms.colluders) == (5, 3)
    everybody = terms.sample(1)
    client.policy.check_plan(terms.plan(everybody), 5)
    few = terms.plan(dataclasses.replace(everybody, cohort=everybody.cohort[:4]))
    with pytest.raises(PolicyError, match="a cohort of 4"):
        client.policy.check_plan(few, 5)
    less = dataclasses.replace(terms.plan(everybody), quorum=4)
    with pytest.raises(PolicyError, match=r"quorum 4, but policy\.min_survivors is -1: everybody"):
        client.policy.check_plan(less, 5)


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
