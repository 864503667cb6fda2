"""The timing loop, with clocks that only the calls move: no test waits, and none asserts about wall time."""

import itertools
import math
import statistics

import numpy as np
import pytest

from vitcmp import timing
from vitcmp.stats import median, round_ratios
from vitcmp.timing import (
    MAX_QUEUE_CALLS,
    PairRule,
    Rule,
    TimingError,
    calls_per_sample,
    sample,
    sample_throughput,
    time_pair,
    warm_up,
)

RULE = Rule()


class FakeHost:
    """A host whose calls take the given durations, and of which `busy` is the share that the CPU works."""

    def __init__(self, durations_s, busy=0.5):
        self.durations_s, self.busy = iter(durations_s), busy
        self.now_s, self.num_calls = 1e5, 0

    def clock(self):
        return self.now_s

    def cpu_clock(self):
        return self.now_s * self.busy

    def call(self):
        self.num_calls += 1
        self.now_s += next(self.durations_s)

    def queue(self, num_calls):
        for _ in range(num_calls):
            self.call()

    def warm_up(self, rule=RULE):
        return warm_up(self.call, rule, clock=self.clock)

    def sample(self, rule=RULE):
        return sample(self.call, rule, clock=self.clock, cpu_clock=self.cpu_clock)


class FakePair:
    """A host with two calls, `o` and `t`; `slow_down(side, i, now_s)` is what the i-th call takes times its length."""

    def __init__(self, ours_s, theirs_s, slow_down=lambda side, i, now_s: 1.0, busy=0.5):
        self.lengths_s, self.slow_down, self.busy = {"o": ours_s, "t": theirs_s}, slow_down, busy
        self.now_s, self.order = 1e5, ""

    def call(self, side):
        self.now_s += self.lengths_s[side] * self.slow_down(side, len(self.order), self.now_s - 1e5)
        self.order += side

    def time(self, rule=None, **options):
        return time_pair(
            lambda: self.call("o"),
            lambda: self.call("t"),
            rule or PairRule(),
            clock=lambda: self.now_s,
            cpu_clock=lambda: self.now_s * self.busy,
            **options,
        )

    def ratio(self, **options):
        times = self.time(**options)
        return median(round_ratios(times.ours.wall_s, times.theirs.wall_s))


def noisy(median_s, spread, seed=0):
    rng = np.random.default_rng(seed)
    while True:
        yield median_s * math.exp(spread * rng.standard_normal())


def test_warm_up_of_steady_calls_ends_after_the_least_time_and_keeps_every_call():
    host = FakeHost(itertools.repeat(0.01))
    warmup = host.warm_up()
    assert warmup.stable
    assert warmup.wall_s == [0.01] * host.num_calls
    assert 0.3 <= sum(warmup.wall_s) < 0.33


def test_warm_up_makes_three_calls_however_long_they_are():
    host = FakeHost(itertools.repeat(7.0))
    assert host.warm_up() == ([7.0] * 3, True)


