import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from experiments.capacity.analysis import split, splits_of
from experiments.capacity.curves import curve_pairs
from experiments.capacity.groups import groups_of
from experiments.capacity.schema import validate
from experiments.capacity.tables import (
    gain_amount,
    gain_words,
    markdown_report,
    needs_words,
    overview_table,
    print_report,
    share_words,
)
from tests.core.fake_capacity import NUM_EXAMPLES, failure, make_correct, record, records


def only_split(some, **options):
    [found], notes = splits_of(some, **options)
    assert notes == []
    return found


def report(some, width=200):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_report(some, console)
    text = console.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    return text


def test_the_records_of_these_tests_are_good_ones():
    assert validate(record()) == [] and validate(failure()) == [] and validate(record(cross=False)) == []
    assert validate(json.loads(json.dumps(record()))) == []


def test_the_split_is_of_the_differences_of_the_arms():
    found = only_split(records(5))
    mean = {arm: np.mean([make_correct(arm, seed).mean() for seed in range(5)]) for arm in found.arms}
    gains = {name: gain.value for name, gain in found.gains.items()}
    assert gains == {
        "capacity": pytest.approx(mean["down_up"] - mean["low"]),
        "resolution": pytest.approx(mean["high"] - mean["down_up"]),
        "total": pytest.approx(mean["high"] - mean["low"]),
        "resolution_at_low": pytest.approx(mean["patch"] - mean["low"]),
        "interaction": pytest.approx(mean["high"] - mean["down_up"] - mean["patch"] + mean["low"]),
    }
    assert gains["capacity"] + gains["resolution"] == pytest.approx(gains["total"])
    assert found.share.value == pytest.approx(gains["capacity"] / gains["total"])
    assert found.share.low < found.share.value < found.share.high
    assert {gain.verdict for gain in found.gains.values()} == {"effect"}
    assert all(gain.low < gain.value < gain.high for gain in found.gains.values())


def test_each_arm_has_what_it_reached_and_what_it_cost():
    arm = only_split(records(3)).arms["high"]
    assert (arm.seeds, arm.num_examples, arm.flops, arm.memory_bytes) == (
        (0, 1, 2),
        NUM_EXAMPLES,
        4 * 10**10,
        500_000_000,
    )
    assert arm.step_s == (0.021, 0.019, 0.03)
    assert arm.accuracy.value == pytest.approx(0.8, abs=0.03)
    assert arm.accuracy.low < arm.accuracy.value < arm.accuracy.high
    assert arm.loss.value == pytest.approx(2 - 1.5 * arm.accuracy.value, abs=1e-3)


def test_where_nothing_is_gained_it_is_no_effect_and_there_is_nothing_to_share():
    found = only_split(records(3, accuracy=0.7))
    assert {gain.verdict for gain in found.gains.values()} == {"no effect at this power"}
    assert found.share is None
    assert found.why_no_share == "there is no total to share: no effect at this power"
    assert all(0.01 < gain.detectable < 0.15 for gain in found.gains.values())


def test_a_gain_that_is_all_capacity_has_a_share_of_one():
    some = [
        record(arm, seed, accuracy=0.6 if arm in ("low", "patch") else 0.8)
        for arm in ("low", "down_up", "high")
        for seed in range(5)
    ]
    found = only_split(some)
    assert found.gains["resolution"].verdict == "no effect at this power"
    assert found.share.low < 1 < found.share.high and found.share.low > 0.7


def test_a_share_that_could_be_anything_is_not_given():
    """The total is a little more than 0 in every seed, and capacity anything."""
    low = {seed: make_correct("low", seed, accuracy=0.6) for seed in range(3)}
    some = [record("low", seed, correct=low[seed]) for seed in low]
    some += [record("down_up", seed, accuracy=0.5 + 0.1 * seed) for seed in low]
    some += [record("high", seed, correct=low[seed] | (np.arange(len(low[seed])) < 60)) for seed in low]
    found = only_split(some)
    assert found.gains["total"].verdict == "effect" and found.share is None
    assert share_words(found).startswith(
        "The share that is capacity is not known: at this power its interval goes from -"
    )


def test_one_seed_is_not_judged():
    found = only_split(records(1))
    assert {gain.verdict for gain in found.gains.values()} == {"not judged"}
    assert found.gains["total"].detectable is None and found.gains["total"].needs is None
    assert found.share is None and "not judged" in found.why_no_share


