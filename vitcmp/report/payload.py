"""What the interactive report shows, as one JSON value, from records alone: the same records give the same bytes.

Times are in seconds, memory in bytes, FLOPs in FLOPs; a float has 5 digits, a count all of them; the unknown is null.
Records of several folders are kept apart: nothing of one is compared with anything of another.
"""

import datetime
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from vitcmp.records import Record
from vitcmp.report.crossovers import crossings_of
from vitcmp.report.facts import ceilings_of, environments_of
from vitcmp.report.knobs import effects_of
from vitcmp.report.reading import Source, source_of
from vitcmp.report.rows import NUMBERS, TEXTS, Row, device_label, setting_row
from vitcmp.report.summary import Setting, comparisons_of, settings_of
from vitcmp.report.words import first_of
from vitcmp.stats import Estimate, verdict

TITLE = "vitcmp: which vision backbone?"
MAX_FAULTS = 20
BEST_OF_ANY = "best of any"
OF_JAX = {"slower": "JAX faster", "faster": "torch faster"}  # said of torch's time over JAX's
Payload = dict[str, Any]


def make_payload(records: Iterable[Record], *, name: str = "results", title: str = TITLE) -> Payload:
    """Returns the payload of the records of one folder, called `name`; those that cannot be shown are left out."""
    return payload_of([source_of(name, records)], title=title)


def payload_of(sources: Sequence[Source], *, title: str = TITLE) -> Payload:
    """Returns the payload of several folders or files; only records of the newest method version are shown."""
    sources = sorted(sources, key=lambda source: source.name)
    newest = max((record["method_version"] for source in sources for record in source.records), default=0)
    kept = [sorted((r for r in s.records if r["method_version"] == newest), key=_moment) for s in sources]
    groups = [sorted(settings_of(records), key=_context) for records in kept]
    number = {id(setting): i for i, setting in enumerate(setting for group in groups for setting in group)}
    articles = [row for source in sources for row in sorted(source.article, key=_article_order)]
    shared = _shared_labels(groups)

    def tables(of: Callable[[Sequence[Setting]], Iterable[Row]]) -> list[Row]:
        pairs = zip(sources, groups, strict=True)
        return [_of_source(row, source.name, shared) for source, group in pairs for row in of(group)]

    return _rounded(
        {
            "title": title,
            # an import of vitcmp itself would turn the layers upside down
            "version": getattr(sys.modules["vitcmp"], "__version__", None),
            "sources": [_source(*pair, newest=newest) for pair in zip(sources, kept, strict=True)],
            "settings": _columns([*tables(lambda group: map(setting_row, group)), *articles]),
            "comparisons": tables(lambda group: _comparisons(group, number)),
            "knobs": tables(lambda group: _knobs(group, number)),
            "crossovers": tables(_crossovers),
            "ceilings": tables(ceilings_of),
            "environments": tables(environments_of),
        }
    )


def _moment(record: Record) -> tuple[Any, ...]:
    """Orders records by time, however they are spread over files; what follows only makes the order one of a kind."""
    moments = [datetime.datetime.fromisoformat(record[key]) for key in ("started_at", "ended_at")]
    return moments[0], record["case_id"], record["run"], moments[1], record["status"]


def _context(setting: Setting) -> tuple[str, ...]:
    case = setting.case
    return device_label(case), case["platform"], case["mode"], case["weights"]


def _article_order(row: Row) -> tuple[Any, ...]:
    keys = ("device", "model", "height", "batch_size", "numerics")
    return *(row[key] for key in keys), row["attention"] or "", row["latency_s"] or 0


def _shared_labels(groups: Sequence[Sequence[Setting]]) -> set[str]:
    """Returns the devices that several sources name alike: two machines, for all that is known."""
    labels = [label for group in groups for label in {device_label(setting.case) for setting in group}]
    return {label for label in labels if labels.count(label) > 1}


