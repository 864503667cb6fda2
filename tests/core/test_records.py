"""The record store: nothing measured is lost, nothing torn is read, and every fault is named."""

import contextlib
import copy
import errno
import fcntl
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitcmp import records
from vitcmp.records import FINAL, SCHEMA, STATUSES, RecordError, RecordStore, latest, validate_record

needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full: Linux")


def make_record(case_number=0, run=0, status="ok", **changes):
    timings = {"wall_s": [0.011, 0.012], "cpu_s": [0.02, 0.021], "converged": False}
    case_keys = (
        "backend model spec image_size batch_size mode numerics attention compile layout platform device_name "
        "num_threads framework_version weights"
    )
    return {
        "schema": SCHEMA,
        "method_version": 1,
        "case_id": f"{case_number:064x}",
        "run": run,
        "status": status,
        "error": None if status == "ok" else {"type": None, "message": "é\nü", "traceback": "", "stage": None},
        "started_at": "2026-11-20T05:00:00.000+00:00",
        "ended_at": "2026-11-20T05:00:01.000+00:00",
        "case": dict.fromkeys(case_keys.split()),
        "device": dict.fromkeys(("platform", "name", "num_devices", "memory_bytes", "num_threads", "versions")),
        "environment": {"python": "3.11"},
        "effective": {"num_threads": 2},
        "num_params": 5,
        "flops": {"analytic": 10},
        "compile_s": None,
        "compile_cache": None,
        "warmup": {"wall_s": [0.3], "stable": True},
        "latency": timings,
        "throughput": {"calls_per_sample": 4, **copy.deepcopy(timings)},
        "memory": {
            "parameters_bytes": 20,
            "activation_peak_bytes": None,
            "activation_source": None,
            "process_peak_bytes": 4096,
            "process_source": "VmHWM",
        },
        "contention": {
            "others_cpu_share": 0.0,
            "steal_share": None,
            "load_1m_before": 0.0,
            "load_1m_after": 0.5,
            "involuntary_switches": 0,
        },
        "clocks": None,
        "outputs": {"logits": [-1.5, 0.0], "shape": [1, 2]},
        "stages_s": {"import": 1.5},
        **changes,
    }


def failed(case_number=0, status="oom"):
    """A record of an attempt that measured nothing."""
    unknown = "device effective num_params flops warmup latency throughput memory contention outputs stages_s"
    return make_record(case_number, status=status, **dict.fromkeys(unknown.split()))


@pytest.fixture
def store(tmp_path):
    return RecordStore(tmp_path / "out").open()


def line_of(record):
    return json.dumps(record) + "\n"


# Validation


@pytest.mark.parametrize("record", [make_record(), *(failed(status=status) for status in STATUSES if status != "ok")])
def test_good_records_have_no_faults(record):
    assert validate_record(record) == []


def test_an_interrupted_record_needs_no_error():
    assert validate_record({**failed(status="interrupted"), "error": None}) == []


def changed(path, value):
    """Returns a good record with one value replaced, or taken out where `value` is ...; `path` is dotted."""
    record = make_record()
    *parents, last = path.split(".")
    place = record
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return record


@pytest.mark.parametrize("key", list(make_record()))
def test_every_key_is_required_and_typed(key):
    assert validate_record(changed(key, ...)) == [f"{key} is missing"]
    assert key in validate_record(changed(key, {1, 2}))[0]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("schema", "vitcmp-record/2", "expected 'vitcmp-record/1'"),
        ("method_version", "1", "expected int"),
        ("case_id", "abc", "sha256"),
        ("run", -1, "0 or more"),
        ("run", True, "expected int"),
        ("status", "fine", "one of ok oom"),
        ("status", "oom", "error is null"),
        ("error", {"type": "E", "message": "", "traceback": "", "stage": "time"}, "error is not null"),
        ("started_at", "yesterday", "ISO 8601"),
        ("ended_at", "2026-11-20T05:00:00", "UTC"),
        ("case.weights", ..., "case.weights is missing"),
        ("latency", None, "latency is null"),
        ("device", None, "device is null"),
        ("latency.wall_s", [], "above 0"),
        ("latency.wall_s", [0.1, 0.0], "above 0"),
        ("latency.wall_s", [0.1, -0.1], "above 0"),
        ("latency.wall_s", [0.1, "0.1"], "above 0"),
        ("latency.cpu_s", [0.1], "for each of wall_s"),
        ("latency.cpu_s", [0.1, 0.0], "above 0"),
        ("throughput.wall_s", [0.0], "above 0"),
        ("throughput.calls_per_sample", ..., "calls_per_sample is missing"),
        ("warmup.wall_s", None, "above 0"),
        ("compile_s", 0.0, "compile_s is 0.0"),
        ("stages_s.import", 0, "import is 0"),
        ("memory.process_peak_bytes", 0, "bytes above 0"),
        ("memory.parameters_bytes", ..., "missing"),
        ("contention.steal_share", math.nan, "finite"),
        ("outputs.logits", [1.0, math.inf], "outputs.logits[1] is inf"),
        ("flops.analytic", math.nan, "finite"),
        ("effective.kernel", {"flash"}, "not JSON"),
        ("environment.python", (3, b"11"), "not JSON"),
        ("environment", {1: 2}, "expected a string"),
    ],
)
def test_each_fault_is_named(path, value, words):
    faults = validate_record(changed(path, value))
    assert len(faults) == 1
    assert words in faults[0]


