"""The page of capacity records, and of a sweep's beside them: folders -> payload -> report.html."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.capacity.examples import FILE, Examples, read_examples
from experiments.capacity.page import TITLE, make_capacity
from experiments.capacity.reading import KIND, read_pixels, read_records
from experiments.capacity.schema import Record
from vitcmp.report.html import render_html
from vitcmp.report.output import write_text
from vitcmp.report.payload import TITLE as SWEEP_TITLE
from vitcmp.report.payload import payload_of
from vitcmp.report.reading import read_sources


def payload_of_folders(words: Sequence[str], *, title: str | None = None) -> dict[str, Any]:
    """Returns the payload of capacity records and of a sweep's in folders or files; raises ValueError for neither."""
    sources = read_sources(words, may_be_empty=True)
    records: dict[tuple[str, ...], Record] = {}
    examples, num_records = Examples(), dict[str, int]()
    for source in sources:
        assert source.path is not None
        source.faults = [fault for fault in source.faults if f"its schema is '{KIND}/" not in fault]
        own = {_identity(record): record for record in read_records(source.path, source)}
        num_records[source.name] = len(own.keys() - records.keys())  # a folder may be named beside one in it
        records |= own
        examples.update(read_pixels(source.path))
    has_sweep = any(source.records or source.article for source in sources)
    if not records and not has_sweep:
        faults = [f"{source.name}: {fault}" for source in sources for fault in source.faults[:3]]
        raise ValueError("\n".join(["no record can be shown", *faults]))
    payload = payload_of(sources, title=title or (SWEEP_TITLE if has_sweep else TITLE))
    for row in payload["sources"]:
        row["num_records"] += num_records[row["name"]]
    return with_capacity(payload, list(records.values()), examples)


def _identity(record: Record) -> tuple[str, ...]:
    return tuple(str(record[key]) for key in ("run_id", "started_at", "ended_at", "status"))


def with_capacity(payload: dict[str, Any], records: Sequence[Record], examples: Examples) -> dict[str, Any]:
    capacity = make_capacity(records, examples)
    return payload | {"capacity": capacity} if capacity else payload


def write_report(folder: Path, records: Sequence[Record]) -> Path:
    """Writes the page of one folder's records beside them; returns where."""
    source = {"name": folder.resolve().name, "num_records": len(records), "left_out": 0, "faults": []}
    payload = payload_of([], title=TITLE) | {"sources": [source]}
    path = folder / "report.html"
    write_text(str(path), render_html(with_capacity(payload, records, read_examples(folder / FILE))))
    return path
