"""Several real handwritten digits on one canvas, to be read in order, row by row: one question a digit.

The digits are MNIST's (28 px; from idx files, or from TFDS where it has them prepared), or the 1,797 of scikit-learn
(8 px, enlarged). Digits of the test pictures are never seen in training: MNIST's own split, and of scikit-learn's, in
their order, every fifth.
"""

import dataclasses
import gzip
import struct
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from experiments.capacity.data.glyphs import canonical_name
from vitcmp.resample import resize
from vitcmp.spec_text import parse_overrides
from vitcmp.specs import did_you_mean

Digits = tuple[np.ndarray, np.ndarray]  # (n, h, w) uint8, white on black, and (n,) int64
Source = Literal["mnist", "sklearn"]
SPLITS = ("train", "test")
IDX_FILES = {"train": ("train-images", "train-labels"), "test": ("t10k-images", "t10k-labels")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitCanvasSpec:
    """`canvas` and `digit_size` in pixels; a digit is moved at random within its cell of `rows` x `columns`.

    Example i of a split depends on the digits, the spec and i alone, as far as numpy's versions draw the same numbers;
    what was prepared once is not drawn again.
    """

    digits: Source
    canvas: int = 64
    digit_size: int = 28
    rows: int = 2
    columns: int = 2
    num_train: int = 12000
    num_test: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("canvas", "digit_size", "rows", "columns", "num_train", "num_test")
        faults = [f"{name}={getattr(self, name)} must be 1 or more" for name in names if getattr(self, name) < 1]
        if self.digits not in get_args(Source):
            faults.append(f"digits={self.digits!r} must be {' or '.join(get_args(Source))}")
        if not faults and self.digit_size > min(self.cell):
            faults.append(f"digit_size={self.digit_size} must be at most a cell of the canvas, {min(self.cell)} pixels")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def num_questions(self) -> int:
        return self.rows * self.columns

    @property
    def cell(self) -> tuple[int, int]:
        """(height, width) in pixels; the digits of two cells never overlap."""
        return self.canvas // self.rows, self.canvas // self.columns


NAMED = {digits: DigitCanvasSpec(digits=digits) for digits in get_args(Source)}


def parse_digit_canvas(digits: str, overrides: str) -> tuple[str, DigitCanvasSpec]:
    """Returns the canonical name and the spec of `mnist` or `sklearn` with overrides (`canvas=96,rows=1`)."""
    if digits not in NAMED:
        raise ValueError(f"unknown digits {digits!r}{did_you_mean(digits, NAMED)}; allowed: {', '.join(NAMED)}")
    changed = parse_overrides(DigitCanvasSpec, f"digit_canvas/{digits}", overrides)
    if changed.pop("digits", digits) != digits:
        raise ValueError("digits= and the name differ; write digit_canvas/mnist or digit_canvas/sklearn")
    spec = dataclasses.replace(NAMED[digits], **changed)
    return canonical_name(digits, NAMED[digits], spec), spec


def draw_canvas(spec: DigitCanvasSpec, digits: Digits, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the picture (canvas, canvas) uint8 and its answers (k,) int64; `digits` are those of the split."""
    images, labels = digits
    key = np.array([spec.seed, SPLITS.index(split)], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key, counter=np.array([0, index, 0, 0], np.uint64)))
    chosen = rng.integers(len(images), size=spec.num_questions)
    slack = np.array(spec.cell) - spec.digit_size
    moves = rng.integers(slack + 1, size=(spec.num_questions, 2))
    page = np.zeros((spec.canvas, spec.canvas), np.uint8)
    for i, (which, move) in enumerate(zip(chosen, moves, strict=True)):
        top, left = np.array(divmod(i, spec.columns)) * spec.cell + move
        page[top : top + spec.digit_size, left : left + spec.digit_size] = images[which]
    return page, labels[chosen].astype(np.int64)


def resize_digits(digits: Digits, size: int) -> Digits:
    """Returns the digits at (size, size), bilinear, in whole grey levels."""
    images, labels = digits
    if images.shape[1:] != (size, size):
        images = np.rint(resize(images[..., None], (size, size))[..., 0]).clip(0, 255).astype(np.uint8)
    return images, labels


def load_sklearn() -> dict[str, Digits]:
    """Returns scikit-learn's digits of both splits. Raises ValueError where it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("digit_canvas/sklearn needs scikit-learn: pip install 'vitcmp[data]'") from error
    data = load_digits()
    images, labels = np.rint(data.images * (255 / 16)).astype(np.uint8), data.target.astype(np.int64)
    is_test = np.arange(len(images)) % 5 == 4
    return {"train": (images[~is_test], labels[~is_test]), "test": (images[is_test], labels[is_test])}


def load_idx(folder: str | Path) -> dict[str, Digits]:
    """Returns MNIST's digits of both splits from the four idx files, packed (.gz) or not. Raises ValueError."""
    return {split: (_read_idx(folder, images, 3), _read_idx(folder, labels, 1).astype(np.int64))
            for split, (images, labels) in IDX_FILES.items()}  # fmt: skip


def in_canonical_order(digits: Digits) -> Digits:
    """Returns the digits sorted by label and pixels: MNIST is then the same data from any source."""
    images, labels = digits
    ranked = sorted(range(len(images)), key=lambda i: (labels[i], images[i].tobytes()))
    return images[ranked], labels[ranked]


def _read_idx(folder: str | Path, stem: str, num_axes: int) -> np.ndarray:
    """Reads one file: two zero bytes, the type (8, unsigned bytes), the number of axes, their lengths, the data."""
    root = Path(folder).expanduser()
    names = [f"{stem}{dash}idx{num_axes}-ubyte{suffix}" for dash in "-." for suffix in ("", ".gz")]
    path = next((root / name for name in names if (root / name).is_file()), None)
    if path is None:
        raise ValueError(f"mnist_dir={str(folder)!r} has none of {', '.join(names)}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, axes = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{axes}I", content, 4)
        data = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
        if (zero, kind, axes) != (0, 8, num_axes) or len(data) != np.prod(shape):
            raise ValueError(f"its header says type {kind}, shape {shape}; it has {len(data)} bytes of data")
    except (struct.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no whole idx file of unsigned bytes with {num_axes} axes: {error}") from error
    return data.reshape(shape)
