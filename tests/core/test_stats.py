import collections
import itertools
import math

import numpy as np
import pytest

from vitcmp.stats import (
    STUDENT_T,
    _pairs_rank,
    binomial_interval,
    interval_is_exact,
    median,
    median_interval,
    paired_ratio,
    pooled_median,
    ratio_interval,
    round_ratios,
    verdict,
)


def ranks(num_values, confidence=0.95):
    """Returns which of the sorted values, counted from 1, the interval ends at."""
    return tuple(int(end) for end in median_interval(range(1, num_values + 1), confidence))


def skewed(rng, num_values, scale=1.0):
    return scale * np.exp(0.05 * rng.standard_exponential(num_values))


@pytest.mark.parametrize(["values", "expected"], [([3.0], 3), ([1, 2], 1.5), ([5, 1, 3], 3), ([1, 1, 1, 9], 1)])
def test_the_median_is_the_middle_value_or_the_mean_of_both(values, expected):
    assert median(values) == expected


def test_the_median_is_numpys_to_the_bit():
    rng = np.random.default_rng(0)
    assert all(median(values) == np.median(values) for values in (skewed(rng, n) for n in range(1, 200)))


@pytest.mark.parametrize("sides", [(1, 1), (4, 4), (3, 5), (5, 3), (2, 8), (6, 7)])
def test_the_rank_of_pairs_is_that_of_all_orders_counted(sides):
    a, b = sides
    counts = collections.Counter(sum(c) - a * (a - 1) // 2 for c in itertools.combinations(range(a + b), a))
    tails = itertools.accumulate(counts[u] for u in range(a * b + 1))
    assert _pairs_rank(a, b, 0.95) == next(k for k, tail in enumerate(tails) if 2 * tail > 0.05 * math.comb(a + b, a))


def test_the_rank_of_a_hundred_runs_a_side_takes_no_minutes():
    z = 1.959964 * math.sqrt(100 * 100 * 201 / 12)  # of the normal approximation
    assert abs(_pairs_rank(100, 100, 0.95) - (5000 - z)) < 2


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_no_median_is_made_of_nothing_or_of_what_is_not_finite(values):
    with pytest.raises(ValueError, match="one or more finite numbers"):
        median(values)


# For n = 500, the normal approximation gives 250 - 1.96 x sqrt(125) = 228.1.
@pytest.mark.parametrize(
    ["num_values", "expected"],
    [(6, (1, 6)), (9, (2, 8)), (10, (2, 9)), (30, (10, 21)), (100, (40, 61)), (500, (228, 273))],
)
def test_the_interval_ends_at_the_known_ranks(num_values, expected):
    assert ranks(num_values) == expected


@pytest.mark.parametrize("num_values", range(6, 15))
def test_the_interval_keeps_its_confidence_and_is_the_shortest_that_does(num_values):
    low, high = ranks(num_values)
    below = [sum(signs) for signs in itertools.product((0, 1), repeat=num_values)]  # of the values, below the median
    coverage = [np.mean([low + i <= n < high - i for n in below]) for i in (0, 1)]
    assert coverage[0] >= 0.95 > coverage[1]


def test_the_interval_does_not_depend_on_the_order_of_the_values():
    values = skewed(np.random.default_rng(0), 50)
    assert median_interval(values) == median_interval(sorted(values))


@pytest.mark.parametrize("num_values", range(1, 6))
def test_with_too_few_values_the_interval_is_their_range_and_says_so(num_values):
    assert ranks(num_values) == (1, num_values)
    assert not interval_is_exact(num_values)
    assert interval_is_exact(num_values + 5)


def test_a_lower_confidence_needs_fewer_values():
    assert interval_is_exact(5, 0.9) and not interval_is_exact(4, 0.9)
    assert ranks(100, 0.5) == (47, 54)


def test_an_impossible_confidence_is_refused():
    with pytest.raises(ValueError, match=r"confidence=1\.5 must be between 0 and 1"):
        median_interval([1, 2, 3], 1.5)


def test_one_run_gives_its_own_interval():
    run = skewed(np.random.default_rng(0), 50)
    estimate = pooled_median([run])
    assert estimate == (median(run), *median_interval(run), 0.95, (1,), (50,))
    assert pooled_median([run[:5]]).confidence is None


def test_a_few_runs_give_the_range_of_their_intervals_and_promise_nothing():
    runs = [skewed(np.random.default_rng(i), 40, scale) for i, scale in enumerate((1.0, 1.1, 1.3))]
    estimate = pooled_median(runs)
    assert estimate.value == median(runs[1])
    assert (estimate.low, estimate.high) == (median_interval(runs[0])[0], median_interval(runs[2])[1])
    assert (estimate.confidence, estimate.num_runs, estimate.num_values) == (None, (3,), (120,))


def test_six_runs_give_the_interval_of_their_medians():
    runs = [[10.0 + i, 10.0 + i, 99.0] for i in range(6)]
    assert pooled_median(runs) == (12.5, 10.0, 15.0, 0.95, (6,), (18,))


def test_with_one_run_a_side_the_ratio_is_bounded_by_both_intervals():
    a, b = skewed(np.random.default_rng(0), 60, 2.0), skewed(np.random.default_rng(1), 90)
    ratio = ratio_interval([a], [b])
    (low_a, high_a), (low_b, high_b) = median_interval(a, math.sqrt(0.95)), median_interval(b, math.sqrt(0.95))
    assert ratio == (median(a) / median(b), low_a / high_b, high_a / low_b, 0.95, (1, 1), (60, 90))


@pytest.mark.parametrize(["a", "b"], [(5, 60), (60, 5)])
def test_a_ratio_of_too_few_values_promises_nothing(a, b):
    assert ratio_interval([[1.0] * a], [[1.0] * b]).confidence is None


# Two-sided critical values of Mann and Whitney's U at 5 %, as tabulated; the rank is one more.
@pytest.mark.parametrize(["num_a", "num_b", "critical"], [(4, 4, 0), (3, 5, 0), (5, 5, 2), (4, 8, 4), (8, 8, 13)])
def test_the_ratio_of_runs_ends_at_the_rank_after_the_critical_value(num_a, num_b, critical):
    a, b = np.exp(np.arange(num_a) * 0.1), np.exp(np.arange(num_b) * 0.0137)
    ratio = ratio_interval([[x] for x in a], [[x] for x in b])
    ordered = np.sort(np.divide.outer(a, b).ravel())
    assert (ratio.low, ratio.high, ratio.confidence) == (ordered[critical], ordered[-critical - 1], 0.95)


@pytest.mark.parametrize(["num_a", "num_b"], [(3, 5), (4, 4), (5, 5)])
def test_the_interval_of_runs_covers_the_true_ratio_in_all_but_a_twentieth_of_all_orders(num_a, num_b):
    """Where both sides are alike every order is as likely; the interval misses 1 where one side is nearly all below."""
    orders = list(itertools.combinations(range(num_a + num_b), num_a))
    misses = 0
    for order in orders:
        a = [[1 + i] for i in order]
        b = [[1 + i] for i in range(num_a + num_b) if i not in order]
        ratio = ratio_interval(a, b)
        misses += not ratio.low <= 1 <= ratio.high
    assert 0 < misses / len(orders) <= 0.05


def test_two_runs_a_side_span_everything_that_was_seen():
    a, b = [[4.0] * 9, [5.0] * 9], [[1.0] * 9, [2.0] * 9]
    assert ratio_interval(a, b) == (3.0, 2.0, 5.0, None, (2, 2), (18, 18))


def test_noise_between_processes_is_inside_the_interval_of_several_runs_and_outside_that_of_one():
    rng = np.random.default_rng(0)
    covered = {1: 0, 5: 0}
    for _ in range(200):
        for num_runs in covered:
            a, b = ([skewed(rng, 30, np.exp(0.05 * rng.standard_normal())) for _ in range(num_runs)] for _ in "ab")
            ratio = ratio_interval(a, b)
            covered[num_runs] += ratio.low <= 1 <= ratio.high
    assert covered[5] >= 186 and covered[1] < 120


@pytest.mark.parametrize("num_runs", [1, 2, 5, 6])
def test_swapping_the_sides_inverts_the_ratio(num_runs):
    a, b = ([skewed(np.random.default_rng([i, j]), 41, 1 + j) for i in range(num_runs)] for j in (0, 1))
    there, back = ratio_interval(a, b), ratio_interval(b, a)
    np.testing.assert_allclose([there.low, there.high], [1 / back.high, 1 / back.low], rtol=1e-12)


@pytest.mark.parametrize(
    ["interval", "expected"],
    [
        ((1.04, 1.10), "slower"),
        ((0.90, 0.96), "faster"),
        ((0.98, 1.02), "same"),
        ((1.01, 1.02), "same"),  # a difference, but one inside the band
        ((1.02, 1.04), "ambiguous"),
        ((0.96, 0.98), "ambiguous"),
        ((0.90, 1.10), "ambiguous"),
        ((1 / 1.03, 1.03), "same"),
        ((1.03, 1.10), "ambiguous"),
        ((0.90, 0.9705), "faster"),  # the band ends at 1 / 1.03 = 0.9709, not at 0.97
    ],
)
def test_the_verdict_needs_the_whole_interval(interval, expected):
    assert verdict(interval) == expected


def test_the_band_is_a_choice_and_is_symmetric():
    assert verdict((1.04, 1.06), same_within=0.1) == "same"
    assert verdict((1 / 1.06, 1 / 1.04)) == "faster" and verdict((1.04, 1.06)) == "slower"


@pytest.mark.parametrize("interval", [(1.1, 1.0), (0.0, 1.0), (math.nan, 1.0)])
def test_what_is_no_interval_of_a_ratio_is_refused(interval):
    with pytest.raises(ValueError, match="must be"):
        verdict(interval)


def test_the_interval_of_many_values_is_that_of_the_normal_approximation():
    low, high = median_interval(np.arange(20_001) / 20_000)
    assert high - low == pytest.approx(2 * 1.96 / 2 / 20_001**0.5, rel=0.01)


# Rounds and paired ratios


def test_a_rounds_ratio_is_of_the_geometric_means_of_its_two_blocks_medians():
    a, b = [[1.0, 2.0, 90.0], [8.0], [3.0], [3.0]], [[2.0], [2.0], [1.0], [9.0]]
    assert round_ratios(a, b) == pytest.approx([2.0, 1.0])


def test_sides_of_different_numbers_of_blocks_are_refused():
    with pytest.raises(ValueError, match="zip"):
        round_ratios([[1.0], [1.0]], [[1.0]])


@pytest.mark.parametrize("degrees", STUDENT_T)
def test_students_t_holds_95_percent(degrees):
    t, density = np.linspace(-STUDENT_T[degrees], STUDENT_T[degrees], 200_001), (degrees + 1) / 2
    scale = math.gamma(density) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    assert np.trapezoid(scale * (1 + t**2 / degrees) ** -density, t) == pytest.approx(0.95, abs=3e-5)


def test_one_process_gives_the_interval_of_its_rounds():
    rounds = skewed(np.random.default_rng(0), 30)
    assert paired_ratio([rounds]) == (pytest.approx(median(rounds)), *median_interval(rounds), 0.95, (1, 1), (30, 30))
    assert paired_ratio([rounds[:5]]).confidence is None


def test_a_few_processes_give_students_interval_of_their_logarithms_widened_by_a_tenth():
    estimate = paired_ratio([[1.0], [1.0], [math.exp(0.03)]])
    half = 1.1 * 4.303 * 0.03 / math.sqrt(3) / math.sqrt(3)
    assert np.log(estimate[:3]) == pytest.approx([0.01, 0.01 - half, 0.01 + half])
    assert estimate.num_runs == (3, 3)


def test_processes_that_agree_by_luck_do_not_narrow_the_interval_below_that_of_their_rounds():
    rounds = np.exp(0.05 * np.linspace(-1, 1, 31))
    low, high = median_interval(rounds)
    estimate = paired_ratio([rounds] * 4)
    assert [estimate.low, estimate.high] == pytest.approx([low**0.5, high**0.5])


def test_from_seven_processes_on_one_that_is_slow_for_its_whole_life_is_left_out():
    runs = [[math.exp(0.002 * i)] for i in range(-3, 3)]
    with_outlier = paired_ratio([*runs, [1.15]])
    assert with_outlier.high < 1.01 < 1.08 < paired_ratio([*runs[1:], [1.15]]).high
    assert with_outlier.value == pytest.approx(1.0, abs=0.001)


def test_swapping_the_sides_inverts_a_paired_ratio():
    for num_runs in (1, 3, 8):
        runs = [skewed(np.random.default_rng([i, num_runs]), 21) for i in range(num_runs)]
        there, back = paired_ratio(runs), paired_ratio([1 / run for run in runs])
        np.testing.assert_allclose([there.low, there.high], [1 / back.high, 1 / back.low], rtol=1e-12)


@pytest.mark.parametrize("num_runs", [2, 3, 5, 8, 12])
def test_the_interval_of_a_paired_ratio_holds_the_true_one_in_95_of_100_with_however_few_processes(num_runs):
    rng = np.random.default_rng(num_runs)
    held = 0
    for _ in range(400):
        estimate = paired_ratio(np.exp(0.01 * rng.standard_normal(num_runs))[:, None] * np.ones(12))
        held += estimate.low <= 1 <= estimate.high
    assert held >= 380


# Clopper and Pearson's intervals, as tabulated.
@pytest.mark.parametrize(
    ["num_hits", "num_tries", "expected"],
    [(0, 100, (0, 0.03622)), (5, 100, (0.01643, 0.11283)), (95, 100, (0.88717, 0.98357)), (10, 10, (0.69150, 1))],
)
def test_the_interval_of_a_rate_is_clopper_and_pearsons(num_hits, num_tries, expected):
    assert binomial_interval(num_hits, num_tries) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(["num_hits", "num_tries"], [(0, 0), (-1, 5), (6, 5)])
def test_a_rate_of_nothing_or_of_more_hits_than_tries_is_refused(num_hits, num_tries):
    with pytest.raises(ValueError, match="num_hits"):
        binomial_interval(num_hits, num_tries)
