"""Layers that all models share. Parameters are cast to the dtype of the activations, which thus sets the precision.

Dimensions: b images, h w rows and columns, n tokens, d width, k heads, e head_dim.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from flax import nnx

Outputs = dict[str, jax.Array]
RelPosBias = tuple[jax.Array, jax.Array]  # (b k hw m) of the keys' rows m, (b k hw n) of their columns n
# Queries of one head whose logits exist at a time. Measured on a 2-core CPU at 1025 and 4097 tokens, forward and
# gradient: 256 and 512 are as fast, 128 up to 1.2x slower.
QUERY_CHUNK = 256
MANY_LOGITS = 512 * 512  # of a head: from here on, plain XLA on a CPU takes one head after another


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


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, kernel: str, bias: RelPosBias | None = None) -> jax.Array:
    """Attends with exactly one kernel, `xla`, `chunked`, `cudnn` or `pallas` (TPU); raises where it cannot run.

    q, k, v: (b n k e); bias: the two terms of what is added to the scaled logits. Returns (b n k e).
    """
    if kernel == "chunked":
        return _attend_chunked(q, k, v, bias)
    mask = None if bias is None else full_bias(bias)
    if kernel == "pallas":
        return _attend_pallas(q, k, v, mask)
    if kernel == "xla":
        return _attend_xla(q, k, v, mask)
    if mask is None:
        return _attend_cudnn(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, bias=mask, implementation=kernel)


def full_bias(bias: RelPosBias) -> jax.Array:
    """Adds the two terms for every query and key: (b k hw m) and (b k hw n) -> (b k hw mn)."""
    bias_h, bias_w = bias
    terms = bias_h[..., :, None] + bias_w[..., None, :]
    return terms.reshape(*terms.shape[:-2], -1)


def _attend_xla(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    # jax: written out, because the softmax of jax.nn's own is in float32 even for float64 (0.10.2), which costs 5e-8.
    # On a CPU, where XLA writes n x n weights whenever it can, the scale goes to the queries and the sum comes last; of
    # many tokens one head comes after another. 16 bits do not: their gradients want _multiply
    is_large = q.shape[1] * k.shape[1] >= MANY_LOGITS and q.dtype.itemsize > 2
    on_cpu = _attend_by_head if is_large else _attend_unnormalised
    return jax.lax.platform_dependent(q, k, v, bias, cpu=on_cpu, default=_attend_softmax)


def _attend_softmax(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    # jax: a function, because _attend_xla is one of several
    logits = _multiply(q, k) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1).astype(q.dtype)
    return jnp.einsum("bkqn,bnke->bqke", probs, v)


def _attend_unnormalised(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    # jax: a function, because _attend_xla is one of several. Heads first, in one product, are faster, but XLA makes one
    # kernel of them, whose n x n weights of all heads its memory analysis does not see
    scale = q.shape[-1] ** -0.5
    logits = _multiply(q * scale, k) if q.dtype.itemsize > 2 else _multiply(q, k) * scale  # 16 bits would round it
    logits = logits if bias is None else logits + bias
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1).transpose(0, 2, 1)[..., None]
    # in float32 at least: a sum over the tokens that is not yet divided is too large for float16
    x = jnp.einsum("bkqn,bnke->bqke", weights.astype(q.dtype), v, preferred_element_type=total.dtype)
    return (x / total).astype(q.dtype)


def _attend_by_head(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    # jax: a function, because _attend_xla is one of several. At 1025 tokens of a ViT-B and one CPU, of the time of all
    # heads at once: the model's forward 0.68, its train step 0.87
    b, n, num_heads, e = q.shape
    heads = [x.transpose(0, 2, 1, 3).reshape(b * num_heads, -1, e) for x in (q, k, v)]
    shape = b, num_heads, n, k.shape[1]
    masks = None if bias is None else jnp.broadcast_to(bias, shape).reshape(-1, *shape[2:])
    x = jax.lax.map(lambda head: _attend_plain(*head), (*heads, masks))
    return x.reshape(b, num_heads, n, e).transpose(0, 2, 1, 3)


def _attend_plain(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    # jax: _attend_unnormalised of one head, (n e): XLA's CPU backend multiplies plain matrices fastest
    logits = (q * q.shape[-1] ** -0.5) @ k.T
    logits = logits if bias is None else logits + bias
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    return (weights @ v) / weights.sum(axis=-1, keepdims=True)


@jax.custom_vjp
def _multiply(q: jax.Array, k: jax.Array) -> jax.Array:
    # jax: (b q k e) and (b n k e) -> (b k q n), float32 at least. JAX's own gradient would multiply float32 arrays, in
    # TF32 on a GPU, where the fused kernels and torch multiply 16 bits (jax-ml/jax issue 24047)
    return jnp.einsum("bqke,bnke->bkqn", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))


def _multiply_backward(arrays: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    # jax: operands of the activations' dtype
    q, k = arrays
    gradient = gradient.astype(q.dtype)
    return jnp.einsum("bkqn,bnke->bqke", gradient, k), jnp.einsum("bkqn,bqke->bnke", gradient, q)


_multiply.defvjp(lambda q, k: (_multiply(q, k), (q, k)), _multiply_backward)


def _attend_chunked(q: jax.Array, k: jax.Array, v: jax.Array, bias: RelPosBias | None) -> jax.Array:
    # jax: what flash is in torch on a CPU, exact and without n x n logits, but by plain XLA: one head after another
    b, n, num_heads, e = q.shape
    heads = [x.transpose(0, 2, 1, 3).reshape(b * num_heads, -1, e) for x in (q, k, v)]
    terms = bias and tuple(term.reshape(b * num_heads, n, -1) for term in bias)
    x = jax.lax.map(lambda head: _attend_head(*head), (*heads, terms))
    return x.reshape(b, num_heads, n, e).transpose(0, 2, 1, 3)


def _attend_head(q: jax.Array, k: jax.Array, v: jax.Array, bias: RelPosBias | None) -> jax.Array:
    # jax: one head of one image, (n e), bias (n rows) and (n columns), in chunks of queries against all keys
    wide_k, wide_v = (x.astype(jnp.promote_types(q.dtype, jnp.float32)) for x in (k, v))

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a gradient keeps no logits; in a loop nothing is merged
    def attend_chunk(chunk: tuple[jax.Array, RelPosBias | None]) -> jax.Array:
        # cast here, so that the gradients of k and v are summed over the chunks in float32
        q, k, v = (x.astype(chunk[0].dtype)[None, :, None] for x in (chunk[0], wide_k, wide_v))
        return _attend_xla(q, k, v, chunk[1] and full_bias(chunk[1]))[0, :, 0]

    whole = q.shape[0] // QUERY_CHUNK * QUERY_CHUNK
    parts = []
    if whole:
        chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, QUERY_CHUNK, x.shape[-1]), (q, bias))
        parts.append(jax.lax.map(attend_chunk, chunks).reshape(whole, -1))
    if whole < q.shape[0]:  # the rest apart, rather than padded: no product is computed in vain
        parts.append(attend_chunk(jax.tree.map(lambda x: x[whole:], (q, bias))))
    return jnp.concatenate(parts)


@jax.custom_vjp
def _attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    # jax: a function of its own for its gradient
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _attend_even(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    # jax: at odd numbers of tokens (ViT-B's 197) JAX refuses the gradient (0.10.2), so that these get a masked one more
    lengths = [jnp.full(x.shape[:1], x.shape[1], jnp.int32) for x in (q, k)]
    even_q, even_k, even_v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    masks = dict(zip(("query_seq_lengths", "key_value_seq_lengths"), lengths, strict=True))
    is_even = even_q.shape == q.shape and even_k.shape == k.shape
    x = jax.nn.dot_product_attention(even_q, even_k, even_v, implementation="cudnn", **({} if is_even else masks))
    return x[:, : q.shape[1]]


_attend_cudnn.defvjp(lambda *qkv: jax.vjp(_attend_even, *qkv), lambda pull, gradient: pull(gradient))


def _attend_pallas(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    # jax: a function of its own, where torch has a context for each kernel; imported here because only TPUs run it
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # (b k n e)
    (b, _, num_queries, e), num_keys = q.shape, k.shape[2]
    rows, columns = -num_queries % 128, -num_keys % 128  # the kernel takes multiples of 128: what is padded is masked
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x, pad in ((q, rows), (k, columns), (v, columns)))
    if bias is not None:  # the kernel scales the bias like the logits
        bias = jnp.pad(bias * e**0.5, ((0, 0), (0, 0), (0, rows), (0, columns)))
    segments = None
    if rows or columns:
        is_padding = [jnp.arange(x.shape[2]) >= length for x, length in ((q, num_queries), (k, num_keys))]
        segments = SegmentIds(*(jnp.broadcast_to(x.astype(jnp.int32), (b, x.size)) for x in is_padding))
    x = flash_attention(q, k, v, ab=bias, segment_ids=segments, sm_scale=e**-0.5)
    return x[:, :, :num_queries].transpose(0, 2, 1, 3)


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
