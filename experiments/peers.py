"""Are our models as fast as everybody else's? Each against each library that has it, in one run, in one process.

Command: python -m experiments.peers --backend torch   (about 6 hours on a 2-core CPU; --budget_s cuts the dearest)
         python -m experiments.peers --backend jax     (about 7 hours; big_vision is found at BIG_VISION_PATH)
         python -m experiments.peers --backend torch --device gpu --numerics bfloat16 --image_sizes 224,512,1024
Expected: no point is `slower`, and only keras.applications' ResNet-50 `differs` (it is another model, v1).
Outputs: records and peers.md under --out, a row for each point and library: the ratio of times with its interval, n,
how far the outputs are apart, a verdict; then a row for each library. It goes on after a stop, and more --processes add
to those that are there; a changed model or another GPU wants a new --out.
Exit codes: 0 as expected, 1 a point is slower, failed or is left, 2 bad usage, 130 interrupted.

Equal on both sides: the weights (ours, drawn from seed 0 and converted to the library's names), the batch, the numerics
(and so the library that multiplies float32), the attention kernel, the layout, the compile mode, the threads, the
process, and the step: forward without gradients, or the same loss and AdamW. Dropout is 0; BatchNorm trains. Outputs
are compared first, against a derived bound: what is not equal is a row that says so, and is not timed.

The libraries come with pip install 'vitcmp[peers]'; one that is not installed is a row that says so.
"""

import sys
import time
from collections.abc import Sequence

from absl import flags
from rich.console import Console

from experiments import pairs
from experiments.pair_tables import print_table, table_of
from experiments.peer_models.points import Grid, is_expected, make_rule, seconds_left
from experiments.peer_models.registry import MODELS, PEERS
from experiments.peer_models.summary import summary_table
from vitcmp.backend import BACKENDS, MODES, NUMERICS
from vitcmp.cases import check_names
from vitcmp.environment import num_cpus
from vitcmp.records import Record
from vitcmp.runner import Interrupt
from vitcmp.usage import start

BACKEND = flags.DEFINE_enum("backend", "torch", BACKENDS, "The framework of ours and of theirs.")
PEER = flags.DEFINE_list("peers", None, f"The libraries; all of the backend's by default. Of {' '.join(PEERS)}.")
MODEL = flags.DEFINE_list("models", list(MODELS), "The models; a library takes those that it has.")
IMAGE_SIZES = flags.DEFINE_list("image_sizes", ["224", "512"], "In pixels; some libraries take squares only.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Images a call.")
MODE = flags.DEFINE_list("modes", list(MODES), "What a call is.")
DEVICE = flags.DEFINE_enum("device", "cpu", ("cpu", "gpu", "tpu"), "Where both sides run.")
NUMERIC = flags.DEFINE_enum("numerics", "float32", list(NUMERICS), "Of both sides; none that is mixed.")
COMPILE_MODE = flags.DEFINE_string("compile", None, "Of both sides; the backend's first by default.")
LAYOUT_NAME = flags.DEFINE_string("layout", None, "Of both sides; the backend's first by default.")
KERNEL = flags.DEFINE_string("attention", None, "Of both sides; by default what the library itself would take.")
PROCESSES = flags.DEFINE_integer("processes", None, "Fresh processes a point; by default 3, and up to 12 if unclear.")
NUM_THREADS = flags.DEFINE_integer("num_threads", None, "CPUs a child is pinned to; with 1, CPU time decides.")
OUT = flags.DEFINE_string("out", "results/peers", "The folder of records; what is there already is not run again.")
BUDGET_S = flags.DEFINE_float("budget_s", None, "No point starts that would end later, by its estimate.", 0.0)
TIMEOUT_S = flags.DEFINE_float("timeout_s", 1200.0, "Seconds after which a child is ended.", 1.0, 2e6)
RETRY = flags.DEFINE_boolean("retry", False, "Tries again what failed.")


def main(argv: Sequence[str]) -> int:
    wanted, rule = make_grid().make_pairs(), make_rule(PROCESSES.value)
    num_threads = pairs.check_threads(num_cpus() if NUM_THREADS.value is None else NUM_THREADS.value)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    store, start = pairs.open_store(OUT.value), time.monotonic()
    left_s = seconds_left(wanted, store.load(), rule, num_threads, retry=RETRY.value)
    console.print(f"{len(wanted)} points, {sum(map(bool, left_s))} to do: about {sum(left_s) / 3600:.1f} hours")
    progress = pairs.show_progress(console, len(wanted))
    budget_s = float("inf") if BUDGET_S.value is None else BUDGET_S.value
    rows: dict[str, list[Record]] = {}
    with store.lock(), Interrupt() as interrupt:
        for pair, pair_s in zip(wanted, left_s, strict=True):
            is_late = pair_s > 0 and time.monotonic() - start + pair_s > budget_s
            if interrupt.requested or is_late:
                break
            rows |= pairs.run_pairs(
                [pair],
                child_module="experiments.peer_models.child",
                store=store,
                interrupt=interrupt,
                rule=rule,
                num_threads=num_threads,
                platform=DEVICE.value,
                timeout_s=TIMEOUT_S.value,
                retry=RETRY.value,
                progress=progress,
            )
    status = report(console, rows, len(wanted), interrupt)
    (store.folder / "peers.md").write_text(markdown_report(store.load()), encoding="utf-8")
    return status


def report(console: Console, rows: dict[str, list[Record]], num_wanted: int, interrupt: Interrupt) -> int:
    print_table(rows, console)
    console.print(summary_table(record for records in rows.values() for record in records))
    if len(rows) < num_wanted:
        console.print(f"left to do: {num_wanted - len(rows)} points")
    if interrupt.requested:
        return 130
    return int(len(rows) < num_wanted or not all(map(is_expected, rows.values())))


def markdown_report(records: Sequence[Record]) -> str:
    """Returns the row of each library, and below the row of each point, of all that a folder holds."""
    rows = {key: list(processes.values()) for key, processes in pairs.by_pair(records).items()}
    return f"{summary_table(records).to_markdown()}\n\n{table_of(rows).to_markdown()}\n"


def make_grid() -> Grid:
    """Returns what the flags ask for, each value once. Raises one ValueError for all of them that are not known."""
    lists = {"models": MODEL, "image_sizes": IMAGE_SIZES, "batch_sizes": BATCH_SIZES, "modes": MODE}
    given = {name: tuple(dict.fromkeys(flag.value or ())) for name, flag in lists.items()}
    single = {"attention": KERNEL.value, "layout": LAYOUT_NAME.value, "compile": COMPILE_MODE.value}
    settings = {name: value and [value] for name, value in single.items()}
    check_names({**given, **settings, "peers": PEER.value}, (BACKEND.value,))
    return Grid(
        backend=BACKEND.value,
        peers=tuple(dict.fromkeys(PEER.value)) if PEER.value else None,
        models=given["models"],
        image_sizes=given["image_sizes"],
        batch_sizes=tuple(map(int, given["batch_sizes"])),
        modes=given["modes"],
        device=DEVICE.value,
        numerics=NUMERIC.value,
        **single,
    )


if __name__ == "__main__":
    start(main)
