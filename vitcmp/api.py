"""The small Python API: one forward pass on either framework."""

import dataclasses
from typing import Any

import numpy as np

from vitcmp.backend import ATTENTION, NUMERICS, load_backend, require_choice
from vitcmp.params import Weights, check_weights, fit_image_size
from vitcmp.specs import Spec, get_spec


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
    Maps are NHWC, tokens (b n d); 16-bit outputs come back as float32. Raises ValueError for unknown names, wrong
    shapes and weights that do not fit.
    """
    require_choice("numerics", numerics, tuple(NUMERICS))
    engine = load_backend(backend, platform=device)
    if attention is not None:
        require_choice("attention", attention, ATTENTION[backend])
    images = np.asarray(images_nhwc)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images_nhwc has shape {images.shape}, expected (batch, height, width, 3)")
    spec = dataclasses.replace(get_spec(spec), image_size=images.shape[1:3])
    weights = fit_image_size(weights, spec)
    check_weights(weights, spec)
    with engine.numerics(numerics):
        model = engine.load(engine.build(spec, attention=attention), weights, numerics=numerics)
        return engine.outputs(model, images)
