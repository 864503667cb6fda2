"""Analytic FLOPs of one image, by kind: the source of truth that both frameworks' counts must equal to the FLOP.

Convention: matmuls and convolutions only, 2 per multiply-add, as executed: ViTDet's padded tokens count, and so do a
convolution's taps on its padding. Normalisation, softmax, activations, biases and pooling are left out, as in PaLM,
arXiv:2204.02311, appendix B. Half of `total` is what others call MACs, and some, wrongly, FLOPs.
"""

import dataclasses
from collections import Counter
from typing import Any

from vitcmp.backend import MODES, require_choice
from vitcmp.products import list_products
from vitcmp.specs import ForeignSpec, Spec, get_spec, parse_image_size


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs of one image. `attention` is scores and values; its projections are `linear`, its biases `rel_pos`."""

    by_kind: dict[str, int]  # only the kinds that the model has, in order of first use

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def count_flops(spec: Spec | str, image_size: Any = None, *, mode: str = "forward") -> FlopCount:
    """Counts the FLOPs of one image: of the forward pass, or of a training step.

    image_size: 224, "80x176" or (height, width); None is the spec's own. mode="train" is forward and backward: each
    product costs its forward FLOPs twice more, once for the gradient of either factor, save in the first layer, whose
    gradient towards the image nobody needs. Nothing is recomputed (flash attention does), and the optimizer is left
    out. torch's own counter gives more for ConvNeXt's backward: it takes a depthwise convolution's for a dense one's.
    Raises ValueError for an unknown mode, for what get_spec refuses, and for a model of another library.
    """
    require_choice("mode", mode, MODES)
    spec = get_spec(spec)
    if image_size is not None:
        spec = dataclasses.replace(spec, image_size=parse_image_size(image_size))
    if isinstance(spec, ForeignSpec):
        raise ValueError(f"{spec.family}:{spec.name} has no analytic count; its backend's count_flops counts its graph")
    by_kind: Counter[str] = Counter()
    for i, product in enumerate(list_products(spec)):
        by_kind[product.kind] += product.flops * num_passes(mode, is_first=i == 0)
    return FlopCount(dict(by_kind))


def num_passes(mode: str, *, is_first: bool) -> int:
    """Returns how often a step does a product: forward, and in training for the gradient of either factor."""
    if mode == "forward":
        return 1
    return 2 if is_first else 3
