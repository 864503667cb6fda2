"""Stores the pixels of examples that a report shows: the data sets are opened again, and resized for each arm."""

import base64
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.capacity.arms import Arm, make_arms
from experiments.capacity.child import make_preprocess
from experiments.capacity.data.dataset import Dataset
from experiments.capacity.data.glyphs import LETTERS, parse_glyphs
from experiments.capacity.data.images import to_png
from experiments.capacity.data.sources import open_dataset
from experiments.capacity.examples import FILE, Examples, picture_name, read_examples, write_examples
from experiments.capacity.groups import Group
from experiments.capacity.kinds import KINDS, PER_KIND, group_key, ranked, right_shares
from experiments.capacity.plan import Local, fingerprint, spec_of

MOST_BYTES, MOST_BYTES_LARGE = 1_400_000, 8_000_000  # of all pictures; large: where one has a side above LARGE_PX
LARGE_PX = 128
Open = Callable[[Group], Dataset]


def store_examples(folder: Path, groups: Sequence[Group], local: Local) -> list[str]:
    """Writes the file of the groups that have runs; returns why some have no examples, a line each.

    Of a group whose data set is not here, what the file had before stays. Raises OSError where it cannot be written.
    """
    before, opened = read_examples(folder / FILE), _Opened(local)
    usable = [group for group in groups if group.runs and opened.is_here(group)]
    found = collect(usable, opened)
    for group in groups:
        if group not in usable and (kept := before.groups.get(group_key(group))):
            names = {name for example in kept.values() for name in example["pictures"].values()}
            found.update(Examples({group_key(group): kept}, {name: before.pictures[name] for name in names}))
    write_examples(folder / FILE, found)
    return list(opened.notes)


def collect(groups: Sequence[Group], open_test: Open) -> Examples:
    """Returns up to PER_KIND examples of each kind, the most contrasting first, as far as MOST_BYTES go.

    Every group has its first of each kind before any has its second.
    """
    found, num_bytes = Examples(), 0
    most = _most_bytes(groups)
    for group, index in _picks(groups):
        example, pictures = _example(group, index, open_test(group))
        new = {name: data for name, data in pictures.items() if name not in found.pictures}
        if num_bytes + sum(map(len, new.values())) <= most:
            num_bytes += sum(map(len, new.values()))
            found.add(group_key(group), example, pictures)
    return found


class _Opened:
    """Opens each test set once; `notes` says which cannot be opened, or are not what the runs were tested on."""

    def __init__(self, local: Local) -> None:
        self.local, self.notes = local, dict[str, None]()
        self.known: dict[str, Dataset | None] = {}

    def __call__(self, group: Group) -> Dataset:
        dataset = self.known[self._key(group)]
        assert dataset is not None
        return dataset

    def is_here(self, group: Group) -> bool:
        key = self._key(group)
        if key not in self.known:
            self.known[key] = self._open(group.shared["dataset"], group.shared["data"])
        return self.known[key] is not None

    def _open(self, name: str, data: Mapping[str, Any]) -> Dataset | None:
        try:
            dataset = open_dataset(name, data["test"], data_dir=self.local.data_dir, mnist_dir=self.local.mnist_dir)
            if fingerprint(dataset) == data["test_sha256"]:
                return dataset
            why = "it is not what the runs were tested on"
        except (ValueError, OSError, KeyError) as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
        self.notes[f"{name}: its examples cannot be shown: {why}"] = None
        return None

    @staticmethod
    def _key(group: Group) -> str:
        return json.dumps([group.shared["dataset"], group.shared["data"]], sort_keys=True)


def _picks(groups: Sequence[Group]) -> Iterator[tuple[Group, int]]:
    """Yields groups with an example's index, each once: the first of every kind and group, then the second ..."""
    of_group = [(group, right_shares(group)) for group in groups]
    lists = [[(group, i) for i in ranked(shares, kind)[:PER_KIND]] for kind in KINDS for group, shares in of_group]
    rounds = itertools.zip_longest(*lists)
    yield from (pick for row in rounds for pick in row if pick)


def _most_bytes(groups: Sequence[Group]) -> int:
    sides = [int(side) for group in groups for side in group.shared["high"].split("x")]
    return MOST_BYTES_LARGE if max(sides, default=0) > LARGE_PX else MOST_BYTES


def _example(group: Group, index: int, dataset: Dataset) -> tuple[dict[str, Any], dict[str, str]]:
    example, pictures, names = dataset[index], {}, {}
    for arm in make_arms(spec_of(group.shared), group.shared["low"], group.shared["high"]).values():
        data = to_png(seen(arm, group, example.image))
        names[arm.name] = picture_name(data)
        pictures[names[arm.name]] = base64.b64encode(data).decode()
    answer = [_answer_text(group.shared["dataset"], dataset, int(label)) for label in example.label]
    return {"index": index, "id": str(example.id), "answer": answer, "pictures": names}, pictures


def _answer_text(name: str, dataset: Dataset, label: int) -> str:
    """Returns the class's name; of a drawn letter, whose classes have none, the letter."""
    if name.partition("/")[0].partition(":")[0] == "glyphs":
        from experiments.capacity.data.builders import split_name  # needs TFDS, as the open data set does

        _, config, overrides = split_name(name)
        if parse_glyphs(config or "fine", overrides)[1].kind == "text":
            return LETTERS[label]
    return dataset.class_names[label]


def seen(arm: Arm, group: Group, image: np.ndarray) -> np.ndarray:
    """Returns the (h, w, 3) uint8 pixels that the arm's model is given; where it is given floats, these rounded."""
    pixels = make_preprocess(arm, group.shared["preprocessing"])(image)
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)
