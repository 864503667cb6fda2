"""The main job, from the command line to the tables, on small models and real frameworks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("torch")

import vitcmp
from vitcmp.records import validate_record

ROOT = Path(__file__).parents[2]
VIT = "vit_ti16:depth=1,width=48,num_heads=3,mlp_dim=96,num_classes=10"
CNN = "resnet18:depths=1+1,width=8,num_classes=10"


def run(folder: Path, *flags: str, code: int = 0, models: str = f"{VIT},{CNN}") -> str:
    command = [sys.executable, "-m", "vitcmp.run", f"--out={folder}", "--device=cpu", f"--models={models}", *flags]
    environment = {**os.environ, "COLUMNS": "160"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT, env=environment)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_one_half_then_the_other_gives_parity_and_a_ratio_for_every_point(tmp_path):
    sizes = "--image_sizes=32,48x80"
    first = run(tmp_path, "--backend=jax", sizes)
    assert "torch / JAX" not in first
    second = run(tmp_path, "--backend=torch", sizes)
    records = records_of(tmp_path)
    assert [record["status"] for record in records] == ["ok"] * 8
    assert all(validate_record(record) == [] for record in records)
    assert {record["case"]["backend"] for record in records} == {"jax", "torch"}
    assert len({record["case_id"] for record in records}) == 8
    for record in records:
        assert record["flops"]["analytic"] == record["flops"]["counted"]
        assert record["effective"]["matmul_error"] < 2e-6
    assert "torch / JAX" in second and second.count("equal") >= 4 and "refused" not in second
    third = run(tmp_path, "--backend=torch", sizes)
    assert "4 already in" in third and "0 to run" in third
    assert len(records_of(tmp_path)) == 8


@pytest.mark.slow
def test_a_train_sweep_of_both_sides_is_interleaved_and_compared_by_its_loss(tmp_path):
    text = run(tmp_path, "--backend=jax,torch", "--image_sizes=32", "--batch_sizes=2", "--mode=train")
    records = records_of(tmp_path)
    assert [record["case"]["backend"] for record in records] == ["jax", "torch", "jax", "torch"]
    for one, other in zip(records[::2], records[1::2], strict=True):
        assert one["outputs"]["loss"] == pytest.approx(other["outputs"]["loss"], rel=1e-5)
    assert "refused" not in text


@pytest.mark.slow
def test_a_ratio_is_refused_where_outputs_differ(tmp_path):
    run(tmp_path, "--backend=jax,torch", "--image_sizes=32", models=CNN)
    path = tmp_path / "records.jsonl"
    records = records_of(tmp_path)
    records[0]["outputs"]["logits"][0] += 1e-3
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "refused" in run(tmp_path, "--backend=jax,torch", "--image_sizes=32", models=CNN)


@pytest.mark.slow
def test_a_checkpoint_is_measured_by_its_hash_and_a_wrong_one_stops_the_sweep_before_it_starts(tmp_path):
    path = tmp_path / "weights.npz"
    vitcmp.save_weights(path, vitcmp.init_weights(CNN, seed=3))
    flags = ("--backend=torch", "--image_sizes=32", f"--weights={path}")
    run(tmp_path / "out", *flags, models=CNN)
    (record,) = records_of(tmp_path / "out")
    assert record["status"] == "ok" and record["case"]["weights"].startswith("sha256:")
    message = run(tmp_path / "other", *flags, models=VIT, code=2)
    assert "missing cls_token" in message and "weights.npz" in message
    assert not (tmp_path / "other" / "records.jsonl").exists()


@pytest.mark.slow
def test_what_the_device_does_not_have_is_a_row_and_exit_code_1(tmp_path):
    text = run(tmp_path, "--backend=torch", "--image_sizes=32", "--attention=math,cudnn", models=VIT, code=1)
    assert {record["case"]["attention"]: record["status"] for record in records_of(tmp_path)} == {
        "math": "ok",
        "cudnn": "unsupported",
    }
    assert "unsupported" in text


@pytest.mark.slow
def test_sigint_ends_cleanly_with_130_and_the_sweep_goes_on_afterwards(tmp_path):
    flags = ("--backend=jax", "--image_sizes=32,48")
    command = [sys.executable, "-m", "vitcmp.run", f"--out={tmp_path}", "--device=cpu", f"--models={CNN}", *flags]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(tmp_path.glob("logs/*-run0.log")):
        assert parent.poll() is None
        time.sleep(0.1)
    parent.send_signal(signal.SIGINT)
    output, _ = parent.communicate(timeout=60)
    assert parent.returncode == 130 and "Traceback" not in output and "goes on" in output
    run(tmp_path, *flags, models=CNN)
    statuses = [record["status"] for record in records_of(tmp_path)]
    assert statuses.count("ok") == 2 and set(statuses) <= {"ok", "interrupted"}


def test_a_dry_run_lists_every_case_and_measures_nothing(tmp_path):
    text = run(tmp_path, "--backend=torch", "--image_sizes=32,48x80", "--batch_sizes=1,2", "--dry_run")
    assert "8 cases" in text and text.count("float32") == 8
    assert not (tmp_path / "records.jsonl").exists()


def test_the_photograph_is_the_first_image_of_every_batch():
    from vitcmp.photo import load_photo
    from vitcmp.worker import _draw_batch

    spec = vitcmp.get_spec(f"{CNN},image_size=48x80")
    images, labels = _draw_batch(spec, 3)
    np.testing.assert_array_equal(images[:1], load_photo((48, 80)))
    assert images.shape == (3, 48, 80, 3) and labels.shape == (3,) and labels.max() < 10
