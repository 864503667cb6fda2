"""The interface that both frameworks implement, and the one place that imports them by name."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from vitcmp.params import Weights, check_weights
from vitcmp.recipe import Recipe, Trainer
from vitcmp.specs import ForeignSpec, ResNetSpec, Spec, ViTDetSpec, ViTSpec, did_you_mean

BACKENDS = ("jax", "torch")
PLATFORMS = ("auto", "cpu", "gpu", "tpu")
MODES = ("forward", "train")
# Numerics, by the dtypes of the parameters and of the activations. float32 is true float32 in matmul and convolution.
NUMERICS: dict[str, tuple[str, str]] = {
    "float32": ("float32", "float32"),
    "tensorfloat32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16": ("float16", "float16"),
    "bfloat16_mixed": ("float32", "bfloat16"),
    "float64": ("float64", "float64"),
}
# The relative error of a matmul or convolution above which it is not in the numerics of that name. Rounding the result
# alone makes 0.2 eps; sums in float32, in any order, add less than 1e-5, TF32's 11 bits make 3e-4.
MAX_ERROR = {
    "float64": 1e-13,
    "float32": 1e-5,
    "tensorfloat32": 1e-3,
    "float16": 1e-3,
    "bfloat16": 1e-2,
    "bfloat16_mixed": 1e-2,
}
# What each framework offers; the first is the default on every platform. ViTs only.
ATTENTION: dict[str, tuple[str, ...]] = {
    "jax": ("xla", "chunked", "cudnn", "pallas"),
    "torch": ("math", "flash", "mem_efficient", "cudnn", "flex"),
}
COMPILE: dict[str, tuple[str, ...]] = {
    "jax": ("jit",),
    "torch": (
        *("eager", "cudagraphs", "lite", "default"),
        *("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    ),
}
BATCH_NORM = ("kept", "folded")  # of models that have it; folded into the convolutions, forward only
LAYOUT: dict[str, tuple[str, ...]] = {"jax": ("nhwc",), "torch": ("nchw", "channels_last")}


class Unsupported(RuntimeError):
    """What was asked for cannot run on this device; it is never replaced by something else under its name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    platform: str  # cpu, gpu or tpu
    name: str  # as the driver or the kernel says it
    num_devices: int
    memory_bytes: int | None
    num_threads: int | None  # of one operation, on a CPU
    versions: dict[str, str]  # of the framework and what it computes with


class Step(Protocol):
    """A compiled forward or train step, with its inputs on the device."""

    compile_s: float | None  # None where nothing is compiled ahead of the first call
    compile_cache: str | None  # cold or warm; None where there is no cache

    def __call__(self) -> None:
        """Runs the step once; returns when the device is idle."""

    def queue(self, num_calls: int) -> None:
        """Runs the step `num_calls` times and waits for the device once, at the end."""

    def result(self) -> np.ndarray:
        """Runs the step once and returns what it computes: logits (b num_classes), or the loss of a train step."""


class Backend(Protocol):
    """One framework on one device. Images are NHWC float arrays in [-1, 1]; labels are int class indices."""

    name: str

    def describe(self) -> Device: ...

    def numerics(self, name: str) -> AbstractContextManager[dict[str, Any]]:
        """Enforces numerics while open, and gives the effective settings and errors. Raises Unsupported."""

    def build(self, spec: Spec, *, attention: str | None = None) -> Any:
        """Builds the model with no weights in memory."""

    def load(self, model: Any, weights: Weights | None, *, numerics: str, layout: str | None = None) -> Any:
        """Returns the model with canonical weights on the device, in the numerics' dtypes.

        A foreign model (`ForeignSpec`) takes the arrays of its own library by that library's names, or None: then it
        is drawn by that library, from seed 0.
        """

    def count_params(self, model: Any) -> int:
        """Counts the model's trainable parameters."""

    def export(self, model: Any) -> Weights:
        """Returns the model's weights by their canonical names, float32 at least."""

    def outputs(self, model: Any, images: np.ndarray) -> dict[str, np.ndarray]:
        """Runs forward and returns logits and every named intermediate; feature maps are NHWC."""

    def compile(self, model: Any, images: np.ndarray, labels: np.ndarray, *, mode: str, compile: str) -> Step: ...

    def trainer(
        self,
        spec: Spec,
        weights: Weights,
        recipe: Recipe,
        *,
        attention: str | None = None,
        compile: str | None = None,
        num_devices: int = 1,
    ) -> Trainer:
        """Returns the model ready to be trained from the weights, on `num_devices` of the platform.

        Made and used inside `numerics(recipe.numerics)`. Raises ValueError for weights that do not fit, a recipe that
        does not fit the model and too many devices, and Unsupported for what the platform cannot train.
        """

    def memory(self, model: Any, step: Step) -> dict[str, Any]:
        """Measures one call: parameters_bytes, activation_peak_bytes, process_peak_bytes, each with its source."""

    def count_flops(self, spec: Spec) -> int:
        """Counts forward FLOPs of one image in the framework's own graph; the cross-check of vitcmp.flops."""

    def make_matmul(self, side: int, *, numerics: str) -> Callable[[], None]:
        """Returns a call that multiplies two square matrices, made and used inside `numerics(numerics)`.

        A call returns when the device is idle; `side` is a multiple of 256.
        """

    def make_copy(self, num_bytes: int, *, numerics: str) -> Callable[[], None]:
        """Returns a call that copies an array of the numerics' dtype; it returns when the device is idle."""


