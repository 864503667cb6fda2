"""The parent: one child process a case, with a time-out and a log; each attempt ends as a record. No framework."""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from vitcmp.backend import Device
from vitcmp.cases import Case, estimate_s, timestamp
from vitcmp.environment import num_cpus
from vitcmp.records import FINAL, Record, RecordStore, latest, validate_record

STAGE_MARK = "vitcmp: stage "  # before the name of each stage that a child begins, in its log
WORKER = (sys.executable, "-m", "vitcmp.worker")
Progress = Callable[[str, "Job", Record | None], None]


class ProbeError(RuntimeError):
    """The device or the weights that were asked for cannot be had."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One fresh process for one case."""

    case: Case
    run: int

    @property
    def key(self) -> tuple[str, int]:
        return self.case.case_id, self.run


class Interrupt:
    """Turns SIGINT and SIGTERM into a request to stop: children are killed, the parent then writes their records."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.children: set[subprocess.Popen] = set()

    def __enter__(self) -> "Interrupt":
        self._kept = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        for child in tuple(self.children):
            kill_group(child)

    @property
    def requested(self) -> bool:
        return self.signal_number is not None


def plan_jobs(cases: list[Case], records: list[Record], *, runs: int, retry: bool) -> list[Job]:
    """Returns what is left to do: jobs with no record, interrupted ones, and with `retry` those that failed."""
    done = latest(records)
    jobs = [Job(case, run) for run in range(runs) for case in cases]
    return [job for job in jobs if _is_pending(done.get(job.key), retry)]


def _is_pending(record: Record | None, retry: bool) -> bool:
    if record is None or record["status"] not in FINAL:
        return True
    return retry and record["status"] != "ok"


def run_jobs(
    jobs: list[Job],
    store: RecordStore,
    *,
    interrupt: Interrupt,
    timeout_s: float,
    budget_s: float | None = None,
    weights_path: str | None = None,
    progress: Progress = lambda event, job, record: None,
    worker: tuple[str, ...] = WORKER,
) -> list[Job]:
    """Runs each job in a child of its own and appends its record; returns the jobs that were not started.

    A job is not started once an interrupt was requested, or where it would outlast the budget by its estimate.
    """
    start = time.monotonic()
    for i, job in enumerate(jobs):
        elapsed_s = time.monotonic() - start
        if interrupt.requested or (budget_s is not None and elapsed_s + estimate_s(job.case) > budget_s):
            return jobs[i:]
        progress("started", job, None)
        record = run_job(
            job, store.folder, interrupt=interrupt, timeout_s=timeout_s, weights_path=weights_path, worker=worker
        )
        store.append(record)
        progress("ended", job, record)
    return []


def run_job(
    job: Job,
    folder: Path,
    *,
    interrupt: Interrupt,
    timeout_s: float,
    weights_path: str | None = None,
    worker: tuple[str, ...] = WORKER,
) -> Record:
    """Runs one case in a child and returns its record, whatever became of the child."""
    log = job_log(job, folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    request = {"case": job.case.to_json(), "run": job.run, "weights_path": weights_path}
    record, kills = job.case.new_record(job.run), count_oom_kills()
    outcome = run_child(worker, request, log=log, interrupt=interrupt, timeout_s=timeout_s, env=child_env(job.case))
    faults = [] if outcome.result is None else validate_record(outcome.result)
    if outcome.result is not None and not faults:  # also where the stop or the time-out came after it was measured
        return outcome.result
    record["ended_at"] = timestamp()
    record["status"], message = classify_end(outcome, interrupt, count_oom_kills() > kills, timeout_s)
    if faults:
        message = f"the child's record is not valid: {'; '.join(faults)}"
    record["error"] = {"type": None, "message": message, "traceback": last_words(log), "stage": outcome.stage}
    return record


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code (negative for a signal), whether it ran out of time, and what it wrote."""

    returncode: int
    timed_out: bool
    result: dict[str, Any] | None
    stage: str | None = None  # the last that it announced


def run_child(
    worker: tuple[str, ...],
    request: dict[str, Any],
    *,
    log: Path,
    interrupt: Interrupt,
    timeout_s: float,
    env: dict[str, str],
) -> Outcome:
    """Starts the worker in a process group of its own, waits for it without polling, and reads its result.

    The result is left in the temporary folder, so that a full disk under the records does not lose it.
    """
    with tempfile.TemporaryDirectory(prefix="vitcmp-") as temporary, log.open("wb") as log_file:
        result = Path(temporary) / "result.json"
        request = {**request, "parent_pid": os.getpid(), "result": str(result)}
        child = subprocess.Popen(
            worker, stdin=subprocess.PIPE, stdout=log_file, stderr=log_file, env=env, start_new_session=True
        )
        with _registered(interrupt, child):
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(json.dumps(request).encode())
            timed_out = not wait_for_exit(child, timeout_s)
        return Outcome(child.returncode, timed_out, _read_result(result), last_stage(log))


