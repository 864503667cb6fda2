"""The ceilings of a roofline: sizes by time and not by device, the best of a few calls, and never a lost record."""

import pytest

from tests.harness.fakes import FakeBackend, make_case
from vitcmp import ceilings, worker
from vitcmp.ceilings import MAX_S, NUM_CALLS, measure_copy, measure_matmul
from vitcmp.records import validate_record


class FakeMachine(FakeBackend):
    """Does work at a given rate on a clock of its own; launching a call takes 10 microseconds, the first 1 s more."""

    def __init__(self, rate: float, *, slowdowns=(1.3, 1.0, 1.2, 1.1, 1.4)) -> None:
        super().__init__()
        self.rate, self.slowdowns = rate, slowdowns
        self.now_s, self.sizes, self.num_calls = 0.0, [], 0

    def make_matmul(self, side, *, numerics):
        return self.make_call(side, 2 * side**3)

    def make_copy(self, num_bytes, *, numerics):
        return self.make_call(num_bytes, 2 * num_bytes)

    def make_call(self, size, work):
        self.sizes.append(size)
        calls = iter((1e6, *self.slowdowns))

        def call() -> None:
            slowdown = next(calls)
            self.num_calls += 1
            self.now_s += 1e-5 + (1.0 if slowdown == 1e6 else slowdown * work / self.rate)

        return call

    def clock(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("measure", "rate", "how"),
    [
        (measure_matmul, 1e9, "512x512 matmul, best of 1"),  # 0.3 s a call
        (measure_matmul, 1e11, "1024x1024 matmul, best of 5"),
        (measure_matmul, 5e11, "2048x2048 matmul, best of 5"),
        (measure_matmul, 5e12, "4096x4096 matmul, best of 5"),
        (measure_matmul, 8e14, "8192x8192 matmul, best of 5"),
        (measure_copy, 1e8, "copy of 64 MiB, best of 1"),
        (measure_copy, 1e10, "copy of 64 MiB, best of 5"),
        (measure_copy, 1e11, "copy of 128 MiB, best of 5"),
        (measure_copy, 4.8e12, "copy of 2048 MiB, best of 5"),
    ],
)
def test_the_size_grows_with_the_machine_and_the_best_call_counts(measure, rate, how):
    machine = FakeMachine(rate)
    ceiling = measure(machine, "float32", clock=machine.clock)
    assert ceiling.how == how
    best = machine.slowdowns[0] if how.endswith("best of 1") else 1.0
    assert ceiling.rate == pytest.approx(rate / best, rel=0.02) and ceiling.rate < rate / best
    assert len(machine.sizes) <= 2


@pytest.mark.parametrize("measure", [measure_matmul, measure_copy])
@pytest.mark.parametrize("rate", [10.0**exponent for exponent in range(9, 16)])
def test_calls_are_long_enough_or_the_largest_and_all_of_it_is_short(measure, rate):
    machine = FakeMachine(rate, slowdowns=(1.0,) * NUM_CALLS)
    ceiling = measure(machine, "float32", clock=machine.clock)
    work = 2 * machine.sizes[-1] ** 3 if measure is measure_matmul else 2 * machine.sizes[-1]
    is_matmul = measure is measure_matmul
    largest = (ceilings.MATMUL_SIDES if is_matmul else ceilings.COPY_BYTES)[-1]
    long_enough_s = ceilings.MATMUL_S if is_matmul else ceilings.COPY_S
    duration_s = work / ceiling.rate
    assert duration_s >= 0.9 * long_enough_s or machine.sizes[-1] == largest
    timed_s = machine.now_s - len(machine.sizes)  # less the first calls, which compile
    assert timed_s < 2 * (MAX_S + duration_s)


def test_sizes_are_of_whole_blocks_of_noise():
    assert all(side % 256 == 0 for side in ceilings.MATMUL_SIDES)


@pytest.fixture
def measured(monkeypatch):
    def measure(fake: FakeBackend):
        monkeypatch.setattr(worker, "load_backend", lambda name, platform: fake)
        return worker.measure(make_case(), 0, None)

    return measure


def test_a_record_has_the_ceilings_of_its_numerics(measured, monkeypatch):
    asked = []
    monkeypatch.setattr(FakeBackend, "make_matmul", lambda self, side, *, numerics: lambda: asked.append(numerics))
    record = measured(FakeBackend())
    assert record["status"] == "ok" and validate_record(record) == []
    assert set(record["ceilings"]) == {"matmul_flops_per_s", "copy_bytes_per_s", "how"}
    assert set(asked) == {"float32"}
    assert min(record["ceilings"]["matmul_flops_per_s"], record["ceilings"]["copy_bytes_per_s"]) > 0
    assert "matmul, best of 5; copy of" in record["ceilings"]["how"]


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("CUDA out of memory"), TypeError("no kernel")])
@pytest.mark.parametrize(
    ("fails", "is_null", "is_known"),
    [
        ("make_matmul", "matmul_flops_per_s", "copy_bytes_per_s"),
        ("make_copy", "copy_bytes_per_s", "matmul_flops_per_s"),
    ],
)
def test_a_ceiling_that_cannot_be_had_is_null_and_says_why_and_the_record_is_ok(
    measured, error, fails, is_null, is_known
):
    record = measured(FakeBackend(fail_at=fails, error=error))
    assert record["status"] == "ok" and record["error"] is None and validate_record(record) == []
    assert record["ceilings"][is_null] is None and record["ceilings"][is_known] > 0
    assert f"{is_null}: {type(error).__name__}: {error}" in record["ceilings"]["how"]


def test_ceilings_are_measured_last_when_the_model_is_gone(measured, monkeypatch):
    events = []

    class Model:
        def __del__(self) -> None:
            events.append("model freed")

    monkeypatch.setattr(FakeBackend, "load", lambda self, model, weights, *, numerics, layout=None: Model())
    monkeypatch.setattr(FakeBackend, "make_matmul", lambda self, side, *, numerics: events.append("matmul") or int)
    monkeypatch.setattr(FakeBackend, "make_copy", lambda self, num_bytes, *, numerics: events.append("copy") or int)
    record = measured(FakeBackend())
    assert record["memory"]["parameters_bytes"] and list(record["stages_s"])[-2:] == ["memory", "ceilings"]
    assert events[0] == "model freed" and {"matmul", "copy"} < {*events}
