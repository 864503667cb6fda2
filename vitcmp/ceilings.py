"""What the device reaches on a large matmul and on a large copy: the ceilings of its roofline, measured as cases are.

A ceiling is a maximum, so the fastest of a few calls stands for it, and not their median.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

from vitcmp.backend import Backend

Call = Callable[[], object]

NUM_CALLS = 5
MAX_S = 0.25  # no further call starts: a device that is so slow needs no larger sample
# Sizes grow by powers of 2 until a call lasts so long that launching it, some 20 microseconds on a GPU, is nothing; and
# no further than the last one, which takes the fastest GPUs 1 ms. A copy's first size is more than most caches hold.
MATMUL_SIDES, MATMUL_S = (512, 8192), 0.01
COPY_BYTES, COPY_S = (2**26, 2**31), 0.002


class Ceiling(NamedTuple):
    rate: float
    how: str


def measure_matmul(backend: Backend, numerics: str, *, clock: Callable[[], float] = time.perf_counter) -> Ceiling:
    """Returns FLOP/s of a product of two square matrices in the numerics, which are open."""
    make_call = functools.partial(backend.make_matmul, numerics=numerics)
    side, best_s, num_calls = _measure(make_call, MATMUL_SIDES, growth=8, long_enough_s=MATMUL_S, clock=clock)
    return Ceiling(2 * side**3 / best_s, f"{side}x{side} matmul, best of {num_calls}")


def measure_copy(backend: Backend, numerics: str, *, clock: Callable[[], float] = time.perf_counter) -> Ceiling:
    """Returns bytes/s of a copy in memory, those read and those written."""
    make_call = functools.partial(backend.make_copy, numerics=numerics)
    num_bytes, best_s, num_calls = _measure(make_call, COPY_BYTES, growth=2, long_enough_s=COPY_S, clock=clock)
    return Ceiling(2 * num_bytes / best_s, f"copy of {num_bytes >> 20} MiB, best of {num_calls}")


def _measure(
    make_call: Callable[[int], Call],
    sizes: tuple[int, int],
    *,
    growth: int,
    long_enough_s: float,
    clock: Callable[[], float],
) -> tuple[int, float, int]:
    """Returns the size that was large enough, its best duration, and of how many calls.

    The first size tells which one that is: twice the size is `growth` times the work.
    """
    size, last_size = sizes
    best_s, num_calls = _time_best(make_call(size), clock)
    expected_s, large = best_s, size
    while expected_s < long_enough_s and large < last_size:
        expected_s, large = growth * expected_s, 2 * large
    if large > size:
        best_s, num_calls = _time_best(make_call(large), clock)
    return large, best_s, num_calls


def _time_best(call: Call, clock: Callable[[], float]) -> tuple[float, int]:
    call()  # compiles it, and touches its memory
    durations_s: list[float] = []
    while len(durations_s) < NUM_CALLS and sum(durations_s) < MAX_S:
        start = clock()
        call()
        durations_s.append(clock() - start)
    return min(durations_s), len(durations_s)