@contextlib.contextmanager
def _registered(interrupt: Interrupt, child: subprocess.Popen) -> Iterator[None]:
    interrupt.children.add(child)
    if interrupt.requested:  # the signal came while the child was being started
        kill_group(child)
    try:
        yield
    finally:
        interrupt.children.discard(child)  # first: once it is waited for, its number may be another's
        kill_group(child)  # also what the child itself started, such as compile workers
        child.wait()


def wait_for_exit(child: subprocess.Popen, timeout_s: float) -> bool:
    """Blocks until the child has exited; returns False if that takes longer than `timeout_s`."""
    try:
        descriptor = os.pidfd_open(child.pid)
    except (AttributeError, OSError):  # not Linux, or a sandbox without it: subprocess polls, up to 20 times a second
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout_s)
        return child.poll() is not None
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(descriptor)


def kill_group(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def probe(
    backend: str, platform: str, *, weights_path: str | None, models: tuple[str, ...], image_sizes: tuple[str, ...] = ()
) -> Device:
    """Asks a child of the backend for its device, and whether weights and images fit the models. Raises ProbeError."""
    request: dict[str, Any] = {"backend": backend, "platform": platform, "weights_path": weights_path}
    request |= {"models": models, "image_sizes": image_sizes}
    env = child_env(None, platform=platform)
    with Interrupt() as interrupt, tempfile.TemporaryDirectory(prefix="vitcmp-") as temporary:
        log = Path(temporary) / "probe.log"
        outcome = run_child(WORKER, {"probe": request}, log=log, interrupt=interrupt, timeout_s=300, env=env)
        said = last_words(log)
    if interrupt.requested:
        raise KeyboardInterrupt
    if outcome.result is None:
        raise ProbeError(f"backend={backend}: its process ended with exit code {outcome.returncode}:\n{said}")
    if "error" in outcome.result:
        raise ProbeError(f"backend={backend}: {outcome.result['error']}")
    return Device(**outcome.result["device"])


def job_log(job: Job, folder: Path) -> Path:
    """Returns the file that takes what the job's child prints."""
    return folder / "logs" / f"{job.case.case_id[:16]}-run{job.run}.log"


def child_env(case: Case | None, *, platform: str | None = None) -> dict[str, str]:
    """One thread count for both frameworks, threads that hardly spin, no network, and JAX memory as it is used.

    Threads of OpenMP that spin for long while they wait make timings 9 times worse where others use the cores (100,000
    rounds, 271 ms for 30). Without any spinning torch is 1.4x slower on a quiet machine (ViT-Ti, 21.2 ms for 15.2);
    1000 rounds, some microseconds, are enough for its full speed (experiments/LOG.md).
    """
    threads = str((case.num_threads if case else None) or num_cpus())
    env = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1000",
        "KMP_BLOCKTIME": "1",  # the same for Intel's OpenMP, in milliseconds
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1"),
        "PYTHONUNBUFFERED": "1",
    }
    if (case.platform if case else platform) == "cpu":
        env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return env


def classify_end(outcome: Outcome, interrupt: Interrupt, oom_killed: bool, timeout_s: float) -> tuple[str, str]:
    """Returns the status and the message of a child that left no record, with the stage that it was in."""
    where = f"; it was at: {outcome.stage}" if outcome.stage else ""
    if interrupt.requested:
        return "interrupted", f"stopped by {signal.Signals(interrupt.signal_number or 0).name}{where}"
    if outcome.timed_out:
        return "timeout", f"not done after {timeout_s:g} s (--timeout_s){where}"
    if outcome.returncode == -signal.SIGKILL and oom_killed:
        return "oom", f"killed by the kernel: the machine ran out of memory{where}"
    if outcome.returncode < 0:
        return "crashed", f"killed by {signal.Signals(-outcome.returncode).name}{where}"
    return "crashed", f"exit code {outcome.returncode} and no record{where}"


def count_oom_kills() -> int:
    """Counts the kernel's out-of-memory kills since boot; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _read_result(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


def last_stage(log: Path) -> str | None:
    """Returns the last stage that a child announced in its log; None where it came to none."""
    with contextlib.suppress(OSError), log.open(errors="replace") as lines:
        stages = [line.rpartition(STAGE_MARK)[2].strip() for line in lines if STAGE_MARK in line]
        return stages[-1] if stages else None
    return None


def last_words(log: Path, num_chars: int = 4000) -> str:
    with contextlib.suppress(OSError):
        return log.read_text(errors="replace")[-num_chars:]
    return ""
