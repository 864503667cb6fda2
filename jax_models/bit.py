"""BiT, the pre-activation ResNet (V2) of arXiv:1912.11370, with GroupNorm and weight standardisation.

Images are (b h w 3) in [-1, 1]; d is the width of a map (b h w d). Every padding is an integer, the same on both sides.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import relu

from jax_models.layers import GroupNorm, Linear, Outputs, StdConv, tap
from vitcmp.specs import BiTSpec

EXPANSION = 4  # of a bottleneck: its output's channels for one of its 3x3 convolution's
STEM_PADS = {"zero": 0.0, "lowest": -jnp.inf}


def max_pool(x: jax.Array, *, pad: float) -> jax.Array:
    """Takes the greatest value of each 3x3 window at stride 2, of the map with a border of `pad`."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=pad)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


class Stem(nnx.Module):
    """A 7x7 convolution and a max-pool, each at stride 2 and without a norm: (b h w 3) -> (b h/4 w/4 width)."""

    def __init__(self, spec: BiTSpec) -> None:
        self.pad = STEM_PADS[spec.stem_pad]
        self.conv = StdConv(3, spec.width, kernel_size=7, stride=2, padding=3, eps=spec.weight_eps)

    def __call__(self, x: jax.Array) -> jax.Array:
        return max_pool(self.conv(x), pad=self.pad)


class Downsample(nnx.Module):
    """The projection of a stage's first shortcut."""

    def __init__(self, spec: BiTSpec, in_dim: int, out_dim: int, *, stride: int) -> None:
        self.conv = StdConv(in_dim, out_dim, kernel_size=1, stride=stride, eps=spec.weight_eps)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Bottleneck(nnx.Module):
    """Three convolutions, each after norm and ReLU, and a shortcut: (b h w in_dim) -> (b h/stride w/stride 4*mid_dim).

    The shortcut is x as it came, or in a stage's first block the projection of x after norm and ReLU.
    """

    def __init__(self, spec: BiTSpec, in_dim: int, mid_dim: int, *, stride: int, is_first: bool) -> None:
        norm = functools.partial(GroupNorm, num_groups=spec.num_groups, eps=spec.norm_eps)
        conv = functools.partial(StdConv, eps=spec.weight_eps)
        out_dim = EXPANSION * mid_dim
        self.downsample = Downsample(spec, in_dim, out_dim, stride=stride) if is_first else None
        self.norm1 = norm(in_dim)
        self.conv1 = conv(in_dim, mid_dim, kernel_size=1)
        self.norm2 = norm(mid_dim)
        self.conv2 = conv(mid_dim, mid_dim, kernel_size=3, stride=stride, padding=1)
        self.norm3 = norm(mid_dim)
        self.conv3 = conv(mid_dim, out_dim, kernel_size=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x
        x = relu(self.norm1(x))
        if self.downsample is not None:
            shortcut = self.downsample(x)
        x = self.conv1(x)
        x = self.conv2(relu(self.norm2(x)))
        x = self.conv3(relu(self.norm3(x)))
        return x + shortcut


class Stage(nnx.Module):
    """Blocks of one resolution; every stage but the first halves the map in its first block."""

    def __init__(self, block: Callable[..., nnx.Module], spec: BiTSpec, in_dim: int, stage: int) -> None:
        mid_dim = spec.width * 2**stage
        blocks = [block(spec, in_dim, mid_dim, stride=1 if stage == 0 else 2, is_first=True)]
        for _ in range(1, spec.depths[stage]):
            blocks.append(block(spec, EXPANSION * mid_dim, mid_dim, stride=1, is_first=False))
        self.blocks = nnx.List(blocks)


class Head(nnx.Module):
    def __init__(self, spec: BiTSpec, dim: int) -> None:
        if spec.num_classes:
            self.fc = Linear(dim, spec.num_classes)


class BiT(nnx.Module):
    """Stem, stages of bottlenecks, a last norm, mean pooling and the head: (b h w 3) -> (b num_classes)."""

    def __init__(self, spec: BiTSpec) -> None:
        self.spec = spec
        self.stem = Stem(spec)
        out_dims = [EXPANSION * spec.width * 2**stage for stage in range(len(spec.depths))]
        in_dims = spec.width, *out_dims[:-1]
        self.stages = nnx.List([Stage(Bottleneck, spec, in_dim, stage) for stage, in_dim in enumerate(in_dims)])
        self.norm = GroupNorm(out_dims[-1], num_groups=spec.num_groups, eps=spec.norm_eps)
        self.head = Head(spec, out_dims[-1])

    def __call__(self, images: jax.Array, out: Outputs | None = None) -> jax.Array:
        """Returns logits (b num_classes), or what `head.fc` would read where num_classes is 0."""
        x = tap(out, "stem", self.stem(images))
        num_blocks = 0
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                x = tap(out, f"block/{num_blocks}", block(x))
                num_blocks += 1
            tap(out, f"stage/{i}", x)
        x = tap(out, "features", relu(self.norm(x)))
        x = tap(out, "pooled", x.mean(axis=(1, 2)))
        tap(out, "pre_logits", x)
        return tap(out, "logits", self.head.fc(x)) if self.spec.num_classes else x
