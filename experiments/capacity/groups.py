"""Records into groups: the runs that one split is made of. Nothing is mixed that does not compare, and it is said."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.capacity.arms import CELLS
from experiments.capacity.schema import SPLIT_BY, Record, sha256, unpack_bits, unpack_losses

TITLE = ("backend", "dataset", "model", "low", "high")
METRICS = ("accuracy", "loss")


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The runs of one experiment: alike in everything but arm and seed, and tested on the same examples."""

    shared: Mapping[str, Any]  # what is the same in every run
    runs: Mapping[str, Mapping[int, Record]]  # those that went well, by arm (in CELLS' order) and seed
    failed: tuple[Record, ...]
    differs: tuple[str, ...]  # how it differs from other groups of the same title: `recipe.learning_rate=0.001`
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Returns one line for people: `jax glyphs vit_ti16, 32 and 64 px`."""
        backend, dataset, model, low, high = (self.shared[key] for key in TITLE)
        return " ".join([f"{backend} {dataset} {model}, {low} and {high} px", *(f"({one})" for one in self.differs)])

    def paired_seeds(self, arms: Sequence[str]) -> list[int]:
        """Returns the seeds that every one of the arms has, and started from the same weights with."""
        common = set.intersection(*(set(self.runs[arm]) for arm in arms))
        return sorted(filter(self.starts_alike, common))

    def starts_alike(self, seed: int) -> bool:
        """Says whether the seed's arms started from the same weights."""
        runs = [by_seed[seed]["run"] for by_seed in self.runs.values() if seed in by_seed]
        return len({run["weights"]["sha256"] for run in runs}) == 1

    def values(self, arms: Sequence[str], seeds: Sequence[int], metric: str = "accuracy") -> np.ndarray:
        """Returns (arms, seeds, examples): correctness, or losses; (arms, seeds, 1) where only means were kept."""
        finals = [[self.runs[arm][seed]["final"] for seed in seeds] for arm in arms]
        if metric == "accuracy":
            return np.array([[unpack_bits(f["correct"], f["num_examples"]) for f in row] for row in finals])
        if any(final["losses"] is None for row in finals for final in row):
            return np.array([[[final["loss"]] for final in row] for row in finals])
        return np.array([[unpack_losses(f["losses"], f["num_examples"]) for f in row] for row in finals])


def groups_of(records: Iterable[Record]) -> tuple[list[Group], list[str]]:
    """Returns the groups, in the order of their first record, and what was left out of all of them and why.

    Of a run that was tried more than once, the last attempt that went well counts, or else the last. Records of older
    methods are left out. Runs that differ in anything but arm and seed (recipe, preprocessing, versions, device, test
    set ...) are groups of their own.
    """
    records, notes = _newest(list(records))
    by_identity: dict[str, list[Record]] = defaultdict(list)
    for record in last_attempts(records):
        by_identity[_identity(record)].append(record)
    groups = [group for members in by_identity.values() for group in _by_test_set(members)]
    return _with_differences(groups), notes


def last_attempts(records: Iterable[Record]) -> Iterator[Record]:
    """Yields one record of each run: its last attempt that went well, or else its last."""
    last: dict[str, Record] = {}
    for record in records:
        before = last.get(record["run_id"])
        if before is None or before["status"] != "ok" or record["status"] == "ok":
            last[record["run_id"]] = record
    yield from last.values()


def shared_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the runs of a split share: all of the identity but arm, seed, spec and the weights' hash."""
    shared = {key: value for key, value in run.items() if key not in SPLIT_BY}
    return shared | {"weights": {key: value for key, value in run["weights"].items() if key != "sha256"}}


def _newest(records: list[Record]) -> tuple[list[Record], list[str]]:
    newest = max((record["method_version"] for record in records), default=0)
    old = [record for record in records if record["method_version"] < newest]
    note = f"{len(old)} records are of an older method than {newest} and left out: the numbers would not compare"
    return [record for record in records if record["method_version"] == newest], [note] if old else []


def _identity(record: Record) -> str:
    return sha256(shared_of(record["run"]))


def _by_test_set(records: Sequence[Record]) -> Iterator[Group]:
    """Yields a group for each test set that runs of one identity were tested on; there should be one."""
    tested: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        if record["status"] == "ok":
            tested[record["final"]["examples_sha256"], record["final"]["num_examples"]].append(record)
    failed = tuple(record for record in records if record["status"] != "ok")
    for i, ok in enumerate([*tested.values()] or [[]]):
        mixed = "the runs were tested on different examples, or in another order: never mixed, each set is a group"
        yield _make_group(records[0], ok, () if i else failed, [mixed] if len(tested) > 1 else [])


def _make_group(some: Record, ok: Sequence[Record], failed: tuple[Record, ...], notes: list[str]) -> Group:
    runs: dict[str, dict[int, Record]] = {arm: {} for arm in CELLS}
    for record in ok:
        arm, seed = record["run"]["arm"], record["run"]["seed"]
        if seed in runs[arm]:
            notes = [*notes, f"{arm}, seed {seed}: there are runs from several first weights; the last one counts"]
        runs[arm][seed] = record
    runs = {arm: dict(sorted(by_seed.items())) for arm, by_seed in runs.items() if by_seed}
    group = Group(shared_of(some["run"]), runs, failed, (), ())
    return dataclasses.replace(group, notes=(*notes, *_seed_notes(group), *_failure_notes(group)))


def _seed_notes(group: Group) -> Iterator[str]:
    seeds = sorted(set().union(*group.runs.values()))
    for seed in seeds:
        missing = [arm for arm, by_seed in group.runs.items() if seed not in by_seed]
        if missing:
            yield f"seed {seed} is left out where {' or '.join(missing)} is compared, which lacks it: seeds are paired"
        if not group.starts_alike(seed):
            yield f"seed {seed} is left out of every comparison: its arms did not start from the same weights"


def _failure_notes(group: Group) -> Iterator[str]:
    for record in group.failed:
        run, message = record["run"], (record["error"] or {}).get("message") or ""
        line = next(iter(message.splitlines()), "")
        yield f"{run['arm']}, seed {run['seed']}: {record['status']}{f': {line}' if line else ''}"


def _with_differences(groups: Sequence[Group]) -> list[Group]:
    """Returns the groups, each with what tells it from the others of the same title."""
    titled: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        titled[group.title].append(group)
    told = {id(group): difference for alike in titled.values() for group, difference in _differences(alike)}
    return [dataclasses.replace(group, differs=told[id(group)]) for group in groups]


def _differences(groups: Sequence[Group]) -> Iterator[tuple[Group, tuple[str, ...]]]:
    leaves = [dict(_leaves(group.shared)) | {"test set": _test_set(group)} for group in groups]
    names = [name for name in dict.fromkeys(name for one in leaves for name in one) if _varies(name, leaves)]
    for group, one in zip(groups, leaves, strict=True):
        yield group, tuple(f"{name}={one.get(name)}" for name in names)


def _varies(name: str, leaves: Sequence[Mapping[str, Any]]) -> bool:
    return len({json.dumps(one.get(name), sort_keys=True) for one in leaves}) > 1


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _test_set(group: Group) -> str | None:
    some = next((record for by_seed in group.runs.values() for record in by_seed.values()), None)
    return some["final"]["examples_sha256"][:8] if some else None
