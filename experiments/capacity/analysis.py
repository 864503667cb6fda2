"""What the arms gain over one another, split into capacity and resolution, with what it stands on. Pure functions.

    capacity           down_up - low      more compute, no more information
    resolution         high - down_up     more information, the same compute
    total              high - low
    resolution_at_low  patch - low        more information, no more compute
    interaction        (high - down_up) - (patch - low): what information is worth more where there is compute for it

Gains are in accuracy (shares of the test set), or falls of the loss. Every interval is of 95 % and by itself, over
seeds and examples, paired in both (`bootstrap`).
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.capacity.arms import CELLS
from experiments.capacity.bootstrap import Draws, interval, ratio_interval
from experiments.capacity.groups import METRICS, Group, groups_of
from experiments.capacity.power import Needs, detectable, needs
from experiments.capacity.schema import Record, sha256
from vitcmp.backend import require_choice

CONTRASTS: dict[str, dict[str, int]] = {
    "capacity": {"down_up": 1, "low": -1},
    "resolution": {"high": 1, "down_up": -1},
    "total": {"high": 1, "low": -1},
    "resolution_at_low": {"patch": 1, "low": -1},
    "interaction": {"high": 1, "down_up": -1, "patch": -1, "low": 1},
}
MAIN_ARMS = ("low", "down_up", "high")
SMALL_EFFECT = 0.01  # of accuracy: that of which it is said how many seeds would show it
Verdict = Literal["effect", "no effect at this power", "not judged"]


class Interval(NamedTuple):
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm over its seeds. Accuracy and loss have intervals over seeds and examples; of one seed, over examples."""

    name: str
    seeds: tuple[int, ...]
    num_examples: int
    accuracy: Interval
    loss: Interval
    flops: int | None  # of one image's forward pass
    num_params: int
    step_s: Interval | None  # median of the seeds' medians; the hull of their intervals
    memory_bytes: int | None  # the largest peak of a process
    input_bound_share: float | None  # the median


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain:
    """One contrast of the arms. In shares of 1, not in points."""

    name: str
    value: float
    low: float
    high: float
    seeds: tuple[int, ...]  # that are paired
    num_examples: int
    detectable: float | None  # the true effect that comes out as one 4 times in 5; None of one seed
    needs: Needs | None  # for SMALL_EFFECT of accuracy

    @property
    def verdict(self) -> Verdict:
        """Not judged: one seed, of which nobody knows how far another would have been."""
        if len(self.seeds) < 2:
            return "not judged"
        return "effect" if self.low > 0 or self.high < 0 else "no effect at this power"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    group: Group
    metric: str
    arms: Mapping[str, ArmResult]
    gains: Mapping[str, Gain]  # those whose arms are all there
    share: Interval | None  # of the total that is capacity; None where there is no total to share
    why_no_share: str | None


def splits_of(records: Iterable[Record], *, metric: str = "accuracy") -> tuple[list[Split], list[str]]:
    """Returns the split of every group that has a run, and notes on what was left out."""
    groups, notes = groups_of(records)
    notes += [f"{group.title}: no run went well: {'; '.join(group.notes)}" for group in groups if not group.runs]
    return [split(group, metric=metric) for group in groups if group.runs], notes


def split(group: Group, *, metric: str = "accuracy") -> Split:
    """Returns what each arm reached and what it gains over the others, of one group that has a run.

    A comparison is made of the seeds that all its arms have, the share of those that low, down_up and high have: where
    no seed is missing these are the same, and capacity and resolution add up to the total. Raises ValueError for an
    unknown metric.
    """
    require_choice("metric", metric, METRICS)
    compared = _compare(group, metric)
    share, why_no_share = _share(group, metric, compared.get("total"))
    return Split(
        group=group,
        metric=metric,
        arms={arm: _arm_result(group, arm) for arm in group.runs},
        gains={name: each.gain(name) for name, each in compared.items()},
        share=share,
        why_no_share=why_no_share,
    )


