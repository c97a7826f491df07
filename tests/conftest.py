"""Two test processes (``pytest -n 2``) share two cores: one thread each."""

import os
import sys
import zlib
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


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
