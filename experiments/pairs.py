"""Pairs: ours against theirs, in fresh processes. What the experiments that compare two sides share.

A *pair* is a JSON-able description of both sides:

    {"experiment": "peers", "backend": "torch", "ours": ..., "theirs": ...,
     "point": {"model": "vit_ti16", "image_size": "224", "batch_size": 1, ...}}

Everything that decides a number must be in it (versions too: `versions`), because a record belongs to a pair by the
hash of it, of what the rule says of one process, of the threads and of the CPU. How many processes there are is not in
it: one now and two more another day are three. An experiment is two programs, the parent and its child:

    with store.lock(), Interrupt() as interrupt:
        results = run_pairs(pairs, child_module="experiments.noise_steps", store=store, interrupt=interrupt)

    def make_sides(pair: Pair) -> Sides: ...  # builds both, and calls each once
    if __name__ == "__main__":
        child_main(make_sides)
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console

from vitcmp.cases import timestamp
from vitcmp.compare import Comparison, deciding_clock, summarise, wants_more
from vitcmp.environment import HostMonitor, cpu_name, describe_environment, num_cpus, pin_cpus
from vitcmp.parity import compare_arrays
from vitcmp.records import METHOD_VERSION, Record, RecordStore
from vitcmp.runner import Interrupt, child_env, classify_end, count_oom_kills, last_words, run_child
from vitcmp.timing import Blocks, PairRule, PairTimes, time_pair
from vitcmp.worker import Stages, die_with_parent, failures_recorded, write_result

SCHEMA = "vitcmp-pair/1"
STATUSES = ("ok", "oom", "unsupported", "timeout", "crashed", "error", "differs", "interrupted")
SIDES = ("ours", "theirs")

Pair = dict[str, Any]
Progress = Callable[[str, Pair, int, Record | None], None]  # event ("started" or "ended"), pair, process, record
_Entered = TypeVar("_Entered")
RULE = PairRule()
OF_HOW_MANY = ("min_processes", "max_processes", "max_comparison_s")  # of a rule: when a pair has enough processes
_held = contextlib.ExitStack()  # of the child: closed by nothing, its process ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
    """What `make_sides` returns: two calls on equal inputs, each of which returns when the device is idle.

    The outputs are compared before anything is timed: max |ours - theirs| over the largest magnitude must be within
    `bound` (`vitcmp.parity.tolerance`, plus rounding of the input if any), else the record's status is `differs`. They
    must come from the very programs that are timed, or from the models behind a train step.
    """

    ours: Callable[[], object]
    theirs: Callable[[], object]
    ours_output: np.ndarray
    theirs_output: np.ndarray
    bound: float
    platform: str = "cpu"  # where both ran: cpu, gpu or tpu
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # JSON-able, kept: effective numerics, compile_s


def hold(context: AbstractContextManager[_Entered]) -> _Entered:
    """Enters a context for the rest of the child's life, as `effective = pairs.hold(backend.numerics("float32"))`."""
    return _held.enter_context(context)


def versions(*packages: str) -> dict[str, str | None]:
    """Returns the installed versions, to be put into a pair; None for a package that is absent."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def open_store(folder: str | Path) -> RecordStore:
    """Opens the folder of an experiment's records; hold `store.lock()` while `run_pairs` writes to it."""
    return RecordStore(folder, schema=SCHEMA, validate=validate).open()


def check_threads(num_threads: int) -> int:
    """Returns the number of CPUs; raises ValueError where this process has fewer, or none was asked for."""
    if not 1 <= num_threads <= num_cpus():
        raise ValueError(f"--num_threads={num_threads} must be between 1 and {num_cpus()}, the CPUs of this process")
    return num_threads


