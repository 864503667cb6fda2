"""The ResNet V1 of big_vision's `models/bit.py`, with the GroupNorm and the weight standardisation that BiT's V2 has.

Norms come after the convolutions, the weights' eps is added to their deviation, and every padding is SAME: what a map
lacks for ceil(size / stride) windows, with the odd pixel at its bottom and right. Images are (b 3 h w) in [-1, 1].
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from torch_models.bit import EXPANSION, Head, Stage
from torch_models.layers import Conv, GroupNorm, Outputs, tap, tap_map
from torch_models.resnet import relu
from vitcmp.specs import BiTV1Spec


def pad_same(x: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    """Pads a map (b d h w) with zeros for ceil(size / stride) windows each way."""
    pads = [_count_pads(size, kernel_size, stride) for size in x.shape[2:]]
    return F.pad(x, (*pads[1], *pads[0]))


def _count_pads(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Returns the pixels before and after."""
    total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """Takes the greatest value of each 3x3 window at stride 2; padded zeros never win against what a ReLU gives."""
    x = pad_same(x, 3, 2)
    return F.max_pool2d(x, 3, stride=2)


class StdConv(Conv):
    """Convolution by a standardised kernel, without bias and with SAME padding; eps is added to the deviation."""

    def __init__(self, in_dim: int, out_dim: int, *, kernel_size: int, stride: int = 1, eps: float) -> None:
        padding = kernel_size // 2 if stride == 1 else 0  # SAME is the same on both sides at stride 1
        super().__init__(in_dim, out_dim, kernel_size=kernel_size, stride=stride, padding=padding, use_bias=False)
        self.eps, self.is_padded = eps, kernel_size > 1 and stride > 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(pad_same(x, self.kernel_size[0], self.stride[0]) if self.is_padded else x)

    def read_kernel(self, dtype: torch.dtype) -> torch.Tensor:
        wide = super().read_kernel(torch.promote_types(self.weight.dtype, torch.float32))
        wide = wide - wide.mean(dim=(1, 2, 3), keepdim=True)
        deviation = (wide**2).mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return (wide / (deviation + self.eps)).to(dtype)


class ConvNorm(nn.Module):
    """A convolution and its norm, of the stem and of a stage's first shortcut."""

    def __init__(self, spec: BiTV1Spec, in_dim: int, out_dim: int, *, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.conv = StdConv(in_dim, out_dim, kernel_size=kernel_size, stride=stride, eps=spec.weight_eps)
        self.norm = GroupNorm(out_dim, num_groups=spec.num_groups, eps=spec.norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """Three convolutions, each before its norm, and a shortcut: (b in_dim h w) -> (b 4*mid_dim h/stride w/stride)."""

    def __init__(self, spec: BiTV1Spec, in_dim: int, mid_dim: int, *, stride: int, is_first: bool) -> None:
        super().__init__()
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = relu(self.norm1(self.conv1(x)))
        x = relu(self.norm2(self.conv2(x)))
        x = self.norm3(self.conv3(x))
        return relu(x + shortcut)


class BiTV1(nn.Module):
    """Stem, stages of bottlenecks, mean pooling and the head: (b 3 h w) -> (b num_classes)."""

    def __init__(self, spec: BiTV1Spec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = ConvNorm(spec, 3, spec.width, kernel_size=7, stride=2)
        out_dims = [EXPANSION * spec.width * 2**stage for stage in range(len(spec.depths))]
        in_dims = spec.width, *out_dims[:-1]
        self.stages = nn.ModuleList([Stage(Bottleneck, spec, in_dim, stage) for stage, in_dim in enumerate(in_dims)])
        self.head = Head(spec, out_dims[-1])

    def forward(self, images: torch.Tensor, out: Outputs | None = None) -> torch.Tensor:
        """Returns logits (b num_classes), or what `head.fc` would read where num_classes is 0."""
        x = tap_map(out, "stem", max_pool(relu(self.stem(images))))
        num_blocks = 0
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                x = tap_map(out, f"block/{num_blocks}", block(x))
                num_blocks += 1
            tap_map(out, f"stage/{i}", x)
        tap_map(out, "features", x)
        x = tap(out, "pooled", x.mean(dim=(2, 3)))
        tap(out, "pre_logits", x)
        return tap(out, "logits", self.head.fc(x)) if self.spec.num_classes else x
