"""open_dataset: labelled images by name, from tensorflow-datasets, a folder, or drawn by our own builders."""

from pathlib import Path

from experiments.capacity.data.dataset import Dataset
from experiments.capacity.data.folder import open_folder
from experiments.capacity.data.tfds_source import TfdsDataset, find_builder

OURS = ("glyphs", "digit_canvas")


def open_dataset(name: str, split: str, *, data_dir: str | Path, mnist_dir: str | Path | None = None) -> Dataset:
    """Opens one split of a dataset:

    - `oxford_iiit_pet`, `imagenette/full-size-v2`, ...: tensorflow-datasets, prepared in `data_dir` before;
    - `folder:PATH`: one subfolder a class;
    - `glyphs/{fine,coarse,crowded}`, `glyphs:detail=6,canvas=96`, `digit_canvas/{mnist,sklearn}`, with any field of
      GlyphsSpec or DigitCanvasSpec: drawn here, prepared in `data_dir` on first use.

    Raises ValueError before any work: unknown dataset or split, no labels, no images, not prepared (with the command
    that prepares it), a package that is not installed.
    """
    if name.startswith("folder:"):
        return open_folder(name.removeprefix("folder:"), split, data_dir=data_dir)
    if name.replace(":", "/").split("/")[0] in OURS:
        return _open_drawn(name, split, data_dir, mnist_dir)
    return TfdsDataset(find_builder(name, data_dir=data_dir, known=OURS), split, name=name)


def _open_drawn(name: str, split: str, data_dir: str | Path, mnist_dir: str | Path | None) -> Dataset:
    try:
        from experiments.capacity.data.builders import open_drawn  # defines TFDS builders: it needs TFDS to be imported
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} needs {error.name}: pip install 'vitcmp[data]'") from error
    return open_drawn(name, split, data_dir=data_dir, mnist_dir=mnist_dir)
