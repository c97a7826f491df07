"""A method of another package: twenty lines, found by its entry point, and only where it may be."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.host import command, plugins
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol.methods import METHODS, method_facts
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.server.settings import ServerSettings

TRAINER = '''\
import torch
from torch import nn

from secure_fedprompt.clients.methods.base import Method, parameter


class Bias(Method):
    """Zero-shot logits and a bias for each class: shared, with a scale that stays at home."""

    name = "bias"

    def __init__(self, settings, backbone, class_names):
        self.backbone, self.text = backbone, backbone.zero_shot_features(class_names)
        self.shared = {"bias": parameter(torch.zeros(len(class_names)), backbone)}
        self.own = {"scale": parameter(torch.ones(1), backbone)}

    def logits(self, batch):
        cosine = self.backbone.scale * batch.images @ self.text.T
        return self.own["scale"] * cosine + self.shared["bias"]
'''
FACTS = (
    "from secure_fedprompt.protocol.methods import MethodFacts\n"
    'FACTS = MethodFacts("bias", "bias_trainer:Bias", "an example")\n'
)


def package(folder: Path, points: str = "bias = bias_method:FACTS") -> Path:
    """Install a package with this entry point, as a wheel, by pip, into a folder of its own."""
    wheel, info = folder / "bias_method-0.1-py3-none-any.whl", "bias_method-0.1.dist-info"
    files = {
        "bias_trainer.py": TRAINER,
        "bias_method.py": FACTS,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: bias-method\nVersion: 0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[{plugins.GROUP}]\n{points}\n",
    }
    with zipfile.ZipFile(wheel, "w") as packed:
        for name, text in files.items():
            packed.writestr(name, text)
        packed.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in files))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target",
         str(folder / "site"), str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(tmp_path_factory.mktemp("bias"))


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(site))
    yield site
    METHODS.pop("bias", None)
    for name in ("bias_method", "bias_trainer"):
        sys.modules.pop(name, None)


def load(cls: type, *words: str) -> object:
    parser = argparse.ArgumentParser()
    command.add_flags(parser, cls)
    return command.load(cls, parser.parse_args(words))


def test_the_smallest_method_has_twenty_lines() -> None:
    assert len(TRAINER.splitlines()) <= 20


@pytest.mark.usefixtures("installed")
def test_a_server_finds_it_by_name_without_its_trainer() -> None:
    made = load(ServerSettings, "--method", "bias")
    assert isinstance(made, ServerSettings)
    made.check()
    assert method_facts("bias").weighted
    assert "bias_trainer" not in sys.modules  # and so no torch


@pytest.mark.usefixtures("installed")
def test_a_client_imports_it_only_if_its_policy_names_it() -> None:
    data = MethodSettings(method="bias").to_bytes()
    load(ClientSettings)
    with pytest.raises(errors.ConfigError, match="not understood: method = 'bias': must be one of"):
        MethodSettings.from_bytes(data)
    with pytest.raises(errors.ConfigError, match="method = 'bias'"):
        load(ClientSettings, "--method", "bias")
    assert "bias_method" not in sys.modules
    load(ClientSettings, "--policy-methods", "promptfl,bias")
    assert MethodSettings.from_bytes(data).method == "bias"


def test_what_is_no_method_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = "odd = bias_method:NOTHING\nwrong = bias_method:FACTS\nlost = no_such_module:FACTS"
    monkeypatch.syspath_prepend(str(package(tmp_path, points)))
    for name, says in (
        ("odd", "bias_method:NOTHING cannot be imported"),
        ("wrong", "must be a MethodFacts of that name"),
        ("lost", "no_such_module:FACTS cannot be imported"),
        ("none", "must be one of promptfl"),
    ):
        with pytest.raises(errors.ConfigError, match=f"method = '{name}': .*{says}"):
            load(ServerSettings, "--method", name)
    assert not {"odd", "wrong", "lost", "none"} & set(METHODS)
    sys.modules.pop("bias_method", None)


@pytest.mark.slow
def test_it_runs_as_processes_and_in_memory(installed: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(installed)}
    for words in (
        ["demo", "--method", "bias", "--rounds", "2", "--run-dir", "d"],
        ["simulate", "--method", "bias", "--parts", "4", "--rounds", "2", "--per-class", "8"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "secure_fedprompt", *words, "--json", "r.json"],
            cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads((tmp_path / "r.json").read_text())
        assert result["method"] == "bias"
        assert [r["outcome"] for r in result["rounds"]] == ["done"] * 3
    (prompt,) = (tmp_path / "d" / "alice" / "state").glob("prompt-*.safetensors")
    images = [str(p) for p in sorted((tmp_path / "d" / "samples").iterdir())]
    done = subprocess.run(
        [sys.executable, "-m", "secure_fedprompt", "predict", str(prompt), *images],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
