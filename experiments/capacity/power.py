"""What an experiment would have seen, and how many seeds or test examples an effect asks for, by the spread seen."""

import bisect
import math
import statistics
from typing import NamedTuple

import numpy as np

from experiments.capacity.bootstrap import CONFIDENCE, Spread

POWER = 0.8  # 4 times in 5
MAX_SEEDS = 1000
NORMAL = statistics.NormalDist()


class Needs(NamedTuple):
    """Seeds with the test set as it is; None where no number of them is enough, and then the examples that would be."""

    effect: float
    num_seeds: int | None
    num_examples: int | None  # drawn like the test set, and with many seeds; None where seeds suffice


def detectable(spread: Spread) -> float | None:
    """Returns the true effect whose interval excludes 0 with probability POWER; None for one seed.

    The measured mean is normal about the truth, with the variance of both parts, v + x. Half its interval is the root
    of t^2 v s^2 + z^2 x, where s^2, what another experiment's seeds show of v, is chi2/(n - 1): for x = 0 this is the
    power of Student's test by the noncentral t. v itself is an estimate from few seeds.
    """
    return _detectable(spread.seeds, spread.examples, spread.num_seeds) if spread.num_seeds > 1 else None


def needs(spread: Spread, effect: float) -> Needs | None:
    """Returns what finds a true effect with probability POWER; None for one seed, which shows no spread of seeds."""
    if spread.num_seeds < 2:
        return None
    of_one_seed, examples = spread.seeds * spread.num_seeds, spread.examples
    limit = (NORMAL.inv_cdf((1 + CONFIDENCE) / 2) + NORMAL.inv_cdf(POWER)) * math.sqrt(examples)  # of many seeds
    if limit >= effect:
        return Needs(effect, None, math.ceil(spread.num_examples * (limit / effect) ** 2))
    seeds = range(2, MAX_SEEDS + 1)
    first = bisect.bisect_left(seeds, True, key=lambda n: _detectable(of_one_seed / n, examples, n) <= effect)
    return Needs(effect, seeds[first] if first < len(seeds) else None, None)


def student_t(probability: float, df: int) -> float:
    """Returns the quantile of Student's t for a probability above 1/2.

    By bisection of the finite sums for P(|T| <= t) of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2  # of the angle arctan(t / sqrt(df))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < 2 * probability - 1 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _within(angle: float, df: int) -> float:
    """Returns P(|T| <= sqrt(df) tan(angle))."""
    is_odd = df % 2
    term = math.cos(angle) if is_odd else 1.0
    terms = []
    for i in range((df - 1) // 2 if is_odd else df // 2):
        terms.append(term)
        term *= math.cos(angle) ** 2 * ((2 * i + 2) / (2 * i + 3) if is_odd else (2 * i + 1) / (2 * i + 2))
    total = math.sin(angle) * math.fsum(terms)
    return 2 / math.pi * (angle + total) if is_odd else total


def _detectable(seeds: float, examples: float, num_seeds: int) -> float:
    error = math.sqrt(seeds + examples)
    if not error:
        return 0.0
    df, tail = num_seeds - 1, (1 + CONFIDENCE) / 2
    reach = 6 / math.sqrt(2 * df)  # 6 deviations of s, which is 1 in the mean
    s = np.linspace(max(0, 1 - reach), 1 + reach, 201)[1:]
    logs = (df - 1) * np.log(s) - df * s**2 / 2
    density = np.exp(logs - logs.max())
    halves = np.sqrt((student_t(tail, df) * s) ** 2 * seeds + NORMAL.inv_cdf(tail) ** 2 * examples)
    low, high = 0.0, float(halves.max()) + 6 * error
    for _ in range(30):
        effect = (low + high) / 2
        found = [NORMAL.cdf((effect - half) / error) for half in halves]
        low, high = (effect, high) if np.average(found, weights=density) < POWER else (low, effect)
    return high
