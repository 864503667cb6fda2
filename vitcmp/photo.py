"""The shipped photograph: one real image on which models are compared (its origin and licence: data/README.md)."""

import importlib.resources
from typing import Any

import numpy as np

from vitcmp.resample import resize
from vitcmp.specs import parse_image_size


def load_photo(size: Any = None) -> np.ndarray:
    """Returns the photograph (1 h w 3), float32 in [-1, 1], at `size` (224, "80x176", (80, 176)) or at its 300 x 451.

    Stretched to the size by antialiased bilinear resampling in float64, and never rounded to uint8 (big_vision does so
    after a resize). Raises ValueError for a bad size.
    """
    source = importlib.resources.files("vitcmp") / "data" / "photo.npz"
    with source.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        photo = file["image"][None]
    if size is not None:
        photo = resize(photo.astype(np.float64), parse_image_size(size))
    return (photo / 127.5 - 1).astype(np.float32)
