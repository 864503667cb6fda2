"""Intervals over few seeds and many examples: a paired two-way bootstrap with a small-sample correction.

Values are (arms, seeds, examples): the same seeds and examples in every arm, so that any contrast of arms is paired in
both. A contrast d of seed s and example e is mean + S_s + E_e + R_se. The mean of n seeds and m examples has variance

    var(S)/n + var(E)/m + var(R)/(nm),

which is what it would differ by, were both the seeds and the test set drawn anew. Examples are many: they are drawn
with replacement. Seeds are few, and drawn with replacement three of them have 10 outcomes and a variance (n - 1)/n of
what it should be. So theirs is a multiplier bootstrap: deviations from the mean times normal numbers, over the root of
chi2/(n - 1), which is Student's t of n - 1 degrees of freedom in every direction. Both parts hold var(R)/(nm), once too
often; it is taken out of the examples', so that it is counted with the seeds', where it costs most. This is the
bootstrap's form of Howe's interval (1974, JASA 69: half-widths t and z of the two parts, added in squares).

Simulated, it holds the truth in 93.8 to 98 % of experiments (`coverage` has the table). Student's t of the seeds alone,
which is what most papers give, holds it in 80 to 97 %.
"""

import math
from typing import NamedTuple

import numpy as np

NUM_EXAMPLE_DRAWS, DRAWS_EACH = 2000, 10  # each set of examples meets so many draws of seeds
CHUNK = 100_000  # examples drawn at a time, or one test set: what fits the cache is 2.5 times as fast as a million
CONFIDENCE = 0.95
FAR = 1e6  # a ratio beyond any other


class Spread(NamedTuple):
    """Variances of a contrast's mean, in its two parts: by the seeds, and by the examples beyond what those hold."""

    seeds: float  # an estimate of var(S)/n + var(R)/(nm), of num_seeds - 1 degrees of freedom
    examples: float  # of var(E)/m
    num_seeds: int
    num_examples: int


class Draws:
    """Draws of the arms' means. `values` is (arms, seeds, examples), of correctness or of losses.

    `is_share` says that values lie in [0, 1] and their means are shares: each arm then gets the noise of one further
    example, right or wrong by chance. Without a single example on which two arms differ, their difference is 0 +- 2.8/m
    by it, where the rule of three has 3/m; with hundreds that differ it is nothing. One seed has no spread: its draws
    are of examples alone.
    """

    def __init__(self, values: np.ndarray, *, is_share: bool, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.means = values.mean(axis=(1, 2), dtype=np.float64)
        self.num_seeds, self.num_examples = values.shape[1:]
        self.by_seed = values.mean(axis=2, dtype=np.float64) - self.means[:, None]  # (arms, seeds)
        by_example = values.mean(axis=1, dtype=np.float64) - self.means[:, None]  # (arms, examples)
        self._noise = is_share / self.num_examples
        shrink = _shrinking(by_example, _residual_covariance(values, self.by_seed, by_example))
        self._by_example = shrink @ by_example
        examples = _draw_means(self._by_example, rng)
        deviations = np.tile(examples, (DRAWS_EACH, 1)) + self._draw_seeds(DRAWS_EACH * len(examples), rng)
        self.deviations = deviations + self._noise * rng.standard_normal(deviations.shape)  # (draws, arms)

    def _draw_seeds(self, num: int, rng: np.random.Generator) -> np.ndarray:
        """Returns (num, arms) of multivariate t: covariance that of the mean over seeds, before t's own factor."""
        n = self.num_seeds
        if n == 1:
            return np.zeros((num, len(self.means)))
        multipliers = rng.standard_normal((num, n)) / np.sqrt(rng.chisquare(n - 1, (num, 1)) / (n - 1))
        return multipliers @ self.by_seed.T / math.sqrt(n * (n - 1))

    def of(self, contrast: np.ndarray) -> np.ndarray:
        """Returns the deviations of a contrast's mean from what was measured."""
        return self.deviations @ contrast

    def spread(self, contrast: np.ndarray) -> Spread:
        n, m = self.num_seeds, self.num_examples
        seeds = np.var(contrast @ self.by_seed, ddof=1) / n if n > 1 else math.nan
        examples = np.var(contrast @ self._by_example) / m + self._noise**2 * (contrast @ contrast)
        return Spread(float(seeds), float(examples), n, m)


def interval(deviations: np.ndarray) -> tuple[float, float]:
    """Returns the two percentiles that enclose CONFIDENCE of the draws."""
    low, high = np.quantile(deviations, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def ratio_interval(means: tuple[float, float], deviations: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Returns the interval of a ratio of two means, by Fieller's argument (1954, JRSS B 16) on the draws.

    A share x is in it where the interval of numerator - x * denominator covers 0. For draws whose denominator has the
    sign of the mean's this is x lying between the percentiles of the draws' ratios; the others count as beyond either
    end. Wherever the denominator's own interval excludes 0 they are too few to make it infinite.
    """
    sign = math.copysign(1.0, means[1])
    numerator, denominator = (sign * (mean + deviation) for mean, deviation in zip(means, deviations, strict=True))
    is_good = denominator > 0
    ratios = np.divide(numerator, denominator, where=is_good, out=np.zeros_like(numerator))
    low, _ = interval(np.where(is_good, ratios, -FAR))
    _, high = interval(np.where(is_good, ratios, FAR))
    return low, high


def _draw_means(by_example: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns (draws, arms): means of examples drawn with replacement, as deviations. 0.1 s for 5,000 examples."""
    num_examples = by_example.shape[1]
    draws, step = [], max(1, CHUNK // num_examples)
    for start in range(0, NUM_EXAMPLE_DRAWS, step):
        rows = np.arange(min(step, NUM_EXAMPLE_DRAWS - start))[:, None]
        drawn = rng.integers(num_examples, size=(len(rows), num_examples)) + rows * num_examples
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)  # 7 times as fast as multinomial
        draws.append(counts.astype(np.float64) @ by_example.T / num_examples)
    return np.concatenate(draws)


def _residual_covariance(values: np.ndarray, by_seed: np.ndarray, by_example: np.ndarray) -> np.ndarray:
    """Returns the (arms, arms) covariance of the mean of R: what both parts hold."""
    k, n, m = values.shape
    if n == 1 or m == 1:
        return np.zeros((k, k))
    total = np.einsum("ase,bse->ab", *(2 * [values - values.mean(axis=(1, 2), keepdims=True)]), optimize=True)
    residual = total - m * by_seed @ by_seed.T - n * by_example @ by_example.T
    return residual / (n - 1) / (m - 1) / n / m


def _shrinking(by_example: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Returns the (arms, arms) matrix that takes the residual's covariance out of the examples', down to none of it.

    In the directions where the one is a multiple of the other (the generalised eigenvectors), so that no contrast is
    left with a negative variance.
    """
    num_examples = by_example.shape[1]
    values, vectors = np.linalg.eigh(by_example @ by_example.T / num_examples**2)
    is_zero = values <= 1e-12 * max(values[-1], 1e-30)
    roots = np.where(is_zero, 0, np.sqrt(np.abs(values)))
    inverse_roots = np.divide(1, roots, where=~is_zero, out=np.zeros_like(roots))
    whiten, unwhiten = (vectors * root @ vectors.T for root in (inverse_roots, roots))
    shares, directions = np.linalg.eigh(whiten @ residual @ whiten)
    return unwhiten @ (directions * np.sqrt(np.clip(1 - shares, 0, 1))) @ directions.T @ whiten
