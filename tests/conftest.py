"""Two test processes (``pytest -n 2``) share two cores: one thread each."""

import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


PROCESSES = (  # files whose slow tests start programs: one at a time, beside the others
    "test_demo", "test_docs_run", "test_flower_programs", "test_plugins", "test_program_methods",
    "test_programs", "test_roster_changes", "test_starting", "test_tracking",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and item.path.stem in PROCESSES:
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(autouse=True)
def drawn_alike(request: pytest.FixtureRequest) -> None:
    """What a test draws from PyTorch is its own, and the same in every run."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Audit logs of a good run, by owner; copy them before changing files."""
    from audited import federate

    return federate(tmp_path_factory.mktemp("good"))[1]


@pytest.fixture(scope="module")
def bundled() -> Any:
    """The bundled CLIP."""
    from secure_fedprompt.clients.backbone import Backbone

    return Backbone.load("bundled", device="cpu")


@pytest.fixture
def log_folder(tmp_path: Path) -> Path:
    """A closed log of an opening, six frames and a closing record."""
    from recorded_logs import made, put, upload

    from secure_fedprompt.protocol import messages as m

    log = made(tmp_path / "log")
    put(log, m.Alive(), *(upload(i) for i in range(1, 6)))
    log.close()
    return tmp_path / "log"


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Any]:
    """Makes federations of processes, which are stopped in the end."""
    from programs import Federation

    made: list[Federation] = []

    def make(**options: Any) -> Federation:
        made.append(Federation(tmp_path, **options))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished demo of four clients and two rounds."""
    from programs import python

    folder = tmp_path_factory.mktemp("demo")
    done = python("secure_fedprompt", "demo", "--run-dir", "d", "--rounds", "2",
                  "--audit", "full", "--json", "result.json", cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder
