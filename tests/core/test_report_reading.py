"""Reading for a report: what is bad is named and left out, the rest is shown, and nothing is changed on the disk."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.core.fake_records import failure, record
from vitcmp.records import METHOD_VERSION, RecordStore
from vitcmp.report.html import render_html
from vitcmp.report.markdown import results_table
from vitcmp.report.payload import payload_of, rows_of
from vitcmp.report.reading import read_source, read_sources, why_unfit

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "results" / "records"


def write(path, *values):
    """Writes a line for each value: text as it is, anything else as JSON."""
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def changed(path, value):
    """Returns a good record with one value replaced; `path` is dotted."""
    one = record()
    *parents, last = path.split(".")
    place = one
    for key in parents:
        place = place[key]
    place[last] = value
    return one


def test_a_bad_line_is_named_with_file_line_and_reason_and_the_rest_is_shown(tmp_path):
    negative = changed("latency.wall_s", [-1.0])
    write(tmp_path / "records.jsonl", record(), "{not json", "", negative, [1], 5, None, record("torch"))
    write(tmp_path / "below" / "more.jsonl", record("jax", image_size="384"), {"schema": "somebody-else/7"})
    source = read_source(tmp_path)
    assert [r["case"]["image_size"] for r in source.records] == ["384", "224", "224"]
    assert source.num_left_out == len(source.faults) == 6
    below, *faults = source.faults
    assert below.startswith("below/more.jsonl:2: ") and "is missing" in below
    assert [fault.partition(": ")[0] for fault in faults] == [f"records.jsonl:{i}" for i in (2, 4, 5, 6, 7)]
    assert faults[0] == "records.jsonl:2: not JSON" and "latency.wall_s is [-1.0]" in faults[1]
    assert faults[3] == "records.jsonl:6: a record is an object, not int"


def test_good_folders_read_as_the_strict_store_reads_them_and_stay_as_they_are(tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / "records")
    torn = (folder / "records.jsonl").read_bytes() + b'{"schema": "vitcmp-re'
    (folder / "records.jsonl").write_bytes(torn)
    source = read_source(folder)
    assert (folder / "records.jsonl").read_bytes() == torn and len(list(folder.iterdir())) == 2
    [fault] = source.faults
    assert fault.endswith(": not JSON: torn, or still being written")
    assert source.records == RecordStore(folder).load()


def test_records_of_an_experiment_in_the_same_folder_are_passed_over(tmp_path):
    write(tmp_path / "records.jsonl", record())
    write(tmp_path / "noise" / "records.jsonl", *({"schema": "vitcmp-noise/1"} for _ in range(9)))
    source = read_source(tmp_path)
    assert len(source.records) == 1 and source.num_left_out == 0
    assert source.faults == ["noise/records.jsonl: passed over, its schema is 'vitcmp-noise/1'"]


def test_what_another_program_shows_is_said_to_be_shown_by_it(tmp_path):
    write(tmp_path / "records.jsonl", {"schema": "vitcmp-capacity/1"})
    [fault] = read_source(tmp_path).faults
    assert fault.endswith("its schema is 'vitcmp-capacity/1'; python -m experiments.capacity.report shows it")


@pytest.mark.parametrize(
    ["path", "value", "reason"],
    [
        ("case.image_size", "12y", "case.image_size='12y' must be a side"),
        ("case.image_size", "9999999", "no such sizes"),
        ("case.batch_size", 0, "no such sizes"),
        ("case.batch_size", 10**400, "no such sizes"),
        ("case.batch_size", True, "case.batch_size is True"),
        ("case.model", ["vit"], "case.model is ['vit']"),
        ("case.spec", "vit", "case.spec is 'vit'"),
        ("case.num_threads", "2", "case.num_threads is '2'"),
        ("case.attention", 5, "case.attention is 5"),
        ("case.batch_norm", {}, "case.batch_norm is {}"),
        ("throughput.wall_s", [10**400], "throughput.wall_s is not a plausible number"),
        ("throughput.calls_per_sample", 0, "throughput.calls_per_sample is not a plausible number"),
        ("throughput.calls_per_sample", "4", "throughput.calls_per_sample is not a plausible number"),
        ("flops.analytic", "many", "flops.analytic is not a plausible number"),
        ("flops.step", -5, "flops.step is not a plausible number"),
        ("num_params", 10**40, "num_params is not a plausible number"),
        ("contention.others_cpu_share", "", "contention.others_cpu_share is not a plausible number"),
        ("outputs.logits", "abc", "outputs.logits is no list of numbers"),
        ("outputs.logits", [10**400], "outputs.logits is no list of numbers"),
        ("outputs.loss", [1], "outputs.loss is no number"),
        ("error", {"type": 5, "message": None, "traceback": None, "stage": None}, "status is ok but error is not null"),
        ("device.versions", [1], "device.versions is no object of texts"),
        ("device.versions", {"jax": 1}, "device.versions is no object of texts"),
        ("device.name", 5, "device.name is no text"),
        ("environment.cpu", [], "environment.cpu is no text"),
        ("environment.memory_bytes", 10**400, "environment.memory_bytes is not a plausible number"),
        ("case.spec.family", [], "case.spec.family is no text"),
        ("case.max_sampling_s", [], "case.max_sampling_s is []"),
        ("throughput.calls_per_sample", None, "throughput.calls_per_sample is not a plausible number"),
        ("throughput.wall_s", [0.1, 5e-324], "throughput.wall_s is not a plausible number"),
        ("method_version", METHOD_VERSION + 1, "this code knows 1 to"),
        ("method_version", 0, "this code knows 1 to"),
    ],
)
def test_what_the_schema_leaves_open_and_a_report_cannot_show_is_left_out_too(tmp_path, path, value, reason):
    write(tmp_path / "records.jsonl", record("torch"), changed(path, value))
    source = read_source(tmp_path)
    assert len(source.records) == 1 and source.num_left_out == 1
    assert source.faults[0].startswith("records.jsonl:2: ") and reason in source.faults[0]
    render_html(payload_of([source]))
    results_table(source.records)


def test_a_record_with_anothers_case_id_is_left_out(tmp_path):
    other = record(numerics="bfloat16", run=1) | {"case_id": record()["case_id"]}
    write(tmp_path / "records.jsonl", record(), other, record("torch"), record(run=2))
    source = read_source(tmp_path)
    assert [r["run"] for r in source.records] == [0, 0, 2] and "records.jsonl:2: its case is not" in source.faults[0]
    render_html(payload_of([source]))


def test_the_same_records_read_twice_are_no_second_machine(tmp_path):
    write(tmp_path / "a" / "records.jsonl", record(), record(run=1))
    write(tmp_path / "b" / "records.jsonl", record(), record(run=1), record("torch"))
    (tmp_path / "b" / "again.jsonl").symlink_to("../a/records.jsonl")
    a, b = read_sources([str(tmp_path / "b"), str(tmp_path / "a")])
    assert (len(a.records), len(b.records), b.num_left_out) == (2, 1, 4)
    assert a.faults == [] and b.faults == ["4 records left out: the same were read before"]


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    write(tmp_path / "records.jsonl", record())
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    source = read_source(tmp_path)
    assert source.faults == [f"{name}.jsonl: is no file that can be read" for name in ("gone", "pipe")]
    with pytest.raises(ValueError, match="pipe.jsonl is neither a folder nor a file"):
        read_sources([str(tmp_path / "pipe.jsonl")])


def test_unknown_and_zero_values_are_fit():
    unknown = record(others=0.0) | {"throughput": None, "flops": None, "contention": None, "outputs": None}
    assert why_unfit(unknown) is None and why_unfit(failure()) is None and why_unfit(record(others=0.0)) is None
    assert "error.type is no text" in why_unfit(failure() | {"error": {"type": 5, "message": None}})


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 50_000, '{"a": ' + "9" * 5000 + "}", '"\ud800"'])
def test_json_that_breaks_a_parser_is_only_a_bad_line(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b" \n" + line.encode("utf-8", "surrogatepass") + b"\n" + json.dumps(record()).encode() + b"\n")
    source = read_source(tmp_path)
    assert len(source.records) == 1 and source.num_left_out == 1


def test_a_deep_record_that_parses_is_only_a_bad_line(tmp_path):
    deep = record()
    deep["effective"] = value = {}
    for _ in range(900):
        value["a"] = value = {}
    write(tmp_path / "records.jsonl", record("torch"), deep)
    source = read_source(tmp_path)
    assert source.num_left_out in (0, 1) and len(source.records) == 2 - source.num_left_out
    render_html(payload_of([source]))


def test_sources_are_sorted_named_by_folder_and_told_apart(tmp_path):
    for place in ("b/same", "a/same", "z", "c"):
        write(tmp_path / place / "records.jsonl", record())
    words = [str(tmp_path / word) for word in ("z", "b/same", "a/same", "c/records.jsonl", "z/")]
    sources = read_sources(words)
    assert [source.name for source in sources] == ["c/records.jsonl", "same", "same (2)", "z"]
    assert [source.name for source in read_sources(words[::-1])] == [source.name for source in sources]
    page = render_html(payload_of(sources))
    assert str(tmp_path) not in page and tmp_path.name not in page


def test_a_folder_is_called_by_its_name_however_it_was_given(tmp_path, monkeypatch):
    write(tmp_path / "records.jsonl", record())
    monkeypatch.chdir(tmp_path)
    [source] = read_sources(["."])
    assert source.name == tmp_path.name


def test_what_is_not_there_or_holds_nothing_is_one_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as caught:
        read_sources([str(tmp_path / "absent"), str(tmp_path / "empty")])
    absent, empty = str(caught.value).splitlines()
    assert absent.endswith("absent is not there") and "empty holds no records: there is no *.jsonl" in empty
    with pytest.raises(ValueError, match="name one or more folders"):
        read_sources([])
    bad = write(tmp_path / "bad" / "records.jsonl", "{", "{")
    with pytest.raises(ValueError, match="no record can be shown\nrecords.jsonl:1: not JSON"):
        read_sources([str(bad)])


def test_one_bad_source_beside_a_good_one_is_shown_with_its_faults(tmp_path):
    write(tmp_path / "bad" / "records.jsonl", "{")
    write(tmp_path / "good" / "records.jsonl", record())
    payload = payload_of(read_sources([str(tmp_path / "bad"), str(tmp_path / "good")]))
    assert [(s["name"], s["num_records"], s["left_out"]) for s in payload["sources"]] == [("bad", 0, 1), ("good", 1, 0)]
    assert len(rows_of(payload)) == 1


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", record())
    write(tmp_path / "b.jsonl", record("torch"))
    real = open

    def refuse(path, *rest, **named):
        if Path(path).name == "a.jsonl":
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **named)

    monkeypatch.setattr("builtins.open", refuse)
    source = read_source(tmp_path)
    assert source.faults == ["a.jsonl: cannot be read: Permission denied"] and len(source.records) == 1
