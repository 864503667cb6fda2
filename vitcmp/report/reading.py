"""Reads what a report is made of and leaves it as it is: a bad record is named and left out, and the rest is shown.

A sweep reads its own folder with `RecordStore.load`, which stops at the first bad record.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vitcmp.records import SCHEMA, Record, validate_record
from vitcmp.report.article import article_row, is_article_row
from vitcmp.report.rows import Row
from vitcmp.report.words import plural
from vitcmp.specs import parse_image_size

ARTICLE_FILE = "results.json"  # as the article's code calls it
SHOWN_BY = {"vitcmp-capacity/": "experiments.capacity.report"}  # records of other schemas, by what shows them
TEXT, WHOLE, UNKNOWN = (str,), (int,), (type(None),)
# What a report reads of a case; the schema asks only that it is there.
CASE_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("backend", "model", "image_size", "mode", "numerics", "platform", "device_name", "weights"), TEXT),
    **dict.fromkeys(("attention", "compile", "layout", "batch_norm", "framework_version"), TEXT + UNKNOWN),
    "batch_size": WHOLE,
    "num_threads": WHOLE + UNKNOWN,
    "max_sampling_s": (int, float, *UNKNOWN),
    "spec": (dict,),
}
IDENTITY = "method_version", "case_id", "run", "started_at", "ended_at", "status"
HOST_TEXTS = "python", "os", "cpu", "vitcmp", "numpy", "commit"
LARGEST_SIZE = 10**6
SMALLEST, LARGEST = 1e-30, 1e30  # of any number: what is beyond is no time, no memory and no FLOPs


@dataclasses.dataclass
class Source:
    """What one folder or file holds; `faults` says of each thing that was left out where it stood, and why."""

    name: str
    records: list[Record] = dataclasses.field(default_factory=list)
    article: list[Row] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)
    num_left_out: int = 0
    cases: dict[tuple[int, str], Any] = dataclasses.field(default_factory=dict)  # by method version and case id
    path: Path | None = None  # None where it is not from a disk

    def leave_out(self, where: str, why: str) -> None:
        self.faults.append(f"{where}: {why}")
        self.num_left_out += 1


def read_sources(words: Sequence[str], *, may_be_empty: bool = False) -> list[Source]:
    """Reads folders and files, sorted by their names; each source is called by its base name.

    A record that was read before, in the same source or in an earlier one, is left out.
    Raises one ValueError for all that are not there, for folders without records, and where nothing can be shown,
    unless that may be so.
    """
    if not words:
        raise ValueError("name one or more folders of records, or files (*.jsonl, results.json)")
    paths = sorted({Path(word).resolve() for word in words}, key=lambda path: (_name(path), path))
    if faults := [fault for path in paths if (fault := _why_unreadable(path))]:
        raise ValueError("\n".join(faults))
    sources = [read_source(path) for path in paths]
    for i, source in enumerate(sources):
        same = sum(_name(path) == source.name for path in paths[:i])
        source.name += f" ({same + 1})" * (same > 0)
    _drop_repeats(sources)
    if not may_be_empty and not any(source.records or source.article for source in sources):
        faults = [fault for source in sources for fault in source.faults[:3]]
        raise ValueError("\n".join(["no record can be shown", *faults]))
    return sources


def read_source(path: Path) -> Source:
    """Reads one folder, or one file."""
    source = Source(_name(path), path=path)
    for file in _files(path):
        where = file.relative_to(path).as_posix() if path.is_dir() else file.name
        if not file.is_file():
            source.leave_out(where, "is no file that can be read")
            continue
        try:
            _read(file, where, source)
        except OSError as error:
            source.leave_out(where, f"cannot be read: {error.strerror}")
    return source


def source_of(name: str, records: Iterable[Record]) -> Source:
    """Returns records that are valid, as those of a sweep, without those that a report cannot show."""
    source = Source(name)
    for record in records:
        _add(record, f"case {record['case_id'][:12]}, run {record['run']}", source)
    return source


def why_unfit(record: Record) -> str | None:
    """Returns why a valid record cannot be shown: the schema leaves open what a report needs; None where it can."""
    case = record["case"]
    for key, types in CASE_TYPES.items():
        if not isinstance(case.get(key), types) or isinstance(case.get(key), bool):
            return f"case.{key} is {case.get(key)!r:.60}"
    try:
        sides = parse_image_size(case["image_size"])
    except ValueError as error:
        return f"case.{error}"
    if not 0 < case["batch_size"] < LARGEST_SIZE or max(sides) > LARGEST_SIZE:
        return f"{case['image_size']:.20} px, batch size {case['batch_size']!r:.20}: no such sizes are measured"
    bad = next((name for name, value in _numbers(record) if not _is_plausible(value)), None)
    return f"{bad} is not a plausible number" if bad else _why_odd(record)


def _drop_repeats(sources: Sequence[Source]) -> None:
    """Leaves out what was read before: a folder beside its copy, or beside one in it, is not a second machine."""
    seen: set[tuple[Any, ...]] = set()
    for source in sources:
        records, source.records = source.records, []
        for record in records:
            identity = tuple(record[key] for key in IDENTITY)
            if identity not in seen:
                source.records.append(record)
            seen.add(identity)
        if num_repeats := len(records) - len(source.records):
            source.faults.append(f"{plural(num_repeats, 'record')} left out: the same were read before")
            source.num_left_out += num_repeats


def _name(path: Path) -> str:
    return path.name or "records" if not path.is_file() else f"{path.parent.name}/{path.name}"


def _why_unreadable(path: Path) -> str | None:
    if not path.exists():
        return f"{path} is not there"
    if not (path.is_dir() or path.is_file()):
        return f"{path} is neither a folder nor a file"
    return None if _files(path) else f"{path} holds no records: there is no *.jsonl and no {ARTICLE_FILE} in it"


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in (*path.rglob("*.jsonl"), *path.glob(ARTICLE_FILE)) if not file.is_dir())


def _read(file: Path, where: str, source: Source) -> None:
    with open(file, "rb") as stream:
        is_list = file.suffix != ".jsonl" and stream.read(4096).lstrip()[:1] == b"["
        stream.seek(0)
        is_first = True
        for i, value in _parsed_list(stream.read()) if is_list else _parsed_lines(stream):
            if is_first and (kind := _other_kind(value)):
                program = next((program for start, program in SHOWN_BY.items() if kind.startswith(start)), None)
                hint = f"; python -m {program} shows it" if program else ""
                source.faults.append(f"{where}: passed over, its schema is {kind!r:.60}{hint}")
                return
            is_first = False
            _sort_in(value, f"{where}:{i}", source)


def _parsed_list(text: bytes) -> Iterator[tuple[int, Any]]:
    value = _parsed(text)
    return enumerate(value if isinstance(value, list) else [value], start=1)


def _parsed_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    return ((i, _parsed(line)) for i, line in enumerate(lines, start=1) if line.strip())


def _parsed(text: bytes) -> Any:
    """Returns the value, or as a ValueError why there is none."""
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("nested too deep to be read")
    except ValueError:  # also bytes that are not UTF-8
        return ValueError("not JSON" if text.endswith(b"\n") else "not JSON: torn, or still being written")


def _other_kind(value: Any) -> str | None:
    """Returns the schema of a record that is vitcmp's, but an experiment's: such files may stand in the same folder."""
    kind = str(value.get("schema")) if isinstance(value, dict) else ""
    name = kind.partition("/")[0]
    return kind if name.startswith("vitcmp-") and name != SCHEMA.partition("/")[0] else None


def _sort_in(value: Any, where: str, source: Source) -> None:
    """Adds the value to what the source holds, or to what was left out."""
    if isinstance(value, ValueError):
        source.leave_out(where, str(value))
    elif is_article_row(value):
        row = article_row(value, source.name)
        source.leave_out(where, row) if isinstance(row, str) else source.article.append(row)
    elif fault := _why_invalid(value):
        source.leave_out(where, fault)
    else:
        _add(value, where, source)


def _why_invalid(value: Any) -> str | None:
    try:
        faults = validate_record(value)
    except RecursionError:
        return "nested too deep to be read"
    return "; ".join(faults[:3]) + "; ..." * (len(faults) > 3) if faults else None


def _add(record: Record, where: str, source: Source) -> None:
    """Adds a valid record, or says why it cannot be shown."""
    if fault := why_unfit(record) or _why_unlike(record, source):
        source.leave_out(where, fault)
    else:
        source.records.append(record)


def _why_unlike(record: Record, source: Source) -> str | None:
    """Returns why the record cannot stand beside those before it: its runs would be pooled with another case's."""
    key = record["method_version"], record["case_id"]
    is_alike = source.cases.setdefault(key, record["case"]) == record["case"]
    return None if is_alike else "its case is not that of the record before it with the same case_id"


