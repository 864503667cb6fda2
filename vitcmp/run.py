"""Sweeps vision backbones over image size, batch, numerics, attention kernel, compiler and layout; keeps every result.

  python -m vitcmp.run --backend jax                  the default sweep on the device found
  python -m vitcmp.run --backend torch                adds the other half: parity, and JAX against torch
  python -m vitcmp.run --backend jax,torch --runs 3   both sides interleaved, in 3 fresh processes each

A sweep can be stopped at any moment (Ctrl-C, kill -9): the same command goes on where it stopped. Records are JSON
lines under --out, and report.html there shows them. Exit codes: 0 all well, 1 some cases failed, 2 bad usage, 130
interrupted.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from vitcmp.backend import ATTENTION, BATCH_NORM, COMPILE, LAYOUT, MODES, NUMERICS, PLATFORMS, Device, require_choice
from vitcmp.cases import PRESETS, Case, Grid, check_names, estimate_s, get_preset, interleave, make_cases
from vitcmp.checkpoints import weights_id
from vitcmp.records import Record, RecordStore, latest
from vitcmp.report.output import write_report
from vitcmp.report.tables import print_report
from vitcmp.report.text import duration
from vitcmp.runner import Interrupt, Job, ProbeError, job_log, plan_jobs, probe, run_jobs
from vitcmp.specs import NAME_PATTERNS
from vitcmp.stats import median
from vitcmp.usage import start


def _names(options: dict[str, tuple[str, ...]]) -> str:
    return "; ".join(f"{backend}: {' '.join(names)}" for backend, names in options.items())


flags.DEFINE_list("backend", None, "jax, torch, or jax,torch: both, their sides of a point one after the other.")
flags.DEFINE_string("models", None, f"Models, as name or name:field=value,...; names: {NAME_PATTERNS}.")
flags.DEFINE_list("image_sizes", None, "Image sizes in pixels: 224, or height x width as 96x160.")
flags.DEFINE_list("batch_sizes", None, "Images a batch.")
flags.DEFINE_list("numerics", None, f"Numerics: {' '.join(NUMERICS)}.")
flags.DEFINE_list("attention", None, f"Attention kernels, each forced. {_names(ATTENTION)}.")
flags.DEFINE_list("compile", None, f"Compilers. {_names(COMPILE)}.")
flags.DEFINE_list("layout", None, f"Layouts of convolutional models. {_names(LAYOUT)}.")
flags.DEFINE_list("batch_norm", None, f"Of ResNets, forward only: {' '.join(BATCH_NORM)} (into the convolutions).")
flags.DEFINE_string("mode", None, f"What a step is: {' or '.join(MODES)} (forward, backward and AdamW).")
flags.DEFINE_string("preset", "quick", f"What the other flags override: {', '.join(PRESETS)}.")
flags.DEFINE_string("device", "auto", f"One of {', '.join(PLATFORMS)}.")
flags.DEFINE_string(
    "weights",
    None,
    "A checkpoint (.safetensors, .pth, .npz) for all models, FILE:SUBTREE, timm:NAME or timm:NAME:FILE; without it, "
    "drawn from seed 0.",
)
flags.DEFINE_string("out", "results", "The folder of records (*.jsonl) and logs; a sweep there is continued.")
flags.DEFINE_float("timeout_s", 900.0, "Seconds after which a case is ended and recorded as timeout.")
flags.DEFINE_float("budget_s", None, "Seconds for this sweep: no case is started that is not expected to end by then.")
flags.DEFINE_integer("runs", 1, "Fresh processes a case; 3 or more give the spread between processes.")
flags.DEFINE_boolean("retry", False, "Run cases again whose last record is not ok.")
flags.DEFINE_boolean("dry_run", False, "Show the plan, and run nothing.")
FLAGS = flags.FLAGS
MAX_TIMEOUT_S = 2e6  # what poll() takes, in milliseconds


@dataclasses.dataclass(frozen=True)
class Plan:
    """What this command stands for, and what of it is left to do."""

    devices: dict[str, Device]
    cases: list[Case]
    jobs: list[Job]
    records: list[Record]

    @property
    def estimate_s(self) -> float:
        return sum(estimate_s(job.case) for job in self.jobs)


def main(argv: Sequence[str]) -> int:
    console = Console(soft_wrap=False)
    check_flags(argv)
    store = RecordStore(FLAGS.out)
    if FLAGS.dry_run:
        show_plan(console, make_plan(store))
        return 0
    with store.open().lock():
        plan = make_plan(store)
        for note in store.notes:
            console.print(note, style="yellow", highlight=False, markup=False)
        show_plan(console, plan)
        return sweep(console, plan, store)


def check_flags(argv: Sequence[str]) -> None:
    """Raises one ValueError with everything that is wrong with the command line, before a framework is started."""
    faults = [f"unexpected argument {word!r}: flags start with -- and lists are joined by commas" for word in argv[1:]]
    if not FLAGS.backend:
        faults.append("--backend is needed: jax, torch, or jax,torch")
    for name in ("timeout_s", "budget_s", "runs"):
        value = getattr(FLAGS, name)
        if value is not None and not value > 0:
            faults.append(f"--{name}={value} must be more than 0")
    if FLAGS.timeout_s > MAX_TIMEOUT_S:
        faults.append(f"--timeout_s={FLAGS.timeout_s} must be {MAX_TIMEOUT_S:g} at most, three weeks")
    if FLAGS.weights and not FLAGS.models:
        faults.append("--weights needs --models: a checkpoint is of one kind of model")
    checks = (
        (require_choice, "preset", FLAGS.preset, PRESETS),
        (require_choice, "device", FLAGS.device, PLATFORMS),
        (check_names, given_axes(), tuple(FLAGS.backend or ())),
        (weights_id, FLAGS.weights) if FLAGS.weights else (len, ()),
    )
    for function, *arguments in checks:
        try:
            function(*arguments)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))


def given_axes() -> dict[str, Any]:
    """Returns the axes of the grid that the command line gives; the others are the preset's."""
    axes = ("image_sizes", "batch_sizes", "numerics", "attention", "compile", "layout", "batch_norm", "mode")
    return {"models": split_models(FLAGS.models), **{axis: getattr(FLAGS, axis) for axis in axes}}


