"""Pairs as a table, for the terminal and as Markdown: a row for each."""

import textwrap
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments import pairs
from vitcmp.records import Record
from vitcmp.report.text import UNKNOWN, Column, Fitted, number
from vitcmp.stats import median

COLUMNS = (
    (Column("backend", "backend"), Column("theirs_name", "theirs")),
    (Column("point", "point", is_wrapped=True),),
    (Column("ours_ms", "ours, ms", is_number=True), Column("theirs_ms", "theirs, ms", is_number=True)),
    (Column("ratio", "ratio", is_number=True), Column("interval", "95 %", is_number=True)),
    (Column("clock", "decides"), Column("other", "by the other", is_number=True)),
    (Column("n", "n", is_number=True), Column("outputs", "outputs", is_number=True)),
    (Column("verdict", "verdict on ours", is_wrapped=True),),
)
NOTES = (
    "Times are medians of wall time. The ratio is ours / theirs by the clock that decides, its interval of 95 % over "
    "processes (of one process: over its rounds, and ambiguous below 6 of them); n is processes x calls of ours; "
    "outputs: the largest difference over the largest value.",
)


def table_of(results: dict[str, list[Record]]) -> Fitted:
    """Returns a row for every pair: ours / theirs by the clock that decides, its interval, and the verdict on ours."""
    rows = [_row(records) for records in results.values() if records]
    return Fitted("Ours against theirs", COLUMNS, rows, NOTES)


def print_table(results: dict[str, list[Record]], console: Console | None = None) -> None:
    (console or Console()).print(table_of(results))


def _row(records: Sequence[Record]) -> dict[str, str]:
    pair, failed = records[-1]["pair"], [record for record in records if record["status"] != "ok"]
    row = dict.fromkeys((column.key for stack in COLUMNS for column in stack), UNKNOWN) | {
        "backend": pair["backend"],
        "point": pairs.point_of(pair),
        "theirs_name": pairs.name_of(pair["theirs"]),
        "outputs": _worst_error(records),
    }
    if failed:
        message = textwrap.shorten(failed[-1]["error"]["message"], 72, placeholder=" ...")
        return row | {"verdict": f"{failed[-1]['status']}: {message}"}
    result = pairs.compare_records(records)
    is_one_sided = result.verdict == "ambiguous" and result.rules_out_slower
    medians = {
        side: [median(np.concatenate(record["times"][side]["wall_s"])) for record in records] for side in pairs.SIDES
    }
    return row | {
        **{f"{side}_ms": number(1000 * median(values)) for side, values in medians.items()},
        "ratio": f"{result.ratio:.3f}",
        "interval": f"[{result.low:.3f}, {result.high:.3f}]",
        "clock": "CPU" if result.clock == "cpu_s" else "wall",
        "other": UNKNOWN if result.other_ratio is None else f"{result.other_ratio:.3f}",
        "n": f"{result.num_processes} x {result.num_values[0] // result.num_processes}",
        "verdict": f"{result.verdict}, not slower" if is_one_sided else result.verdict,
    }


def _worst_error(records: Sequence[Record]) -> str:
    """Returns how far apart the outputs were, over their largest, in the worst process."""
    errors = [record["outputs"]["error"] for record in records if record["outputs"]]
    return max((f"{error:.1e}" for error in errors if error is not None), key=float, default=UNKNOWN)
