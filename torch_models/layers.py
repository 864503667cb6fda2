"""Layers that all models share. Parameters are cast to the dtype of the activations, which thus sets the precision.

Dimensions: b images, h w rows and columns, n tokens, d width, k heads, e head_dim.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitcmp.backend import Unsupported

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
    """Attends with exactly one kernel, one of SDPA_BACKENDS or `flex`; raises where that kernel cannot run.

    q, k, v: (b n k e); bias: the two terms of what is added to the scaled logits. Returns (b n k e).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # torch: SDPA takes (b k n e)
    if kernel == "flex":
        return _attend_flex(q, k, v, bias).transpose(1, 2)
    if kernel == "math" and bias is not None and q.dtype.itemsize >= 4:
        return _attend_math(q, k, v, bias).transpose(1, 2)
    mask = None if bias is None else full_bias(bias)
    with sdpa_kernel(SDPA_BACKENDS[kernel]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def full_bias(bias: RelPosBias) -> torch.Tensor:
    """Adds the two terms for every query and key: (b k hw m) and (b k hw n) -> (b k hw mn)."""
    bias_h, bias_w = bias
    return (bias_h[..., :, None] + bias_w[..., None, :]).flatten(-2)


# torch: written out, because SDPA's own looks for rows of -inf in a mask, which no bias has: 4 % of ViTDet-B's forward
# pass at 224 px on a CPU, 9 % at 512. 16 bits are left to SDPA, whose math adds up in float32
def _attend_math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: RelPosBias) -> torch.Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    by_position = logits.unflatten(-1, (bias[0].shape[-1], bias[1].shape[-1]))
    by_position += bias[0][..., :, None]
    by_position += bias[1][..., None, :]
    return logits.softmax(dim=-1) @ v


# torch: flex_attention, which reads the two terms of a bias as it goes: no n x n array is ever made
def _attend_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: RelPosBias | None) -> torch.Tensor:
    if q.dtype == torch.float64:
        raise Unsupported("attention=flex: its kernels add up in float32, and numerics=float64 would not be float64")
    if torch.compiler.is_compiling():  # the kernel is fused by the compiler that compiles the model
        return _load_flex()(q, k, v, score_mod=_score_mod(bias))
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        raise Unsupported("attention=flex: torch has no backward of it on a CPU")
    return _compile_flex()(q, k, v, score_mod=_score_mod(bias))


# torch: what flex_attention adds to a logit; a closure is how it is told
def _score_mod(bias: RelPosBias | None) -> Callable[..., torch.Tensor] | None:
    if bias is None:
        return None
    bias_h, bias_w = bias
    num_columns = bias_w.shape[-1]

    def add_bias(
        score: torch.Tensor, b: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return score + bias_h[b, head, query, key // num_columns] + bias_w[b, head, query, key % num_columns]

    return add_bias


# torch: imported at first use, because it brings the compiler with it, which takes seconds
def _load_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


# torch: without a compiler flex_attention is not fused; compiled by itself, so that an eager model can have it
@functools.cache
def _compile_flex() -> Callable[..., torch.Tensor]:
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    compiled = torch.compile(_load_flex(), dynamic=False, fullgraph=True)

    def attend(*arrays: torch.Tensor, score_mod: Callable[..., torch.Tensor] | None) -> torch.Tensor:
        with flex_errors():
            try:
                return compiled(*arrays, score_mod=score_mod)
            except FailOnRecompileLimitHit:  # 8 shapes in one process; the limit stays where a call needs no compiling
                with config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
                    return compiled(*arrays, score_mod=score_mod)

    return attend


# torch: what the compiler raises where it has no kernel for the device, the dtype or the shape
@contextlib.contextmanager
def flex_errors() -> Iterator[None]:
    """Raises Unsupported in the place of the compiler's errors."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        yield
    except (InductorError, TorchDynamoException) as error:
        raise Unsupported(f"attention=flex: {str(error).strip().splitlines()[0]}") from error


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
