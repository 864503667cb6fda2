"""The child process: measures one case and writes one record. `python -m vitcmp.worker` is started by the runner.

It reads a job as JSON on standard input: `{"case": ..., "run": 0, "weights_path": null, "parent_pid": 1, "result":
PATH}` gives a record at PATH; `{"probe": {"backend", "platform", "weights_path", "models", "image_sizes"}, "result":
PATH}` gives the device, or an error.
"""

import contextlib
import ctypes
import dataclasses
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

from vitcmp.backend import Backend, Step, Unsupported, load_backend, why_unsupported
from vitcmp.cases import Case, timestamp
from vitcmp.ceilings import measure_copy, measure_matmul
from vitcmp.checkpoints import load_weights, read_state
from vitcmp.environment import HostMonitor, describe_environment, pin_cpus
from vitcmp.flops import count_flops
from vitcmp.params import Weights, fold_batch_norm, init_weights
from vitcmp.photo import load_photo
from vitcmp.records import Record
from vitcmp.runner import STAGE_MARK
from vitcmp.specs import ForeignSpec, ResNetSpec, Spec, get_spec, parse_image_size
from vitcmp.timing import Rule, sample, sample_throughput, warm_up
from vitcmp.timm_hub import TimmState
from vitcmp.weight_files import as_numbers

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
)


class Stages:
    """Names the stage that the worker is in, and keeps how long each took."""

    def __init__(self) -> None:
        self.name = "start"
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.name = name
        announce_stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def announce_stage(name: str) -> None:
    """Leaves the stage's name in the log, so that of a child that is killed the parent knows where it was."""
    with contextlib.suppress(OSError):  # a full disk under the log must not cost what is being measured
        print(f"{STAGE_MARK}{name}", file=sys.stderr, flush=True)


def measure(case: Case, run: int, weights_path: str | None) -> Record:
    """Measures the case; whatever goes wrong becomes the record's status and error."""
    record, stages = case.new_record(run), Stages()
    record["environment"] = describe_environment()
    with failures_recorded(record, stages):
        _measure(case, weights_path, record, stages)
        record["status"] = "ok"
    return {**record, "stages_s": stages.seconds, "ended_at": timestamp()}


@contextlib.contextmanager
def failures_recorded(record: Record, stages: Stages) -> Iterator[None]:
    """Turns whatever goes wrong inside into the record's status and error."""
    try:
        yield
    except Exception as error:  # the one broad catch: every failure is a record
        record["status"] = classify(error)
        record["error"] = {
            "type": type(error).__name__,
            "message": str(error)[:4000],
            "traceback": traceback.format_exc()[-8000:],
            "stage": stages.name,
        }
        traceback.print_exc()


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
    backend = _open_backend(case, spec, record, stages)
    with backend.numerics(case.numerics) as effective:
        record["effective"] = {**effective, "attention": case.attention, "num_threads": case.num_threads}
        _measure_model(backend, case, spec, weights_path, record, stages)
        with stages.stage("ceilings"):  # last, when the model's memory is free again
            record["ceilings"] = _measure_ceilings(backend, case.numerics, stages)


def _measure_model(
    backend: Backend, case: Case, spec: Spec, weights_path: str | None, record: Record, stages: Stages
) -> None:
    with stages.stage("weights"):
        model = _load_model(backend, case, spec, weights_path)
    if isinstance(spec, ForeignSpec):
        record["effective"] |= model.effective()
    record["num_params"] = backend.count_params(model)
    with stages.stage("flops"):
        record["flops"] = _count_flops(backend, spec, case)
    step = _compile(backend, model, case, spec, record, stages)
    _time(step, case, record, stages)
    with stages.stage("memory"):
        record["memory"] = backend.memory(model, step)


def _open_backend(case: Case, spec: Spec, record: Record, stages: Stages) -> Backend:
    axes = {name: getattr(case, name) for name in ("platform", "backend", "numerics", "attention", "mode", "compile")}
    if case.batch_norm == "folded" and case.mode == "train":
        raise Unsupported("a folded BatchNorm cannot be trained: its statistics are gone; use batch_norm=kept")
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
    return backend


def _load_model(backend: Backend, case: Case, spec: Spec, weights_path: str | None) -> Any:
    weights: Weights | None
    if isinstance(spec, ForeignSpec):
        weights = None if weights_path is None else _read_foreign(weights_path)
    else:
        weights = init_weights(spec) if weights_path is None else load_weights(weights_path, spec)
    if case.batch_norm == "folded":
        assert weights is not None and isinstance(spec, ResNetSpec)
        weights, spec = fold_batch_norm(weights, spec), dataclasses.replace(spec, is_folded=True)
    model = backend.build(spec, attention=case.attention)
    return backend.load(model, weights, numerics=case.numerics, layout=case.layout)


