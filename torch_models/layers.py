"""Layers that all models share. Parameters are cast to the dtype of the activations, which thus sets the precision.

Dimensions: b images, h w rows and columns, d width.
"""

import torch
import torch.nn.functional as F
from torch import nn

Outputs = dict[str, torch.Tensor]


def tap(out: Outputs | None, name: str, x: torch.Tensor) -> torch.Tensor:
    """Keeps `x` under `name` where outputs are wanted, and returns it."""
    if out is not None:
        out[name] = x
    return x


def gelu(x: torch.Tensor, kind: str) -> torch.Tensor:
    return F.gelu(x, approximate="tanh" if kind == "tanh" else "none")


class Linear(nn.Linear):
    """Dense layer; weight (out, in)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Conv(nn.Conv2d):
    """Convolution with the padding as an integer: 'SAME' would pad (0, 1) where torch pads (1, 1) at stride 2."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        use_bias: bool = True,
    ) -> None:
        super().__init__(in_dim, out_dim, kernel_size, stride=stride, padding=padding, groups=groups, bias=use_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # torch: (b d h w)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.read_kernel(x.dtype), bias, self.stride, self.padding, groups=self.groups)

    def read_kernel(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)


class StdConv(Conv):
    """Convolution by a standardised kernel, without bias (arXiv:1903.10520, equations 4 and 5).

    The weights of each output channel, over (in, h, w), are brought to mean 0 and deviation 1 in every forward pass, by
    their biased variance and in float32 at least; `eps` is added to the variance.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, kernel_size: int, stride: int = 1, padding: int = 0, eps: float
    ) -> None:
        super().__init__(in_dim, out_dim, kernel_size=kernel_size, stride=stride, padding=padding, use_bias=False)
        self.eps = eps

    def read_kernel(self, dtype: torch.dtype) -> torch.Tensor:
        # torch: layer_norm does it for each row of (out, ...), on a CPU in a third of timm's batch_norm's time; a
        # row in memory's own order, because one of channels_last would be copied: +35 % for a ResNet-50's convolutions
        is_nchw = self.weight.is_contiguous()
        rows = self.weight if is_nchw else self.weight.permute(0, 2, 3, 1)
        rows = F.layer_norm(rows, rows.shape[1:], eps=self.eps).to(dtype)
        return rows if is_nchw else rows.permute(0, 3, 1, 2)


class LayerNorm(nn.LayerNorm):
    """Normalises over the last axis; statistics in float32 at least, in torch's own kernels."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GroupNorm(nn.GroupNorm):
    """Normalises groups of neighbouring channels over one image's map (arXiv:1803.08494); float32 at least."""

    def __init__(self, dim: int, *, num_groups: int, eps: float) -> None:
        super().__init__(num_groups, dim, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # torch: (b d h w)
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Mlp(nn.Module):
    """Two linear layers and a GELU between them: (... width) -> (... width)."""

    def __init__(self, width: int, mlp_dim: int, *, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(width, mlp_dim)
        self.fc2 = Linear(mlp_dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(gelu(self.fc1(x), self.activation))


class BatchNorm(nn.Module):
    """Normalises each channel over the images and their maps; statistics in float32 at least.

    Evaluation reads the running statistics. Training normalises by the batch's biased variance and keeps the unbiased
    one (arXiv:1502.03167, Algorithm 2); `momentum` is the weight of the new batch, torch's convention and not Flax's.
    Raises ValueError in training where a channel has one value only, whose variance says nothing.
    """

    def __init__(self, dim: int, *, eps: float, momentum: float) -> None:
        super().__init__()  # torch: not nn.BatchNorm2d, whose state has num_batches_tracked too
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones((dim,)))
        self.bias = nn.Parameter(torch.zeros((dim,)))
        self.register_buffer("running_mean", torch.zeros((dim,)))
        self.register_buffer("running_var", torch.ones((dim,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # torch: (b d h w)
        if self.training and self.weight.dtype.itemsize < 4:
            return self._train_wide(x)
        # torch: no cast, because the kernels take parameters wider than x
        arrays = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *arrays, self.training, self.momentum, self.eps)

    def _train_wide(self, x: torch.Tensor) -> torch.Tensor:
        # torch: the CPU kernels would round the batch's statistics to the parameters' 16 bits
        mean, var = self.running_mean.float(), self.running_var.float()
        x = F.batch_norm(x, mean, var, self.weight.float(), self.bias.float(), True, self.momentum, self.eps)
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        return x


def tap_map(out: Outputs | None, name: str, x: torch.Tensor) -> torch.Tensor:
    """Keeps the map `x` (b d h w) under `name` as (b h w d) where outputs are wanted, and returns it as it came."""
    if out is not None:  # torch: what is kept is NHWC in both frameworks
        out[name] = x.permute(0, 2, 3, 1)
    return x
