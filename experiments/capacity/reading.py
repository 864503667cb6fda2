"""Reads capacity records for a report and leaves them as they are: a bad one is named and left out.

Training reads its own folder with `RecordStore.load`, which stops at the first bad record.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.capacity.examples import FILE, Examples, read_examples
from experiments.capacity.groups import METRICS
from experiments.capacity.schema import SCHEMA, Record, validate
from vitcmp.report.reading import Source

KIND = SCHEMA.partition("/")[0]
LARGEST = 1e30


def read_records(path: Path, source: Source) -> list[Record]:
    """Returns the good records of a folder or a file; what is left out, and why, is added to the source."""
    folder = path if path.is_dir() else path.parent
    records = []
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        values = list(_values(file)) if _is_ours(file) else []
        for i, value in values:
            fault = value if isinstance(value, str) else why_unfit(value)
            if fault is None:
                records.append(value)
            else:
                source.leave_out(f"{file.relative_to(folder).as_posix()}:{i}", fault)
    return records


def read_pixels(path: Path) -> Examples:
    """Returns the examples that are stored in a folder and below it."""
    found = Examples()
    for file in sorted(path.rglob(FILE)) if path.is_dir() else [path.with_name(FILE)]:
        found.update(read_examples(file))
    return found


def why_unfit(value: Any) -> str | None:
    """Returns why a report cannot show it; None where it can. The schema leaves open what a report needs."""
    try:
        faults = validate(value)
    except RecursionError:
        return "nested too deep to be read"
    if faults:
        return "; ".join(faults[:3]) + "; ..." * (len(faults) > 3)
    bad = next((name for name, number in _numbers(value) if not _is_plausible(number)), None)
    if bad:
        return f"{bad} is no plausible number"
    message = (value["error"] or {}).get("message")
    return None if isinstance(message, str | None) else "error.message is no text"


def _is_ours(file: Path) -> bool:
    """Says whether the first line is a capacity record, or calls itself one."""
    try:
        with open(file, "rb") as lines:
            first = json.loads(next((line for line in lines if line.strip()), b"null"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and str(first.get("schema")).partition("/")[0] == KIND


def _values(file: Path) -> Iterator[tuple[int, Any]]:
    """Yields each line's number and value, or as a text why there is none."""
    with open(file, "rb") as lines:
        for i, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield i, json.loads(line)
            except (ValueError, RecursionError):
                yield i, "not JSON" if line.endswith(b"\n") else "not JSON: torn, or still being written"


def _numbers(record: Record) -> Iterator[tuple[str, Any]]:
    """Yields what is read as a number, by its name."""
    for key in ("flops", "num_params", "input_bound_share"):
        yield key, record[key]
    yield "memory.process_peak_bytes", (record["memory"] or {}).get("process_peak_bytes")
    for key in ("loss", "gradient_norm"):
        yield f"curve.{key}", _worst((record["curve"] or {}).get(key))
    if record["step_s"] is not None:
        yield from _all("step_s", record["step_s"], ("median", "low", "high"))
    if record["final"] is not None:
        yield from _all("final", record["final"], METRICS)
    for name, result in (record["cross"] or {}).items():
        yield from _all(f"cross.{name}", result, METRICS)
    for i, evaluation in enumerate(record["evaluations"] or []):
        yield from _all(f"evaluations.{i}", evaluation, ("epoch", "step", *METRICS))


def _all(name: str, result: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yields what must be there, as a text where it is not."""
    for key in keys:
        value = result.get(key) if isinstance(result, Mapping) else None
        yield f"{name}.{key}", "missing" if value is None else value


def _worst(values: Any) -> Any:
    """Returns one of the values that is not plausible, or None."""
    if values is None:
        return None
    return next((value for value in values if not _is_plausible(value)), None) if isinstance(values, list) else values


def _is_plausible(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and -LARGEST < value < LARGEST)
