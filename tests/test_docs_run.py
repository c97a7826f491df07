"""README and docs, executed: every command of every page, and the README's own files.

What a page says of a real deployment is changed in three places: addresses are of this machine, the
model is the bundled one, and the run has two rounds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_docs import ROOT, commands

from secure_fedprompt.clients.data import sets
from secure_fedprompt.commands.demo_files import free_port

SITES = ("alice", "bob", "carol", "dave", "erin")
LONG = 300.0
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
       "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
HERE = {
    " --model ViT-B-16 --pretrained openai": "",
    'model = "ViT-B-16"': "",
    'pretrained = "openai"': "",
    "rounds = 10 ": "rounds = 2 ",
}


def here(text: str) -> str:
    """A page's words, for this machine."""
    for said, meant in HERE.items():
        text = text.replace(said, meant)
    return text


def shell(line: str, folder: Path) -> str:
    """Run a line as a reader of the page would."""
    done = subprocess.run(
        here(line), shell=True, cwd=folder, env=ENV, text=True, timeout=LONG, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}"
    return done.stdout


class Reader:
    """Finds the commands of the pages, and notes which were run."""

    def __init__(self) -> None:
        self.left = {line for _, line in commands()}
        self.left -= {line for line in self.left if line.endswith(("--help", "demo"))}

    def line(self, *words: str) -> str:
        """The one command that begins, or goes on, with these words."""
        (found,) = [x for x in sorted(self.left) if all(word in x for word in words)]
        self.left.remove(found)
        return found

    def lines(self, start: str) -> Iterator[str]:
        for found in sorted(x for x in self.left if x.startswith(start)):
            self.left.remove(found)
            yield found


def pictures(folder: Path, seed: int) -> None:
    """A site's scans, and the class list of all."""
    train, _ = sets.generated_sets(4, ["sketch"], 10, 1, seed)
    for i in range(len(train)):
        place = folder / "scans" / train.class_names[int(train.labels[i])]
        place.mkdir(parents=True, exist_ok=True)
        train.image(i).save(place / f"{i}.png")
    (folder / "classes.txt").write_text("\n".join(train.class_names) + "\n")
    (folder / "new").mkdir()
    train.image(0).convert("RGB").save(folder / "new" / "one.jpg")


@pytest.mark.slow
def test_the_pages_work_as_written(tmp_path: Path) -> None:
    read = Reader()
    place = {name: tmp_path / name for name in ("server", *SITES)}
    for seed, folder in enumerate(place.values()):
        folder.mkdir()
        pictures(folder, seed)
    # Keys and roster.
    shell(read.line("keygen --name server"), place["server"])
    own = read.line("keygen --name alice")
    for name in SITES:
        shell(own.replace("alice", name), place[name])
        shutil.copy(place[name] / f"{name}.entry.toml", place["server"])
    shell(read.line("roster add"), place["server"])
    listed = shell(read.line("roster list"), place["server"])
    assert all(name in listed for name in SITES)
    # The README's own files.
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    address = f"127.0.0.1:{free_port()}"
    for name, folder in place.items():
        (text,) = [
            b for b in blocks if b.startswith(f'key = "{"server" if name == "server" else "alice"}')
        ]
        text = here(text).replace("0.0.0.0:5570", address).replace("192.0.2.10:5570", address)
        kind = "server" if name == "server" else "client"
        (folder / f"{kind}.toml").write_text(text.replace("alice", name))
        if name != "server":
            shutil.copy(place["server"] / "roster.toml", folder)
    # A run.
    serve, join = read.line("-m secure_fedprompt.server"), read.line("-m secure_fedprompt.client")
    started = [
        subprocess.Popen(f"exec {serve} > out 2>&1", shell=True, cwd=place["server"], env=ENV)
    ]
    try:
        assert "run" in shell(read.line("check --config"), place["alice"])
        started += [
            subprocess.Popen(f"exec {join} > out 2>&1", shell=True, cwd=place[name], env=ENV)
            for name in SITES
        ]
        for process, name in zip(started, place, strict=True):
            assert process.wait(LONG) == 0, (place[name] / "out").read_text()
    finally:
        for process in started:
            process.kill()
            process.wait()
    # Results.
    assert "accuracy" in shell(read.line("evaluate"), place["server"])
    (prompt,) = (place["alice"] / "state" / "alice").glob("prompt-*.safetensors")
    predict = re.sub(r"prompt-\w+\.safetensors", prompt.name, read.line("predict"))
    assert "one.jpg" in shell(predict, place["alice"])
    shell(read.line("watch"), place["server"])
    assert "monday" in shell(read.line("runs --audit"), place["server"])
    shell(read.line("report"), place["server"])
    assert (place["server"] / "monday.html").stat().st_size > 10_000
    shell(read.line("privacy status"), place["alice"])
    # The same by invitation.
    kit = tmp_path / "kit"
    kit.mkdir()
    shell(read.line("init --address"), kit)
    answer = read.line("join invitation.toml").replace("invitation.toml", "../invitation.toml")
    for name in SITES[:2]:
        (kit / name).mkdir()
        shell(answer.replace("alice", name), kit / name)
        shutil.copy(kit / name / f"{name}.entry.toml", kit)
    assert "2 clients" in shell(read.line("admit alice.entry.toml"), kit)
    # Everything else, demos first.
    for line in read.lines("secure-fedprompt demo"):
        shell(line, tmp_path)
    (tmp_path / "other").symlink_to("audited")
    for line in sorted(read.left):
        shell(line, tmp_path)
        read.left.remove(line)
    assert not read.left
