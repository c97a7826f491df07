"""Image files as eight-bit RGB, whatever they hold, or an error that says why not.

Deep pixels keep their contrast: integers are scaled by the smallest of 8, 10, 12, 14 and 16 bits
that holds the image's largest value (scanners store 12 bits in 16), floats from 0..1 or 0..255.
DICOM (extra ``dicom``) is windowed as the file says (PS3.3 C.11), else by its own range. What
cannot be scaled without a guess is refused.
"""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from secure_fedprompt.protocol.errors import DataError

MAX_PIXELS = 64_000_000  # of an image: decoded, it takes three bytes for each, and more on the way
UNREADABLE = (
    UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, MemoryError, RuntimeError,
    NotImplementedError, AttributeError, KeyError, TypeError, zipfile.BadZipFile, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
DICOM = {".dcm", ".dicom"}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SUFFIXES |= DICOM
_DEEP = ("I", "F")  # modes of pixels that eight bits do not hold, and what they begin with
_BITS = (8, 10, 12, 14, 16)
Pixels = NDArray[Any]


def open_image(file: Path | io.BytesIO, suffix: str) -> Image.Image:
    """An image file, decoded, as RGB.

    Args:
        file: its path or its bytes.
        suffix: of its name, lower case.

    Raises:
        one of ``UNREADABLE``
    """
    if suffix in DICOM:
        return _dicom(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is lower
        image = Image.open(file)
    with image:
        _bound(image.width, image.height)
        image.load()
        return to_rgb(image)


def read_image(path: Path) -> Image.Image:
    """The same by its path.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    try:
        return open_image(path, path.suffix.lower())
    except UNREADABLE as error:
        raise DataError(f"image {path} cannot be read: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """What is wrong with an image, in one line."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "it is no image" if isinstance(error, UnidentifiedImageError) else text


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB.

    Raises:
        ValueError: its range is not one that is known.
    """
    if not image.mode.startswith(_DEEP):
        return image.convert("RGB")
    return Image.fromarray(_scaled(np.asarray(image))).convert("RGB")


def from_pixels(pixels: Pixels) -> Image.Image:
    """An image of an array: (H, W) grey or (H, W, 3) RGB, eight-bit integers or floats in [0, 1];
    deep grey integers as those of files.

    Raises:
        ValueError: its shape or range is none of these.
    """
    if pixels.ndim == 2:
        return Image.fromarray(pixels if pixels.dtype == np.uint8 else _scaled(pixels))
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an array of shape {pixels.shape}, (H, W) or (H, W, 3) expected")
    if pixels.dtype == np.uint8:
        return Image.fromarray(pixels)
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind != "f" or not (low >= 0 and high <= 1):
        raise ValueError(
            f"{pixels.dtype} pixels from {low:g} to {high:g}: give uint8, or floats in [0, 1] "
            "that are not normalised"
        )
    return Image.fromarray(_eight(pixels))


def _bound(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS:,}")


def _scaled(pixels: Pixels) -> NDArray[np.uint8]:
    """Deep grey pixels as eight bits."""
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite((low, high)).all() or not np.isfinite(pixels).all():
        raise ValueError("its pixels are not all numbers")
    if pixels.dtype.kind == "f":
        top = 1.0 if high <= 1 else 255.0
    else:
        top = float(next((2**bits - 1 for bits in _BITS if high < 2**bits), 0))
    if low < 0 or not top or high > top:
        raise ValueError(
            f"pixels from {low:g} to {high:g}: rescale them to 0..1, to 0..255 or to 16 bits"
        )
    return _eight(pixels / top)


def _eight(shares: Pixels) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.rint(255 * np.clip(shares, 0, 1)).astype(np.uint8)
    return rounded


def _dicom(file: Path | io.BytesIO) -> Image.Image:
    """One frame of a DICOM file, as its window shows it."""
    try:
        import pydicom
        from pydicom.pixels.processing import apply_modality_lut, convert_color_space
    except ImportError:
        raise ValueError("DICOM needs the extra: pip install 'secure-fedprompt[dicom]'") from None
    try:
        data = pydicom.dcmread(file)
    except pydicom.errors.InvalidDicomError:
        raise ValueError("it is no DICOM file") from None
    _bound(int(data.Columns), int(data.Rows))
    if int(data.get("NumberOfFrames", 1) or 1) != 1:
        raise ValueError(f"{data.NumberOfFrames} frames: export the one that is meant")
    pixels = data.pixel_array
    if pixels.ndim == 3:
        if data.PhotometricInterpretation.startswith("YBR"):
            pixels = convert_color_space(pixels, data.PhotometricInterpretation, "RGB")
        return Image.fromarray(_eight(pixels / (2 ** int(data.BitsStored) - 1)))
    values = np.asarray(apply_modality_lut(pixels, data), np.float64)
    shares = _windowed(values, data)
    if data.PhotometricInterpretation == "MONOCHROME1":  # low is white
        shares = 1 - shares
    return Image.fromarray(_eight(shares)).convert("RGB")


def _windowed(values: Pixels, data: Any) -> Pixels:
    """In [0, 1] by the file's first window (PS3.3 C.11.2.1.2 and .3), else by the values' range."""
    centre, width = (_first(data.get(f"Window{name}")) for name in ("Center", "Width"))
    if centre is None or width is None:
        low, high = float(values.min()), float(values.max())
        return (values - low) / max(high - low, 1e-9)
    match str(data.get("VOILUTFunction", "LINEAR")).upper():
        case "SIGMOID":
            return 1 / (1 + np.exp(-4 * (values - centre) / max(width, 1e-9)))
        case "LINEAR_EXACT":
            return (values - centre) / max(width, 1e-9) + 0.5
        case _:
            return (values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5


def _first(value: Any) -> float | None:
    """A number, or the first of several."""
    if value is None or value == "":
        return None
    return float(value[0] if hasattr(value, "__getitem__") else value)
