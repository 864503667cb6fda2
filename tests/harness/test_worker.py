"""The child: one case becomes one record, whatever happens in it."""

import errno
import io
import sys

import numpy as np
import pytest

from tests.harness.fakes import FakeBackend, FakeStep, make_case
from vitcmp import worker
from vitcmp.backend import Unsupported
from vitcmp.records import validate_record


@pytest.fixture
def backend(monkeypatch):
    def use(fake: FakeBackend) -> None:
        monkeypatch.setattr(worker, "load_backend", lambda name, platform: fake)

    return use


def test_a_ten_line_backend_drives_a_whole_measurement(backend):
    backend(FakeBackend())
    record = worker.measure(make_case(), 0, None)
    assert record["status"] == "ok", record["error"]
    assert validate_record(record) == []
    assert record["case_id"] == make_case().case_id
    assert len(record["latency"]["wall_s"]) == len(record["latency"]["cpu_s"]) >= 3
    assert min(record["latency"]["wall_s"]) > 0
    assert record["throughput"]["calls_per_sample"] > 1
    assert record["outputs"]["shape"] == [1, 10]
    assert record["flops"]["step"] == 2 * record["flops"]["analytic"]
    assert list(record["stages_s"]) == [
        "import", "weights", "flops", "compile", "parity", "warmup", "latency", "throughput", "memory", "ceilings",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "error, status",
    [
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"), "oom"),
        (RuntimeError("No available kernel. Aborting execution."), "unsupported"),
        (RuntimeError("No viable backend for scaled_dot_product_attention was found."), "unsupported"),
        (Unsupported("no such thing here"), "unsupported"),
        (RuntimeError("shape mismatch"), "error"),
    ],
)
@pytest.mark.parametrize("stage", ["load", "compile", "memory"])
def test_a_failure_is_a_record_with_its_status_stage_and_message(backend, error, status, stage):
    backend(FakeBackend(fail_at=stage, error=error))
    record = worker.measure(make_case(), 0, None)
    assert record["status"] == status
    assert record["error"]["message"] == str(error)
    assert record["error"]["stage"] == {"load": "weights"}.get(stage, stage)
    assert type(error).__name__ in record["error"]["traceback"]
    assert validate_record(record) == []


def test_a_full_disk_under_the_log_costs_no_measurement(backend, monkeypatch):
    class FullDisk(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    backend(FakeBackend())
    monkeypatch.setattr(sys, "stderr", FullDisk())
    assert worker.measure(make_case(), 0, None)["status"] == "ok"


def test_a_step_that_fails_after_it_was_timed_keeps_its_timings(backend):
    backend(FakeBackend(fail_at="memory", error=RuntimeError("boom")))
    record = worker.measure(make_case(), 0, None)
    assert record["status"] == "error" and len(record["latency"]["wall_s"]) >= 3


def test_a_case_of_another_device_is_refused(backend):
    backend(FakeBackend())
    record = worker.measure(make_case(device_name="another"), 0, None)
    assert record["status"] == "unsupported" and "another" in record["error"]["message"]


def test_outputs_that_are_not_finite_are_an_error_and_not_a_result(backend, monkeypatch):
    monkeypatch.setattr(FakeStep, "result", lambda self: np.full((2, 10), np.inf))
    backend(FakeBackend())
    record = worker.measure(make_case(), 0, None)
    assert record["status"] == "error" and "finite" in record["error"]["message"]


def test_what_the_device_is_known_not_to_have_is_unsupported_and_never_replaced(backend):
    backend(FakeBackend())
    for changes in (
        {"numerics": "tensorfloat32"},
        {"attention": "mem_efficient"},
        {"attention": "cudnn"},
        {"numerics": "float16", "mode": "train"},
    ):
        assert worker.measure(make_case(**changes), 0, None)["status"] == "unsupported"