def load_backend(name: str, *, platform: str = "auto") -> Backend:
    """Imports the framework and returns its backend on the platform; ValueError for an unknown name or platform."""
    require_choice("backend", name, BACKENDS)
    require_choice("device", platform, PLATFORMS)
    try:
        module = importlib.import_module(f"{name}_models.backend")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"backend={name}: the package {error.name!r} is not installed; pip install 'vitcmp[{name}]'"
        ) from error
    return module.make_backend(platform)


def require_choice(argument: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {argument} {value!r}{did_you_mean(value, allowed)}; allowed: {', '.join(allowed)}")


def require_precision(numerics: str, errors: Mapping[str, float]) -> None:
    """Raises Unsupported where measured relative errors of a matmul or convolution are beyond those of `numerics`."""
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= MAX_ERROR[numerics]:
        limit = MAX_ERROR[numerics]
        raise Unsupported(f"numerics={numerics}: {worst} is {errors[worst]:.2g}, which must be at most {limit:g}")


def check_training(
    spec: Spec,
    weights: Weights,
    recipe: Recipe,
    *,
    platform: str,
    backend: str,
    attention: str | None,
    compile: str | None,
    num_devices: int,
    max_devices: int | None,  # None: as many as are asked for
) -> None:
    """Raises ValueError or Unsupported for what `Backend.trainer` cannot do, the same in both frameworks."""
    require_choice("numerics", recipe.numerics, tuple(NUMERICS))
    if compile is not None:
        require_choice("compile", compile, COMPILE[backend])
    if isinstance(spec, ForeignSpec):
        raise ValueError(f"spec={spec}: a model of another library cannot be trained here, only ours")
    if getattr(spec, "is_folded", False):
        raise ValueError(f"spec={spec}: a folded BatchNorm cannot be trained; give a spec with is_folded=False")
    if not spec.num_classes or spec.num_classes % recipe.num_questions:
        raise ValueError(
            f"num_classes={spec.num_classes} must be a multiple of num_questions={recipe.num_questions}, and not 0"
        )
    if attention is not None:
        require_choice("attention", attention, ATTENTION[backend])
        if not isinstance(spec, ViTSpec):
            raise ValueError(f"attention={attention!r}: a {spec.family} has none; leave it out")
    if num_devices < 1 or (max_devices and num_devices > max_devices):
        most = f" to the {max_devices} that {backend} finds" if max_devices else ""
        raise ValueError(f"num_devices={num_devices} must be 1{most or ' or more'}")
    check_weights(weights, spec)
    axes = {"platform": platform, "backend": backend, "numerics": recipe.numerics, "mode": "train"}
    if reason := why_unsupported(spec, **axes, attention=attention, compile=compile):
        raise Unsupported(reason)


def require_open(numerics: str, open_numerics: str | None) -> None:
    """Raises ValueError where a trainer is used outside of the numerics that it was made for."""
    if numerics != open_numerics:
        raise ValueError(
            f"numerics={numerics}: a trainer is made and used inside `with backend.numerics({numerics!r}):`, and open "
            f"is {open_numerics}"
        )


def why_unsupported(
    spec: Spec,
    *,
    platform: str,
    backend: str,
    numerics: str,
    attention: str | None,
    mode: str = "forward",
    compile: str | None = None,
) -> str | None:
    """Returns why the device cannot have this, as far as it is known beforehand; None where it may.

    torch: CUDA's flash and cuDNN kernels take 16-bit inputs, and flash takes no bias; the CPU has math and flash, and
    flex without a backward.
    JAX: cuDNN's kernel is for NVIDIA GPUs and 16-bit inputs; Pallas' flash kernel is for TPUs.
    """
    if reason := _why_numerics_are_refused(platform, numerics, mode):
        return reason
    if reason := _why_compiler_refuses(spec, platform, mode, compile):
        return reason
    if attention is None:
        return None
    is_16_bit = NUMERICS[numerics][1] in ("bfloat16", "float16")
    has_bias = isinstance(spec, ViTDetSpec) and spec.rel_pos
    homes = {("torch", "mem_efficient"): "gpu", ("jax", "pallas"): "tpu"}
    home = "gpu" if attention == "cudnn" else homes.get((backend, attention), platform)
    if home != platform:
        return f"{backend}'s {attention} attention runs on a {home} only, this is a {platform}"
    if platform == "gpu" and attention in ("flash", "cudnn") and not is_16_bit:
        return f"{attention} attention takes 16-bit inputs only, not {numerics}"
    if platform == "gpu" and attention == "flash" and has_bias:
        return "flash attention takes no bias, and rel_pos is one"
    if backend == "torch" and mode == "train" and has_bias and attention in ("flash", "cudnn"):
        return f"torch's {attention} attention has no gradient of a bias, and rel_pos is one"
    if attention == "flex":
        return _why_flex_refuses(spec, platform, numerics, mode)
    if backend == "jax" and isinstance(spec, ViTSpec):
        return _why_jax_refuses(spec, attention, mode)
    return None


def _why_numerics_are_refused(platform: str, numerics: str, mode: str) -> str | None:
    if mode == "train" and numerics == "float16":
        return "AdamW's eps of 1e-8 is 0 in float16, and the first step gives NaN: train in bfloat16_mixed"
    if numerics == "tensorfloat32" and platform != "gpu":
        return "tensorfloat32 exists on NVIDIA GPUs only"
    if platform == "tpu" and numerics in ("float16", "float64"):
        return f"TPUs have no {numerics}"
    return None


def _why_compiler_refuses(spec: Spec, platform: str, mode: str, compile: str | None) -> str | None:
    if compile == "cudagraphs" and platform != "gpu":
        return f"CUDA graphs need a GPU, this is a {platform}"
    if compile == "lite" and platform == "cpu" and mode == "train" and isinstance(spec, ResNetSpec):
        return "torch's lite mode mistakes the strides of BatchNorm's gradient on a CPU (2.11 to 2.15)"
    return None


def _why_flex_refuses(spec: Spec, platform: str, numerics: str, mode: str) -> str | None:
    """Returns what torch's flex_attention says no to (2.11 to 2.15), or, in float64, should."""
    if numerics == "float64":
        return "flex attention adds up in float32, which would not be float64"
    if platform == "cpu" and mode == "train":
        return "flex attention has no backward on a CPU"
    if platform == "gpu" and isinstance(spec, ViTSpec) and spec.head_dim < 16:
        return f"flex attention takes a head_dim of 16 or more, this model has {spec.head_dim}"
    return None


def _why_jax_refuses(spec: ViTSpec, attention: str, mode: str) -> str | None:
    """Returns what JAX's fused kernels say no to when they are traced (jax 0.10.2), that is known without the device.

    cuDNN's head_dim ends at 128 on GPUs before Hopper, which only the device tells.
    """
    if attention == "cudnn" and (spec.head_dim % 8 or spec.head_dim > 256):
        return f"cudnn attention takes a head_dim of 8, 16 ... 256, this model has {spec.head_dim}"
    if attention == "cudnn" and mode == "train" and (lengths := _odd_lengths(spec)):
        return f"cudnn attention trains a bias at even numbers of tokens, this model has {', '.join(map(str, lengths))}"
    if attention == "pallas" and spec.head_dim > 128 and spec.head_dim % 128:
        return f"pallas attention takes a head_dim of 1 to 128, 256, 384 ..., this model has {spec.head_dim}"
    return None


def _odd_lengths(spec: ViTSpec) -> list[int]:
    """Returns the odd numbers of tokens that the model attends over with a bias."""
    if not isinstance(spec, ViTDetSpec) or not spec.rel_pos:
        return []
    windows = {spec.window_of(i) or spec.grid_size for i in range(spec.depth)}
    return sorted({height * width for height, width in windows if height * width % 2})