def test_a_loss_gains_where_it_falls():
    of_loss, of_accuracy = (only_split(records(3), metric=metric).gains for metric in ("loss", "accuracy"))
    assert of_loss["total"].value == pytest.approx(1.5 * of_accuracy["total"].value, rel=1e-3)
    assert of_loss["total"].verdict == "effect" and of_loss["total"].needs is None
    means_only = only_split(records(3, keep_losses=False), metric="loss")
    assert means_only.gains["total"].value == pytest.approx(of_loss["total"].value, rel=1e-3)
    assert "of loss" in gain_words(of_loss["total"], "loss")


def test_an_unknown_metric_is_refused():
    [group], _ = groups_of(records(1))
    with pytest.raises(ValueError, match="unknown metric 'error'; did you mean|unknown metric 'error'; allowed"):
        split(group, metric="error")


def test_a_seed_that_an_arm_lacks_is_left_out_of_what_compares_it_and_said():
    some = [*records(3), record("low", 3), record("down_up", 3), record("high", 3)]
    found = only_split(some)
    assert found.gains["total"].seeds == (0, 1, 2, 3)
    assert found.gains["interaction"].seeds == (0, 1, 2)
    assert found.arms["patch"].seeds == (0, 1, 2)
    assert found.group.notes == ("seed 3 is left out where patch is compared, which lacks it: seeds are paired",)


@pytest.mark.parametrize(
    ["arms", "gains"],
    [
        (("low",), []),
        (("low", "high"), ["total"]),
        (("down_up", "high"), ["resolution"]),
        (("low", "patch"), ["resolution_at_low"]),
        (("low", "down_up", "high"), ["capacity", "resolution", "total"]),
    ],
)
def test_what_has_its_arms_is_compared(arms, gains):
    found = only_split(records(2, arms=arms))
    assert [*found.gains] == gains
    assert (found.share is None) == (len(arms) < 3)
    assert report(records(2, arms=arms))


def test_arms_without_a_common_seed_are_compared_as_far_as_two_have_one():
    some = [*records(2, arms=("low", "down_up")), record("high", 2), record("low", 2)]
    found = only_split(some)
    assert {name: gain.seeds for name, gain in found.gains.items()} == {"capacity": (0, 1), "total": (2,)}
    assert (found.share, found.why_no_share) == (None, "low, down_up and high are not all there, of the same seeds")


def test_no_interval_leaves_what_is_possible():
    found = only_split(records(2, accuracy=0.995))
    assert all(0 <= arm.accuracy.low <= arm.accuracy.high <= 1 for arm in found.arms.values())
    assert found.arms["low"].accuracy.high == 1
    wild = [
        record(arm, seed, accuracy=0.1 + 0.8 * (seed == (arm == "low"))) for arm in ("low", "high") for seed in (0, 1)
    ]
    gain = only_split(wild).gains["total"]
    assert (gain.low, gain.high) == (-1, 1)


def test_a_failed_run_is_a_note_and_its_seed_is_left_out():
    some = [*records(2), *(record(arm, 2) for arm in ("low", "down_up", "patch")), failure("high", 2)]
    found = only_split(some)
    assert found.gains["total"].seeds == found.gains["interaction"].seeds == (0, 1)
    assert found.gains["capacity"].seeds == (0, 1, 2)
    assert "high, seed 2: diverged: the loss of step 7 is not finite" in found.group.notes


def test_nothing_but_failures_is_no_split_and_no_crash():
    splits, [note] = splits_of([failure("low", 0)])
    assert splits == []
    assert note.endswith(" px: no run went well: low, seed 0: diverged: the loss of step 7 is not finite")
    assert splits_of([]) == ([], [])
    assert "no run went well" in report([failure("low", 0)])


def test_of_several_attempts_the_last_that_went_well_counts():
    again = record("low", 0, accuracy=0.1)
    for attempts in ([failure("low", 0), again], [record("low", 0), again], [again, failure("low", 0)]):
        [found], _ = splits_of(attempts)
        assert found.arms["low"].accuracy.value == pytest.approx(0.1, abs=0.03)
        assert found.group.failed == ()


@pytest.mark.parametrize(
    ["changes", "difference"],
    [
        ({"recipe": {"learning_rate": 3e-3, "batch_size": 32, "numerics": "float32"}}, "recipe.learning_rate=0.003"),
        ({"preprocessing": {"method": "bilinear", "antialias": False}}, "preprocessing.antialias=False"),
        ({"versions": {"jax": "1.1", "numpy": "2.0"}}, "versions.jax=1.1"),
        ({"weights": {"source": "other", "sha256": "0" * 64}}, "weights.source=other"),
        ({"device_name": "NVIDIA H200"}, "device_name=NVIDIA H200"),
    ],
)
def test_runs_that_differ_in_what_decides_are_never_mixed_and_say_in_what(changes, difference):
    splits, _ = splits_of([*records(2), *records(2, **changes)])
    assert len(splits) == 2
    assert [len(found.arms["low"].seeds) for found in splits] == [2, 2]
    assert splits[1].group.differs == (difference,)
    assert difference in report([*records(2), *records(2, **changes)]).replace("\n", "")


