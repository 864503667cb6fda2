"""Downloads a dataset of tensorflow-datasets and prepares it as ArrayRecord, which needs no TensorFlow to be read.

Command: python -m experiments.capacity.data.prepare --dataset=oxford_iiit_pet --data_dir=DIR   (minutes; a network)
Outputs: the dataset under --data_dir, in TFDS's layout. What is there already is left as it is.
Exit codes: 0 prepared, 2 bad usage, no network or no disk.

Some of TFDS's builders need TensorFlow to write: those that hand over pixels, such as mnist and cifar10.
"""

from collections.abc import Sequence

from absl import flags

from experiments.capacity.data.sources import OURS, open_dataset
from experiments.capacity.data.tfds_source import find_builder
from vitcmp.usage import start

DATASET = flags.DEFINE_string("dataset", None, "A name of tensorflow-datasets, such as imagenette/full-size-v2.")
DATA_DIR = flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Where TFDS keeps its datasets.")


def main(argv: Sequence[str]) -> int:
    if not DATASET.value:
        raise ValueError("--dataset=NAME is missing: which dataset of tensorflow-datasets?")
    if DATASET.value.startswith("folder:"):
        raise ValueError("a folder of pictures is read as it is: there is nothing to prepare")
    if DATASET.value.replace(":", "/").split("/")[0] in OURS:
        dataset = open_dataset(DATASET.value, "train", data_dir=DATA_DIR.value)
        print(f"{dataset.name} is prepared in {DATA_DIR.value}: train ({len(dataset)}) and test")
        return 0
    builder = find_builder(DATASET.value, data_dir=DATA_DIR.value, known=OURS, file_format="array_record")
    try:
        builder.download_and_prepare()
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # no TensorFlow; network, disk, checksums
        raise ValueError(f"cannot prepare {DATASET.value}: {error}") from error
    splits = ", ".join(f"{name} ({split.num_examples})" for name, split in builder.info.splits.items())
    print(f"{DATASET.value} is prepared in {builder.data_dir}: {splits}")
    return 0


if __name__ == "__main__":
    start(main)