def pair_id(pair: Pair, rule: PairRule, num_threads: int) -> str:
    """The sha256 of all that decides the numbers of a process."""
    content = {
        "method_version": METHOD_VERSION,
        "pair": pair,
        "rule": {key: value for key, value in dataclasses.asdict(rule).items() if key not in OF_HOW_MANY},
        "num_threads": num_threads,
        "cpu": cpu_name(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def run_pairs(
    pairs: Sequence[Pair],
    *,
    child_module: str,
    store: RecordStore,
    interrupt: Interrupt,
    rule: PairRule = RULE,
    num_processes: int | None = None,
    num_threads: int | None = None,
    platform: str = "cpu",
    timeout_s: float = 900.0,
    retry: bool = False,
    progress: Progress = lambda event, pair, process, record: None,
) -> dict[str, list[Record]]:
    """Runs each pair in fresh processes, appends a record for each, and returns the pairs' records by pair id.

    A pair gets `rule.min_processes`, and more up to `rule.max_processes` while its verdict is ambiguous;
    `num_processes` sets both. A pair whose child failed gets no further process: the failure is its row, and is tried
    again with `retry`, or where it was an interrupt. What the store has is not run again.

    `num_threads` is how many CPUs the children are pinned to (all that this process has, if None); `platform` is what
    their environment allows (with "cpu" no framework sees a GPU).
    """
    if num_processes is not None:
        rule = dataclasses.replace(rule, min_processes=num_processes, max_processes=num_processes)
    num_threads = num_threads or num_cpus()
    done = by_pair(store.load())
    for pair in pairs:
        key = pair_id(pair, rule, num_threads)
        records = done.setdefault(key, {})
        while not interrupt.requested and (process := next_process(records, rule, retry=retry)) is not None:
            progress("started", pair, process, None)
            record = _new_record(pair, rule, num_threads, process)
            record = _run_process(record, child_module, store.folder, interrupt, timeout_s, platform)
            store.append(record)
            records[process] = record
            progress("ended", pair, process, record)
            if record["status"] != "ok":
                break
    return {key: list(done[key].values()) for pair in pairs if (key := pair_id(pair, rule, num_threads)) in done}


def by_pair(records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """Returns the last record of every process, by pair id and process."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        found.setdefault(record["pair_id"], {})[record["process"]] = record
    return found


def next_process(records: dict[int, Record], rule: PairRule, *, retry: bool = False) -> int | None:
    """Returns the number of the process to run next, or None where the pair is done."""
    failed = [process for process, record in records.items() if record["status"] != "ok"]
    again = [process for process in failed if retry or records[process]["status"] == "interrupted"]
    if again:
        return again[0]
    if failed:
        return None
    times = [_times_from_json(record["times"]) for record in records.values()]
    clock = next((record["clock"] for record in records.values()), "wall_s")
    return len(records) if wants_more(times, clock=clock, rule=rule, spent_s=_spent_s(records)) else None


def is_done(records: Sequence[Record]) -> bool:
    """Says whether a pair has all the processes that it gets; an interrupted one does not."""
    rule = PairRule(**records[-1]["rule"])
    return next_process({record["process"]: record for record in records}, rule) is None


def compare_records(records: Sequence[Record]) -> Comparison:
    """Compares the sides of one pair, by its records whose status is ok; ValueError where there is none."""
    records = [record for record in records if record["status"] == "ok"]
    if not records:
        raise ValueError("no record has the status ok: nothing was timed")
    times = [_times_from_json(record["times"]) for record in records]
    return summarise(times, clock=records[0]["clock"], rule=PairRule(**records[0]["rule"]))


def child_main(make_sides: Callable[[Pair], Sides]) -> None:
    """The child: reads a job on standard input, builds both sides, compares outputs, times them, writes a record."""
    job = json.loads(sys.stdin.read())
    die_with_parent(job["parent_pid"])
    if job["platform"] == "cpu":
        pin_cpus(job["record"]["num_threads"])
    write_result(measure(job["record"], make_sides), Path(job["result"]))


def measure(record: Record, make_sides: Callable[[Pair], Sides]) -> Record:
    """Fills in the record of one process; whatever goes wrong becomes its status and error."""
    record, stages = {**record, "environment": describe_environment()}, Stages()
    with failures_recorded(record, stages):
        with stages.stage("make"):
            sides = make_sides(record["pair"])
        record |= {"facts": sides.facts, "clock": deciding_clock(sides.platform, record["num_threads"])}
        ours, theirs = (np.asarray(array, np.float64) for array in (sides.ours_output, sides.theirs_output))
        parity = compare_arrays(ours, theirs, sides.bound)
        record["outputs"] = parity._asdict()
        if parity.status == "equal":
            with stages.stage("times"):
                _time(record, sides)
        else:
            record |= {"status": "differs", "error": _new_error(parity.describe())}
    return {**record, "stages_s": stages.seconds, "ended_at": timestamp()}


def _time(record: Record, sides: Sides) -> None:
    rule, ours_first = PairRule(**record["rule"]), record["process"] % 2 == 0
    with HostMonitor(sides.platform) as host:
        times = time_pair(sides.ours, sides.theirs, rule, uses=record["clock"], ours_first=ours_first)
    record |= {"times": _times_to_json(times), "contention": host.contention(), "clocks": host.clocks(), "status": "ok"}


def _run_process(
    record: Record, child_module: str, folder: Path, interrupt: Interrupt, timeout_s: float, platform: str
) -> Record:
    log = folder / "logs" / f"{record['pair_id'][:16]}-{record['process']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    kills, env = count_oom_kills(), child_env(None, platform=platform)
    threads = str(record["num_threads"])
    env |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    worker, request = (sys.executable, "-m", child_module), {"record": record, "platform": platform}
    outcome = run_child(worker, request, log=log, interrupt=interrupt, timeout_s=timeout_s, env=env)
    faults = [] if outcome.result is None else validate(outcome.result)
    if outcome.result is not None and not faults:
        return outcome.result
    status, message = classify_end(outcome, interrupt, count_oom_kills() > kills, timeout_s)
    if faults:
        message = f"the child's record is not valid: {'; '.join(faults)}"
    return {
        **record,
        "status": status,
        "error": _new_error(message, last_words(log), outcome.stage),
        "ended_at": timestamp(),
    }


def _new_record(pair: Pair, rule: PairRule, num_threads: int, process: int) -> Record:
    unknown = "error ended_at environment facts outputs clock times contention clocks stages_s"
    return {
        "schema": SCHEMA,
        "method_version": METHOD_VERSION,
        "pair_id": pair_id(pair, rule, num_threads),
        "process": process,
        "status": "error",
        "started_at": timestamp(),
        "pair": pair,
        "rule": dataclasses.asdict(rule),
        "num_threads": num_threads,
        **dict.fromkeys(unknown.split()),
    }


def validate(record: Record) -> list[str]:
    """Returns the faults of a record; further keys are allowed."""
    keys = "schema method_version pair_id process status error started_at ended_at pair rule num_threads outputs times"
    faults = [f"{key} is missing" for key in keys.split() if key not in record]
    if faults:
        return faults
    if record["status"] not in STATUSES:
        faults.append(f"status is {record['status']!r}, expected one of {' '.join(STATUSES)}")
    if record["status"] == "ok":
        faults += [f"status is ok but {key} is null" for key in ("outputs", "clock", "times") if not record.get(key)]
        faults += _faults_of_times(record["times"] or {})
    elif record["error"] is None:
        faults.append(f"status is {record['status']} but error is null")
    return faults


def _faults_of_times(times: dict[str, Any]) -> list[str]:
    faults = []
    for side in ("ours", "theirs"):
        wall_s, cpu_s = (times.get(side, {}).get(clock) for clock in ("wall_s", "cpu_s"))
        if not wall_s or len(wall_s) % 2 or not all(block and min(block) > 0 for block in wall_s):
            faults.append(f"times.{side}.wall_s: expected blocks of seconds above 0, two a round")
        elif cpu_s is not None and [len(block) for block in cpu_s] != [len(block) for block in wall_s]:
            faults.append(f"times.{side}.cpu_s: expected null, or as many as of wall_s")
    return faults


def _times_to_json(times: PairTimes) -> dict[str, Any]:
    return {**times._asdict(), "ours": times.ours._asdict(), "theirs": times.theirs._asdict()}


def _times_from_json(times: dict[str, Any]) -> PairTimes:
    return PairTimes(**{**times, "ours": Blocks(**times["ours"]), "theirs": Blocks(**times["theirs"])})


def _spent_s(records: dict[int, Record]) -> float:
    ends = (
        tuple(datetime.datetime.fromisoformat(record[key]) for key in ("started_at", "ended_at"))
        for record in records.values()
    )
    return sum((end - start).total_seconds() for start, end in ends)


def _new_error(message: str, traceback: str | None = None, stage: str | None = None) -> dict[str, Any]:
    return {"type": None, "message": message, "traceback": traceback, "stage": stage}


def show_progress(console: Console, num_pairs: int) -> Progress:
    """Returns a progress that prints a line for every process."""
    seen: list[str] = []

    def show(event: str, pair: Pair, process: int, record: Record | None) -> None:
        if record is None:
            return
        if record["pair_id"] not in seen:
            seen.append(record["pair_id"])
        where = f"{len(seen)}/{num_pairs} {describe(pair)}, process {process}"
        console.print(f"{where}: {_describe_record(record)}", highlight=False, markup=False, soft_wrap=True)

    return show


def describe(pair: Pair) -> str:
    """Returns one line for people: `torch vit_ti16 224 1 forward, ours against timm`."""
    return f"{pair['backend']} {point_of(pair)}, {name_of(pair['ours'])} against {name_of(pair['theirs'])}"


def _describe_record(record: Record) -> str:
    if record["status"] != "ok":
        return f"{record['status']}: {record['error']['message'][:200]}"
    result = compare_records([record])
    return f"{result.ratio:.3f} [{result.low:.3f}, {result.high:.3f}] of {result.clock}"


def point_of(pair: Pair) -> str:
    """Returns what is compared where, but for the sides: `vit_ti16 224 1 forward`."""
    return " ".join(str(value) for value in pair["point"].values() if value is not None)


def name_of(side: Any) -> str:
    """Returns what a side calls itself: its `name` if it is a dict with one, else itself as text."""
    return str(side["name"] if isinstance(side, dict) and "name" in side else side)
