"""Attention by exactly one kernel, of queries, keys and values that are (b n k e).

Dimensions: b images, h w rows and columns, n tokens, k heads, e head_dim.
"""

import functools

import jax
import jax.numpy as jnp

RelPosBias = tuple[jax.Array, jax.Array]  # (b k hw m) of the keys' rows m, (b k hw n) of their columns n
# Queries of one head whose logits exist at a time. Measured on a 2-core CPU at 1025 and 4097 tokens, forward and
# gradient: 256 and 512 are as fast, 128 up to 1.2x slower.
QUERY_CHUNK = 256
MANY_LOGITS = 512 * 512  # of a head: from here on, plain XLA on a CPU takes one head after another


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
