"""Test examples by who gets them right, from the records' bits. Pure functions.

An arm gets an example right where most of its seeds do, and wrong where most do not; a tie is neither.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.capacity.arms import CELLS
from experiments.capacity.groups import Group
from experiments.capacity.schema import sha256

# The arms that get it right; all others of the group get it wrong.
KINDS: dict[str, tuple[str, ...]] = {
    "only high": ("high",),
    "patch and high": ("high", "patch"),
    "all": tuple(CELLS),
    "none": (),
}
PER_KIND = 8  # that a page shows
Shares = Mapping[str, np.ndarray]


def group_key(group: Group) -> str:
    """Returns the hash of what makes it a group: all that its runs share, and what they were tested on."""
    tested = next((run["final"]["examples_sha256"] for runs in group.runs.values() for run in runs.values()), None)
    return sha256({"shared": group.shared, "tested": tested})


def right_shares(group: Group) -> dict[str, np.ndarray]:
    """Returns for each arm the share of its seeds that get each test example right."""
    return {arm: group.values([arm], sorted(runs))[0].mean(axis=0) for arm, runs in group.runs.items()}


def ranked(shares: Shares, kind: str) -> list[int]:
    """Returns the examples of a kind, the most contrasting first: by the arm that speaks least for it, then by index.

    None where the group lacks an arm that the kind is about, or has no other to set it against.
    """
    wanted = KINDS[kind]
    is_about_some = kind in ("only high", "patch and high")
    if not shares or (is_about_some and (not set(wanted) <= set(shares) or set(wanted) == set(shares))):
        return []
    return _ranked(shares, wanted)


def num_alone(shares: Shares) -> dict[str, int]:
    """Returns for each arm how many examples it alone gets right; for `low`, which sees least, that is luck."""
    return {arm: len(_ranked(shares, (arm,))) for arm in shares}


def _ranked(shares: Shares, right: Sequence[str]) -> list[int]:
    signed = np.array([share if arm in right else 1 - share for arm, share in shares.items()])
    weakest = np.round(signed.min(axis=0), 9)
    found = np.flatnonzero(weakest > 0.5)
    return found[np.argsort(-weakest[found], kind="stable")].tolist()
