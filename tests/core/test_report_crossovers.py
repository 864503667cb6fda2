"""Crossovers: the interval of the size at which one model overtakes another, against the exact one."""

import math

import numpy as np
import pytest

from tests.core.fake_records import record
from vitcmp.report.crossovers import Crossing, Point, crossings, crossings_of
from vitcmp.report.payload import make_payload
from vitcmp.report.summary import settings_of
from vitcmp.stats import Estimate

SIZES = (128, 256, 512, 1024)


def point(size_px, value, half=0.01):
    """A ratio a / b with its interval, `half` of it to either side on a logarithmic scale."""
    estimate = Estimate(value, value * math.exp(-half), value * math.exp(half), 0.95, (1, 1), (30, 30))
    return Point.of(size_px, estimate)


def power_law(px, *, at, exponent=1.0, half=0.01):
    """The points of a ratio that falls as a power of the size, and is 1 at `at`: linear on logarithms."""
    return [point(size, (at / size) ** exponent, half) for size in px]


def test_a_power_laws_crossing_is_found_where_it_is_with_the_intervals_width():
    [crossing] = crossings("a", "b", power_law(SIZES, at=400, exponent=0.5, half=0.02))
    assert (crossing.a, crossing.b, crossing.status) == ("a", "b", "crosses")
    # the low end of the ratio, value x exp(-0.02), is 1 where (400 / px)^0.5 = exp(0.02)
    assert crossing.low_px == pytest.approx(400 * math.exp(-0.04))
    assert crossing.high_px == pytest.approx(400 * math.exp(0.04))


def test_the_overtaker_is_the_faster_one_above_whichever_comes_first():
    rising = [point(size, (size / 400) ** 0.5) for size in SIZES]
    [crossing] = crossings("a", "b", rising)
    assert (crossing.a, crossing.b) == ("b", "a")
    [other] = crossings("b", "a", [p.inverted() for p in rising])
    assert (other.a, other.low_px, other.high_px) == ("b", pytest.approx(crossing.low_px), crossing.high_px)


def test_sizes_in_doubt_widen_the_interval():
    values = {128: 1.5, 256: 1.01, 512: 0.99, 1024: 0.6}
    [crossing] = crossings("a", "b", [point(size, value, half=0.05) for size, value in values.items()])
    assert 128 < crossing.low_px < 256 and 512 < crossing.high_px < 1024


@pytest.mark.parametrize(
    ["values", "status"],
    [
        ((0.5, 0.6, 0.9), "a faster throughout"),
        ((1.5, 1.6, 1.1), "b faster throughout"),
        ((0.5, 0.6, 1.0), "not separable"),
        ((1.0, 1.01, 1.0), "not separable"),
        ((1.02, 0.99, 0.98), "not separable"),  # beyond 1 by its interval, and within the 3 % that count as the same
        ((0.5,), "too few sizes"),
        ((), "too few sizes"),
    ],
)
def test_every_other_answer_is_an_answer(values, status):
    points = [point(size, value) for size, value in zip(SIZES, values, strict=False)]
    assert list(crossings("a", "b", points)) == [Crossing("a", "b", status)]


def test_wide_intervals_prove_no_crossing():
    assert [c.status for c in crossings("a", "b", power_law(SIZES, at=400, exponent=0.1, half=0.3))] == [
        "not separable"
    ]


def test_two_crossings_are_two():
    found = list(crossings("a", "b", [point(s, v) for s, v in zip(SIZES, (0.7, 1.4, 1.3, 0.8), strict=True)]))
    assert [(c.a, c.b) for c in found] == [("b", "a"), ("a", "b")]
    assert 128 < found[0].low_px < found[0].high_px < 256 and 512 < found[1].low_px < found[1].high_px < 1024


def test_the_interval_holds_the_crossing_of_noisy_curves():
    """Of 400 pairs of power laws, each ratio with normal noise and its own 95 % interval, few are missed."""
    rng, num_held, num_found = np.random.default_rng(0), 0, 0
    for _ in range(400):
        at, noise = math.exp(rng.uniform(math.log(200), math.log(600))), 0.02
        points = [
            point(size, (at / size) ** 0.4 * math.exp(noise * rng.standard_normal()), 1.96 * noise) for size in SIZES
        ]
        for crossing in crossings("a", "b", points):
            num_found += 1
            num_held += crossing.status == "crosses" and crossing.low_px <= at <= crossing.high_px
    assert num_found >= 400 and num_held / 400 >= 0.93


def curve(backend, model, times, **case):
    return [record(backend, ms, model=model, image_size=str(size), **case) for size, ms in times.items()]


def test_the_best_settings_are_compared_and_each_backends_apart():
    records = [
        *curve("jax", "vit_ti16", {128: 4, 256: 20, 512: 100}),
        *curve("torch", "vit_ti16", {128: 9, 256: 10, 512: 90}),
        *curve("torch", "vit_ti16", {128: 50, 256: 50, 512: 50}, attention="math"),
        *curve("jax", "resnet50", {128: 8, 256: 16, 512: 32}),
        *curve("torch", "resnet50", {128: 8, 256: 16, 512: 32}),
    ]
    found = {backend: (c.a, c.b, c.status) for _, backend, c in crossings_of(settings_of(records))}
    overtakes = ("resnet50", "vit_ti16", "crosses")
    assert found["jax"] == overtakes and found["best"] == overtakes and len(found) == 3
    assert [c.status for _, backend, c in crossings_of(settings_of(records)) if backend == "torch"] == ["crosses"] * 2
    [jax] = [c for _, backend, c in crossings_of(settings_of(records)) if backend == "jax"]
    # 4 / 8 at 128 px and 20 / 16 at 256 px: log 2 of the way down to 1, of log 2.5 in all
    exact = 128 * 2 ** (math.log(2) / math.log(2.5))
    assert jax.low_px < exact < jax.high_px and jax.high_px / jax.low_px < 1.02


def test_groups_are_apart_and_sizes_are_the_sides_of_squares():
    records = [
        *(record("jax", 4, model="vit_ti16", image_size=s) for s in ("96x150", "200x288")),
        *(record("jax", ms, model="resnet50", image_size=s) for s, ms in (("96x150", 2), ("200x288", 8))),
        *curve("jax", "resnet50", {224: 5, 448: 9}, batch_size=8),
        *curve("jax", "vit_ti16", {224: 5}, batch_size=8),
    ]
    rows = make_payload(records)["crossovers"]
    larger = [rows.pop(), rows.pop()]
    assert {(row["batch_size"], row["status"]) for row in larger} == {(8, "too few sizes")}
    assert {(row["batch_size"], row["backend"], row["metric"]) for row in rows} == {
        (1, "best", "latency"),
        (1, "jax", "latency"),
    }
    assert all(165 < row["low_px"] < row["high_px"] < 175 and row["a"] == "vit_ti16" for row in rows)


def test_models_without_a_common_size_are_too_few_sizes():
    records = [*curve("jax", "vit_ti16", {128: 4, 256: 20}), *curve("jax", "resnet50", {96: 8, 512: 16})]
    assert {c.status for _, _, c in crossings_of(settings_of(records))} == {"too few sizes"}
