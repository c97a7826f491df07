"""What earlier releases left on the disk opens, or is refused by name; fixtures by make_release.py."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from recorded_logs import made

from secure_fedprompt.__main__ import main
from secure_fedprompt.clients.file_journal import FileJournal
from secure_fedprompt.clients.ledger import NAME, Ledger
from secure_fedprompt.host import recorder
from secure_fedprompt.host.files import read_roster
from secure_fedprompt.prompt_file import read_prompt
from secure_fedprompt.protocol import errors
from secure_fedprompt.protocol.codec import VERSION
from secure_fedprompt.server.settings import ServerSettings
from secure_fedprompt.server.store import Store

FIXTURES = Path(__file__).parent / "fixtures" / "releases"
NOW = f"wire-{VERSION}"
EARLIER = sorted(path.name.split(".")[0] for path in FIXTURES.iterdir() if NOW not in path.name)


@pytest.fixture
def left(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The files of a release."""
    with tarfile.open(FIXTURES / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path / "d", filter="data")
    return tmp_path / "d"


def test_there_is_one_of_this_release_and_of_earlier_ones() -> None:
    assert (FIXTURES / f"{NOW}.tar.xz").exists(), "make_release.py makes it"
    assert len(EARLIER) >= 3


@pytest.mark.parametrize("left", [*EARLIER, NOW], indirect=True)
def test_what_a_site_keeps_is_not_lost(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts, budgets, and from which prompts it has contributed."""
    state = left / "alice" / "state"
    assert len(read_roster(str(left / "roster.toml")).clients) == 4
    assert len(read_prompt(next(state.glob("prompt-*"))).class_names) == 32
    ledger = Ledger(state / NAME)
    assert (len(ledger.uploads), len(ledger.entries)) == (3, 2)
    ledger.close()
    journal = FileJournal(state / "journal.jsonl")
    (run,) = (bytes.fromhex(run) for run in journal._runs)
    assert journal.knows(run)
    assert journal.progress(run) == 3
    journal.close()
    for words in (["runs", left / "server/run"], ["watch", left / "server/run", "--once"],
                  ["report", left / "server/run", "-o", left / "x.html"]):  # fmt: skip
        assert main([str(word) for word in words]) == 0, words
    assert "2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("left", EARLIER, indirect=True)
def test_what_cannot_go_on_is_refused_by_name(
    left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        errors.ConfigError, match=r"by another release \(wire version (not noted|12)"
    ):
        Store(left / "server" / "run", ServerSettings())
    assert main(["audit", str(left / "server" / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "audit it with the release that wrote it" in said
    with pytest.raises(errors.ConfigError, match=r"begun by another release .*move the folder"):
        made(left / "alice" / "state" / "audit")


@pytest.mark.parametrize("left", [NOW], indirect=True)
def test_what_this_release_left_is_audited(left: Path) -> None:
    """Else what is written has changed, and the wire version, or the log's format, has not."""
    run, state = left / "server" / "run", left / "alice" / "state"
    assert main(["audit", str(run), "--peer", str(state)]) == 0
    log = made(state / "audit")
    log.close()
    assert recorder.FORMAT.endswith(f"/{VERSION}")
