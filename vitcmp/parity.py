"""Parity: do two records hold the outputs of the same model? The bound is derived, and stands beside the error."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from vitcmp.params import expected_params
from vitcmp.specs import FOREIGN, BiTSpec, BiTV1Spec, ConvNeXtSpec, ResNetSpec, Spec, ViTDetSpec, ViTSpec, get_spec

# Spacing of the numbers above 1, of what a layer computes with and of what it sums in.
EPS: dict[str, tuple[float, float]] = {
    "float64": (2**-52, 2**-52),
    "float32": (2**-23, 2**-23),
    "tensorfloat32": (2**-10, 2**-23),
    "bfloat16": (2**-7, 2**-23),
    "bfloat16_mixed": (2**-7, 2**-23),
    "float16": (2**-10, 2**-23),
}
STORED = 1e-7  # records keep 8 digits: half a unit of the last one, in each of two values
SUM_BLOCKS = 4  # at least: vector lanes, or blocks that fit a cache
ROUNDINGS = 3  # a layer: its output, the norm or activation after it, and the residual sum
FAMILIES: dict[str, type[Spec]] = {
    cls.family: cls for cls in (ViTSpec, ViTDetSpec, ResNetSpec, BiTSpec, BiTV1Spec, ConvNeXtSpec)
}
# What must be equal for two records to be of one model on one input. The photograph is one image whatever the batch.
SAME = ("model", "image_size", "numerics", "weights")


class ParityResult(NamedTuple):
    """`missing` is not proved: an output is not there. A ratio of times is for `equal` alone."""

    status: Literal["equal", "differs", "missing"]
    error: float | None  # max |a - b| over the largest |logit|
    bound: float | None
    note: str = ""

    def describe(self) -> str:
        """Returns one line for people: `the outputs differ by 3.1e-02 of the largest, the bound is 1.2e-05`."""
        if self.error is None:
            return f"the outputs cannot be called equal: {self.note}"
        relation = "agree to" if self.status == "equal" else "differ by"
        return f"the outputs {relation} {self.error:.2g} of the largest value, the bound is {self.bound:.2g}"


def tolerance(numerics: str, spec: Spec | str | Mapping[str, Any]) -> float:
    """Returns how far apart rounding may bring the logits of two right implementations, over the largest |logit|.

    A number rounded to the nearest has a relative error of eps / sqrt(24) rms (uniform in half a spacing, averaged
    over a binade). A sum of K products, in `SUM_BLOCKS` blocks of numbers of spacing eps_sum, adds an error of eps_sum
    / sqrt(24) x sqrt(K / 2 / SUM_BLOCKS), and a layer's values are rounded `ROUNDINGS` times to eps. These errors are
    independent, so they walk at random through the layers (no residual branch is taken to dilute them), once in each
    implementation:

        error_rms = sqrt(2 / 24 x sum over layers of (ROUNDINGS x eps^2 + K / 2 / SUM_BLOCKS x eps_sum^2))

    The bound is twice that, because the largest error of a few logits is held against their largest value. In float32,
    on the shipped photograph, it is 3e-6 (ViT-Ti), 6e-6 (ViT-B), 1e-5 (ViT-L); tanh for erf in GELU moves those logits
    by 2e-4, and a norm's epsilon of 1e-5 for 1e-6 by 2e-5 to 4e-5 (1.4e-5 in ConvNeXt). Measured between the twins on
    a CPU, 2 to 48 layers, widths 48 to 1024, as a share of the bound: float32 0.1 to 0.5, bfloat16 and float16 0.1 to
    0.6. TF32 is derived, and not measured. Trained weights with outlier features can amplify rounding beyond the
    bound: prove those in float64.

    `spec` may be the dict of a record's case. Raises ValueError for unknown numerics or models.
    """
    if numerics not in EPS:
        raise ValueError(f"numerics={numerics!r} has no known rounding; allowed: {', '.join(EPS)}")
    eps, eps_sum = EPS[numerics]
    lengths = _sum_lengths(_as_spec(spec))
    variance = (ROUNDINGS * len(lengths) * eps**2 + sum(lengths) / 2 / SUM_BLOCKS * eps_sum**2) / 24
    return 2 * math.sqrt(2 * variance)


def compare_outputs(a: Mapping[str, Any], b: Mapping[str, Any]) -> ParityResult:
    """Compares the logits of two records of one model, image and numerics; the order of the two makes no difference.

    Of two train steps on one batch, the first loss is compared too, which the forward pass in training mode decides.

    Raises ValueError where the records are not of one model, image size, numerics and weights: outputs of different
    numerics are never compared with each other.
    """
    unlike = [f"{key} {a['case'][key]!r} and {b['case'][key]!r}" for key in SAME if a["case"][key] != b["case"][key]]
    if unlike:
        raise ValueError(f"records of different outputs cannot be compared: {'; '.join(unlike)}")
    try:
        bound = tolerance(a["case"]["numerics"], a["case"]["spec"]) + STORED
    except ValueError as error:
        return ParityResult("missing", None, None, f"no bound: {error}")
    outputs_a, outputs_b = _last_output(a), _last_output(b)
    if outputs_a is None or outputs_b is None:
        absent = [record["case"]["backend"] for record in (a, b) if _last_output(record) is None]
        return ParityResult("missing", None, bound, f"no outputs of {' and '.join(absent)}")
    result = compare_arrays(outputs_a, outputs_b, bound)
    return _compare_losses(a, b, result, np.abs(outputs_a).max()) if result.status == "equal" else result


def _compare_losses(a: Mapping[str, Any], b: Mapping[str, Any], result: ParityResult, largest: float) -> ParityResult:
    """Adds the first loss of two train steps on one batch: it moves by twice what the logits move, at the most."""
    losses = [record["outputs"].get("loss") for record in (a, b)]
    if None in losses or a["case"]["batch_size"] != b["case"]["batch_size"]:
        return result
    assert result.bound is not None
    error = abs(losses[0] - losses[1]) / (2 * largest)
    if error <= result.bound:
        return result
    return ParityResult("differs", error, result.bound, f"the first loss: {losses[0]} and {losses[1]}")


def _last_output(record: Mapping[str, Any]) -> np.ndarray | None:
    """Returns the logits, or what the head would read where the model has none."""
    outputs = record.get("outputs") or {}
    values = outputs.get("logits") or outputs.get("pre_logits")
    return np.asarray(values, np.float64) if values else None


def compare_arrays(a: np.ndarray, b: np.ndarray, bound: float) -> ParityResult:
    """Compares two arrays by max |a - b| over the largest magnitude in either; `missing` where both are all 0."""
    if a.shape != b.shape:
        return ParityResult("differs", None, bound, f"their shapes are {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return ParityResult("differs", None, bound, "logits that are not finite")
    largest = max(np.abs(a).max(), np.abs(b).max())
    if largest == 0:
        return ParityResult("missing", None, bound, "all logits are 0, which proves nothing")
    error = float(np.abs(a - b).max() / largest)
    return ParityResult("equal" if error <= bound else "differs", error, bound)


def _sum_lengths(spec: Spec) -> list[int]:
    """Returns how many products each value sums, for every linear and convolution layer."""
    return [math.prod(leaf.shape[:-1]) for leaf in expected_params(spec).values() if leaf.kind in ("linear", "conv")]


def _as_spec(spec: Spec | str | Mapping[str, Any]) -> Spec:
    if not isinstance(spec, Mapping):
        return get_spec(spec)
    if spec.get("family") in FOREIGN:
        raise ValueError(f"the layers of {spec['family']}:{spec.get('name')} are known to its library only")
    if spec.get("family") not in FAMILIES:
        raise ValueError(f"spec: family={spec.get('family')!r} must be one of {', '.join(FAMILIES)}")
    cls = FAMILIES[spec["family"]]
    fields = {field.name for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in spec.items() if name in fields
    }
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"spec: {error}") from None
