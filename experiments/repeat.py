"""Do two sweeps of the same cases, one after the other, agree?

Command: python -m experiments.repeat --backend torch            (about 4 minutes on a 2-core CPU)
Expected: all medians of process CPU time agree within 3 %; where others use the cores, wall time need not.
Outputs: records under --out/first and --out/second, and a table of second / first. It goes on after a stop.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from vitcmp.cases import Case
from vitcmp.records import Record, RecordStore, latest
from vitcmp.stats import Estimate, ratio_interval
from vitcmp.usage import start

BACKEND = flags.DEFINE_string("backend", "torch", "What vitcmp.run takes.")
OUT = flags.DEFINE_string("out", "results/repeat", "The folder of both sweeps.")
SWEEP = flags.DEFINE_list("sweep", [], "Further flags of vitcmp.run, such as --models=vit_ti16.")
BOUND = 0.03


def main(argv: Sequence[str]) -> int:
    folders = [Path(OUT.value) / name for name in ("first", "second")]
    for folder in folders:
        command = [sys.executable, "-m", "vitcmp.run", f"--backend={BACKEND.value}", f"--out={folder}", *SWEEP.value]
        if code := subprocess.run(command).returncode:
            return code
    first, second = (latest(RecordStore(folder).open().load()) for folder in folders)
    table, worst = compare(first, second)
    console = Console()
    console.print(table)
    console.print(
        f"largest difference of CPU-time medians: {worst:.1%} ({'within' if worst <= BOUND else 'beyond'} {BOUND:.0%})"
    )
    return int(worst > BOUND)


def compare(first: dict[tuple[str, int], Record], second: dict[tuple[str, int], Record]) -> tuple[Table, float]:
    """Returns a row for every case that both have, and the largest relative difference of CPU-time medians."""
    table = Table("case", "wall, second / first", "CPU time, second / first", "used by others, %", title="Two sweeps")
    worst = 0.0
    for key in sorted(first.keys() & second.keys(), key=lambda key: first[key]["started_at"]):
        pair = first[key], second[key]
        if any(record["status"] != "ok" for record in pair):
            continue
        cpu = _ratio(pair, "cpu_s")
        worst = max(worst, abs(cpu.value - 1))
        others = ", ".join(f"{100 * record['contention']['others_cpu_share']:.0f}" for record in pair)
        wall = _ratio(pair, "wall_s")
        table.add_row(Case.from_json(pair[0]["case"]).describe(), _words(wall), _words(cpu), others)
    return table, worst


def _ratio(pair: tuple[Record, Record], clock: str) -> Estimate:
    first, second = (record["latency"][clock] for record in pair)
    return ratio_interval([second], [first])


def _words(ratio: Estimate) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


if __name__ == "__main__":
    start(main)
