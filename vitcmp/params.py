"""Canonical weights: a flat dict of numpy arrays with timm's module names, and Flax's leaf names and layouts.

`expected_params(spec)` is the third party that both frameworks' trees must equal. A leaf's kind, and never its number
of dimensions, says how it is drawn and how it is laid out elsewhere.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from vitcmp.resample import resize
from vitcmp.specs import (
    BiTSpec,
    BiTV1Spec,
    ConvNeXtSpec,
    ForeignSpec,
    ResNetSpec,
    Spec,
    ViTDetSpec,
    ViTSpec,
    did_you_mean,
    get_spec,
)

Kind = Literal[
    "linear", "conv", "bias", "norm_scale", "norm_bias", "mean", "var", "layer_scale", "pos_embed", "token", "rel_pos"
]
Weights = dict[str, np.ndarray]


class Leaf(NamedTuple):
    """One array of a model: its shape and kind. `linear` is (in, out), `conv` is (height, width, in / groups, out)."""

    shape: tuple[int, ...]
    kind: Kind


def expected_params(spec: Spec | str) -> dict[str, Leaf]:
    """Returns every weight of the model by its canonical name; BatchNorm's running `mean` and `var` are among them.

    Raises ValueError for a model of another library, whose weights only that library knows.
    """
    spec = get_spec(spec)
    if isinstance(spec, ForeignSpec):
        raise ValueError(f"{spec.family}:{spec.name} has no canonical weights: it is built by {spec.family} itself")
    families = {"vit": _vit, "vitdet": _vit, "resnet": _resnet, "bit": _bit, "bit_v1": _bit, "convnext": _convnext}
    return dict(families[spec.family](spec))  # type: ignore[operator]


def expected_shapes(spec: Spec | str) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in expected_params(spec).items()}


def count_params(spec: Spec | str) -> int:
    """Counts trainable parameters; BatchNorm's running statistics are not among them."""
    return sum(math.prod(leaf.shape) for leaf in expected_params(spec).values() if leaf.kind not in ("mean", "var"))


def init_weights(spec: Spec | str, seed: int = 0) -> Weights:
    """Draws float32 weights from `seed`, the same on every machine and for every framework.

    Made for measuring and for parity, not for training from scratch: the norms' scales and statistics, the biases, the
    position embeddings and the layer scales are all drawn away from their usual 0 and 1, so that no layer is without
    effect and none of them can be wrong unseen. Each leaf has a stream of its own, seeded by its name.
    """
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed={seed!r} must be a whole number, 0 or more")
    return {
        name: _draw(leaf, np.random.default_rng([seed, zlib.crc32(name.encode())]))
        for name, leaf in expected_params(spec).items()
    }


def sincos2d(grid_size: tuple[int, int], width: int, *, temperature: float = 10_000.0) -> np.ndarray:
    """Returns the fixed 2-D sine-cosine position embedding (1 h w width) in float64, in big_vision's channel order.

    A quarter of the channels each: sin of the column, cos of the column, sin of the row, cos of the row
    (arXiv:2104.02057, section 3, as in big_vision's `posemb_sincos_2d`).
    """
    rows, columns = np.mgrid[: grid_size[0], : grid_size[1]][:, None].astype(np.float64)
    omega = temperature ** -(np.arange(width // 4) / (width // 4 - 1))
    angles = columns[..., None] * omega, rows[..., None] * omega
    return np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=-1)


def require_arrays(weights: Mapping[str, np.ndarray], *, source: str = "weights") -> None:
    """Raises ValueError where `weights` is not a dict of names to arrays of floats."""
    if not isinstance(weights, Mapping):
        raise ValueError(
            f"{source} is a {type(weights).__name__}, expected a dict of names to arrays, as of load_weights"
        )
    kinds = {name: getattr(array, "dtype", type(array).__name__) for name, array in weights.items()}
    # ml_dtypes' bfloat16 is of kind V, as raw bytes are, which have no values
    wrong = [
        f"{name} ({kind})"
        for name, kind in kinds.items()
        if not (isinstance(kind, np.dtype) and kind.kind in "fV" and kind.type is not np.void)
    ]
    if wrong:
        raise ValueError(f"{source}: expected numpy arrays of floats, got {', '.join(wrong)}")


def check_weights(weights: Mapping[str, np.ndarray], spec: Spec | str, *, source: str = "weights") -> None:
    """Raises one ValueError that lists every missing, unexpected, misshapen and non-finite array."""
    require_arrays(weights, source=source)
    check_shapes(weights, expected_shapes(spec), str(spec), source=source)


def check_shapes(
    weights: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], model: str, *, source: str = "weights"
) -> None:
    """Raises one ValueError that lists every missing, unexpected, misshapen and non-finite array of the model."""
    faults = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in weights]
    absent = nearest_of(weights, shapes)
    for name, array in weights.items():
        if name not in shapes:
            faults.append(f"unexpected {name} {tuple(array.shape)}{did_you_mean(name, absent)}")
        elif tuple(array.shape) != shapes[name]:
            faults.append(f"{name} has shape {tuple(array.shape)}, expected {shapes[name]}")
        elif not np.isfinite(array).all():
            faults.append(f"{name} has values that are not finite")
    if faults:
        raise ValueError(f"{source}: {len(faults)} of its arrays do not fit {model}:\n  " + "\n  ".join(faults))


