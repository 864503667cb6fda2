"""Our own builders of tensorflow-datasets: prepared once, as they are drawn, and safe to kill."""

import io
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
pytest.importorskip("PIL")

from experiments.capacity.data import builders
from experiments.capacity.data.digit_canvas import draw_canvas, in_canonical_order, parse_digit_canvas
from experiments.capacity.data.glyphs import draw_example, parse_glyphs
from experiments.capacity.data.images import encode_png
from experiments.capacity.data.sources import open_dataset
from experiments.capacity.data.tfds_source import TfdsDataset
from tests.core.prepared_data import prepared, run

TINY = "num_train=12,num_test=6"


class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """As TFDS's, of 40 + 30 digits."""

    VERSION = tfds.core.Version("3.0.1")
    NUM: ClassVar = {"train": 40, "test": 30}

    def _info(self):
        features = {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.NUM}

    def _generate_examples(self, split):
        images, labels = mnist_digits(self.NUM[split])
        for i in range(len(images)):
            yield str(i), {"image": io.BytesIO(encode_png(images[i])), "label": int(labels[i])}


def mnist_digits(num):
    return np.random.default_rng(num).integers(256, size=(num, 28, 28), dtype=np.uint8), np.arange(num) % 10


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        (f"glyphs/fine:{TINY}", f"glyphs/fine:{TINY}"),
        (f"glyphs:detail=3,canvas=48,{TINY}", f"glyphs/fine:canvas=48,detail=3,{TINY}"),
        (f"glyphs/crowded:{TINY}", f"glyphs/crowded:{TINY}"),
    ],
)
def test_glyphs_are_prepared_on_first_use_as_they_are_drawn(tmp_path, monkeypatch, capsys, name, canonical):
    dataset = open_dataset(name, "test", data_dir=tmp_path)
    assert dataset.name == canonical and len(dataset) == 6 and dataset.num_classes == 8
    _, spec = parse_glyphs(*canonical.removeprefix("glyphs/").partition(":")[::2])
    for i, example in enumerate(dataset):
        picture, answers = draw_example(spec, "test", i)
        np.testing.assert_array_equal(example.image, np.repeat(picture[..., None], 3, axis=2))
        np.testing.assert_array_equal(example.label, answers)
    monkeypatch.setattr(builders.glyphs, "draw_example", None)  # from now on nothing can be drawn
    assert len(open_dataset(name, "train", data_dir=tmp_path)) == 12
    assert capsys.readouterr().out == ""


def test_plain_tfds_reads_what_we_prepared(tmp_path):
    ours = open_dataset(f"glyphs/crowded:{TINY}", "train", data_dir=tmp_path)
    (folder,) = tmp_path.glob("glyphs/*/1.0.0")
    theirs = tfds.builder_from_directory(folder).as_data_source("train")
    for example, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(example.image[..., :1], expected["image"])
        np.testing.assert_array_equal(example.label, expected["labels"])


KILLED = """
import os
from experiments.capacity.data import builders
draw, drawn = builders.glyphs.draw_example, []
def draw_some(spec, split, index):
    drawn.append(index)
    if len(drawn) > 15:
        os.kill(os.getpid(), 9)
    return draw(spec, split, index)
builders.glyphs.draw_example = draw_some
builders.open_drawn({name!r}, "train", data_dir={folder!r})
"""


@pytest.mark.slow
def test_a_kill_while_preparing_leaves_nothing_that_counts(tmp_path):
    name = f"glyphs/fine:{TINY}"
    assert run(KILLED.format(name=name, folder=str(tmp_path))).returncode == -9
    left = [path.name for path in tmp_path.glob("glyphs/*/*")]
    assert any(part.startswith("incomplete") for part in left) and "1.0.0" not in left
    assert len(open_dataset(name, "test", data_dir=tmp_path)) == 6
    assert sorted(path.name for path in tmp_path.glob("glyphs/*/*")) == [".lock", "1.0.0", "metadata.json"]


@pytest.mark.slow
def test_two_processes_may_prepare_at_once(tmp_path):
    code = (
        "from experiments.capacity.data.sources import open_dataset; "
        f"print(sum(int(e.image.sum()) for e in open_dataset('glyphs:{TINY}', 'train', data_dir={str(tmp_path)!r})))"
    )
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(run, [code, code]))
    assert [child.returncode for child in done] == [0, 0], done[0].stderr + done[1].stderr
    assert done[0].stdout == done[1].stdout != ""


def test_mnists_digits_give_the_same_canvases_from_idx_files_and_from_tfds(tmp_path):
    splits = {split: mnist_digits(num) for split, num in Mnist.NUM.items()}
    for (images, labels), stem in zip(splits.values(), ("train", "t10k"), strict=True):
        for array, words in ((images, "images-idx3"), (labels.astype(np.uint8), "labels-idx1")):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{stem}-{words}-ubyte").write_bytes(header + array.tobytes())
    prepared(Mnist, tmp_path / "tfds")
    name = f"digit_canvas:{TINY}"
    ours = open_dataset(name, "test", data_dir=tmp_path / "idx", mnist_dir=tmp_path)
    theirs = open_dataset(name, "test", data_dir=tmp_path / "tfds")
    assert ours.name == theirs.name == f"digit_canvas/mnist:{TINY}"
    assert (ours.num_questions, ours.num_classes, ours.notes) == (4, 10, ())
    _, spec = parse_digit_canvas("mnist", TINY)
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_array_equal(one.image, other.image)
        picture, answers = draw_canvas(spec, in_canonical_order(splits["test"]), "test", i)
        np.testing.assert_array_equal(one.image[..., 0], picture)
        np.testing.assert_array_equal(one.label, answers)


@pytest.mark.slow
def test_without_mnist_the_digits_are_scikit_learns_and_that_is_said(tmp_path):
    pytest.importorskip("sklearn")
    dataset = open_dataset(f"digit_canvas:{TINY}", "train", data_dir=tmp_path)
    assert dataset.name == f"digit_canvas/sklearn:{TINY}"
    assert "the digits are scikit-learn's 1,797" in dataset.notes[0]
    assert open_dataset(f"digit_canvas/sklearn:{TINY}", "train", data_dir=tmp_path).notes == ()


def test_a_full_disk_is_said_and_the_next_try_succeeds(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builders, "encode_png", no_space)
    with pytest.raises(OSError, match="No space left"):
        open_dataset(f"glyphs:{TINY}", "train", data_dir=tmp_path)
    monkeypatch.undo()
    assert isinstance(open_dataset(f"glyphs:{TINY}", "train", data_dir=tmp_path), TfdsDataset)
