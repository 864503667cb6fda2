"""What a record must hold: `vitcmp-record/1`. Unknown is null, never 0; a time of 0.0 is a lie."""

import datetime
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

SCHEMA = "vitcmp-record/1"
METHOD_VERSION = 2  # results of different method versions do not compare
STATUSES = ("ok", "oom", "unsupported", "timeout", "crashed", "error", "interrupted")
FINAL = tuple(status for status in STATUSES if status != "interrupted")  # an interrupted case is run again

Record = dict[str, Any]

_NUMBER = (int, float)
# Every key of a record, with its types; those with NoneType may be unknown.
KEYS: dict[str, tuple[type, ...]] = {
    "schema": (str,),
    "method_version": (int,),
    "case_id": (str,),
    "run": (int,),
    "status": (str,),
    "error": (dict, type(None)),
    "started_at": (str,),
    "ended_at": (str,),
    "case": (dict,),
    "device": (dict, type(None)),
    "environment": (dict, type(None)),
    "effective": (dict, type(None)),
    "num_params": (int, type(None)),
    "flops": (dict, type(None)),
    "compile_s": (*_NUMBER, type(None)),
    "compile_cache": (str, type(None)),
    "warmup": (dict, type(None)),
    "latency": (dict, type(None)),
    "throughput": (dict, type(None)),
    "memory": (dict, type(None)),
    "contention": (dict, type(None)),
    "clocks": (dict, type(None)),
    "outputs": (dict, type(None)),
    "stages_s": (dict, type(None)),
}
# Keys that older records lack, with their types.
OPTIONAL_KEYS: dict[str, tuple[type, ...]] = {"ceilings": (dict, type(None))}
# What the nested objects hold.
INNER_KEYS: dict[str, tuple[str, ...]] = {
    "case": (
        "backend",
        "model",
        "spec",
        "image_size",
        "batch_size",
        "mode",
        "numerics",
        "attention",
        "compile",
        "layout",
        "platform",
        "device_name",
        "num_threads",
        "framework_version",
        "weights",
    ),
    "error": ("type", "message", "traceback", "stage"),
    "device": ("platform", "name", "num_devices", "memory_bytes", "num_threads", "versions"),
    "warmup": ("wall_s", "stable"),
    "latency": ("wall_s", "cpu_s", "converged"),
    "throughput": ("calls_per_sample", "wall_s", "cpu_s", "converged"),
    "memory": (
        "parameters_bytes",
        "activation_peak_bytes",
        "activation_source",
        "process_peak_bytes",
        "process_source",
    ),
    "contention": (
        "others_cpu_share",
        "steal_share",
        "load_1m_before",
        "load_1m_after",
        "involuntary_switches",
    ),
    "ceilings": ("matmul_flops_per_s", "copy_bytes_per_s", "how"),
}
# What a case that went well must know.
OK_NEEDS = ("device", "environment", "effective", "num_params", "flops", "warmup", "latency", "memory", "contention")
PLAIN = {str, int, bool, type(None)}  # types that are JSON, whatever the value


def validate_record(record: Any) -> list[str]:
    """Returns every fault of a record, or [] where it is a good one. Further keys are allowed."""
    if not isinstance(record, dict):
        return [f"a record is an object, not {type(record).__name__}"]
    faults = [*_check_types(record)]
    if faults:
        return faults
    return [
        *_check_head(record),
        *_check_status(record),
        *_check_inner(record),
        *_check_timings(record),
        *_check_values(record),
    ]


def _check_types(record: Record) -> Iterator[str]:
    for key, types in {**KEYS, **OPTIONAL_KEYS}.items():
        if key not in record:
            if key in KEYS:
                yield f"{key} is missing"
        elif not isinstance(record[key], types) or (isinstance(record[key], bool) and bool not in types):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            yield f"{key} is {_show(record[key])}, expected {names}"


