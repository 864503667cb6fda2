"""Our own datasets as TFDS builders: `glyphs` and `digit_canvas`, prepared on first use, without TensorFlow.

They are ordinary TFDS datasets (ArrayRecord, PNG), which `tfds.data_source` reads too. TFDS prepares into a folder of
its own and renames it at the end; a lock keeps two processes from preparing at once, and what a killed one left is
removed.
"""

import abc
import contextlib
import fcntl
import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from experiments.capacity.data import digit_canvas, glyphs
from experiments.capacity.data.digit_canvas import SPLITS, DigitCanvasSpec, Digits
from experiments.capacity.data.glyphs import GlyphsSpec
from experiments.capacity.data.images import encode_png
from experiments.capacity.data.tfds_source import TfdsDataset, open_tfds, prepare_command
from vitcmp.specs import did_you_mean

FEW_DIGITS = "digit_canvas: the digits are scikit-learn's 1,797 of 8 x 8 pixels; mnist_dir= names a folder of MNIST's"
Draw = Callable[[str, int], tuple[np.ndarray, np.ndarray]]


class Config(tfds.core.BuilderConfig):
    """A name that a folder may have, and what decides every pixel."""

    def __init__(self, text: str, spec: GlyphsSpec | DigitCanvasSpec) -> None:
        super().__init__(name=text.translate(str.maketrans(":,=", "--_")), description=repr(spec))
        self.spec = spec


class _Drawn(tfds.core.GeneratorBasedBuilder):
    """Pictures drawn one by one, in the order of their numbers."""

    VERSION = tfds.core.Version("1.0.0")
    num_classes: int

    def _info(self) -> Any:
        side = self.builder_config.spec.canvas
        answer = tfds.features.ClassLabel(num_classes=self.num_classes)
        features = {
            "image": tfds.features.Image(shape=(side, side, 1), encoding_format="png"),
            "labels": tfds.features.Sequence(answer, length=self.builder_config.spec.num_questions),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "labels"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        draw, spec = self.prepare_draw(), self.builder_config.spec
        for i in range(spec.num_train if split == "train" else spec.num_test):
            image, labels = draw(split, i)
            yield i, {"image": encode_png(image), "labels": labels.tolist()}

    @abc.abstractmethod
    def prepare_draw(self) -> Draw:
        """Returns what draws example i of a split; also what makes this class abstract, and so no dataset of TFDS's."""


class Glyphs(_Drawn):
    """Letters, charts and dials whose answer needs detail of a known size; see experiments.capacity.data.glyphs."""

    BUILDER_CONFIGS: ClassVar = [Config(name, spec) for name, spec in glyphs.NAMED.items()]
    num_classes = glyphs.NUM_ANSWERS

    def prepare_draw(self) -> Draw:
        return lambda split, index: glyphs.draw_example(self.builder_config.spec, split, index)


class DigitCanvas(_Drawn):
    """Several handwritten digits on one canvas, read in order; see experiments.capacity.data.digit_canvas."""

    BUILDER_CONFIGS: ClassVar = [Config(name, spec) for name, spec in digit_canvas.NAMED.items()]
    num_classes = 10

    def __init__(self, *, load: Callable[[], dict[str, Digits]] = digit_canvas.load_sklearn, **options: Any) -> None:
        self._load = load
        super().__init__(**options)

    def prepare_draw(self) -> Draw:
        spec = self.builder_config.spec
        digits = {split: digit_canvas.resize_digits(part, spec.digit_size) for split, part in self._load().items()}
        return lambda split, index: digit_canvas.draw_canvas(spec, digits[split], split, index)


def open_drawn(name: str, split: str, *, data_dir: str | Path, mnist_dir: str | Path | None = None) -> TfdsDataset:
    """Opens `glyphs/fine`, `glyphs:detail=6,canvas=96`, `digit_canvas/mnist:rows=1` ..., and prepares it if need be.

    MNIST's digits are read from `mnist_dir`, or from TFDS's `mnist` where `data_dir` has it. `digit_canvas` without
    either takes scikit-learn's, and says so in its notes. Raises ValueError for a bad name and for digits that are
    not there, OSError for a disk that is full.
    """
    root = Path(data_dir).expanduser()
    base, config, overrides = split_name(name)
    check_split(name, split)
    if base == "glyphs":
        text, drawing = glyphs.parse_glyphs(config or "fine", overrides)
        builder = prepare(functools.partial(_make, Glyphs, text, drawing, root))
        return TfdsDataset(builder, split, name=f"{base}/{text}")
    has_mnist = mnist_dir is not None or _has_mnist(root)
    text, canvas = digit_canvas.parse_digit_canvas(config or ("mnist" if has_mnist else "sklearn"), overrides)
    load = functools.partial(_load_digits, canvas.digits, root, mnist_dir)
    builder = prepare(functools.partial(_make, DigitCanvas, text, canvas, root, load=load))
    return TfdsDataset(builder, split, name=f"{base}/{text}", notes=() if config or has_mnist else (FEW_DIGITS,))


def split_name(name: str) -> tuple[str, str, str]:
    """Returns the dataset, its configuration and its overrides: `glyphs/fine:detail=3`; the last two may be empty."""
    base, _, overrides = name.partition(":")
    base, _, config = base.partition("/")
    return base, config, overrides


def check_split(name: str, split: str) -> None:
    """Raises ValueError for a split that is none, before anything is drawn; `train[:80%]` is a part of one."""
    if split.partition("[")[0] not in SPLITS:
        raise ValueError(f"{name} has no split {split!r}{did_you_mean(split, SPLITS)}; it has {', '.join(SPLITS)}")


def prepare(make: Callable[[], Any]) -> Any:
    """Returns the builder that `make` returns, prepared once however many processes ask for it at the same time.

    It is made again under the lock: a builder knows only what was there when it was made.
    """
    builder = make()
    if builder.info.splits:
        return builder
    parent = Path(builder.data_dir).parent
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent / ".lock"):
        builder = make()
        if not builder.info.splits:
            for left in parent.glob("incomplete.*"):  # of a process that was killed: nobody else holds the lock
                shutil.rmtree(left)
            with _quiet():
                builder.download_and_prepare()
    return builder


