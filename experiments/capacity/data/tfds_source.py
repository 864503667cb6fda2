"""tensorflow-datasets as a source: prepared data is read without TensorFlow, ArrayRecord and TFRecord alike.

Pictures are decoded by Pillow from the stored bytes, so that both formats, and both frameworks, see the same pixels;
EXIF orientation is ignored, as TensorFlow's decoders do. Nothing is downloaded here: offline, TFDS would wait for
minutes before it fails.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.capacity.data.dataset import Example, check_index, spread
from experiments.capacity.data.images import ImageError, decode_image, image_size
from experiments.capacity.data.tfrecord import TFRecords
from vitcmp.specs import did_you_mean

READABLE = ("array_record", "tfrecord")


class TfdsDataset:
    """One split of a prepared TFDS builder, such as `train` or `train[:80%]`.

    The pictures and the answers are the builder's supervised keys, or else its only picture and its only class label;
    answers may be a sequence of fixed length, one for each question. Raises ValueError for what has none of that, for
    an unknown split, and for a split whose labels are withheld (-1).
    """

    def __init__(self, builder: Any, split: str, *, name: str, notes: tuple[str, ...] = ()) -> None:
        self.name, self.split, self.notes = name, split, notes
        self._image_key, self._label_key = find_features(name, builder.info)
        label = builder.info.features[self._label_key]
        self.num_questions = label.shape[0] if label.shape else 1
        self.class_names = class_names(_class_label(label))
        self._features = _part(builder.info.features, (self._image_key, self._label_key))
        self._decoders = {self._image_key: _tfds().decode.SkipDecoding()}
        self._records = _open_records(name, builder, split)
        self._check_labels()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        i = check_index(index, len(self))
        image, label = self._read(i)
        try:
            return Example(decode_image(image, rotate=False), label, str(i))
        except ImageError as error:
            raise ImageError(f"{self.name}, {self.split}, example {i}: {error}") from error

    def image_sizes(self, limit: int = 100) -> list[tuple[int, int]]:
        return [image_size(self._read(i)[0], rotate=False) for i in spread(len(self), limit)]

    def _read(self, index: int) -> tuple[bytes, np.ndarray]:
        """Returns the picture as it is stored, encoded, and its answers (k,) int64."""
        example = self._features.deserialize_example_np(self._records[index], decoders=self._decoders)
        return example[self._image_key], np.atleast_1d(np.asarray(example[self._label_key], np.int64))

    def _check_labels(self) -> None:
        if any(self._read(i)[1].min() < 0 for i in (0, -1 % len(self))):
            raise ValueError(f"{self.name} has no labels in split {self.split!r}: they are withheld, and stored as -1")


def open_tfds(name: str, split: str, *, data_dir: str | Path) -> TfdsDataset:
    """Opens a prepared dataset by TFDS's name, such as `cifar10` or `imagenette/full-size-v2:1.0.0`."""
    return TfdsDataset(find_builder(name, data_dir=data_dir), split, name=name)


def find_builder(name: str, *, data_dir: str | Path, known: tuple[str, ...] = (), **options: Any) -> Any:
    """Returns TFDS's builder. Raises ValueError for an unknown name, with a hint from TFDS's own and `known` ones."""
    tfds = _tfds()
    try:
        return tfds.builder(name, data_dir=Path(data_dir).expanduser(), **options)
    except tfds.core.DatasetNotFoundError as error:
        names = [*known, *tfds.list_builders(with_community_datasets=False)]
        hint = did_you_mean(name.split("/")[0].split(":")[0], names)
        raise ValueError(
            f"unknown dataset {name!r}{hint}; a name of tensorflow-datasets, folder:PATH, {', '.join(known)}"
        ) from error
    except ModuleNotFoundError as error:
        package = error.name or "tensorflow"  # TFDS wraps the error, and loses the name
        raise ValueError(f"{name}: TFDS's description of it needs {package}: pip install {package}") from error
    except (ValueError, AssertionError) as error:  # an unknown configuration or version
        raise ValueError(f"{name}: {_explain(name, error)}") from error


