"""Names of another library's arrays, by tables of patterns: the first that matches a whole name renames it."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

Rules = Sequence[tuple[str, str]]


def rename(arrays: Mapping[str, np.ndarray], rules: Rules) -> dict[str, np.ndarray]:
    """Returns the arrays under new names; ValueError for one that no rule knows, and for two that get one name."""
    renamed: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        matches = (re.sub(pattern, new, name) for pattern, new in rules if re.fullmatch(pattern, name))
        new_name = next(matches, None)
        if new_name is None:
            raise ValueError(f"no rule renames {name}")
        if new_name in renamed:
            raise ValueError(f"two arrays are renamed to {new_name}, {name} among them")
        renamed[new_name] = array
    return renamed


def check_names(given: Mapping[str, object], expected: Mapping[str, object], *, library: str) -> None:
    """Raises ValueError where the library names other arrays than those that it is given."""
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"this version of {library} names its weights otherwise: {len(missing)} of its own are not given "
            f"({', '.join(missing[:3])}), {len(unexpected)} are not known to it ({', '.join(unexpected[:3])})"
        )