def _make(builder: Any, text: str, spec: GlyphsSpec | DigitCanvasSpec, root: Path, **options: Any) -> Any:
    config = Config(text, spec)
    config = next((named for named in builder.BUILDER_CONFIGS if named.name == config.name), config)
    with _quiet():  # TFDS warns of a configuration that is not in its list
        return builder(config=config, data_dir=root, file_format="array_record", **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from saying that it downloads something of unknown size: nothing is downloaded here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _load_digits(source: str, root: Path, mnist_dir: str | Path | None) -> dict[str, Digits]:
    if source == "sklearn":
        return digit_canvas.load_sklearn()
    if mnist_dir is None and not _has_mnist(root):
        raise ValueError(
            "digit_canvas/mnist needs MNIST: name a folder with its idx files by mnist_dir=, or prepare TFDS's with\n"
            f"  {prepare_command('mnist', root)}\ndigit_canvas/sklearn needs neither"
        )
    if mnist_dir is not None:
        loaded = digit_canvas.load_idx(mnist_dir)
    else:
        loaded = {split: _read_mnist(root, split) for split in SPLITS}
    return {split: digit_canvas.in_canonical_order(digits) for split, digits in loaded.items()}


def _has_mnist(root: Path) -> bool:
    return any(root.glob("mnist/*/dataset_info.json"))


def _read_mnist(root: Path, split: str) -> Digits:
    dataset = open_tfds("mnist", split, data_dir=root)
    examples = [dataset[i] for i in range(len(dataset))]
    return np.stack([example.image[..., 0] for example in examples]), np.concatenate([e.label for e in examples])


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for the lock; the kernel lets go of it when its holder dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
