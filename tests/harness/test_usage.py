"""The experiments' command lines: what is wrong with one is a message and exit code 2, before anything runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("noise --backend=tensorflow", ["noise: unknown backend 'tensorflow'"]),
        ("noise --num_threads=9999", ["--num_threads=9999 must be between 1 and"]),
        ("peers --backend=torch --processes=0", ["min_processes=0, max_processes=0"]),
        ("peers --backend=torch --bogus=1", ["Unknown command line flag 'bogus'", "--help lists the flags"]),
        ("peers --backend=torch --models= vit_b16", ["unexpected argument 'vit_b16'"]),
        (
            "peers --backend=torch --batch_sizes=0,a --image_sizes=x --layout=nhwc --attention=xla --compile=jit",
            ["batch_sizes='0'", "batch_sizes='a'", "image_size='x'", "layout for torch", "compile for torch"],
        ),
        ("peers --backend=jax --models=", ["models is empty"]),
        ("flops_audit --sizes=0", ["flops_audit: image_size='0'"]),
    ],
)
def test_bad_usage_is_a_message_and_exit_code_2(tmp_path, command, words):
    module, *flags = command.split()
    program = [sys.executable, "-m", f"experiments.{module}", *flags, f"--out={tmp_path / 'out'}"]
    child = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 2, child.stderr
    assert all(word in child.stderr for word in words), child.stderr
    assert "Traceback" not in child.stderr
    assert not list(tmp_path.rglob("*.jsonl"))
