"""Comparing the times of two calls: interleaved in one process, in one or more fresh processes, with a verdict.

`compare` is for a user's own code, in the user's process; `summarise` is what it and the experiments have in common.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vitcmp.parity import compare_arrays
from vitcmp.stats import Estimate, Verdict, paired_ratio, round_ratios, verdict
from vitcmp.timing import CLOCKS, Call, PairRule, PairTimes, time_pair

BUSY = 0.05  # a share of the CPUs that others used, from which a reader is told
ONE_PROCESS = PairRule(min_s=2.0, half_width=0.003)


@runtime_checkable
class OwnStep(Protocol):
    """What `vitcmp.make_step` returns: a call that knows its numerics, and how far rounding may move its output."""

    numerics: str
    platform: str
    bound: float | None

    def __call__(self) -> None: ...

    def result(self) -> np.ndarray: ...

    def settings(self) -> AbstractContextManager[Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The ratio of times ours / theirs with its 95 % interval, and what follows from it about ours.

    With one process, the interval does not hold what differs between processes: the next one may give another ratio.
    """

    ratio: float
    low: float
    high: float
    verdict: Verdict
    clock: str  # wall_s or cpu_s: which of the two decided
    other_ratio: float | None  # by the clock that did not decide
    num_processes: int
    num_values: tuple[int, int]  # timed calls of each side
    confidence: float | None  # None where there were too few rounds for any
    same_within: float
    output_error: float | None = None  # max |ours - theirs| over the largest value
    output_bound: float | None = None
    others_cpu_share: float | None = None  # of this process's CPUs, while it timed

    @property
    def rules_out_slower(self) -> bool:
        """Says whether the interval ends within the band: faster, the same, or ambiguous between these two only."""
        return self.confidence is not None and self.high <= 1 + self.same_within

    def __str__(self) -> str:
        clock = "wall time" if self.clock == "wall_s" else "CPU time"
        few = "" if self.confidence else ", of too few rounds for 95 % (they need a rule of longer max_s)"
        interval = f"[{self.low:.3f}, {self.high:.3f}]{few}"
        processes = f"{self.num_processes} processes"
        if self.num_processes == 1:
            processes = "1 process (what differs between processes is outside the interval)"
        lines = [
            f"{self.verdict}: ours / theirs = {self.ratio:.3f} {interval} of {clock}",
            f"{processes}, {self.num_values[0]} and {self.num_values[1]} calls",
        ]
        if self.output_error is not None:
            relation = "within" if self.output_error <= (self.output_bound or 0) else "BEYOND"
            lines.append(f"outputs differ by {self.output_error:.2g}, {relation} the bound of {self.output_bound:.2g}")
        if self.others_cpu_share is not None and self.others_cpu_share > BUSY:
            lines.append(f"others used {self.others_cpu_share:.0%} of the CPUs: repeat it when the machine is quiet")
        return "\n".join(lines)


def compare(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    bound: float | None = None,
    allow_different: bool = False,
    clock: str | None = None,
    rule: PairRule = ONE_PROCESS,
) -> Comparison:
    """Compares the outputs of two calls, and then their times, interleaved in this process; about 2 to 20 s.

    Each side is a step of `vitcmp.make_step`, or any callable without arguments that returns its output as one array: a
    torch tensor, a JAX array, or what numpy takes. Waiting for the device is seen to: a JAX array is blocked on, and a
    CUDA tensor's device is synchronised. Whatever a step needs is done before: compiled, its weights and inputs where
    it computes. Both sides run under the numerics of the steps among them (torch's precision flags, JAX's precision).

    `bound` is how far the outputs may differ, max |a - b| over the largest value; without it, what rounding explains
    (`vitcmp.parity.tolerance`) for the step's numerics and model. `clock` is wall_s or cpu_s, the process's CPU time;
    without it, wall time, but CPU time where a step runs on a CPU and this process is on one. Calls of more than a
    second want a `rule` with a longer `max_s`: below 6 rounds of 4 calls there is no interval, and all is ambiguous.

    Raises ValueError where the outputs differ by more, unless `allow_different`, or where no array comes back, two
    steps have different numerics, or neither side gives a bound.
    """
    from vitcmp.environment import HostMonitor, num_cpus  # here: it needs subprocess, and `import vitcmp` does not

    steps = [side for side in (ours, theirs) if isinstance(side, OwnStep)]
    bound = _choose_bound(steps, bound)
    clock = clock or deciding_clock(steps[0].platform if steps else "unknown", num_cpus())
    if clock not in CLOCKS:
        raise ValueError(f"clock={clock!r} must be one of {', '.join(CLOCKS)}")
    with ExitStack() as settings:
        for step in steps:
            settings.enter_context(step.settings())
        parity = compare_arrays(_output("ours", ours), _output("theirs", theirs), bound)
        if parity.status != "equal" and not allow_different:
            raise ValueError(f"{parity.describe()}; allow_different=True compares the times all the same")
        with HostMonitor() as host:
            times = time_pair(_waiting(ours), _waiting(theirs), rule, uses=clock)
    return dataclasses.replace(
        summarise([times], clock=clock, rule=rule),
        output_error=parity.error,
        output_bound=parity.bound,
        others_cpu_share=host.contention()["others_cpu_share"],
    )


