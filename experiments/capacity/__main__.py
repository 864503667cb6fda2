"""Does a task need resolution, or only compute? PaliGemma's experiment, for any backbone, data set and framework.

Each model is trained at `low`; at `high` on images first shrunk to `low` (down_up); at `high`; and, where a patch can
grow, at `low`'s tokens on `high`'s pixels (patch). What down_up gains over low is capacity, what high gains over
down_up is resolution (arXiv:2407.07726, section 5.7.1).

Command: python -m experiments.capacity                    a small complete study: 15 to 20 minutes on 2 cores
         python -m experiments.capacity --smoke            the same in a minute, of which nothing follows
         python -m experiments.capacity --backend torch --dataset oxford_iiit_pet --model vit_s16 --low 224 --high 448
Expected: glyphs/fine: all of the gain is resolution; glyphs/coarse: none; glyphs/crowded: capacity.
Outputs: records and a report under --out. It goes on after a stop, kill -9 too.
Exit codes: 0 all trained, 1 a run failed, 2 bad usage, 130 interrupted.
"""

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.capacity.arms import CELLS, make_arms
from experiments.capacity.data.recipes import resolution_notes, splits_of
from experiments.capacity.groups import groups_of
from experiments.capacity.output import write_report
from experiments.capacity.pixels import store_examples
from experiments.capacity.plan import Data, Local, Setting, make_runs
from experiments.capacity.pool import Pool, Run, read_progress
from experiments.capacity.schema import SCHEMA, Record, run_id, validate
from experiments.capacity.study import SMOKE, STUDY
from experiments.capacity.tables import markdown_report, print_report
from vitcmp.backend import BACKENDS, NUMERICS, PLATFORMS, Device, require_choice
from vitcmp.environment import num_cpus
from vitcmp.recipe import OPTIMIZERS
from vitcmp.records import RecordStore
from vitcmp.report.output import attempt
from vitcmp.resample import METHODS
from vitcmp.runner import Interrupt, probe
from vitcmp.usage import start

BACKEND = flags.DEFINE_list("backend", ["jax"], f"{', '.join(BACKENDS)}, or both: the same runs in each.")
DATASET = flags.DEFINE_multi_string(
    "dataset", None, "A data set, once each: TFDS' name, folder:PATH, glyphs/..., digit_canvas."
)
MODEL = flags.DEFINE_multi_string("model", None, "A backbone, as vitcmp.get_spec takes it; once a model.")
LOW = flags.DEFINE_integer("low", None, "The side of a small image, in pixels.")
HIGH = flags.DEFINE_integer("high", None, "The side of a large one.")
ARMS = flags.DEFINE_list("arms", list(CELLS), "The arms.")
SEEDS = flags.DEFINE_integer("seeds", None, "Seeds: of the first weights and of the order of the examples.")
EPOCHS = flags.DEFINE_integer("epochs", None, "Times that the training set is gone through.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images a step.")
TRAIN = flags.DEFINE_string("train_split", None, "The split to train on.")
TEST = flags.DEFINE_string("test_split", None, "The split to test on.")
OPTIMIZER = flags.DEFINE_string("optimizer", None, f"One of {', '.join(OPTIMIZERS)}.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", None, "The highest; half a cosine to 0 after the warm-up.")
WEIGHT_DECAY = flags.DEFINE_float("weight_decay", None, "Of kernels; AdamW's is multiplied by the learning rate.")
WARMUP = flags.DEFINE_integer("warmup_steps", None, "Steps of linear warm-up.")
CLIP = flags.DEFINE_float("clip_norm", None, "The gradient's largest norm.")
SMOOTHING = flags.DEFINE_float("label_smoothing", None, "Share of the label given to all classes.")
ACCUMULATE = flags.DEFINE_integer("accumulate", None, "Micro-batches a step.")
NUMERIC = flags.DEFINE_string("numerics", None, f"One of {', '.join(NUMERICS)}; for training bfloat16_mixed on a GPU.")
ATTENTION = flags.DEFINE_string("attention", None, "The attention kernel; the framework's first by default.")
METHOD = flags.DEFINE_string("method", None, f"How images are resized: {', '.join(METHODS)}.")
ANTIALIAS = flags.DEFINE_boolean("antialias", None, "Widen the kernel where an image shrinks.")
TRUNCATE = flags.DEFINE_boolean("truncate", None, "Cut off to whole grey levels after each resize.")
STRETCH = flags.DEFINE_boolean("stretch", None, "Stretch to a square; else the central square is taken.")
FLIP = flags.DEFINE_boolean("flip", False, "Mirror half of the training images.")
CROP = flags.DEFINE_list("crop_area", None, "Random crops of the training images: LEAST,MOST share of the area.")
WEIGHTS = flags.DEFINE_string("weights", None, "A checkpoint to start from: timm:NAME, a file; else from scratch.")
DATA_DIR = flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Where data sets are.")
MNIST_DIR = flags.DEFINE_string("mnist_dir", None, "A folder with MNIST's idx files, for digit_canvas.")
DEVICE = flags.DEFINE_string("device", "auto", f"One of {', '.join(PLATFORMS)}.")
NUM_DEVICES = flags.DEFINE_integer("num_devices", 1, "Devices that share each batch.")
NUM_THREADS = flags.DEFINE_integer("num_threads", 1, "CPUs of a run; on a CPU as many runs go at once as that allows.")
CROSS = flags.DEFINE_boolean("cross", True, "Test each model as every other arm too.")
SMOKE_FLAG = flags.DEFINE_boolean("smoke", False, "A minute of everything, for a machine that checks.")
RETRY = flags.DEFINE_boolean("retry", False, "Train again what failed.")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Show the plan, and train nothing.")
TIMEOUT_S = flags.DEFINE_float("timeout_s", 24 * 3600.0, "Seconds after which a run is ended.", 1.0, 2e6)
OUT = flags.DEFINE_string("out", "results/capacity", "The folder of records; what is there already is not run again.")


