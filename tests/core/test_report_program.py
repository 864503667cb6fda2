"""`python -m vitcmp.report`, the report at the end of a sweep, and the static figures, as programs."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.core.fake_records import failure, record
from vitcmp.report import output
from vitcmp.report.markdown import results_table
from vitcmp.report.payload import make_payload, rows_of

ROOT = Path(__file__).parents[2]
SWEEP_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
FIXTURE = ROOT / "tests" / "fixtures" / "results" / "records"


def program(*words, cwd, module="vitcmp.report", **environment):
    command = [sys.executable, "-W", "error", "-m", module, *map(str, words)]
    environment = {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, env=environment)


def write(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def test_the_page_is_written_and_its_size_said_and_bad_lines_are_named(tmp_path):
    folder = write(tmp_path / "mine", record("jax"), record("torch"))
    with open(folder / "records.jsonl", "a") as file:
        file.write("{torn")
    result = program("mine", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.decode().startswith("report.html: 2 records, ")
    assert result.stderr.decode() == "mine: records.jsonl:3: not JSON: torn, or still being written\n"
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "AMD EPYC" in page and str(tmp_path) not in page
    again = program("mine", "--out", "again.html", cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "again.html").read_text() == page


def test_the_other_formats_and_standard_output(tmp_path):
    records = [record("jax"), record("torch")]
    folder = write(tmp_path / "mine", *records)
    markdown = program(folder, "--format=markdown", "--out=-", cwd=tmp_path)
    assert markdown.stdout.decode() == results_table(records)
    assert program(folder, "--format=markdown", cwd=tmp_path).returncode == 0
    assert (tmp_path / "report.md").read_text() == results_table(records)
    table = program(folder, "--format=csv", "--out", "-", cwd=tmp_path)
    assert table.stdout.decode().startswith("source,device,mode,backend,model,") and table.stdout.count(b"\n") == 3
    html = program(folder, "--out", "-", cwd=tmp_path)
    assert html.stdout.startswith(b"<!DOCTYPE html>") and html.stdout.rstrip().endswith(b"</html>")


def test_several_folders_have_a_table_each(tmp_path):
    write(tmp_path / "a", record("jax"))
    write(tmp_path / "b", record("torch"))
    write(tmp_path / "failed", failure())
    text = program("b", "failed", "a", "--format=markdown", "--out=-", cwd=tmp_path).stdout.decode()
    assert text.index("## a\n") < text.index("## b\n") and text.count("| `vit_ti16` |") == 2


@pytest.mark.parametrize(
    ["words", "message"],
    [
        ([], "name one or more folders of records"),
        (["absent"], "absent is not there"),
        (["empty"], "empty holds no records"),
        (["bad"], "no record can be shown"),
        (["mine", "--format=pdf"], "pdf"),
        (["mine", "--out=absent/report.html"], "must be a file in a folder that is there"),
        (["mine", "--out=mine"], "must be a file in a folder that is there"),
        (["mine/records.jsonl", "--out=mine/records.jsonl"], "would be written over records"),
        (["mine", "--out=mine/other.jsonl"], "would be written over records"),
        (["mine", "--out=mine/results.json"], "would be written over records"),
        (["mine", "--out="], "must be a file in a folder that is there"),
        (["results.json", "--format=markdown"], "shows vitcmp's records only"),
        (["failed", "--format=markdown"], "no record holds a measurement"),
        (["mine", "--bogus"], "bogus"),
    ],
)
def test_bad_usage_is_one_message_and_exit_code_2(tmp_path, words, message):
    mine = write(tmp_path / "mine", record("jax"))
    write(tmp_path / "failed", failure())
    (tmp_path / "empty").mkdir()
    write(tmp_path / "bad", {"schema": "somebody-else/7"})
    (tmp_path / "results.json").write_text(
        json.dumps([{"gpu": "G", "m": "M", "res": 224, "bs": 1, "kernel": "MATH", "dtype": "bf16", "time": 1.0}])
    )
    before = (mine / "records.jsonl").read_bytes()
    result = program(*words, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr.decode() and b"Traceback" not in result.stderr
    assert (mine / "records.jsonl").read_bytes() == before and not list(tmp_path.glob("report*"))


def test_a_terminal_gets_no_control_characters_and_a_page_of_markdown_no_tags(tmp_path):
    one = record("jax")
    hostile = "|</code><img src=x>`\n```\n[a](b)\x1b[31m"
    one["case"] |= dict.fromkeys(("model", "numerics", "attention", "compile", "device_name", "weights"), hostile)
    one["environment"] = dict.fromkeys(("cpu", "python", "commit", "vitcmp"), hostile)
    one["device"]["versions"] = {hostile: hostile}
    folder = write(tmp_path / "a\x1b[31m<b>", one)
    write(folder / "below\x1b[31m", {"schema": "other/1"})
    write(tmp_path / "z", record("torch"))
    result = program(folder, "z", "--format=markdown", "--out=-", cwd=tmp_path)
    assert result.returncode == 0 and b"\x1b" not in result.stdout + result.stderr and b"below?" in result.stderr
    text = result.stdout.decode()
    assert "<img" not in text and "<b>" not in text and "[a]" not in text and text.count("```") == 4
    [row] = [line for line in text.splitlines() if "<br>" in line and "img" in line]
    assert row.count("|") == next(line for line in text.splitlines() if "vit_ti16" in line).count("|")


def test_a_disk_that_takes_nothing_is_one_message(tmp_path):
    folder = write(tmp_path / "mine", record("jax"))
    result = program(folder, "--out=/dev/full", cwd=tmp_path)
    assert result.returncode == 2
    assert "--out=/dev/full cannot be written: No space left" in result.stderr.decode()


def test_help_names_the_flags(tmp_path):
    result = program("--help", cwd=tmp_path)
    assert result.returncode == 0 and all(f"--{flag}".encode() in result.stdout for flag in ("format", "out", "title"))


def swept(records, folder, **changes):
    console = Console(width=100, file=io.StringIO())
    output.write_report(console, records, folder)
    return console.file.getvalue()


def test_a_sweep_leaves_a_report_in_its_folder(tmp_path):
    text = swept([record("jax"), failure()], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in text and f'"name":"{tmp_path.name}"' in page
    assert str(tmp_path) not in page
    assert swept([], tmp_path / "none") == ""


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyError("x"), MemoryError(), RecursionError("deep")])
def test_a_report_that_fails_is_one_warning_line_and_the_old_one_stays(tmp_path, monkeypatch, error):
    swept([record("jax")], tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(output, "make_payload", fail)
    text = swept([record("jax")], tmp_path)
    assert text.count("\n") == 1 and text.startswith("No report was written to ") and type(error).__name__ in text
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_report_onto_a_folder_that_is_gone_is_one_warning_line(tmp_path):
    text = swept([record("jax")], tmp_path / "gone")
    assert text.startswith("No report was written") and "FileNotFoundError" in text and text.count("\n") == 1


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Returns what runs the program of the figures; its list of fonts is made once."""
    cache = str(tmp_path_factory.mktemp("matplotlib"))
    return lambda *words, cwd: program(*words, cwd=cwd, module="experiments.figures", MPLCONFIGDIR=cache)


needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


@pytest.mark.slow
@needs_matplotlib
def test_figures_are_drawn_from_records_to_the_same_bytes(tmp_path, figures):
    folder = shutil.copytree(FIXTURE, tmp_path / "records")
    for out in ("one", "two"):
        result = figures(folder, f"--out={tmp_path / out}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr.decode()
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    stems = ("latency_by_flops", "latency_by_size", "torch_over_jax")
    assert names == [f"{stem}{suffix}" for stem in stems for suffix in (".png", ".svg")]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    svg = (tmp_path / "one" / "latency_by_size.svg").read_text()
    assert "<dc:date>" not in svg and str(tmp_path) not in svg


@needs_matplotlib
def test_each_device_and_kind_of_step_has_its_own_figures_and_names_are_no_formulas(tmp_path, figures):
    records = [record("jax"), record("jax", mode="train"), failure("jax", image_size="384"), failure(model="resnet50")]
    records[0]["case"]["model"] = records[1]["case"]["model"] = "$\\frac{<b>$"
    write(tmp_path / "mine", *records)
    with open(tmp_path / "mine" / "records.jsonl", "a") as file:
        file.write("{torn")
    result = figures("mine", cwd=tmp_path)
    assert result.returncode == 0 and b"not JSON: torn" in result.stderr, result.stderr.decode()
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["figures", "records.jsonl"]
    names = {path.name for path in (tmp_path / "mine" / "figures").iterdir()}
    assert {"latency_by_size_1.svg", "latency_by_size_2.png"} <= names and not any("jax" in name for name in names)


@needs_matplotlib
def test_a_figure_says_by_letters_what_did_not_run_and_its_legend_what_they_mean():
    from experiments.figure_panels import draw_by_size

    ran = [record("jax"), record("torch"), record("jax", batch_size=8)]
    attempt = failure("jax", "error", numerics="bfloat16")  # another setting of that point ran
    failures = [failure("torch", "timeout", batch_size=8), failure("jax", "oom", image_size="384"), attempt]
    failures += [failure("torch", "unsupported", image_size="384")]
    figure = draw_by_size(rows_of(make_payload([*ran, *failures])), "title")
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["M/U"], ["-/T"]]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["vit_ti16", "JAX", "torch", "Memory ran out", "Timed out", "Unsupported"]


@needs_matplotlib
@pytest.mark.parametrize(["words", "message"], [([], "name one folder"), (["failed"], "no record holds a measurement")])
def test_figures_of_nothing_are_one_message(tmp_path, figures, words, message):
    write(tmp_path / "failed", failure())
    result = figures(*words, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr.decode() and b"Traceback" not in result.stderr


@pytest.mark.slow
def test_a_real_sweep_ends_with_its_report_or_with_a_warning_and_the_same_exit_code(tmp_path):
    pytest.importorskip("torch")
    model = "vit_ti16:depth=1,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=32"
    flags = ("--backend=torch", "--device=cpu", f"--models={model}", "--image_sizes=32", "--numerics=float32")
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    result = program(*flags, "--out=out", cwd=tmp_path, module="vitcmp.run", **SWEEP_ENVIRONMENT)
    assert result.returncode == 0 and b"No report was written to out/report.html" in result.stdout, result.stderr
    (tmp_path / "out" / "report.html").rmdir()
    result = program(*flags, "--out=out", cwd=tmp_path, module="vitcmp.run", **SWEEP_ENVIRONMENT)  # nothing is left
    assert result.returncode == 0 and b"The interactive report: out/report.html" in result.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert '"name":"out"' in page and str(tmp_path) not in page
