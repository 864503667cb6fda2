"""Attention by exactly one kernel, of queries, keys and values that are (b n k e).

Dimensions: b images, h w rows and columns, n tokens, k heads, e head_dim.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitcmp.backend import Unsupported

RelPosBias = tuple[torch.Tensor, torch.Tensor]  # (b k hw m) of the keys' rows m, (b k hw n) of their columns n

SDPA_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


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
