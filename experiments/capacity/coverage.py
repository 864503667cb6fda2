"""Do the intervals of the split hold the truth as often as they say? Made-up runs whose truth is known.

Command: python -m experiments.capacity.coverage                  (1,000 experiments a row: 15 minutes of one core)
         python -m experiments.capacity.coverage --trials 50      (a minute)
Expected: 95 % intervals hold the truth in 93 % of the experiments or more, and of gains of 0 at most 5 % are called an
effect, as far as so many experiments can tell.
Outputs: a table. Exit codes: 0 both hold, 1 one does not, 2 bad usage.

An example is right where a sum of normal numbers is above 0: its difficulty, the same in all arms; what an arm makes of
it; the seed's luck, of 0.5 points of accuracy; and what a seed makes of an example. In `alike` the arms find the same
examples hard, in `apart` less so; in `heavy` the luck is Student's t of 3 degrees of freedom, of the same deviation.

What came out, of 600 experiments a row (a rate of 95 % has a deviation of 0.9), with 3, 5 and 10 seeds:

    arms   gain  examples  holds, %        seeds alone     effect, %        would see, points
    alike  0     500       97.7 97.3 97.2  94.8 94.5 91.0   2.3   2.7   2.8  4.4 2.7 2.0
    alike  0     5,000     94.8 93.8 94.8  94.0 92.7 93.2   5.2   6.2   5.2  2.1 1.3 0.9
    alike  1     500       97.0 96.2 97.8  93.8 93.5 91.7   7.7  15.2  27.3  4.3 2.8 2.0
    alike  1     5,000     95.3 94.8 94.7  94.3 93.8 92.5  23.8  49.7  87.8  2.3 1.3 0.9
    alike  5     500       98.0 95.5 97.5  95.5 91.7 83.8  74.8 100.0 100.0  4.6 2.9 2.1
    alike  5     5,000     94.5 94.8 96.0  93.0 94.2 93.3  99.3 100.0 100.0  2.4 1.4 0.9
    apart  0     2,000     97.2 96.7 97.0  94.0 85.2 80.3   2.8   3.3   3.0  3.6 2.3 1.9
    heavy  0     2,000     94.7 95.7 97.8  94.5 95.5 96.8   5.3   4.3   2.2  3.7 2.1 1.3

The share's interval held it in 93.0 to 98.6 %. With 5,000 examples seeds decide, and the interval is nearly Student's
own, which calls nothing an effect in 5 %: 2,500 further experiments of its closed form held 96.1, 95.6 and 95.5 %.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import flags
from rich.console import Console

from experiments.capacity.bootstrap import Draws, interval, ratio_interval
from experiments.capacity.power import detectable, student_t
from vitcmp.report.text import UNKNOWN, Column, Fitted
from vitcmp.stats import binomial_interval
from vitcmp.usage import start

TRIALS = flags.DEFINE_integer("trials", 1000, "Experiments a row.", lower_bound=1)

ACCURACY, RESOLUTION = 0.75, 0.02  # of low, and what high gains over down_up
SEED_SD = 0.005
LEAST_COVERAGE, MOST_FALSE = 0.93, 0.05
CAPACITY, TOTAL = np.array([-1.0, 1, 0]), np.array([-1.0, 0, 1])


class World(NamedTuple):
    """How far the parts of an example's sum deviate."""

    difficulty: float
    arm: float
    seed: float
    is_heavy: bool = False


WORLDS = {
    "alike": World(difficulty=1, arm=0.1, seed=0.3),
    "apart": World(difficulty=1, arm=0.5, seed=0.6),
    "heavy": World(difficulty=1, arm=0.1, seed=1, is_heavy=True),
}


class Trial(NamedTuple):
    """What one experiment said about its capacity gain; `share_holds` is None where there was no total to share."""

    holds: bool
    is_effect: bool
    seeds_alone_hold: bool  # what Student's t of the seeds' differences says, the test set taken for the world
    half_width: float
    detectable: float | None
    share_holds: bool | None


def make_values(
    rng: np.random.Generator, accuracies: Sequence[float], *, num_seeds: int, num_examples: int, world: World
) -> np.ndarray:
    """Returns correctness (arms, seeds, examples) whose expectation, over seeds and examples, is `accuracies`."""
    normal, size = statistics.NormalDist(), math.hypot(world.difficulty, world.arm, world.seed)
    difficulty = world.difficulty * rng.standard_normal(num_examples)
    values = np.empty((len(accuracies), num_seeds, num_examples), bool)
    for i, accuracy in enumerate(accuracies):
        luck_sd = SEED_SD * size / normal.pdf(normal.inv_cdf(accuracy))
        luck = rng.standard_t(3, num_seeds) / math.sqrt(3) if world.is_heavy else rng.standard_normal(num_seeds)
        of_arm = difficulty + world.arm * rng.standard_normal(num_examples)
        of_seed = world.seed * rng.standard_normal((num_seeds, num_examples)) + luck_sd * luck[:, None]
        values[i] = normal.inv_cdf(accuracy) * math.hypot(size, luck_sd) + of_arm + of_seed > 0
    return values


