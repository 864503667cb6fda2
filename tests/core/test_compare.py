"""The comparison of two calls: what it says of sides that are known, with clocks that only the calls move."""

import contextlib
import dataclasses
import math
import sys
import types

import numpy as np
import pytest

import vitcmp
from vitcmp.compare import Comparison, compare, deciding_clock, summarise, wants_more
from vitcmp.stats import binomial_interval
from vitcmp.timing import Blocks, PairRule, PairTimes, time_pair

SPEC = "vit_ti16:depth=1,width=48,num_heads=3,mlp_dim=96,num_classes=10"
IMAGES = np.random.default_rng(0).uniform(-1, 1, (1, 32, 48, 3)).astype(np.float32)
SHORT = PairRule(warm_up_min_s=0.005, warm_up_max_s=0.2, block_s=0.001, min_s=0.02, max_s=0.5)


class FakeMachine:
    """Times a pair in a fake process: drift, outliers, neighbours that come and go, and what differs between processes.

    The second block in a row of one side is 4 % faster than the first, as it is on the machine of experiments/LOG.md.
    """

    def __init__(self, true_ratio, rng, *, between=0.005, within=0.03):
        self.now_s, self.rng, self.within, self.previous = 0.0, rng, within, ""
        drift, phase = rng.normal(0, 0.05), rng.uniform(0, 2)
        self.speed = lambda: (1 + drift * self.now_s) * (1.3 if (self.now_s + phase) % 2 < 0.4 else 1.0)
        self.length_s = {"o": 0.02 * true_ratio * math.exp(rng.normal(0, between)), "t": 0.02}

    def call(self, side):
        noise = self.speed() * math.exp(self.rng.normal(0, self.within)) * (5 if self.rng.random() < 0.02 else 1)
        self.now_s += self.length_s[side] * noise * (1.04 if side != self.previous else 1.0)
        self.previous = side

    def time(self, rule, process):
        calls = (lambda: self.call("o")), (lambda: self.call("t"))
        clock = {"clock": lambda: self.now_s, "cpu_clock": lambda: self.now_s}
        return time_pair(*calls, rule, ours_first=process % 2 == 0, **clock)


def compare_on_fake_machines(true_ratio, seed, **noise):
    rng, rule, processes = np.random.default_rng(seed), PairRule(), []
    while wants_more(processes, clock="wall_s", rule=rule):
        processes.append(FakeMachine(true_ratio, rng, **noise).time(rule, len(processes)))
    return summarise(processes, clock="wall_s", rule=rule)


def times_of(*ratios):
    """Returns the times of one process with rounds of these ratios."""
    ours, theirs = [[ratio] for ratio in np.repeat(ratios, 2)], [[1.0]] * (2 * len(ratios))
    return PairTimes(Blocks(ours, None), Blocks(theirs, None), ours_first=True, is_warm=True, converged=True)


# The protocol


@pytest.mark.slow
def test_of_100_comparisons_of_equal_sides_at_most_5_are_called_faster_or_slower():
    verdicts = [compare_on_fake_machines(1.0, seed).verdict for seed in range(100)]
    assert sum(verdict in ("faster", "slower") for verdict in verdicts) <= 5
    assert verdicts.count("same") >= 95


@pytest.mark.slow
def test_of_100_slow_downs_of_5_percent_at_least_95_are_found():
    results = [compare_on_fake_machines(1.05, seed) for seed in range(100)]
    num_found = sum(result.verdict == "slower" for result in results)
    assert num_found >= 95
    assert binomial_interval(num_found, 100)[1] > 0.95
    assert sum(result.low <= 1.05 <= result.high for result in results) >= 93
    assert np.mean([result.num_processes for result in results]) < 5


