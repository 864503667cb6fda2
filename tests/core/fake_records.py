"""Records as a sweep would write them, of made-up timings."""

import dataclasses
import datetime
import hashlib
import json

import numpy as np

from vitcmp.schema import METHOD_VERSION
from vitcmp.specs import get_spec, parse_image_size

START = datetime.datetime(2026, 11, 20, 5, tzinfo=datetime.UTC)
LOGITS = np.random.default_rng(0).standard_normal(10)
DEFAULTS = {
    "jax": {"attention": "xla", "compile": "jit", "layout": "nhwc", "framework_version": "0.10.2"},
    "torch": {"attention": "flash", "compile": "eager", "layout": "nchw", "framework_version": "2.15.0"},
}
GPU = {"platform": "gpu", "device_name": "NVIDIA H200", "num_threads": None}


def make_case(backend, model="vit_ti16", image_size="224", **changes):
    spec = dataclasses.replace(get_spec(model), image_size=parse_image_size(image_size))
    case = {
        "backend": backend,
        "model": model,
        "spec": {"family": spec.family, **json.loads(json.dumps(dataclasses.asdict(spec)))},
        "image_size": image_size,
        "batch_size": 1,
        "mode": "forward",
        "numerics": "float32",
        **DEFAULTS[backend],
        "batch_norm": "kept" if spec.family == "resnet" else None,
        "platform": "cpu",
        "device_name": "AMD EPYC",
        "num_threads": 2,
        "weights": "seed:0",
        "max_sampling_s": 5.0,
    }
    return case | ({} if spec.family.startswith("vit") else {"attention": None}) | changes


def failure(backend="torch", status="oom", message="out of memory: 20 GiB\nmore", *, run=0, **case):
    return record(backend, 1.0, run=run, **case) | {
        "status": status,
        "error": {"type": "MemoryError", "message": message, "traceback": None, "stage": "latency"},
        **dict.fromkeys(("flops", "latency", "throughput", "memory", "contention", "outputs")),
    }


def record(backend="jax", ms=10.0, *, run=0, at_s=0.0, num_values=60, is_converged=True, others=0.0, shift=0.0, **case):
    case = make_case(backend, **case)
    noise = np.exp(0.01 * np.random.default_rng([run, round(ms * 1e3)]).standard_exponential(num_values))
    wall_s = [float(value) for value in ms * 1e-3 * noise / np.median(noise)]
    cpu_s = [2 * value for value in wall_s] if case["platform"] == "cpu" else None
    step = 2_507_366_000 * case["batch_size"] * (3 if case["mode"] == "train" else 1)
    started_at = START + datetime.timedelta(seconds=at_s)
    return {
        "schema": "vitcmp-record/1",
        "method_version": METHOD_VERSION,
        "case_id": hashlib.sha256(json.dumps(case, sort_keys=True).encode()).hexdigest(),
        "run": run,
        "status": "ok",
        "error": None,
        "started_at": started_at.isoformat(),
        "ended_at": (started_at + datetime.timedelta(seconds=10)).isoformat(),
        "case": case,
        "device": dict.fromkeys(("platform", "name", "num_devices", "memory_bytes", "num_threads", "versions")),
        "environment": {},
        "effective": {},
        "num_params": 5_700_000,
        "flops": {"analytic": 2_507_366_000, "counted": None, "by_kind": {}, "step": step},
        "compile_s": None,
        "compile_cache": None,
        "warmup": {"wall_s": [1.0], "stable": True},
        "latency": {"wall_s": wall_s, "cpu_s": cpu_s, "converged": is_converged},
        "throughput": {
            "calls_per_sample": 4,
            "wall_s": [3.2 * s for s in wall_s],
            "cpu_s": None,
            "converged": True,
        },
        "memory": {
            "parameters_bytes": 22_900_000,
            "activation_peak_bytes": 12_300_000,
            "activation_source": {"jax": "XLA", "torch": "profiler"}[backend],
            "process_peak_bytes": None,
            "process_source": None,
        },
        "contention": {
            "others_cpu_share": others,
            "steal_share": None,
            "load_1m_before": None,
            "load_1m_after": None,
            "involuntary_switches": None,
        },
        "clocks": None,
        "outputs": {"logits": list(LOGITS + shift), "shape": [1, 10]},
        "stages_s": {},
    }
