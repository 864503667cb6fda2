"""tensorflow-datasets as a source, in both of its formats, and our own builders: prepared once, safe to kill."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
pytest.importorskip("PIL")

from experiments.capacity.data import builders
from experiments.capacity.data.digit_canvas import draw_canvas, in_canonical_order, parse_digit_canvas
from experiments.capacity.data.glyphs import draw_example, parse_glyphs
from experiments.capacity.data.images import ImageError, encode_png
from experiments.capacity.data.sources import open_dataset
from experiments.capacity.data.tfds_source import TfdsDataset, find_features

ROOT = Path(__file__).parents[2]
TINY = "num_train=12,num_test=6"
NUM = {"train": 11, "test": 5}


def toy_picture(i):
    return np.random.default_rng(i).integers(256, size=(4 + i, 7, 3), dtype=np.uint8)


class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Pictures of different sizes, with a mask that is to be passed over."""

    VERSION = tfds.core.Version("1.0.0")
    LABELS = tfds.features.ClassLabel(names=["cat", "dog", "emu"])
    MISSING = False

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "mask": tfds.features.Image(shape=(None, None, 1)),
            "label": self.LABELS,
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label"),
            disable_shuffling=True,
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in NUM}

    def _generate_examples(self, split):
        for i in range(NUM[split]):
            label = -1 if self.MISSING and split == "test" else i % 3
            files = [io.BytesIO(encode_png(pixels)) for pixels in (toy_picture(i), toy_picture(i)[..., 0])]
            yield i, {"image": files[0], "mask": files[1], "label": label}


class Withheld(Toy, skip_registration=True):
    """Its test labels are not published."""

    MISSING = True


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


def prepared(builder, folder, file_format="array_record"):
    return builders.prepare(lambda: builder(data_dir=folder, file_format=file_format))


@pytest.fixture(scope="module")
def array_record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepared(Toy, folder)
    return folder


@pytest.fixture(scope="module")
def tfrecord(array_record, tmp_path_factory):
    """The same dataset with its records framed as TFRecord, and without their checksums."""
    builder = tfds.builder("toy", data_dir=array_record)
    folder = tmp_path_factory.mktemp("data") / "toy" / "1.0.0"
    shutil.copytree(builder.data_dir, folder)
    for path in folder.glob("*.array_record*"):
        split = path.name.removeprefix("toy-").partition(".")[0]
        raw = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        framed = b"".join(struct.pack("<Q4x", len(record)) + record + bytes(4) for record in raw)
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(framed)
        path.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("array_record", "tfrecord")
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder.parents[1]


def check_toy(dataset, indices):
    assert len(dataset) == len(indices)
    for example, i in zip(dataset, indices, strict=True):
        np.testing.assert_array_equal(example.image, toy_picture(i))
        assert example.label.tolist() == [i % 3] and example.label.dtype == np.int64


# Reading


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize(
    ("split", "indices"),
    [
        ("train", range(11)),
        ("test", range(5)),
        ("train[2:5]", range(2, 5)),
        ("train[:50%]", range(6)),
        ("train[8:]+test[:2]", [8, 9, 10, 0, 1]),
    ],
)
def test_prepared_data_is_read_in_order_whatever_its_format(request, file_format, split, indices):
    dataset = open_dataset("toy", split, data_dir=request.getfixturevalue(file_format))
    check_toy(dataset, list(indices))
    assert dataset.class_names == ("cat", "dog", "emu")
    assert (dataset.num_classes, dataset.num_questions, dataset.name, dataset.split) == (3, 1, "toy", split)
    assert dataset[0].id == "0"


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_sizes_come_from_headers(request, file_format):
    dataset = open_dataset("toy", "train", data_dir=request.getfixturevalue(file_format))
    assert dataset.image_sizes(3) == [(4, 7), (7, 7), (11, 7)]


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_threads_may_read_at_once(request, file_format):
    dataset = open_dataset("toy", "train", data_dir=request.getfixturevalue(file_format))
    indices = np.random.default_rng(0).integers(11, size=300).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, example in zip(indices, pool.map(dataset.__getitem__, indices), strict=True):
            np.testing.assert_array_equal(example.image, toy_picture(i))


def test_an_index_beyond_the_end_is_an_index_error(array_record):
    dataset = open_dataset("toy", "train", data_dir=array_record)
    np.testing.assert_array_equal(dataset[-1].image, toy_picture(10))
    with pytest.raises(IndexError, match="index 11 is outside a dataset of 11 examples"):
        dataset[11]