def _check_head(record: Record) -> Iterator[str]:
    if record["schema"] != SCHEMA:
        yield f"schema is {record['schema']!r}, expected {SCHEMA!r}"
    if not re.fullmatch("[0-9a-f]{64}", record["case_id"]):
        yield f"case_id is {record['case_id']!r}, expected the 64 hex digits of a sha256"
    if not 1 <= record["method_version"] <= METHOD_VERSION:
        yield f"method_version is {_show(record['method_version'])}; this code knows 1 to {METHOD_VERSION}"
    if record["run"] < 0:
        yield f"run is {record['run']}, expected 0 or more"
    for key in ("started_at", "ended_at"):
        if not _is_utc(record[key]):
            yield f"{key} is {record[key]!r}, expected ISO 8601 in UTC"


def _check_status(record: Record) -> Iterator[str]:
    status = record["status"]
    if status not in STATUSES:
        yield f"status is {status!r}, expected one of {' '.join(STATUSES)}"
    elif status == "ok":
        yield from (f"status is ok but {key} is null" for key in OK_NEEDS if record[key] is None)
        if record["error"] is not None:
            yield "status is ok but error is not null"
    elif record["error"] is None and status != "interrupted":
        yield f"status is {status} but error is null"


def _check_inner(record: Record) -> Iterator[str]:
    for key, names in INNER_KEYS.items():
        if record.get(key) is not None:
            yield from (f"{key}.{name} is missing" for name in names if name not in record[key])


def _check_timings(record: Record) -> Iterator[str]:
    """Lists of durations are not empty and above zero; CPU times are null, or as many as wall times."""
    for key in ("warmup", "latency", "throughput"):
        values = record[key] or {}
        wall_s, cpu_s = values.get("wall_s"), values.get("cpu_s")
        if record[key] is not None and not _are_durations(wall_s):
            yield f"{key}.wall_s is {_show(wall_s)}, expected seconds above 0"
        elif cpu_s is not None and not (_are_durations(cpu_s) and len(cpu_s) == len(values["wall_s"])):
            yield f"{key}.cpu_s is {_show(cpu_s)}, expected null, or seconds above 0 for each of wall_s"
    for name, value in {"compile_s": record["compile_s"], **(record["stages_s"] or {})}.items():
        if value is not None and not _are_durations([value]):
            yield f"{name} is {_show(value)}, expected seconds above 0, or null"
    for name, value in (record["memory"] or {}).items():
        if name.endswith("_bytes") and value is not None and not (_is_number(value) and value > 0):
            yield f"memory.{name} is {_show(value)}, expected bytes above 0, or null"
    for name, value in (record.get("ceilings") or {}).items():
        if name.endswith("_per_s") and value is not None and not (_is_number(value) and value > 0):
            yield f"ceilings.{name} is {_show(value)}, expected a rate above 0, or null"


def _check_values(value: Any, path: str = "") -> Iterator[str]:
    """Everything is JSON, and every number is finite."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                yield f"{path or 'the record'} has the key {key!r}, expected a string"
            if type(item) not in PLAIN:
                yield from _check_values(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(() if _are_finite(value) else value):
            yield from _check_values(item, f"{path}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {value}, expected a finite number or null"
    elif not isinstance(value, str | int | float | None):
        yield f"{path} is {_show(value)}, which is not JSON"


def _are_finite(values: Sequence[Any]) -> bool:
    """Says whether they are finite floats and nothing else, as the thousands of timings and logits of a record are."""
    return set(map(type, values)) == {float} and all(map(math.isfinite, values))


def _are_durations(values: Any) -> bool:
    if not isinstance(values, list) or not values:
        return False
    if set(map(type, values)) == {float}:  # one by one, the timings of a large sweep would take seconds
        return min(values) > 0
    return all(_is_number(value) and value > 0 for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_utc(text: str) -> bool:
    try:
        return datetime.datetime.fromisoformat(text).utcoffset() == datetime.timedelta(0)
    except ValueError:
        return False


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