def _of_source(row: Row, source: str, shared: set[str]) -> Row:
    """Adds to a row where it is from, and to the name of its device, where others call theirs the same."""
    device = f"{row['device']} ({source})" if row["device"] in shared else row["device"]
    return {"source": source, **row, "device": device}


def _source(source: Source, kept: Sequence[Record], *, newest: int) -> Row:
    versions = [record["method_version"] for record in source.records]
    older = sorted(set(versions) - {newest})
    notes = [
        f"{versions.count(version)} records of method version {version}: results do not compare with version {newest}'s"
        for version in older
    ]
    num_old = len(source.records) - len(kept)
    return {
        "name": source.name,
        "num_records": len(kept) + len(source.article),
        "left_out": source.num_left_out + num_old,
        "faults": first_of([*notes, *source.faults], MAX_FAULTS),
    }


def _columns(rows: Sequence[Row]) -> Row:
    columns: Row = {name: _coded([row.get(name) for row in rows]) for name in TEXTS}
    return columns | {name: [row.get(name) for row in rows] for name in NUMBERS}


def rows_of(payload: Payload) -> list[Row]:
    """Returns the settings of a payload as rows again."""
    columns = {name: _decoded(column) for name, column in payload["settings"].items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _decoded(column: Any) -> list[Any]:
    return [column["values"][i] for i in column["index"]] if isinstance(column, dict) else column


def _coded(values: Sequence[Any]) -> Row:
    """Returns the distinct values, in the order in which they come, and for each row which of them it has."""
    index = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return {"values": list(index), "index": [index[value] for value in values]}


def _place(setting: Setting) -> Row:
    case = setting.case
    return {"device": device_label(case), "mode": case["mode"], "weights": case["weights"]}


def _point(setting: Setting) -> Row:
    return {key: setting.case[key] for key in ("model", "image_size", "batch_size")}


def _comparisons(settings: Sequence[Setting], number: dict[int, int]) -> Iterator[Row]:
    for comparison in comparisons_of(settings):
        parity = comparison.parity
        yield {
            **_place(comparison.jax),
            **_point(comparison.jax),
            "numerics": comparison.jax.case["numerics"] if parity else BEST_OF_ANY,
            "jax": number[id(comparison.jax)],
            "torch": number[id(comparison.torch)],
            "parity": {key: getattr(parity, key, None) for key in ("status", "error", "bound")},
            "refusal": comparison.refusal,
            "ratio": _framework_ratio(comparison.latency),
            "cpu_ratio": _framework_ratio(comparison.cpu),
            "gap_s": comparison.gap_s,
        }


def _knobs(settings: Sequence[Setting], number: dict[int, int]) -> Iterator[Row]:
    for effect in effects_of(settings):
        yield {
            "knob": effect.knob,
            **_place(effect.best),
            "backend": effect.best.case["backend"],
            **_point(effect.best),
            "value": effect.value,
            "row": number[id(effect.best)],
            "reference": effect.reference,
            "reference_row": number[id(effect.reference_best)],
            "ratio": _ratio(effect.ratio),
        }


def _crossovers(settings: Sequence[Setting]) -> Iterator[Row]:
    for setting, backend, crossing in crossings_of(settings):
        yield {
            **_place(setting),
            "batch_size": setting.case["batch_size"],
            "backend": backend,
            "metric": "latency",
            **{key: getattr(crossing, key) for key in ("a", "b", "status", "low_px", "high_px")},
        }


def _ratio(ratio: Estimate) -> Row:
    word = verdict((ratio.low, ratio.high))
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high, "verdict": word}


def _framework_ratio(ratio: Estimate | None) -> Row | None:
    if ratio is None:
        return None
    row = _ratio(ratio)
    return row | {"verdict": OF_JAX.get(row["verdict"], row["verdict"])}


def _rounded(value: Any) -> Any:
    """Rounds every float to 5 digits; whole numbers are counts, and stay as they are."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
