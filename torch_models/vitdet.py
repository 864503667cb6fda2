"""ViTDet backbone of arXiv:2203.16527: a plain ViT with attention in windows, and over the whole grid in a few blocks.

Tokens keep the shape of their grid, (b h w d). g counts the windows of all images, or the images where attention is
global; m n are the rows and columns of the keys.
"""

import torch
from torch import nn

from torch_models.attention import RelPosBias, attend
from torch_models.layers import Conv, LayerNorm, Linear, Mlp, Outputs, tap
from torch_models.vit import AttentionPool, PatchEmbed
from vitcmp.params import sincos2d
from vitcmp.specs import ViTDetSpec


def window_partition(
    x: torch.Tensor, window: tuple[int, int], *, fill: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Cuts a grid into windows, padded at its bottom and right to whole ones: (b h w d) -> (g wh ww d).

    The padding is `fill` (d), or zeros. Returns the windows, row by row of each image, and the padded (height, width).
    """
    b, h, w, d = x.shape
    wh, ww = window
    ph, pw = h + -h % wh, w + -w % ww
    # torch: in one copy, token by token; padding first and cutting after it makes two, and as many pages of memory
    windows = x.new_zeros((b, ph * pw, d)) if fill is None else fill.to(x.dtype).expand(b, ph * pw, d).clone()
    windows.index_copy_(1, window_order((h, w), window, device=x.device), x.reshape(b, h * w, d))
    return windows.reshape(-1, wh, ww, d), (ph, pw)


def window_unpartition(windows: torch.Tensor, padded_size: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Puts windows back together and cuts the padding off: (g wh ww d) -> (b h w d), where `size` is (h, w)."""
    _, wh, ww, d = windows.shape
    ph, pw = padded_size
    x = windows.reshape(-1, ph * pw, d).index_select(1, window_order(size, (wh, ww), device=windows.device))
    return x.reshape(-1, *size, d)


# torch: only its windows are copied by index; XLA makes one copy of padding, transposing and cutting by itself
def window_order(size: tuple[int, int], window: tuple[int, int], *, device: torch.device) -> torch.Tensor:
    """Returns where each token of a grid, row by row, is among the tokens of its windows: (hw,)."""
    wh, ww = window
    i, j = torch.arange(size[0], device=device)[:, None], torch.arange(size[1], device=device)
    windows = i // wh * -(-size[1] // ww) + j // ww
    return (windows * wh * ww + i % wh * ww + j % ww).flatten()


def rel_pos_bias(q: torch.Tensor, rel_pos_h: torch.Tensor, rel_pos_w: torch.Tensor) -> RelPosBias:
    """Returns the two terms of the decomposed relative positions' bias: (g k hw m) of the rows, (g k hw n) of columns.

    The bias of query (h, w) and key (m, n) is q[h, w] times R_h[h - m], plus q[h, w] times R_w[w - n].
    q: (g h w k e), not divided by sqrt(e); rel_pos_h: (2 * height - 1, e), its row 0 for distance 1 - height;
    rel_pos_w: (2 * width - 1, e). arXiv:2112.01526, equations 3 and 4, but as in its released code: the paper divides
    the bias by sqrt(e) too.
    """
    g, h, w, k = q.shape[:4]
    i, j = torch.arange(h, device=q.device), torch.arange(w, device=q.device)
    rows, columns = i[:, None] - i + h - 1, j[:, None] - j + w - 1
    bias_h = torch.einsum("ghwke,hme->gkhwm", q, rel_pos_h[rows])
    bias_w = torch.einsum("ghwke,wne->gkhwn", q, rel_pos_w[columns])
    return bias_h.reshape(g, k, h * w, h), bias_w.reshape(g, k, h * w, w)


class GridAttention(nn.Module):
    """Multi-head self-attention within each window, or over the whole grid, with decomposed relative positions.

    The released code pads the grid before `qkv`, so that a padded token, which is attended to, is its bias. Here that
    bias is the padding, and only the tokens of the grid are projected: the same outputs for less work.
    """

    def __init__(self, spec: ViTDetSpec, window: tuple[int, int] | None, *, kernel: str) -> None:
        super().__init__()
        self.num_heads, self.kernel, self.use_rel_pos = spec.num_heads, kernel, spec.rel_pos
        self.window = window or spec.grid_size
        self.qkv = Linear(spec.width, 3 * spec.width)
        self.proj = Linear(spec.width, spec.width)
        if spec.rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros((2 * self.window[0] - 1, spec.head_dim)))
            self.rel_pos_w = nn.Parameter(torch.zeros((2 * self.window[1] - 1, spec.head_dim)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (b h w d)
        h, w = x.shape[1:3]
        if (h, w) == self.window:
            return self.proj(self.attend_windows(self.qkv(x)))
        if h % self.window[0] or w % self.window[1]:
            windows, padded_size = window_partition(self.qkv(x), self.window, fill=self.qkv.bias)
            return self.proj(window_unpartition(self.attend_windows(windows), padded_size, (h, w)))
        windows, padded_size = window_partition(x, self.window)  # nothing is padded: x is a third of qkv
        return window_unpartition(self.proj(self.attend_windows(self.qkv(windows))), padded_size, (h, w))

    def attend_windows(self, qkv: torch.Tensor) -> torch.Tensor:
        """Attends within each window: (g h w 3d) -> (g h w d)."""
        g, h, w, d = qkv.shape
        qkv = qkv.reshape(g, h * w, 3, self.num_heads, -1)
        q, k, v = qkv.unbind(2)  # torch: (g hw k e); the gradient of three slices would fill three arrays and add them
        bias = None  # without one, the flash kernels can run
        if self.use_rel_pos:
            grid_q = q.reshape(g, h, w, self.num_heads, -1)
            bias = rel_pos_bias(grid_q, self.rel_pos_h.to(q.dtype), self.rel_pos_w.to(q.dtype))
        return attend(q, k, v, kernel=self.kernel, bias=bias).reshape(g, h, w, d // 3)


class WindowBlock(nn.Module):
    """Pre-norm transformer block, its attention in windows or, where `window` is None, over the whole grid."""

    def __init__(self, spec: ViTDetSpec, window: tuple[int, int] | None, *, kernel: str) -> None:
        super().__init__()
        self.norm1 = LayerNorm(spec.width, eps=spec.norm_eps)
        self.attn = GridAttention(spec, window, kernel=kernel)
        self.norm2 = LayerNorm(spec.width, eps=spec.norm_eps)
        self.mlp = Mlp(spec.width, spec.mlp_dim, activation=spec.gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (b h w d)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViTDet(nn.Module):
    """Patches, blocks on the grid, a last norm or SAM's neck, pooling and the head: (b 3 h w) -> (b num_classes)."""

    def __init__(self, spec: ViTDetSpec, *, attention: str) -> None:
        super().__init__()
        self.spec = spec
        self.patch_embed = PatchEmbed(spec)
        if spec.pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.zeros((1, *spec.grid_size, spec.width)))
        else:  # torch: a buffer, so that it is made once; XLA folds it into the program
            self.register_buffer("pos_embed", torch.from_numpy(sincos2d(spec.grid_size, spec.width)), persistent=False)
        self.blocks = nn.ModuleList([WindowBlock(spec, spec.window_of(i), kernel=attention) for i in range(spec.depth)])
        width = spec.neck_dim or spec.width
        if spec.neck_dim:
            self.neck = nn.ModuleList(make_neck(spec))
        else:
            self.norm = LayerNorm(spec.width, eps=spec.neck_eps)
        if spec.pool == "map":
            self.attn_pool = AttentionPool(spec, width, kernel=attention)
        if spec.rep_size:
            self.pre_logits = Linear(width, spec.rep_size)
        if spec.num_classes:
            self.head = Linear(spec.rep_size or width, spec.num_classes)

    def forward(self, images: torch.Tensor, out: Outputs | None = None) -> torch.Tensor:
        """Returns logits (b num_classes), or what the head would read where num_classes is 0."""
        x = tap(out, "stem", self.embed(images))
        for i, block in enumerate(self.blocks):
            x = tap(out, f"block/{i}", block(x))
        x = tap(out, "features", self.finish(x))
        return self.classify(x, out)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds patches and positions: (b 3 h w) -> (b h w d)."""
        x = self.patch_embed(images)
        return x + self.pos_embed.to(x.dtype)

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the last norm, or SAM's neck: (b h w d) -> (b h w d or neck_dim)."""
        if not self.spec.neck_dim:
            return self.norm(x)
        conv1, norm1, conv2, norm2 = self.neck
        x = norm1(conv1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # torch: convolutions are (b d h w)
        return norm2(conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def classify(self, x: torch.Tensor, out: Outputs | None) -> torch.Tensor:
        """Pools the grid and applies the head: (b h w d) -> (b num_classes)."""
        b, h, w, d = x.shape
        x = x.reshape(b, h * w, d)
        x = tap(out, "pooled", self.attn_pool(x) if self.spec.pool == "map" else x.mean(dim=1))
        if self.spec.rep_size:
            x = torch.tanh(self.pre_logits(x))
        tap(out, "pre_logits", x)
        return tap(out, "logits", self.head(x)) if self.spec.num_classes else x


def make_neck(spec: ViTDetSpec) -> list[nn.Module]:
    """Returns the layers of SAM's neck (arXiv:2304.02643, appendix A): (b h w width) -> (b h w neck_dim)."""
    return [
        Conv(spec.width, spec.neck_dim, kernel_size=1, use_bias=False),
        LayerNorm(spec.neck_dim, eps=spec.neck_eps),
        Conv(spec.neck_dim, spec.neck_dim, kernel_size=3, padding=1, use_bias=False),
        LayerNorm(spec.neck_dim, eps=spec.neck_eps),
    ]
