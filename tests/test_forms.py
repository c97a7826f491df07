"""The JSON of all commands: one vocabulary, as documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from secure_fedprompt.host import forms

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "json.md").read_text()
SOURCES = [
    path
    for folder in ("secure_fedprompt", "clients", "server")
    for path in (ROOT / folder).rglob("*.py")
    if path.is_file()
]


def test_the_page_shows_what_is_written() -> None:
    assert forms.tables() in PAGE


def test_every_key_has_one_meaning_and_every_meaning_a_key() -> None:
    used = {key for keys in (*forms.FORMS.values(), *forms.ROWS.values()) for key in keys}
    inside = {"contributors", "weight", "format"}  # of metrics, and of every object
    assert set(forms.MEANING) == used | inside


def test_a_key_that_is_not_documented_cannot_be_written() -> None:
    assert forms.formed("check", {"checks": {}}) == {
        "format": "secure-fedprompt/check/1", "checks": {},
    }  # fmt: skip
    with pytest.raises(KeyError, match="check has no key 'results'"):
        forms.formed("check", {"results": {}})
    with pytest.raises(KeyError, match="members has no key 'mail'"):
        forms.formed("roster", {"roster_digest": "", "members": [{"name": "a", "mail": "b"}]})


def test_every_form_is_a_commands() -> None:
    written = re.findall(
        r"(?:write_json|as_json)\(\s*(?:args\.json|json_path|self\._json)?,?\s*\"([a-z-]+)\"",
        "".join(path.read_text() for path in SOURCES),
    )
    assert set(written) == set(forms.FORMS)
    listed = PAGE.partition("| form | keys |")[0]
    assert all(f"`{form}`" in listed for form in forms.FORMS)


def test_every_event_of_a_log_is_on_the_page() -> None:
    told = re.findall(
        r"\blog\.(?:debug|info|warning|error)\(\s*\"([a-z]+)\"",
        "".join(path.read_text() for path in SOURCES),
    )
    stored = re.findall(
        r"store\.event\(\s*\"([a-z]+)\"",
        "".join(path.read_text() for path in (ROOT / "server").glob("*.py")),
    )
    assert len(set(told)) > 15
    assert len(set(stored)) > 5
    events = set(re.findall(r"`([a-z]+)`", PAGE.partition("| program | event |")[2]))
    assert {*told, *stored} <= events
