"""The child process: measures one case and writes one record. `python -m vitcmp.worker` is started by the runner.

It reads a job as JSON on standard input: `{"case": ..., "run": 0, "weights_path": null, "parent_pid": 1, "result":
PATH}` gives a record at PATH; `{"probe": {"backend", "platform", "weights_path", "models"}, "result": PATH}` gives the
device, or an error.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitcmp.backend import Backend, Step, Unsupported, load_backend
from vitcmp.cases import Case, timestamp, why_unsupported
from vitcmp.checkpoints import load_weights
from vitcmp.environment import HostMonitor, describe_environment, pin_cpus
from vitcmp.flops import count_flops
from vitcmp.params import count_params, init_weights
from vitcmp.photo import load_photo
from vitcmp.records import Record
from vitcmp.specs import Spec
from vitcmp.timing import Rule, sample, sample_throughput, warm_up

OOM_WORDS = (
    "out of memory",
    "resource_exhausted",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
)
UNSUPPORTED_WORDS = (
    "no available kernel",
    "no viable backend",
    "unimplemented",
    "not implemented for",
    "cudnn is not",
    "not supported",
)


class Stages:
    """Names the stage that the worker is in, and keeps how long each took."""

    def __init__(self) -> None:
        self.name = "start"
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.name, start = name, time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def measure(case: Case, run: int, weights_path: str | None) -> Record:
    """Measures the case; whatever goes wrong becomes the record's status and error."""
    record, stages = case.new_record(run), Stages()
    record["environment"] = describe_environment()
    try:
        _measure(case, weights_path, record, stages)
        record["status"] = "ok"
    except Exception as error:  # the one broad catch: every failure is a record
        record["status"] = classify(error)
        record["error"] = {
            "type": type(error).__name__,
            "message": str(error)[:4000],
            "traceback": traceback.format_exc()[-8000:],
            "stage": stages.name,
        }
        traceback.print_exc()
    return {**record, "stages_s": stages.seconds, "ended_at": timestamp()}


def classify(error: BaseException) -> str:
    """Returns the status of an error: unsupported, oom or error."""
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, MemoryError) or "outofmemory" in text or any(words in text for words in OOM_WORDS):
        return "oom"
    if isinstance(error, Unsupported | NotImplementedError) or any(words in text for words in UNSUPPORTED_WORDS):
        return "unsupported"
    return "error"


def _measure(case: Case, weights_path: str | None, record: Record, stages: Stages) -> None:
    spec = case.resolve_spec()
    axes = {name: getattr(case, name) for name in ("platform", "backend", "numerics", "attention", "mode")}
    if reason := why_unsupported(spec, **axes):
        raise Unsupported(reason)
    with stages.stage("import"):
        backend = load_backend(case.backend, platform=case.platform)
        device = backend.describe()
        record["device"] = vars(device)
    if (device.name, device.num_threads) != (case.device_name, case.num_threads):
        raise Unsupported(
            f"the case is for {case.device_name} x {case.num_threads}, this is {device.name} x {device.num_threads}"
        )
    with backend.numerics(case.numerics) as effective:
        record["effective"] = {**effective, "attention": case.attention, "num_threads": device.num_threads}
        with stages.stage("weights"):
            weights = init_weights(spec) if weights_path is None else load_weights(weights_path, spec)
            model = backend.load(
                backend.build(spec, attention=case.attention), weights, numerics=case.numerics, layout=case.layout
            )
        record["num_params"] = count_params(spec)
        with stages.stage("outputs"):
            record["outputs"] = _photo_outputs(backend, model, spec)
        with stages.stage("flops"):
            record["flops"] = _count_flops(backend, spec, case)
        del weights
        with stages.stage("compile"):
            step = _compile(backend, model, spec, case)
            record["compile_s"], record["compile_cache"] = step.compile_s, step.compile_cache
        _time(step, case, record, stages)
        with stages.stage("memory"):
            record["memory"] = backend.memory(model, step)


def _photo_outputs(backend: Backend, model: Any, spec: Spec) -> dict[str, Any]:
    """Runs the shipped photograph, for parity: 8 digits of what the model ends in."""
    outputs = backend.outputs(model, load_photo(spec.image_size))
    name = "logits" if "logits" in outputs else "pre_logits"
    values = outputs[name].astype(np.float64)
    if not np.isfinite(values).all():
        raise FloatingPointError(f"{name} of the photograph are not finite: these numerics overflow in this model")
    return {name: [float(f"{value:.8g}") for value in values.ravel()], "shape": list(values.shape)}


def _count_flops(backend: Backend, spec: Spec, case: Case) -> dict[str, Any]:
    forward = count_flops(spec)
    return {
        "analytic": forward.total,
        "counted": backend.count_flops(spec),
        "by_kind": forward.by_kind,
        "step": count_flops(spec, mode=case.mode).total * case.batch_size,
    }


def _compile(backend: Backend, model: Any, spec: Spec, case: Case) -> Step:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (case.batch_size, *spec.image_size, 3)).astype(np.float32)
    labels = rng.integers(0, max(spec.num_classes, 1), case.batch_size)
    return backend.compile(model, images, labels, mode=case.mode, compile=case.compile)


def _time(step: Step, case: Case, record: Record, stages: Stages) -> None:
    rule = Rule(max_s=case.max_sampling_s)
    with HostMonitor(case.platform) as host:
        with stages.stage("warmup"):
            record["warmup"] = warm_up(step, rule)._asdict()
        with stages.stage("latency"):
            latency = sample(step, rule)
            record["latency"] = latency._asdict()
        with stages.stage("throughput"):
            latency_s = float(np.median(latency.wall_s))
            record["throughput"] = sample_throughput(step.queue, rule, latency_s=latency_s)._asdict()
    record["contention"], record["clocks"] = host.contention(), host.clocks()


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """Describes the device, and checks that the weights fit every model, before a sweep starts."""
    try:
        device = load_backend(request["backend"], platform=request["platform"]).describe()
        if request["weights_path"]:
            for model in request["models"]:
                load_weights(request["weights_path"], model)
    except (ValueError, Unsupported) as error:
        return {"error": str(error)}
    return {"device": vars(device)}


def main() -> None:
    job = json.loads(sys.stdin.read())
    _die_with_parent(job["parent_pid"])
    if "probe" in job:
        result = probe(job["probe"])
    else:
        case = Case.from_json(job["case"])
        if case.num_threads:
            pin_cpus(case.num_threads)
        result = measure(case, job["run"], job["weights_path"])
    path = Path(job["result"])
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, allow_nan=False))
    part.replace(path)


def _die_with_parent(parent_pid: int) -> None:
    """Asks Linux to kill this process with its parent, and to choose it first when memory runs out."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent_pid:
        sys.exit("the parent is gone")


if __name__ == "__main__":
    main()