def nearest_of(names: Iterable[str], expected: Iterable[str]) -> list[str]:
    """Returns the expected names that are absent, for a did-you-mean; none where more than a few are misspelt.

    A file of another model has hundreds, none of which is meant: comparing them took 4 of 5 s (ViT-L into ConvNeXt-B).
    """
    names, expected = set(names), set(expected)
    return sorted(expected - names) if len(names - expected) <= 20 else []


def fit_image_size(weights: Mapping[str, np.ndarray], spec: Spec | str) -> Weights:
    """Returns the weights with their position embeddings resampled to the grid of `spec`; other arrays are passed on.

    The absolute one by antialiased bicubic (a = -0.5, half-pixel centres), as timm's `resample_abs_pos_embed`; tables
    of relative positions linearly, as MViTv2 and SAM, and only where the window follows the image: in global blocks and
    with `window_policy="divide"`. Computed in float64, given back in the array's own dtype. Arrays that do not fit for
    another reason are left for `check_weights` to refuse.
    """
    spec = get_spec(spec)
    fitted = dict(weights)
    for name, leaf in expected_params(spec).items():
        array = weights.get(name)
        if array is None or array.ndim != len(leaf.shape) or array.shape[-1] != leaf.shape[-1]:
            continue
        if leaf.kind == "pos_embed" and array.shape != leaf.shape:
            fitted[name] = _resample(array, (leaf.shape[1], leaf.shape[2]), method="bicubic")
        elif leaf.kind == "rel_pos" and array.shape != leaf.shape and _follows_image(name, spec):
            fitted[name] = _resample(array[:, None], (leaf.shape[0], 1), method="bilinear", antialias=False)[:, 0]
    return fitted


def upcycle(weights: Mapping[str, np.ndarray], spec: Spec | str) -> Weights:
    """Returns the weights of a plain ViT as those of a ViTDet of the same size (arXiv:2203.16527, section 3).

    The class token goes, and so does an attention-pooling head or a classifier that `spec` has no use for; the position
    embedding is resampled to the grid; tables of relative positions start at zero; the norm and the head are kept.
    Raises ValueError where `spec` is no ViTDet or has a neck, and for weights that do not fit.
    """
    spec = get_spec(spec)
    if not isinstance(spec, ViTDetSpec) or spec.neck_dim:
        raise ValueError(f"spec={spec} must be a ViTDet with neck_dim=0: a plain ViT has no weights for a neck")
    expected = expected_params(spec)
    dropped = ("cls_token", "attn_pool", *(() if spec.num_classes else ("pre_logits", "head")))
    kept = {name: array for name, array in weights.items() if name in expected or name.split("/")[0] not in dropped}
    rel_pos = {name: np.zeros(leaf.shape, np.float32) for name, leaf in expected.items() if leaf.kind == "rel_pos"}
    upcycled = fit_image_size(rel_pos | kept, spec)
    check_weights(upcycled, spec, source="upcycled weights")
    return upcycled


def fold_batch_norm(weights: Mapping[str, np.ndarray], spec: Spec | str) -> Weights:
    """Returns a ResNet's weights with each BatchNorm folded into the convolution before it, for `is_folded=true`.

    y = scale * (w x - mean) / sqrt(var + eps) + bias is a convolution by w * scale / sqrt(var + eps), with a bias;
    outputs are the same in evaluation, and training is another model's. Computed in float64, given back in the
    kernels' dtype. Raises ValueError where `spec` is no ResNet, and for weights that do not fit.
    """
    spec = get_spec(spec)
    if not isinstance(spec, ResNetSpec):
        raise ValueError(f"spec={spec} must be a ResNet: a {spec.family} has no BatchNorm to fold")
    if spec.is_folded:
        raise ValueError(f"spec={spec} is folded already: give the spec that the weights are of")
    check_weights(weights, spec)
    folded = {name: weights[name] for name in ("fc/kernel", "fc/bias") if name in weights}
    for name in filter(lambda name: name.endswith("/mean"), weights):
        norm = name.removesuffix("/mean")
        conv = f"{norm[:-1]}0" if "/downsample/" in norm else norm.replace("bn", "conv")
        scale, bias, mean, var = (
            weights[f"{norm}/{leaf}"].astype(np.float64) for leaf in ("scale", "bias", "mean", "var")
        )
        kernel, gain = weights[f"{conv}/kernel"], scale / np.sqrt(var + spec.norm_eps)
        folded[f"{conv}/kernel"] = (kernel * gain).astype(kernel.dtype)
        folded[f"{conv}/bias"] = (bias - mean * gain).astype(kernel.dtype)
    return folded


