"""Loss curves of the two frameworks, of equal seeds: how far apart they are, step by step."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.capacity.groups import last_attempts, shared_of
from experiments.capacity.schema import Record, sha256, unpack_bits

# What may differ between the frameworks' runs; all else, the recipe and the weights among it, is the same.
FREE_KEYS = ("backend", "versions", "attention", "platform", "device_name", "num_devices", "num_threads")


class Distance(NamedTuple):
    """The largest of |jax - torch| over the steps, where it is, and over the larger of both losses."""

    difference: float
    step: int
    relative: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePair:
    """One run of each framework: the same model, data, recipe, arm, seed and first weights."""

    jax: Record
    torch: Record
    num_steps: int  # that both have
    loss: Distance
    gradient_norm: Distance
    first_loss: float  # |jax - torch| at step 0, where only the forward pass can differ
    accuracy: float | None  # jax - torch at the end
    num_differing: int | None  # test examples that one got right and the other wrong

    @property
    def run(self) -> Mapping[str, Any]:
        return self.jax["run"]


def curve_pairs(records: Iterable[Record]) -> list[CurvePair]:
    """Returns every two runs, one of each framework, that should have the same loss curve; the farthest apart first.

    Runs that diverged are among them, as far as their curves go. Numerics are those of the recipe: in float64 the
    curves agree to rounding, in float32 they part exponentially in the number of steps, as two runs of one framework do
    on two devices. Which bound holds is the caller's to say.
    """
    sides: dict[str, dict[str, Record]] = {}
    for record in last_attempts(records):
        if record["curve"] and record["curve"]["loss"]:
            sides.setdefault(_key(record), {})[record["run"]["backend"]] = record
    found = [_compare(side["jax"], side["torch"]) for side in sides.values() if {"jax", "torch"} <= set(side)]
    return sorted(found, key=lambda pair: -pair.loss.relative)


def _key(record: Record) -> str:
    run = record["run"]
    shared = {key: value for key, value in shared_of(run).items() if key not in FREE_KEYS}
    own = {key: run[key] for key in ("arm", "seed", "spec", "weights")}
    return sha256({"method_version": record["method_version"], "shared": shared, "own": own})


def _compare(jax: Record, torch: Record) -> CurvePair:
    losses, norms = ([side["curve"][name] for side in (jax, torch)] for name in ("loss", "gradient_norm"))
    accuracy, num_differing = _compare_finals(jax["final"], torch["final"])
    return CurvePair(
        jax=jax,
        torch=torch,
        num_steps=min(map(len, losses)),
        loss=_distance(*losses),
        gradient_norm=_distance(*norms),
        first_loss=abs(losses[0][0] - losses[1][0]),
        accuracy=accuracy,
        num_differing=num_differing,
    )


def _distance(a: list[float], b: list[float]) -> Distance:
    x, y = (np.asarray(side[: min(len(a), len(b))], np.float64) for side in (a, b))
    differences = np.abs(x - y)
    step = int(differences.argmax())
    relative = differences / np.maximum(np.maximum(np.abs(x), np.abs(y)), np.finfo(np.float64).tiny)
    return Distance(float(differences[step]), step, float(relative.max()))


def _compare_finals(jax: Mapping[str, Any] | None, torch: Mapping[str, Any] | None) -> tuple[float | None, int | None]:
    if not jax or not torch or any(jax[key] != torch[key] for key in ("examples_sha256", "num_examples")):
        return None, None
    right = [unpack_bits(final["correct"], final["num_examples"]) for final in (jax, torch)]
    return jax["accuracy"] - torch["accuracy"], int((right[0] != right[1]).sum())
