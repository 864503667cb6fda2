"""What every source of labelled images gives: random access to decoded images with k labels each."""

import dataclasses
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """`image` (h, w, 3) uint8, `label` (k,) int64: one answer to each of k questions; `id` names it in its dataset."""

    image: np.ndarray
    label: np.ndarray
    id: str


class Dataset(Protocol):
    """One split. Reading is safe from several threads; the same index gives the same example on every machine.

    Every question has the same `num_classes` answers, called `class_names`; plain classification has one question.
    `notes` is what a user should be told, such as how many broken images were left out.
    """

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def num_questions(self) -> int: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def image_sizes(self, limit: int = 100) -> list[tuple[int, int]]:
        """Returns (height, width) of at most `limit` images, evenly spaced, read from their headers."""
        ...


def spread(num: int, limit: int) -> list[int]:
    """Returns at most `limit` indices, evenly spaced over range(num)."""
    return [i * num // limit for i in range(limit)] if num > limit else list(range(num))


def check_index(index: int, num: int) -> int:
    """Returns the index, counted from the start. Raises IndexError, which also ends a plain `for` over a dataset."""
    if not -num <= index < num:
        raise IndexError(f"index {index} is outside a dataset of {num} examples")
    return index % num
