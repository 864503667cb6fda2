"""The bytes that a step must move to and from memory: the other axis of a roofline, beside vitcmp.flops.

A lower bound by convention: each product reads each of its arrays once and writes its output once, however large they
are; everything between two products is fused into them (norms, activations, residual sums, casts), and attention is as
in flash kernels (arXiv:2205.14135), whose n x n logits stay on the chip. So biases, norms' scales and position
embeddings are left out, but ViTDet's padded windows are there, as in its FLOPs. A cache that keeps one product's output
for the next can do with less.
"""

import dataclasses
from typing import Any

from vitcmp.backend import MODES, NUMERICS, require_choice
from vitcmp.flops import num_passes
from vitcmp.params import count_params
from vitcmp.products import list_products
from vitcmp.specs import ForeignSpec, Spec, get_spec, parse_image_size

VALUE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# AdamW reads a parameter, its gradient and its two moments, and writes all but the gradient.
ADAMW_ARRAYS = 4 + 3


def count_traffic(
    spec: Spec | str, image_size: Any = None, *, batch_size: int, numerics: str = "float32", mode: str = "forward"
) -> int | None:
    """Counts the bytes of one step on a batch, weights once for all its images; None for another library's model.

    mode="train" does each product three times, and the first layer's twice: forward reads inputs and weights and writes
    outputs, and each gradient reads two of these three (or their gradients) and writes the third's. An attention's
    backward reads its inputs, its output and that one's gradient, and writes the inputs' gradients: with its forward
    three times its arrays, too. AdamW's update of every parameter is in it.
    Raises ValueError for an unknown mode or numerics, a batch_size below 1, and what get_spec refuses.
    """
    require_choice("mode", mode, MODES)
    require_choice("numerics", numerics, tuple(NUMERICS))
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    spec = get_spec(spec)
    if image_size is not None:
        spec = dataclasses.replace(spec, image_size=parse_image_size(image_size))
    if isinstance(spec, ForeignSpec):
        return None
    param_bytes, value_bytes = (VALUE_BYTES[dtype] for dtype in NUMERICS[numerics])
    total = ADAMW_ARRAYS * count_params(spec) * param_bytes if mode == "train" else 0
    for i, product in enumerate(list_products(spec)):
        values = batch_size * (product.inputs + product.outputs)
        once = values * value_bytes + product.weights * param_bytes
        total += once * num_passes(mode, is_first=i == 0)
    return total
