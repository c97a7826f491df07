"""Runs that begin from a prompt, of a run before or from a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import LONG, Federation
from safetensors.numpy import load_file, save_file

import secure_fedprompt as sfp
from secure_fedprompt.clients.starting import begin_from
from secure_fedprompt.protocol.averaging import prompt_bytes
from secure_fedprompt.protocol.errors import ConfigError, PromptFileError
from secure_fedprompt.protocol.expand import Purpose, digest
from secure_fedprompt.protocol.settings import MethodSettings
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import started

SMALL: dict[str, Any] = {
    "clients": 3, "generated_classes": 4, "per_class": 6, "test_per_class": 3, "styles": "sketch",
    "n_ctx": 2, "init": "a photo", "batch_size": 8, "lr": 0.05, "seed": 1, "threads": 1,
    "progress": False,
}  # fmt: skip


def flat(prompt: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([values.reshape(-1) for values in prompt.values()])


def test_a_run_goes_on_from_the_prompt_of_another(tmp_path: Path) -> None:
    first = sfp.simulate(rounds=2, run_dir=str(tmp_path / "1"), **SMALL)
    second = sfp.simulate(rounds=1, start_prompt=str(tmp_path / "1"), **SMALL)
    assert second.accuracy[0] == first.accuracy[-1]
    assert not np.array_equal(flat(first.prompt), flat(second.prompt))
    fresh = sfp.simulate(rounds=1, **SMALL)
    assert not np.array_equal(flat(fresh.prompt), flat(second.prompt))


def test_what_the_server_names_is_what_the_terms_say(tmp_path: Path) -> None:
    first = sfp.simulate(rounds=1, run_dir=str(tmp_path / "1"), **SMALL)
    settings = started(ServerSettings(start_prompt=str(tmp_path / "1")))
    assert settings.start == digest(Purpose.BASE, prompt_bytes(flat(first.prompt))).hex()
    path = tmp_path / "1" / "prompts" / "global-0001.safetensors"
    assert started(ServerSettings(start_prompt=str(path))).start == settings.start
    assert started(ServerSettings()) == ServerSettings()


def test_what_is_no_prompt_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    for name in ("empty", "missing", "text.safetensors", "other.safetensors"):
        with pytest.raises(PromptFileError, match=f"start_prompt = .*{name}"):
            started(ServerSettings(start_prompt=str(tmp_path / name)))
    with pytest.raises(sfp.SecureFedPromptError, match="the run begins from a prompt that is none"):
        sfp.simulate(rounds=1, start="0" * 64, **SMALL)


def test_a_server_has_to_know_the_prompt_that_it_asks_for(tmp_path: Path) -> None:
    """With a few digits it would be sent whichever prompt of another run begins so."""
    settings = MethodSettings(start="a" * 63)
    with pytest.raises(ConfigError, match="the whole digest, 64 hex digits"):
        settings.check()
    with pytest.raises(ConfigError, match="the whole digest"):
        MethodSettings.from_bytes(settings.to_bytes())
    values, method = np.ones((2, 2), np.float32), Stub()
    save_file({"ctx": values}, tmp_path / "prompt-00000000.safetensors")
    whole = digest(Purpose.BASE, prompt_bytes(values.reshape(-1))).hex()
    with pytest.raises(ConfigError, match="is none of"):
        begin_from(method, whole[:8], [tmp_path])  # type: ignore[arg-type]
    begin_from(method, whole, [tmp_path])  # type: ignore[arg-type]
    assert method.loaded


class Stub:
    """A method with one shared tensor, and a private one."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}
        self.own: dict[str, Any] = {}

    def uploaded(self) -> tuple[Any, ...]:
        return (type("Spec", (), {"name": "ctx", "shape": (2, 2)}),)

    def private(self) -> dict[str, Any]:
        return {"mine": np.zeros(1, np.float32)}

    def load(self, tensors: dict[str, Any]) -> None:
        self.loaded = dict(tensors)

    def restore(self, tensors: dict[str, Any]) -> None:
        self.own = dict(tensors)


def test_the_file_with_that_digest_is_found_with_its_private_part(tmp_path: Path) -> None:
    prompts = [np.full((2, 2), i, np.float32) for i in range(3)]
    for i, values in enumerate(prompts):
        save_file(
            {"ctx": values, "private.mine": np.full(1, i, np.float32)},
            tmp_path / f"prompt-{i:08x}.safetensors",
        )
    save_file({"ctx": np.ones(4, np.float32)}, tmp_path / "prompt-ffffffff.safetensors")
    (tmp_path / "prompt-eeeeeeee.safetensors").write_text("damaged")
    wanted = digest(Purpose.BASE, prompt_bytes(prompts[1].reshape(-1))).hex()
    method: Any = Stub()
    begin_from(method, wanted, [tmp_path / "nothing.safetensors", tmp_path])
    assert np.array_equal(method.loaded["ctx"], prompts[1])
    assert method.own == {"mine": np.ones(1, np.float32)}
    with pytest.raises(ConfigError, match="is none of .*prompt-eeeeeeee"):
        begin_from(method, "0" * 64, [tmp_path])
    with pytest.raises(ConfigError, match="no prompt file here"):
        begin_from(method, "0" * 64, [])


@pytest.mark.slow
def test_programs_go_on_from_where_a_run_ended(tmp_path: Path) -> None:
    """Each client finds the prompt in its own folder, and asks its operator first."""
    federation = Federation(tmp_path, 3, rounds=1)
    try:
        for i in range(4):
            federation.start(i)
        assert [federation.started[federation.name(i)].wait(LONG) for i in range(4)] == [0] * 4
        server = federation.folder / "server"
        more = ("--run-dir", str(server / "more"), "--start-prompt", str(server / "run"))
        federation.start(0, *more)
        words = {}
        for i in (1, 2, 3):
            federation.start(i)
        for i in (1, 2, 3):
            name = federation.name(i)
            federation.wait_for(name, "--accept")
            (words[i],) = set(re.findall(r"--accept ([0-9a-f]{16})", federation.log(name)))
            federation.started[name].kill()
            federation.started[name].wait()
        assert len(set(words.values())) == 1
        for i, word in words.items():
            federation.start(i, "--accept", word)
        assert [federation.started[federation.name(i)].wait(2 * LONG) for i in range(4)] == [0] * 4
    finally:
        federation.stop()
    ends = [server / "run" / "prompts" / "global-0001.safetensors",
            server / "more" / "prompts" / "global-0000.safetensors"]  # fmt: skip
    last, first = (load_file(path) for path in ends)
    assert last.keys() == first.keys()
    assert all(np.array_equal(last[name], first[name]) for name in last)
