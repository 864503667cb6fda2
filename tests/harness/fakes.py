"""A fake backend, and a fake worker process that ends in every way a child can."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from vitcmp.backend import Device, Unsupported
from vitcmp.cases import Case
from vitcmp.records import Record
from vitcmp.worker import announce_stage

DEVICE = Device(platform="cpu", name="fake", num_devices=1, memory_bytes=None, num_threads=1, versions={"torch": "0"})

MEMORY = {
    "parameters_bytes": 4,
    "activation_peak_bytes": 8,
    "activation_source": "fake",
    "process_peak_bytes": None,
    "process_source": None,
}
CONTENTION = {
    "others_cpu_share": 0.0,
    "steal_share": 0.0,
    "load_1m_before": 0.0,
    "load_1m_after": 0.0,
    "involuntary_switches": 0,
}


def make_case(**changes: object) -> Case:
    fields = {
        "backend": "torch",
        "model": "vit_ti16:depth=1,num_classes=10",
        "spec": {"family": "vit"},
        "image_size": "32x48",
        "batch_size": 2,
        "mode": "forward",
        "numerics": "float32",
        "attention": "math",
        "compile": "eager",
        "layout": "nchw",
        "batch_norm": None,
        "platform": "cpu",
        "device_name": "fake",
        "num_threads": 1,
        "framework_version": "0",
        "weights": "seed:0",
        "max_sampling_s": 0.05,
    }
    return Case(**{**fields, **changes})  # type: ignore[arg-type]


def ok_record(case: Case, run: int) -> Record:
    timings = {"wall_s": [0.01, 0.011, 0.012], "cpu_s": [0.01, 0.01, 0.01], "converged": True}
    return {
        **case.new_record(run),
        "status": "ok",
        "ended_at": "2026-01-01T00:00:00+00:00",
        "device": vars(DEVICE),
        "environment": {},
        "effective": {},
        "num_params": 1,
        "flops": {"analytic": 1, "counted": 1, "by_kind": {"linear": 1}, "step": 2},
        "warmup": {"wall_s": [0.01], "stable": True},
        "latency": timings,
        "throughput": {"calls_per_sample": 4, **timings},
        "memory": MEMORY,
        "contention": CONTENTION,
        "outputs": {"logits": [1.0], "shape": [1, 1]},
        "stages_s": {},
    }


class FakeStep:
    compile_s = 0.5
    compile_cache = None

    def __call__(self) -> None:
        time.sleep(0.0002)

    def queue(self, num_calls: int) -> None:
        time.sleep(0.0002 * num_calls)

    def result(self) -> np.ndarray:
        return np.ones((2, 10), np.float32)


class FakeBackend:
    """Ten lines that drive the worker and the timing loop; `fail_at` names a method that raises `error`."""

    name = "torch"

    def __init__(self, fail_at: str = "", error: Exception | None = None) -> None:
        self.fail_at, self.error = fail_at, error

    def __getattribute__(self, name: str):
        if name == object.__getattribute__(self, "__dict__").get("fail_at"):
            raise object.__getattribute__(self, "error")
        return object.__getattribute__(self, name)

    def describe(self) -> Device:
        return DEVICE

    def numerics(self, name: str):
        return contextlib.nullcontext({"numerics": name})

    def build(self, spec, *, attention=None):
        return spec

    def load(self, model, weights, *, numerics, layout=None):
        return model

    def count_params(self, model):
        return 1

    def outputs(self, model, images):
        return {"logits": np.ones((1, 10), np.float32)}

    def compile(self, model, images, labels, *, mode, compile):
        return FakeStep()

    def memory(self, model, step):
        return MEMORY

    def count_flops(self, spec):
        return 12

    def make_matmul(self, side, *, numerics):
        return lambda: time.sleep(0.0001)

    def make_copy(self, num_bytes, *, numerics):
        return lambda: time.sleep(0.0001)


def main() -> None:
    """Acts as vitcmp.worker would, as the case's `compile` says."""
    job = json.loads(sys.stdin.read())
    case = Case.from_json(job["case"])
    result = Path(job["result"])
    match case.compile:
        case "ok":
            result.write_text(json.dumps(ok_record(case, job["run"])))
        case "late":
            result.write_text(json.dumps(ok_record(case, job["run"])))
            time.sleep(600)
        case "slow":
            time.sleep(0.3)
            result.write_text(json.dumps(ok_record(case, job["run"])))
        case "hang":
            print("a line of a library without an end ", end="", file=sys.stderr)
            announce_stage("compile")
            time.sleep(600)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "killed":
            announce_stage("warmup")
            announce_stage("latency")
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            print("some last words")
            sys.exit(3)
        case "garbage":
            result.write_text('{"status": "ok", "late')
        case "invalid":
            result.write_text(json.dumps({**ok_record(case, job["run"]), "latency": {"wall_s": [0.0]}}))


if __name__ == "__main__":
    main()

__all__ = ["DEVICE", "FakeBackend", "FakeStep", "Unsupported", "make_case", "ok_record"]
