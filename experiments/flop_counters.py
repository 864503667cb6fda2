"""FLOP counters side by side: ours, the frameworks' and three others', each on our model or on timm's twin of it.

One child process counts once: `python -m experiments.flop_counters` is started by experiments.flops_audit. Counters
that trace a model run it, on the CPU; the meta device will not do for them.
"""

import contextlib
import dataclasses
import io
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitcmp.backend import Unsupported, load_backend
from vitcmp.cases import timestamp
from vitcmp.environment import describe_environment
from vitcmp.flops import count_flops
from vitcmp.params import init_weights
from vitcmp.records import Record
from vitcmp.specs import Spec, ViTDetSpec, ViTSpec, get_spec, parse_image_size
from vitcmp.worker import Stages, die_with_parent, failures_recorded, write_result

SCHEMA = "vitcmp-flops/1"
STATUSES = ("ok", "unsupported", "not installed", "error", "oom", "timeout", "crashed", "interrupted")
KEYS = "schema model image_size mode subject counter versions status error counted flops analytic by_kind"
# timm's model that is ours (tests/parity/test_flops.py), and whether its constructor takes the image size.
TWINS = {
    "vit_ti16": ("vit_tiny_patch16_224", True),
    "vit_s16": ("vit_small_patch16_224", True),
    "vit_b16": ("vit_base_patch16_224", True),
    "vit_l16": ("vit_large_patch16_224", True),
    "vitdet_b16:neck_dim=256,num_classes=0": ("samvit_base_patch16", True),
    **{f"resnet{depth}": (f"resnet{depth}", False) for depth in (18, 34, 50, 101, 152)},
    "bit_r50x1": ("resnetv2_50x1_bit", False),
    **{f"convnext_{size}": (f"convnext_{size}", False) for size in ("atto", "tiny", "small", "base", "large")},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is counted: our model or timm's, at an image size, forward or one training step, batch 1."""

    model: str
    image_size: str
    mode: str
    subject: str  # ours or timm

    @property
    def spec(self) -> Spec:
        return dataclasses.replace(get_spec(self.model), image_size=parse_image_size(self.image_size))

    def analytic(self) -> dict[str, int]:
        """Returns the analytic FLOPs by kind. timm's ViTDet runs its projections on the padding of windows too."""
        by_kind = count_flops(self.model, self.image_size, mode=self.mode).by_kind
        spec = self.spec
        if self.subject == "ours" or not isinstance(spec, ViTDetSpec):
            return by_kind
        windows = filter(None, map(spec.window_of, range(spec.depth)))
        grids = ([-(-side // of) * of for side, of in zip(spec.grid_size, window, strict=True)] for window in windows)
        padding = sum(math.prod(grid) - spec.num_tokens for grid in grids)
        return by_kind | {"padding": 8 * padding * spec.width**2 * (3 if self.mode == "train" else 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counter:
    count: Callable[[Question], float]
    packages: tuple[str, ...]  # whose versions decide the count; the first is the counter's own
    flops_per_count: int = 1  # 2 where it counts multiply-adds
    subjects: tuple[str, ...] = ("ours", "timm")
    modes: tuple[str, ...] = ("forward",)
    note: str  # what it leaves out of our convention, and what it adds


def _torch_meta(question: Question) -> int:
    if question.subject == "ours":
        return load_backend("torch", platform="cpu").count_flops(question.spec)
    import torch

    with torch.device("meta"):
        return _flop_counter_mode(*_torch_model(question))


def _torch_cpu(question: Question) -> int:
    model, images = _torch_model(question)
    if question.mode == "forward":
        return _flop_counter_mode(model, images)
    if question.subject == "ours":
        backend = load_backend("torch", platform="cpu")
        batch = np.zeros((1, *question.spec.image_size, 3), np.float32), np.zeros(1, np.int64)
        return _flop_counter_mode(backend.compile(model, *batch, mode="train", compile="eager"))
    model.train()
    return _flop_counter_mode(lambda images: model(images).sum().backward(), images)


def _flop_counter_mode(call: Callable[..., object], *arguments: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    return counter.get_total_flops()


def _jaxpr(question: Question) -> int:
    return load_backend("jax", platform="cpu").count_flops(question.spec)


def _xla(question: Question) -> float:
    backend, spec = load_backend("jax", platform="cpu"), question.spec
    model = backend.load(backend.build(spec), init_weights(spec), numerics="float32")
    batch = np.zeros((1, *spec.image_size, 3), np.float32), np.zeros(1, np.int64)
    step: Any = backend.compile(model, *batch, mode=question.mode, compile="jit")
    return step.compiled.cost_analysis()["flops"]


def _fvcore(question: Question) -> float:
    from fvcore.nn import FlopCountAnalysis

    return FlopCountAnalysis(*_torch_model(question)).total()


def _gmacs(question: Question) -> float:
    """As timm's benchmark.py counts with fvcore, and with fused attention off, which gives its published figures."""
    from timm.layers.config import set_fused_attn

    set_fused_attn(False)
    return _fvcore(question)


def _torchprofile(question: Question) -> float:
    from torchprofile import profile_macs

    return profile_macs(*_torch_model(question))


def _deepspeed(question: Question) -> float:
    from deepspeed.profiling.flops_profiler import get_model_profile

    model, images = _torch_model(question)
    _, macs, _ = get_model_profile(
        model=model, input_shape=tuple(images.shape), print_profile=False, detailed=False, warm_up=0, as_string=False
    )
    return macs


def _torch_model(question: Question) -> tuple[Any, Any]:
    """Returns the model with weights, in evaluation mode, and one image: what the counters that run it take."""
    import torch

    spec = question.spec
    images = torch.zeros(1, 3, *spec.image_size)
    if question.subject == "ours":
        backend = load_backend("torch", platform="cpu")
        model = backend.build(spec, attention="flash" if isinstance(spec, ViTSpec) else None)
        model = backend.load(model, init_weights(spec), numerics="float32")
    else:
        model = _twin(question)
    # without gradients no graph is kept, which at 1024 px would take tens of gigabytes
    return model.eval().requires_grad_(question.mode == "train"), images


def _twin(question: Question) -> Any:
    import timm

    if question.model not in TWINS:
        raise Unsupported(f"no model of timm is known to be {question.model}")
    name, takes_size = TWINS[question.model]
    options: dict[str, Any] = {"img_size": question.spec.image_size} if takes_size else {}
    return timm.create_model(name, **options)


COUNTERS = {
    "torch_meta": Counter(
        count=_torch_meta,
        packages=("torch",),
        note="FlopCounterMode on the meta device: matmuls and convolutions, as executed",
    ),
    "jaxpr": Counter(
        count=_jaxpr,
        packages=("jax",),
        subjects=("ours",),
        note="a walk over the jaxpr: the same",
    ),
    "torch_cpu": Counter(
        count=_torch_cpu,
        packages=("torch",),
        modes=("forward", "train"),
        note="FlopCounterMode on the CPU: before torch 2.15 no attention, whose CPU kernel it does not know. In "
        "training it takes the gradient of depthwise weights for a dense convolution's (ConvNeXt), and counts the "
        "scores that flash attention computes again (half of the forward attention)",
    ),
    "xla": Counter(
        count=_xla,
        packages=("jaxlib", "jax", "flax"),
        subjects=("ours",),
        modes=("forward", "train"),
        note="cost analysis of the compiled step: leaves out a convolution's taps on its padding (3.4 % of ResNet-50 "
        "at 224 px, 0.8 % at 1024); adds softmax, norms, GELU and sums, as XLA has rewritten them; counts a loop's "
        "body once, and our attention has one, over heads, on a CPU from 512 tokens on",
    ),
    "fvcore": Counter(
        count=_fvcore,
        packages=("fvcore", "torch"),
        flops_per_count=2,
        note="no handler for scaled_dot_product_attention, so no attention; adds norms and pooling",
    ),
    "gmacs": Counter(
        count=_gmacs,
        packages=("fvcore", "torch", "timm"),
        flops_per_count=2,
        subjects=("timm",),
        note="fvcore on timm's model with fused attention off, so that attention is two matmuls; adds what fvcore adds",
    ),
    "torchprofile": Counter(
        count=_torchprofile,
        packages=("torchprofile", "torch"),
        flops_per_count=2,
        note="the article's counter. 0.0.4 has no handler for scaled_dot_product_attention or einsum, so neither "
        "attention nor relative positions, and its warning is silenced there; adds norms, products and pooling",
    ),
    "deepspeed": Counter(
        count=_deepspeed,
        packages=("deepspeed", "torch"),
        flops_per_count=2,
        subjects=("timm",),
        note="what timm's benchmark.py prefers where it is installed: no einsum, so no relative positions",
    ),
}


def key_of(record: Record) -> tuple[str, ...]:
    """What a count depends on: its question, and the versions of those who answer it."""
    question = (record[key] for key in ("model", "image_size", "mode", "subject", "counter"))
    return (*question, *(f"{package} {version}" for package, version in record["versions"].items()))


def latest(records: Sequence[Record]) -> dict[tuple[str, ...], Record]:
    return {key_of(record): record for record in records}


def validate(record: Record) -> list[str]:
    """Returns the faults of a record; further keys are allowed."""
    faults = [f"{key} is missing" for key in KEYS.split() if key not in record]
    if faults:
        return faults
    if record["status"] not in STATUSES:
        faults.append(f"status is {record['status']!r}, expected one of {', '.join(STATUSES)}")
    elif (record["status"] == "ok") != (isinstance(record["flops"], int) and record["flops"] > 0):
        faults.append(f"status is {record['status']} but flops is {record['flops']!r}")
    elif (record["status"] == "ok") != (record["error"] is None):
        faults.append(f"status is {record['status']} but error is {record['error']!r}")
    return faults


def count(record: Record) -> Record:
    """Fills in the record of one count; whatever goes wrong becomes its status and error."""
    question = Question(**{field.name: record[field.name] for field in dataclasses.fields(Question)})
    counter, stages = COUNTERS[record["counter"]], Stages()
    with failures_recorded(record, stages), stages.stage("count"), _quiet():
        counted = float(counter.count(question))
        record |= {"counted": counted, "flops": round(counted * counter.flops_per_count), "status": "ok"}
    ended = {"ended_at": timestamp(), "seconds": stages.seconds.get("count")}
    return {**record, **ended, "environment": describe_environment()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what counters say on the way: fvcore alone logs a line for every operator that it leaves out."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def main() -> None:
    job = json.loads(sys.stdin.read())
    die_with_parent(job["parent_pid"])
    write_result(count(job["record"]), Path(job["result"]))


if __name__ == "__main__":
    main()
