"""Pairs in fresh processes: children that end in every way, resuming after kill -9; and the audit on top of them."""

import dataclasses
import io
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
from rich.console import Console

from experiments import noise, pairs
from experiments.pair_tables import print_table
from vitcmp.records import RecordError
from vitcmp.runner import Interrupt
from vitcmp.timing import PairRule

ROOT = Path(__file__).parents[2]
CHILD = "tests.harness.fake_sides"
RULE = PairRule(warm_up_min_s=0.005, block_s=0.002, min_s=0.02, max_s=0.2, half_width=0.2)


def make_pair(theirs="ok", **point):
    return {"experiment": "test", "backend": "torch", "point": point, "ours": "ok", "theirs": theirs}


def run(folder, wanted, *, interrupt=None, **options):
    options = {"rule": RULE, "num_processes": 2, "num_threads": 1, "timeout_s": 60.0, **options}
    store = pairs.open_store(folder)
    with store.lock(), interrupt or Interrupt() as interrupt:
        return pairs.run_pairs(wanted, child_module=CHILD, store=store, interrupt=interrupt, **options)


def statuses(results):
    return [[record["status"] for record in records] for records in results.values()]


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)  # where `-m tests.harness.fake_sides` is found


# Pairs


@pytest.mark.slow
@pytest.mark.parametrize(
    ["theirs", "status", "words"],
    [
        ("segfault", "crashed", "SIGSEGV"),
        ("exit", "crashed", "exit code 3"),
        ("hang", "timeout", "not done after"),
        ("oom", "oom", "no room for theirs"),
        ("unsupported", "unsupported", "theirs has no such kernel"),
        ("error", "error", "theirs"),
        ("differs", "differs", "the outputs differ by 0.016 of the largest value, the bound is 1e-05"),
    ],
)
def test_every_end_of_a_child_is_a_record_and_the_next_pair_is_run(tmp_path, theirs, status, words):
    timeout_s = 3.0 if theirs == "hang" else 60.0
    results = run(tmp_path, [make_pair(theirs), make_pair()], timeout_s=timeout_s)
    assert statuses(results) == [[status], ["ok", "ok"]]
    (record,), _ = results.values()
    assert words in record["error"]["message"]
    assert record["times"] is None


@pytest.mark.slow
def test_both_sides_raw_times_are_kept_and_compared_and_each_process_is_fresh(tmp_path):
    ((first, second),) = run(tmp_path, [make_pair("slow")]).values()
    assert [record["process"] for record in (first, second)] == [0, 1]
    assert [record["times"]["ours_first"] for record in (first, second)] == [True, False]
    assert first["facts"]["pid"] != second["facts"]["pid"]
    assert first["facts"]["threads"] == "1"
    wall_s = first["times"]["theirs"]["wall_s"]
    assert len(wall_s) >= 24 and min(map(min, wall_s)) >= 0.002
    assert first["outputs"]["status"] == "equal" and first["outputs"]["bound"] == 1e-5
    assert pairs.compare_records([first, second]).num_processes == 2
    console = Console(record=True, width=150, file=io.StringIO())
    print_table({"id": [first, second]}, console)
    assert "slow" in console.export_text()


