"""The tables of experiments.flops_audit, from its records. Pure functions."""

import csv
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.flop_counters import COUNTERS
from vitcmp.records import Record
from vitcmp.report.text import UNKNOWN, Column, Fitted

LABELS = {
    "torch_meta": "torch {}, meta device",
    "jaxpr": "jaxpr walk (jax {})",
    "torch_cpu": "torch {}, CPU",
    "xla": "XLA cost analysis (jaxlib {})",
    "fvcore": "fvcore {}",
    "gmacs": "timm's gmacs (fvcore {})",
    "torchprofile": "torchprofile {}",
    "deepspeed": "deepspeed {}",
}
FORGOTTEN = ("attention", "rel_pos", "depthwise")  # kinds that a counter may leave out as a whole
RATIO = ("vit_b16", "convnext_base")
PUBLISHED = Path(__file__).parent / "data" / "timm_gmacs.csv"
COLUMNS = (
    (Column("model", "model", is_wrapped=True), Column("size", "image")),
    (Column("counter", "counter"), Column("subject", "of")),
    (Column("gflop", "GFLOP", True), Column("error", "error", True)),
    (Column("why", "explained by", is_wrapped=True),),
)


def screen_table(records: Sequence[Record]) -> Fitted:
    """Shows every count in a row, with its error against the analytic count and what explains it."""
    rows = [_screen_row(record) for record in records]
    return Fitted("FLOPs of one image, by counter", COLUMNS, rows, ["MACs are doubled."], ("model", "size"))


def _screen_row(record: Record) -> dict[str, str]:
    return {
        "model": record["model"],
        "size": f"{record['image_size']} px, {record['mode']}",
        "counter": column_of(record),
        "subject": record["subject"],
        "gflop": f"{record['flops'] / 1e9:.4f}" if record["flops"] else UNKNOWN,
        "error": error_words(record),
        "why": explanation(record),
    }


def column_of(record: Record) -> str:
    """Returns the counter with the version of the package that it is of: `torchprofile 0.0.4`."""
    version = record["versions"][COUNTERS[record["counter"]].packages[0]] or ""
    return LABELS[record["counter"]].format(re.split(r"\+|\.post", version)[0]).strip()


def error_words(record: Record) -> str:
    """Returns the relative error, `exact` where there is none, or the status of a count that failed."""
    if record["status"] != "ok":
        return record["status"]
    if record["flops"] == record["analytic"]:
        return "exact"
    return percent(record["flops"] / record["analytic"] - 1)


def percent(share: float) -> str:
    digits = 1 if abs(share) >= 0.01 else 2 if abs(share) >= 1e-4 else 4
    return f"{100 * share:+.{digits}f} %"


def explanation(record: Record) -> str:
    """Says which kinds of the analytic count are missing as a whole, and what is left to explain."""
    if record["status"] != "ok":
        return record["error"]["message"].partition("\n")[0]
    omitted, rest = left_out(record["flops"], record["by_kind"])
    total = record["analytic"]
    without = [f"without {kind} ({percent(-record['by_kind'][kind] / total)})" for kind in omitted]
    return ", ".join(without + ([f"{percent(rest / total)} else"] if omitted and rest else []))