class _Compared(NamedTuple):
    """The draws of some arms, of the seeds that all of them have."""

    draws: Draws
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    metric: str

    @classmethod
    def make(cls, group: Group, arms: tuple[str, ...], metric: str) -> "_Compared":
        seeds = group.paired_seeds(arms)
        draws = Draws(group.values(arms, seeds, metric), is_share=metric == "accuracy", seed=_draw_seed(group))
        return cls(draws, arms, tuple(seeds), metric)

    def contrast(self, name: str) -> np.ndarray:
        sign = 1 if self.metric == "accuracy" else -1  # a loss gains where it falls
        return sign * np.array([CONTRASTS[name].get(arm, 0) for arm in self.arms], np.float64)

    def gain(self, name: str) -> Gain:
        contrast = self.contrast(name)
        spread, value = self.draws.spread(contrast), float(contrast @ self.draws.means)
        most = float(np.abs(contrast).sum()) / 2 if self.metric == "accuracy" else math.inf
        return Gain(
            name=name,
            **_interval(value, self.draws.of(contrast), least=-most, most=most)._asdict(),
            seeds=self.seeds,
            num_examples=self.draws.num_examples,
            detectable=detectable(spread),
            needs=needs(spread, SMALL_EFFECT) if self.metric == "accuracy" else None,
        )


def _compare(group: Group, metric: str) -> dict[str, _Compared]:
    """Returns what each contrast is made of: the draws of as many arms as have its seeds, for contrasts to share."""
    compared: dict[tuple[str, ...], _Compared] = {}
    of_contrast = {}
    for name, weights in CONTRASTS.items():
        own = tuple(arm for arm in CELLS if arm in weights)
        if set(own) <= set(group.runs) and (seeds := group.paired_seeds(own)):
            wider = (tuple(arm for arm in arms if arm in group.runs) for arms in (MAIN_ARMS, tuple(CELLS), own))
            arms = next(arms for arms in wider if set(own) <= set(arms) and group.paired_seeds(arms) == seeds)
            compared[arms] = of_contrast[name] = compared.get(arms) or _Compared.make(group, arms, metric)
    return of_contrast


def _share(group: Group, metric: str, total: _Compared | None) -> tuple[Interval | None, str | None]:
    if total is None or not set(MAIN_ARMS) <= set(group.runs) or not group.paired_seeds(MAIN_ARMS):
        return None, "low, down_up and high are not all there, of the same seeds"
    main = total if set(MAIN_ARMS) <= set(total.arms) else _Compared.make(group, MAIN_ARMS, metric)
    if (verdict := main.gain("total").verdict) != "effect":
        return None, f"there is no total to share: {verdict}"
    contrasts = main.contrast("capacity"), main.contrast("total")
    capacity, of_total = (float(contrast @ main.draws.means) for contrast in contrasts)
    low, high = ratio_interval((capacity, of_total), (main.draws.of(contrasts[0]), main.draws.of(contrasts[1])))
    if high - low > 2:  # it could be anything: the total is hardly more than 0
        return None, f"at this power its interval goes from {low:.0%} to {high:.0%}".replace("%", " %")
    return Interval(capacity / of_total, low, high), None


def _arm_result(group: Group, arm: str) -> ArmResult:
    runs, seeds = list(group.runs[arm].values()), sorted(group.runs[arm])
    some = runs[0]
    return ArmResult(
        name=arm,
        seeds=tuple(seeds),
        num_examples=some["final"]["num_examples"],
        accuracy=_mean(group, arm, seeds, "accuracy"),
        loss=_mean(group, arm, seeds, "loss"),
        flops=some["flops"],
        num_params=some["num_params"],
        step_s=_step_s([run["step_s"] for run in runs if run["step_s"]]),
        memory_bytes=max(filter(None, ((run["memory"] or {}).get("process_peak_bytes") for run in runs)), default=None),
        input_bound_share=_median(run["input_bound_share"] for run in runs),
    )


def _mean(group: Group, arm: str, seeds: Sequence[int], metric: str) -> Interval:
    draws = Draws(group.values([arm], seeds, metric), is_share=metric == "accuracy", seed=_draw_seed(group))
    return _interval(float(draws.means[0]), draws.of(np.ones(1)), most=1.0 if metric == "accuracy" else math.inf)


def _interval(value: float, deviations: np.ndarray, *, least: float = 0.0, most: float = math.inf) -> Interval:
    """Returns the interval, cut off where no truth can be."""
    low, high = interval(deviations)
    return Interval(value, max(value + low, least), min(value + high, most))


def _step_s(steps: Sequence[Mapping[str, Any]]) -> Interval | None:
    if not steps:
        return None
    median = statistics.median(step["median"] for step in steps)
    return Interval(median, min(step["low"] for step in steps), max(step["high"] for step in steps))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _draw_seed(group: Group) -> int:
    """Returns a seed of the bootstrap's own: equal records give equal intervals."""
    return int(sha256(group.shared)[:8], 16)
