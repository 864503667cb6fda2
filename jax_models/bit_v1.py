"""The ResNet V1 of big_vision's `models/bit.py`, with the GroupNorm and the weight standardisation that BiT's V2 has.

Norms come after the convolutions, the weights' eps is added to their deviation, and every padding is SAME: what a map
lacks for ceil(size / stride) windows, with the odd pixel at its bottom and right. Images are (b h w 3) in [-1, 1].
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import relu

from jax_models.bit import EXPANSION, Head, Stage
from jax_models.layers import Conv, GroupNorm, Outputs, tap
from vitcmp.specs import BiTV1Spec


def pad_same(x: jax.Array, kernel_size: int, stride: int) -> jax.Array:
    """Pads a map (b h w d) with zeros for ceil(size / stride) windows each way."""
    pads = [_count_pads(size, kernel_size, stride) for size in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def _count_pads(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Returns the pixels before and after."""
    total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


def max_pool(x: jax.Array) -> jax.Array:
    """Takes the greatest value of each 3x3 window at stride 2; padded zeros never win against what a ReLU gives."""
    x = pad_same(x, 3, 2)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


class StdConv(Conv):
    """Convolution by a standardised kernel, without bias and with SAME padding; eps is added to the deviation."""

    def __init__(self, in_dim: int, out_dim: int, *, kernel_size: int, stride: int = 1, eps: float) -> None:
        padding = kernel_size // 2 if stride == 1 else 0  # SAME is the same on both sides at stride 1
        super().__init__(in_dim, out_dim, kernel_size=kernel_size, stride=stride, padding=padding, use_bias=False)
        self.eps, self.is_padded = eps, kernel_size > 1 and stride > 1

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(pad_same(x, self.kernel.shape[0], self.stride) if self.is_padded else x)

    def read_kernel(self, dtype: jnp.dtype) -> jax.Array:
        wide = super().read_kernel(jnp.promote_types(self.kernel.dtype, jnp.float32))
        wide = wide - wide.mean(axis=(0, 1, 2))
        deviation = jnp.sqrt((wide**2).mean(axis=(0, 1, 2)))
        return (wide / (deviation + self.eps)).astype(dtype)


class ConvNorm(nnx.Module):
    """A convolution and its norm, of the stem and of a stage's first shortcut."""

    def __init__(self, spec: BiTV1Spec, in_dim: int, out_dim: int, *, kernel_size: int, stride: int) -> None:
        self.conv = StdConv(in_dim, out_dim, kernel_size=kernel_size, stride=stride, eps=spec.weight_eps)
        self.norm = GroupNorm(out_dim, num_groups=spec.num_groups, eps=spec.norm_eps)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Bottleneck(nnx.Module):
    """Three convolutions, each before its norm, and a shortcut: (b h w in_dim) -> (b h/stride w/stride 4*mid_dim)."""

    def __init__(self, spec: BiTV1Spec, in_dim: int, mid_dim: int, *, stride: int, is_first: bool) -> None:
        norm = functools.partial(GroupNorm, num_groups=spec.num_groups, eps=spec.norm_eps)
        conv = functools.partial(StdConv, eps=spec.weight_eps)
        out_dim = EXPANSION * mid_dim
        self.downsample = ConvNorm(spec, in_dim, out_dim, kernel_size=1, stride=stride) if is_first else None
        self.conv1 = conv(in_dim, mid_dim, kernel_size=1)
        self.norm1 = norm(mid_dim)
        self.conv2 = conv(mid_dim, mid_dim, kernel_size=3, stride=stride)
        self.norm2 = norm(mid_dim)
        self.conv3 = conv(mid_dim, out_dim, kernel_size=1)
        self.norm3 = norm(out_dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = relu(self.norm1(self.conv1(x)))
        x = relu(self.norm2(self.conv2(x)))
        x = self.norm3(self.conv3(x))
        return relu(x + shortcut)


class BiTV1(nnx.Module):
    """Stem, stages of bottlenecks, mean pooling and the head: (b h w 3) -> (b num_classes)."""

    def __init__(self, spec: BiTV1Spec) -> None:
        self.spec = spec
        self.stem = ConvNorm(spec, 3, spec.width, kernel_size=7, stride=2)
        out_dims = [EXPANSION * spec.width * 2**stage for stage in range(len(spec.depths))]
        in_dims = spec.width, *out_dims[:-1]
        self.stages = nnx.List([Stage(Bottleneck, spec, in_dim, stage) for stage, in_dim in enumerate(in_dims)])
        self.head = Head(spec, out_dims[-1])

    def __call__(self, images: jax.Array, out: Outputs | None = None) -> jax.Array:
        """Returns logits (b num_classes), or what `head.fc` would read where num_classes is 0."""
        x = tap(out, "stem", max_pool(relu(self.stem(images))))
        num_blocks = 0
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                x = tap(out, f"block/{num_blocks}", block(x))
                num_blocks += 1
            tap(out, f"stage/{i}", x)
        tap(out, "features", x)
        x = tap(out, "pooled", x.mean(axis=(1, 2)))
        tap(out, "pre_logits", x)
        return tap(out, "logits", self.head.fc(x)) if self.spec.num_classes else x