@pytest.mark.slow
def test_what_is_done_is_not_run_again_and_what_failed_only_with_retry(tmp_path):
    wanted = [make_pair(), make_pair("error")]
    run(tmp_path, wanted)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert statuses(run(tmp_path, wanted)) == [["ok", "ok"], ["error"]]
    assert (tmp_path / "records.jsonl").read_text().splitlines() == lines
    run(tmp_path, wanted, retry=True)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_an_interrupt_ends_the_child_leaves_a_record_and_is_made_up_for(tmp_path):
    def interrupt_the_child():
        while not list(tmp_path.glob("logs/*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_the_child, daemon=True).start()
    assert statuses(run(tmp_path, [make_pair("hang"), make_pair()])) == [["interrupted"], []]
    assert statuses(run(tmp_path, [make_pair("hang")], timeout_s=2.0)) == [["timeout"]]


PARENT = """
import sys
from tests.harness.test_noise import make_pair, run
run(sys.argv[1], [make_pair(i=i) for i in range(3)])
"""


@pytest.mark.slow
def test_kill_9_of_the_parent_at_random_moments_loses_nothing_and_repeats_nothing(tmp_path):
    rng, command = random.Random(0), [sys.executable, "-c", PARENT, str(tmp_path)]
    for _ in range(3):
        parent = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        time.sleep(rng.uniform(1.0, 4.0))
        parent.kill()
        parent.wait()
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    done = [(record["pair_id"], record["process"]) for record in records if record["status"] == "ok"]
    assert len(done) == len(set(done)) == 6


def test_a_pairs_id_changes_with_everything_that_decides_its_numbers():
    ids = {pairs.pair_id(make_pair(a=1), RULE, 1)}
    assert pairs.pair_id(make_pair(a=1), dataclasses.replace(RULE), 1) in ids
    ids |= {pairs.pair_id(make_pair(a=2), RULE, 1), pairs.pair_id(make_pair(a=1), RULE, 2)}
    ids |= {pairs.pair_id(make_pair("slow", a=1), RULE, 1), pairs.pair_id(make_pair(a=1), PairRule(), 1)}
    assert len(ids) == 5
    assert pairs.pair_id(make_pair(a=1), dataclasses.replace(RULE, min_processes=1, max_processes=2), 1) in ids


@pytest.mark.parametrize("folder", ["noise", "peers"])
def test_committed_records_are_found_again(monkeypatch, folder):
    """By the id that their pair has today: without it, going on would measure everything anew."""
    stores = (pairs.open_store(path) for path in (ROOT / "experiments" / "results").glob(f"*-{folder}"))
    records = [record for store in stores for record in store.load()]
    measured = [record for record in records if record["environment"]]
    assert len(measured) > 50
    for record in measured:
        monkeypatch.setattr(pairs, "cpu_name", lambda cpu=record["environment"]["cpu"]: cpu)
        rule = PairRule(**record["rule"])
        assert pairs.pair_id(record["pair"], rule, record["num_threads"]) == record["pair_id"]


@pytest.mark.slow
def test_one_process_now_and_another_later_are_two(tmp_path):
    for num_processes in (1, 2):
        (records,) = run(tmp_path, [make_pair()], num_processes=num_processes).values()
        assert [record["process"] for record in records] == list(range(num_processes)) and pairs.is_done(records)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2


# Records by hand, for what follows from them


def ok_record(pair, process, ratio=1.0, rule=RULE):
    wall_s = {"ours": [[0.01 * ratio]] * 24, "theirs": [[0.01]] * 24}
    times = {side: {"wall_s": wall_s[side], "cpu_s": wall_s[side]} for side in pairs.SIDES}
    return {
        **pairs._new_record(pair, rule, 1, process),
        "status": "ok",
        "ended_at": "2126-01-01T00:00:00+00:00",
        "started_at": "2126-01-01T00:00:00+00:00",
        "clock": "cpu_s",
        "outputs": {"status": "equal", "error": 0.0, "bound": 1.0, "note": ""},
        "times": {**times, "ours_first": True, "is_warm": True, "converged": True},
    }


def test_a_pair_gets_more_processes_while_it_is_ambiguous():
    rule, pair = PairRule(), make_pair()
    same = {i: ok_record(pair, i, rule=rule) for i in range(12)}
    unclear = {i: ok_record(pair, i, 1.03 + 0.02 * (-1) ** i, rule) for i in range(12)}

    def following(records, num):
        return pairs.next_process({i: records[i] for i in range(num)}, rule)

    assert [following(same, num) for num in (0, 2, 3)] == [0, 2, None]
    assert [following(unclear, num) for num in (3, 11, 12)] == [3, 11, None]
    assert pairs.is_done([same[i] for i in range(3)]) and not pairs.is_done([same[0]])


@pytest.mark.parametrize(
    ["change", "words"],
    [
        ({"status": "fine"}, "status is 'fine'"),
        ({"times": None}, "times is null"),
        ({"status": "oom"}, "status is oom but error is null"),
        ({"times": {"ours": {"wall_s": [[0.1]], "cpu_s": None}, "theirs": {}}}, "two a round"),
        ({"times": {"ours": {"wall_s": [[0.1], [0.0]], "cpu_s": None}, "theirs": {}}}, "above 0"),
    ],
)
def test_a_record_that_is_not_good_is_refused_with_its_faults(tmp_path, change, words):
    store = pairs.open_store(tmp_path)
    store.append(ok_record(make_pair(), 0))
    with pytest.raises(RecordError, match=words):
        store.append({**ok_record(make_pair(), 1), **change})
    assert len(store.load()) == 1


# The audit


def test_the_comparisons_take_kinds_backends_and_models_in_turn_and_each_has_its_id():
    wanted = noise.make_pairs(12, ["torch", "jax"])
    assert len(wanted) == 24
    assert len({pairs.pair_id(pair, RULE, 1) for pair in wanted}) == 24
    assert [pair["point"]["kind"] for pair in wanted[:4]] == ["equal", "5 % slower"] * 2
    assert {pair["backend"] for pair in wanted[:4]} == {"torch", "jax"}
    assert {pair["point"]["model"] for pair in wanted} == set(noise.MODELS)
    assert {(pair["ours"]["calls"], pair["theirs"]["calls"]) for pair in wanted} == {(20, 20), (21, 20)}


def outcome_of(kind, ratio, index=0):
    pair = noise.make_pairs(1, ["torch"])[list(noise.KINDS).index(kind)]
    pair["point"]["repeat"] = index
    return noise.judge([ok_record(pair, i, ratio) for i in range(3)])


@pytest.mark.parametrize(
    ["kind", "ratio", "is_hit"],
    [
        ("equal", 1.0, False),
        ("equal", 1.1, True),
        ("equal", 0.9, True),
        ("5 % slower", 1.05, True),
        ("5 % slower", 1.0, False),
        ("5 % slower", 0.9, False),
    ],
)
def test_a_false_verdict_and_a_found_slow_down_are_counted(kind, ratio, is_hit):
    assert outcome_of(kind, ratio).is_hit is is_hit


@pytest.mark.parametrize(
    ["num_false", "num_missed", "num_failed", "holds"],
    [(1, 1, 0, True), (2, 0, 0, False), (0, 2, 0, False), (0, 0, 1, False)],
)
def test_the_audit_passes_with_5_percent_false_and_95_percent_found_and_nothing_failed(
    num_false, num_missed, num_failed, holds
):
    outcomes = [outcome_of("equal", 1.2 if i < num_false else 1.0, i) for i in range(20)]
    outcomes += [outcome_of("5 % slower", 1.0 if i < num_missed else 1.05, i) for i in range(20)]
    for i in range(num_failed):
        outcomes[-1 - i] = dataclasses.replace(outcomes[-1 - i], result=None)
    console = Console(record=True, width=150, file=io.StringIO())
    assert noise.report(outcomes, console) is holds
    text = console.export_text()
    assert text.count("FAIL") == (0 if holds else 1)
    assert f"{5 * num_false}.0% false verdicts" in text
    if num_failed:
        assert "1 comparisons failed" in text


def test_a_failed_process_makes_the_comparison_fail():
    pair = noise.make_pairs(1, ["torch"])[0]
    failed = {**ok_record(pair, 1), "status": "oom"}
    assert noise.judge([ok_record(pair, 0), failed]).result is None


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_two_programs_of_one_model_are_built_compared_and_timed(tmp_path, backend):
    pytest.importorskip(backend)
    pair = noise.make_pairs(1, [backend])[0]
    pair["point"]["model"] = "vit_ti16:depth=1,width=48,num_heads=3,mlp_dim=96,num_classes=10"
    store = pairs.open_store(tmp_path)
    with Interrupt() as interrupt:
        options = {"store": store, "interrupt": interrupt, "rule": RULE, "num_processes": 2, "num_threads": 1}
        ((first, second),) = pairs.run_pairs([pair], child_module="experiments.noise_steps", **options).values()
    assert [first["status"], second["status"]] == ["ok", "ok"], first["error"]
    assert first["outputs"]["error"] == 0.0
    assert first["clock"] == "cpu_s"
    assert first["facts"]["effective"]