def left_out(flops: int, by_kind: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """Returns the kinds whose absence explains the count best, and what they leave unexplained."""
    kinds = [kind for kind in FORGOTTEN if kind in by_kind]
    subsets = itertools.chain.from_iterable(itertools.combinations(kinds, n) for n in range(len(kinds) + 1))
    excess = flops - sum(by_kind.values())
    rests = {subset: excess + sum(by_kind[kind] for kind in subset) for subset in subsets}
    best = min(rests, key=lambda subset: (abs(rests[subset]), len(subset)))
    return best, rests[best]


def markdown(records: Sequence[Record]) -> str:
    """Returns the page of the audit: errors by counter, the article's ratio, timm's published figures, and why."""
    records = _settled(records)
    parts = ["# FLOP audit", _head(records)]
    for mode, title in (("forward", "a forward pass"), ("train", "a training step")):
        rows = [record for record in records if record["mode"] == mode]
        if rows:
            parts += [f"## Error of {title}, against the analytic count", _errors(rows)]
            parts += [_ratios(rows)] if mode == "forward" else []
    parts += [_published(records), "## What the counters leave out, and what they add", _notes(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settled(records: Sequence[Record]) -> list[Record]:
    """Returns the last record of each count; a package that is absent is no column where it has been there once."""
    cells: dict[tuple[str, ...], Record] = {}
    for record in records:
        cells[(*_point(record), record["subject"], column_of(record))] = record
    kept = list(cells.values())
    present = {(record["counter"], record["subject"]) for record in kept if record["status"] == "ok"}
    return [r for r in kept if r["status"] != "not installed" or (r["counter"], r["subject"]) not in present]


def _point(record: Record) -> tuple[str, str, str]:
    return record["model"], record["image_size"], record["mode"]


def _head(records: Sequence[Record]) -> str:
    packages = sorted(
        {f"{name} {version}" for record in records for name, version in record["versions"].items() if version}
    )
    days = sorted({record["ended_at"][:10] for record in records if record["ended_at"]})
    return (
        "One image; 2 FLOPs per multiply-add (MACs are doubled), matmuls and convolutions only, executed padding "
        "included. Of two figures in a cell, the first is of our model and the second of timm's. "
        "Written from the records in this folder by `python -m experiments.flops_audit`, "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, with {', '.join(packages)}."
    )


def _errors(records: Sequence[Record]) -> str:
    columns = _columns(records)
    rows = []
    for point, cells in _by_point(records).items():
        model, image_size, _ = point
        rows.append([f"`{model}`", image_size, _analytic(cells), *(_cell(cells, column) for column in columns)])
    return table(["model", "px", "analytic, GFLOP", *columns], rows, left=1)


def _columns(records: Iterable[Record]) -> list[str]:
    order = list(COUNTERS)
    found = {column_of(record): order.index(record["counter"]) for record in records}
    return sorted(found, key=lambda column: (found[column], column))


def _by_point(records: Iterable[Record]) -> dict[tuple[str, str, str], dict[tuple[str, str], Record]]:
    points: dict[tuple[str, str, str], dict[tuple[str, str], Record]] = {}
    for record in records:
        points.setdefault(_point(record), {})[column_of(record), record["subject"]] = record
    return points


def _analytic(cells: dict[tuple[str, str], Record]) -> str:
    """Returns GFLOP, of ours and of timm's where they differ: both are right, of what each executes."""
    of = {subject: record["analytic"] for (_, subject), record in cells.items()}
    return " / ".join(dict.fromkeys(f"{of[subject] / 1e9:.4f}" for subject in ("ours", "timm") if subject in of))


def _cell(cells: dict[tuple[str, str], Record], column: str) -> str:
    words = [error_words(cells[column, subject]) for subject in ("ours", "timm") if (column, subject) in cells]
    return " / ".join(dict.fromkeys(words))


def _ratios(records: Sequence[Record]) -> str:
    """Shows what ViT-B/16 seems to cost, in ConvNeXt-Bs, by each counter: of timm's models where it counted those."""
    points, columns = _by_point(records), _columns(records)
    both = [size for model, size, mode in points if model == RATIO[0] and (RATIO[1], size, mode) in points]
    rows = []
    for image_size in both:
        vit, convnext = (points[model, image_size, "forward"] for model in RATIO)
        analytic = next(iter(vit.values()))["analytic"] / next(iter(convnext.values()))["analytic"]
        ratios = (_ratio(vit, convnext, column) for column in columns)
        rows.append([image_size, f"{analytic:.2f}x", *ratios])
    return "ViT-B/16 over ConvNeXt-B, by each counter:\n\n" + table(["px", "analytic", *columns], rows) if rows else ""


def _ratio(vit: dict[tuple[str, str], Record], convnext: dict[tuple[str, str], Record], column: str) -> str:
    for subject in ("timm", "ours"):
        pair = [cells.get((column, subject)) for cells in (vit, convnext)]
        if all(record and record["flops"] for record in pair):
            return f"{pair[0]['flops'] / pair[1]['flops']:.2f}x"  # type: ignore[index]
    return ""


def _published(records: Sequence[Record]) -> str:
    """Sets timm's published GMACs beside the analytic ones and those counted here."""
    points = _by_point(record for record in records if record["mode"] == "forward")
    published = read_published()
    files = sorted({file for by_file in published.values() for file in by_file})
    rows = []
    for (model, image_size), by_file in published.items():
        cells = points.get((model, image_size, "forward"))
        if cells:
            analytic = _gmacs(cells, "torch_meta")
            counted = (_gmacs(cells, counter) for counter in ("gmacs", "fvcore"))
            rows.append([f"`{model}`", image_size, analytic, *counted, *(by_file.get(file, "") for file in files)])
    heads = [f"published, {file.split('-')[4]}" for file in files]
    head = ["model", "px", "exact", "counted here, fused attention off", "on", *heads]
    title = "## timm's gmacs\n\nGMACs that timm publishes (experiments/data/README.md), and the same counter here:\n\n"
    return title + table(head, rows, left=1) if rows else ""


def _gmacs(cells: dict[tuple[str, str], Record], counter: str) -> str:
    for (_, subject), record in cells.items():
        if subject == "timm" and record["counter"] == counter and record["flops"]:
            return f"{record['flops'] / 2e9:.2f}"
    return ""


def read_published() -> dict[tuple[str, str], dict[str, str]]:
    """Returns timm's published GMACs by our model and image size, and by file."""
    published: dict[tuple[str, str], dict[str, str]] = {}
    with PUBLISHED.open(newline="") as file:
        for row in csv.DictReader(file):
            figures = published.setdefault((row["model"], row["image_size"]), {})
            figures[row["file"]] = f"{float(row['infer_gmacs']):.2f}"
    return published


def _notes(records: Sequence[Record]) -> str:
    asked = {record["counter"] for record in records}
    names = {name: re.sub(r" ?(\(.*\)|{})", "", label) for name, label in LABELS.items() if name in asked}
    return "\n".join(f"- **{label}**: {COUNTERS[name].note}." for name, label in names.items())


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int = 0) -> str:
    """Returns a Markdown table whose first `left` columns are aligned to the left, and the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))