def test_where_one_process_in_five_is_slow_on_one_side_a_slow_down_is_still_found_more_often_than_not():
    def result(seed):
        rng, rule, processes = np.random.default_rng(seed), PairRule(), []
        while wants_more(processes, clock="wall_s", rule=rule):
            lucky = math.exp(0.14 * (int(rng.random() < 0.1) - int(rng.random() < 0.1)))
            processes.append(FakeMachine(1.05 * lucky, rng).time(rule, len(processes)))
        return summarise(processes, clock="wall_s", rule=rule)

    verdicts = [result(seed).verdict for seed in range(50)]
    assert verdicts.count("slower") >= 35
    assert "faster" not in verdicts


def test_a_comparison_gets_three_processes_and_more_only_while_it_is_ambiguous():
    rule = PairRule()
    clear, unclear = times_of(*[1.2] * 6), times_of(*[1.03] * 6)
    wants = {"clock": "wall_s", "rule": rule}
    assert [wants_more([clear] * n, **wants) for n in range(5)] == [True, True, True, False, False]
    others = [times_of(*[1.03 + 0.01 * (-1) ** n] * 6) for n in range(12)]
    assert [wants_more(others[:n], **wants) for n in (3, 11, 12)] == [True, True, False]
    assert wants_more([unclear] * 3, **wants) is False  # rounds and processes agree: it is the same, on the edge


@pytest.mark.parametrize(
    ["ratios", "word", "is_ruled_out"],
    [
        ((0.8, 0.81), "faster", True),
        ((1.0, 1.01), "same", True),
        ((0.94, 0.99), "ambiguous", True),
        ((1.0, 1.08), "ambiguous", False),
        ((1.2, 1.21), "slower", False),
    ],
)
def test_slower_is_ruled_out_where_the_interval_ends_within_the_band(ratios, word, is_ruled_out):
    result = summarise([times_of(*ratios * 6)], clock="wall_s", rule=PairRule())
    assert (result.verdict, result.rules_out_slower) == (word, is_ruled_out)


def test_too_few_rounds_rule_nothing_out():
    assert summarise([times_of(0.5)], clock="wall_s", rule=PairRule()).rules_out_slower is False


def test_a_comparison_that_takes_too_long_ends_with_the_second_process():
    rule = PairRule(max_comparison_s=100.0)
    times = times_of(1.0)
    wants = [wants_more([times] * n, clock="wall_s", rule=rule, spent_s=120.0) for n in range(4)]
    assert wants == [True, True, False, False]


def test_a_comparison_of_one_process_has_one_however_long_it_took():
    rule = PairRule(min_processes=1, max_processes=1, max_comparison_s=100.0)
    wants = [wants_more([times_of(1.0)] * n, clock="wall_s", rule=rule, spent_s=120.0) for n in range(3)]
    assert wants == [True, False, False]


@pytest.mark.parametrize(
    ["platform", "num_cpus", "clock"],
    [("cpu", 1, "cpu_s"), ("cpu", 2, "wall_s"), ("gpu", 1, "wall_s"), ("unknown", 1, "wall_s")],
)
def test_cpu_time_decides_only_where_one_cpu_does_all_the_work(platform, num_cpus, clock):
    assert deciding_clock(platform, num_cpus) == clock


def test_fewer_rounds_than_make_an_interval_decide_nothing_in_one_process():
    few, enough = (summarise([times_of(*[1.2] * n)], clock="wall_s", rule=PairRule()) for n in (5, 6))
    assert (few.verdict, enough.verdict) == ("ambiguous", "slower")
    assert "too few rounds" in str(few)


def test_both_clocks_are_reported_and_the_one_that_is_asked_for_decides():
    rng = np.random.default_rng(0)
    machine = FakeMachine(1.0, rng)
    calls = (lambda: machine.call("o")), (lambda: machine.call("t"))
    work = {"o": 0.0}

    def cpu_clock():
        work["o"] += 1.0
        return work["o"]

    times = time_pair(*calls, PairRule(), uses="cpu_s", clock=lambda: machine.now_s, cpu_clock=cpu_clock)
    result = summarise([times], clock="cpu_s", rule=PairRule())
    assert (result.ratio, result.clock) == (1.0, "cpu_s")
    assert result.other_ratio == pytest.approx(summarise([times], clock="wall_s", rule=PairRule()).ratio)
    assert result.other_ratio != 1.0


