"""Packed tables are the same tables; a page of 50,000 settings stays below its limit."""

import random

from tests.browser.payloads import make_payload
from vitcmp.report.html import render_html
from vitcmp.report.packing import packed


def plain(column):
    """Does what core.js does."""
    if isinstance(column, list):
        return column
    if "runs" in column:
        pairs = zip(column["runs"], column["lengths"], strict=True)
        return [value for value, length in pairs for _ in range(length)]
    if "index" in column:
        return [column["values"][i] for i in column["index"]]
    known = iter(objects(column))
    return [next(known) if has else None for has in plain(column["has"])]


def objects(table):
    columns = {name: plain(column) for name, column in table["columns"].items()}
    return [{name: values[i] for name, values in columns.items()} for i in range(table["count"])]


def test_packed_tables_are_the_same_tables():
    payload = make_payload()
    page = packed(payload)
    for name in ("comparisons", "knobs", "crossovers"):
        assert objects(page[name]) == payload[name] and payload[name]
    for name, column in payload["settings"].items():
        assert plain(page["settings"][name]) == plain(column)
    assert {**page, **payload} == payload


def test_a_table_of_nothing_is_packed():
    page = packed(
        {"settings": {"model": {"values": [], "index": []}}, "comparisons": [], "knobs": [], "crossovers": []}
    )
    assert objects(page["knobs"]) == plain(page["settings"]["model"]) == []


def test_a_page_of_50_000_settings_is_below_15_mb():
    payload, draw = make_payload(), random.Random(0)
    turn = 50_000 // len(payload["settings"]["height"]) + 1
    noisy = ("_s", "_share", "_peak_bytes", "traffic_bytes")  # no two rows have one of these in common
    for name, column in payload["settings"].items():
        if isinstance(column, dict):
            column["index"] = column["index"] * turn
        elif name.endswith(noisy):
            size = 1e9 if name.endswith("bytes") else 1
            payload["settings"][name] = [float(f"{size * draw.random():.5g}") for _ in column * turn]
        else:
            payload["settings"][name] = column * turn
    for name, count in (("comparisons", 5000), ("knobs", 10_000), ("crossovers", 5000)):
        payload[name] = (payload[name] * 100)[:count]
    assert len(payload["settings"]["model"]["index"]) >= 50_000
    assert len(render_html(payload).encode()) < 15e6
