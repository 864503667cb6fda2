"""Records as the capacity experiment would write them, of made-up runs."""

import dataclasses
import json
import statistics

import numpy as np

from experiments.capacity.arms import make_arms
from experiments.capacity.schema import new_final, new_record
from vitcmp.specs import get_spec

MODEL = "vit_ti16:depth=2,num_classes=10"
ACCURACIES = {"low": 0.60, "down_up": 0.70, "high": 0.80, "patch": 0.65}
LOW, HIGH, NUM_EXAMPLES = "64", "128", 1000


def make_run(arm="low", seed=0, *, backend="jax", model=MODEL, low=LOW, high=HIGH, **changes):
    spec = make_arms(model, low, high)[arm].spec
    return {
        "backend": backend,
        "versions": {backend: "1.0", "numpy": "2.0"},
        "platform": "cpu",
        "device_name": "AMD EPYC",
        "num_devices": 1,
        "num_threads": 1,
        "dataset": "glyphs",
        "data": {"train": "train", "test": "test", "fingerprint": "d" * 64},
        "preprocessing": {"method": "bilinear", "antialias": True},
        "model": model,
        "spec": {"family": spec.family, **json.loads(json.dumps(dataclasses.asdict(spec)))},
        "arm": arm,
        "low": low,
        "high": high,
        "seed": seed,
        "recipe": {"learning_rate": 1e-3, "batch_size": 32, "numerics": "float32"},
        "attention": None,
        "weights": {"source": "scratch", "sha256": f"{seed:064d}"},
    } | changes


def make_correct(arm, seed, *, accuracy=None, num_examples=NUM_EXAMPLES):
    """Right where the example is easy enough for the arm, but for some noise of the seed's own."""
    accuracy = ACCURACIES[arm] if accuracy is None else accuracy
    difficulty = np.random.default_rng(0).standard_normal(num_examples)
    noise = 0.3 * np.random.default_rng([1, seed, *arm.encode()]).standard_normal(num_examples)
    return difficulty + noise < statistics.NormalDist(0, np.hypot(1, 0.3)).inv_cdf(accuracy)


def record(
    arm="low", seed=0, *, accuracy=None, correct=None, cross=True, shift=0.0, tested="t" * 64, keep_losses=True, **run
):
    if correct is None:
        correct = make_correct(arm, seed, accuracy=accuracy)
    losses = np.where(correct, 0.5, 2.0)
    curve = [2.3 * 0.9**step + shift * step for step in range(20)]
    run = make_run(arm, seed, **run)
    others = {other: {"accuracy": 0.25, "loss": 3.0} for other in ACCURACIES if other != arm}
    return new_record(run) | {
        "status": "ok",
        "ended_at": "2026-11-20T06:00:00+00:00",
        "curve": {"loss": curve, "gradient_norm": [2 * loss for loss in curve]},
        "evaluations": [{"epoch": 1, "step": 20, "accuracy": float(correct.mean()), "loss": 1.0}],
        "final": new_final(correct, losses, examples_sha256=tested, keep_losses=keep_losses),
        "cross": others if cross else None,
        "flops": 10**9 * get_spec(run["model"]).num_classes * (1 if arm in ("low", "patch") else 4),
        "num_params": 1_000_000,
        "step_s": {"median": 0.02 + 0.001 * seed, "low": 0.019, "high": 0.03, "num_steps": 20},
        "input_bound_share": 0.05,
        "memory": {"process_peak_bytes": 500_000_000},
        "device": {},
        "environment": {},
        "effective": {},
    }


def records(seeds=3, arms=tuple(ACCURACIES), **changes):
    return [record(arm, seed, **changes) for seed in range(seeds) for arm in arms]


def failure(arm="low", seed=0, *, status="diverged", message="the loss of step 7 is not finite", **run):
    return new_record(make_run(arm, seed, **run)) | {
        "status": status,
        "error": {"type": "Diverged", "message": message, "traceback": None, "stage": "train"},
    }