def main(argv: Sequence[str]) -> int:
    console = Console()
    local = Local(
        folder=OUT.value,
        data_dir=str(Path(DATA_DIR.value).expanduser()),
        mnist_dir=MNIST_DIR.value,
        weights=WEIGHTS.value,
        cross=CROSS.value,
    )
    store = RecordStore(OUT.value, schema=SCHEMA, validate=validate)
    if not DRY_RUN.value:
        store.open()
    groups = plan(console, make_settings(), local)
    left = pending(groups, store.load() if store.folder.exists() else [])
    num_runs, num_left = (sum(map(len, some)) for some in (groups, left))
    console.print(
        f"{num_runs} runs, {num_runs - num_left} already in {OUT.value}, {num_left} to train", highlight=False
    )
    if DRY_RUN.value:
        return 0
    with store.lock(), Interrupt() as interrupt:
        train(console, left, store, local, interrupt)
    records = store.load()
    print_report(records, console)
    (store.folder / "capacity.md").write_text(markdown_report(records), encoding="utf-8")
    write_page(console, store.folder, records, local)
    if interrupt.signal_number is not None:
        console.print("Stopped. The same command goes on from here.")
        return 128 + interrupt.signal_number
    wanted = {run_id(run) for runs in groups for run in runs}
    last = {record["run_id"]: record["status"] for record in records}
    return int(any(last[key] != "ok" for key in wanted))


def make_settings() -> list[Setting]:
    """Returns the small study, or what the flags ask for instead; raises one ValueError for what is not known."""
    study = SMOKE if SMOKE_FLAG.value else STUDY
    if DATASET.value or MODEL.value:
        models, datasets = MODEL.value or ["vit_s16"], DATASET.value
        if not datasets:
            raise ValueError("--model needs --dataset: what is it to be trained on?")
        study = tuple(default_setting(dataset, model) for dataset in datasets for model in models)
    given = {name: value for name, value in given_fields().items() if value is not None}
    return [dataclasses.replace(setting, **given, recipe={**setting.recipe, **given_recipe()}) for setting in study]


def default_setting(dataset: str, model: str) -> Setting:
    train, test = splits_of(dataset)
    return Setting(dataset=dataset, model=model, low=224, high=448, train=train, test=test)


def given_fields() -> dict[str, Any]:
    crop = tuple(map(float, CROP.value)) if CROP.value else None
    return {
        "low": LOW.value,
        "high": HIGH.value,
        "arms": tuple(ARMS.value),
        "seeds": SEEDS.value,
        "epochs": EPOCHS.value,
        "batch_size": BATCH_SIZE.value,
        "train": TRAIN.value,
        "test": TEST.value,
        "attention": ATTENTION.value,
        "method": METHOD.value,
        "antialias": ANTIALIAS.value,
        "truncate": TRUNCATE.value,
        "stretch": STRETCH.value,
        "augment": {"flip": FLIP.value, "crop_area": crop},
    }


def given_recipe() -> dict[str, Any]:
    given = {
        "optimizer": OPTIMIZER.value,
        "learning_rate": LEARNING_RATE.value,
        "weight_decay": WEIGHT_DECAY.value,
        "warmup_steps": WARMUP.value,
        "clip_norm": CLIP.value,
        "label_smoothing": SMOOTHING.value,
        "accumulate": ACCUMULATE.value,
        "numerics": NUMERIC.value,
    }
    return {name: value for name, value in given.items() if value is not None}


def plan(console: Console, settings: Sequence[Setting], local: Local) -> list[list[Run]]:
    """Returns the runs, those of one seed together, every seed's first; backends in turn."""
    for backend in BACKEND.value:
        require_choice("backend", backend, BACKENDS)
    require_choice("device", DEVICE.value, PLATFORMS)
    for setting in settings:
        make_arms(setting.model, setting.low, setting.high, setting.arms)
    described = [open_data(console, setting, local) for setting in settings]
    devices = {backend: probe(backend, DEVICE.value, weights_path=None, models=()) for backend in BACKEND.value}
    by_seed: dict[int, list[list[Run]]] = {}
    for setting, data in zip(settings, described, strict=True):
        for backend, device in devices.items():
            runs = make_runs(setting, data, device, backend=backend, local=local, **machine(device))
            for seed, group in enumerate(runs):
                by_seed.setdefault(seed, []).append(group)
    return [group for seed in sorted(by_seed) for group in by_seed[seed]]


