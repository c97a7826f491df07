"""The reproduction kit from end to end, on the bundled CLIP and made files in CoOp's layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from secure_fedprompt.clients.data import sets
from secure_fedprompt.protocol.errors import DataError
from secure_fedprompt.protocol.presets import published

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import reproduce


def pets(root: Path, classes: int = 12) -> list[str]:
    """Generated pictures as Oxford-IIIT Pets lie in CoOp's folders."""
    train, test = sets.generated_sets(classes, ["photo"], 3, 2, 0)
    folder = root / "oxford_pets" / "images"
    folder.mkdir(parents=True)
    content: dict[str, list[list[Any]]] = {"train": [], "val": [], "test": []}
    for split, images in (("train", train), ("test", test)):
        for i, label in enumerate(images.labels.tolist()):
            images.image(i).save(folder / f"{split}_{i}.png")
            # Labels of the file need not begin at zero, nor be without gaps.
            content[split].append([f"{split}_{i}.png", 2 * label + 1, train.class_names[label]])
    (root / "oxford_pets" / "split_zhou_OxfordPets.json").write_text(json.dumps(content))
    return list(train.class_names)


def test_a_table_is_measured_beside_what_was_published_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pets(tmp_path)
    monkeypatch.setattr(reproduce, "preset", lambda name: {**published(name), "epochs": 1})
    out = tmp_path / "out.json"
    flags = ["--table", "fedotp-label-shift", "--dataset", "OxfordPets", "--root", str(tmp_path),
             "--model", "bundled", "--pretrained", "", "--device", "cpu", "--rounds", "1",
             "--seeds", "1", "--json", str(out)]  # fmt: skip
    assert reproduce.main(flags) == 0
    said = capsys.readouterr().out
    assert "OxfordPets, FedOTP: about" in said
    assert "GB of features" in said
    (fedotp,) = [line for line in said.splitlines() if line.startswith("OxfordPets   FedOTP")]
    _, _, paper, measured, _, difference = fedotp.split()
    assert paper == "98.82"
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"zero shot", "PromptFL", "FedOTP"}
    assert abs(float(measured) - 100 * rows["FedOTP"]["local"]) < 0.01
    assert abs(float(difference) - (float(measured) - 98.82)) < 0.02
    assert rows["zero shot"]["local"] > 0.3  # files, labels and names belong together

    def never(*_: Any) -> Any:
        raise AssertionError("a row that is there is run again")

    monkeypatch.setattr(reproduce.methods.Bench, "run", never)
    assert reproduce.main(flags) == 0
    assert "98.82" in capsys.readouterr().out


def test_an_estimate_runs_no_federation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pets(tmp_path)
    monkeypatch.setattr(reproduce.methods.Bench, "run", lambda *_: 1 / 0)
    flags = ["--table", "promptfl-iid", "--dataset", "OxfordPets", "--root", str(tmp_path),
             "--model", "bundled", "--pretrained", "", "--device", "cpu", "--estimate"]  # fmt: skip
    assert reproduce.main(flags) == 0
    assert "OxfordPets, PromptFL: about" in capsys.readouterr().out


def test_coops_split_is_read_as_it_is(tmp_path: Path) -> None:
    names = pets(tmp_path)
    train, test = reproduce.load("OxfordPets", tmp_path, False)
    assert (len(train), len(test)) == (36, 24)
    assert list(train.class_names) == names
    plain, _ = sets.generated_sets(12, ["photo"], 3, 2, 0)
    assert train.labels.tolist() == plain.labels.tolist()
    assert train.image(7).tobytes() == plain.image(7).tobytes()


@pytest.mark.parametrize("content", ["{}", "[1]", "not json", '{"train": [[1]], "test": []}'])
def test_a_split_file_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    pets(tmp_path)
    path = tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json"
    path.write_text(content)
    with pytest.raises(DataError, match="split_zhou_OxfordPets.json cannot be read"):
        reproduce.load("OxfordPets", tmp_path, False)
    path.write_text(json.dumps({"train": [["../x.png", 0, "x"]], "test": []}))
    with pytest.raises(DataError, match=r"\.\./x.png is outside of"):
        reproduce.load("OxfordPets", tmp_path, False)


def test_what_is_missing_says_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"put its images into .*oxford_pets/images and CoOp's"):
        reproduce.load("OxfordPets", tmp_path, False)


@pytest.mark.parametrize(
    ("name", "words"),
    [("UCF101", "ucf101/UCF-101-midframes and CoOp's split_zhou_UCF101.json"),
     ("DomainNet", "put its domains' folders, .* into .*domainnet"),
     ("FGVCAircraft", "FGVCAircraft")],
)  # fmt: skip
def test_each_layout_says_what_it_wants(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        reproduce.load(name, tmp_path, False)


def test_domains_are_read_from_their_folders_and_run_a_client_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    styles = ["photo", "sketch", "neon", "poster"]
    train, _ = sets.generated_sets(3, styles, 4, 1, 0)
    for i, (label, style) in enumerate(zip(train.labels, train.domains, strict=True)):
        folder = tmp_path / "office_caltech_10" / styles[style] / train.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        train.image(i).save(folder / f"{i}.png")
    monkeypatch.setattr(reproduce, "preset", lambda name: {**published(name), "epochs": 1})
    flags = ["--table", "fedotp-offices", "--root", str(tmp_path), "--model", "bundled",
             "--pretrained", "", "--device", "cpu", "--rounds", "1", "--seeds", "1"]  # fmt: skip
    assert reproduce.main(flags) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[1] for row in rows] == ["zero", "PromptFL", "FedOTP"]
    assert float(rows[1][2]) > 40  # measured, with nothing beside it


def test_every_table_has_figures_for_what_it_runs() -> None:
    for name, table in reproduce.TABLES.items():
        assert {method for _, method in table.cells} in (set(), set(table.settings)), name
        assert set(table.mean) in (set(), set(table.settings)), name
        assert not (table.cells and table.mean), name
        assert table.cells or table.mean or "not known here" in table.source, name
        assert set(table.datasets) <= set(reproduce.DATA), name
        for method in table.settings:
            assert "rounds" not in reproduce.settings_of(table, method)
