"""The result table of the README is what committed records give, to the byte."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.capacity import schema as capacity
from experiments.readme_table import render
from tests.core import fake_capacity
from tests.core.fake_records import GPU, failure, record
from vitcmp.backend import Device
from vitcmp.cases import Case, get_preset, make_cases
from vitcmp.records import RecordStore
from vitcmp.report.markdown import named_folders, replace_table, results_table, sweep_commands
from vitcmp.report.summary import settings_of

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "results"
MARKERS = "<!-- results: begin {} -->\n<!-- results: end -->\n"
# The cases that a command of vitcmp.run asks for on a given device, as their ids.
ASK = """
import json, sys
import vitcmp.run as run
from vitcmp.backend import Device
from vitcmp.cases import get_preset, make_cases
devices, words = json.loads(sys.stdin.read())
run.FLAGS(["run", *words])
ids = []
for backend in run.FLAGS.backend:
    device = Device(**devices[backend])
    grid = run.override(get_preset(run.FLAGS.preset, device.platform), run.given_axes())
    ids += [case.case_id for case in make_cases(grid, backend, device, framework_version="1")]
print(json.dumps([ids, run.FLAGS.runs]))
"""


def run_program(*words, cwd=ROOT):
    command = [sys.executable, "-W", "error", "-m", "experiments.readme_table", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})


def rows_of(text):
    """Returns the cells of the table's rows, below its head."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return rows[2:]


@pytest.mark.parametrize("page", [ROOT / "README.md", FIXTURE / "README.md"], ids=["README", "fixture"])
def test_the_tables_of_a_page_are_what_its_records_give(page):
    text = page.read_text(encoding="utf-8")
    for folder in named_folders(text):
        assert (page.parent / folder).is_dir(), f"{page} names records that are not there: {folder}"
        assert replace_table(text, folder, render(page.parent / folder)) == text
    assert named_folders((FIXTURE / "README.md").read_text(encoding="utf-8")) == ["records"]


def test_the_program_writes_a_page_once_and_says_when_it_is_stale(tmp_path):
    shutil.copytree(FIXTURE / "records", tmp_path / "records")
    page = tmp_path / "README.md"
    page.write_text("# before\n" + MARKERS.format("").replace("begin  ", "begin ") + "after\n")
    assert run_program("--readme", page, tmp_path / "records").returncode == 0
    text = page.read_text()
    assert text.startswith("# before\n<!-- results: begin records -->\n\n**forward on ") and text.endswith(
        "-->\nafter\n"
    )
    [block] = re.findall(r"<!-- results: begin.*end -->", text, re.DOTALL)
    assert block in (FIXTURE / "README.md").read_text()
    assert run_program("--readme", page, "--check").returncode == 0
    page.write_text(text.replace("faster", "slower"))
    stale = run_program("--readme", page, "--check")
    assert stale.returncode == 1 and "not what its records give" in stale.stdout
    assert run_program("--readme", page).returncode == 0 and page.read_text() == text


def test_a_page_without_markers_or_records_is_an_error_and_stays_as_it_was(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# nothing here\n")
    shutil.copytree(FIXTURE / "records", tmp_path / "records")
    without = run_program("--readme", page, tmp_path / "records")
    assert without.returncode == 2 and "no markers <!-- results: begin records -->" in without.stderr
    page.write_text(MARKERS.format("absent"))
    absent = run_program("--readme", page)
    assert absent.returncode == 2 and "absent is not a folder of records" in absent.stderr
    assert page.read_text() == MARKERS.format("absent")


def test_records_of_each_kind_have_their_table(tmp_path):
    store = RecordStore(tmp_path, schema=capacity.SCHEMA, validate=capacity.validate).open()
    for run in fake_capacity.records(2):
        store.append(run)
    assert render(tmp_path).startswith("**Resolution, or only compute?**")
    assert render(FIXTURE / "records").startswith("**forward on ")
    peers = (ROOT / "experiments" / "results").glob("*-peers")
    assert render(min(peers)).startswith("**Our models against other libraries'**")


def test_several_folders_have_their_own_tables():
    text = MARKERS.format("a") + "between\n" + MARKERS.format("b")
    assert named_folders(text) == ["a", "b"]
    written = replace_table(replace_table(text, "b", "of b\n"), "a", "of a\n")
    assert written.index("of a") < written.index("between") < written.index("of b")
    assert replace_table(written, "a", "of a\n") == written
    with pytest.raises(ValueError, match="begin c --> .*; there are those of a, b"):
        replace_table(text, "c", "of c\n")


def test_a_row_has_both_sides_with_interval_n_verdict_and_parity():
    text = results_table([record("jax", 10.0, batch_size=4), record("torch", 13.2, batch_size=4)])
    [row] = rows_of(text)
    assert row[:6] == ["`vit_ti16`", "224", "4", "float32", "2.507", "5.700"]
    assert re.fullmatch(r"10\.00 \[9\.9\d, 10\.\d\d\]<br>xla jit nhwc<br>1 x 60", row[6])
    assert re.fullmatch(r"13\.20 \[13\.\d\d, 13\.\d\d\]<br>flash eager nchw<br>1 x 60", row[7])
    assert re.fullmatch(r"JAX 1\.32x faster<br>\[1\.3\d, 1\.3\d\]", row[8])
    # of the throughput's own 8 and 10.56 ms a call
    assert re.fullmatch(r"500\.0 ±0\.\d+ %", row[9]) and re.fullmatch(r"378\.8 ±0\.\d+ %", row[10])
    assert row[11:13] == ["12.3", "12.3"]
    assert re.fullmatch(r"equal<br>0 < \d\.\de-6", row[13])


def test_under_the_table_stands_what_it_was_measured_on_and_with():
    records = [record("jax"), record("torch")]
    for one in records:
        one["environment"] = {"cpu": "AMD EPYC", "num_cpus": 2, "memory_bytes": 24 * 2**30, "os": "Debian 12"}
        one["environment"] |= {"commit": "0123456789abcdef", "is_dirty": True, "python": "3.11.7", "numpy": "2.4.6"}
        one["device"] |= {"platform": "cpu", "versions": {one["case"]["backend"]: "1.2", "platform": "cpu"}}
    text = results_table(records)
    assert "**forward on AMD EPYC (cpu, 2 threads), weights seed:0**" in text
    assert "- Machine: AMD EPYC, 2 CPUs, 24 GiB, Debian 12.\n" in text
    assert "- Versions: Python 3.11.7, jax 1.2, numpy 2.4.6, torch 1.2.\n" in text
    assert "- Measured: 2026-11-20.\n- Commit: 0123456789 with changes.\n" in text
    assert "XLA (jax), profiler (torch): never compare the two" in text


def test_an_accelerator_is_named_with_its_memory_and_its_runtime_on_one_line():
    one = record("jax", **GPU)
    one["device"] |= {"platform": "gpu", "name": "NVIDIA H200", "memory_bytes": 140 * 2**30}
    one["device"]["versions"] = {"jax": "0.10.2", "platform": "PJRT C API\ncuda 13000"}
    text = results_table([one])
    assert "- Machine: NVIDIA H200, 140 GiB.\n" in text
    assert "- Versions: jax 0.10.2, platform PJRT C API cuda 13000.\n" in text


def test_what_was_not_measured_is_a_dash_and_what_failed_says_how():
    text = results_table([record("jax"), failure("torch"), record("jax", model="resnet50")])
    vit, resnet = rows_of(text)
    assert vit[7:11] == ["oom", "–", vit[9], "–"] and vit[13] == "–"
    assert resnet[7] == resnet[8] == resnet[10] == resnet[12] == resnet[13] == "–"
    with pytest.raises(ValueError, match="nothing to show"):
        results_table([failure("torch")])
    with pytest.raises(ValueError, match="nothing to show"):
        results_table([])


def test_a_ratio_is_refused_where_outputs_differ():
    [row] = rows_of(results_table([record("jax"), record("torch", 20.0, shift=0.05)]))
    assert row[8] == "refused: outputs differ" and row[13].startswith("differs<br>")


def test_doubtful_timings_carry_their_marks_and_the_marks_are_explained():
    text = results_table([record("jax", is_converged=False, others=0.2), record("torch", num_values=5)])
    [row] = rows_of(text)
    assert row[6].startswith("~!10.00") and "]*<br>" in row[7]
    assert all(f"\n- {mark} " in text for mark in "~!*")


def test_numerics_are_rows_and_kernels_compilers_and_layouts_compete_in_one():
    records = [record(side, numerics=name) for side in ("jax", "torch") for name in ("float32", "bfloat16")]
    records += [record("torch", 5.0, compile="default"), record("torch", 6.0, model="resnet18", batch_norm="folded")]
    rows = rows_of(results_table([*records, record("torch", 7.0, model="resnet18")]))
    assert [(row[0], row[3]) for row in rows] == [
        ("`vit_ti16`", "float32"),
        ("`vit_ti16`", "bfloat16"),
        ("`resnet18`", "float32"),
    ]
    assert "<br>flash default nchw<br>" in rows[0][7] and "<br>eager nchw folded<br>" in rows[2][7]


def test_older_methods_are_left_out_and_counted():
    old = [record(side, 1.0, run=run) | {"method_version": 1} for side in ("jax", "torch") for run in (0, 1)]
    new = [record(side, 10.0) for side in ("jax", "torch")]
    text = results_table([*new, *old])
    assert rows_of(text) == rows_of(results_table(new))
    assert "- Left out: 4 records of method version 1; these are of version 2, and results of different" in text
    assert "Left out" not in results_table(new) and "Left out" not in results_table(old)


@pytest.mark.parametrize("preset", ["quick", "article"])
def test_the_command_under_the_table_asks_for_the_very_cases(preset, tmp_path):
    """Of a whole sweep in two runs, and of one with every axis named."""
    devices = {"jax": _device("jax"), "torch": _device("torch")}
    cases = [c for b, device in devices.items() for c in make_cases(_grid(preset), b, device, framework_version="1")]
    settings = settings_of([_measured(case) for case in cases])
    [command] = sweep_commands(settings)
    assert command.startswith("python -m vitcmp.run --backend jax,torch ")
    child = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps([{name: vars(device) for name, device in devices.items()}, command.split()[3:]]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert child.returncode == 0, child.stderr
    ids, runs = json.loads(child.stdout)
    assert set(ids) == {case.case_id for case in cases} and runs == 2


def _device(backend):
    return Device(platform="cpu", name="x", num_devices=1, memory_bytes=None, num_threads=2, versions={backend: "1"})


def _grid(preset):
    grid = get_preset("quick", "cpu")
    if preset == "quick":
        return grid
    models = ("vit_ti16:depth=2,pool=gap", "resnet18:width=16")
    named = {"models": models, "image_sizes": ("64", "48x96"), "batch_sizes": (1, 4), "numerics": ("bfloat16",)}
    kernels = {
        "attention": {"jax": ("xla",), "torch": ("math", "flash")},
        "compile": {"jax": ("jit",), "torch": ("default",)},
    }
    return type(grid)(**{**vars(grid), **named, **kernels, "max_sampling_s": 20.0, "mode": "train"})


def _measured(case: Case):
    return record(case.backend, run=1) | {"case": case.to_json(), "case_id": case.case_id}
