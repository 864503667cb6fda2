"""The payload's long tables as the page holds them: in columns, which are a third of the bytes. core.js unpacks them.

A column is the list of its values; or {runs, lengths}, each value once for as many rows as follow one another; or
{values, index}, each distinct value once and for each row which it has; or, of dicts, {columns, has}.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

TABLES = ("comparisons", "knobs", "crossovers")


def packed(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the payload with its settings and its long tables packed; all else is as it was."""
    settings = {name: _column(_plain(column)) for name, column in payload["settings"].items()}
    return {**payload, "settings": settings, **{name: _table(payload[name]) for name in TABLES}}


def _plain(column: Any) -> list[Any]:
    return [column["values"][i] for i in column["index"]] if isinstance(column, dict) else column


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {"count": len(rows), "columns": {name: _column([row.get(name) for row in rows]) for name in names}}


def _column(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    if known and isinstance(known[0], dict):
        return {**_table(known), "has": _column([int(value is not None) for value in values])}
    runs = [(value, sum(1 for _ in run)) for value, run in itertools.groupby(values)]
    if 3 * len(runs) <= len(values):
        return {"runs": [value for value, _ in runs], "lengths": [length for _, length in runs]}
    distinct = {value: i for i, value in enumerate(dict.fromkeys(values))}
    if 4 * len(distinct) > len(values):
        return list(values)
    return {"values": list(distinct), "index": [distinct[value] for value in values]}
