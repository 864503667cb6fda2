"""tensorflow-datasets as a source, in both of its formats."""

import io
import json
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
pytest.importorskip("PIL")

from experiments.capacity.data.images import ImageError, encode_png
from experiments.capacity.data.sources import open_dataset
from experiments.capacity.data.tfds_source import find_features
from tests.core.prepared_data import prepared, run

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
