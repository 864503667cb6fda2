"""The parent's side of training: several children at once, each on its own CPUs; every failure becomes a record."""

import dataclasses
import json
import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.capacity.checkpoint import progress_path
from experiments.capacity.plan import Local
from experiments.capacity.schema import Record, new_record, run_id
from vitcmp.cases import timestamp
from vitcmp.records import RecordStore
from vitcmp.runner import Interrupt, Outcome, child_env, classify_end, count_oom_kills, last_words, run_child

WORKER = (sys.executable, "-m", "experiments.capacity.child")
Run = dict[str, Any]
Report = Callable[[Record], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Trains runs in as many children at once as there are sets of CPUs (`cpus`; an empty one pins nothing)."""

    store: RecordStore
    local: Local
    interrupt: Interrupt
    timeout_s: float
    cpus: Sequence[Sequence[int]]
    report: Report

    def train(self, groups: Sequence[Sequence[Run]]) -> None:
        """Trains every run; those of a group one after the other in one child, which shares its images."""
        free: queue.SimpleQueue[Sequence[int]] = queue.SimpleQueue()
        for cpus in self.cpus:
            free.put(cpus)
        with ThreadPoolExecutor(len(self.cpus)) as threads:
            for future in [threads.submit(self._train_group, group, free) for group in groups]:
                future.result()

    def _train_group(self, runs: Sequence[Run], free: "queue.SimpleQueue[Sequence[int]]") -> None:
        """A child that died takes one run with it, the one that it was at; another child goes on with the next."""
        cpus, left = free.get(), list(runs)
        try:
            while left and not self.interrupt.requested:
                kills = count_oom_kills()
                outcome = self._run_child(left, cpus)
                left = left[self._report_finished(left) :]
                if left:
                    self._record_end(left.pop(0), outcome, oom_killed=count_oom_kills() > kills)
        finally:
            free.put(cpus)

    def _run_child(self, runs: Sequence[Run], cpus: Sequence[int]) -> Outcome:
        log = log_path(self.store.folder, runs[0])
        log.parent.mkdir(parents=True, exist_ok=True)
        env = child_env(None, platform=runs[0]["platform"])
        if cpus:
            env |= {"OMP_NUM_THREADS": str(len(cpus)), "MKL_NUM_THREADS": str(len(cpus))}
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.store.folder.absolute() / "cache")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
        request = {"runs": list(runs), "local": dataclasses.asdict(self.local), "cpus": list(cpus)}
        timeout_s = self.timeout_s * len(runs)
        return run_child(WORKER, request, log=log, interrupt=self.interrupt, timeout_s=timeout_s, env=env | cache)

    def _report_finished(self, runs: Sequence[Run]) -> int:
        """Reports the first runs that the child has recorded, and returns how many they are."""
        records = {record["run_id"]: record for record in self.store.load()}
        finished = list(_while_known(runs, records))
        for record in finished:
            self.report(record)
        return len(finished)

    def _record_end(self, run: Run, outcome: Outcome, *, oom_killed: bool) -> None:
        status, message = classify_end(outcome, self.interrupt, oom_killed, self.timeout_s)
        words = last_words(log_path(self.store.folder, run))
        error = {"type": None, "message": message, "traceback": words, "stage": outcome.stage}
        record = new_record(run) | {"status": status, "error": error, "ended_at": timestamp()}
        self.store.append(record)
        self.report(record)


def log_path(folder: Path, run: Run) -> Path:
    """Returns the file that takes what a child prints, by the first of its runs."""
    return folder / "logs" / f"{run_id(run)[:16]}.log"


def read_progress(folder: Path, run: Run) -> dict[str, Any] | None:
    """Returns how far a run is; None before its first steps and after its end."""
    try:
        return json.loads(progress_path(folder, run).read_text())
    except (OSError, ValueError):
        return None


def _while_known(runs: Sequence[Run], records: dict[str, Record]) -> Iterator[Record]:
    for run in runs:
        record = records.get(run_id(run))
        if record is None:
            return
        yield record
