"""First weights to train from: each family's own published scheme, and a patch embedding of another patch size."""

import math
import re
import zlib
from collections.abc import Mapping

import numpy as np

from vitcmp.params import Leaf, Weights, expected_params
from vitcmp.resample import resize_matrix
from vitcmp.specs import BiTSpec, ConvNeXtSpec, ResNetSpec, Spec, ViTSpec, get_spec

# Deviation of a normal distribution that is cut off at twice its scale, which Flax's initialisers divide by.
TRUNCATED_STD = 0.87962566103423978


def initial_weights(spec: Spec | str, seed: int = 0, *, zero_init_residual: bool = True) -> Weights:
    """Draws float32 weights to train from scratch, the same on every machine and for every framework.

    - ViT and ViTDet as big_vision's `models/vit.py` (which is arXiv:2010.11929's code): kernels Xavier-uniform, q, k
      and v each by itself; patch embedding and pre-logits LeCun-normal; position embedding normal of 1 / sqrt(width);
      MLP biases normal of 1e-6; class token, all other biases and the classifier zero. ViTDet's relative positions are
      zero (arXiv:2203.16527, section 3); its neck is LeCun-normal, where SAM's code has torch's default.
    - ResNet as torchvision and timm: He-normal by fan-out (arXiv:1502.01852), the classifier uniform in 1 / sqrt(in),
      its bias too; with `zero_init_residual` the scale of each block's last norm is zero (arXiv:1706.02677, section
      5.1; timm's default, not torchvision's).
    - BiT as big_vision's `models/bit_paper.py` and `bit.py`: LeCun-normal, the classifier zero; in `bit_v1` also the
      scale of each block's last norm, with `zero_init_residual`.
    - ConvNeXt as its released code and timm: kernels normal of .02 (their truncation, at 100 deviations, never
      happens), biases zero, layer scale 1e-6.

    Norms have scale 1, bias 0, running mean 0 and variance 1. Each leaf has a stream of its own, seeded by its name, so
    that a leaf of one shape is the same in every spec that has it. Raises ValueError for a bad seed, and for a model of
    another library.
    """
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed={seed!r} must be a whole number, 0 or more")
    spec = get_spec(spec)
    weights = {}
    for name, leaf in expected_params(spec).items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        is_zero = zero_init_residual and _ends_residual(spec, name)
        weights[name] = (np.zeros(leaf.shape) if is_zero else _draw(spec, name, leaf, rng)).astype(np.float32)
    return weights


def fit_patch_size(weights: Mapping[str, np.ndarray], spec: Spec | str) -> Weights:
    """Returns the weights with their patch embedding resampled to the patch size of `spec`; others are passed on.

    FlexiViT's pseudo-inverse resize (arXiv:2212.08013, section 3.4, equation 5): with B the bilinear resize of an old
    patch to a new one, w' = pinv(B^T) w, so that patches made larger give the same tokens, and patches made smaller the
    nearest in the mean of squares. B is not antialiased, as in its released code (timm's default is bicubic and
    antialiased). Computed in float64, given back in the array's own dtype. The position embedding is `fit_image_size`'s
    business. A patch embedding that does not fit for another reason is left for `check_weights` to refuse.
    """
    spec = get_spec(spec)
    if not isinstance(spec, ViTSpec):
        raise ValueError(f"spec={spec} must be a ViT or ViTDet: a {spec.family} has no patch size")
    name = "patch_embed/proj/kernel"
    kernel, shape = weights.get(name), expected_params(spec)[name].shape
    if kernel is None or kernel.ndim != 4 or kernel.shape[2:] != shape[2:] or kernel.shape == shape:
        return dict(weights)
    rows, columns = (_invert_resize(old, new) for old, new in zip(kernel.shape[:2], shape[:2], strict=True))
    fitted = np.einsum("Hh,Ww,hwcd->HWcd", rows, columns, kernel.astype(np.float64), optimize=True)
    return {**weights, name: fitted.astype(kernel.dtype)}


def _invert_resize(old: int, new: int) -> np.ndarray:
    """Returns pinv(B^T) of one axis (new, old); the resize is separable, and so is its pseudo-inverse."""
    return np.linalg.pinv(resize_matrix(old, new, method="bilinear", antialias=False).T)


def _draw(spec: Spec, name: str, leaf: Leaf, rng: np.random.Generator) -> np.ndarray:
    match leaf.kind:
        case "norm_scale" | "var":
            return np.ones(leaf.shape)
        case "layer_scale":
            return np.full(leaf.shape, 1e-6)
        case "pos_embed":
            return rng.standard_normal(leaf.shape) / math.sqrt(leaf.shape[-1])
        case "token" if name == "attn_pool/latent":
            return _xavier_uniform(rng, leaf.shape, 1, leaf.shape[-1])
        case "linear" | "conv":
            return _draw_kernel(spec, name, leaf, rng)
        case "bias":
            return _draw_bias(spec, name, leaf, rng)
    return np.zeros(leaf.shape)  # norm_bias, mean, rel_pos and the class token


def _draw_kernel(spec: Spec, name: str, leaf: Leaf, rng: np.random.Generator) -> np.ndarray:
    *_, fan_in, fan_out = leaf.shape
    if isinstance(spec, ConvNeXtSpec):
        return 0.02 * rng.standard_normal(leaf.shape)
    if isinstance(spec, ResNetSpec):
        if leaf.kind == "linear":
            return rng.uniform(-1, 1, leaf.shape) / math.sqrt(fan_in)
        return rng.standard_normal(leaf.shape) * math.sqrt(2 / (fan_out * math.prod(leaf.shape[:2])))
    if name in ("head/kernel", "head/fc/kernel"):
        return np.zeros(leaf.shape)
    if isinstance(spec, BiTSpec) or leaf.kind == "conv" or name == "pre_logits/kernel":
        return _lecun_normal(rng, leaf.shape)
    parts = {"qkv": 3, "kv": 2}.get(name.split("/")[-2], 1)
    return _xavier_uniform(rng, leaf.shape, fan_in, fan_out // parts)


def _draw_bias(spec: Spec, name: str, leaf: Leaf, rng: np.random.Generator) -> np.ndarray:
    if isinstance(spec, ResNetSpec):
        fan_in = expected_params(spec)["fc/kernel"].shape[0]
        is_fc = name == "fc/bias"
        return rng.uniform(-1, 1, leaf.shape) / math.sqrt(fan_in) if is_fc else np.zeros(leaf.shape)
    if isinstance(spec, ViTSpec) and "/mlp/" in name:
        return 1e-6 * rng.standard_normal(leaf.shape)
    return np.zeros(leaf.shape)


def _xavier_uniform(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int, fan_out: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape) * math.sqrt(6 / (fan_in + fan_out))


def _lecun_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Variance 1 / fan-in, cut off at two deviations of what is cut."""
    x = rng.standard_normal(shape)
    while (is_far := np.abs(x) > 2).any():
        x[is_far] = rng.standard_normal(int(is_far.sum()))
    return x / TRUNCATED_STD / math.sqrt(math.prod(shape[:-1]))


def _ends_residual(spec: Spec, name: str) -> bool:
    """Says whether this is the scale of the last norm of a residual branch that ends in one."""
    last = {"resnet": "bn2" if getattr(spec, "block", "") == "basic" else "bn3", "bit_v1": "norm3"}.get(spec.family)
    return last is not None and re.search(rf"/{last}/scale$", name) is not None
