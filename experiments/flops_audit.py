"""Which FLOP counters can be believed, and by how much do the others err?

Counts the FLOPs of a forward pass of one image (or of a training step) by eight counters, each in a child process, and
holds them against the analytic count of vitcmp/flops.py: 2 per multiply-add, matmuls and convolutions only.

Command: pip install -e '.[audit]' && python -m experiments.flops_audit
         (about 25 minutes on one core, most of it at 1024 px; `--models vit_b16 --sizes 224` takes one minute)
         With another torch or torchprofile installed, the same command adds its columns.
Expected: torch on the meta device and the walk over the jaxpr are exact. The article's counter, torchprofile 0.0.4,
          gives ViT-B/16 at 1024 px 47 % too little, as if it cost 1.09x of ConvNeXt-B: it costs 2.06x. fvcore leaves
          out the same attention, which is 4 % at 224 px. XLA's analysis is a few per cent off, either way, and counts a
          loop's body once: our attention on a CPU loops over heads from 512 tokens on, so ViT-B at 1024 px gets 43 %
          too little.
Outputs: records (JSON lines) and audit.md under --out, and tables on screen. It goes on after a stop.
Exit codes: 0 all counted but what is not installed or not supported, 1 a count failed, 2 bad usage, 130 interrupted.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.progress import track

from experiments.flop_counters import COUNTERS, SCHEMA, Question, key_of, latest, validate
from experiments.flops_tables import markdown, screen_table
from experiments.pairs import versions
from vitcmp.backend import require_choice
from vitcmp.cases import timestamp
from vitcmp.records import Record, RecordStore
from vitcmp.runner import Interrupt, child_env, classify_end, count_oom_kills, last_words, run_child
from vitcmp.specs import format_image_size, parse_image_size
from vitcmp.usage import start

# Models and sizes that people quote; the article's at its smallest size of interest and at its largest.
GRID = {
    "vit_b16": ("224", "384", "512", "1024"),
    "vit_ti16": ("224",),
    "vitdet_b16:neck_dim=256,num_classes=0": ("1024",),
    "convnext_base": ("224", "1024"),
    "resnet50": ("224", "1024"),
    "bit_r50x1": ("224",),
}
MODES = ("forward", "train")
EXPECTED = ("ok", "not installed", "unsupported")
WORKER = (sys.executable, "-m", "experiments.flop_counters")

flags.DEFINE_multi_string("models", [], f"A model, as get_spec takes it; give it once a model. All: {' '.join(GRID)}.")
flags.DEFINE_list("sizes", [], "Image sizes; without it, those of the grid.")
flags.DEFINE_list("counters", list(COUNTERS), "Counters.")
flags.DEFINE_enum("mode", "forward", MODES, "What is counted: a forward pass, or a training step.")
flags.DEFINE_string("out", "results/flops", "The folder of records and of audit.md; an audit there is continued.")
flags.DEFINE_integer("num_threads", 1, "Threads of a child: nothing is timed, so it may leave cores to others.")
flags.DEFINE_float("timeout_s", 1800.0, "Seconds after which a count is ended.")
flags.DEFINE_boolean("retry", False, "Count again what failed.")
FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> int:
    console = Console()
    questions = [*plan(FLAGS.models, FLAGS.sizes, FLAGS.counters, FLAGS.mode)]
    store = RecordStore(FLAGS.out, schema=SCHEMA, validate=validate).open()
    with store.lock(), Interrupt() as interrupt:
        done = latest(store.load())
        left = [record for record in questions if is_pending(done.get(key_of(record)), FLAGS.retry)]
        console.print(f"{len(questions)} counts, {len(left)} to do", highlight=False)
        for record in track(left, "counting", console=console):
            record = ask(record, store.folder, interrupt)
            store.append(record)
            console.print(describe(record), highlight=False, markup=False)
            if interrupt.requested:
                return 130
        records = store.load()
    console.print(screen_table([*latest(records).values()]))
    (store.folder / "audit.md").write_text(markdown(records))
    console.print(f"written: {store.folder / 'audit.md'}", highlight=False)
    asked = (latest(records)[key_of(record)] for record in questions)
    return int(any(record["status"] not in EXPECTED for record in asked))


def plan(models: Sequence[str], sizes: Sequence[str], counters: Sequence[str], mode: str) -> Iterator[Record]:
    """Yields a record to be filled in for every count. Raises ValueError for an unknown model, size or counter."""
    for counter in counters:
        require_choice("counters", counter, tuple(COUNTERS))
    for model in models or GRID:
        for size in sizes or GRID.get(model, ("224",)):
            image_size = format_image_size(parse_image_size(size))
            for name in counters:
                for subject in COUNTERS[name].subjects if mode in COUNTERS[name].modes else ():
                    question = Question(model=model, image_size=image_size, mode=mode, subject=subject)
                    by_kind = question.analytic()
                    yield {
                        "schema": SCHEMA,
                        **dataclasses.asdict(question),
                        "counter": name,
                        "versions": versions(*dict.fromkeys((*COUNTERS[name].packages, *needed(subject)))),
                        "status": "error",
                        **dict.fromkeys(("error", "counted", "flops", "ended_at", "seconds")),
                        "analytic": sum(by_kind.values()),
                        "by_kind": by_kind,
                    }


def needed(subject: str) -> tuple[str, ...]:
    return ("timm",) if subject == "timm" else ()


def ask(record: Record, folder: Path, interrupt: Interrupt) -> Record:
    """Counts once, in a child, and returns the record, whatever became of the child."""
    absent = [package for package, version in record["versions"].items() if version is None]
    if absent:
        return failed(record, "not installed", f"pip install {' '.join(absent)}")
    log = folder / "logs" / f"{record['counter']}-{record['subject']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(FLAGS.num_threads)
    env = child_env(None, platform="cpu") | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    kills = count_oom_kills()
    outcome = run_child(WORKER, {"record": record}, log=log, interrupt=interrupt, timeout_s=FLAGS.timeout_s, env=env)
    if outcome.result is not None and not validate(outcome.result):
        return outcome.result
    status, message = classify_end(outcome, interrupt, count_oom_kills() > kills, FLAGS.timeout_s)
    return failed(record, status, f"{message}\n{last_words(log)}")


def failed(record: Record, status: str, message: str) -> Record:
    error = {"type": None, "message": message.strip(), "traceback": None, "stage": None}
    return {**record, "status": status, "error": error, "ended_at": timestamp()}


def is_pending(record: Record | None, retry: bool) -> bool:
    return record is None or record["status"] == "interrupted" or (retry and record["status"] != "ok")


def describe(record: Record) -> str:
    what = f"{record['model']} {record['image_size']} px, {record['counter']} of {record['subject']}"
    if record["status"] == "ok":
        return f"{what}: {record['flops'] / 1e9:.6g} GFLOP, {record['flops'] / record['analytic'] - 1:+.3%}"
    return f"{what}: {record['status']}: {record['error']['message'].splitlines()[0]}"


if __name__ == "__main__":
    start(main)