def split_models(text: str | None) -> tuple[str, ...] | None:
    """Splits at commas, not between a model's own fields: `vit_b16:pool=gap,depth=6,resnet50` is two models."""
    if text is None:
        return None
    models: list[str] = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        is_field = "=" in item and ":" not in item
        if is_field and models:
            models[-1] += ("," if ":" in models[-1] else ":") + item
        else:
            models.append(item)
    return tuple(models)


def make_plan(store: RecordStore) -> Plan:
    """Asks each backend for its device, makes the whole grid, and subtracts what the records already have."""
    records = store.load()
    devices, cases = {}, []
    axes = given_axes()
    asked = {name: tuple(axes[name] or ()) for name in ("models", "image_sizes")}
    for backend in dict.fromkeys(FLAGS.backend):
        device = probe(backend, FLAGS.device, weights_path=FLAGS.weights, **asked)
        devices[backend] = device
        grid = override(get_preset(FLAGS.preset, device.platform), axes)
        cases += make_cases(grid, backend, device, framework_version=device.versions[backend])
    if not cases:
        raise ValueError("the grid is empty: none of these numerics and kernels is to be had on this device")
    cases = interleave(cases)
    jobs = plan_jobs(cases, records, runs=FLAGS.runs, retry=FLAGS.retry)
    return Plan(devices, cases, jobs, records)


def override(preset: Grid, axes: dict[str, Any]) -> Grid:
    """Replaces the preset's axes by those that were given."""
    plain = ("models", "image_sizes", "numerics", "batch_norm")
    given: dict[str, Any] = {name: tuple(axes[name]) for name in plain if axes[name]}
    if axes["batch_sizes"]:
        given["batch_sizes"] = tuple(int(size) for size in axes["batch_sizes"])
    for axis, options in (("attention", ATTENTION), ("compile", COMPILE), ("layout", LAYOUT)):
        if axes[axis]:
            given[axis] = {name: tuple(n for n in axes[axis] if n in offered) for name, offered in options.items()}
    if axes["mode"]:
        given["mode"] = axes["mode"]
    if FLAGS.weights:
        given["weights"] = weights_id(FLAGS.weights)
    named = tuple(axis for axis in ("numerics", "attention", "compile", "batch_norm") if axes[axis])
    return dataclasses.replace(preset, **given, named=named)


