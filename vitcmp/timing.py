"""One timing loop for every framework: warm-up, sampling and the stopping rule of DESIGN.md, section 3.

A call returns when the device is idle, so no framework is named here. Clocks are arguments: the tests bring their own.
`time_pair` times two calls against each other; vitcmp/compare.py says what follows from that.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from vitcmp.stats import median_interval, round_ratios

Clock = Callable[[], float]
Call = Callable[[], object]

CLOCKS = ("wall_s", "cpu_s")  # of the wall, and of this process on all its CPUs
# A throughput sample queues calls for at least this long (so 50-100 ms) ...
QUEUE_S = 0.05
# ... and at least this many, so that the host runs ahead of the device, as far as `min_samples` fit in half the cap ...
QUEUE_CALLS = 4
# ... but never more than this many: their outputs may all be alive at once.
MAX_QUEUE_CALLS = 1000
# The interval is looked at when the number of samples has grown by this much: each look is a chance to stop by luck. Of
# 1,500 fake runs with 5 % noise, 3.1 % end more than 1 % from the true median; 4.7 % if it looks after every sample.
LOOK_GROWTH = 1.2
# The fewest samples whose range holds the median with 95 %: 1 - 2 * 0.5**6 = 0.969.
FEWEST_SAMPLES = 6
# Where a call is so long that `min_samples` cannot be had, this many are taken, however long they are.
FEWEST_LONG_SAMPLES = 3


class TimingError(RuntimeError):
    """A call is too short for the clock. The duration is refused: it would be recorded as 0.0 or as noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmUpRule:
    """When warm-up ends."""

    warm_up_min_s: float = 0.3
    warm_up_min_calls: int = 3  # torch's CUDA graphs are recorded in the second call and fast from the third
    warm_up_max_s: float = 10.0
    warm_up_tolerance: float = 0.05

    def __post_init__(self) -> None:
        faults = [f"{key}={value}" for key, value in dataclasses.asdict(self).items() if not value > 0]
        if faults:
            raise ValueError(f"{', '.join(faults)}: every field of {type(self).__name__} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(WarmUpRule):
    """When warm-up and sampling end. A floor wins over a cap: calls of 0.1 ms make 10,000 samples in `min_s`."""

    min_samples: int = 30
    min_s: float = 1.0
    max_samples: int = 500
    max_s: float = 20.0
    half_width: float = 0.01  # of the 95 % interval of the median, relative to the median

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_samples < FEWEST_SAMPLES:
            raise ValueError(f"min_samples={self.min_samples}: a 95 % interval of a median needs {FEWEST_SAMPLES}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairRule(WarmUpRule):
    """How two calls are compared: what one process times, and how many processes there are.

    A process times calls of 1 to 20 ms for a second or two, of 1 s for 20 s, of 15 s for a minute and their warm-up for
    another. Each side has been called before, when the outputs were compared, so two warm-up calls are enough.
    """

    warm_up_min_calls: int = 2
    block_s: float = 0.02  # a block of one side's calls lasts so long at least
    min_rounds: int = 12  # a round is four blocks: ours, theirs, theirs, ours
    min_s: float = 1.0
    max_s: float = 20.0  # no further round starts; one round is made, however long
    half_width: float = 0.01  # of the 95 % interval of the rounds' median ratio
    min_processes: int = 3
    max_processes: int = 12
    max_comparison_s: float = 600.0  # no further process starts, once there are two
    same_within: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_processes > self.max_processes:
            raise ValueError(f"min_processes={self.min_processes} is more than max_processes={self.max_processes}")


class WarmUp(NamedTuple):
    wall_s: list[float]
    stable: bool


class Samples(NamedTuple):
    """One duration a call. `cpu_s`, the process's CPU time, is None where its clock is too coarse to tell."""

    wall_s: list[float]
    cpu_s: list[float] | None
    converged: bool


class Throughput(NamedTuple):
    """One duration for every `calls_per_sample` queued calls."""

    calls_per_sample: int
    wall_s: list[float]
    cpu_s: list[float] | None
    converged: bool


class Blocks(NamedTuple):
    """The durations of one side's calls, block by block; blocks 2 i and 2 i + 1 are those of round i.

    `cpu_s`, the process's CPU time, is None where its clock is too coarse to tell.
    """

    wall_s: list[list[float]]
    cpu_s: list[list[float]] | None


class PairTimes(NamedTuple):
    ours: Blocks
    theirs: Blocks
    ours_first: bool
    is_warm: bool  # both sides' durations had settled
    converged: bool


def warm_up(call: Call, rule: WarmUpRule, *, clock: Clock = time.perf_counter) -> WarmUp:
    """Calls until the durations settle: the medians of the two halves of the recent window agree.

    The window is the later half of all calls so far: it forgets a slow start at the speed at which it grows, and a
    single outlier does not move its medians. It is looked at when the elapsed time has grown by a tenth. At least
    `warm_up_min_calls` are made, however long; past `warm_up_max_s` no further call starts.
    """
    wall_s: list[float] = []
    start, look_s = clock(), rule.warm_up_min_s
    while True:
        wall_s.append(_time_call(call, clock))
        elapsed_s = clock() - start
        if len(wall_s) < rule.warm_up_min_calls or elapsed_s < min(look_s, rule.warm_up_max_s):
            continue
        if _halves_agree(wall_s[len(wall_s) // 2 :], rule.warm_up_tolerance):
            return WarmUp(wall_s, True)
        if elapsed_s >= rule.warm_up_max_s:
            return WarmUp(wall_s, False)
        look_s = 1.1 * elapsed_s


def sample(
    call: Call,
    rule: Rule,
    *,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> Samples:
    """Calls until the 95 % order-statistic interval of the median is within `half_width` of it; keeps every sample.

    At least `min_samples` and `min_s`. At `max_samples` or `max_s` it ends, unconverged if the interval is still too
    wide. The one exception to `min_samples`: calls longer than `max_s / min_samples` end at `max_s` with at least
    FEWEST_LONG_SAMPLES, and are never converged.
    """
    wall_s: list[float] = []
    cpu_s: list[float] = []
    start, look_samples = clock(), rule.min_samples
    while True:
        cpu_start = cpu_clock()
        wall_s.append(_time_call(call, clock))
        cpu_s.append(round(cpu_clock() - cpu_start, 9))
        elapsed_s = clock() - start
        is_last = _is_capped(len(wall_s), elapsed_s, rule)
        if is_last or (len(wall_s) >= look_samples and elapsed_s >= rule.min_s):
            converged = _is_converged(wall_s, rule)
            if is_last or converged:
                return Samples(wall_s, cpu_s if min(cpu_s) > 0 else None, converged)
            look_samples = math.ceil(LOOK_GROWTH * len(wall_s))


def sample_throughput(
    queue: Callable[[int], object],
    rule: Rule,
    *,
    latency_s: float,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> Throughput:
    """Times `queue(k)`, k calls queued and one wait at the end, by the same rule as `sample`."""
    num_calls = calls_per_sample(latency_s, rule)
    samples = sample(lambda: queue(num_calls), rule, clock=clock, cpu_clock=cpu_clock)
    return Throughput(num_calls, *samples)


def time_pair(
    ours: Call,
    theirs: Call,
    rule: PairRule,
    *,
    uses: str = "wall_s",
    ours_first: bool = True,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> PairTimes:
    """Times both calls in this process, in blocks that alternate: ours, theirs, theirs, ours (a round), and again.

    In a round, a linear drift of the machine meets both sides alike, and each side has one block that follows its own
    kind and one that follows the other's (of a ViT-Ti/16, the second of two in a row was 4 to 5 % faster). `ours_first`
    says whose block comes first: it should alternate between processes. Rounds are made until the 95 % interval of the
    median of their ratios, of the clock that `uses` names (wall_s or cpu_s), is within `half_width` of it.
    """
    calls = (ours, theirs) if ours_first else (theirs, ours)
    warm = [warm_up(call, rule, clock=clock) for call in calls]
    counts = [_calls_per_block(warmth.wall_s, rule) for warmth in warm]
    wall_s: tuple[list[list[float]], ...] = ([], [])
    cpu_s: tuple[list[list[float]], ...] = ([], [])
    start, look_rounds = clock(), rule.min_rounds
    while True:
        for i in (0, 1, 1, 0):
            for times_s, block in zip((wall_s, cpu_s), _time_block(calls[i], counts[i], clock, cpu_clock), strict=True):
                times_s[i].append(block)
        num_rounds, elapsed_s = len(wall_s[0]) // 2, clock() - start
        is_last = elapsed_s >= rule.max_s
        if is_last or (num_rounds >= look_rounds and elapsed_s >= rule.min_s):
            converged = _rounds_agree(_counted(wall_s if uses == "wall_s" else cpu_s, uses), rule)
            if is_last or converged:
                break
            look_rounds = math.ceil(LOOK_GROWTH * num_rounds)
    first, second = (
        Blocks(wall, cpu if min(map(min, cpu)) > 0 else None) for wall, cpu in zip(wall_s, cpu_s, strict=True)
    )
    is_warm = all(warmth.stable for warmth in warm)
    return PairTimes(*((first, second) if ours_first else (second, first)), ours_first, is_warm, converged)


def _calls_per_block(warm_up_s: list[float], rule: PairRule) -> int:
    return min(MAX_QUEUE_CALLS, math.ceil(rule.block_s / statistics.median(warm_up_s[len(warm_up_s) // 2 :])))


def _time_block(call: Call, num_calls: int, clock: Clock, cpu_clock: Clock) -> tuple[list[float], list[float]]:
    wall_s, cpu_s = [], []
    for _ in range(num_calls):
        cpu_start = cpu_clock()
        wall_s.append(_time_call(call, clock))
        cpu_s.append(round(cpu_clock() - cpu_start, 9))
    return wall_s, cpu_s


def _counted(sides: tuple[list[list[float]], ...], uses: str) -> tuple[list[list[float]], ...]:
    if min(min(block) for side in sides for block in side) <= 0:
        raise TimingError(f"{uses}: this clock stood still during a call, it is too coarse; take the wall_s")
    return sides


def _rounds_agree(sides: tuple[list[list[float]], ...], rule: PairRule) -> bool:
    ratios = round_ratios(*sides)
    if len(ratios) < rule.min_rounds:
        return False
    low, high = median_interval(ratios)
    return (high - low) / 2 <= rule.half_width * statistics.median(ratios)


def calls_per_sample(latency_s: float, rule: Rule) -> int:
    """Chooses k for a sample of 50-100 ms: 50 calls of 1 ms, 4 of 80 ms, 2 of 160 ms, 1 of 170 ms or longer.

    One long call hides nothing: launching it and waiting for it take some 20 microseconds.
    """
    if not latency_s > 0:
        raise ValueError(f"latency_s={latency_s} must be positive")
    at_least = min(QUEUE_CALLS, int(rule.max_s / 2 / rule.min_samples / latency_s))
    return max(1, at_least, min(MAX_QUEUE_CALLS, math.ceil(QUEUE_S / latency_s)))


def _time_call(call: Call, clock: Clock) -> float:
    """Returns the duration in seconds, to the nanosecond that the clock resolves."""
    start = clock()
    call()
    duration_s = round(clock() - start, 9)
    shortest_s = 100 * time.get_clock_info("perf_counter").resolution
    if duration_s < shortest_s:
        raise TimingError(
            f"a call of {duration_s} s is too short to time: the clock is good for {shortest_s:.1e} s and more"
        )
    return duration_s


def _halves_agree(wall_s: list[float], tolerance: float) -> bool:
    middle = len(wall_s) // 2
    if not middle:
        return False
    first, second = statistics.median(wall_s[:middle]), statistics.median(wall_s[middle:])
    return abs(first - second) <= tolerance * min(first, second)


def _is_capped(num_samples: int, elapsed_s: float, rule: Rule) -> bool:
    out_of_samples = num_samples >= rule.max_samples and elapsed_s >= rule.min_s
    return out_of_samples or (elapsed_s >= rule.max_s and num_samples >= FEWEST_LONG_SAMPLES)


def _is_converged(wall_s: list[float], rule: Rule) -> bool:
    if len(wall_s) < rule.min_samples:
        return False
    low, high = median_interval(wall_s)
    median = statistics.median(wall_s)
    return max(median - low, high - median) <= rule.half_width * median
