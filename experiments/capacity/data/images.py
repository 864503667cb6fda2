"""Decoding picture files to (h, w, 3) uint8, whatever they hold, by Pillow.

Grey is repeated over the channels; a palette becomes its colours; 16-bit grey keeps its high byte; CMYK is converted by
Pillow's formula, without colour profiles; transparency is laid over white; of an animation the first frame is taken.
Embedded colour profiles are not applied, as TensorFlow's decoders do not.
"""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np

# What Pillow raises for files that are cut off, damaged, or no pictures at all (UnidentifiedImageError is an OSError).
FAULTS: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error)


class ImageError(ValueError):
    """A picture cannot be decoded; the message says why."""


def decode_image(source: bytes | Path, *, rotate: bool) -> np.ndarray:
    """Returns the picture as (h, w, 3) uint8. Raises ImageError.

    `rotate` turns it as its EXIF orientation says, as every viewer does and TensorFlow's decoders do not.
    """
    pillow = _pillow()
    try:
        with pillow.Image.open(_file(source)) as picture:
            picture.load()
            if rotate:
                picture = pillow.ImageOps.exif_transpose(picture)
            return np.array(_to_rgb(picture))
    except (*FAULTS, pillow.Image.DecompressionBombError) as error:
        raise ImageError(_reason(error)) from error


def image_size(source: bytes | Path, *, rotate: bool) -> tuple[int, int]:
    """Returns (height, width) from the header alone, as `decode_image` would give it. Raises ImageError."""
    pillow = _pillow()
    try:
        with pillow.Image.open(_file(source)) as picture:
            width, height = picture.size
            is_turned = rotate and picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except (*FAULTS, pillow.Image.DecompressionBombError) as error:
        raise ImageError(_reason(error)) from error
    return (width, height) if is_turned else (height, width)


def find_fault(path: Path) -> str | None:
    """Returns why the picture cannot be decoded, or None. JPEG is read at an eighth of its size: all bytes are seen."""
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as picture:
            picture.draft("RGB", (1, 1))
            picture.load()
            _to_rgb(picture.crop((0, 0, 1, 1)))
    except (*FAULTS, pillow.Image.DecompressionBombError) as error:
        return _reason(error)
    return None


def encode_png(image: np.ndarray) -> bytes:
    """Returns (h, w) or (h, w, 3) uint8 as the bytes of a PNG file."""
    file = io.BytesIO()
    _pillow().Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _to_rgb(picture: Any) -> Any:
    pillow = _pillow()
    if picture.mode == "F":
        raise ImageError("pixels are floating-point numbers, whose range is unknown")
    if picture.mode.startswith("I"):
        return pillow.Image.fromarray(_high_byte(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = pillow.Image.new("RGBA", picture.size, "white")
        picture = pillow.Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


def _high_byte(pixels: np.ndarray) -> np.ndarray:
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ImageError("pixels are 32-bit integers, whose range is unknown")
    return (pixels.astype(np.int64) >> 8).astype(np.uint8)


def _file(source: bytes | Path) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def to_png(image: np.ndarray) -> bytes:
    """Returns the file of a (h, w, 3) uint8 image, with one channel where all three are the same."""
    is_grey = bool((image == image[..., :1]).all())
    buffer = io.BytesIO()
    _pillow().Image.fromarray(image[..., 0] if is_grey else image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "no picture that Pillow knows"
    return str(error) or type(error).__name__


def _pillow() -> Any:
    """Returns the package. It is imported late: without it, ValueError says how to get it."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ValueError("pictures need Pillow: pip install 'vitcmp[data]'") from error
    return PIL
