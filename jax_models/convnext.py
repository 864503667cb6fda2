"""ConvNeXt (V1) of arXiv:2201.03545, in timm's numerics.

Images are (b h w 3) in [-1, 1]; d is the width of a map (b h w d). The stem and the downsampling pad nothing: rows and
columns past the last whole patch are dropped.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.layers import Conv, LayerNorm, Linear, Mlp, Outputs, tap
from vitcmp.specs import ConvNeXtSpec


class Block(nnx.Module):
    """Depthwise convolution, norm, MLP and layer scale (section 2.6 and Figure 4): (b h w d) -> (b h w d)."""

    def __init__(self, spec: ConvNeXtSpec, width: int) -> None:
        size = spec.kernel_size
        self.conv_dw = Conv(width, width, kernel_size=size, padding=size // 2, groups=width)
        self.norm = LayerNorm(width, eps=spec.norm_eps)
        self.mlp = Mlp(width, 4 * width, activation=spec.gelu)
        self.gamma = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x
        x = self.norm(self.conv_dw(x))
        x = self.mlp(x) * self.gamma[...].astype(x.dtype)
        return x + shortcut


class Stage(nnx.Module):
    """Blocks of one width, after a norm and a 2x2 convolution at stride 2 in every stage but the first."""

    def __init__(self, spec: ConvNeXtSpec, in_dim: int, stage: int) -> None:
        width = spec.widths[stage]
        layers = [LayerNorm(in_dim, eps=spec.norm_eps), Conv(in_dim, width, kernel_size=2, stride=2)]
        self.downsample = nnx.List(layers if stage > 0 else [])
        self.blocks = nnx.List([Block(spec, width) for _ in range(spec.depths[stage])])


class Head(nnx.Module):
    """The norm of the pooled features, and the classifier."""

    def __init__(self, spec: ConvNeXtSpec) -> None:
        self.norm = LayerNorm(spec.widths[-1], eps=spec.norm_eps)
        if spec.num_classes:
            self.fc = Linear(spec.widths[-1], spec.num_classes)


class ConvNeXt(nnx.Module):
    """Stem, stages of blocks, mean pooling, norm and the head: (b h w 3) -> (b num_classes)."""

    def __init__(self, spec: ConvNeXtSpec) -> None:
        self.spec = spec
        width = spec.widths[0]
        self.stem = nnx.List([Conv(3, width, kernel_size=4, stride=4), LayerNorm(width, eps=spec.norm_eps)])
        in_dims = width, *spec.widths
        self.stages = nnx.List([Stage(spec, in_dims[stage], stage) for stage in range(len(spec.depths))])
        self.head = Head(spec)

    def __call__(self, images: jax.Array, out: Outputs | None = None) -> jax.Array:
        """Returns logits (b num_classes), or what `head.fc` would read where num_classes is 0."""
        x = images
        for layer in self.stem:
            x = layer(x)
        tap(out, "stem", x)
        num_blocks = 0
        for i, stage in enumerate(self.stages):
            for layer in stage.downsample:
                x = layer(x)
            for block in stage.blocks:
                x = tap(out, f"block/{num_blocks}", block(x))
                num_blocks += 1
            tap(out, f"stage/{i}", x)
        tap(out, "features", x)
        return self.classify(x, out)

    def classify(self, x: jax.Array, out: Outputs | None) -> jax.Array:
        """Pools the map and applies the head: (b h w d) -> (b num_classes)."""
        x = tap(out, "pooled", x.mean(axis=(1, 2)))
        x = tap(out, "pre_logits", self.head.norm(x))
        return tap(out, "logits", self.head.fc(x)) if self.spec.num_classes else x
