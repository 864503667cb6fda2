"""ViTDet backbone of arXiv:2203.16527: a plain ViT with attention in windows, and over the whole grid in a few blocks.

Tokens keep the shape of their grid, (b h w d). g counts the windows of all images, or the images where attention is
global; m n are the rows and columns of the keys.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.attention import RelPosBias, attend
from jax_models.layers import Conv, LayerNorm, Linear, Mlp, Outputs, tap
from jax_models.vit import AttentionPool, PatchEmbed
from vitcmp.params import sincos2d
from vitcmp.specs import ViTDetSpec


def window_partition(
    x: jax.Array, window: tuple[int, int], *, fill: jax.Array | None = None
) -> tuple[jax.Array, tuple[int, int]]:
    """Cuts a grid into windows, padded at its bottom and right to whole ones: (b h w d) -> (g wh ww d).

    The padding is `fill` (d), or zeros. Returns the windows, row by row of each image, and the padded (height, width).
    """
    b, h, w, d = x.shape
    wh, ww = window
    ph, pw = h + -h % wh, w + -w % ww
    padding = jnp.zeros((), x.dtype) if fill is None else fill.astype(x.dtype)
    x = jnp.broadcast_to(padding, (b, ph, pw, d)).at[:, :h, :w].set(x)
    x = x.reshape(b, ph // wh, wh, pw // ww, ww, d).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, wh, ww, d), (ph, pw)


def window_unpartition(windows: jax.Array, padded_size: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """Puts windows back together and cuts the padding off: (g wh ww d) -> (b h w d), where `size` is (h, w)."""
    _, wh, ww, d = windows.shape
    ph, pw = padded_size
    x = windows.reshape(-1, ph // wh, pw // ww, wh, ww, d).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, ph, pw, d)[:, : size[0], : size[1]]


def rel_pos_bias(q: jax.Array, rel_pos_h: jax.Array, rel_pos_w: jax.Array) -> RelPosBias:
    """Returns the two terms of the decomposed relative positions' bias: (g k hw m) of the rows, (g k hw n) of columns.

    The bias of query (h, w) and key (m, n) is q[h, w] times R_h[h - m], plus q[h, w] times R_w[w - n].
    q: (g h w k e), not divided by sqrt(e); rel_pos_h: (2 * height - 1, e), its row 0 for distance 1 - height;
    rel_pos_w: (2 * width - 1, e). arXiv:2112.01526, equations 3 and 4, but as in its released code: the paper divides
    the bias by sqrt(e) too.
    """
    g, h, w, k = q.shape[:4]
    i, j = jnp.arange(h), jnp.arange(w)
    rows, columns = i[:, None] - i + h - 1, j[:, None] - j + w - 1
    bias_h = jnp.einsum("ghwke,hme->gkhwm", q, rel_pos_h[rows])
    bias_w = jnp.einsum("ghwke,wne->gkhwn", q, rel_pos_w[columns])
    return bias_h.reshape(g, k, h * w, h), bias_w.reshape(g, k, h * w, w)


class GridAttention(nnx.Module):
    """Multi-head self-attention within each window, or over the whole grid, with decomposed relative positions.

    The released code pads the grid before `qkv`, so that a padded token, which is attended to, is its bias. Here that
    bias is the padding, and only the tokens of the grid are projected: the same outputs for less work.
    """

    def __init__(self, spec: ViTDetSpec, window: tuple[int, int] | None, *, kernel: str) -> None:
        self.num_heads, self.kernel, self.use_rel_pos = spec.num_heads, kernel, spec.rel_pos
        self.window = window or spec.grid_size
        self.qkv = Linear(spec.width, 3 * spec.width)
        self.proj = Linear(spec.width, spec.width)
        if spec.rel_pos:
            self.rel_pos_h = nnx.Param(jnp.zeros((2 * self.window[0] - 1, spec.head_dim)))
            self.rel_pos_w = nnx.Param(jnp.zeros((2 * self.window[1] - 1, spec.head_dim)))

    def __call__(self, x: jax.Array) -> jax.Array:  # (b h w d)
        h, w = x.shape[1:3]
        if (h, w) == self.window:
            return self.proj(self.attend_windows(self.qkv(x)))
        if h % self.window[0] or w % self.window[1]:
            windows, padded_size = window_partition(self.qkv(x), self.window, fill=self.qkv.bias[...])
            return self.proj(window_unpartition(self.attend_windows(windows), padded_size, (h, w)))
        windows, padded_size = window_partition(x, self.window)  # nothing is padded: x is a third of qkv
        return window_unpartition(self.proj(self.attend_windows(self.qkv(windows))), padded_size, (h, w))

    def attend_windows(self, qkv: jax.Array) -> jax.Array:
        """Attends within each window: (g h w 3d) -> (g h w d)."""
        g, h, w, d = qkv.shape
        qkv = qkv.reshape(g, h * w, 3, self.num_heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (g hw k e)
        bias = None  # without one, the flash kernels can run
        if self.use_rel_pos:
            grid_q = q.reshape(g, h, w, self.num_heads, -1)
            bias = rel_pos_bias(grid_q, self.rel_pos_h[...].astype(q.dtype), self.rel_pos_w[...].astype(q.dtype))
        return attend(q, k, v, kernel=self.kernel, bias=bias).reshape(g, h, w, d // 3)


class WindowBlock(nnx.Module):
    """Pre-norm transformer block, its attention in windows or, where `window` is None, over the whole grid."""

    def __init__(self, spec: ViTDetSpec, window: tuple[int, int] | None, *, kernel: str) -> None:
        self.norm1 = LayerNorm(spec.width, eps=spec.norm_eps)
        self.attn = GridAttention(spec, window, kernel=kernel)
        self.norm2 = LayerNorm(spec.width, eps=spec.norm_eps)
        self.mlp = Mlp(spec.width, spec.mlp_dim, activation=spec.gelu)

    def __call__(self, x: jax.Array) -> jax.Array:  # (b h w d)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViTDet(nnx.Module):
    """Patches, blocks on the grid, a last norm or SAM's neck, pooling and the head: (b h w 3) -> (b num_classes)."""

    def __init__(self, spec: ViTDetSpec, *, attention: str) -> None:
        self.spec = spec
        self.patch_embed = PatchEmbed(spec)
        if spec.pos_embed == "learned":
            self.pos_embed = nnx.Param(jnp.zeros((1, *spec.grid_size, spec.width)))
        self.blocks = nnx.List([WindowBlock(spec, spec.window_of(i), kernel=attention) for i in range(spec.depth)])
        width = spec.neck_dim or spec.width
        if spec.neck_dim:
            self.neck = nnx.List(make_neck(spec))
        else:
            self.norm = LayerNorm(spec.width, eps=spec.neck_eps)
        if spec.pool == "map":
            self.attn_pool = AttentionPool(spec, width, kernel=attention)
        if spec.rep_size:
            self.pre_logits = Linear(width, spec.rep_size)
        if spec.num_classes:
            self.head = Linear(spec.rep_size or width, spec.num_classes)

    def __call__(self, images: jax.Array, out: Outputs | None = None) -> jax.Array:
        """Returns logits (b num_classes), or what the head would read where num_classes is 0."""
        x = tap(out, "stem", self.embed(images))
        for i, block in enumerate(self.blocks):
            x = tap(out, f"block/{i}", block(x))
        x = tap(out, "features", self.finish(x))
        return self.classify(x, out)

    def embed(self, images: jax.Array) -> jax.Array:
        """Embeds patches and positions: (b h w 3) -> (b h w d)."""
        x = self.patch_embed(images)
        if self.spec.pos_embed == "learned":
            pos_embed = self.pos_embed[...]
        else:
            pos_embed = jnp.asarray(sincos2d(self.spec.grid_size, self.spec.width))
        return x + pos_embed.astype(x.dtype)

    def finish(self, x: jax.Array) -> jax.Array:
        """Applies the last norm, or SAM's neck: (b h w d) -> (b h w d or neck_dim)."""
        if not self.spec.neck_dim:
            return self.norm(x)
        conv1, norm1, conv2, norm2 = self.neck
        x = norm1(conv1(x))
        return norm2(conv2(x))

    def classify(self, x: jax.Array, out: Outputs | None) -> jax.Array:
        """Pools the grid and applies the head: (b h w d) -> (b num_classes)."""
        b, h, w, d = x.shape
        x = x.reshape(b, h * w, d)
        x = tap(out, "pooled", self.attn_pool(x) if self.spec.pool == "map" else x.mean(axis=1))
        if self.spec.rep_size:
            x = jnp.tanh(self.pre_logits(x))
        tap(out, "pre_logits", x)
        return tap(out, "logits", self.head(x)) if self.spec.num_classes else x


def make_neck(spec: ViTDetSpec) -> list[nnx.Module]:
    """Returns the layers of SAM's neck (arXiv:2304.02643, appendix A): (b h w width) -> (b h w neck_dim)."""
    return [
        Conv(spec.width, spec.neck_dim, kernel_size=1, use_bias=False),
        LayerNorm(spec.neck_dim, eps=spec.neck_eps),
        Conv(spec.neck_dim, spec.neck_dim, kernel_size=3, padding=1, use_bias=False),
        LayerNorm(spec.neck_dim, eps=spec.neck_eps),
    ]
