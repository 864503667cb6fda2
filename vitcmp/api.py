"""The small Python API: one forward pass on either framework."""

import dataclasses
from typing import Any

import numpy as np

from vitcmp.backend import ATTENTION, NUMERICS, Backend, Unsupported, load_backend, require_choice, why_unsupported
from vitcmp.params import Weights, check_weights, fit_image_size, require_arrays
from vitcmp.specs import Spec, ViTSpec, get_spec


def forward(
    backend: str,
    spec: Spec | str,
    weights: Weights,
    images_nhwc: Any,
    *,
    numerics: str = "float32",
    attention: str | None = None,
    device: str = "auto",
) -> dict[str, np.ndarray]:
    """Runs the model and returns outputs by name: `logits`, `pre_logits`, `pooled`, `features`, `block/3`, `stem`...

    images_nhwc: (b h w 3) in [-1, 1], of any size: weights whose position embedding is of another grid are resampled.
    Maps are NHWC, tokens (b n d); 16-bit outputs come back as float32; `logits` is absent where num_classes is 0.
    Raises ValueError for unknown names, wrong images and weights that do not fit, and Unsupported for what the device
    does not have.
    """
    require_choice("numerics", numerics, tuple(NUMERICS))
    images = _check_images(images_nhwc)
    spec = dataclasses.replace(get_spec(spec), image_size=images.shape[1:3])
    engine = load_backend(backend, platform=device)
    if attention is not None:
        _check_attention(engine, spec, numerics, attention)
    require_arrays(weights)
    weights = fit_image_size(weights, spec)
    check_weights(weights, spec)
    with engine.numerics(numerics):
        model = engine.load(engine.build(spec, attention=attention), weights, numerics=numerics)
        return engine.outputs(model, images)


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
    if not isinstance(spec, ViTSpec):
        raise ValueError(f"attention={attention!r}: a {spec.family} has none; leave it out")
    axes = {"backend": engine.name, "numerics": numerics, "attention": attention}
    if reason := why_unsupported(spec, platform=engine.describe().platform, **axes):
        raise Unsupported(f"attention={attention!r}: {reason}")