def try_once(rng: np.random.Generator, gain: float, *, num_seeds: int, num_examples: int, world: World) -> Trial:
    accuracies = (ACCURACY, ACCURACY + gain, ACCURACY + gain + RESOLUTION)
    values = make_values(rng, accuracies, num_seeds=num_seeds, num_examples=num_examples, world=world)
    draws = Draws(values, is_share=True, seed=int(rng.integers(2**31)))
    mean, spread = float(CAPACITY @ draws.means), draws.spread(CAPACITY)
    low, high = (mean + end for end in interval(draws.of(CAPACITY)))
    alone = student_t(0.975, num_seeds - 1) * math.sqrt(spread.seeds)
    return Trial(
        low <= gain <= high,
        low > 0 or high < 0,
        abs(mean - gain) <= alone,
        (high - low) / 2,
        detectable(spread),
        _share_holds(draws, gain / (gain + RESOLUTION)),
    )


def _share_holds(draws: Draws, truth: float) -> bool | None:
    mean, deviations = float(TOTAL @ draws.means), draws.of(TOTAL)
    low, high = (mean + end for end in interval(deviations))
    if low <= 0 <= high:
        return None
    low, high = ratio_interval((float(CAPACITY @ draws.means), mean), (draws.of(CAPACITY), deviations))
    return low <= truth <= high


COLUMNS = (
    (Column("world", "arms"), Column("gain", "true gain", is_number=True)),
    (Column("seeds", "seeds", is_number=True), Column("examples", "examples", is_number=True)),
    (Column("holds", "holds, %", is_number=True), Column("alone", "seeds alone, %", is_number=True)),
    (Column("effect", "effect, %", is_number=True), Column("share", "share holds, %", is_number=True)),
    (Column("width", "± points", is_number=True), Column("detectable", "would see", is_number=True)),
)
GRID = [
    ("alike", gain, num_seeds, num_examples)
    for gain in (0.0, 0.01, 0.05)
    for num_seeds in (3, 5, 10)
    for num_examples in (500, 5000)
] + [(world, 0.0, num_seeds, 2000) for world in ("apart", "heavy") for num_seeds in (3, 5, 10)]
NOTES = (
    "Holds: the interval holds the true gain, or the true share of the total where there is one. Seeds alone: the same",
    "of Student's t of the seeds' differences, as if the test set were the world. Effect: the interval excludes 0.",
    "± points, would see: medians of half the interval, and of what it says it would have seen 4 times in 5.",
)


def main(argv: Sequence[str]) -> int:
    console, rows, is_good = Console(), [], True
    for i, (world, gain, num_seeds, num_examples) in enumerate(GRID):
        rng = np.random.default_rng([i, TRIALS.value])
        trials = [
            try_once(rng, gain, num_seeds=num_seeds, num_examples=num_examples, world=WORLDS[world])
            for _ in range(TRIALS.value)
        ]
        is_good &= keeps_its_word(trials, gain)
        row = {"world": world, "gain": f"{100 * gain:g}", "seeds": str(num_seeds), "examples": f"{num_examples}"}
        rows.append(row | _rates(trials))
        console.print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), highlight=False, soft_wrap=True)
    console.print(Fitted(f"{TRIALS.value} experiments a row", COLUMNS, rows, NOTES))
    return 0 if is_good else 1


def keeps_its_word(trials: Sequence[Trial], gain: float) -> bool:
    """Says whether both rates may be what is promised: the exact intervals of those seen reach it."""
    holds = sum(trial.holds for trial in trials)
    is_covering = binomial_interval(holds, len(trials))[1] >= LEAST_COVERAGE
    false = sum(trial.is_effect for trial in trials)
    return is_covering and (gain != 0 or binomial_interval(false, len(trials))[0] <= MOST_FALSE)


def _rates(trials: Sequence[Trial]) -> dict[str, str]:
    shares = [trial.share_holds for trial in trials if trial.share_holds is not None]
    return {
        "holds": _percent([trial.holds for trial in trials]),
        "alone": _percent([trial.seeds_alone_hold for trial in trials]),
        "effect": _percent([trial.is_effect for trial in trials]),
        "share": _percent(shares),
        "width": f"{100 * np.median([trial.half_width for trial in trials]):.2f}",
        "detectable": f"{100 * np.median([trial.detectable or math.nan for trial in trials]):.2f}",
    }


def _percent(values: Sequence[bool]) -> str:
    return f"{100 * np.mean(values):.1f}" if values else UNKNOWN


if __name__ == "__main__":
    start(main)
