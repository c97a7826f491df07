"""README and docs: their links lead somewhere, and their commands are ones that exist."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secure_fedprompt import client, helper
from secure_fedprompt.__main__ import main
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.server.__main__ import main as server_main
from secure_fedprompt.server.settings import ServerSettings

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PROGRAMS = {"server": server_main, "client": client.main, "helper": helper.main}


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split(" #")[0].strip()
                for part in words.split(" && "):
                    if part.startswith(("secure-fedprompt ", "python -m secure_fedprompt")):
                        yield page.name, part


class Parsed(Exception):
    """The flags were understood."""


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_every_command_is_understood(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, *args: Any) -> None:
        parse(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    words = shlex.split(line)
    if words[0] == "python":
        program, rest = PROGRAMS[words[2].rpartition(".")[2]], words[3:]
    else:
        program, rest = main, words[1:]
    if rest[:1] == ["--help"]:
        assert program(rest) == 0
        return
    with pytest.raises(Parsed):
        program(rest)


def test_there_are_commands() -> None:
    found = [line for _, line in commands()]
    assert len(found) > 25
    assert len({line.split()[1] for line in found}) > 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor and not path.endswith(".json"):  # those of figures: test_bench.py
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            names = [re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in names, f"{page.name}: {target}"


def test_the_readme_can_be_read_first() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_the_service_is_one_that_systemd_takes(tmp_path: Path) -> None:
    """And its sandbox leaves little: under 3 of 10 by systemd's own count."""
    (unit,) = re.findall(r"```ini\n(.*?)```", (ROOT / "docs/deployment.md").read_text(), re.DOTALL)
    path = tmp_path / "fedprompt-client.service"
    path.write_text(unit.replace("/opt/fedprompt/.venv/bin/python", sys.executable))
    words = ["systemd-analyze", "verify", "--man=no", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if path.name in line]
    assert not said
    words = ["systemd-analyze", "security", "--offline=yes", "--threshold=30", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:]


def test_the_containers_run_programs_with_flags_that_exist() -> None:
    """There is no container engine here: what can be read of them is."""
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "deploy/Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"pip install '\.\[(.*?)\]'", text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert re.findall(r'ENTRYPOINT \["(.*?)"\]', text) == list(project["scripts"])
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    kinds = {"server": ServerSettings, "client": ClientSettings}
    assert set(compose["services"]) == set(kinds)
    for name, service in compose["services"].items():
        assert service["entrypoint"] == ["python", "-m", f"secure_fedprompt.{name}"]
        flags = [word[2:].replace("-", "_") for word in service["command"] if word[:2] == "--"]
        assert set(flags) - {"config"} <= set(kinds[name].__struct_fields__)
        assert (
            ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]
        ).exists()
        named = {volume.split(":")[0] for volume in service["volumes"] if volume[0] != "."}
        assert named <= set(compose["volumes"])
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