def test_models_and_datasets_are_groups_of_their_own_with_nothing_to_tell_apart():
    splits, _ = splits_of([*records(2), *records(2, model="vit_s16"), *records(2, dataset="digits")])
    assert [found.group.title for found in splits] == [
        "jax glyphs vit_ti16:depth=2,num_classes=10, 64 and 128 px",
        "jax glyphs vit_s16, 64 and 128 px",
        "jax digits vit_ti16:depth=2,num_classes=10, 64 and 128 px",
    ]


def test_other_test_examples_are_never_mixed():
    splits, _ = splits_of([*records(2, arms=("low",)), *records(2, arms=("high",), tested="u" * 64)])
    assert [[*found.arms] for found in splits] == [["low"], ["high"]]
    assert all("never mixed" in found.group.notes[0] for found in splits)
    assert [found.group.differs for found in splits] == [("test set=tttttttt",), ("test set=uuuuuuuu",)]


def test_older_methods_are_left_out_and_said():
    old = [each | {"method_version": 0} for each in records(1, accuracy=0.1)]
    splits, notes = splits_of([*old, *records(2)])
    assert notes == ["4 records are of an older method than 1 and left out: the numbers would not compare"]
    assert splits[0].arms["low"].accuracy.value > 0.5
    assert notes[0] in report([*old, *records(2)])


def test_a_seed_whose_arms_started_from_other_weights_is_left_out_and_said():
    some = [*records(3), *(record(arm, 3) for arm in ("low", "down_up", "patch"))]
    some.append(record("high", 3, weights={"source": "scratch", "sha256": "f" * 64}))
    found = only_split(some)
    assert found.gains["total"].seeds == (0, 1, 2)
    assert "seed 3 is left out of every comparison: its arms did not start from the same weights" in found.group.notes


def test_of_runs_that_differ_in_their_first_weights_alone_the_last_counts_and_it_is_said():
    some = [*records(2), record("low", 0, accuracy=0.3, weights={"source": "scratch", "sha256": "f" * 64})]
    found = only_split(some)
    assert found.group.runs["low"][0] is some[-1]
    assert "low, seed 0: there are runs from several first weights; the last one counts" in found.group.notes
    assert found.gains["total"].seeds == (1,)


def test_curves_of_equal_seeds_are_compared_step_by_step():
    pairs = curve_pairs([*records(2), *records(2, backend="torch", shift=1e-3)])
    assert len(pairs) == 8
    worst = pairs[0]
    assert (worst.num_steps, worst.loss.step, worst.first_loss) == (20, 19, 0)
    assert worst.loss.difference == pytest.approx(0.019)
    assert worst.loss.relative == pytest.approx(0.019 / (2.3 * 0.9**19 + 0.019))
    assert worst.gradient_norm.difference == pytest.approx(0.038)
    assert (worst.accuracy, worst.num_differing) == (0, 0)
    assert "1.9e-2" in report([*records(2), *records(2, backend="torch", shift=1e-3)])


def test_curves_are_compared_as_far_as_both_go():
    short = failure("low", 0, backend="torch") | {"curve": {"loss": [2.3, 2.0], "gradient_norm": [4.6, 4.0]}}
    [pair] = curve_pairs([record("low", 0), short])
    assert (pair.num_steps, pair.loss.step, pair.accuracy, pair.num_differing) == (2, 1, None, None)
    assert pair.loss.difference == pytest.approx(2.3 * 0.9 - 2.0)


@pytest.mark.parametrize(
    "changes", [{"recipe": {}}, {"dataset": "digits"}, {"weights": {"source": "a", "sha256": "b"}}]
)
def test_curves_of_other_runs_are_not_compared(changes):
    hashed = {"weights": {"source": "scratch", "sha256": "b"}}
    assert curve_pairs([record("low", 0), record("low", 0, backend="torch", **hashed)]) == []
    assert curve_pairs([record("low", 0), record("low", 0, backend="torch", **changes)]) == []
    assert curve_pairs([record("low", 0), record("low", 1, backend="torch")]) == []
    assert curve_pairs([record("low", 0), record("high", 0, backend="torch")]) == []


