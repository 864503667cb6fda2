"""Plain ViT of arXiv:2010.11929, with big_vision's choices of pooling and position embedding.

Images are (b h w 3) in [-1, 1]; h w stay for the grid of patches, n for its tokens, d for the width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.attention import attend
from jax_models.layers import Conv, LayerNorm, Linear, Mlp, Outputs, tap
from vitcmp.params import sincos2d
from vitcmp.specs import ViTSpec


class PatchEmbed(nnx.Module):
    """Cuts the image into patches and embeds each: (b h w 3) -> (b h w d)."""

    def __init__(self, spec: ViTSpec) -> None:
        self.proj = Conv(3, spec.width, kernel_size=spec.patch_size, stride=spec.patch_size)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.proj(images)


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, spec: ViTSpec, *, kernel: str) -> None:
        self.num_heads, self.kernel = spec.num_heads, kernel
        self.qkv = Linear(spec.width, 3 * spec.width)
        self.proj = Linear(spec.width, spec.width)

    def __call__(self, x: jax.Array) -> jax.Array:  # (b n d)
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (b n k e)
        x = attend(q, k, v, kernel=self.kernel)
        return self.proj(x.reshape(b, n, d))


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, spec: ViTSpec, *, kernel: str) -> None:
        self.norm1 = LayerNorm(spec.width, eps=spec.norm_eps)
        self.attn = Attention(spec, kernel=kernel)
        self.norm2 = LayerNorm(spec.width, eps=spec.norm_eps)
        self.mlp = Mlp(spec.width, spec.mlp_dim, activation=spec.gelu)

    def __call__(self, x: jax.Array) -> jax.Array:  # (b n d)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AttentionPool(nnx.Module):
    """Multi-head attention pooling by one learned query (big_vision's MAPHead): (b n d) -> (b d)."""

    def __init__(self, spec: ViTSpec, width: int, *, kernel: str) -> None:
        self.num_heads, self.kernel = spec.num_heads, kernel
        self.latent = nnx.Param(jnp.zeros((1, 1, width)))
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.norm = LayerNorm(width, eps=spec.norm_eps)
        self.mlp = Mlp(width, spec.mlp_dim, activation=spec.gelu)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, d = x.shape
        latent = jnp.broadcast_to(self.latent[...].astype(x.dtype), (b, 1, d))
        q = self.q(latent).reshape(b, 1, self.num_heads, -1)
        kv = self.kv(x).reshape(b, n, 2, self.num_heads, -1)
        x = attend(q, kv[:, :, 0], kv[:, :, 1], kernel=self.kernel)
        x = self.proj(x.reshape(b, 1, d))
        x = x + self.mlp(self.norm(x))
        return x[:, 0]


class ViT(nnx.Module):
    """Patches, blocks, a last norm, pooling and the head: (b h w 3) -> (b num_classes)."""

    def __init__(self, spec: ViTSpec, *, attention: str) -> None:
        self.spec = spec
        self.patch_embed = PatchEmbed(spec)
        if spec.pos_embed == "learned":
            self.pos_embed = nnx.Param(jnp.zeros((1, *spec.grid_size, spec.width)))
        if spec.pool == "tok":
            self.cls_token = nnx.Param(jnp.zeros((1, 1, spec.width)))
        self.blocks = nnx.List([Block(spec, kernel=attention) for _ in range(spec.depth)])
        self.norm = LayerNorm(spec.width, eps=spec.norm_eps)
        if spec.pool == "map":
            self.attn_pool = AttentionPool(spec, spec.width, kernel=attention)
        if spec.rep_size:
            self.pre_logits = Linear(spec.width, spec.rep_size)
        if spec.num_classes:
            self.head = Linear(spec.rep_size or spec.width, spec.num_classes)

    def __call__(self, images: jax.Array, out: Outputs | None = None) -> jax.Array:
        """Returns logits (b num_classes), or what the head would read where num_classes is 0."""
        x = self.embed(images)
        tap(out, "stem", x)
        for i, block in enumerate(self.blocks):
            x = tap(out, f"block/{i}", block(x))
        x = tap(out, "features", self.norm(x))
        return self.classify(x, out)

    def embed(self, images: jax.Array) -> jax.Array:
        """Embeds patches and positions: (b h w 3) -> (b n d), the class token first."""
        x = self.patch_embed(images)
        if self.spec.pos_embed == "learned":
            pos_embed = self.pos_embed[...]
        else:
            pos_embed = jnp.asarray(sincos2d(self.spec.grid_size, self.spec.width))
        b, h, w, d = x.shape
        x = (x + pos_embed.astype(x.dtype)).reshape(b, h * w, d)
        if self.spec.pool == "tok":
            cls_token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (b, 1, d))
            x = jnp.concatenate([cls_token, x], axis=1)
        return x

    def classify(self, x: jax.Array, out: Outputs | None) -> jax.Array:
        """Pools tokens and applies the head: (b n d) -> (b num_classes)."""
        match self.spec.pool:
            case "tok":
                x = x[:, 0]
            case "gap":
                x = x.mean(axis=1)
            case "map":
                x = self.attn_pool(x)
        tap(out, "pooled", x)
        if self.spec.rep_size:
            x = jnp.tanh(self.pre_logits(x))
        tap(out, "pre_logits", x)
        return tap(out, "logits", self.head(x)) if self.spec.num_classes else x
