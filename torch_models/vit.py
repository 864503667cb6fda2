"""Plain ViT of arXiv:2010.11929, with big_vision's choices of pooling and position embedding.

Images are (b 3 h w) in [-1, 1]; h w stay for the grid of patches, n for its tokens, d for the width.
"""

import torch
from torch import nn

from torch_models.attention import attend
from torch_models.layers import Conv, LayerNorm, Linear, Mlp, Outputs, tap
from vitcmp.params import sincos2d
from vitcmp.specs import ViTSpec


class PatchEmbed(nn.Module):
    """Cuts the image into patches and embeds each: (b 3 h w) -> (b h w d)."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.proj = Conv(3, spec.width, kernel_size=spec.patch_size, stride=spec.patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, spec: ViTSpec, *, kernel: str) -> None:
        super().__init__()
        self.num_heads, self.kernel = spec.num_heads, kernel
        self.qkv = Linear(spec.width, 3 * spec.width)
        self.proj = Linear(spec.width, spec.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (b n d)
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, -1)
        q, k, v = qkv.unbind(2)  # torch: (b n k e); the gradient of three slices would fill three arrays and add them
        x = attend(q, k, v, kernel=self.kernel)
        return self.proj(x.reshape(b, n, d))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, spec: ViTSpec, *, kernel: str) -> None:
        super().__init__()
        self.norm1 = LayerNorm(spec.width, eps=spec.norm_eps)
        self.attn = Attention(spec, kernel=kernel)
        self.norm2 = LayerNorm(spec.width, eps=spec.norm_eps)
        self.mlp = Mlp(spec.width, spec.mlp_dim, activation=spec.gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (b n d)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
    """Multi-head attention pooling by one learned query (big_vision's MAPHead): (b n d) -> (b d)."""

    def __init__(self, spec: ViTSpec, width: int, *, kernel: str) -> None:
        super().__init__()
        self.num_heads, self.kernel = spec.num_heads, kernel
        self.latent = nn.Parameter(torch.zeros((1, 1, width)))
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.norm = LayerNorm(width, eps=spec.norm_eps)
        self.mlp = Mlp(width, spec.mlp_dim, activation=spec.gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        latent = self.latent.to(x.dtype).expand(b, 1, d)
        q = self.q(latent).reshape(b, 1, self.num_heads, -1)
        kv = self.kv(x).reshape(b, n, 2, self.num_heads, -1)
        x = attend(q, kv[:, :, 0], kv[:, :, 1], kernel=self.kernel)
        x = self.proj(x.reshape(b, 1, d))
        x = x + self.mlp(self.norm(x))
        return x[:, 0]


class ViT(nn.Module):
    """Patches, blocks, a last norm, pooling and the head: (b 3 h w) -> (b num_classes)."""

    def __init__(self, spec: ViTSpec, *, attention: str) -> None:
        super().__init__()
        self.spec = spec
        self.patch_embed = PatchEmbed(spec)
        if spec.pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.zeros((1, *spec.grid_size, spec.width)))
        else:  # torch: a buffer, so that it is made once; XLA folds it into the program
            self.register_buffer("pos_embed", torch.from_numpy(sincos2d(spec.grid_size, spec.width)), persistent=False)
        if spec.pool == "tok":
            self.cls_token = nn.Parameter(torch.zeros((1, 1, spec.width)))
        self.blocks = nn.ModuleList([Block(spec, kernel=attention) for _ in range(spec.depth)])
        self.norm = LayerNorm(spec.width, eps=spec.norm_eps)
        if spec.pool == "map":
            self.attn_pool = AttentionPool(spec, spec.width, kernel=attention)
        if spec.rep_size:
            self.pre_logits = Linear(spec.width, spec.rep_size)
        if spec.num_classes:
            self.head = Linear(spec.rep_size or spec.width, spec.num_classes)

    def forward(self, images: torch.Tensor, out: Outputs | None = None) -> torch.Tensor:
        """Returns logits (b num_classes), or what the head would read where num_classes is 0."""
        x = self.embed(images)
        tap(out, "stem", x)
        for i, block in enumerate(self.blocks):
            x = tap(out, f"block/{i}", block(x))
        x = tap(out, "features", self.norm(x))
        return self.classify(x, out)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds patches and positions: (b 3 h w) -> (b n d), the class token first."""
        x = self.patch_embed(images)
        b, h, w, d = x.shape
        x = (x + self.pos_embed.to(x.dtype)).reshape(b, h * w, d)
        if self.spec.pool == "tok":
            cls_token = self.cls_token.to(x.dtype).expand(b, 1, d)
            x = torch.cat([cls_token, x], dim=1)
        return x

    def classify(self, x: torch.Tensor, out: Outputs | None) -> torch.Tensor:
        """Pools tokens and applies the head: (b n d) -> (b num_classes)."""
        match self.spec.pool:
            case "tok":
                x = x[:, 0]
            case "gap":
                x = x.mean(dim=1)
            case "map":
                x = self.attn_pool(x)
        tap(out, "pooled", x)
        if self.spec.rep_size:
            x = torch.tanh(self.pre_logits(x))
        tap(out, "pre_logits", x)
        return tap(out, "logits", self.head(x)) if self.spec.num_classes else x
