"""What each knob buys: the best latency with a knob at one value over that with it at another, all else free."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from vitcmp.backend import ATTENTION, BACKENDS, BATCH_NORM, COMPILE, LAYOUT, NUMERICS
from vitcmp.report.summary import CONTEXT, Setting, best_of, by_keys
from vitcmp.stats import Estimate, ratio_interval

# The values of each knob by backend, the default first.
KNOBS: dict[str, Mapping[str, Sequence[str]]] = {
    "numerics": dict.fromkeys(BACKENDS, tuple(NUMERICS)),
    "attention": ATTENTION,
    "compile": COMPILE,
    "layout": LAYOUT,
    "batch_norm": dict.fromkeys(BACKENDS, BATCH_NORM),
}
POINT = (*CONTEXT, "backend", "model", "image_size", "batch_size")


@dataclasses.dataclass(frozen=True)
class Effect:
    """One value of a knob against the reference value, each with everything else at its best."""

    knob: str
    value: str
    reference: str
    best: Setting
    reference_best: Setting
    ratio: Estimate  # latency over the reference's


def effects_of(settings: Sequence[Setting]) -> Iterator[Effect]:
    """Yields the effects at every point where a knob was measured at two values or more."""
    timed = [setting for setting in settings if setting.latency]
    for point in by_keys(timed, *POINT):
        for knob in KNOBS:
            yield from _effects(knob, point)


def _effects(knob: str, point: Sequence[Setting]) -> Iterator[Effect]:
    """Compares with the knob's default, or with the fastest value where the default was not measured."""
    best = _best_by_value(knob, point)
    if len(best) < 2:
        return
    default = next(iter(KNOBS[knob].get(point[0].case["backend"], ())), None)
    fastest = min(best, key=lambda value: best[value].latency.value)  # type: ignore[union-attr]
    reference = default if default in best else fastest
    for value, setting in best.items():
        if value != reference:
            ratio = ratio_interval(setting.wall_s, best[reference].wall_s)
            yield Effect(knob, value, reference, setting, best[reference], ratio)


def _best_by_value(knob: str, point: Sequence[Setting]) -> dict[str, Setting]:
    """Returns the setting of lowest latency for every measured value, in the order of the knob's values."""
    order = list(KNOBS[knob].get(point[0].case["backend"], ()))
    values: set[str] = {value for setting in point if (value := setting.case.get(knob)) is not None}
    ordered = sorted(values, key=lambda value: (order.index(value) if value in order else len(order), value))
    best = {value: best_of(s for s in point if s.case.get(knob) == value) for value in ordered}
    return {value: setting for value, setting in best.items() if setting}