def _compile(backend: Backend, model: Any, case: Case, spec: Spec, record: Record, stages: Stages) -> Step:
    """Compiles the step, and keeps what it computes. A train step keeps the logits of before it, and its first loss."""
    images, labels = _draw_batch(spec, case.batch_size)
    outputs: dict[str, Any] = {}
    if case.mode == "train":
        with stages.stage("outputs"):
            outputs = _describe_outputs(spec, backend.outputs(model, images[:1])["logits"])
    with stages.stage("compile"):
        step = backend.compile(model, images, labels, mode=case.mode, compile=case.compile)
        record["compile_s"], record["compile_cache"] = step.compile_s, step.compile_cache
        if ran := getattr(step, "attention_ran", None):  # of torch, which chooses an operator when it runs
            record["effective"]["attention_ran"] = ran
    with stages.stage("parity"):
        result = step.result()
    if case.mode == "train":
        record["outputs"] = {**outputs, "loss": _finite("the loss", result)[0]}
    else:
        record["outputs"] = _describe_outputs(spec, result[:1])
    return step


def _draw_batch(spec: Spec, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, the shipped photograph first and noise after it, and the labels of the timed step."""
    rng = np.random.default_rng(0)
    images = rng.random((batch_size, *spec.image_size, 3), dtype=np.float32)
    images *= 2
    images -= 1
    images[0] = load_photo(spec.image_size)[0]
    return images, rng.integers(0, max(spec.num_classes, 1), batch_size)


def _describe_outputs(spec: Spec, values: np.ndarray) -> dict[str, Any]:
    """Keeps what the model ends in for the photograph, from the very program that is timed, for parity."""
    name = "logits" if spec.num_classes else "pre_logits"
    return {name: _finite(f"{name} of the photograph", values), "shape": list(values.shape)}


def _finite(name: str, values: np.ndarray) -> list[float]:
    """Returns the values to 8 digits; raises where one is not finite."""
    if not np.isfinite(values).all():
        raise FloatingPointError(f"{name}: not finite, these numerics overflow in this model")
    return [float(f"{value:.8g}") for value in values.astype(np.float64).ravel()]


def _count_flops(backend: Backend, spec: Spec, case: Case) -> dict[str, Any]:
    counted = backend.count_flops(spec)
    if isinstance(spec, ForeignSpec):  # whose analytic count nobody has written
        step = counted * case.batch_size if case.mode == "forward" else None
        return {"analytic": None, "counted": counted, "by_kind": None, "step": step}
    forward = count_flops(spec)
    return {
        "analytic": forward.total,
        "counted": counted,
        "by_kind": forward.by_kind,
        "step": count_flops(spec, mode=case.mode).total * case.batch_size,
    }


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


def _measure_ceilings(backend: Backend, numerics: str, stages: Stages) -> dict[str, Any]:
    """Measures what the device reaches in these numerics; what fails is null, and says why in `how`."""
    ceilings: dict[str, Any] = {}
    how: list[str] = []
    for name, measure in {"matmul_flops_per_s": measure_matmul, "copy_bytes_per_s": measure_copy}.items():
        failure: Record = {}
        ceilings[name] = None
        with failures_recorded(failure, stages):
            ceilings[name], done = measure(backend, numerics)
            how.append(done)
        if failure:
            how.append(f"{name}: {failure['error']['type']}: {failure['error']['message'][:200]}")
    return {**ceilings, "how": "; ".join(how)}


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """Describes the device, and checks before a sweep starts that the weights fit every model.

    Of a model of another library, which only that library knows, it checks that there is one, and that it takes every
    image size that was named.
    """
    try:
        backend = load_backend(request["backend"], platform=request["platform"])
        device = backend.describe()
        specs = [get_spec(model) for model in request["models"]]
        _check_foreign(backend, [spec for spec in specs if isinstance(spec, ForeignSpec)], request)
        if request["weights_path"]:
            for spec in (spec for spec in specs if not isinstance(spec, ForeignSpec)):
                load_weights(request["weights_path"], spec)
    except (ValueError, Unsupported) as error:
        return {"error": str(error)}
    return {"device": vars(device)}


def _read_foreign(path: str) -> Weights:
    """Reads another library's weights; those of `timm:NAME` keep what is told of the model that they were made for."""
    state = read_state(path)
    arrays = as_numbers(state, path)
    return TimmState(arrays, state.told) if isinstance(state, TimmState) else arrays


def _check_foreign(backend: Backend, specs: list[ForeignSpec], request: dict[str, Any]) -> None:
    """Raises one ValueError for all models of this backend's libraries that cannot be had, or not for an image."""
    faults: list[str] = []
    mine, path = [spec for spec in specs if spec.backend == backend.name], request["weights_path"]
    weights = _read_foreign(path) if mine and path else None
    for model in mine:
        for size in request.get("image_sizes") or [model.image_size]:
            spec = dataclasses.replace(model, image_size=parse_image_size(size))
            try:
                backend.count_flops(spec)
                if weights is not None:
                    backend.load(backend.build(spec), weights, numerics="float32")
            except ValueError as error:
                faults.append(str(error))
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))


def main() -> None:
    job = json.loads(sys.stdin.read())
    die_with_parent(job["parent_pid"])
    if "probe" in job:
        result = probe(job["probe"])
    else:
        case = Case.from_json(job["case"])
        if case.num_threads:
            pin_cpus(case.num_threads)
        result = measure(case, job["run"], job["weights_path"])
    write_result(result, Path(job["result"]))


def write_result(result: dict[str, Any], path: Path) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, allow_nan=False))
    part.replace(path)


def die_with_parent(parent_pid: int) -> None:
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
