"""The command line: bad usage ends with 2 before anything runs, and says what is allowed."""

import subprocess
import sys

import pytest


def run(*flags: str, folder) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vitcmp.run", f"--out={folder}", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--backend=jaks"], ["'jaks'", "did you mean 'jax'", "allowed: jax, torch"]),
        ([], ["--backend is needed"]),
        (["--backend=jax", "--models=vit_b17x"], ["vit_b17x", "did you mean"]),
        (["--backend=jax", "--models=vit_b16:dept=3"], ["dept", "did you mean 'depth'"]),
        (["--backend=jax", "--image_sizes=12y"], ["12y"]),
        (["--backend=jax", "--batch_sizes=0"], ["batch_sizes='0'"]),
        (["--backend=jax", "--numerics=fp32"], ["'fp32'", "float32, tensorfloat32"]),
        (["--backend=torch", "--attention=flsh"], ["did you mean 'flash'"]),
        (["--backend=torch", "--compile=jit"], ["allowed: eager, cudagraphs"]),
        (["--backend=torch", "--preset=quik"], ["did you mean 'quick'"]),
        (["--backend=torch", "--device=cuda"], ["'cuda'", "auto, cpu, gpu, tpu"]),
        (["--backend=torch", "--runs=0"], ["--runs=0"]),
        (["--backend=torch", "--timeout_s=-1"], ["--timeout_s"]),
        (["--backend=torch", "--bogus=1"], ["bogus"]),
        (["--backend=torch", "extra"], ["'extra'"]),
        (["--backend=torch", "--weights=nothing.npz", "--models=vit_ti16"], ["nothing.npz"]),
        (["--backend=torch", "--weights=nothing.npz"], ["--weights needs --models"]),
        (["--backend=jaks", "--preset=quik", "--models=nothing"], ["jaks", "quik", "nothing"]),
    ],
)
def test_bad_usage_is_exit_code_2_with_what_is_allowed_and_nothing_is_written(tmp_path, flags, words):
    result = run(*flags, folder=tmp_path / "out")
    assert result.returncode == 2, result.stdout + result.stderr
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_names_every_flag_and_ends_with_0(tmp_path):
    result = run("--help", folder=tmp_path)
    assert result.returncode == 0
    for flag in (
        "backend models image_sizes batch_sizes numerics attention compile layout mode preset device weights out "
        "timeout_s budget_s runs retry dry_run"
    ).split():
        assert f"--{flag}" in result.stdout, flag


def test_a_results_file_of_another_schema_stops_the_sweep_and_stays_as_it_is(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"schema": "somebody-else/7"}\n')
    result = run("--backend=torch", folder=tmp_path)
    assert result.returncode == 2 and "somebody-else/7" in result.stderr and str(path) in result.stderr
    assert path.read_text() == '{"schema": "somebody-else/7"}\n'


def test_an_out_folder_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "out").write_text("")
    result = run("--backend=torch", folder=tmp_path / "out")
    assert result.returncode == 2 and "out" in result.stderr and "Traceback" not in result.stderr
