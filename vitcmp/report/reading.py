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
from vitcmp.specs import parse_image_size

ARTICLE_FILE = "results.json"  # as the article's code calls it
TEXT, WHOLE, UNKNOWN = (str,), (int,), (type(None),)
# What a report reads of a case; the schema asks only that it is there.
CASE_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("backend", "model", "image_size", "mode", "numerics", "platform", "device_name", "weights"), TEXT),
    **dict.fromkeys(("attention", "compile", "layout", "batch_norm", "framework_version"), TEXT + UNKNOWN),
    "batch_size": WHOLE,
    "num_threads": WHOLE + UNKNOWN,
    "spec": (dict,),
}
LARGEST_SIZE = 10**6
LARGEST = 1e30  # of any number: what is more is no time, no memory and no FLOPs


@dataclasses.dataclass
class Source:
    """What one folder or file holds; `faults` says of each thing that was left out where it stood, and why."""

    name: str
    records: list[Record] = dataclasses.field(default_factory=list)
    article: list[Row] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)
    num_left_out: int = 0

    def leave_out(self, where: str, why: str) -> None:
        self.faults.append(f"{where}: {why}")
        self.num_left_out += 1


def read_sources(words: Sequence[str]) -> list[Source]:
    """Reads folders and files, sorted by their names; each source is called by its base name.

    Raises one ValueError for all that are not there, for folders without records, and where nothing can be shown.
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
    if not any(source.records or source.article for source in sources):
        faults = [fault for source in sources for fault in source.faults[:3]]
        raise ValueError("\n".join(["no record can be shown", *faults]))
    return sources


def read_source(path: Path) -> Source:
    """Reads one folder, or one file."""
    source = Source(_name(path))
    for file in _files(path):
        where = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            _read(file, where, source)
        except OSError as error:
            source.leave_out(where, f"cannot be read: {error.strerror}")
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


def _name(path: Path) -> str:
    return path.name or "records" if not path.is_file() else f"{path.parent.name}/{path.name}"


def _why_unreadable(path: Path) -> str | None:
    if not path.exists():
        return f"{path} is not there"
    return None if _files(path) else f"{path} holds no records: there is no *.jsonl and no {ARTICLE_FILE} in it"


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in (*path.rglob("*.jsonl"), *path.glob(ARTICLE_FILE)) if file.is_file())


def _read(file: Path, where: str, source: Source) -> None:
    with open(file, "rb") as stream:
        is_list = file.suffix != ".jsonl" and stream.read(4096).lstrip()[:1] == b"["
        stream.seek(0)
        is_first = True
        for i, value in _parsed_list(stream.read()) if is_list else _parsed_lines(stream):
            if is_first and (kind := _other_kind(value)):
                source.faults.append(f"{where}: passed over, its schema is {kind!r:.60}")
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
        source.records.append(value)


def _why_invalid(value: Any) -> str | None:
    try:
        faults = validate_record(value)
    except RecursionError:
        return "nested too deep to be read"
    return "; ".join(faults[:3]) + "; ..." * (len(faults) > 3) if faults else why_unfit(value)


def _numbers(record: Record) -> Iterator[tuple[str, Any]]:
    yield "num_params", record["num_params"]
    for key in ("analytic", "counted", "step"):
        yield f"flops.{key}", (record["flops"] or {}).get(key)
    for key in ("latency", "throughput"):
        for name in ("wall_s", "cpu_s"):
            yield f"{key}.{name}", max((record[key] or {}).get(name) or [1])
    yield "throughput.calls_per_sample", (record["throughput"] or {"calls_per_sample": 1})["calls_per_sample"]
    share = (record["contention"] or {}).get("others_cpu_share")
    yield "contention.others_cpu_share", None if share == 0 else share
    for name, value in (record["memory"] or {}).items():
        if name.endswith("_bytes"):
            yield f"memory.{name}", value


def _is_plausible(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and 0 < value < LARGEST)


def _are_small(values: Any) -> bool:
    """Says whether it is a list of numbers. A thousand logits a record: a loop in Python would take seconds."""
    try:
        return isinstance(values, list) and (not values or -LARGEST < min(values) <= max(values) < LARGEST)
    except TypeError:  # something else is among them
        return False


def _why_odd(record: Record) -> str | None:
    """Returns what in the outputs, the error or the device is not of the kind that is read from there."""
    outputs, error, device = (record[key] or {} for key in ("outputs", "error", "device"))
    for key in ("logits", "pre_logits"):
        values = outputs.get(key)
        if values is not None and not _are_small(values):
            return f"outputs.{key} is no list of numbers"
    if outputs.get("loss") is not None and not _are_small([outputs["loss"]]):
        return "outputs.loss is no number"
    if not all(isinstance(error.get(key), str | None) for key in ("type", "message")):
        return "error holds no text"
    return None if isinstance(device.get("versions"), dict | None) else "device.versions is no object"
