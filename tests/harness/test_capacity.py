"""The capacity experiment as a whole: every arm is trained, kill -9 changes no number, and faults are said early."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tensorflow_datasets")

from experiments.capacity.schema import SCHEMA, validate
from vitcmp.records import RecordStore

ROOT = Path(__file__).parents[2]
MODEL = "vit_ti16:patch_size=8,depth=1,width=32,num_heads=2,mlp_dim=64,pool=gap"
DATA = "glyphs/fine:num_train=96,num_test=32"
SMALL = (f"--model={MODEL}", f"--dataset={DATA}", "--low=16", "--high=32", "--seeds=1", "--batch_size=16")


def command(folder: Path, *flags: str) -> list[str]:
    paths = (f"--out={folder}/out", f"--data_dir={folder.parent}/data")
    return [sys.executable, "-m", "experiments.capacity", "--device=cpu", *paths, *flags]


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, *flags), cwd=ROOT, capture_output=True, text=True, timeout=600)


def load(folder: Path) -> list[dict]:
    return RecordStore(folder / "out", schema=SCHEMA, validate=validate).load()


def finals(records: list[dict]) -> dict[str, tuple]:
    return {r["run"]["arm"]: (r["final"]["correct"], r["final"]["loss"], r["curve"]["loss"]) for r in records}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_every_arm_is_trained_recorded_and_reported(tmp_path, backend):
    pytest.importorskip(backend)
    done = run(tmp_path, f"--backend={backend}", *SMALL, "--epochs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    records = load(tmp_path)
    assert [record["run"]["arm"] for record in records] == ["low", "down_up", "high", "patch"]
    for record in records:
        assert record["status"] == "ok" and len(record["curve"]["loss"]) == 12 and len(record["evaluations"]) == 2
        assert set(record["cross"]) == {"low", "down_up", "high", "patch"} - {record["run"]["arm"]}
    low, down_up, high, patch = (record["flops"] for record in records)
    assert low < down_up == high and patch < high
    assert "down_up gains" in (tmp_path / "out" / "capacity.md").read_text()
    assert not list((tmp_path / "out" / "checkpoints").iterdir())
    page, examples = tmp_path / "out" / "report.html", json.loads((tmp_path / "out" / "examples.json").read_text())
    assert "Resolution or compute?" in page.read_text() and examples["pictures"]
    assert all(name in page.read_text() for name in examples["pictures"])
    page.unlink(), page.mkdir()
    again = run(tmp_path, f"--backend={backend}", *SMALL, "--epochs=2")
    assert again.returncode == 0 and "0 to train" in " ".join(again.stdout.split()) and len(load(tmp_path)) == 4
    assert "No report is written (IsADirectoryError: " in again.stdout


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    pytest.importorskip("torch")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    flags = ("--backend=torch", *SMALL, "--epochs=40", "--arms=low,high")
    assert run(whole, *flags).returncode == 0
    child = subprocess.Popen(command(killed, *flags), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    checkpoints = killed / "out" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert list(checkpoints.glob("*.npz")), "it was done before it could be killed"
    assert run(killed, *flags).returncode == 0
    assert finals(load(killed)) == finals(load(whole))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset=oxford_iiit_pett"], "did you mean 'oxford_iiit_pet'"),
        ([f"--dataset={DATA}", "--test_split=testt"], "did you mean 'test'"),
        ([f"--dataset={DATA}", "--low=32", "--high=32"], "each side of low must be less"),
        ([f"--dataset={DATA}", "--low=20", "--high=32"], "multiple of the patch size of 8"),
        ([f"--dataset={DATA}", "--arms=low,hihg"], "did you mean 'high'"),
        ([f"--dataset={DATA}", "--batch_size=97"], "batch_size=97 must be from 1 to the 96 images"),
        ([f"--dataset={DATA}", "--method=bilinar"], "did you mean 'bilinear'"),
        ([f"--dataset={DATA}", "--label_smoothing=1"], "label_smoothing=1"),
        (["--dataset=folder:nowhere"], "nowhere"),
        ([], "--model needs --dataset"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path, flags, words):
    pytest.importorskip("torch")
    done = run(tmp_path, "--backend=torch", f"--model={MODEL}", "--low=16", "--high=32", "--batch_size=16", *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.jsonl"))