def deciding_clock(platform: str, num_cpus: int) -> str:
    """Returns cpu_s on a single CPU, where CPU time is wall time less what others took; elsewhere wall_s.

    With more CPUs a side may spend more CPU time to be done sooner, so only wall time says what a user waits for.
    """
    return "cpu_s" if platform == "cpu" and num_cpus == 1 else "wall_s"


def summarise(processes: Sequence[PairTimes], *, clock: str, rule: PairRule) -> Comparison:
    """Compares ours with theirs from what one or more processes timed; ambiguous where too few rounds were."""
    estimate = _estimate(processes, clock)
    other = "wall_s" if clock == "cpu_s" else "cpu_s"
    has_other = all(getattr(side, other) for times in processes for side in (times.ours, times.theirs))
    return Comparison(
        ratio=estimate.value,
        low=estimate.low,
        high=estimate.high,
        verdict=verdict((estimate.low, estimate.high), rule.same_within) if estimate.confidence else "ambiguous",
        clock=clock,
        other_ratio=_estimate(processes, other).value if has_other else None,
        num_processes=len(processes),
        num_values=(estimate.num_values[0], estimate.num_values[1]),
        confidence=estimate.confidence,
        same_within=rule.same_within,
    )


def wants_more(processes: Sequence[PairTimes], *, clock: str, rule: PairRule, spent_s: float = 0.0) -> bool:
    """Says whether a comparison gets a further process: at least `min_processes`, and more while it is ambiguous.

    At most `max_processes`, and none once `max_comparison_s` are spent and there are two, or as few as were asked for.
    """
    is_late = spent_s >= rule.max_comparison_s
    if len(processes) < (min(2, rule.min_processes) if is_late else rule.min_processes):
        return True
    if is_late or len(processes) >= rule.max_processes:
        return False
    return summarise(processes, clock=clock, rule=rule).verdict == "ambiguous"


def _estimate(processes: Sequence[PairTimes], clock: str) -> Estimate:
    sides = [(getattr(times.ours, clock), getattr(times.theirs, clock)) for times in processes]
    estimate = paired_ratio([round_ratios(ours, theirs) for ours, theirs in sides])
    counts = [sum(len(block) for pair in sides for block in pair[i]) for i in (0, 1)]
    return estimate._replace(num_values=tuple(counts))


def _choose_bound(steps: Sequence[OwnStep], bound: float | None) -> float:
    if len({step.numerics for step in steps}) > 1:
        raise ValueError(f"numerics {' and '.join(step.numerics for step in steps)} cannot be compared: take one")
    known = [bound, *(step.bound for step in steps)]
    if all(value is None for value in known):
        raise ValueError("bound=None: only a step of vitcmp.make_step has one of its own; give it as a number")
    return next(value for value in known if value is not None)


def _output(name: str, side: Callable[[], Any]) -> np.ndarray:
    """Calls the side once and returns its output in float64."""
    output = side.result() if isinstance(side, OwnStep) else side()
    if hasattr(output, "detach"):  # a torch tensor: numpy takes none that is on a GPU, has a gradient or is bfloat16
        output = output.detach().cpu().double()
    try:
        array = np.empty(0) if output is None else np.asarray(output, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if not array.size:
        raise ValueError(f"{name} returns {type(output).__name__}, expected one array of numbers: logits, for example")
    return array


def _waiting(side: Callable[[], Any]) -> Call:
    """Returns a call that ends when the device is idle."""
    return side if isinstance(side, OwnStep) else lambda: _wait(side())


def _wait(output: Any) -> None:
    if hasattr(output, "block_until_ready"):
        output.block_until_ready()
    elif getattr(output, "is_cuda", False):
        sys.modules["torch"].cuda.synchronize(output.device)  # loaded already, since the output is its
