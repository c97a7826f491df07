"""Files of other depths and kinds: what they show is kept, or they are refused by name."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from secure_fedprompt.__main__ import main
from secure_fedprompt.client import load_trainer
from secure_fedprompt.clients.backbone import Backbone
from secure_fedprompt.clients.data import images, sets
from secure_fedprompt.clients.data.images import read_image
from secure_fedprompt.clients.methods.base import METHODS
from secure_fedprompt.clients.settings import ClientSettings
from secure_fedprompt.clients.training import LocalTrainer
from secure_fedprompt.commands import evaluate
from secure_fedprompt.host.log import Bars, Log
from secure_fedprompt.prompt_file import write_prompt
from secure_fedprompt.protocol.errors import DataError
from secure_fedprompt.protocol.settings import FedMGPSettings, MethodSettings

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def shown(path: Path) -> np.ndarray:
    """One channel in [0, 1]; the others are the same."""
    pixels = np.asarray(read_image(path), np.float64) / 255
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_integers_keep_their_contrast(tmp_path: Path, bits: int, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.rint(RAMP * (2**bits - 1)).astype(np.uint16)).save(path)
    assert np.abs(shown(path) - RAMP).max() < 1 / 250


def test_what_eight_bits_did_to_deep_pixels(tmp_path: Path) -> None:
    """The fault that this mends: the conversion of Pillow cuts off all but the lowest values."""
    path = tmp_path / "x.png"
    Image.fromarray(np.rint(RAMP * 4095).astype(np.uint16)).save(path)
    lost = np.asarray(Image.open(path).convert("RGB"), np.float64)[..., 0] / 255
    assert np.abs(lost - RAMP).max() > 0.5


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floats_from_known_ranges(tmp_path: Path, top: float) -> None:
    path = tmp_path / "x.tiff"
    Image.fromarray((RAMP * top).astype(np.float32)).save(path)
    assert np.abs(shown(path) - RAMP).max() < 1 / 250


@pytest.mark.parametrize(
    ("pixels", "says"),
    [((RAMP * 2000).astype(np.float32), "pixels from 0 to 2000: rescale them"),
     ((RAMP - 0.5).astype(np.float32), "pixels from -0.5 to 0.5"),
     ((RAMP * 100_000).astype(np.int32), "pixels from 0 to 100000"),
     ((RAMP * 100 - 50).astype(np.int32), "pixels from -50 to 50"),
     (np.full((8, 8), np.nan, np.float32), "its pixels are not all numbers")],
)  # fmt: skip
def test_ranges_that_would_be_a_guess_are_refused(
    tmp_path: Path, pixels: np.ndarray, says: str
) -> None:
    path = tmp_path / "x.tiff"
    Image.fromarray(pixels).save(path)
    with pytest.raises(DataError, match=f"x.tiff cannot be read: {says}"):
        read_image(path)


def test_ordinary_images_are_as_they_were(tmp_path: Path) -> None:
    grey = Image.fromarray(np.rint(RAMP * 255).astype(np.uint8))
    for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK"):
        path = tmp_path / f"{mode}.{'tiff' if mode == 'CMYK' else 'png'}"
        grey.convert("RGB").convert(mode).save(path)
        assert (np.asarray(read_image(path)) == np.asarray(Image.open(path).convert("RGB"))).all()


def test_what_is_no_image_says_so_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"x\.png cannot be read: it is no image$"):
        read_image(tmp_path / "x.png")
    (tmp_path / "x.dcm").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"x\.dcm cannot be read: it is no DICOM file$"):
        read_image(tmp_path / "x.dcm")
    with pytest.raises(DataError, match="No such file"):
        read_image(tmp_path / "y.png")


# -- DICOM -----------------------------------------------------------------------------------------


def dicom(path: Path, pixels: np.ndarray, **tags: Any) -> Path:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID = SecondaryCaptureImageStorage
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape[-2:] if pixels.ndim == 2 else pixels.shape[:2]
    data.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    data.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    data.BitsAllocated = 8 * pixels.dtype.itemsize
    data.BitsStored = tags.pop("BitsStored", data.BitsAllocated)
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def test_dicom_is_windowed_as_the_file_says(tmp_path: Path) -> None:
    """Hounsfield units: slope and intercept, then a soft-tissue window of -160 to 240."""
    stored = np.rint(RAMP * 4095).astype(np.uint16)
    units = stored * 1.0 - 1024
    tags = {"BitsStored": 12, "RescaleSlope": 1, "RescaleIntercept": -1024}
    path = dicom(tmp_path / "x.dcm", stored, **tags, WindowCenter=40, WindowWidth=400)
    expected = np.clip((units - 39.5) / 399 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
    assert np.abs(shown(path) - expected).max() < 1 / 250
    narrow = dicom(tmp_path / "n.dcm", np.arange(36, 45, dtype=np.uint16).reshape(3, 3),
                   WindowCenter=40, WindowWidth=5)  # fmt: skip
    assert np.abs(shown(narrow) * 8 - [[0, 0, 1], [3, 5, 7], [8, 8, 8]]).max() < 0.05
    exact = dicom(tmp_path / "e.dcm", stored, **tags, WindowCenter=[40, 500],
                  WindowWidth=[400, 2000], VOILUTFunction="LINEAR_EXACT")  # fmt: skip
    assert np.abs(shown(exact) - np.clip((units - 40) / 400 + 0.5, 0, 1)).max() < 1 / 250
    sigmoid = dicom(tmp_path / "s.dcm", stored, **tags, WindowCenter=40, WindowWidth=400,
                    VOILUTFunction="SIGMOID")  # fmt: skip
    assert np.abs(shown(sigmoid) - 1 / (1 + np.exp(-4 * (units - 40) / 400))).max() < 1 / 250


def test_dicom_without_a_window_shows_its_own_range(tmp_path: Path) -> None:
    stored = np.rint(500 + RAMP * 1000).astype(np.uint16)
    assert np.abs(shown(dicom(tmp_path / "x.dcm", stored)) - RAMP).max() < 1 / 250
    inverted = dicom(tmp_path / "i.dcm", stored, PhotometricInterpretation="MONOCHROME1")
    assert np.abs(shown(inverted) - (1 - RAMP)).max() < 1 / 250
    flat = dicom(tmp_path / "f.dcm", np.full((8, 8), 7, np.uint16))
    assert shown(flat).max() == 0


def test_dicom_in_colour(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    read = read_image(dicom(tmp_path / "x.dcm", pixels))
    assert (np.asarray(read) == pixels).all()


def test_dicom_of_many_frames_is_refused(tmp_path: Path) -> None:
    path = dicom(tmp_path / "x.dcm", np.zeros((8, 8), np.uint16), NumberOfFrames=3)
    with pytest.raises(DataError, match="3 frames: export the one that is meant"):
        read_image(path)


def test_without_the_extra_dicom_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dicom(tmp_path / "x.dcm", np.zeros((8, 8), np.uint16))
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(DataError, match=r"pip install 'secure-fedprompt\[dicom\]'"):
        read_image(path)


# -- folders ---------------------------------------------------------------------------------------


def fill(folder: Path, name: str, deep: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.rint(RAMP * (4095 if deep else 255)).astype(np.uint16 if deep else np.uint8)
    Image.fromarray(pixels).save(folder / name)


def test_folders_and_zips_hold_deep_images_and_dicom(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(2):
            fill(tmp_path / "d" / name, f"{i}.png", deep=True)
        dicom(tmp_path / "d" / name / "2.dcm", np.rint(RAMP * 4095).astype(np.uint16))
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        for path in sorted((tmp_path / "d").rglob("*.*")):
            file.write(path, path.relative_to(tmp_path / "d"))
    for where in ("d", "d.zip"):
        train, test = sets.folder_sets(tmp_path / where, None, 0.3, 0)
        for part in (train, test):
            for i in range(len(part)):
                assert np.abs(np.asarray(part.image(i))[..., 0] / 255 - RAMP).max() < 1 / 250


def test_a_class_of_unknown_files_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path / "cat", "0.png")
    (tmp_path / "README").write_text("x")  # not in a folder: nobody's class
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_text("x")
    fill(tmp_path / "dog", "0.png")
    sets.folder_sets(tmp_path, None, 0.3, 0)
    (tmp_path / "owl").mkdir()
    (tmp_path / "owl" / "0.heic").write_text("x")
    with pytest.raises(DataError, match=r"folder 'owl' holds no image .* but '0\.heic'; known are"):
        sets.folder_sets(tmp_path, None, 0.3, 0)


@pytest.mark.parametrize(
    ("splits", "counts", "note"),
    [(("train", "val"), (3, 2), "trains on train/, tests on val/"),
     (("train", "test"), (3, 2), "trains on train/, tests on test/"),
     (("train", "val", "test"), (3, 1), "trains on train/, tests on test/; val/ is not used")],
)  # fmt: skip
def test_splits_are_never_pooled(
    tmp_path: Path, splits: tuple[str, ...], counts: tuple[int, int], note: str
) -> None:
    for part, count in zip(splits, (3, 2, 1), strict=False):
        for name in ("cat", "dog"):
            for i in range(count):
                fill(tmp_path / part / name, f"{part}{i}.png")
    train, test = sets.folder_sets(tmp_path, None, 0.3, 0)
    assert (len(train), len(test)) == (2 * counts[0], 2 * counts[1])
    assert train.note == note
    assert train.domain_names == ("all",)


# -- predict ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
def test_predict_works_for_every_method_and_loses_no_image(
    bundled: Backbone,
    tmp_path: Path,
    method: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, test = sets.generated_sets(4, ["photo"], 4, 2, 0)
    trainer = LocalTrainer(bundled, train, test, 0)
    slots = FedMGPSettings(groups=2, slots=1)
    learner = trainer.prepare(
        MethodSettings(method=method, n_ctx=4, init="a photo of a", fedmgp=slots)
    )
    prompt, out = tmp_path / "prompt.safetensors", tmp_path / "o.json"
    write_prompt(prompt, learner)
    for i in range(2):
        test.image(2 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    words = [str(tmp_path / name) for name in ("0.png", "bad.png", "1.png")]
    assert main(["predict", str(prompt), *words, "--json", str(out)]) == 2
    first, bad, last = json.loads(out.read_text())["predictions"]
    for found in (first, last):
        assert len(found["classes"]) == 3
        assert set(found["classes"]) <= set(train.class_names)
    assert bad["error"].endswith("it is no image")
    assert "bad.png cannot be read" in capsys.readouterr().err
    assert main(["predict", str(prompt), words[0]]) == 0
    monkeypatch.setattr(evaluate, "_AT_ONCE", 1)  # the same, one by one
    assert main(["predict", str(prompt), *words, "--json", str(out)]) == 2
    alone = json.loads(out.read_text())["predictions"]
    assert "error" in alone[1]
    for one, together in ((alone[0], first), (alone[2], last)):
        assert one["image"] == together["image"]
        assert list(one["classes"]) == list(together["classes"])
        assert np.allclose(
            list(one["classes"].values()), list(together["classes"].values()), atol=1e-4
        )


def test_an_image_of_too_many_pixels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    fill(tmp_path, "x.png")
    with pytest.raises(DataError, match="8 x 8 pixels, at most 63"):
        read_image(tmp_path / "x.png")
    with pytest.raises(ValueError, match="8 x 8 pixels"):
        images.open_image(dicom(tmp_path / "x.dcm", np.zeros((8, 8), np.uint16)), ".dcm")
    with pytest.raises(ValueError, match="8 x 8 pixels"):
        images.open_image(io.BytesIO((tmp_path / "x.png").read_bytes()), ".png")


# -- files that cannot be read ---------------------------------------------------------------------


def spoilt(folder: Path) -> Path:
    for name in ("a", "b"):
        for i in range(6):
            fill(folder / name, f"{i}.png")
    for name in ("a/1.png", "b/4.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])  # cut
    (folder / "b" / "5.png").write_bytes(b"")
    return folder


def test_all_bad_files_are_named_before_a_client_joins(
    bundled: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "load", lambda *args: bundled)
    settings = ClientSettings(dataset=str(spoilt(tmp_path / "d")))
    told = io.StringIO()
    log = Log("client", console=Console(file=told))
    with pytest.raises(DataError) as caught:
        load_trainer(settings, log, Bars(log))
    assert str(caught.value).startswith("3 of 12 images cannot be read, the first: image ")
    assert "--skip-unreadable" in str(caught.value)
    for name in ("a/1.png", "b/4.png", "b/5.png"):
        assert f"unreadable: image {name} cannot be read" in told.getvalue()
    skipping = msgspec.structs.replace(settings, skip_unreadable=True)
    trainer = load_trainer(skipping, log, Bars(log))
    assert sum(trainer.image_counts) == 9


def test_zips_are_opened_too_and_pictures_that_are_ours_are_not(tmp_path: Path) -> None:
    folder = spoilt(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, path.relative_to(folder))
    seen: list[int] = []
    for part in sets.folder_sets(tmp_path / "d.zip", None, 0.3, 0):
        bad = part.unreadable(lambda what, done, total: seen.append(done))
        assert all("cannot be read" in text for text in bad.values())
    assert len(seen) == 12
    assert not sets.generated_sets(4, ["photo"], 2, 2, 0)[0].unreadable(lambda *_: None)


# -- evaluate --------------------------------------------------------------------------------------


def test_evaluate_takes_the_names_that_the_prompt_holds(
    bundled: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A site with two of three classes, trained under a class list, its own file as settings."""
    whole = sets.generated_sets(3, ["photo"], 4, 1, 0)[0]
    trainer = LocalTrainer(bundled, whole, whole, 0)
    learner = trainer.prepare(MethodSettings(n_ctx=4, init="a photo of a"))
    prompt, out = tmp_path / "prompt.safetensors", tmp_path / "o.json"
    write_prompt(prompt, learner)
    for i in range(len(whole)):
        if whole.labels[i] < 2:
            folder = tmp_path / "scans" / whole.class_names[whole.labels[i]]
            folder.mkdir(parents=True, exist_ok=True)
            whole.image(i).save(folder / f"{i}.png")
    (tmp_path / "client.toml").write_text(
        'key = "alice.pem"\nserver = "tcp://192.0.2.1:5570"\ndataset = "scans"\n'
        '[policy]\nmin_cohort = 5\n[dp]\nkind = "none"\n'
    )
    words = ["evaluate", str(prompt), "--config", str(tmp_path / "client.toml"), "--json", str(out)]
    assert main(words) == 0
    assert json.loads(out.read_text())["images"] == 2
    assert "scored are the 2 of 8 images that test_share = 0.3" in capsys.readouterr().out
    assert main([*words, "--test-share", "1"]) == 0
    found = json.loads(out.read_text())
    assert found["images"] == 8
    assert set(found["per_class"]) == set(whole.class_names[:2])
    assert "scored are" not in capsys.readouterr().out
    (tmp_path / "client.toml").write_text('sever = "x"\n')
    assert main(words) == 2  # what no file knows is still an error
    assert "unknown key 'sever'" in capsys.readouterr().err


def test_class_lists_of_other_systems_are_read(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcat\r\nsea lion\r\n\r\n".encode())
    assert sets.read_class_list(path) == ("cat", "sea lion")
