"""The fuzzed targets: what was once found stays fixed, and a minute of looking further."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(HERE))

import targets  # noqa: E402

CORPUS = sorted(path for path in (HERE / "corpus").rglob("*") if path.is_file())


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_the_corpus_breaks_nothing(path: Path) -> None:
    targets.TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_good_inputs() -> None:
    """A target that refuses all of its seeds looks at nothing."""
    assert {path.parent.name for path in CORPUS} == set(targets.TARGETS)
    for data in targets.seeds()["frame"]:
        targets.TARGETS["frame"](data)
    with pytest.raises(AssertionError, match="other"):
        targets.target(broken)(b"")
    del targets.TARGETS["broken"]


def broken(data: bytes) -> None:
    raise AssertionError("other than a refusal")


@pytest.mark.slow
def test_a_minute_of_fuzzing_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    done = subprocess.run(
        [sys.executable, str(HERE.parent.parent / "scripts" / "fuzz"), "--minutes", "1",
         "--crashes", str(tmp_path / "crashes")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("inputs in") == len(targets.TARGETS)
