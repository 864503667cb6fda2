"""The figures of experiments/figures.py in matplotlib: colour, marker and dash tell models and frameworks apart."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, ScalarFormatter

from vitcmp.report.rows import Row

# Okabe and Ito's colours, without the yellow that is not seen on paper; each with a marker of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: dict[str, Any] = {"jax": "-", "torch": (0, (4, 2))}
NAMES = {"jax": "JAX", "torch": "torch"}
GREY = "#555555"
# What is said of a setting that did not run; above the axes, by its first letter.
FAILED = {
    "oom": "Memory ran out",
    "timeout": "Timed out",
    "unsupported": "Unsupported",
    "crashed": "Crashed",
    "error": "Error",
    "interrupted": "Interrupted",
}
SAME_WITHIN = 1.03  # of stats.verdict: what counts as the same
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 7, 10, 20, 50)
Series = dict[tuple[str, str], list[Row]]


def draw_by_size(rows: Sequence[Row], title: str) -> Figure:
    figure = _draw(rows, title, _side_px, "image size, px (side of a square of its area)")
    sizes = sorted({round(_side_px(row)) for row in rows})
    for axes in figure.axes:
        axes.xaxis.set_major_locator(FixedLocator(_apart(sizes)))
        axes.xaxis.set_minor_locator(FixedLocator(sizes))
    return figure


def draw_by_flops(rows: Sequence[Row], title: str) -> Figure:
    return _draw(rows, title, lambda row: row["image_flops"] / 1e9, "GFLOP of one image's forward pass")


def draw_ratios(comparisons: Sequence[Row], title: str) -> Figure:
    """Draws a line for each comparison: the ratio and its interval, or why there is none."""
    figure = Figure(figsize=(7, 1.2 + 0.28 * len(comparisons)))
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.axvspan(1 / SAME_WITHIN, SAME_WITHIN, color="#dddddd", zorder=0)
    axes.axvline(1, color="#888888", linewidth=0.8, zorder=1)
    for y, comparison in enumerate(comparisons):
        _draw_ratio(axes, y, comparison)
    axes.set_yticks(range(len(comparisons)), [_label(c) for c in comparisons], fontsize=7)
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    _ratio_ticks(axes)
    axes.set_xlabel(
        "latency, torch / JAX, with its interval (right of 1: JAX is faster; grey: 3 %, the same)", fontsize=8
    )
    axes.set_title(title, fontsize=9)
    return figure


def _draw(rows: Sequence[Row], title: str, x_of: Any, x_label: str) -> Figure:
    """Draws a panel for each batch size, all of one scale, and one legend."""
    batches = sorted({row["batch_size"] for row in rows})
    figure = Figure(figsize=(max(5.0, 3.4 * len(batches)), 4.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(batches)), sharex=True, sharey=True, squeeze=False)[0]
    looks = _looks(rows)
    places = [x_of(row) for row in rows]
    for axes, batch_size in zip(panels, batches, strict=False):
        here = [row for row in rows if row["batch_size"] == batch_size]
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(min(places) / 1.15, 1.15 * max(places))
        series = _series(here)
        for (model, backend), points in series.items():
            _draw_series(axes, points, looks[model], backend, x_of)
        num_failed = _draw_failures(axes, series, looks, x_of)
        for axis in (axes.xaxis, axes.yaxis):
            _plain_numbers(axis)
        axes.set_xlabel(x_label, fontsize=8)
        axes.set_title(f"batch {batch_size}", fontsize=8, pad=6 + 9 * num_failed)
        axes.grid(color="#dddddd", linewidth=0.5, which="major")
        axes.tick_params(labelsize=7, which="both")
    panels[0].set_ylabel("latency, ms (median, with its interval)", fontsize=8)
    figure.suptitle(title, fontsize=9)
    _add_legend(figure, rows, looks)
    return figure


def _looks(rows: Iterable[Row]) -> dict[str, tuple[str, str]]:
    models = dict.fromkeys(row["model"] for row in rows)
    return {model: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, model in enumerate(models)}


def _series(rows: Iterable[Row]) -> Series:
    """Returns for each model and backend the best row of each image size, or the first that failed where none ran."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = row["model"], row["backend"], row["image_size"]
        if key not in best or _rank(row) < _rank(best[key]):
            best[key] = row
    series: Series = {}
    for (model, backend, _), row in best.items():
        series.setdefault((model, backend), []).append(row)
    return {key: sorted(points, key=_side_px) for key, points in series.items()}


def _rank(row: Row) -> float:
    return row["latency_s"] or math.inf


def _side_px(row: Row) -> float:
    return math.sqrt(row["height"] * row["width"])


