"""JAX against torch as a table: which ratios are given, which are refused, and what is said of each."""

import re

import pytest

from tests.core.fake_records import GPU, record
from tests.core.shown import show, words
from vitcmp.report.comparison import comparison_table


@pytest.mark.parametrize(
    ["torch_ms", "said"],
    [
        (13.2, r"JAX 1\.32x faster +\[1\.3\d, 1\.3\d\]"),
        (8.0, r"torch 1\.25x faster +\[1\.2\d, 1\.2\d\]"),
        (10.05, r"same, 1\.0[01]x +\[\d\.\d+, 1\.0\d\]"),
        (10.3, r"ambiguous, 1\.03x +\[1\.0\d, 1\.0\d\]"),
    ],
)
def test_the_ratio_of_torch_over_jax_is_said_in_words_with_its_interval(torch_ms, said):
    text = show(comparison_table([record("jax", 10.0), record("torch", torch_ms)]))
    assert re.search(said, text)
    assert "equal" in text and "refused" not in text


def test_the_interval_said_holds_the_ratio_said():
    text = show(comparison_table([record("jax", 10.0), record("torch", 5.0)]))
    value, low, high = (float(x) for x in re.search(r"torch (\S+)x faster +\[(\S+), (\S+)\]", text).groups())
    assert low <= value <= high


def test_the_best_settings_of_each_side_are_compared():
    records = [
        record("jax", 10.0),
        record("torch", 20.0),
        record("torch", 15.0, attention="math"),
        record("jax", 40.0, compile="x"),
    ]
    text = show(comparison_table(records))
    assert "JAX 1.50x faster" in text and "xla jit nhwc" in text and "math eager nchw" in text


def test_a_ratio_is_refused_where_outputs_differ_and_the_error_stands_beside_its_bound():
    text = show(comparison_table([record("jax"), record("torch", 20.0, shift=0.05)]))
    assert re.search(r"refused: outputs differ \(\d\.\de-2 > 3\.\de-6\)", text)
    assert "differs" in text and "faster:" in text and "x faster" not in text
    assert "Outputs differ from" not in text


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_a_ratio_is_refused_where_outputs_are_missing(side):
    records = [record("jax"), record("torch", 20.0)]
    records[side == "torch"]["outputs"] = None
    text = show(comparison_table(records))
    assert f"refused: no parity (no outputs of {side})" in text and "not proved" in text
    assert "x faster" not in text


def test_every_run_must_be_proved_equal():
    records = [record(side, run=run, shift=0.1 * (run == 2)) for side in ("jax", "torch") for run in range(3)]
    assert "refused: outputs differ" in show(comparison_table(records))


def test_different_numerics_are_never_compared_as_one_point():
    records = [record("jax", numerics="bfloat16"), record("torch")]
    text = show(comparison_table(records))
    assert "refused: nothing proves jax bfloat16 xla jit and torch float32 flash eager" in text
    assert "x faster" not in text


def test_the_best_of_any_numerics_are_compared_where_each_is_proved_at_its_own():
    records = [
        record("jax", 5.0, numerics="bfloat16"),
        record("torch", 12.0, numerics="bfloat16"),
        record("jax", 11.0),
        record("torch", 10.0),
    ]
    text = show(comparison_table(records), 300)
    [row] = [line for line in text.splitlines() if "best of any" in line]
    assert "JAX 2.00x faster" in row and "bfloat16 xla jit" in row and "float32 flash eager" in row
    records[1]["outputs"] = None
    assert "refused: nothing proves jax bfloat16" in show(comparison_table(records))


def test_one_best_of_any_is_not_repeated():
    records = [
        record(side, ms, numerics=numerics)
        for side in ("jax", "torch")
        for numerics, ms in (("float32", 9), ("bfloat16", 5))
    ]
    assert "best of any" not in show(comparison_table(records))


def test_other_settings_whose_outputs_differ_are_named():
    records = [record("jax"), record("torch"), record("torch", 30.0, attention="math", shift=0.05)]
    text = words(show(comparison_table(records)))
    assert "Outputs differ from the best JAX setting's: torch vit_ti16 float32 math eager nchw, 224 px, 1 (" in text
    assert "Outputs differ" not in show(comparison_table(records[:2]))


def test_cpu_time_is_compared_on_a_cpu_and_only_there():
    assert "CPU time" in show(comparison_table([record("jax"), record("torch", 13.2)]))
    on_gpu = [record("jax", **GPU), record("torch", **GPU)]
    for one in on_gpu:
        one["latency"]["cpu_s"] = one["latency"]["wall_s"]
    assert "CPU time" not in show(comparison_table(on_gpu))
    unknown = record("torch", 13.2)
    unknown["latency"]["cpu_s"] = None
    text = show(comparison_table([record("jax"), unknown]))
    assert "CPU time" not in text and "JAX 1.32x faster" in text


def test_sides_that_did_not_take_turns_are_called_indicative():
    apart = words(show(comparison_table([record("jax"), record("torch", at_s=610)])))
    assert "Not interleaved in 1 of 1 row: the sides ran up to 10 min apart" in apart and "indicative" in apart
    assert "Runs (fresh processes) a side: 1. With one, what differs between processes is outside" in apart
    turns = [
        record(side, run=run, at_s=100 * run + 50 * (side == "torch")) for side in ("jax", "torch") for run in range(4)
    ]
    text = words(show(comparison_table(turns)))
    assert "interleaved" not in text and "With one" not in text and "a side: 4." in text


def test_a_train_step_says_what_its_parity_is_worth():
    text = words(show(comparison_table([record("jax", mode="train"), record("torch", mode="train")])))
    assert "Of a train step also its first loss; gradients are compared in the tests only." in text


def test_points_of_one_framework_are_counted_and_what_keeps_them_apart_is_named():
    text = words(show(comparison_table([record("jax"), record("torch", num_threads=1)])))
    assert text == "2 points measured in one framework only, so not compared. They differ in: num_threads 1 and 2."
    assert show(comparison_table([record("jax")])).strip() == ""
