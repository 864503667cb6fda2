"""The record store: nothing measured is lost, nothing torn is read, and every fault is named."""

import contextlib
import errno
import fcntl
import json
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

from tests.record_factory import changed, failed, make_record
from vitcmp import records
from vitcmp.records import SCHEMA, RecordError, RecordStore, latest

needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full: Linux")


@pytest.fixture
def store(tmp_path):
    return RecordStore(tmp_path / "out").open()


def line_of(record):
    return json.dumps(record) + "\n"


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


def test_an_experiments_records_in_a_folder_below_are_passed_over_and_in_the_own_file_they_are_an_error(store):
    below = RecordStore(store.folder / "noise", schema="vitcmp-pair/1", validate=lambda record: []).open()
    below.append({"schema": "vitcmp-pair/1"})
    store.append(make_record(1))
    assert store.load() == [make_record(1)]
    assert "noise/records.jsonl: passed over, its schema is 'vitcmp-pair/1'" in store.notes[0]
    below.path.rename(store.path)
    with pytest.raises(RecordError, match=f"schema is 'vitcmp-pair/1', expected '{SCHEMA}'"):
        store.load()


def test_a_store_of_other_records_checks_them_its_own_way(tmp_path):
    other = RecordStore(tmp_path, schema="x/1", validate=lambda record: [] if record.get("n") else ["n is missing"])
    other.append({"schema": "x/1", "n": 1})
    with pytest.raises(RecordError, match="n is missing"):
        other.append({"schema": "x/1"})
    assert other.load() == [{"schema": "x/1", "n": 1}]


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
