"""Layers that all models share. Parameters are cast to the dtype of the activations, which thus sets the precision.

Dimensions: b images, h w rows and columns, n tokens, d width, k heads, e head_dim.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Outputs = dict[str, torch.Tensor]
RelPosBias = tuple[torch.Tensor, torch.Tensor]  # (b k hw m) of the keys' rows m, (b k hw n) of their columns n

SDPA_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def tap(out: Outputs | None, name: str, x: torch.Tensor) -> torch.Tensor:
    """Keeps `x` under `name` where outputs are wanted, and returns it."""
    if out is not None:
        out[name] = x
    return x


def gelu(x: torch.Tensor, kind: str) -> torch.Tensor:
    return F.gelu(x, approximate="tanh" if kind == "tanh" else "none")


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kernel: str, bias: RelPosBias | None = None
) -> torch.Tensor:
    """Attends with exactly one kernel, `math`, `flash`, `mem_efficient` or `cudnn`; raises where it cannot run.

    q, k, v: (b n k e); bias: the two terms of what is added to the scaled logits. Returns (b n k e).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # torch: SDPA takes (b k n e)
    with sdpa_kernel(SDPA_BACKENDS[kernel]):
        mask = None if bias is None else full_bias(bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def full_bias(bias: RelPosBias) -> torch.Tensor:
    """Adds the two terms for every query and key: (b k hw m) and (b k hw n) -> (b k hw mn)."""
    bias_h, bias_w = bias
    return (bias_h[..., :, None] + bias_w[..., None, :]).flatten(-2)


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
        return F.conv2d(x, self.weight.to(x.dtype), bias, self.stride, self.padding, groups=self.groups)


class LayerNorm(nn.LayerNorm):
    """Normalises over the last axis; statistics in float32 at least, in torch's own kernels."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


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
