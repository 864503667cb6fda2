"""BiT, the pre-activation ResNet (V2) of arXiv:1912.11370, with GroupNorm and weight standardisation.

Images are (b 3 h w) in [-1, 1]; d is the width of a map (b d h w). Every padding is an integer, the same on both sides.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from torch_models.layers import GroupNorm, Linear, Outputs, StdConv, tap, tap_map
from torch_models.resnet import relu
from vitcmp.specs import BiTSpec

EXPANSION = 4  # of a bottleneck: its output's channels for one of its 3x3 convolution's
STEM_PADS = {"zero": 0.0, "lowest": -math.inf}


def max_pool(x: torch.Tensor, *, pad: float) -> torch.Tensor:
    """Takes the greatest value of each 3x3 window at stride 2, of the map with a border of `pad`."""
    return F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=pad), 3, stride=2)


class Stem(nn.Module):
    """A 7x7 convolution and a max-pool, each at stride 2 and without a norm: (b 3 h w) -> (b width h/4 w/4)."""

    def __init__(self, spec: BiTSpec) -> None:
        super().__init__()
        self.pad = STEM_PADS[spec.stem_pad]
        self.conv = StdConv(3, spec.width, kernel_size=7, stride=2, padding=3, eps=spec.weight_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return max_pool(self.conv(x), pad=self.pad)


class Downsample(nn.Module):
    """The projection of a stage's first shortcut."""

    def __init__(self, spec: BiTSpec, in_dim: int, out_dim: int, *, stride: int) -> None:
        super().__init__()
        self.conv = StdConv(in_dim, out_dim, kernel_size=1, stride=stride, eps=spec.weight_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Bottleneck(nn.Module):
    """Three convolutions, each after norm and ReLU, and a shortcut: (b in_dim h w) -> (b 4*mid_dim h/stride w/stride).

    The shortcut is x as it came, or in a stage's first block the projection of x after norm and ReLU.
    """

    def __init__(self, spec: BiTSpec, in_dim: int, mid_dim: int, *, stride: int, is_first: bool) -> None:
        super().__init__()
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = relu(self.norm1(x))
        if self.downsample is not None:
            shortcut = self.downsample(x)
        x = self.conv1(x)
        x = self.conv2(relu(self.norm2(x)))
        x = self.conv3(relu(self.norm3(x)))
        return x + shortcut


class Stage(nn.Module):
    """Blocks of one resolution; every stage but the first halves the map in its first block."""

    def __init__(self, block: Callable[..., nn.Module], spec: BiTSpec, in_dim: int, stage: int) -> None:
        super().__init__()
        mid_dim = spec.width * 2**stage
        blocks = [block(spec, in_dim, mid_dim, stride=1 if stage == 0 else 2, is_first=True)]
        for _ in range(1, spec.depths[stage]):
            blocks.append(block(spec, EXPANSION * mid_dim, mid_dim, stride=1, is_first=False))
        self.blocks = nn.ModuleList(blocks)


class Head(nn.Module):
    def __init__(self, spec: BiTSpec, dim: int) -> None:
        super().__init__()
        if spec.num_classes:
            self.fc = Linear(dim, spec.num_classes)


class BiT(nn.Module):
    """Stem, stages of bottlenecks, a last norm, mean pooling and the head: (b 3 h w) -> (b num_classes)."""

    def __init__(self, spec: BiTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = Stem(spec)
        out_dims = [EXPANSION * spec.width * 2**stage for stage in range(len(spec.depths))]
        in_dims = spec.width, *out_dims[:-1]
        self.stages = nn.ModuleList([Stage(Bottleneck, spec, in_dim, stage) for stage, in_dim in enumerate(in_dims)])
        self.norm = GroupNorm(out_dims[-1], num_groups=spec.num_groups, eps=spec.norm_eps)
        self.head = Head(spec, out_dims[-1])

    def forward(self, images: torch.Tensor, out: Outputs | None = None) -> torch.Tensor:
        """Returns logits (b num_classes), or what `head.fc` would read where num_classes is 0."""
        x = tap_map(out, "stem", self.stem(images))
        num_blocks = 0
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                x = tap_map(out, f"block/{num_blocks}", block(x))
                num_blocks += 1
            tap_map(out, f"stage/{i}", x)
        x = tap_map(out, "features", relu(self.norm(x)))
        x = tap(out, "pooled", x.mean(dim=(2, 3)))
        tap(out, "pre_logits", x)
        return tap(out, "logits", self.head.fc(x)) if self.spec.num_classes else x