def _draw_series(axes: Axes, points: Sequence[Row], look: tuple[str, str], backend: str, x_of: Any) -> None:
    """Draws a line with error bars, JAX's filled and solid, torch's hollow and dashed."""
    colour, marker = look
    timed = [row for row in points if row["latency_s"]]
    ms = [1e3 * row["latency_s"] for row in timed]
    below = [1e3 * (row["latency_s"] - row["latency_low_s"]) for row in timed]
    above = [1e3 * (row["latency_high_s"] - row["latency_s"]) for row in timed]
    style = {"color": colour, "marker": marker, "linestyle": DASHES.get(backend, ":"), **_marker(colour, backend)}
    axes.errorbar([x_of(row) for row in timed], ms, yerr=[below, above], capsize=2, elinewidth=0.8, **style)


def _draw_failures(axes: Axes, series: Series, looks: dict[str, tuple[str, str]], x_of: Any) -> int:
    """Writes above the axes what became of what did not run, as `M/T`, JAX's first; returns of how many models.

    Each model has a line of its own there; `-` is a framework that ran.
    """
    failed: dict[str, dict[float, dict[str, str]]] = {}
    for (model, backend), points in series.items():
        for row in points:
            if not row["latency_s"]:
                failed.setdefault(model, {}).setdefault(x_of(row), {})[backend] = FAILED.get(row["status"], "?")[0]
    backends = sorted({backend for _, backend in series})
    place: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False, "va": "center", "ha": "center"}
    for i, (model, letters) in enumerate(failed.items()):
        for x, of in letters.items():
            text = "/".join(of.get(backend, "-") for backend in backends)
            at: dict[str, Any] = {"xy": (x, 1), "xycoords": axes.get_xaxis_transform(), "xytext": (0, 6 + 9 * i)}
            axes.annotate(text, color=looks[model][0], fontsize=6, **at, **place)
    return len(failed)


def _marker(colour: str, backend: str) -> dict[str, Any]:
    return {"markersize": 4, "linewidth": 1.2, "markerfacecolor": colour if backend == "jax" else "white"}


def _add_legend(figure: Figure, rows: Sequence[Row], looks: dict[str, tuple[str, str]]) -> None:
    models = [
        Line2D([], [], color=colour, marker=marker, markersize=4, label=_short(model))
        for model, (colour, marker) in looks.items()
    ]
    backends = sorted({row["backend"] for row in rows})
    dashes = [
        Line2D([], [], color=GREY, marker="o", linestyle=DASHES.get(b, ":"), label=NAMES.get(b, b), **_marker(GREY, b))
        for b in backends
    ]
    panels = [[row for row in rows if row["batch_size"] == size] for size in {row["batch_size"] for row in rows}]
    shown = [row for panel in panels for points in _series(panel).values() for row in points]
    statuses = {row["status"] for row in shown if not row["latency_s"]}
    words = [FAILED[status] for status in FAILED if status in statuses]
    failed = [Line2D([], [], color=GREY, marker=f"${word[0]}$", linestyle="", label=word) for word in words]
    handles = [*models, *dashes, *failed]
    columns = min(4, len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7)


def _draw_ratio(axes: Axes, y: int, comparison: Row) -> None:
    ratio = comparison["ratio"]
    if ratio is None:
        axes.text(1, y, f"refused: {comparison['refusal']}"[:70], fontsize=6, ha="center", va="center", style="italic")
        return
    colour = {"JAX faster": COLOURS[0], "torch faster": COLOURS[1]}.get(ratio["verdict"], GREY)
    marker = {"JAX faster": ">", "torch faster": "<"}.get(ratio["verdict"], "o")
    bars = [[ratio["value"] - ratio["low"]], [ratio["high"] - ratio["value"]]]
    fill = "white" if ratio["verdict"] == "ambiguous" else colour
    axes.errorbar([ratio["value"]], [y], xerr=bars, color=colour, marker=marker, mfc=fill, markersize=5, capsize=2)


def _label(comparison: Row) -> str:
    c = comparison
    return f"{_short(c['model'])}, {c['image_size']} px, batch {c['batch_size']}, {c['numerics']}"


def _short(model: str) -> str:
    """Returns the name without overrides that would fill the page; `$` would begin a formula."""
    text = model if len(model) <= 40 else f"{model[:37]}..."
    return "".join(_printable(text)).replace("$", r"\$")


def _printable(text: str) -> Iterator[str]:
    yield from (c if c.isprintable() else "?" for c in text)


def _apart(sizes: Sequence[int]) -> list[int]:
    """Returns the sizes that can be written beside each other on a logarithmic axis: each at least 12 % larger."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size > 1.12 * kept[-1]:
            kept.append(size)
    return kept


def _ratio_ticks(axes: Axes) -> None:
    """Marks the ratios of RATIOS that are within what is drawn, and 1 and its neighbours at the least."""
    low, high = axes.get_xlim()
    low, high = min(low, 0.9), max(high, 1.1)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([ratio for ratio in RATIOS if low <= ratio <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=7)


def _plain_numbers(axis: Any) -> None:
    """Writes 0.5, 1, 2, 5, 10 instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