# For users' code


class FakeStep:
    """What `vitcmp.make_step` returns, as far as `compare` knows it."""

    platform = "cpu"

    def __init__(self, output, *, numerics="float32", bound=1e-5, num_loops=300):
        self.output, self.numerics, self.bound, self.num_loops = np.array(output), numerics, bound, num_loops
        self.is_open, self.calls = False, []

    def __call__(self):
        self.calls.append(self.is_open)
        sum(range(self.num_loops))

    def result(self):
        return self.output

    @contextlib.contextmanager
    def settings(self):
        self.is_open = True
        yield {}
        self.is_open = False


def theirs(output=(1.0, 2.0), num_loops=300):
    def call():
        sum(range(num_loops))
        return np.array(output)

    return call


def test_a_side_with_a_third_of_the_work_is_faster_and_one_process_is_said_to_be_one():
    result = compare(FakeStep([1.0, 2.0], num_loops=1000), theirs(num_loops=10_000), rule=SHORT)
    assert result.verdict == "faster"
    assert result.low <= result.ratio <= result.high < 0.5
    assert (result.num_processes, result.output_error, result.output_bound) == (1, 0.0, 1e-5)
    words = str(result)
    assert words.startswith("faster: ours / theirs = 0.")
    assert "1 process (what differs between processes is outside the interval)" in words
    assert "within the bound of 1e-05" in words


def test_times_of_different_outputs_are_refused_with_error_and_bound_unless_that_is_wanted():
    ours = FakeStep([1.0, 2.0])
    with pytest.raises(ValueError, match=r"differ by 0\.0005 of the largest value, the bound is 1e-05"):
        compare(ours, theirs((1.0, 2.001)), rule=SHORT)
    assert ours.calls == []
    result = compare(ours, theirs((1.0, 2.001)), allow_different=True, rule=SHORT)
    assert "BEYOND the bound" in str(result)
    assert compare(ours, theirs((1.0, 2.001)), bound=1e-3, rule=SHORT).output_bound == 1e-3


@pytest.mark.parametrize(
    ["output", "words"],
    [
        (np.ones(3), r"shapes are \(2,\) and \(3,\)"),
        (np.ones((2, 1)), r"shapes are \(2,\) and \(2, 1\)"),
        (np.array([1.0, math.nan]), "not finite"),
        (None, "theirs returns NoneType, expected one array"),
        ({"logits": 1.0}, "theirs returns dict"),
        ([], "theirs returns list"),
        ("logits", "theirs returns str"),
    ],
)
def test_what_is_no_output_to_compare_is_named(output, words):
    with pytest.raises(ValueError, match=words):
        compare(FakeStep([1.0, 2.0]), lambda: output, rule=SHORT)


def test_the_numerics_of_the_step_are_in_force_for_both_sides_and_no_longer_after():
    ours, seen = FakeStep([1.0, 2.0]), []

    def call():
        seen.append(ours.is_open)
        return theirs()()

    compare(ours, call, rule=SHORT)
    assert all(seen) and all(ours.calls) and seen and ours.calls
    assert not ours.is_open


def test_steps_of_different_numerics_are_not_compared():
    with pytest.raises(ValueError, match="numerics float32 and bfloat16"):
        compare(FakeStep([1.0]), FakeStep([1.0], numerics="bfloat16"), rule=SHORT)


def test_two_calls_that_are_no_steps_need_a_bound():
    with pytest.raises(ValueError, match="bound=None"):
        compare(theirs(), theirs(), rule=SHORT)
    assert compare(theirs(), theirs(), bound=0.0, rule=SHORT).clock == "wall_s"


