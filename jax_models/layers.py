"""Layers that all models share. Parameters are cast to the dtype of the activations, which thus sets the precision.

Dimensions: b images, h w rows and columns, d width.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from flax import nnx

Outputs = dict[str, jax.Array]


def tap(out: Outputs | None, name: str, x: jax.Array) -> jax.Array:
    """Keeps `x` under `name` where outputs are wanted, and returns it."""
    if out is not None:
        out[name] = x
    return x


def gelu(x: jax.Array, kind: str) -> jax.Array:
    # jax: in float32 at least, as torch computes it, and by erf: jax.nn.gelu's erfc takes 2.6 times as long on a CPU
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if kind == "tanh":
        return jax.nn.gelu(wide, approximate=True).astype(x.dtype)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class Linear(nnx.Module):
    """Dense layer; kernel (in, out)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        self.kernel = nnx.Param(jnp.zeros((in_dim, out_dim)))
        self.bias = nnx.Param(jnp.zeros((out_dim,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


def convolve_native(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int, groups: int) -> jax.Array:
    # jax: a function, because convolve_expanded falls back on it
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def convolve_expanded(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int, groups: int) -> jax.Array:
    # jax: the same sums in forms that XLA makes faster code of on a CPU, where torch has oneDNN. Measured in float32 on
    # two cores: depthwise 7x7 13 to 28 times as fast, its gradients 3 to 40 times; a kernel larger than its map, which
    # XLA takes for the input, 5 to 70 times; the gradient of a 1x1 kernel up to 5 times. The rest is XLA's own.
    size, (_, h, w, d) = kernel.shape[0], x.shape
    if groups == d == kernel.shape[-1] and (stride, 2 * padding) == (1, size - 1):
        return convolve_depthwise(x, kernel)
    if groups == 1 and (h * w < size**2 or (size, padding) == (1, 0)):
        return _gather_windows(x, size, stride, padding) @ kernel.reshape(-1, kernel.shape[-1])
    return convolve_native(x, kernel, stride=stride, padding=padding, groups=groups)


def _gather_windows(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    # jax: (b h w d) -> (b rows columns size*size*d), what each output of a convolution reads
    pad = padding, padding
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    rows, columns = (length - size + 1 for length in x.shape[1:3])
    taps = [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(taps, axis=-1)


@jax.custom_vjp
def convolve_depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    # jax: depthwise at stride 1, the map keeps its size: x (b h w d), kernel (s s 1 d), s odd. s*s shifted products,
    # summed in float32 at least. In two halves of the rows, one after the other, because XLA fuses a mere sum into each
    # of its readers, and the LayerNorm behind it reads it three times; it leaves a loop's result alone.
    (_, h, w, _), size = x.shape, kernel.shape[0]
    wide, num_rows = jnp.promote_types(x.dtype, jnp.float32), (h + 1) // 2
    padded, kernel = _pad_map(x, size), kernel.astype(wide)

    def convolve_half(half: jax.Array, out: jax.Array) -> jax.Array:
        row = half * (h // 2)
        rows = jax.lax.dynamic_slice_in_dim(padded, row, num_rows + size - 1, axis=1)
        taps = [
            rows[:, i : i + num_rows, j : j + w].astype(wide) * kernel[i, j, 0]
            for i in range(size)
            for j in range(size)
        ]
        sums = functools.reduce(operator.add, taps).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, sums, row, axis=1)

    return jax.lax.fori_loop(0, 2, convolve_half, jnp.zeros_like(x))


def _depthwise_backward(arrays: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    # jax: of the input, the convolution by the turned kernel; of the kernel, a sum over the map, position by position.
    # Each row is summed by itself: one sum of 100,000 positions in float32 was off by 5e-6, sums of sums by 7e-7
    x, kernel = arrays
    (b, h, w, d), size = x.shape, kernel.shape[0]
    padded, wide = _pad_map(x, size), jnp.promote_types(x.dtype, jnp.float32)
    nothing = jnp.zeros((size, size, d), wide)

    def add_row(row: jax.Array, total: jax.Array) -> jax.Array:
        def add_position(column: jax.Array, total: jax.Array) -> jax.Array:
            position = row // h, row % h, column, 0
            window = jax.lax.dynamic_slice(padded, position, (1, size, size, d))[0].astype(wide)
            return total + window * jax.lax.dynamic_slice(gradient, position, (1, 1, 1, d))[0].astype(wide)

        return total + jax.lax.fori_loop(0, w, add_position, nothing)

    total = jax.lax.fori_loop(0, b * h, add_row, nothing)
    return convolve_depthwise(gradient, kernel[::-1, ::-1]), total[:, :, None].astype(kernel.dtype)


convolve_depthwise.defvjp(lambda x, kernel: (convolve_depthwise(x, kernel), (x, kernel)), _depthwise_backward)


def _pad_map(x: jax.Array, size: int) -> jax.Array:
    # jax: so that the map keeps its size
    pad = size // 2, size // 2
    return jnp.pad(x, ((0, 0), pad, pad, (0, 0)))


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
        self.method = "native"  # jax: or "expanded", as the backend sets it
        self.kernel = nnx.Param(jnp.zeros((kernel_size, kernel_size, in_dim // groups, out_dim)))
        self.bias = nnx.Param(jnp.zeros((out_dim,))) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:  # (b h w d)
        convolve = convolve_expanded if self.method == "expanded" else convolve_native
        x = convolve(x, self.read_kernel(x.dtype), stride=self.stride, padding=self.padding, groups=self.groups)
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)

    def read_kernel(self, dtype: jnp.dtype) -> jax.Array:
        return self.kernel[...].astype(dtype)


class StdConv(Conv):
    """Convolution by a standardised kernel, without bias (arXiv:1903.10520, equations 4 and 5).

    The weights of each output channel, over (h, w, in), are brought to mean 0 and deviation 1 in every forward pass, by
    their biased variance and in float32 at least; `eps` is added to the variance.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, kernel_size: int, stride: int = 1, padding: int = 0, eps: float
    ) -> None:
        super().__init__(in_dim, out_dim, kernel_size=kernel_size, stride=stride, padding=padding, use_bias=False)
        self.eps = eps

    def read_kernel(self, dtype: jnp.dtype) -> jax.Array:
        wide = super().read_kernel(jnp.promote_types(self.kernel.dtype, jnp.float32))
        wide = wide - wide.mean(axis=(0, 1, 2))
        wide = wide * jax.lax.rsqrt((wide**2).mean(axis=(0, 1, 2)) + self.eps)
        return wide.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def normalise(x: jax.Array, eps: float) -> jax.Array:
    # jax: to mean 0 and variance 1 over the last axis, with a gradient of its own. JAX's ends in the addition of one
    # constant a row, which XLA's CPU backend fuses into whatever reads the gradient of the residual stream: each block
    # added up those of all later blocks anew, and ViT-Ti's train step at 224 px, batch 8, took 1.3 times as long
    return _normalise_forward(x, eps)[0]


def _normalise_forward(x: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # jax: a function, because the gradient reads what it returns
    x = x - x.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return x * inverse, (x * inverse, inverse)


def _normalise_backward(eps: float, arrays: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    # jax: the part along neither the mean nor the normalised row itself
    normalised, inverse = arrays
    along = normalised * (gradient * normalised).mean(axis=-1, keepdims=True)
    return (inverse * (gradient - gradient.mean(axis=-1, keepdims=True) - along),)


normalise.defvjp(_normalise_forward, _normalise_backward)


class LayerNorm(nnx.Module):
    """Normalises over the last axis; statistics in float32 at least, as torch's kernels keep them."""

    def __init__(self, dim: int, *, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.bias = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = normalise(x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.eps)
        return (wide * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalises groups of neighbouring channels over one image's map (arXiv:1803.08494); float32 at least."""

    def __init__(self, dim: int, *, num_groups: int, eps: float) -> None:
        self.num_groups, self.eps = num_groups, eps
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.bias = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x: jax.Array) -> jax.Array:  # (b h w d)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide - self._mean(wide)
        wide = wide * jax.lax.rsqrt(self._mean(wide**2) + self.eps)
        return (wide * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)).astype(x.dtype)

    def _mean(self, x: jax.Array) -> jax.Array:
        # jax: over the map first: as one reduction of (b h w g d/g), XLA's code took up to 3 times as long on a CPU
        means = x.mean(axis=(1, 2)).reshape(x.shape[0], self.num_groups, -1).mean(axis=-1, keepdims=True)
        return jnp.broadcast_to(means, (*means.shape[:2], x.shape[-1] // self.num_groups)).reshape(x.shape[0], 1, 1, -1)


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
