"""Analytic FLOPs of one image, by kind: the source of truth that both frameworks' counts must equal to the FLOP.

Convention: matmuls and convolutions only, 2 per multiply-add, as executed: ViTDet's padded tokens count, and so do a
convolution's taps on its padding. Normalisation, softmax, activations, biases and pooling are left out, as in PaLM,
arXiv:2204.02311, appendix B. Half of `total` is what others call MACs, and some, wrongly, FLOPs.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from vitcmp.backend import MODES, require_choice
from vitcmp.specs import (
    BiTSpec,
    ConvNeXtSpec,
    ForeignSpec,
    ResNetSpec,
    Spec,
    ViTDetSpec,
    ViTSpec,
    get_spec,
    parse_image_size,
)

Kind = Literal["patch_embed", "linear", "attention", "rel_pos", "convolution", "depthwise"]
Counts = Iterator[tuple[Kind, int]]


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
    families = {"vit": _vit, "vitdet": _vit, "resnet": _resnet, "bit": _bit, "bit_v1": _bit, "convnext": _convnext}
    by_kind: Counter[str] = Counter()
    for i, (kind, flops) in enumerate(families[spec.family](spec)):  # type: ignore[operator]
        if mode == "train":
            flops *= 2 if i == 0 else 3
        by_kind[kind] += flops
    return FlopCount(dict(by_kind))


def _linear(num_tokens: int, in_dim: int, out_dim: int) -> tuple[Kind, int]:
    return "linear", 2 * num_tokens * in_dim * out_dim


def _attention(num_windows: int, num_queries: int, num_keys: int, width: int) -> tuple[Kind, int]:
    return "attention", 4 * num_windows * num_queries * num_keys * width  # q k^T and its product with v, all heads


def _conv(kind: Kind, out_size: tuple[int, int], kernel_size: int, in_dim: int, out_dim: int) -> tuple[Kind, int]:
    """One convolution; in_dim is that of one group."""
    return kind, 2 * math.prod(out_size) * out_dim * kernel_size**2 * in_dim


def _vit(spec: ViTSpec) -> Counts:
    """Yields the layers of ViT and ViTDet in order."""
    yield _conv("patch_embed", spec.grid_size, spec.patch_size, 3, spec.width)
    for i in range(spec.depth):
        yield from _block(spec, i)
    num_tokens, width = spec.num_tokens, spec.width
    if isinstance(spec, ViTDetSpec) and spec.neck_dim:
        yield _conv("convolution", spec.grid_size, 1, width, spec.neck_dim)
        yield _conv("convolution", spec.grid_size, 3, spec.neck_dim, spec.neck_dim)
        width = spec.neck_dim
    if spec.pool == "map":
        yield _linear(1, width, width)  # the learned query
        yield _linear(num_tokens, width, 2 * width)
        yield _attention(1, 1, num_tokens, width)
        yield _linear(1, width, width)
        yield _linear(2, width, spec.mlp_dim)  # both layers of the MLP
    yield from _head(width, spec.rep_size, spec.num_classes)


def _block(spec: ViTSpec, block: int) -> Counts:
    num_tokens, width = spec.num_tokens, spec.width
    num_windows, window = 1, (1, num_tokens)
    if isinstance(spec, ViTDetSpec):
        window = spec.window_of(block) or spec.grid_size
        num_windows = math.prod(-(-side // of) for side, of in zip(spec.grid_size, window, strict=True))
    in_window = math.prod(window)
    padded = num_windows * in_window  # of which the attention runs on all, the projections on the tokens of the grid
    yield _linear(num_tokens, width, 3 * width)
    if isinstance(spec, ViTDetSpec) and spec.rel_pos:
        yield "rel_pos", 2 * padded * sum(window) * width  # each query with its window's rows, and with its columns
    yield _attention(num_windows, in_window, in_window, width)
    yield _linear(num_tokens, width, width)
    yield _linear(num_tokens, width, spec.mlp_dim)
    yield _linear(num_tokens, spec.mlp_dim, width)


def _resnet(spec: ResNetSpec) -> Counts:
    size = _halved(spec.image_size)
    yield _conv("convolution", size, 7, 3, spec.width)
    size, in_dim = _halved(size), spec.width  # the max-pool
    for stage, depth in enumerate(spec.depths):
        mid_dim = spec.width * 2**stage
        out_dim = mid_dim * spec.expansion
        for i in range(depth):
            in_size, size = size, _halved(size) if stage > 0 and i == 0 else size
            if spec.block == "basic":
                yield _conv("convolution", size, 3, in_dim, mid_dim)
                yield _conv("convolution", size, 3, mid_dim, out_dim)
            else:  # v1.5: the stride is in the 3x3 convolution
                yield _conv("convolution", in_size, 1, in_dim, mid_dim)
                yield _conv("convolution", size, 3, mid_dim, mid_dim)
                yield _conv("convolution", size, 1, mid_dim, out_dim)
            if in_dim != out_dim:  # wherever the map is halved, too
                yield _conv("convolution", size, 1, in_dim, out_dim)
            in_dim = out_dim
    yield from _head(in_dim, 0, spec.num_classes)


def _bit(spec: BiTSpec) -> Counts:
    """Yields the layers of BiT, and of V1, which pads otherwise to the same sizes; standardising is no matmul."""
    size = _halved(spec.image_size)
    yield _conv("convolution", size, 7, 3, spec.width)
    size, in_dim = _halved(size), spec.width  # the max-pool
    for stage, depth in enumerate(spec.depths):
        mid_dim = spec.width * 2**stage
        for i in range(depth):
            in_size, size = size, _halved(size) if stage > 0 and i == 0 else size
            if i == 0:
                yield _conv("convolution", size, 1, in_dim, 4 * mid_dim)
            yield _conv("convolution", in_size, 1, in_dim, mid_dim)
            yield _conv("convolution", size, 3, mid_dim, mid_dim)
            yield _conv("convolution", size, 1, mid_dim, 4 * mid_dim)
            in_dim = 4 * mid_dim
    yield from _head(in_dim, 0, spec.num_classes)


def _convnext(spec: ConvNeXtSpec) -> Counts:
    size, in_dim = _floored(spec.image_size, 4), spec.widths[0]
    yield _conv("convolution", size, 4, 3, in_dim)
    for stage, (depth, width) in enumerate(zip(spec.depths, spec.widths, strict=True)):
        if stage > 0:
            size = _floored(size, 2)
            yield _conv("convolution", size, 2, in_dim, width)
        for _ in range(depth):
            yield _conv("depthwise", size, spec.kernel_size, 1, width)
            yield _linear(math.prod(size), width, 4 * width)
            yield _linear(math.prod(size), 4 * width, width)
        in_dim = width
    yield from _head(in_dim, 0, spec.num_classes)


def _head(width: int, rep_size: int, num_classes: int) -> Counts:
    if rep_size:
        yield _linear(1, width, rep_size)
    if num_classes:
        yield _linear(1, rep_size or width, num_classes)


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the size after a padded stride of 2, rounded up."""
    return -(-size[0] // 2), -(-size[1] // 2)


def _floored(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Returns the size after an unpadded stride, rounded down."""
    return size[0] // stride, size[1] // stride