def test_an_unknown_clock_is_refused():
    with pytest.raises(ValueError, match="clock='wall' must be one of wall_s, cpu_s"):
        compare(theirs(), theirs(), bound=0.0, clock="wall", rule=SHORT)


def test_a_call_ends_when_the_device_is_idle_as_its_output_says(monkeypatch):
    waits = []

    class JaxLike(np.ndarray):
        def block_until_ready(self):
            waits.append("jax")

    class CudaLike:
        is_cuda, device = True, "cuda:1"

        def detach(self):
            return self

        cpu = detach

        def double(self):
            return np.ones(2)

    def call(output):
        sum(range(300))
        return output

    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(synchronize=waits.append))
    monkeypatch.setitem(sys.modules, "torch", torch)
    result = compare(lambda: call(CudaLike()), lambda: call(np.ones(2).view(JaxLike)), bound=0.0, rule=SHORT)
    num_timed = sum(result.num_values)
    assert set(waits) == {"jax", "cuda:1"}
    assert len(waits) >= num_timed + 4  # the warm-up too
    assert min(waits.count("jax"), waits.count("cuda:1")) >= 24


def test_a_busy_machine_is_mentioned():
    result = Comparison(
        ratio=1.0,
        low=0.9,
        high=1.1,
        verdict="ambiguous",
        clock="wall_s",
        other_ratio=None,
        num_processes=3,
        num_values=(9, 9),
        confidence=0.95,
        same_within=0.03,
        others_cpu_share=0.4,
    )
    assert "3 processes, 9 and 9 calls\nothers used 40% of the CPUs" in str(result)
    assert "others" not in str(dataclasses.replace(result, others_cpu_share=0.01))


# Steps of ours


def make_step(backend, **options):
    pytest.importorskip(backend)
    return vitcmp.make_step(backend, SPEC, vitcmp.init_weights(SPEC), IMAGES, device="cpu", **options)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_step_gives_the_logits_of_forward(backend):
    step = make_step(backend, attention="xla" if backend == "jax" else "flash")
    expected = vitcmp.forward(backend, SPEC, vitcmp.init_weights(SPEC), IMAGES, device="cpu")["logits"]
    np.testing.assert_allclose(step.result(), expected, rtol=0, atol=step.bound * np.abs(expected).max())
    assert step() is None


def test_the_two_frameworks_are_compared_in_one_process():
    result = vitcmp.compare(make_step("jax"), make_step("torch"), rule=SHORT)
    assert 0 < result.output_error < result.output_bound


def test_a_torch_model_that_needs_gradients_and_is_bfloat16_can_be_compared():
    torch = pytest.importorskip("torch")
    step = make_step("torch")
    logits = torch.tensor(step.result(), requires_grad=True)
    assert vitcmp.compare(step, lambda: logits + 0, rule=SHORT).output_error == 0.0
    with pytest.raises(ValueError, match="differ by"):
        vitcmp.compare(step, lambda: logits.bfloat16(), rule=SHORT)


def test_the_precision_of_torch_is_the_steps_while_it_is_compared_and_what_it_was_after():
    torch = pytest.importorskip("torch")
    step, seen = make_step("torch"), []
    kept = torch.get_float32_matmul_precision()
    logits = torch.tensor(step.result())

    def call():
        seen.append(torch.get_float32_matmul_precision())
        return logits + 0

    torch.set_float32_matmul_precision("high")
    try:
        vitcmp.compare(step, call, rule=SHORT)
        assert "high" not in seen
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(kept)


@pytest.mark.parametrize(
    ["options", "words"],
    [
        ({"compile": "defalt"}, "did you mean 'default'"),
        ({"layout": "nhwc"}, "unknown layout 'nhwc'"),
        ({"attention": "xla"}, "unknown attention 'xla'"),
        ({"numerics": "fp32"}, "unknown numerics 'fp32'"),
    ],
)
def test_a_steps_wrong_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        make_step("torch", **options)
