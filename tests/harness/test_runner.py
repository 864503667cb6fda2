"""The parent: children that end in every way, time-outs, budgets, interrupts and resuming."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.harness.fakes import make_case, ok_record
from vitcmp.records import RecordStore, validate_record
from vitcmp.runner import Interrupt, Job, job_log, plan_jobs, run_jobs

ROOT = Path(__file__).parents[2]
FAKE_WORKER = (sys.executable, str(ROOT / "tests" / "harness" / "fakes.py"))


def sweep(folder: Path, behaviours: list[str], *, interrupt: Interrupt | None = None, **options) -> list[dict]:
    store = RecordStore(folder).open()
    jobs = [Job(make_case(compile=behaviour, batch_size=i + 1), 0) for i, behaviour in enumerate(behaviours)]
    options = {"timeout_s": 60.0, **options}
    with interrupt or Interrupt() as interrupt:
        run_jobs(jobs, store, interrupt=interrupt, worker=FAKE_WORKER, **options)
    return store.load()


@pytest.mark.parametrize(
    "behaviour, status, message",
    [
        ("ok", "ok", None),
        ("segfault", "crashed", "SIGSEGV"),
        ("killed", "crashed", "SIGKILL"),
        ("exit", "crashed", "exit code 3"),
        ("garbage", "crashed", "no record"),
        ("invalid", "crashed", "latency"),
        ("hang", "timeout", "--timeout_s"),
    ],
)
def test_every_end_of_a_child_is_a_record_and_the_sweep_goes_on(tmp_path, behaviour, status, message):
    records = sweep(tmp_path, [behaviour, "ok"], timeout_s=3.0 if behaviour == "hang" else 60.0)
    assert [record["status"] for record in records] == [status, "ok"]
    assert all(validate_record(record) == [] for record in records)
    if message:
        assert message in records[0]["error"]["message"]


@pytest.mark.parametrize(["behaviour", "stage"], [("killed", "latency"), ("hang", "compile"), ("exit", None)])
def test_the_record_of_a_child_without_one_says_where_it_was(tmp_path, behaviour, stage):
    (record,) = sweep(tmp_path, [behaviour], timeout_s=3.0 if behaviour == "hang" else 60.0)
    assert record["error"]["stage"] == stage
    assert record["error"]["message"].endswith(f"it was at: {stage}") is (stage is not None)


def test_a_childs_last_words_are_in_its_record_and_its_log(tmp_path):
    (record,) = sweep(tmp_path, ["exit"])
    log = job_log(Job(make_case(compile="exit", batch_size=1), 0), tmp_path)
    assert "some last words" in record["error"]["traceback"]
    assert "some last words" in log.read_text()


def test_a_batch_size_is_never_changed(tmp_path):
    assert [record["case"]["batch_size"] for record in sweep(tmp_path, ["killed", "ok", "exit"])] == [1, 2, 3]


def test_an_interrupt_ends_the_child_leaves_a_record_and_starts_nothing_more(tmp_path):
    interrupt = Interrupt()
    logs = tmp_path / "logs"

    def interrupt_the_second_child() -> None:
        while not logs.exists() or len(list(logs.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    # A daemon that waits for the child, and no timer: a sweep that ends early must not leave the tests a signal.
    threading.Thread(target=interrupt_the_second_child, daemon=True).start()
    start = time.monotonic()
    records = sweep(tmp_path, ["ok", "hang", "ok"], interrupt=interrupt)
    assert time.monotonic() - start < 60  # not a benchmark: the child sleeps for 600
    assert [record["status"] for record in records] == ["ok", "interrupted"]
    assert interrupt.signal_number == signal.SIGINT


def test_what_was_measured_before_the_stop_is_kept(tmp_path):
    (record,) = sweep(tmp_path, ["late"], timeout_s=5.0)
    assert record["status"] == "ok"


def test_interrupted_jobs_run_again_and_finished_ones_do_not():
    cases = [make_case(batch_size=i) for i in range(1, 4)]
    records = [ok_record(cases[0], 0), {**ok_record(cases[1], 0), "status": "interrupted"}]
    assert [job.case for job in plan_jobs(cases, records, runs=1, retry=False)] == cases[1:]


def test_a_failed_job_runs_again_only_with_retry():
    case = make_case()
    records = [{**ok_record(case, 0), "status": "oom"}]
    assert plan_jobs([case], records, runs=1, retry=False) == []
    assert plan_jobs([case], records, runs=1, retry=True) == [Job(case, 0)]


def test_a_later_record_of_a_job_replaces_an_earlier_one():
    case = make_case()
    records = [{**ok_record(case, 0), "status": "oom"}, ok_record(case, 0)]
    assert plan_jobs([case], records, runs=1, retry=True) == []


def test_more_runs_add_only_the_missing_processes():
    case = make_case()
    assert plan_jobs([case], [ok_record(case, 0)], runs=3, retry=False) == [Job(case, 1), Job(case, 2)]


def test_nothing_is_started_that_would_outlast_the_budget(tmp_path):
    assert sweep(tmp_path, ["ok", "ok"], budget_s=0.1) == []


def test_the_case_id_is_the_same_in_every_process_and_differs_with_every_field():
    case = make_case()
    code = "from tests.harness.fakes import make_case; print(make_case().case_id)"
    elsewhere = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == case.case_id
    ids = {case.case_id}
    for name, value in case.to_json().items():
        changed = {"x": 1} if isinstance(value, dict) else f"{value}x" if isinstance(value, str) else (value or 0) + 1
        ids.add(make_case(**{name: changed}).case_id)
    assert len(ids) == 1 + len(case.to_json())


PARENT = """
import sys
from pathlib import Path
from tests.harness.fakes import make_case
from vitcmp.records import RecordStore
from vitcmp.runner import Interrupt, Job, plan_jobs, run_jobs

store = RecordStore(sys.argv[1]).open()
cases = [make_case(compile="slow", batch_size=i + 1) for i in range(8)]
with store.lock(), Interrupt() as interrupt:
    jobs = plan_jobs(cases, store.load(), runs=1, retry=False)
    run_jobs(jobs, store, interrupt=interrupt, timeout_s=60.0, worker=(sys.executable, "tests/harness/fakes.py"))
"""


def test_kill_9_of_the_parent_at_random_moments_loses_nothing_and_repeats_nothing(tmp_path):
    rng = random.Random(0)
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    for _ in range(6):
        parent = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        time.sleep(rng.uniform(0.2, 2.5))
        parent.kill()
        parent.wait()
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    ids = [json.loads(line)["case_id"] for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert sorted(ids) == sorted(make_case(compile="slow", batch_size=i + 1).case_id for i in range(8))
