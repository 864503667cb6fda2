"""What does a folder of records look like on paper? Draws its figures, each as PNG and SVG.

  latency_by_size     latency of each model's best setting against image size, a panel for each batch size
  latency_by_flops    the same against the FLOPs of one image: FLOPs are not speed
  torch_over_jax      latency of torch over that of JAX, with its interval, where the outputs are equal

Command: pip install -e '.[figures]' && python -m experiments.figures experiments/results/<date>-<machine>     (seconds)
Expected: the points are those of the README's table; running it twice gives the same files to the byte.
Outputs: figures/ in the folder, or --out. Where the folder has several devices, kinds of step or sets of weights, each
         has its own files, numbered in the order in which they are said on the screen.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vitcmp.report.payload import payload_of, rows_of
from vitcmp.report.reading import Source, read_source
from vitcmp.report.rows import Row
from vitcmp.usage import start

flags.DEFINE_string("out", None, "The folder to draw into; without it, figures/ in the folder of records.")
FLAGS = flags.FLAGS
CONTEXT = "device", "mode", "weights"


def main(argv: Sequence[str]) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the package matplotlib is not installed; pip install 'vitcmp[figures]'")
    if len(argv) != 2 or not Path(argv[1]).is_dir():
        raise ValueError(f"name one folder of records, got {' '.join(argv[1:]) or 'none'}")
    folder = Path(argv[1])
    for path in draw(folder, Path(FLAGS.out) if FLAGS.out else folder / "figures"):
        print(path)
    return 0


def draw(folder: Path, out: Path) -> list[Path]:
    """Draws every figure that the folder's records give, and returns the files. Raises ValueError where none does."""
    source = read_source(folder.resolve())
    for fault in source.faults:
        print(f"{folder}: {fault}", file=sys.stderr)
    payload = payload_of([Source(source.name, source.records)])
    rows = rows_of(payload)
    contexts = list(dict.fromkeys(_context(row) for row in rows if row["latency_s"]))
    if not contexts:
        raise ValueError(f"{folder}: no record holds a measurement: there is nothing to draw")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, context in enumerate(contexts, start=1):
        suffix = f"_{i}" if len(contexts) > 1 else ""
        for name, figure in _figures(payload, rows, context):
            paths += _save(figure, out / f"{name}{suffix}")
    return paths


def _context(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in CONTEXT)


def _figures(payload: Row, rows: list[Row], context: tuple[Any, ...]) -> list[tuple[str, Any]]:
    from experiments.figure_panels import draw_by_flops, draw_by_size, draw_ratios  # matplotlib is an extra

    device, mode, weights = context
    title = f"{mode} on {device}, weights {weights[:20]}"
    here = [row for row in rows if _context(row) == context]
    comparisons = [c for c in payload["comparisons"] if _context(c) == context]
    counted = [row for row in here if row["image_flops"]]
    figures = [
        ("latency_by_size", draw_by_size, here),
        ("latency_by_flops", draw_by_flops, counted),
        ("torch_over_jax", draw_ratios, comparisons),
    ]
    return [(name, draw(shown, title)) for name, draw, shown in figures if shown]


def _save(figure: Any, stem: Path) -> list[Path]:
    """Saves both formats without a date, a version or anything drawn by chance: equal records give equal bytes."""
    from matplotlib import rc_context

    formats: dict[str, dict[str, Any]] = {
        ".png": {"dpi": 200, "metadata": {"Software": None}},
        ".svg": {"metadata": {"Date": None, "Creator": None}},
    }
    with rc_context({"svg.hashsalt": "vitcmp"}):
        for suffix, options in formats.items():
            figure.savefig(stem.with_suffix(suffix), bbox_inches="tight", **options)
    return [stem.with_suffix(suffix) for suffix in formats]


if __name__ == "__main__":
    start(main, takes_words=True)