def test_all_faults_come_at_once_and_no_record_is_no_crash():
    assert len(validate_record(changed("run", -1) | {"case_id": "", "status": "?"})) == 3
    for value in (None, [], "record", 1):
        assert len(validate_record(value)) == 1


def test_cpu_seconds_may_be_unknown():
    assert validate_record(changed("latency.cpu_s", None)) == []


def test_final_statuses_are_all_but_interrupted():
    assert set(STATUSES) - set(FINAL) == {"interrupted"}


# Reading and writing


def test_what_is_appended_is_loaded_in_order(store):
    written = [make_record(1), failed(2), make_record(1, run=1)]
    for record in written:
        store.append(record)
    assert store.load() == written
    assert store.notes == []
    assert store.path.read_bytes().count(b"\n") == 3


def test_an_empty_or_absent_folder_holds_no_records(tmp_path, store):
    assert store.load() == []
    assert RecordStore(tmp_path / "absent").load() == []


def test_every_jsonl_file_under_the_folder_is_read_and_the_own_file_last(store):
    store.append(make_record(1))
    (store.folder / "elsewhere").mkdir()
    (store.folder / "elsewhere" / "zebra.jsonl").write_text(line_of(make_record(2)))
    (store.folder / "shared.jsonl").write_text("\n" + line_of(make_record(1, status="error", error=failed()["error"])))
    (store.folder / "notes.json").write_text("not records")
    loaded = store.load()
    assert sorted(int(record["case_id"], 16) for record in loaded) == [1, 1, 2]
    assert latest(loaded)[make_record(1)["case_id"], 0]["status"] == "ok"


def test_the_last_record_of_a_case_and_run_wins():
    first, again, other = failed(1), make_record(1), make_record(1, run=1)
    assert latest([first, other, again]) == {(again["case_id"], 0): again, (again["case_id"], 1): other}


@pytest.mark.parametrize(
    "torn", [b'{"schema": "vitcmp-rec', b"\x00" * 300 + b"\n", b"garbage\n", b"\xff\xfe", b"[1]\n", b"7\n"]
)
def test_a_torn_last_line_is_set_aside_and_the_others_stand(store, torn):
    store.append(make_record(1))
    good = store.path.read_bytes()
    store.path.write_bytes(good + torn)
    assert store.load() == [make_record(1)]
    assert store.path.read_bytes() == good
    assert (store.folder / "records.torn-1").read_bytes() == torn
    assert "torn" in " ".join(store.notes)
    store.append(make_record(2))
    assert store.load() == [make_record(1), make_record(2)]


def test_a_file_that_is_one_torn_line_becomes_empty(store):
    store.path.write_bytes(b"{" * 200_000)  # longer than one block read backwards
    assert store.load() == []
    assert store.path.read_bytes() == b""
    assert (store.folder / "records.torn-1").stat().st_size == 200_000


def test_append_sets_a_torn_line_aside_first_and_never_glues_to_it(store):
    for n in (1, 2):
        with store.path.open("ab") as file:
            file.write(b'{"torn": ')
        store.append(make_record(n))
    assert store.load() == [make_record(1), make_record(2)]
    assert (store.folder / "records.torn-2").read_bytes() == b'{"torn": '


def test_a_record_that_lacks_only_its_newline_is_kept(store):
    store.path.write_text(line_of(make_record(1)).rstrip("\n"))
    assert store.load() == [make_record(1)]
    store.append(make_record(2))
    assert store.load() == [make_record(1), make_record(2)]
    assert not (store.folder / "records.torn-1").exists()