def open_data(console: Console, setting: Setting, local: Local) -> dict[str, Any]:
    """Returns what the runs say of their data, and shows what a user should know of it."""
    data = Data.open(setting, local)
    notes = (*data.train.notes, *data.test.notes, *resolution_notes(data.test, low=setting.low, high=setting.high))
    for note in dict.fromkeys(notes):
        console.print(note, style="yellow", highlight=False, markup=False)
    return data.describe()


def machine(device: Device) -> dict[str, int | None]:
    return {"num_devices": NUM_DEVICES.value, "num_threads": NUM_THREADS.value if device.platform == "cpu" else None}


def pending(groups: Sequence[Sequence[Run]], records: Sequence[Record]) -> list[list[Run]]:
    """Returns the runs that no record has: none at all, an interrupted one, or with --retry none that is ok."""
    last = {record["run_id"]: record["status"] for record in records}
    again = {None, "interrupted"} | (set(last.values()) - {"ok"} if RETRY.value else set())
    left = ([run for run in runs if last.get(run_id(run)) in again] for runs in groups)
    return [runs for runs in left if runs]


def train(console: Console, groups: list[list[Run]], store: RecordStore, local: Local, interrupt: Interrupt) -> None:
    if not groups:
        return
    runs = [run for group in groups for run in group]
    with make_progress(console) as bar:
        total = sum(map(cost, runs))
        task = bar.add_task("", total=total, count=f"0/{len(runs)}", current="")
        done: dict[str, Run] = {}

        def report(record: Record) -> None:
            done[record["run_id"]] = record["run"]
            bar.console.print(f"{len(done)}/{len(runs)} {describe(record)}", highlight=False, markup=False)

        cpus = share_cpus(groups[0][0])
        pool = Pool(store=store, local=local, interrupt=interrupt, timeout_s=TIMEOUT_S.value, cpus=cpus, report=report)
        thread = threading.Thread(target=pool.train, args=(groups,))
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.5)
            seen = [(run, read_progress(store.folder, run)) for run in runs if run_id(run) not in done]
            under_way = [(run, said) for run, said in seen if said]
            completed = sum(map(cost, done.values()))
            completed += sum(cost(run) * said["step"] / said["total_steps"] for run, said in under_way)
            bar.update(task, completed=completed, count=f"{len(done)}/{len(runs)}", current=show(under_way))


def write_page(console: Console, folder: Path, records: Sequence[Record], local: Local) -> None:
    """Stores the pixels of some examples and writes report.html. What fails costs a line: the records are there."""
    notes: list[str] = []
    failures = {
        "examples are stored": attempt(lambda: notes.extend(store_examples(folder, groups_of(records)[0], local))),
        "report is written": attempt(lambda: notes.append(f"The report: {write_report(folder, records)}")),
    }
    notes += [f"No {what} ({why})" for what, why in failures.items() if why]
    for note in notes:
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)


def share_cpus(run: Run) -> list[list[int]]:
    """Returns a set of CPUs for each run at a time; on an accelerator one run at a time, pinned to nothing."""
    threads = run["num_threads"]
    if run["platform"] != "cpu":
        return [[]]
    cpus = sorted(os.sched_getaffinity(0))
    return [cpus[i * threads : (i + 1) * threads] for i in range(max(1, num_cpus() // threads))]


def cost(run: Run) -> float:
    """Returns how long a run takes, in a unit of its own: the pixels that the model sees."""
    side = run["low"] if run["arm"] in ("low", "patch") else run["high"]
    return float(int(side.split("x")[0]) ** 2 * run["recipe"]["total_steps"] * run["recipe"]["batch_size"])


def show(under_way: Sequence[tuple[Run, dict[str, Any]]]) -> str:
    return "; ".join(f"{name(run)} step {said['step']}, loss {said['loss']:.3f}" for run, said in under_way)


def name(run: Run) -> str:
    return f"{run['backend']} {run['dataset']} {run['model'].split(':')[0]} {run['arm']} seed {run['seed']}"


def describe(record: Record) -> str:
    if record["status"] != "ok":
        return f"{name(record['run'])}: {record['status']}: {record['error']['message'].splitlines()[0]}"
    seconds = record["stages_s"]["train"]
    return f"{name(record['run'])}: {100 * record['final']['accuracy']:.1f} % right, {seconds:.0f} s"


def make_progress(console: Console) -> Progress:
    columns = (TextColumn("{task.fields[count]}"), BarColumn(bar_width=12), TimeElapsedColumn(), TextColumn("gone,"))
    return Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[current]}", markup=False),
        console=console,
        refresh_per_second=1,
        speed_estimate_period=600,
    )


if __name__ == "__main__":
    start(main)