def show_plan(console: Console, plan: Plan) -> None:
    for backend, device in plan.devices.items():
        threads = f", {device.num_threads} threads" if device.num_threads else ""
        versions = ", ".join(f"{name} {version}" for name, version in device.versions.items() if len(version) < 30)
        console.print(f"[bold]{backend}[/] on {device.name} ({device.platform}{threads}); {versions}", highlight=False)
    if len({device.name for device in plan.devices.values()}) > 1:
        console.print("[yellow]The backends found different devices: none of their points can be compared.[/]")
    total = len(plan.cases) * FLAGS.runs
    console.print(
        f"{len(plan.cases)} cases x {FLAGS.runs} run{'s' * (FLAGS.runs > 1)}, {total - len(plan.jobs)} already in "
        f"{FLAGS.out}, {len(plan.jobs)} to run: about {duration(plan.estimate_s)}",
        highlight=False,
    )
    if FLAGS.dry_run:
        for job in plan.jobs:
            console.print(f"  {job.case.describe()}  about {estimate_s(job.case):.0f} s", highlight=False, markup=False)


def sweep(console: Console, plan: Plan, store: RecordStore) -> int:
    """Runs what is left, prints the tables, and returns the exit code."""
    with Interrupt() as interrupt, make_progress(console) as bar:
        task = bar.add_task("", total=plan.estimate_s, count=f"0/{len(plan.jobs)}", current="")
        num_done = 0

        def progress(event: str, job: Job, record: Record | None) -> None:
            nonlocal num_done
            if event == "started":
                bar.update(task, current=job.case.describe())
                return
            assert record is not None
            num_done += 1
            count = f"{num_done}/{len(plan.jobs)}"
            bar.update(task, advance=estimate_s(job.case), count=count)
            bar.console.print(
                f"{count} {job.case.describe()}: {describe_result(record)}", highlight=False, markup=False
            )

        left = run_jobs(
            plan.jobs,
            store,
            interrupt=interrupt,
            timeout_s=FLAGS.timeout_s,
            budget_s=FLAGS.budget_s,
            weights_path=FLAGS.weights,
            progress=progress,
        )
    records = store.load()
    print_report(console, records, log_of=lambda record: str(log_path(record, store)))
    write_report(console, records, store.folder)
    if interrupt.signal_number is not None:
        console.print(f"Stopped; {len(left)} cases were not started. The same command goes on from here.")
        return 128 + interrupt.signal_number
    if left:
        console.print(
            f"--budget_s={FLAGS.budget_s:g} is spent; {len(left)} cases not started. The same command goes on."
        )
    return exit_code(plan, records)


def exit_code(plan: Plan, records: list[Record]) -> int:
    """0 where every record of the plan is ok, else 1; cases that the budget left out do not count."""
    ids = {case.case_id for case in plan.cases}
    ended = [record for (case_id, run), record in latest(records).items() if case_id in ids and run < FLAGS.runs]
    return int(any(record["status"] != "ok" for record in ended))


def log_path(record: Record, store: RecordStore) -> Path:
    return job_log(Job(Case.from_json(record["case"]), record["run"]), store.folder)


def describe_result(record: Record) -> str:
    if record["status"] != "ok":
        error = record["error"] or {}
        message = error.get("message") or error.get("type") or ""
        return f"{record['status']}: {message.splitlines()[0] if message else ''}"
    return f"ok, {1e3 * median(record['latency']['wall_s']):.4g} ms"


def make_progress(console: Console) -> Progress:
    """A bar that is redrawn once a second, so that it does not disturb what is measured."""

    def fixed() -> Column:
        return Column(no_wrap=True, min_width=7)

    return Progress(
        TextColumn("{task.fields[count]}", table_column=fixed()),
        BarColumn(bar_width=12, table_column=Column(no_wrap=True, min_width=12)),
        TimeElapsedColumn(table_column=fixed()),
        TextColumn("gone,", table_column=Column(no_wrap=True, min_width=5)),
        TimeRemainingColumn(table_column=fixed()),
        TextColumn("left", table_column=Column(no_wrap=True, min_width=4)),
        TextColumn(
            "{task.fields[current]}", markup=False, table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis")
        ),
        console=console,
        refresh_per_second=1,
        speed_estimate_period=1e9,  # over the whole sweep: a case takes seconds to minutes
    )


if __name__ == "__main__":
    start(main, takes_words=True, errors=(ValueError, ProbeError, OSError))
