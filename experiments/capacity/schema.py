"""The record of a training run: `vitcmp-capacity/1`, one JSON line. Unknown is null, never 0.

A record's `run` is its identity: all that decides its numbers. `run_id` is the hash of it and of the method's version,
by which a run is found again when the experiment goes on.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments.capacity.arms import CELLS
from vitcmp import schema
from vitcmp.backend import BACKENDS
from vitcmp.cases import timestamp

SCHEMA = "vitcmp-capacity/1"
METHOD_VERSION = 1  # results of different method versions do not compare
STATUSES = (*schema.STATUSES, "diverged")  # diverged: a loss or gradient that is not finite
FINAL = tuple(status for status in STATUSES if status != "interrupted")

Record = dict[str, Any]

# What decides the numbers. Runs of one split agree in all of it but what SPLIT_BY names.
RUN_KEYS: dict[str, tuple[type, ...]] = {
    "backend": (str,),
    "versions": (dict,),  # of all that computes: framework, numpy, vitcmp
    "platform": (str,),
    "device_name": (str,),
    "num_devices": (int,),
    "num_threads": (int, type(None)),  # null on an accelerator
    "dataset": (str,),
    "data": (dict,),  # splits, and the fingerprints of what they hold
    "preprocessing": (dict,),  # resize method, antialias, rounding, flips and crops
    "model": (str,),
    "spec": (dict,),  # of the arm
    "arm": (str,),
    "low": (str,),  # image sizes: 224, or 96x160
    "high": (str,),
    "seed": (int,),
    "recipe": (dict,),  # batch size and epochs too
    "attention": (str, type(None)),
    "weights": (dict,),  # source, and sha256 of the arrays that every arm's are resampled from
}
SPLIT_BY = ("arm", "seed", "spec", "weights")  # and of the weights only the sha256, which a seed may decide
# What the run gives, each null until it is known; what a run that went well must know has no null.
RESULT_KEYS: dict[str, tuple[type, ...]] = {
    "curve": (dict,),  # loss and gradient_norm of every step
    "evaluations": (list,),  # of the test set after each epoch: epoch, step, accuracy, loss
    "final": (dict,),
    "cross": (dict, type(None)),  # by the arm that it was tested as: accuracy, loss
    "flops": (int, type(None)),  # of one image's forward pass; null for a model of another library
    "num_params": (int,),
    "step_s": (dict, type(None)),  # of a step without waiting for data: median, low, high, num_steps
    "input_bound_share": (float, int, type(None)),  # of the training time: waiting for images
    "memory": (dict, type(None)),
    "device": (dict,),
    "environment": (dict,),
    "effective": (dict,),  # the numerics as measured
    "stages_s": (dict, type(None)),
}
INNER_KEYS = {
    "run.weights": ("source", "sha256"),
    "error": ("type", "message", "traceback", "stage"),
    "curve": ("loss", "gradient_norm"),
    "final": ("accuracy", "loss", "num_examples", "examples_sha256", "correct", "losses"),
    "step_s": ("median", "low", "high", "num_steps"),
}
HEAD_KEYS: dict[str, tuple[type, ...]] = {
    "schema": (str,),
    "method_version": (int,),
    "run_id": (str,),
    "run": (dict,),
    "status": (str,),
    "error": (dict, type(None)),
    "started_at": (str,),
    "ended_at": (str, type(None)),
}


def run_id(run: Mapping[str, Any]) -> str:
    """The sha256 of the run's identity as canonical JSON, and of the method's version."""
    return sha256({"method_version": METHOD_VERSION, "run": run})


def sha256(content: Any) -> str:
    """Returns the hash of what is JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def new_record(run: Mapping[str, Any]) -> Record:
    """Returns a record of an attempt that has not ended; raises ValueError where the identity is not whole."""
    if faults := list(_faults_of_types(run, RUN_KEYS, "run.")):
        raise ValueError(f"run: {'; '.join(faults)}")
    return {
        "schema": SCHEMA,
        "method_version": METHOD_VERSION,
        "run_id": run_id(run),
        "run": dict(run),
        "status": "error",
        "error": None,
        "started_at": timestamp(),
        "ended_at": None,
        **dict.fromkeys(RESULT_KEYS),
    }


def new_final(
    correct: np.ndarray, losses: np.ndarray, *, examples_sha256: str, keep_losses: bool = True
) -> dict[str, Any]:
    """Returns a record's `final` from what each test example came out as, in the order that the hash is of.

    correct: (m,) booleans, right in all of the image's questions; losses: (m,) means over its questions, kept in
    float16 (3 digits; those above 65,504 as that).
    """
    correct, losses = np.asarray(correct), np.asarray(losses)
    if correct.dtype != bool or correct.ndim != 1 or not len(correct) or losses.shape != correct.shape:
        shapes = f"{correct.dtype} {correct.shape} and {losses.dtype} {losses.shape}"
        raise ValueError(f"correct and losses are {shapes}, expected booleans and floats, one of each an example")
    return {
        "accuracy": float(correct.mean()),
        "loss": float(losses.mean(dtype=np.float64)),
        "num_examples": len(correct),
        "examples_sha256": examples_sha256,
        "correct": pack_bits(correct),
        "losses": pack_losses(losses) if keep_losses else None,
    }


