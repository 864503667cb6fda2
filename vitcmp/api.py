"""The small Python API: one forward pass on either framework, and a step of it to be timed."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from vitcmp.backend import (
    ATTENTION,
    BACKENDS,
    COMPILE,
    LAYOUT,
    NUMERICS,
    Backend,
    Step,
    Unsupported,
    load_backend,
    require_choice,
    why_unsupported,
)
from vitcmp.params import Weights, check_weights, fit_image_size, require_arrays
from vitcmp.parity import tolerance
from vitcmp.specs import ForeignSpec, Spec, TimmSpec, ViTSpec, get_spec
from vitcmp.weight_files import as_numbers


def forward(
    backend: str,
    spec: Spec | str,
    weights: Weights | None,
    images_nhwc: Any,
    *,
    numerics: str = "float32",
    attention: str | None = None,
    device: str = "auto",
) -> dict[str, np.ndarray]:
    """Runs the model and returns outputs by name: `logits`, `pre_logits`, `pooled`, `features`, `block/3`, `stem`...

    images_nhwc: (b h w 3) in [-1, 1], of any size: weights whose position embedding is of another grid are resampled.
    Maps are NHWC, tokens (b n d); 16-bit outputs come back as float32; `logits` is absent where num_classes is 0.
    A model of another library (`timm:NAME`, `big_vision:NAME`) takes that library's weights by its names, which its own
    loading brings to the images' size, or None: then the library draws them from seed 0.
    Raises ValueError for unknown names, wrong images and weights that do not fit, and Unsupported for what the device
    does not have.
    """
    require_choice("numerics", numerics, tuple(NUMERICS))
    images = _check_images(images_nhwc)
    spec = dataclasses.replace(get_spec(spec), image_size=images.shape[1:3])
    engine = load_backend(backend, platform=device)
    if attention is not None:
        _check_attention(engine, spec, numerics, attention)
    weights = _fit_weights(weights, spec)
    with engine.numerics(numerics):
        model = engine.load(engine.build(spec, attention=attention), weights, numerics=numerics)
        return engine.outputs(model, images)


class ModelStep:
    """A forward pass on one batch, compiled, with weights and images on the device; `vitcmp.compare` times it.

    A call returns when the device is idle. torch's precision flags are the process's, and in force only inside
    `with step.settings():`, which `vitcmp.compare` opens for both sides; in JAX they are compiled in.
    """

    def __init__(self, engine: Backend, step: Step, *, numerics: str, bound: float | None) -> None:
        self.engine, self.step, self.numerics = engine, step, numerics
        self.platform = engine.describe().platform
        self.bound = bound  # of parity.tolerance; None for a model whose layers are not known

    def __call__(self) -> None:
        self.step()

    def result(self) -> np.ndarray:
        """Returns the logits (b num_classes), float32 at least; what the head would read, where there is none."""
        with self.settings():
            return self.step.result()

    def settings(self) -> AbstractContextManager[dict[str, Any]]:
        """Enforces the numerics while open, and gives the effective settings."""
        return self.engine.numerics(self.numerics)


def make_step(
    backend: str,
    spec: Spec | str,
    weights: Weights | None,
    images_nhwc: Any,
    *,
    numerics: str = "float32",
    attention: str | None = None,
    compile: str | None = None,
    layout: str | None = None,
    device: str = "auto",
) -> ModelStep:
    """Returns a forward pass that is ready to be timed, or to be compared with your own code by `vitcmp.compare`.

    images_nhwc: (b h w 3) in [-1, 1], as for `forward`. `attention`, `compile` and `layout` are what `vitcmp.run`
    takes; without them, each framework's first: torch `math`, `eager` and `nchw`, JAX `xla`, `jit` and `nhwc`.
    Raises what `forward` raises.
    """
    require_choice("numerics", numerics, tuple(NUMERICS))
    require_choice("backend", backend, BACKENDS)
    for name, value, allowed in (("compile", compile, COMPILE[backend]), ("layout", layout, LAYOUT[backend])):
        require_choice(name, value or allowed[0], allowed)
    images = _check_images(images_nhwc)
    spec = dataclasses.replace(get_spec(spec), image_size=images.shape[1:3])
    engine = load_backend(backend, platform=device)
    if attention is not None:
        _check_attention(engine, spec, numerics, attention)
    weights = _fit_weights(weights, spec)
    with engine.numerics(numerics):
        model = engine.load(engine.build(spec, attention=attention), weights, numerics=numerics, layout=layout)
        labels = np.zeros(len(images), np.int64)
        step = engine.compile(model, images, labels, mode="forward", compile=compile or COMPILE[backend][0])
    bound = None if isinstance(spec, ForeignSpec) else tolerance(numerics, spec)
    return ModelStep(engine, step, numerics=numerics, bound=bound)


def _fit_weights(weights: Weights | None, spec: Spec) -> Weights | None:
    """Returns the weights at the spec's image size, checked; another library's are checked when they are loaded."""
    if isinstance(spec, ForeignSpec):
        return None if weights is None else as_numbers(weights, "weights")
    if weights is None:
        raise ValueError(
            "weights is None, expected a dict of names to arrays: only timm:... and big_vision:... draw some"
        )
    require_arrays(weights)
    weights = fit_image_size(weights, spec)
    check_weights(weights, spec)
    return weights


def _check_images(images_nhwc: Any) -> np.ndarray:
    images = np.asarray(images_nhwc)
    is_batch = images.ndim == 4 and images.shape[-1] == 3 and images.size
    if not (is_batch and np.issubdtype(images.dtype, np.floating)):
        raise ValueError(
            f"images_nhwc is {images.dtype} of shape {images.shape}, expected floats of (batch, height, width, 3), "
            "1 image or more, in [-1, 1] (of 8-bit pixels: images / 127.5 - 1)"
        )
    return images


def _check_attention(engine: Backend, spec: Spec, numerics: str, attention: str) -> None:
    require_choice("attention", attention, ATTENTION[engine.name])
    if not isinstance(spec, ViTSpec | TimmSpec):
        raise ValueError(f"attention={attention!r}: a {spec.family} has none; leave it out")
    axes = {"backend": engine.name, "numerics": numerics, "attention": attention}
    if reason := why_unsupported(spec, platform=engine.describe().platform, **axes):
        raise Unsupported(f"attention={attention!r}: {reason}")
