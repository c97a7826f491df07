"""Pages of Python, executed: docs/python.md, and the notebooks in a kernel of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_docs import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
def test_the_examples_of_the_python_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert len(blocks) == 6
    # Methods are found by module and name: the page is a module, as a script or a notebook is.
    page = tmp_path / "page_of_python.py"
    small = "\n".join(blocks).replace("clients=10", "clients=3").replace("rounds=5", "rounds=1")
    page.write_text(small)
    monkeypatch.syspath_prepend(str(tmp_path))
    import page_of_python  # type: ignore[import-not-found]

    assert page_of_python.history.accuracy.shape == (2,)
    said = capsys.readouterr().out
    assert "History(promptfl under masks, 1 rounds, accuracy" in said
    assert page_of_python.run.prompt.exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the kernel's own packages
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tests beside it would make two threads spin
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = json.dumps([cell.get("outputs", []) for cell in book.cells])
    if path.stem == "attack":
        assert "none   " in shown
        assert "masks  " in shown
    else:
        assert "History(promptfl under masks, 5 rounds" in shown
        assert "image/png" in shown