def test_warm_up_goes_on_while_the_calls_get_faster():
    ramp = [0.02 * 0.98**i for i in range(100)]
    host = FakeHost(itertools.chain(ramp, itertools.repeat(ramp[-1])))
    warmup = host.warm_up()
    assert warmup.stable
    assert len(warmup.wall_s) > 100  # settled only after the ramp had left the window ...
    assert sum(warmup.wall_s) < 1.5 * sum(ramp)  # ... which forgets it at the speed at which it grows
    assert statistics.median(warmup.wall_s[len(warmup.wall_s) // 2 :]) == pytest.approx(ramp[-1], rel=0.05)


def test_warm_up_is_not_stable_when_it_reaches_the_cap():
    host = FakeHost(0.1 * 1.1**i for i in itertools.count())
    warmup = host.warm_up()
    assert not warmup.stable
    assert 10 <= sum(warmup.wall_s) < 12


def test_one_outlier_does_not_unsettle_a_warm_up():
    host = FakeHost(itertools.chain([0.01] * 20, [0.1], itertools.repeat(0.01)))
    warmup = host.warm_up()
    assert warmup.stable
    assert sum(warmup.wall_s) < 0.4


def test_sampling_of_steady_calls_takes_a_second_and_thirty_samples_at_least():
    fast, slow = FakeHost(itertools.repeat(0.004)), FakeHost(itertools.repeat(0.1))
    assert len(fast.sample().wall_s) == pytest.approx(250, abs=1)  # the second counts
    assert len(slow.sample().wall_s) == 30  # the thirty samples count
    assert slow.sample().converged


@pytest.mark.parametrize("spread", [0.01, 0.03, 0.05])
def test_sampling_ends_once_the_interval_of_the_median_is_within_one_percent(spread):
    host = FakeHost(noisy(0.02, spread))
    samples = host.sample()
    assert samples.converged
    assert len(samples.wall_s) == host.num_calls  # every one is kept
    assert statistics.median(samples.wall_s) == pytest.approx(0.02, rel=0.01)


def test_more_noise_takes_more_samples():
    counts = [len(FakeHost(noisy(0.04, spread)).sample().wall_s) for spread in (0.01, 0.04, 0.08)]
    assert counts == sorted(counts)
    assert counts[0] == 30 < counts[2]


def test_the_sample_cap_ends_noisy_sampling_unconverged():
    samples = FakeHost(noisy(0.01, 0.8)).sample()
    assert len(samples.wall_s) == 500
    assert not samples.converged


def test_the_time_cap_ends_noisy_sampling_unconverged():
    samples = FakeHost(noisy(0.2, 0.8)).sample()
    assert not samples.converged
    assert 30 < len(samples.wall_s) < 200
    assert 20 <= sum(samples.wall_s) < 25


@pytest.mark.parametrize(("call_s", "num_samples"), [(0.5, 30), (0.7, 29), (2.0, 10), (6.0, 4), (9.0, 3), (60.0, 3)])
def test_calls_too_long_for_thirty_samples_end_at_the_time_cap_with_three_at_least(call_s, num_samples):
    samples = FakeHost(itertools.repeat(call_s)).sample()
    assert len(samples.wall_s) == num_samples
    assert samples.converged == (num_samples >= 30)


def test_the_least_second_holds_for_calls_so_short_that_it_passes_the_sample_cap():
    samples = FakeHost(itertools.repeat(1e-3)).sample()
    assert len(samples.wall_s) == pytest.approx(1000, abs=1)
    assert samples.converged


def test_an_outlier_is_kept_and_does_not_move_the_median():
    host = FakeHost(itertools.chain([0.1] * 10, [3.0], itertools.repeat(0.1)))
    samples = host.sample()
    assert samples.converged
    assert max(samples.wall_s) == 3.0
    assert statistics.median(samples.wall_s) == pytest.approx(0.1)


def test_drift_is_not_called_converged_when_the_interval_is_wide():
    samples = FakeHost(0.1 * 1.01**i for i in itertools.count()).sample()
    assert not samples.converged


def test_looks_are_few_so_that_a_lucky_one_does_not_end_sampling(monkeypatch):
    looks = []
    monkeypatch.setattr(timing, "median_interval", lambda values: looks.append(len(values)) or (0.0, 1.0))
    FakeHost(itertools.repeat(0.04)).sample()
    assert looks[:3] == [30, 36, 44]
    assert looks[-1] == 500
    assert len(looks) < 20


def test_a_converged_median_is_within_one_percent_at_least_95_times_in_100():
    runs = [FakeHost(noisy(0.04, 0.04, seed)).sample() for seed in range(200)]
    assert all(run.converged for run in runs)
    misses = [abs(statistics.median(run.wall_s) / 0.04 - 1) > 0.01 for run in runs]
    assert sum(misses) <= 10


def test_cpu_seconds_stand_beside_wall_seconds():
    samples = FakeHost(itertools.repeat(0.1), busy=1.5).sample()
    assert samples.cpu_s == pytest.approx([0.15] * 30)


def test_cpu_seconds_are_unknown_and_not_zero_where_their_clock_stands_still():
    assert FakeHost(itertools.repeat(0.1), busy=0.0).sample().cpu_s is None


@pytest.mark.parametrize("duration_s", [0.0, -0.1, 1e-10])
def test_a_duration_that_the_clock_cannot_tell_from_zero_is_refused(duration_s):
    durations_s = [0.1, duration_s, *[0.1] * 40]
    with pytest.raises(TimingError, match="too short"):
        FakeHost(durations_s).sample()
    with pytest.raises(TimingError, match="too short"):
        FakeHost(durations_s).warm_up()


def test_an_error_in_a_call_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        sample(lambda: 1 / 0, RULE)


@pytest.mark.parametrize(
    ("latency_s", "num_calls"),
    [(1e-6, MAX_QUEUE_CALLS), (1e-3, 50), (0.011, 5), (0.05, 4), (0.08, 4), (0.16, 2), (0.2, 1), (30.0, 1)],
)
def test_calls_are_queued_for_50_to_100_ms_and_at_least_four_of_them_where_the_cap_allows(latency_s, num_calls):
    assert calls_per_sample(latency_s, RULE) == num_calls


def test_thirty_throughput_samples_fit_in_half_of_any_cap():
    for max_s, latency_s in itertools.product((2.0, 5.0, 20.0), (1e-3, 0.01, 0.05, 0.3)):
        sample_s = latency_s * calls_per_sample(latency_s, Rule(max_s=max_s))
        assert sample_s <= max(max_s / 60, 0.05 + latency_s, latency_s)


@pytest.mark.parametrize("latency_s", [0.0, -1.0, math.nan])
def test_a_latency_that_is_not_positive_is_a_callers_mistake(latency_s):
    with pytest.raises(ValueError, match="latency_s"):
        calls_per_sample(latency_s, RULE)


def test_throughput_times_queues_of_calls_by_the_same_rule():
    host = FakeHost(itertools.repeat(0.01))
    throughput = sample_throughput(host.queue, RULE, latency_s=0.01, clock=host.clock, cpu_clock=host.cpu_clock)
    assert throughput.calls_per_sample == 5
    assert throughput.converged
    assert throughput.wall_s == pytest.approx([0.05] * 30)
    assert throughput.cpu_s == pytest.approx([0.025] * 30)
    assert host.num_calls == 150


def test_every_field_of_a_rule_is_checked_and_all_faults_come_in_one_message():
    with pytest.raises(ValueError, match=r"min_s=0, max_s=-1.*positive"):
        Rule(min_s=0, max_s=-1)
    with pytest.raises(ValueError, match="needs 6"):
        Rule(min_samples=5)


def test_the_real_clocks_serve():
    samples = sample(lambda: sum(range(1000)), Rule(min_s=0.001, max_s=0.2, min_samples=6, max_samples=20))
    assert min(samples.wall_s) > 0
    assert samples.cpu_s is None or len(samples.cpu_s) == len(samples.wall_s)


def test_the_sides_of_a_pair_alternate_so_that_each_is_as_often_first():
    host = FakePair(0.1, 0.1)
    times = host.time()
    order = host.order[-len(times.ours.wall_s) * 2 :]
    assert order == "otto" * 12
    host = FakePair(0.1, 0.1)
    assert host.time(ours_first=False) == times._replace(ours_first=False)
    assert host.order.endswith("toot" * 12)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("true_ratio", [1.0, 1.05, 0.5])
def test_a_machine_that_slows_down_or_speeds_up_slows_both_sides_alike(true_ratio, ours_first):
    for drift in (0.1, -0.02):
        host = FakePair(0.02 * true_ratio, 0.02, lambda side, i, now_s, drift=drift: 1 + drift * now_s)
        assert host.ratio(ours_first=ours_first) == pytest.approx(true_ratio, rel=0.002)


def test_a_side_that_is_slower_after_the_other_one_than_after_itself_has_no_advantage():
    previous = ""

    def cold_start(side, i, now_s):
        nonlocal previous
        is_cold, previous = side != previous, side
        return 1.05 if is_cold else 1.0

    for ours_first in (True, False):
        assert FakePair(0.03, 0.03, cold_start).ratio(ours_first=ours_first) == pytest.approx(1.0, rel=1e-6)


def test_calls_that_take_twenty_times_as_long_now_and_then_do_not_move_the_ratio():
    rng = np.random.default_rng(0)
    host = FakePair(0.004 * 1.05, 0.004, lambda side, i, now_s: 20 if rng.random() < 0.1 else rng.normal(1, 0.01))
    assert host.ratio() == pytest.approx(1.05, rel=0.01)


def test_neighbours_that_come_and_go_for_seconds_do_not_move_the_ratio():
    host = FakePair(0.01, 0.01, lambda side, i, now_s: 1.6 if int(now_s / 1.7) % 2 else 1.0)
    assert host.ratio(rule=PairRule(min_s=8.0)) == pytest.approx(1.0, rel=0.005)


def test_a_block_lasts_20_ms_on_each_side_however_long_its_calls():
    times = FakePair(0.001, 0.0061).time()
    assert {len(block) for block in times.ours.wall_s} == {20}
    assert {len(block) for block in times.theirs.wall_s} == {4}
    assert {len(block) for block in FakePair(1e-6, 0.1).time().ours.wall_s} == {MAX_QUEUE_CALLS}


@pytest.mark.parametrize(("call_s", "num_rounds"), [(0.005, 13), (0.1, 12), (1.0, 5), (4.0, 2), (15.0, 1)])
def test_a_pair_is_timed_for_twelve_rounds_or_a_second_or_until_the_cap_and_once_at_least(call_s, num_rounds):
    times = FakePair(call_s, call_s).time()
    assert len(times.ours.wall_s) == len(times.theirs.wall_s) == 2 * num_rounds
    assert times.converged == (num_rounds >= 12)


def test_calls_of_fifteen_seconds_take_two_minutes_a_process():
    host = FakePair(15.0, 15.0)
    assert not host.time().is_warm
    assert host.order == "oottotto"


def test_more_noise_takes_more_rounds_and_the_cap_ends_them_unconverged():
    counts, converged = [], []
    for spread in (0.003, 0.04, 0.3):
        rng = np.random.default_rng(0)
        times = FakePair(0.02, 0.02, lambda side, i, now_s, rng=rng, s=spread: math.exp(s * rng.normal())).time()
        counts.append(len(times.ours.wall_s) // 2)
        converged.append(times.converged)
    assert counts[0] < counts[1] < counts[2]
    assert converged == [True, True, False]


def test_the_clock_that_is_used_decides_when_a_pair_has_enough_rounds():
    """The wall is noisy, the CPU time is not: as where neighbours use the cores."""
    rng = np.random.default_rng(0)
    host = FakePair(0.02, 0.02, lambda side, i, now_s: math.exp(0.3 * rng.normal()))

    def time(uses):
        return time_pair(
            lambda: host.call("o"),
            lambda: host.call("t"),
            PairRule(max_s=5.0),
            uses=uses,
            clock=lambda: host.now_s,
            cpu_clock=lambda: 0.005 * len(host.order),
        )

    assert not time("wall_s").converged
    times = time("cpu_s")
    assert times.converged
    assert times.ours.cpu_s[0] == pytest.approx([0.005] * len(times.ours.wall_s[0]))


def test_a_cpu_clock_that_stands_still_is_unknown_and_is_refused_where_it_should_decide():
    assert FakePair(0.1, 0.1, busy=0.0).time().ours.cpu_s is None
    with pytest.raises(TimingError, match="cpu_s: this clock stood still"):
        FakePair(0.1, 0.1, busy=0.0).time(uses="cpu_s")


def test_an_error_of_either_side_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        time_pair(lambda: 1 / 0, lambda: None, PairRule())


@pytest.mark.parametrize("options", [{"min_processes": 13}, {"max_processes": 2}, {"block_s": 0.0}])
def test_a_rule_for_pairs_has_no_more_processes_at_least_than_at_most_and_positive_fields(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PairRule(**options)


def test_looks_at_a_pair_are_few_so_that_a_lucky_one_does_not_end_it(monkeypatch):
    looks = []
    monkeypatch.setattr(timing, "median_interval", lambda ratios: looks.append(len(ratios)) or (0.5, 1.5))
    FakePair(0.02, 0.02).time()
    assert looks[:4] == [13, 16, 20, 24]
    assert len(looks) < 20
