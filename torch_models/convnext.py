"""ConvNeXt (V1) of arXiv:2201.03545, in timm's numerics.

Images are (b 3 h w) in [-1, 1]; d is the width of a map (b d h w). The stem and the downsampling pad nothing: rows and
columns past the last whole patch are dropped.
"""

import torch
from torch import nn

from torch_models.layers import Conv, LayerNorm, Linear, Mlp, Outputs, tap, tap_map
from vitcmp.specs import ConvNeXtSpec


class MapNorm(LayerNorm):  # torch: the channels of a map are not its last axis
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (b d h w)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise convolution, norm, MLP and layer scale (section 2.6 and Figure 4): (b d h w) -> (b d h w)."""

    def __init__(self, spec: ConvNeXtSpec, width: int) -> None:
        super().__init__()
        size = spec.kernel_size
        self.conv_dw = Conv(width, width, kernel_size=size, padding=size // 2, groups=width)
        self.norm = LayerNorm(width, eps=spec.norm_eps)
        self.mlp = Mlp(width, 4 * width, activation=spec.gelu)
        self.gamma = nn.Parameter(torch.zeros((width,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))  # torch: (b h w d) for the norm and the MLP
        x = self.mlp(x).permute(0, 3, 1, 2) * self.gamma.to(x.dtype)[:, None, None]
        x += shortcut  # torch: in place, of no view: one tensor less; the layout stays channels last
        return x


class Stage(nn.Module):
    """Blocks of one width, after a norm and a 2x2 convolution at stride 2 in every stage but the first."""

    def __init__(self, spec: ConvNeXtSpec, in_dim: int, stage: int) -> None:
        super().__init__()
        width = spec.widths[stage]
        layers = [MapNorm(in_dim, eps=spec.norm_eps), Conv(in_dim, width, kernel_size=2, stride=2)]
        self.downsample = nn.ModuleList(layers if stage > 0 else [])
        self.blocks = nn.ModuleList([Block(spec, width) for _ in range(spec.depths[stage])])


class Head(nn.Module):
    """The norm of the pooled features, and the classifier."""

    def __init__(self, spec: ConvNeXtSpec) -> None:
        super().__init__()
        self.norm = LayerNorm(spec.widths[-1], eps=spec.norm_eps)
        if spec.num_classes:
            self.fc = Linear(spec.widths[-1], spec.num_classes)


class ConvNeXt(nn.Module):
    """Stem, stages of blocks, mean pooling, norm and the head: (b 3 h w) -> (b num_classes)."""

    def __init__(self, spec: ConvNeXtSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.widths[0]
        self.stem = nn.ModuleList([Conv(3, width, kernel_size=4, stride=4), MapNorm(width, eps=spec.norm_eps)])
        in_dims = width, *spec.widths
        self.stages = nn.ModuleList([Stage(spec, in_dims[stage], stage) for stage in range(len(spec.depths))])
        self.head = Head(spec)

    def forward(self, images: torch.Tensor, out: Outputs | None = None) -> torch.Tensor:
        """Returns logits (b num_classes), or what `head.fc` would read where num_classes is 0."""
        x = images
        for layer in self.stem:
            x = layer(x)
        tap_map(out, "stem", x)
        num_blocks = 0
        for i, stage in enumerate(self.stages):
            for layer in stage.downsample:
                x = layer(x)
            for block in stage.blocks:
                x = tap_map(out, f"block/{num_blocks}", block(x))
                num_blocks += 1
            tap_map(out, f"stage/{i}", x)
        tap_map(out, "features", x)
        return self.classify(x, out)

    def classify(self, x: torch.Tensor, out: Outputs | None) -> torch.Tensor:
        """Pools the map and applies the head: (b d h w) -> (b num_classes)."""
        x = tap(out, "pooled", x.mean(dim=(2, 3)))
        x = tap(out, "pre_logits", self.head.norm(x))
        return tap(out, "logits", self.head.fc(x)) if self.spec.num_classes else x