def pack_bits(bits: np.ndarray) -> str:
    """Returns booleans as base64, eight to a byte, the first in the highest bit: 5,000 are 834 characters."""
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def unpack_bits(text: str, num: int) -> np.ndarray:
    """Raises ValueError where the text is no base64, or not of so many bits."""
    data = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(data) != -(-num // 8):
        raise ValueError(f"{8 * len(data)} bits, expected {num}")
    return np.unpackbits(data, count=num).astype(bool)


def pack_losses(losses: np.ndarray) -> str:
    """Returns floats as base64 of little-endian float16."""
    return base64.b64encode(np.clip(losses, None, np.finfo(np.float16).max).astype("<f2").tobytes()).decode()


def unpack_losses(text: str, num: int) -> np.ndarray:
    """Returns float32; raises ValueError where the text is no base64, or not of so many losses."""
    data = base64.b64decode(text, validate=True)
    if len(data) != 2 * num:
        raise ValueError(f"{len(data)} bytes, expected {2 * num}")
    return np.frombuffer(data, "<f2").astype(np.float32)


def validate(record: Any) -> list[str]:
    """Returns every fault of a record, or [] where it is a good one. Further keys are allowed."""
    if not isinstance(record, dict):
        return [f"a record is an object, not {type(record).__name__}"]
    optional = {key: (*types, type(None)) for key, types in RESULT_KEYS.items()}
    results = RESULT_KEYS if record.get("status") == "ok" else optional
    faults = list(_faults_of_types(record, HEAD_KEYS | results))
    if faults or (faults := list(_faults_of_types(record["run"], RUN_KEYS, "run."))):
        return faults
    faults = [*_faults_of_head(record), *_faults_of_inner(record), *_faults_of_json(record)]
    return faults or list(_faults_of_results(record))


def _faults_of_types(values: Mapping[str, Any], keys: Mapping[str, tuple[type, ...]], path: str = "") -> Iterator[str]:
    for key, types in keys.items():
        if key not in values:
            yield f"{path}{key} is missing"
        elif not isinstance(values[key], types) or isinstance(values[key], bool):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            yield f"{path}{key} is {_show(values[key])}, expected {names}"


def _faults_of_head(record: Record) -> Iterator[str]:
    run, status = record["run"], record["status"]
    if record["schema"] != SCHEMA:
        yield f"schema is {record['schema']!r}, expected {SCHEMA!r}"
    if record["method_version"] == METHOD_VERSION and record["run_id"] != run_id(run):
        yield "run_id is not the hash of run"
    for key, value, allowed in (("status", status, STATUSES), ("run.arm", run["arm"], tuple(CELLS))):
        if value not in allowed:
            yield f"{key} is {value!r}, expected one of {' '.join(allowed)}"
    if run["backend"] not in BACKENDS:
        yield f"run.backend is {run['backend']!r}, expected one of {' '.join(BACKENDS)}"
    if run["seed"] < 0:
        yield f"run.seed is {run['seed']}, expected 0 or more"
    if (status == "ok") != (record["error"] is None) and status != "interrupted":
        yield f"status is {status} but error is {'null' if record['error'] is None else 'not null'}"


def _faults_of_inner(record: Record) -> Iterator[str]:
    for path, names in INNER_KEYS.items():
        value = record["run"]["weights"] if path == "run.weights" else record[path]
        if value is not None:
            yield from (f"{path}.{name} is missing" for name in names if name not in value)


def _faults_of_results(record: Record) -> Iterator[str]:
    if (curve := record["curve"]) is not None and len(curve["loss"]) != len(curve["gradient_norm"]):
        yield f"curve has {len(curve['loss'])} losses and {len(curve['gradient_norm'])} gradient norms"
    if record["status"] == "ok" and not record["curve"]["loss"]:
        yield "status is ok but curve.loss has no step"
    for arm in set(record["cross"] or ()) - set(CELLS):
        yield f"cross has the arm {arm!r}, expected some of {' '.join(CELLS)}"
    if record["final"] is not None:
        yield from _faults_of_final(record["final"])


def _faults_of_final(final: Mapping[str, Any]) -> Iterator[str]:
    num = final["num_examples"]
    if not isinstance(num, int) or num < 1:
        yield f"final.num_examples is {_show(num)}, expected 1 or more"
        return
    try:
        accuracy = unpack_bits(final["correct"], num).mean()
        if abs(accuracy - final["accuracy"]) > 1e-9:
            yield f"final.accuracy is {final['accuracy']}, but of final.correct {accuracy:.6f} are right"
    except (TypeError, ValueError) as error:
        yield f"final.correct cannot be read: {error}"
    try:
        if final["losses"] is not None:
            unpack_losses(final["losses"], num)
    except (TypeError, ValueError) as error:
        yield f"final.losses cannot be read: {error}"


def _faults_of_json(record: Record) -> Iterator[str]:
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        yield f"not JSON, or not finite: {error}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
