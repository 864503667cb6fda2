"""The tables on screen: the best setting of each model, JAX against torch, and what failed."""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console, Group

from vitcmp.records import Record
from vitcmp.report.comparison import comparison_table
from vitcmp.report.summary import CONTEXT, Candidates, Setting, by_keys, candidates_of, settings_of
from vitcmp.report.text import UNKNOWN, Column, Fitted, Stacks, model_name, number, percent
from vitcmp.report.words import (
    POINT,
    STATED,
    bounds,
    choices,
    context,
    latency_ms,
    marks_notes,
    named,
    older_note,
    plural,
    rate,
    scaled,
    size,
)

LogOf = Callable[[Record], str]

BEST = (
    (Column("model", "model", is_wrapped=True), Column("size", "image, batch")),
    (Column("backend", "backend, numerics", is_wrapped=True), Column("setting", "best setting", is_wrapped=True)),
    (Column("latency", "latency, ms", True), Column("interval", "95 % interval", True)),
    (Column("calls", "calls", True), Column("runs", "runs", True)),
    (
        Column("images_per_s", "images/s", True),
        Column("gflop", "GFLOP/img", True),
        Column("peak_share", "of peak", True),
    ),
    (Column("activations", "activ., MB", True), Column("parameters", "param., MB", True)),
    (Column("status", "status", is_wrapped=True),),
)
FAILURES = (
    (Column("status", "status"),),
    (
        Column("case", "case", is_wrapped=True),
        Column("why", "why", is_wrapped=True),
        Column("log", "log", is_wrapped=True),
    ),
)


def print_report(console: Console, records: Sequence[Record], *, log_of: LogOf | None = None) -> None:
    """Prints every table that the records of the newest method version give. `log_of` gives the path of a log."""
    if not records:
        console.print("No records yet.")
        return
    if note := older_note(records):
        console.print(note, style="yellow", highlight=False)
    console.print(best_table(records))
    console.print(comparison_table(records))
    console.print(failures_table(records, log_of=log_of))


def best_table(records: Sequence[Record]) -> Group:
    """Shows, for every backend, model, image size and batch size, the setting of lowest median latency.

    One table for each device, kind of step and set of weights. A group in which nothing ran has its failures for a row.
    """
    return Group(*(_best(settings) for settings in by_keys(settings_of(records), *CONTEXT)))


def failures_table(records: Sequence[Record], *, log_of: LogOf | None = None) -> Group:
    """Shows what did not end well, why, and the log to read. Cases that differ in nothing but size share a row."""
    failed = [record for setting in settings_of(records) for record in setting.failed]
    alike: dict[tuple[str, str, str], list[Record]] = {}
    for record in failed:
        what = f"{named(record['case'])} {record['case']['mode']} {choices(record['case'])}"
        alike.setdefault((what, record["status"], _why(record)), []).append(record)
    rows = [_failure_row(*key, records, log_of) for key, records in alike.items()]
    return Group(*([Fitted(f"What did not run: {_counts(failed)}", FAILURES, rows)] if rows else []))


def _best(settings: Sequence[Setting]) -> Fitted:
    groups = candidates_of(settings)
    rows = [_best_row(group) for group in groups]
    stacks: Stacks = BEST
    has_peak = any(row["peak_share"] != UNKNOWN for row in rows)
    if not has_peak:
        stacks = [[column for column in stack if column.key != "peak_share"] for stack in BEST]
    peak = ["of peak: FLOP/s of images/s over the device's peak at these numerics."] if has_peak else []
    notes = [*_best_notes(groups), *peak, *marks_notes(group.best for group in groups if group.best)]
    title = f"Best setting of each model: {context(settings[0].case)}"
    return Fitted(title, stacks, rows, notes, POINT)


def _best_row(group: Candidates) -> dict[str, str]:
    case, best = group.case, group.best
    row = dict.fromkeys((column.key for stack in BEST for column in stack), UNKNOWN)
    row |= {"model": model_name(case["model"]), "backend": case["backend"], "size": size(case)}
    if best is None or best.latency is None:
        failure = f"{_counts(group.failed)}: {_message(group.failed[0])}" if group.failed else UNKNOWN
        short = textwrap.shorten(failure, 72, placeholder=" ...")
        return row | {"setting": textwrap.fill(short, 20), "status": "failed"}
    activations, parameters = (best.first("memory", f"{key}_bytes") for key in ("activation_peak", "parameters"))
    return row | {
        "backend": f"{case['backend']} {case['numerics']}",
        "setting": best.describe(*STATED[1:]),
        "latency": latency_ms(best),
        "interval": bounds(best.latency, 1e3),
        "calls": str(best.latency.num_values[0]),
        "runs": str(best.latency.num_runs[0]),
        "images_per_s": rate(best),
        "peak_share": percent(best.peak_share),
        "gflop": number(scaled(best.image_flops, 1e-9)),
        "activations": number(scaled(activations, 1e-6), digits=3),
        "parameters": number(scaled(parameters, 1e-6), digits=3),
        "status": "ok" if not best.failed else f"ok, {plural(len(best.failed), 'run')} failed",
    }


def _best_notes(groups: Sequence[Candidates]) -> list[str]:
    best = [group.best for group in groups if group.best]
    sources = sorted({f"{b.first('memory', 'activation_source')} ({b.case['backend']})" for b in best})
    versions = sorted({f"{b.case['backend']} {b.case['framework_version']}" for b in best})
    apart = ": never compare the two" if len(sources) > 1 else ""
    notes = [
        "latency: median over the calls, the device idle after each.",
        f"images/s: measured apart, with calls queued, {_samples(best)}; ± half the width of its 95 % interval.",
        "GFLOP/img: forward of one image, 2 per multiply-add, from the spec (another library's model: from its graph).",
        f"activ.: one call's peak beyond weights and inputs, as {', '.join(sources)}{apart}. MB: 10^6 bytes.",
        f"{UNKNOWN}: unknown. Measured with {', '.join(versions)}.",
    ]
    return notes if best else []


def _samples(best: Sequence[Setting]) -> str:
    counts = sorted(setting.images_per_s.num_values[0] for setting in best if setting.images_per_s)
    return (
        " to ".join(dict.fromkeys(map(str, counts[:1] + counts[-1:]))) + " samples" if counts else "where it could be"
    )


def _failure_row(what: str, status: str, why: str, records: Sequence[Record], log_of: LogOf | None) -> dict[str, str]:
    sizes = "; ".join(dict.fromkeys(size(record["case"]) for record in records))
    logs = [log_of(record) for record in records] if log_of else []
    more = f" and {len(logs) - 1} more" if len(logs) > 1 else ""
    return {"case": f"{what}: {sizes}", "status": status, "why": why, "log": f"{logs[0]}{more}" if logs else ""}


def _counts(failed: Iterable[Record]) -> str:
    """Returns `3 oom, 1 timeout`."""
    return ", ".join(f"{count} {status}" for status, count in Counter(record["status"] for record in failed).items())


def _why(record: Record) -> str:
    """Returns the type and the first line of the error."""
    kind = (record["error"] or {}).get("type")
    return f"{kind}: {_message(record)}" if kind else _message(record)


def _message(record: Record) -> str:
    return ((record["error"] or {}).get("message") or UNKNOWN).strip().partition("\n")[0]