def _resample(array: np.ndarray, size: tuple[int, int], *, method: str, antialias: bool = True) -> np.ndarray:
    return resize(array.astype(np.float64), size, method=method, antialias=antialias).astype(array.dtype)


def _follows_image(name: str, spec: Spec) -> bool:
    """Says whether the window of the block that `name` is in grows with the image."""
    assert isinstance(spec, ViTDetSpec)
    block = int(name.split("/")[1])
    return spec.window_policy == "divide" or spec.window_of(block) is None


def _draw(leaf: Leaf, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(leaf.shape, dtype=np.float32)
    match leaf.kind:
        case "linear" | "conv":
            drawn = noise / math.sqrt(math.prod(leaf.shape[:-1]))  # unit gain
        case "bias" | "pos_embed" | "rel_pos" | "norm_bias" | "mean":
            drawn = 0.1 * noise
        case "norm_scale":
            drawn = 1 + 0.1 * noise
        case "var":
            drawn = np.exp(0.2 * noise)
        case "layer_scale":
            drawn = 0.5 + 0.1 * noise
        case "token":
            drawn = noise
    return drawn.astype(np.float32)


def _linear(name: str, in_dim: int, out_dim: int) -> Iterator[tuple[str, Leaf]]:
    yield f"{name}/kernel", Leaf((in_dim, out_dim), "linear")
    yield f"{name}/bias", Leaf((out_dim,), "bias")


def _conv(name: str, size: int, in_dim: int, out_dim: int, *, bias: bool = True) -> Iterator[tuple[str, Leaf]]:
    yield f"{name}/kernel", Leaf((size, size, in_dim, out_dim), "conv")
    if bias:
        yield f"{name}/bias", Leaf((out_dim,), "bias")


def _norm(name: str, dim: int) -> Iterator[tuple[str, Leaf]]:
    yield f"{name}/scale", Leaf((dim,), "norm_scale")
    yield f"{name}/bias", Leaf((dim,), "norm_bias")


def _batch_norm(name: str, dim: int) -> Iterator[tuple[str, Leaf]]:
    yield from _norm(name, dim)
    yield f"{name}/mean", Leaf((dim,), "mean")
    yield f"{name}/var", Leaf((dim,), "var")


def _mlp(name: str, width: int, mlp_dim: int) -> Iterator[tuple[str, Leaf]]:
    yield from _linear(f"{name}/fc1", width, mlp_dim)
    yield from _linear(f"{name}/fc2", mlp_dim, width)


def _vit(spec: ViTSpec) -> Iterator[tuple[str, Leaf]]:
    width = spec.width
    yield from _conv("patch_embed/proj", spec.patch_size, 3, width)
    if spec.pos_embed == "learned":
        yield "pos_embed", Leaf((1, *spec.grid_size, width), "pos_embed")
    if spec.pool == "tok":
        yield "cls_token", Leaf((1, 1, width), "token")
    for i in range(spec.depth):
        block = f"blocks/{i}"
        yield from _norm(f"{block}/norm1", width)
        yield from _linear(f"{block}/attn/qkv", width, 3 * width)
        yield from _linear(f"{block}/attn/proj", width, width)
        if isinstance(spec, ViTDetSpec) and spec.rel_pos:
            rows, columns = spec.window_of(i) or spec.grid_size
            yield f"{block}/attn/rel_pos_h", Leaf((2 * rows - 1, spec.head_dim), "rel_pos")
            yield f"{block}/attn/rel_pos_w", Leaf((2 * columns - 1, spec.head_dim), "rel_pos")
        yield from _norm(f"{block}/norm2", width)
        yield from _mlp(f"{block}/mlp", width, spec.mlp_dim)
    out_dim = width
    if isinstance(spec, ViTDetSpec) and spec.neck_dim:
        out_dim = spec.neck_dim
        yield from _conv("neck/0", 1, width, out_dim, bias=False)
        yield from _norm("neck/1", out_dim)
        yield from _conv("neck/2", 3, out_dim, out_dim, bias=False)
        yield from _norm("neck/3", out_dim)
    else:
        yield from _norm("norm", width)
    if spec.pool == "map":
        yield "attn_pool/latent", Leaf((1, 1, out_dim), "token")
        yield from _linear("attn_pool/q", out_dim, out_dim)
        yield from _linear("attn_pool/kv", out_dim, 2 * out_dim)
        yield from _linear("attn_pool/proj", out_dim, out_dim)
        yield from _norm("attn_pool/norm", out_dim)
        yield from _mlp("attn_pool/mlp", out_dim, spec.mlp_dim)
    if spec.rep_size:
        yield from _linear("pre_logits", out_dim, spec.rep_size)
    if spec.num_classes:
        yield from _linear("head", spec.rep_size or out_dim, spec.num_classes)


def _resnet(spec: ResNetSpec) -> Iterator[tuple[str, Leaf]]:
    def conv_norm(conv: str, norm: str, size: int, in_dim: int, out_dim: int) -> Iterator[tuple[str, Leaf]]:
        yield from _conv(conv, size, in_dim, out_dim, bias=spec.is_folded)
        if not spec.is_folded:
            yield from _batch_norm(norm, out_dim)

    yield from conv_norm("conv1", "bn1", 7, 3, spec.width)
    in_dim = spec.width
    for stage, depth in enumerate(spec.depths):
        mid_dim = spec.width * 2**stage
        out_dim = mid_dim * spec.expansion
        layers: tuple[tuple[int, int, int], ...]
        if spec.block == "basic":
            layers = ((3, in_dim, mid_dim), (3, mid_dim, out_dim))
        else:
            layers = ((1, in_dim, mid_dim), (3, mid_dim, mid_dim), (1, mid_dim, out_dim))
        for i in range(depth):
            block = f"layer{stage + 1}/{i}"
            for j, (size, conv_in, conv_out) in enumerate(layers, start=1):
                conv_in = in_dim if j == 1 else conv_in
                yield from conv_norm(f"{block}/conv{j}", f"{block}/bn{j}", size, conv_in, conv_out)
            if i == 0 and (stage > 0 or in_dim != out_dim):
                yield from conv_norm(f"{block}/downsample/0", f"{block}/downsample/1", 1, in_dim, out_dim)
            in_dim = out_dim
    if spec.num_classes:
        yield from _linear("fc", in_dim, spec.num_classes)


def _bit(spec: BiTSpec) -> Iterator[tuple[str, Leaf]]:
    is_v1 = isinstance(spec, BiTV1Spec)  # whose norms come after the convolutions

    in_dim = spec.width
    yield from _conv("stem/conv", 7, 3, in_dim, bias=False)
    if is_v1:
        yield from _norm("stem/norm", in_dim)
    for stage, depth in enumerate(spec.depths):
        mid_dim = spec.width * 2**stage
        out_dim = 4 * mid_dim
        for i in range(depth):
            block = f"stages/{stage}/blocks/{i}"
            if i == 0:
                yield from _conv(f"{block}/downsample/conv", 1, in_dim, out_dim, bias=False)
            if i == 0 and is_v1:
                yield from _norm(f"{block}/downsample/norm", out_dim)
            layers = ((1, in_dim, mid_dim), (3, mid_dim, mid_dim), (1, mid_dim, out_dim))
            for j, (size, conv_in, conv_out) in enumerate(layers, start=1):
                yield from _conv(f"{block}/conv{j}", size, conv_in, conv_out, bias=False)
                yield from _norm(f"{block}/norm{j}", conv_out if is_v1 else conv_in)
            in_dim = out_dim
    if not is_v1:
        yield from _norm("norm", in_dim)
    if spec.num_classes:
        yield from _linear("head/fc", in_dim, spec.num_classes)


def _convnext(spec: ConvNeXtSpec) -> Iterator[tuple[str, Leaf]]:
    yield from _conv("stem/0", 4, 3, spec.widths[0])
    yield from _norm("stem/1", spec.widths[0])
    in_dim = spec.widths[0]
    for stage, (depth, width) in enumerate(zip(spec.depths, spec.widths, strict=True)):
        if stage > 0:
            yield from _norm(f"stages/{stage}/downsample/0", in_dim)
            yield from _conv(f"stages/{stage}/downsample/1", 2, in_dim, width)
        for i in range(depth):
            block = f"stages/{stage}/blocks/{i}"
            yield from _conv(f"{block}/conv_dw", spec.kernel_size, 1, width)
            yield from _norm(f"{block}/norm", width)
            yield from _mlp(f"{block}/mlp", width, 4 * width)
            yield f"{block}/gamma", Leaf((width,), "layer_scale")
        in_dim = width
    yield from _norm("head/norm", in_dim)
    if spec.num_classes:
        yield from _linear("head/fc", in_dim, spec.num_classes)
