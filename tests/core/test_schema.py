"""Validation of records: every fault is named, all of them at once."""

import math

import pytest

from tests.record_factory import changed, failed, make_record
from vitcmp.records import FINAL, STATUSES, validate_record


@pytest.mark.parametrize("record", [make_record(), *(failed(status=status) for status in STATUSES if status != "ok")])
def test_good_records_have_no_faults(record):
    assert validate_record(record) == []


def test_an_interrupted_record_needs_no_error():
    assert validate_record({**failed(status="interrupted"), "error": None}) == []


@pytest.mark.parametrize("key", list(make_record()))
def test_every_key_is_required_and_typed(key):
    assert validate_record(changed(key, ...)) == [f"{key} is missing"]
    assert key in validate_record(changed(key, {1, 2}))[0]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("schema", "vitcmp-record/2", "expected 'vitcmp-record/1'"),
        ("method_version", "1", "expected int"),
        ("case_id", "abc", "sha256"),
        ("run", -1, "0 or more"),
        ("run", True, "expected int"),
        ("status", "fine", "one of ok oom"),
        ("status", "oom", "error is null"),
        ("error", {"type": "E", "message": "", "traceback": "", "stage": "time"}, "error is not null"),
        ("started_at", "yesterday", "ISO 8601"),
        ("ended_at", "2026-11-20T05:00:00", "UTC"),
        ("case.weights", ..., "case.weights is missing"),
        ("latency", None, "latency is null"),
        ("device", None, "device is null"),
        ("latency.wall_s", [], "above 0"),
        ("latency.wall_s", [0.1, 0.0], "above 0"),
        ("latency.wall_s", [0.1, -0.1], "above 0"),
        ("latency.wall_s", [0.1, "0.1"], "above 0"),
        ("latency.cpu_s", [0.1], "for each of wall_s"),
        ("latency.cpu_s", [0.1, 0.0], "above 0"),
        ("throughput.wall_s", [0.0], "above 0"),
        ("throughput.calls_per_sample", ..., "calls_per_sample is missing"),
        ("warmup.wall_s", None, "above 0"),
        ("compile_s", 0.0, "compile_s is 0.0"),
        ("stages_s.import", 0, "import is 0"),
        ("memory.process_peak_bytes", 0, "bytes above 0"),
        ("memory.parameters_bytes", ..., "missing"),
        ("contention.steal_share", math.nan, "finite"),
        ("outputs.logits", [1.0, math.inf], "outputs.logits[1] is inf"),
        ("flops.analytic", math.nan, "finite"),
        ("effective.kernel", {"flash"}, "not JSON"),
        ("environment.python", (3, b"11"), "not JSON"),
        ("environment", {1: 2}, "expected a string"),
    ],
)
def test_each_fault_is_named(path, value, words):
    faults = validate_record(changed(path, value))
    assert len(faults) == 1
    assert words in faults[0]


@pytest.mark.parametrize("values", [[0.1, math.nan], [0.1, math.inf], [math.nan, 0.1], [0.1, 1, -0.1], [0.1, -0.1]])
def test_one_bad_number_among_many_is_found(values):
    assert validate_record(changed("latency.wall_s", [*[0.1] * 1000, *values]))


def test_all_faults_come_at_once_and_no_record_is_no_crash():
    assert len(validate_record(changed("run", -1) | {"case_id": "", "status": "?"})) == 3
    for value in (None, [], "record", 1):
        assert len(validate_record(value)) == 1


def test_cpu_seconds_may_be_unknown():
    assert validate_record(changed("latency.cpu_s", None)) == []


def test_ceilings_may_be_absent_as_in_older_records_or_unknown():
    assert "ceilings" not in make_record()
    known = {"matmul_flops_per_s": 5e11, "copy_bytes_per_s": None, "how": "2048x2048 matmul, best of 5"}
    for ceilings in (None, known):
        assert validate_record(make_record(ceilings=ceilings)) == []


@pytest.mark.parametrize(
    ("ceilings", "words"),
    [
        ("fast", "ceilings is 'fast', expected dict or null"),
        ({"how": ""}, "ceilings.matmul_flops_per_s is missing"),
        ({"matmul_flops_per_s": 0.0, "copy_bytes_per_s": 1.0, "how": ""}, "expected a rate above 0, or null"),
        ({"matmul_flops_per_s": 1.0, "copy_bytes_per_s": "1", "how": ""}, "expected a rate above 0, or null"),
        ({"matmul_flops_per_s": math.inf, "copy_bytes_per_s": 1.0, "how": ""}, "expected a finite number"),
    ],
)
def test_bad_ceilings_are_named(ceilings, words):
    assert words in validate_record(make_record(ceilings=ceilings))[0]


def test_final_statuses_are_all_but_interrupted():
    assert set(STATUSES) - set(FINAL) == {"interrupted"}