def _explain(name: str, error: Exception) -> str:
    base, _, config = name.partition(":")[0].partition("/")
    try:
        allowed = list(_tfds().builder_cls(base).builder_configs)
    except (ValueError, ImportError):  # TFDS does not know the name either
        return str(error).splitlines()[0]
    if config and config not in allowed:
        return f"{base} has no configuration {config!r}{did_you_mean(config, allowed)}; it has {', '.join(allowed)}"
    return str(error).splitlines()[0]


def prepare_command(name: str, data_dir: str | Path) -> str:
    return f"python -m experiments.capacity.data.prepare --dataset='{name}' --data_dir='{data_dir}'"


def find_features(name: str, info: Any) -> tuple[str, str]:
    """Returns the keys of the picture and of its answers. Raises ValueError, which lists the features."""
    features = info.features
    kinds = {key: type(feature).__name__ for key, feature in features.items()}
    chosen = tuple(info.supervised_keys or ())
    if len(chosen) != 2 or not set(chosen) <= set(kinds):
        images = [key for key, kind in kinds.items() if kind == "Image"]
        labels = [key for key, feature in features.items() if _class_label(feature)]
        chosen = tuple(_only(keys, word) for keys, word in ((images, "image"), (labels, "label")))
    image, label = chosen
    listed = ", ".join(f"{key} ({kind})" for key, kind in kinds.items())
    if kinds.get(image) != "Image":
        raise ValueError(f"{name} has no single picture an example; its features: {listed}")
    if label not in kinds or not _class_label(features[label]):
        raise ValueError(f"{name} has no labels: no ClassLabel, and no sequence of a fixed number; it has {listed}")
    return image, label


def class_names(label: Any) -> tuple[str, ...]:
    return tuple(label.names) if label.names else tuple(map(str, range(label.num_classes)))


def _only(keys: list[str], preferred: str) -> str | None:
    return preferred if preferred in keys else keys[0] if len(keys) == 1 else None


def _class_label(feature: Any) -> Any | None:
    """Returns the ClassLabel of a feature that is one, or a sequence of a fixed number of them; else None."""
    inner = feature.feature if type(feature).__name__ == "Sequence" else feature
    if type(inner).__name__ != "ClassLabel" or None in feature.shape or not inner.num_classes:
        return None
    return inner


def _part(features: Any, keys: tuple[str, ...]) -> Any:
    """Returns only these features: the others, such as masks, are not parsed."""
    return _tfds().features.FeaturesDict({key: features[key] for key in keys})


def _open_records(name: str, builder: Any, split: str) -> Any:
    """Returns the serialized examples of a split, by index."""
    splits = builder.info.splits
    if not splits:
        raise ValueError(
            f"{name} is not prepared in {builder.data_dir}; prepare it, where there is a network, with\n"
            f"  {prepare_command(name, builder._data_dir_root)}"
        )
    try:
        parts = splits[split].file_instructions
    except (KeyError, ValueError, AssertionError) as error:
        sizes = ", ".join(f"{key} ({info.num_examples} images)" for key, info in splits.items())
        hint = did_you_mean(split, splits)
        raise ValueError(
            f"{name} has no split {split!r}{hint}; it has {sizes}, and parts such as train[:80%]"
        ) from error
    if not splits[split].num_examples:
        raise ValueError(f"{name} has no image in split {split!r}")
    if (kind := builder.info.file_format.value) not in READABLE:
        raise ValueError(f"{name} in {builder.data_dir} is stored as {kind}; readable are {' and '.join(READABLE)}")
    if kind == "tfrecord":
        return TFRecords(parts)
    raw = _tfds().decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split, deserialize_method=raw)


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError("this dataset needs tensorflow-datasets: pip install 'vitcmp[data]'") from error
    return tensorflow_datasets