def test_a_gain_is_said_as_one_would_quote_it():
    [gain] = [gain for name, gain in only_split(records(3)).gains.items() if name == "capacity"]
    of = {"value": 0.031, "low": 0.019, "high": 0.043, "detectable": 0.016}
    assert gain_words(dataclasses.replace(gain, **of)) == "down_up gains 3.1 points [1.9, 4.3] over low: capacity"
    none = dataclasses.replace(gain, name="resolution", value=0.004, low=-0.006, high=0.014, detectable=0.0143)
    assert gain_words(none) == (
        "high gains 0.4 points [-0.6, 1.4] over down_up: no effect at this power (would have seen 1.4)"
    )
    lost = dataclasses.replace(gain, name="resolution", value=-0.021, low=-0.032, high=-0.01)
    assert gain_words(lost) == "high loses 2.1 points [1.0, 3.2] against down_up: resolution, for the worse"
    less = dataclasses.replace(gain, name="interaction", value=-0.021, low=-0.032, high=-0.01)
    assert gain_words(less).startswith(
        "resolution is worth 2.1 points [1.0, 3.2] less at high compute than at low: inter"
    )
    narrow = dataclasses.replace(gain, value=0.0002, low=-0.0004, high=0.0008, detectable=0.0009)
    assert gain_words(narrow).endswith("[-0.04, 0.08] over low: no effect at this power (would have seen 0.09)")
    alone = dataclasses.replace(gain, seeds=(0,), detectable=None)
    assert gain_words(alone).endswith("over low: not judged, of one seed")


def test_the_share_and_what_a_point_needs_are_said():
    found = only_split(records(5))
    assert share_words(found) == "Of the total, 49 % [41, 56] is capacity, the rest resolution."
    assert share_words(only_split(records(1))).endswith("is not known: there is no total to share: not judged.")
    assert needs_words(found.gains["resolution_at_low"]).endswith("seeds")
    assert needs_words(only_split(records(1)).gains["total"]) == "–"


@pytest.mark.parametrize("width", [200, 100, 60])
def test_the_report_shows_all_of_it_on_any_screen(width):
    words = " ".join(report([*records(3), *records(3, backend="torch")], width).split())
    for text in (
        "down_up gains",
        "62.1 [",
        "Trained as one arm",
        "3 x 1,000",
        "The same runs in JAX and torch",
        "64, 128",
    ):
        assert text in words


def test_a_model_without_patches_has_a_row_that_says_so():
    text = report(records(2, arms=("low", "down_up", "high"), model="resnet18"))
    assert "not defined: a CNN (resnet) has no patch" in text


def test_the_markdown_has_the_same_tables_and_the_same_bytes():
    some = [*records(3), *records(3, backend="torch"), failure("high", 7)]
    text = markdown_report(some)
    assert text == markdown_report(some)
    assert "| low | 64, 64 | 10.00 |" in text and "- high, seed 7: diverged: the loss" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 8 and text.startswith("**Resolution, or only compute?**")
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_the_overview_has_a_row_for_each_split_with_what_it_reached_and_gained():
    some = [*records(3), *records(2, arms=("low", "high"), model="resnet18"), *records(2, backend="torch")]
    first, torch, second = overview_table(splits_of(some)[0]).rows
    assert (torch["model"], torch["backend"]) == (first["model"], "torch") != (first["model"], first["backend"])
    both, gains = only_split(records(3)), only_split(records(3)).gains
    assert first["patch"] == f"{100 * both.arms['patch'].accuracy.value:.1f}"
    assert first["capacity"] == gain_amount(gains["capacity"]) and first["resolution"] == gain_amount(
        gains["resolution"]
    )
    assert (first["sizes"], first["n"]) == ("64, 128", f"3 x {NUM_EXAMPLES:,}")
    assert (second["model"], second["down_up"], second["capacity"]) == ("resnet18", "–", "–")


def test_intervals_cover_seeds_and_examples():
    """Seeds that agree on which examples are right leave only the examples, of which few differ, and the reverse."""
    right = {arm: np.arange(NUM_EXAMPLES) % 10 < of_ten for arm, of_ten in (("low", 6), ("down_up", 7), ("high", 8))}
    agreed = only_split([record(arm, seed, correct=right[arm]) for arm in right for seed in range(3)]).gains["capacity"]
    expected = 1.96 * np.sqrt(0.1 * 0.9 / NUM_EXAMPLES)
    assert (agreed.high - agreed.low) / 2 == pytest.approx(expected, rel=0.05)
    apart = {
        arm: [np.roll(right[arm], seed) | (np.arange(NUM_EXAMPLES) < 40 * seed) for seed in range(3)] for arm in right
    }
    wider = only_split([record(arm, seed, correct=apart[arm][seed]) for arm in right for seed in range(3)]).arms["low"]
    assert (wider.accuracy.high - wider.accuracy.low) / 2 > 2 * expected