def _numbers(record: Record) -> Iterator[tuple[str, Any]]:
    yield "num_params", record["num_params"]
    for key in ("analytic", "counted", "step"):
        yield f"flops.{key}", (record["flops"] or {}).get(key)
    for key in ("latency", "throughput"):
        for name in ("wall_s", "cpu_s"):
            values = (record[key] or {}).get(name) or [1]
            yield from ((f"{key}.{name}", end) for end in (min(values), max(values)))
    yield "throughput.calls_per_sample", (record["throughput"] or {"calls_per_sample": 1})["calls_per_sample"] or -1
    for key in ("environment", "device"):
        yield f"{key}.memory_bytes", (record[key] or {}).get("memory_bytes")
    share = (record["contention"] or {}).get("others_cpu_share")
    yield "contention.others_cpu_share", None if share == 0 else share
    for name, value in (record["memory"] or {}).items():
        if name.endswith("_bytes"):
            yield f"memory.{name}", value


def _is_plausible(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and SMALLEST < value < LARGEST)


def _are_small(values: Any) -> bool:
    """Says whether it is a list of numbers. A thousand logits a record: a loop in Python would take seconds."""
    try:
        return isinstance(values, list) and (not values or -LARGEST < min(values) <= max(values) < LARGEST)
    except TypeError:  # something else is among them
        return False


def _why_odd(record: Record) -> str | None:
    """Returns what in the outputs, the texts or the versions is not of the kind that is read from there."""
    outputs, error, device, host = (record[key] or {} for key in ("outputs", "error", "device", "environment"))
    for key in ("logits", "pre_logits"):
        values = outputs.get(key)
        if values is not None and not _are_small(values):
            return f"outputs.{key} is no list of numbers"
    if outputs.get("loss") is not None and not _are_small([outputs["loss"]]):
        return "outputs.loss is no number"
    texts = [("error", error, ("type", "message")), ("environment", host, HOST_TEXTS)]
    texts += [("device", device, ("platform", "name")), ("case.spec", record["case"]["spec"], ("family",))]
    for place, values, keys in texts:
        if odd := next((key for key in keys if not isinstance(values.get(key), str | None)), None):
            return f"{place}.{odd} is no text"
    versions = device.get("versions") or {}
    are_texts = isinstance(versions, dict) and all(isinstance(value, str) for value in versions.values())
    return None if are_texts else "device.versions is no object of texts"