def test_a_torn_line_of_somebody_elses_file_is_passed_over_and_left(store):
    other = store.folder / "other.jsonl"
    other.write_text(line_of(make_record(1)) + '{"schema"')
    before = other.read_bytes()
    assert store.load() == [make_record(1)]
    assert other.read_bytes() == before
    assert "other.jsonl:2" in store.notes[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json}", "not a JSON object"),
        (json.dumps({**make_record(5), "schema": "other/9"}), f"schema is 'other/9', expected '{SCHEMA}'"),
        (json.dumps({"a": 1}), f"schema is None, expected '{SCHEMA}'"),
        (json.dumps({**make_record(5), "run": -1}), "run is -1"),
    ],
)
def test_a_bad_line_in_the_middle_is_an_error_that_names_file_and_line(store, line, words):
    text = line_of(make_record(1)) + line + "\n" + line_of(make_record(2))
    store.path.write_text(text)
    with pytest.raises(RecordError, match=rf"{re.escape(str(store.path))}:2: .*{re.escape(words)}"):
        store.load()
    assert store.path.read_text() == text


def test_a_file_of_another_kind_is_an_error_and_is_not_touched(store):
    store.path.write_text('{\n "pretty": 1\n}')
    with pytest.raises(RecordError, match=":1: not a JSON object"):
        store.load()
    assert store.path.read_text() == '{\n "pretty": 1\n}'


def test_a_last_line_of_another_schema_is_an_error_and_not_torn(store):
    store.path.write_text(line_of({**make_record(1), "schema": "vitcmp-record/9"}))
    with pytest.raises(RecordError, match="vitcmp-record/9"):
        store.load()


def kept_record(error):
    path = Path(str(error.value).split("kept in ")[1].split(": move")[0])
    assert path.suffix == ".jsonl"
    return json.loads(path.read_text())


