"""ResNet v1.5 of arXiv:1512.03385, as torchvision and timm have it: the stride is in the bottleneck's 3x3 convolution.

Images are (b 3 h w) in [-1, 1]; d is the width of a map (b d h w). Every padding is an integer, the same on both sides.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from torch_models.layers import BatchNorm, Conv, Linear, Outputs, tap, tap_map
from vitcmp.specs import ResNetSpec


def relu(x: torch.Tensor) -> torch.Tensor:
    # torch: in place, as is the custom there; what it overwrites is fresh and no gradient reads it
    return F.relu(x, inplace=True)


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """Takes the greatest value of each 3x3 window at stride 2; what is padded never wins."""
    return F.max_pool2d(x, 3, stride=2, padding=1)


class FoldedNorm(nn.Module):
    """Stands where a BatchNorm is folded into the convolution before it: changes nothing, and cannot be trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise ValueError("is_folded=True: a folded BatchNorm cannot be trained; build it with is_folded=False")
        return x


def make_norm(spec: ResNetSpec, dim: int) -> BatchNorm | FoldedNorm:
    if spec.is_folded:
        return FoldedNorm()
    return BatchNorm(dim, eps=spec.norm_eps, momentum=spec.norm_momentum)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (b in_dim h w) -> (b mid_dim h/stride w/stride)."""

    def __init__(self, spec: ResNetSpec, in_dim: int, mid_dim: int, *, stride: int) -> None:
        super().__init__()
        conv = functools.partial(Conv, use_bias=spec.is_folded)
        self.conv1 = conv(in_dim, mid_dim, kernel_size=3, stride=stride, padding=1)
        self.bn1 = make_norm(spec, mid_dim)
        self.conv2 = conv(mid_dim, mid_dim, kernel_size=3, padding=1)
        self.bn2 = make_norm(spec, mid_dim)
        self.downsample = make_downsample(spec, in_dim, mid_dim, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        for layer in self.downsample:
            shortcut = layer(shortcut)
        return relu(x.add_(shortcut))  # torch: in place, 4 to 7 % of a forward pass of 8 images on a CPU


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: (b in_dim h w) -> (b 4*mid_dim h/stride w/stride)."""

    def __init__(self, spec: ResNetSpec, in_dim: int, mid_dim: int, *, stride: int) -> None:
        super().__init__()
        conv = functools.partial(Conv, use_bias=spec.is_folded)
        out_dim = mid_dim * spec.expansion
        self.conv1 = conv(in_dim, mid_dim, kernel_size=1)
        self.bn1 = make_norm(spec, mid_dim)
        self.conv2 = conv(mid_dim, mid_dim, kernel_size=3, stride=stride, padding=1)
        self.bn2 = make_norm(spec, mid_dim)
        self.conv3 = conv(mid_dim, out_dim, kernel_size=1)
        self.bn3 = make_norm(spec, out_dim)
        self.downsample = make_downsample(spec, in_dim, out_dim, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        for layer in self.downsample:
            shortcut = layer(shortcut)
        return relu(x.add_(shortcut))  # torch: in place


def make_downsample(spec: ResNetSpec, in_dim: int, out_dim: int, *, stride: int) -> nn.ModuleList:
    """Returns the shortcut's layers: none where it is the identity, else a 1x1 convolution and its norm (option B)."""
    if stride == 1 and in_dim == out_dim:
        return nn.ModuleList([])
    conv = Conv(in_dim, out_dim, kernel_size=1, stride=stride, use_bias=spec.is_folded)
    return nn.ModuleList([conv, make_norm(spec, out_dim)])


def make_stage(spec: ResNetSpec, in_dim: int, stage: int) -> nn.ModuleList:
    """Returns the stage's blocks; every stage but the first halves the map in its first block."""
    block = BasicBlock if spec.block == "basic" else Bottleneck
    mid_dim = spec.width * 2**stage
    blocks = [block(spec, in_dim, mid_dim, stride=1 if stage == 0 else 2)]
    for _ in range(1, spec.depths[stage]):
        blocks.append(block(spec, mid_dim * spec.expansion, mid_dim, stride=1))
    return nn.ModuleList(blocks)


class ResNet(nn.Module):
    """Stem, stages of residual blocks, mean pooling and the head: (b 3 h w) -> (b num_classes)."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.conv1 = Conv(3, spec.width, kernel_size=7, stride=2, padding=3, use_bias=spec.is_folded)
        self.bn1 = make_norm(spec, spec.width)
        in_dim = spec.width
        for stage in range(len(spec.depths)):
            setattr(self, f"layer{stage + 1}", make_stage(spec, in_dim, stage))
            in_dim = spec.width * 2**stage * spec.expansion
        if spec.num_classes:
            self.fc = Linear(in_dim, spec.num_classes)

    def forward(self, images: torch.Tensor, out: Outputs | None = None) -> torch.Tensor:
        """Returns logits (b num_classes), or what `fc` would read where num_classes is 0."""
        x = relu(self.bn1(self.conv1(images)))
        x = tap_map(out, "stem", max_pool(x))
        num_blocks = 0
        for stage in range(len(self.spec.depths)):
            for block in getattr(self, f"layer{stage + 1}"):
                x = tap_map(out, f"block/{num_blocks}", block(x))
                num_blocks += 1
            tap_map(out, f"stage/{stage}", x)
        tap_map(out, "features", x)
        x = tap(out, "pooled", x.mean(dim=(2, 3)))
        tap(out, "pre_logits", x)
        return tap(out, "logits", self.fc(x)) if self.spec.num_classes else x