@pytest.mark.slow
def test_tfrecord_written_by_tensorflow_is_read_as_tensorflow_reads_it(tmp_path):
    pytest.importorskip("tensorflow")
    builder = prepared(Toy, tmp_path, "tfrecord")
    theirs = list(tfds.as_numpy(builder.as_dataset("train", shuffle_files=False)))
    ours = open_dataset("toy", "train", data_dir=tmp_path)
    assert builder.info.file_format.value == "tfrecord" and len(ours) == len(theirs)
    for example, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(example.image, expected["image"])
        assert example.label == expected["label"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-3], "is cut off in record 10: prepare the dataset again"),
        (lambda content: content[: len(content) // 2], "is cut off in record"),
        (lambda content: content + struct.pack("<Q8x", 0), "has 12 records, its dataset_info.json says 11"),
    ],
)
def test_a_damaged_tfrecord_file_is_named(tfrecord, tmp_path, change, message):
    shutil.copytree(tfrecord, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.rglob("*train.tfrecord*")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        open_dataset("toy", "train", data_dir=tmp_path)


def test_a_broken_picture_is_named(tfrecord, tmp_path):
    shutil.copytree(tfrecord, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.rglob("*train.tfrecord*")
    content = path.read_bytes()
    whole = encode_png(toy_picture(7))
    assert whole in content
    path.write_bytes(content.replace(whole, bytes(len(whole))))
    with pytest.raises(ImageError, match="toy, train, example 7: no picture"):
        open_dataset("toy", "train", data_dir=tmp_path)[7]


@pytest.mark.slow
def test_reading_needs_no_tensorflow(tfrecord):
    code = (
        "import sys; from experiments.capacity.data.sources import open_dataset; "
        f"print(len([e.image for e in open_dataset('toy', 'train', data_dir={str(tfrecord)!r})])); "
        "print('tensorflow' in sys.modules)"
    )
    assert run(code).stdout == "11\nFalse\n"


def run(code, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, **options)


# Errors before any work


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("mnits", "train", r"unknown dataset 'mnits'; did you mean 'mnist'\?; a name of tensorflow-datasets, folder:"),
        ("glyph", "train", r"unknown dataset 'glyph'; did you mean 'glyphs'"),
        ("mnist", "train", r"mnist is not prepared in .*mnist/3.0.1; prepare it.*\n  python -m .* --dataset='mnist'"),
        ("imagenette/full-size-v3", "train", "has no configuration 'full-size-v3'; did you mean 'full-size-v2'"),
        ("cifar10:9.9.9", "train", "cifar10 cannot be loaded at version 9.9.9, only: 3"),
        ("toy", "tset", r"toy has no split 'tset'; did you mean 'test'\?; it has train .11 images., test .5 images."),
        ("toy", "train[:a%]", r"toy has no split 'train\[:a%\]'"),
        ("imdb_reviews", "train", r"no single picture an example; its features: text .Text., label .ClassLabel."),
        ("clevr", "train", r"clevr has no labels: .* it has image .Image., file_name .Text."),
        ("glyphs/fien", "train", "unknown glyphs 'fien'; did you mean 'fine'"),
        ("glyphs:detial=3", "train", "unknown field 'detial=3'; did you mean 'detail'"),
        ("glyphs/fine", "tset", r"glyphs/fine has no split 'tset'; did you mean 'test'\?; it has train, test"),
        ("digit_canvas/mnist", "train", "digit_canvas/mnist needs MNIST: name a folder .*mnist_dir="),
        ("folder:/nowhere", "train", "folder:/nowhere: there is no folder /nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_a_clear_error(array_record, name, split, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(name, split, data_dir=array_record)


def test_withheld_labels_are_an_error(tmp_path):
    prepared(Withheld, tmp_path)
    assert len(open_dataset("withheld", "train", data_dir=tmp_path)) == 11
    with pytest.raises(ValueError, match="withheld has no labels in split 'test': they are withheld, and stored as -1"):
        open_dataset("withheld", "test", data_dir=tmp_path)


def test_a_split_of_no_images_is_an_error(array_record):
    with pytest.raises(ValueError, match=r"toy has no image in split 'train\[5:5\]'"):
        open_dataset("toy", "train[5:5]", data_dir=array_record)


def info(supervised_keys=None, **features):
    return SimpleNamespace(features=tfds.features.FeaturesDict(features), supervised_keys=supervised_keys)


IMAGE, LABEL = tfds.features.Image(), tfds.features.ClassLabel(num_classes=3)


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        (info(("image", "label"), image=IMAGE, label=LABEL, other=LABEL), ("image", "label")),
        (info(picture=IMAGE, kind=LABEL), ("picture", "kind")),
        (info(image=IMAGE, mask=IMAGE, label=LABEL, breed=LABEL), ("image", "label")),
        (info(image=IMAGE, labels=tfds.features.Sequence(LABEL, length=4)), ("image", "labels")),
        (info(("image", "other", "label"), image=IMAGE, label=LABEL, other=LABEL), ("image", "label")),
    ],
)
def test_the_features_are_told_from_keys_kinds_and_names(given, keys):
    assert find_features("some", given) == keys


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (info(left=IMAGE, right=IMAGE, label=LABEL), "no single picture"),
        (info(image=IMAGE, breed=LABEL, colour=LABEL), "has no labels"),
        (info(("image", "label"), image=IMAGE, label=tfds.features.Scalar(np.int64)), "has no labels: no ClassLabel"),
        (info(image=IMAGE, labels=tfds.features.Sequence(LABEL)), "no ClassLabel, and no sequence of a fixed number"),
        (info(image=IMAGE, boxes=tfds.features.Sequence({"label": LABEL})), "has no labels"),
    ],
)
def test_what_has_no_single_picture_or_no_label_is_a_clear_error(given, message):
    with pytest.raises(ValueError, match=message):
        find_features("some", given)


# Our own builders


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
