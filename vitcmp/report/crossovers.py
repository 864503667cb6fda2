"""At which image size does one model overtake another? An interval, from the intervals of the ratios of latency.

Between two neighbouring sizes the logarithm of a ratio, and of either end of its interval, is taken for linear in the
logarithm of the size. A model overtakes where it is slower beyond doubt at one size (`stats.verdict`: by more than 3 %)
and faster beyond doubt at a larger one, and somewhere between the size from which the interval holds 1 and the size
from which it no longer does.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from vitcmp.report.summary import CONTEXT, Setting, best_of, by_keys
from vitcmp.specs import parse_image_size
from vitcmp.stats import Estimate, ratio_interval, verdict

BEST = "best"  # of any backend


@dataclasses.dataclass(frozen=True)
class Crossing:
    """How two models stand to each other; where they cross, `a` is the faster one above, and `b` below."""

    a: str
    b: str
    status: str
    low_px: float | None = None
    high_px: float | None = None


@dataclasses.dataclass(frozen=True)
class Point:
    """The logarithms of a ratio of latencies and its interval, at the logarithm of a size."""

    log_px: float
    low: float
    high: float

    @classmethod
    def of(cls, size_px: float, ratio: Estimate) -> "Point":
        return cls(math.log(size_px), math.log(ratio.low), math.log(ratio.high))

    @property
    def sign(self) -> int:
        """-1 where the ratio is below 1 beyond doubt, 1 where it is above, else 0."""
        return {"faster": -1, "slower": 1}.get(verdict((math.exp(self.low), math.exp(self.high))), 0)

    def inverted(self) -> "Point":
        return Point(self.log_px, -self.high, -self.low)


def crossings_of(settings: Sequence[Setting]) -> Iterator[tuple[Setting, str, Crossing]]:
    """Yields what is known of every pair of models, of their best settings (`best`) and of each backend's best.

    With it come the backend and a setting of the group, which has its device, mode, weights and batch size.
    """
    timed = [setting for setting in settings if setting.latency]
    ratios: dict[tuple[int, int], Estimate] = {}
    for group in by_keys(timed, *CONTEXT, "batch_size"):
        backends = sorted({setting.case["backend"] for setting in group})
        for backend in (BEST, *backends):
            curves = _curves(s for s in group if backend in (BEST, s.case["backend"]))
            for a, b in itertools.combinations(curves, 2):
                points = _points(curves[a], curves[b], ratios)
                yield from ((group[0], backend, crossing) for crossing in crossings(a, b, points))


def crossings(a: str, b: str, points: Sequence[Point]) -> Iterator[Crossing]:
    """Yields each crossing, or the one answer that there is instead. The points, of a over b, are sorted by size."""
    signs = [point.sign for point in points]
    sure = [i for i, sign in enumerate(signs) if sign]
    turns = [(i, j) for i, j in itertools.pairwise(sure) if signs[i] != signs[j]]
    for i, j in turns:
        between = points[i : j + 1]
        if signs[i] < 0:  # b overtakes
            yield _crossing(b, a, [point.inverted() for point in between])
        else:
            yield _crossing(a, b, between)
    if not turns:
        yield Crossing(a, b, _status(signs))


def _status(signs: Sequence[int]) -> str:
    if len(signs) < 2:
        return "too few sizes"
    if 0 in signs:
        return "not separable"
    return "a faster throughout" if signs[0] < 0 else "b faster throughout"


def _crossing(a: str, b: str, points: Sequence[Point]) -> Crossing:
    """Finds where a overtakes b: the ratio of their latencies falls from above 1 to below."""
    segments = list(itertools.pairwise(points))
    low = next(_zero(p, q, p.low, q.low) for p, q in segments if p.low > 0 >= q.low)
    high = next(_zero(p, q, p.high, q.high) for p, q in reversed(segments) if p.high >= 0 > q.high)
    return Crossing(a, b, "crosses", math.exp(low), math.exp(high))


def _zero(p: Point, q: Point, at_p: float, at_q: float) -> float:
    return p.log_px + (q.log_px - p.log_px) * at_p / (at_p - at_q)


def _curves(settings: Iterable[Setting]) -> dict[str, dict[str, Setting]]:
    """Returns the best setting of each model at each image size, the models as they come."""
    curves: dict[str, dict[str, Setting]] = {}
    for group in by_keys(settings, "model", "image_size"):
        best = best_of(group)
        assert best is not None, "only timed settings get here"
        curves.setdefault(best.case["model"], {})[best.case["image_size"]] = best
    return curves


def _points(a: dict[str, Setting], b: dict[str, Setting], ratios: dict[tuple[int, int], Estimate]) -> list[Point]:
    """Returns the ratios a / b at the sizes of both; `ratios` keeps them, since a best is the best of a backend too."""
    points = []
    for size in a.keys() & b.keys():
        key = id(a[size]), id(b[size])
        ratio = ratios.get(key) or ratios.setdefault(key, ratio_interval(a[size].wall_s, b[size].wall_s))
        points.append(Point.of(math.sqrt(math.prod(parse_image_size(size))), ratio))
    return sorted(points, key=lambda point: (point.log_px, point.low, point.high))
