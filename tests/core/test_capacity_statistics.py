"""The intervals of the split: what they are worth, against closed forms and made-up worlds whose truth is known."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.capacity.bootstrap import Draws, Spread, interval, ratio_interval
from experiments.capacity.coverage import WORLDS, keeps_its_word, make_values, try_once
from experiments.capacity.power import Needs, detectable, needs, student_t
from vitcmp.stats import STUDENT_T

DIFFERENCE = np.array([-1.0, 1.0])
Z = 1.959964
ROOT = Path(__file__).parents[2]


def half_width(values, *, is_share=True, contrast=DIFFERENCE):
    low, high = interval(Draws(values, is_share=is_share).of(contrast))
    return (high - low) / 2


def made(num_seeds, num_examples, *, seed=0.0, example=0.0, residual=0.0):
    """Returns values (2, seeds, examples) whose difference has deviations of just these sizes, and mean 0."""
    rng = np.random.default_rng(5)
    s, e = rng.standard_normal((num_seeds, 1)), rng.standard_normal(num_examples)
    r = rng.standard_normal((num_seeds, num_examples))
    r = r - r.mean(0) - r.mean(1, keepdims=True) + r.mean()
    s, e = (x - x.mean() for x in (s, e))
    difference = (
        0 * r + (seed and seed * s / s.std(ddof=1)) + example * e / e.std() + (residual and residual * r / r.std())
    )
    return np.stack([np.zeros_like(difference), difference])


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
def test_where_seeds_alone_differ_the_interval_is_students_t_of_them(num_seeds):
    expected = STUDENT_T[num_seeds - 1] / math.sqrt(num_seeds)
    tolerance = 0.06 if num_seeds == 2 else 0.03  # of 20,000 draws: the 2.5 % point of t has a deviation of 1 to 3 %
    assert half_width(made(num_seeds, 400, seed=1.0), is_share=False) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_where_examples_alone_differ_the_interval_is_the_normal_one_however_few_the_seeds(num_seeds):
    values = made(num_seeds, 400, example=1.0)
    assert half_width(values, is_share=False) == pytest.approx(Z / 20, rel=0.05)  # 2,000 draws: 2 % a deviation


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_both_parts_add_in_squares(num_seeds):
    values = made(num_seeds, 400, seed=0.05, example=1.0)
    expected = math.hypot(STUDENT_T[num_seeds - 1] * 0.05 / math.sqrt(num_seeds), Z / 20)  # Howe 1974
    assert half_width(values, is_share=False) == pytest.approx(expected, rel=0.06)


def test_what_a_seed_makes_of_an_example_is_counted_once():
    """Such noise alone is in the seeds' spread and in the examples'; the naive sum would be sqrt(t^2 + z^2) wide."""
    rng, num_seeds, num_examples = np.random.default_rng(1), 10, 2000
    widths = [
        half_width(np.stack([np.zeros((num_seeds, num_examples)), rng.standard_normal((num_seeds, num_examples))]))
        for _ in range(20)
    ]
    once = STUDENT_T[9] / math.sqrt(num_seeds * num_examples)
    assert np.mean(widths) == pytest.approx(once, rel=0.1)
    assert np.mean(widths) < 0.85 * once * math.hypot(1, Z / STUDENT_T[9])


def test_arms_are_paired_in_seeds_and_examples():
    rng = np.random.default_rng(0)
    [arm] = make_values(rng, [0.7], num_seeds=5, num_examples=1000, world=WORLDS["alike"]._replace(seed=0.1))
    arm[:3] |= rng.random((3, 1000)) < 0.3
    paired = half_width(np.stack([arm, arm]))
    assert paired == pytest.approx(2.8e-3, rel=0.1)
    assert half_width(np.stack([arm, arm[::-1]])) > 20 * paired
    assert half_width(np.stack([arm, arm[:, ::-1]])) > 5 * paired


@pytest.mark.parametrize("num_examples", [500, 5000])
def test_without_an_example_that_differs_the_interval_is_nearly_the_rule_of_three(num_examples):
    values = np.ones((2, 3, num_examples), bool)
    assert half_width(values) == pytest.approx(2.8 / num_examples, rel=0.05)
    assert half_width(values[:1], contrast=np.ones(1)) == pytest.approx(2 / num_examples, rel=0.05)


def test_equal_values_give_equal_intervals():
    values = make_values(np.random.default_rng(0), [0.7, 0.8], num_seeds=3, num_examples=200, world=WORLDS["alike"])
    first, second = (Draws(values, is_share=True, seed=7).of(DIFFERENCE) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_ratio_has_fiellers_interval():
    """On normal draws it is the quadratic's roots: (a - x b)^2 = z^2 (vaa - 2 x vab + x^2 vbb)."""
    rng = np.random.default_rng(0)
    mean, covariance = (2.0, 4.0), np.array([[0.3, 0.2], [0.2, 0.6]])
    deviations = rng.multivariate_normal([0, 0], covariance, 400_000).T
    a, b, c = (
        mean[1] ** 2 - Z**2 * covariance[1, 1],
        -2 * (mean[0] * mean[1] - Z**2 * covariance[0, 1]),
        mean[0] ** 2 - Z**2 * covariance[0, 0],
    )
    expected = sorted(np.roots([a, b, c]))
    np.testing.assert_allclose(ratio_interval(mean, tuple(deviations)), expected, rtol=0.01)
    negated = ratio_interval((-mean[0], -mean[1]), tuple(-deviations))
    np.testing.assert_allclose(negated, expected, rtol=0.01)


