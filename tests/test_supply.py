"""What the tests are run with: a lock file that agrees with what the package asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def wanted(texts: list[str]) -> list[Requirement]:
    """With the extras of this package that they name."""
    found = list[Requirement]()
    for each in map(Requirement, texts):
        if each.name == PROJECT["name"]:
            found += [more for extra in sorted(each.extras) for more in wanted(EXTRAS[extra])]
        else:
            found.append(each)
    return found


LOCKED = {
    name.lower().replace("_", "-"): version
    for name, version in re.findall(
        r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", (ROOT / "tests/requirements.lock").read_text(), re.M
    )
}


@pytest.mark.parametrize("each", wanted([*PROJECT["dependencies"], *EXTRAS["test"]]), ids=str)
def test_the_lock_holds_what_is_asked_for(each: Requirement) -> None:
    assert each.specifier, "a lower bound, tried with scripts/versions lowest"
    assert each.specifier.contains(LOCKED[each.name.lower().replace("_", "-")])


def test_everything_in_the_lock_has_hashes() -> None:
    entries = (ROOT / "tests" / "requirements.lock").read_text().split("\n")
    pins = [i for i, line in enumerate(entries) if "==" in line and not line.startswith(" ")]
    assert len(pins) > 100
    assert all("--hash=sha256:" in entries[i + 1] for i in pins)