@pytest.fixture
def scratch(monkeypatch, tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(records.tempfile, "tempdir", str(folder))
    return folder


def test_an_invalid_record_is_refused_and_kept_elsewhere(store, scratch):
    with pytest.raises(RecordError, match=r"latency\.wall_s") as error:
        store.append(changed("latency.wall_s", [0.0]))
    assert kept_record(error)["latency"]["wall_s"] == [0.0]
    assert store.load() == []


@needs_dev_full
def test_a_full_disk_is_a_clear_error_and_the_record_is_kept_elsewhere(store, scratch):
    store.path.symlink_to("/dev/full")
    with pytest.raises(RecordError, match=r"records.jsonl: No space left on device. The record is kept in") as error:
        store.append(make_record(1))
    assert kept_record(error) == make_record(1)
    assert store.load() == []


@needs_dev_full
def test_a_record_that_fits_nowhere_is_in_the_message(store, monkeypatch):
    store.path.symlink_to("/dev/full")
    monkeypatch.setattr(records.tempfile, "tempdir", "/dev/full")
    with pytest.raises(RecordError, match="here it is") as error:
        store.append(make_record(1))
    assert json.loads(str(error.value).split("here it is: ")[1]) == make_record(1)


def test_a_write_that_is_cut_short_leaves_the_file_as_it_was(store, scratch):
    """RLIMIT_FSIZE: the kernel writes as far as the limit, and fails the rest."""
    store.append(make_record(1))
    size = store.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
    try:
        with pytest.raises(RecordError, match="File too large") as error:
            store.append(make_record(2, environment={"padding": "x" * size}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.path.stat().st_size == size
    assert "here it is" in str(error.value)  # the other file met the same limit
    store.append(make_record(3))
    assert store.load() == [make_record(1), make_record(3)]


def test_short_writes_are_finished(store, monkeypatch):
    write = os.write
    monkeypatch.setattr(records.os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    store.append(make_record(1))
    monkeypatch.undo()
    assert store.load() == [make_record(1)]


# The folder


def test_the_folder_is_made_with_its_parents(tmp_path):
    assert RecordStore(tmp_path / "a" / "b" / "c").open().folder.is_dir()


@pytest.mark.parametrize("path", ["file", "file/below", "file/far/below"])
def test_a_path_through_a_file_is_a_clear_error(tmp_path, path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RecordError, match=rf"{re.escape(str(tmp_path / 'file'))} is a file"):
        RecordStore(tmp_path / path).open()
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc, where not even root can write")
def test_a_folder_that_cannot_be_made_or_written_is_an_error_before_anything_runs():
    with pytest.raises(RecordError, match="cannot make the folder"):
        RecordStore("/proc/vitcmp").open()
    with pytest.raises(RecordError, match="cannot write records to /proc"):
        RecordStore("/proc").open()
    with pytest.raises(RecordError, match="cannot lock /proc"), RecordStore("/proc").lock():
        pass


@pytest.mark.parametrize("name", ["TemporaryFile", "open"])
def test_a_read_only_file_system_or_file_is_an_error_before_anything_runs(store, monkeypatch, name):
    store.append(make_record(1))

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(records.tempfile if name == "TemporaryFile" else records.os, name, refuse)
    with pytest.raises(RecordError, match=r"cannot write records to .*Read-only file system"):
        RecordStore(store.folder).open()


def test_records_of_a_read_only_folder_can_be_read(store, monkeypatch):
    store.path.write_text(line_of(make_record(1)) + '{"torn')
    before = store.path.read_bytes()
    open_as_root = os.open

    def refuse_to_write(path, flags, *mode):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open_as_root(path, flags, *mode)

    monkeypatch.setattr(records.os, "open", refuse_to_write)
    assert store.load() == [make_record(1)]
    assert store.path.read_bytes() == before
    assert "Read-only" in " ".join(store.notes)


def test_a_second_sweep_is_refused_and_told_who_has_the_folder(store):
    with (
        store.lock(),
        pytest.raises(RecordError, match=rf"pid {os.getpid()}\).*--out"),
        RecordStore(store.folder).lock(),
    ):
        pass
    with store.lock():  # free again
        pass


# Other processes

APPENDER = """
import json, sys
from vitcmp.records import RecordStore
store = RecordStore(sys.argv[1])
first, count, record = int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
print("ready", flush=True)
for i in range(first, first + count):
    store.append({**record, "case_id": f"{i:064x}", "environment": {"padding": "x" * (i * 977 % 20000)}})
    print(i, flush=True)
"""
HOLDER = """
import sys
from vitcmp.records import RecordStore
with RecordStore(sys.argv[1]).lock():
    print("ready", flush=True)
    sys.stdin.read()
"""


def start(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    root = str(Path(__file__).parents[2])
    child = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": root}, **pipes)
    assert child.stdout.readline() == "ready\n"
    return child


@contextlib.contextmanager
def ended(child):
    with child:
        try:
            yield child
        finally:
            child.kill()


def case_numbers(loaded):
    return sorted(int(record["case_id"], 16) for record in loaded)


def test_records_of_several_processes_are_neither_torn_nor_lost(store):
    children = [start(APPENDER, store.folder, 100 * i, 30, json.dumps(make_record())) for i in range(3)]
    for child in children:
        child.communicate()
        assert child.returncode == 0
    assert case_numbers(store.load()) == [100 * i + j for i in range(3) for j in range(30)]
    assert store.notes == []


def test_append_waits_for_the_process_that_is_writing(store):
    """Else it would take the other's half-written line for a torn one."""
    store.path.write_bytes(b'{"half')
    with store.path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        child = start(APPENDER, store.folder, 0, 1, json.dumps(make_record()))
        time.sleep(0.2)
        assert store.path.read_bytes() == b'{"half'
        store.path.write_text(line_of(make_record(7)))
    child.communicate()
    assert case_numbers(store.load()) == [0, 7]


def test_kill_9_loses_no_record_that_append_had_returned_for(store):
    """Again and again, at random moments: what was reported is there, once, and the file can be appended to."""
    rng, reported = random.Random(0), []
    for i in range(6):
        with ended(start(APPENDER, store.folder, 1000 * i, 999, json.dumps(make_record()))) as child:
            time.sleep(rng.uniform(0.005, 0.05))
            child.send_signal(signal.SIGKILL)
            reported += [int(line) for line in child.stdout.read().split("\n")[:-1]]
        loaded = case_numbers(store.load())
        assert len(loaded) == len(set(loaded))
        assert set(reported) <= set(loaded)
    assert reported


def test_a_write_that_kill_9_cut_anywhere_is_set_aside(store):
    """Every length that a line can be cut to, without waiting for a kill to hit it."""
    whole = line_of(make_record(2)).encode()
    for cut in (*range(1, 40), *range(40, len(whole) - 2, 97), len(whole) - 2):
        store.path.write_bytes(line_of(make_record(1)).encode() + whole[:cut])
        assert case_numbers(store.load()) == [1]
        store.append(make_record(3))
        assert case_numbers(store.load()) == [1, 3]


def test_the_lock_is_free_after_its_holder_was_killed(store):
    with ended(start(HOLDER, store.folder)) as child:
        with pytest.raises(RecordError, match=f"pid {child.pid}"), store.lock():
            pass
        child.kill()
        child.wait()
        with store.lock():
            pass
