"""The products of a model, layer by layer: what `vitcmp.flops` adds up the FLOPs of, and `vitcmp.traffic` the arrays.

A product is a matmul, a convolution, or the two matmuls of an attention. Nothing else is here: no normalisation, no
softmax, no activation, no bias, no pooling.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from vitcmp.specs import BiTSpec, ConvNeXtSpec, ResNetSpec, Spec, ViTDetSpec, ViTSpec

Kind = Literal["patch_embed", "linear", "attention", "rel_pos", "convolution", "depthwise"]


class Product(NamedTuple):
    """One product of one image: its FLOPs, 2 per multiply-add as executed, and how many values its arrays have.

    Of a convolution's input only the values that a kernel covers count. An attention reads q, k, v and its biases, and
    writes its output: its n x n logits are in no array.
    """

    kind: Kind
    flops: int
    inputs: int  # of each image
    weights: int  # of all images together
    outputs: int  # of each image


def list_products(spec: Spec) -> Iterator[Product]:
    """Yields the products of one of our models in order; the first one reads the image."""
    families = {"vit": _vit, "vitdet": _vit, "resnet": _resnet, "bit": _bit, "bit_v1": _bit, "convnext": _convnext}
    yield from families[spec.family](spec)  # type: ignore[operator]


def _linear(num_tokens: int, in_dim: int, out_dim: int) -> Product:
    flops = 2 * num_tokens * in_dim * out_dim
    return Product("linear", flops, num_tokens * in_dim, in_dim * out_dim, num_tokens * out_dim)


def _attention(num_windows: int, num_queries: int, num_keys: int, width: int, *, num_biases: int = 0) -> Product:
    flops = 4 * num_windows * num_queries * num_keys * width  # q k^T and its product with v, all heads
    queries = num_windows * num_queries * width
    return Product("attention", flops, queries + 2 * num_windows * num_keys * width + num_biases, 0, queries)


def _rel_pos(spec: ViTDetSpec, num_windows: int, window: tuple[int, int]) -> Product:
    """The bias of each query with the rows of its window, and with the columns; the heads share the two tables."""
    num_tokens, num_distances = num_windows * math.prod(window), 2 * sum(window)
    return Product(
        "rel_pos",
        2 * num_tokens * sum(window) * spec.width,
        num_tokens * spec.width,
        (num_distances - 2) * spec.head_dim,
        num_tokens * sum(window) * spec.num_heads,
    )


def _conv(
    kind: Kind,
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    kernel_size: int,
    in_dim: int,
    out_dim: int,
    *,
    groups: int = 1,
) -> Product:
    taps = kernel_size**2 * in_dim // groups  # of one output
    covered = math.prod(min(side, out * kernel_size) for side, out in zip(in_size, out_size, strict=True))
    outputs = math.prod(out_size) * out_dim
    return Product(kind, 2 * outputs * taps, covered * in_dim, taps * out_dim, outputs)


def _vit(spec: ViTSpec) -> Iterator[Product]:
    """Yields the layers of ViT and ViTDet in order."""
    yield _conv("patch_embed", spec.image_size, spec.grid_size, spec.patch_size, 3, spec.width)
    for i in range(spec.depth):
        yield from _block(spec, i)
    num_tokens, width, size = spec.num_tokens, spec.width, spec.grid_size
    if isinstance(spec, ViTDetSpec) and spec.neck_dim:
        yield _conv("convolution", size, size, 1, width, spec.neck_dim)
        yield _conv("convolution", size, size, 3, spec.neck_dim, spec.neck_dim)
        width = spec.neck_dim
    if spec.pool == "map":
        yield _linear(1, width, width)  # the learned query
        yield _linear(num_tokens, width, 2 * width)
        yield _attention(1, 1, num_tokens, width)
        yield _linear(1, width, width)
        yield _linear(1, width, spec.mlp_dim)
        yield _linear(1, spec.mlp_dim, width)
    yield from _head(width, spec.rep_size, spec.num_classes)


def _block(spec: ViTSpec, block: int) -> Iterator[Product]:
    num_tokens, width = spec.num_tokens, spec.width
    num_windows, window, num_biases = 1, (1, num_tokens), 0
    if isinstance(spec, ViTDetSpec):
        window = spec.window_of(block) or spec.grid_size
        num_windows = math.prod(-(-side // of) for side, of in zip(spec.grid_size, window, strict=True))
    in_window = math.prod(window)  # the attention runs on padded windows, the projections on the tokens of the grid
    yield _linear(num_tokens, width, 3 * width)
    if isinstance(spec, ViTDetSpec) and spec.rel_pos:
        rel_pos = _rel_pos(spec, num_windows, window)
        yield rel_pos
        num_biases = rel_pos.outputs
    yield _attention(num_windows, in_window, in_window, width, num_biases=num_biases)
    yield _linear(num_tokens, width, width)
    yield _linear(num_tokens, width, spec.mlp_dim)
    yield _linear(num_tokens, spec.mlp_dim, width)


def _resnet(spec: ResNetSpec) -> Iterator[Product]:
    size = _halved(spec.image_size)
    yield _conv("convolution", spec.image_size, size, 7, 3, spec.width)
    size, in_dim = _halved(size), spec.width  # the max-pool
    for stage, depth in enumerate(spec.depths):
        mid_dim = spec.width * 2**stage
        out_dim = mid_dim * spec.expansion
        for i in range(depth):
            in_size, size = size, _halved(size) if stage > 0 and i == 0 else size
            if spec.block == "basic":
                yield _conv("convolution", in_size, size, 3, in_dim, mid_dim)
                yield _conv("convolution", size, size, 3, mid_dim, out_dim)
            else:  # v1.5: the stride is in the 3x3 convolution
                yield _conv("convolution", in_size, in_size, 1, in_dim, mid_dim)
                yield _conv("convolution", in_size, size, 3, mid_dim, mid_dim)
                yield _conv("convolution", size, size, 1, mid_dim, out_dim)
            if in_dim != out_dim:  # wherever the map is halved, too
                yield _conv("convolution", in_size, size, 1, in_dim, out_dim)
            in_dim = out_dim
    yield from _head(in_dim, 0, spec.num_classes)


def _bit(spec: BiTSpec) -> Iterator[Product]:
    """Yields the layers of BiT, and of V1, which pads otherwise to the same sizes; standardising is no product."""
    size = _halved(spec.image_size)
    yield _conv("convolution", spec.image_size, size, 7, 3, spec.width)
    size, in_dim = _halved(size), spec.width  # the max-pool
    for stage, depth in enumerate(spec.depths):
        mid_dim = spec.width * 2**stage
        for i in range(depth):
            in_size, size = size, _halved(size) if stage > 0 and i == 0 else size
            if i == 0:
                yield _conv("convolution", in_size, size, 1, in_dim, 4 * mid_dim)
            yield _conv("convolution", in_size, in_size, 1, in_dim, mid_dim)
            yield _conv("convolution", in_size, size, 3, mid_dim, mid_dim)
            yield _conv("convolution", size, size, 1, mid_dim, 4 * mid_dim)
            in_dim = 4 * mid_dim
    yield from _head(in_dim, 0, spec.num_classes)


def _convnext(spec: ConvNeXtSpec) -> Iterator[Product]:
    size, in_dim = _floored(spec.image_size, 4), spec.widths[0]
    yield _conv("convolution", spec.image_size, size, 4, 3, in_dim)
    for stage, (depth, width) in enumerate(zip(spec.depths, spec.widths, strict=True)):
        if stage > 0:
            in_size, size = size, _floored(size, 2)
            yield _conv("convolution", in_size, size, 2, in_dim, width)
        for _ in range(depth):
            yield _conv("depthwise", size, size, spec.kernel_size, width, width, groups=width)
            yield _linear(math.prod(size), width, 4 * width)
            yield _linear(math.prod(size), 4 * width, width)
        in_dim = width
    yield from _head(in_dim, 0, spec.num_classes)


def _head(width: int, rep_size: int, num_classes: int) -> Iterator[Product]:
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
