"""Datasets worth a run, with what decides whether resolution can matter in them: how large their pictures are.

Splits and counts are TFDS's. `typical_size` is the common (height, width) as the datasets' pages and papers describe
it; what a user's copy holds is measured (`resolution_notes`). Nothing of them is shipped, and the licences are theirs.
"""

import dataclasses

import numpy as np

from experiments.capacity.data.dataset import Dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetRecipe:
    """`typical_size` is (height, width) in pixels. A control's pictures are so small that `high` cannot inform more."""

    name: str
    train: str
    test: str
    num_train: int
    num_test: int
    num_classes: int
    typical_size: tuple[int, int]
    licence: str
    source: str

    @property
    def is_control(self) -> bool:
        return max(self.typical_size) <= 64


RECIPES = {
    recipe.name: recipe
    for recipe in (
        DatasetRecipe(
            name="oxford_iiit_pet",
            train="train",
            test="test",
            num_train=3680,
            num_test=3669,
            num_classes=37,
            typical_size=(375, 500),
            licence="CC BY-SA 4.0",
            source="Parkhi et al., Cats and Dogs, CVPR 2012",
        ),
        DatasetRecipe(
            name="oxford_flowers102",
            train="train+validation",
            test="test",
            num_train=2040,
            num_test=6149,
            num_classes=102,
            typical_size=(500, 667),  # all were scaled to a short side of 500
            licence="not stated; for research",
            source="Nilsback and Zisserman, ICVGIP 2008",
        ),
        DatasetRecipe(
            name="food101",
            train="train",
            test="validation",
            num_train=75750,
            num_test=25250,
            num_classes=101,
            typical_size=(512, 512),  # all were scaled to a long side of 512 at most
            licence="not stated; pictures from Foodspotting, for research",
            source="Bossard et al., Food-101, ECCV 2014",
        ),
        DatasetRecipe(
            name="imagenette/full-size-v2",
            train="train",
            test="validation",
            num_train=9469,
            num_test=3925,
            num_classes=10,
            typical_size=(375, 500),
            licence="Apache 2.0 (the selection); ImageNet's terms (the pictures)",
            source="fast.ai's selection of ImageNet, Deng et al., CVPR 2009",
        ),
        DatasetRecipe(
            name="caltech_birds2011",
            train="train",
            test="test",
            num_train=5994,
            num_test=5794,
            num_classes=200,
            typical_size=(375, 500),
            licence="non-commercial research",
            source="Wah et al., CUB-200-2011, CNS-TR-2011-001",
        ),
        DatasetRecipe(
            name="dtd",
            train="train+validation",
            test="test",
            num_train=3760,
            num_test=1880,
            num_classes=47,
            typical_size=(480, 640),  # 300 to 640 a side
            licence="for research",
            source="Cimpoi et al., Describing Textures in the Wild, CVPR 2014; the first of ten folds",
        ),
        DatasetRecipe(
            name="cifar10",
            train="train",
            test="test",
            num_train=50000,
            num_test=10000,
            num_classes=10,
            typical_size=(32, 32),
            licence="not stated; for research",
            source="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        ),
        DatasetRecipe(
            name="eurosat",
            train="train[:80%]",
            test="train[80%:]",
            num_train=21600,
            num_test=5400,
            num_classes=10,
            typical_size=(64, 64),
            licence="MIT; Copernicus Sentinel data",
            source="Helber et al., EuroSAT, arXiv:1709.00029",
        ),
        DatasetRecipe(
            name="svhn_cropped",
            train="train",
            test="test",
            num_train=73257,
            num_test=26032,
            num_classes=10,
            typical_size=(32, 32),
            licence="non-commercial",
            source="Netzer et al., Reading Digits in Natural Images, 2011",
        ),
    )
}


def splits_of(name: str) -> tuple[str, str]:
    """Returns the splits to train and to test on: the recipe's, or else train and test."""
    recipe = RECIPES.get(name.removesuffix("/rgb"))
    return (recipe.train, recipe.test) if recipe else ("train", "test")


def resolution_notes(dataset: Dataset, *, low: int, high: int) -> list[str]:
    """Returns what to warn of, from a hundred pictures: ones so small that `high` informs no more than less would."""
    sizes = np.array(dataset.image_sizes())
    short, long = (int(np.median(side)) for side in (sizes.min(axis=1), sizes.max(axis=1)))
    typical = f"{dataset.name}: the median picture has sides of {short} and {long} pixels"
    if long <= low:
        return [f"{typical}: low={low} has all of its information, so a gain of high={high} is capacity"]
    if long < high:
        return [f"{typical}: high={high} enlarges it, and informs no more than {long} would"]
    if short < high:
        return [f"{typical}: high={high} enlarges its short side, and informs of that no more than {short} would"]
    return []


def help_text() -> str:
    """Returns a line for each recipe, for --help."""
    lines = []
    for recipe in RECIPES.values():
        height, width = recipe.typical_size
        kind = "negative control, " if recipe.is_control else ""
        num = f"{recipe.num_train:,} + {recipe.num_test:,} pictures of about {width} x {height} px"
        lines.append(f"{recipe.name}: {kind}{recipe.num_classes} classes, {num}; {recipe.licence}")
    return "\n".join(lines)
