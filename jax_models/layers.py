"""Layers that all models share. Parameters are cast to the dtype of the activations, which thus sets the precision.

Dimensions: b images, h w rows and columns, n tokens, d width, k heads, e head_dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx

Outputs = dict[str, jax.Array]
RelPosBias = tuple[jax.Array, jax.Array]  # (b k hw m) of the keys' rows m, (b k hw n) of their columns n


def tap(out: Outputs | None, name: str, x: jax.Array) -> jax.Array:
    """Keeps `x` under `name` where outputs are wanted, and returns it."""
    if out is not None:
        out[name] = x
    return x


def gelu(x: jax.Array, kind: str) -> jax.Array:
    return jax.nn.gelu(x, approximate=kind == "tanh")


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, kernel: str, bias: RelPosBias | None = None) -> jax.Array:
    """Attends with exactly one kernel, `xla`, `cudnn` or `pallas` (TPU); raises where that kernel cannot run.

    q, k, v: (b n k e); bias: the two terms of what is added to the scaled logits. Returns (b n k e).
    """
    mask = None if bias is None else full_bias(bias)
    if kernel == "pallas":
        return _attend_pallas(q, k, v, mask)
    if kernel == "xla":
        return _attend_xla(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, bias=mask, implementation=kernel)


def full_bias(bias: RelPosBias) -> jax.Array:
    """Adds the two terms for every query and key: (b k hw m) and (b k hw n) -> (b k hw mn)."""
    bias_h, bias_w = bias
    terms = bias_h[..., :, None] + bias_w[..., None, :]
    return terms.reshape(*terms.shape[:-2], -1)


def _attend_xla(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    # jax: written out, because the softmax of jax.nn's own is in float32 even for float64 (0.10.2), which costs 5e-8
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bqke,bnke->bkqn", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1).astype(q.dtype)
    return jnp.einsum("bkqn,bnke->bqke", probs, v)


def _attend_pallas(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    # jax: a function of its own, where torch has a context for each kernel; imported here because only TPUs run it
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # (b k n e)
    return flash_attention(q, k, v, ab=bias, sm_scale=q.shape[-1] ** -0.5).transpose(0, 2, 1, 3)


class Linear(nnx.Module):
    """Dense layer; kernel (in, out)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        self.kernel = nnx.Param(jnp.zeros((in_dim, out_dim)))
        self.bias = nnx.Param(jnp.zeros((out_dim,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class Conv(nnx.Module):
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
        self.stride, self.padding, self.groups = stride, padding, groups
        self.kernel = nnx.Param(jnp.zeros((kernel_size, kernel_size, in_dim // groups, out_dim)))
        self.bias = nnx.Param(jnp.zeros((out_dim,))) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:  # (b h w d)
        x = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding=((self.padding, self.padding), (self.padding, self.padding)),
            feature_group_count=self.groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalises over the last axis; statistics in float32 at least, as torch's kernels keep them."""

    def __init__(self, dim: int, *, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.bias = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt((wide**2).mean(axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)).astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers and a GELU between them: (... width) -> (... width)."""

    def __init__(self, width: int, mlp_dim: int, *, activation: str) -> None:
        self.activation = activation
        self.fc1 = Linear(width, mlp_dim)
        self.fc2 = Linear(mlp_dim, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(gelu(self.fc1(x), self.activation))


class BatchNorm(nnx.Module):
    """Normalises each channel over the images and their maps; statistics in float32 at least.

    Evaluation reads the running statistics. Training normalises by the batch's biased variance and keeps the unbiased
    one (arXiv:1502.03167, Algorithm 2); `momentum` is the weight of the new batch, torch's convention and not Flax's.
    Raises ValueError in training where a channel has one value only, whose variance says nothing.
    """

    def __init__(self, dim: int, *, eps: float, momentum: float) -> None:
        self.eps, self.momentum = eps, momentum
        self.use_running_average = False  # jax: what train() and eval() set
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.bias = nnx.Param(jnp.zeros((dim,)))
        self.mean = nnx.BatchStat(jnp.zeros((dim,)))
        self.var = nnx.BatchStat(jnp.ones((dim,)))

    def __call__(self, x: jax.Array) -> jax.Array:  # (b h w d)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.use_running_average:
            mean, var = self.mean[...].astype(wide.dtype), self.var[...].astype(wide.dtype)
        else:
            mean, var = wide.mean(axis=(0, 1, 2)), wide.var(axis=(0, 1, 2))
            self._keep(mean, var, num_values=x.size // x.shape[-1])
        wide = (wide - mean) * (jax.lax.rsqrt(var + self.eps) * self.scale[...])
        return (wide + self.bias[...]).astype(x.dtype)

    def _keep(self, mean: jax.Array, var: jax.Array, *, num_values: int) -> None:
        # jax: batch_norm in torch does this and raises the same
        if num_values == 1:
            raise ValueError("BatchNorm: expected more than 1 value per channel when training, got 1 image of 1x1")
        unbiased = var * (num_values / (num_values - 1))
        for running, value in ((self.mean, mean), (self.var, unbiased)):
            kept = (1 - self.momentum) * running[...].astype(value.dtype) + self.momentum * value
            running[...] = kept.astype(running[...].dtype)