def test_a_ratio_is_never_narrower_for_denominators_of_the_wrong_sign():
    numerator, denominator = np.full(1000, 0.0), np.where(np.arange(1000) < 40, -1.5, 0.0)
    assert ratio_interval((1.0, 1.0), (numerator, denominator)) == (-1e6, 1e6)
    few = np.where(np.arange(1000) < 10, -1.5, 0.0)
    assert ratio_interval((1.0, 1.0), (numerator, few)) == (1.0, 1.0)


@pytest.mark.parametrize("df", STUDENT_T)
def test_quantiles_are_students(df):
    assert student_t(0.975, df) == pytest.approx(STUDENT_T[df], abs=6e-4)


def test_quantiles_at_known_points():
    """Closed forms: Cauchy's tan(pi (p - 1/2)) for one degree, (2p - 1) / sqrt(2 p (1 - p)) for two."""
    assert student_t(0.8, 1) == pytest.approx(math.tan(0.3 * math.pi))
    assert student_t(0.8, 2) == pytest.approx(0.6 / math.sqrt(0.32))
    assert student_t(0.975, 10_001) == pytest.approx(Z, abs=3e-4)


@pytest.mark.parametrize(
    ["num_seeds", "seeds", "examples"], [(3, 1.0, 0.0), (3, 1.0, 2.0), (5, 1.0, 1.0), (10, 0.1, 1.0)]
)
def test_what_would_be_seen_is_seen_four_times_in_five(num_seeds, seeds, examples):
    """By 100,000 experiments whose seeds and examples are normal numbers of the variances given."""
    effect = detectable(Spread(seeds, examples, num_seeds, 1000))
    rng = np.random.default_rng(0)
    of_seeds = math.sqrt(seeds * num_seeds) * rng.standard_normal((100_000, num_seeds))
    means = effect + of_seeds.mean(axis=1) + math.sqrt(examples) * rng.standard_normal(100_000)
    errors = of_seeds.var(axis=1, ddof=1) / num_seeds
    halves = np.sqrt(STUDENT_T[num_seeds - 1] ** 2 * errors + Z**2 * examples)
    assert np.mean(means > halves) == pytest.approx(0.8, abs=0.006)


def test_the_seeds_needed_are_the_fewest_that_see_the_effect():
    spread = Spread(seeds=1e-5, examples=1e-6, num_seeds=4, num_examples=2000)
    num_seeds = needs(spread, 0.01).num_seeds
    seen = [detectable(Spread(4e-5 / n, 1e-6, n, 2000)) for n in (num_seeds - 1, num_seeds)]
    assert seen[0] > 0.01 >= seen[1]
    assert detectable(spread._replace(num_seeds=1)) is None


def test_where_no_number_of_seeds_is_enough_more_examples_are_asked_for():
    found = needs(Spread(seeds=1e-6, examples=1e-4, num_seeds=4, num_examples=1000), 0.01)
    assert found == Needs(0.01, None, math.ceil(1000 * (2.8016 * 0.01 / 0.01) ** 2))
    assert needs(Spread(seeds=1.0, examples=0.0, num_seeds=4, num_examples=1000), 0.01) == Needs(0.01, None, None)
    assert needs(Spread(seeds=math.nan, examples=1e-4, num_seeds=1, num_examples=1000), 0.01) is None
    assert needs(Spread(seeds=0.0, examples=0.0, num_seeds=4, num_examples=1000), 0.01) == Needs(0.01, 2, None)


@pytest.mark.slow
@pytest.mark.parametrize("gain", [0.0, 0.05])
@pytest.mark.parametrize(["world", "num_seeds"], [("alike", 3), ("alike", 10), ("apart", 3), ("heavy", 5)])
def test_intervals_hold_the_truth_and_nothing_is_not_called_an_effect(gain, num_seeds, world):
    rng = np.random.default_rng([num_seeds, round(1000 * gain)])
    trials = [try_once(rng, gain, num_seeds=num_seeds, num_examples=500, world=WORLDS[world]) for _ in range(200)]
    assert keeps_its_word(trials, gain)


@pytest.mark.slow
def test_the_simulation_is_a_program():
    command = [sys.executable, "-m", "experiments.capacity.coverage", "--trials"]
    good, bad = (subprocess.run([*command, num], capture_output=True, text=True, cwd=ROOT) for num in ("1", "0"))
    assert good.returncode == 0, good.stderr
    assert "1 experiments a row" in good.stdout and good.stdout.count("alike") == 2 * 18
    assert bad.returncode == 2 and bad.stderr.startswith("experiments.capacity.coverage: ")


def test_the_coverage_check_can_fail():
    """Student's t of the seeds alone, for arms that find different examples hard, holds the truth in 80 % or fewer."""
    rng = np.random.default_rng(3)
    trials = [try_once(rng, 0.0, num_seeds=10, num_examples=500, world=WORLDS["apart"]) for _ in range(120)]
    assert keeps_its_word(trials, 0.0)
    alone = [trial._replace(holds=trial.seeds_alone_hold, is_effect=not trial.seeds_alone_hold) for trial in trials]
    assert not keeps_its_word(alone, 0.0)
