"""Model specs: one frozen dataclass a family, holding sizes *and* numerics, and `get_spec`.

A spec is all that a model constructor needs to know, and the same object builds the JAX and the torch model, so
nothing that changes the maths is left to a framework's default.
"""

import dataclasses
import re
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np

from vitcmp.sizes import (
    BIG_VISION_BITS,
    BIG_VISION_VITS,
    BIT_DEPTHS,
    CONVNEXT_ALIASES,
    CONVNEXT_SIZES,
    RESNET_SIZES,
    VIT_SIZES,
)
from vitcmp.spec_text import did_you_mean, format_image_size, parse_image_size, parse_overrides, require_small

__all__ = [
    "CONVNEXT_SIZES",
    "FOREIGN",
    "NAMES",
    "NAME_PATTERNS",
    "RESNET_SIZES",
    "BiTSpec",
    "BiTV1Spec",
    "BigVisionSpec",
    "ConvNeXtSpec",
    "ForeignSpec",
    "ResNetSpec",
    "Spec",
    "TimmSpec",
    "ViTDetSpec",
    "ViTSpec",
    "did_you_mean",
    "format_image_size",
    "get_spec",
    "parse_image_size",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What every family has: the image it is built for, and its classes."""

    family: ClassVar[str]
    min_image_size: ClassVar[int] = 1
    image_size: tuple[int, int] = (224, 224)  # height, width
    num_classes: int = 1000  # 0 leaves the head out

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if hint is int and not isinstance(value, int | np.integer):
                raise ValueError(f"{name}={value!r} must be a whole number")
            if isinstance(value, list):  # a spec is hashable
                object.__setattr__(self, name, tuple(value))
        self._check()

    def _check(self) -> None:
        _require_choices(self)
        object.__setattr__(self, "image_size", parse_image_size(self.image_size))
        require_small(vars(self))
        _require(self, "num_classes", self.num_classes >= 0, "0 (no head) or more")
        if min(self.image_size) < self.min_image_size:
            raise ValueError(
                f"image_size={format_image_size(self.image_size)} is too small for {self.family}: "
                f"each side must be at least {self.min_image_size} pixels"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTSpec(Spec):
    """Plain ViT of arXiv:2010.11929, Table 1; numerics as in timm's released weights.

    big_vision's numerics are `gelu="tanh"` and `pool` gap, map or tok. The position of the class token is folded into
    the token itself, so `pool="tok"` has 1 x width fewer parameters than timm's count, and the same outputs.
    """

    family: ClassVar[str] = "vit"
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int = 16
    pool: Literal["tok", "gap", "map"] = "tok"
    pos_embed: Literal["learned", "sincos2d"] = "learned"
    gelu: Literal["erf", "tanh"] = "erf"
    norm_eps: float = 1e-6  # torch.nn.LayerNorm alone would give 1e-5
    rep_size: int = 0  # width of the tanh pre-logits layer; 0 has none, true is `width`

    def _check(self) -> None:
        if self.rep_size is True:
            object.__setattr__(self, "rep_size", self.width)
        for name in ("width", "depth", "num_heads", "mlp_dim", "patch_size"):
            _require(self, name, getattr(self, name) >= 1, "1 or more")
        _require(self, "rep_size", self.rep_size >= 0, "0 (none), true (the width), or a width")
        _require(self, "norm_eps", 0 < self.norm_eps < 1, "between 0 and 1")
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not divisible by num_heads={self.num_heads}")
        if self.pos_embed == "sincos2d" and (self.width % 4 or self.width < 8):
            raise ValueError(f"width={self.width} must be a multiple of 4, and 8 or more, for pos_embed=sincos2d")
        super()._check()
        if min(self.grid_size) < 1:
            raise ValueError(
                f"image_size={format_image_size(self.image_size)} is smaller than one patch of {self.patch_size} pixels"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches down and across; pixels past the last whole patch are dropped (a VALID convolution, big_vision's)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid_size[0] * self.grid_size[1] + (self.pool == "tok")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTDetSpec(ViTSpec):
    """ViTDet backbone of arXiv:2203.16527: windowed attention, with a few global blocks.

    `window_policy="pad"` pads the grid at its bottom and right to whole windows of `window_size`, after norm1 (section
    3 and its released code); `"divide"` chooses for each axis the window in [window_size/2, window_size] that pads
    least, the largest where several do: with window_size=16 the windows of Beyer's article. Padded keys are attended
    to, as in the released code. `global_blocks` is a count, spaced evenly as in section 3, or the block indices
    (`2+5+8+11`; `2+` for one).

    `norm_eps` is 1e-6, as in the paper's and SAM's code; timm's samvit has 1e-5 in its blocks: `norm_eps=1e-5` equals
    it, and `neck_dim=256,num_classes=0,norm_eps=1e-5` is its stock model.
    """

    family: ClassVar[str] = "vitdet"
    pool: Literal["gap", "map"] = "gap"  # a class token has no place in the grid
    window_size: int = 14
    window_policy: Literal["pad", "divide"] = "pad"
    global_blocks: tuple[int, ...] | int = 4
    rel_pos: bool = True  # decomposed, arXiv:2112.01526, equation 4
    neck_dim: int = 0  # SAM's neck (arXiv:2304.02643): conv1x1, norm, conv3x3, norm; 0 ends in a LayerNorm
    neck_eps: float = 1e-6  # of the neck's norms, or of the LayerNorm that is there instead

    def _check(self) -> None:
        super()._check()
        _require(self, "window_size", self.window_size >= 1, "1 or more")
        _require(self, "neck_dim", self.neck_dim >= 0, "0 (none) or more")
        _require(self, "neck_eps", 0 < self.neck_eps < 1, "between 0 and 1")
        if self.pool == "map" and self.neck_dim % self.num_heads:
            raise ValueError(
                f"neck_dim={self.neck_dim} is not divisible by num_heads={self.num_heads}, as pool=map needs"
            )
        blocks = self.global_blocks
        if isinstance(blocks, int):
            _require(self, "global_blocks", 0 <= blocks <= self.depth, f"a count from 0 to depth={self.depth}")
            blocks = tuple((i + 1) * self.depth // blocks - 1 for i in range(blocks))
        if any(not 0 <= block < self.depth for block in blocks) or len(set(blocks)) != len(blocks):
            raise ValueError(f"global_blocks={blocks} must be different indices from 0 to {self.depth - 1}")
        object.__setattr__(self, "global_blocks", tuple(sorted(blocks)))

    def window_of(self, block: int) -> tuple[int, int] | None:
        """Returns the (height, width) of the block's windows in tokens, or None where its attention is global."""
        assert isinstance(self.global_blocks, tuple)
        if block in self.global_blocks:
            return None
        if self.window_policy == "pad":
            return self.window_size, self.window_size
        height, width = self.grid_size
        return _least_padding(height, self.window_size), _least_padding(width, self.window_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetSpec(Spec):
    """ResNet v1.5 (stride in the 3x3 convolution) of arXiv:1512.03385, as in torchvision and timm."""

    family: ClassVar[str] = "resnet"
    block: Literal["basic", "bottleneck"]
    depths: tuple[int, ...]
    width: int = 64  # of the stem and of stage 0's 3x3 convolutions
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1  # weight of the new batch in the running statistics, torch's convention
    is_folded: bool = False  # BatchNorm folded into the convolutions, which then have a bias; for inference only

    def _check(self) -> None:
        super()._check()
        _require(self, "depths", bool(self.depths) and min(self.depths) >= 1, "one count a stage, each 1 or more")
        _require(self, "width", self.width >= 1, "1 or more")
        _require(self, "norm_momentum", 0 <= self.norm_momentum <= 1, "from 0 to 1")
        _require(self, "norm_eps", 0 < self.norm_eps < 1, "between 0 and 1")

    @property
    def expansion(self) -> int:
        return 4 if self.block == "bottleneck" else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNeXtSpec(Spec):
    """ConvNeXt (V1) of arXiv:2201.03545; numerics as in timm's released weights."""

    family: ClassVar[str] = "convnext"
    min_image_size: ClassVar[int] = 32
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    kernel_size: int = 7
    gelu: Literal["erf", "tanh"] = "erf"
    norm_eps: float = 1e-6

    def _check(self) -> None:
        super()._check()
        _require(self, "depths", bool(self.depths) and min(self.depths) >= 1, "one count a stage, each 1 or more")
        _require(self, "widths", bool(self.widths) and min(self.widths) >= 1, "one width a stage, each 1 or more")
        _require(self, "kernel_size", self.kernel_size >= 1 and self.kernel_size % 2 == 1, "an odd number")
        _require(self, "norm_eps", 0 < self.norm_eps < 1, "between 0 and 1")
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths={self.depths} and widths={self.widths} must have one entry a stage each")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiTSpec(Spec):
    """BiT's ResNet V2 of arXiv:1912.11370: pre-activation, GroupNorm, weight standardisation; timm's `resnetv2_*_bit`.

    Bottlenecks with the stride in the 3x3 convolution; `width_factor` multiplies every width. big_vision's
    `bit_paper` is `stem_pad=lowest,weight_eps=1e-10`.
    """

    family: ClassVar[str] = "bit"
    depths: tuple[int, ...]
    width_factor: int = 1
    num_groups: int = 32
    norm_eps: float = 1e-5
    weight_eps: float = 1e-8  # of weight standardisation: timm's; big_vision's bit_paper has 1e-10
    stem_pad: Literal["zero", "lowest"] = "zero"  # what pads the stem's max-pool: timm's 0, or never the greatest

    def _check(self) -> None:
        super()._check()
        _require(self, "depths", bool(self.depths) and min(self.depths) >= 1, "one count a stage, each 1 or more")
        _require(self, "width_factor", self.width_factor >= 1, "1 or more")
        _require(self, "norm_eps", 0 < self.norm_eps < 1, "between 0 and 1")
        _require(self, "weight_eps", 0 < self.weight_eps < 1, "between 0 and 1")
        if self.num_groups < 1 or self.width % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide the stem's width of {self.width}")

    @property
    def width(self) -> int:
        """Channels of the stem, and of stage 0's 3x3 convolutions."""
        return 64 * self.width_factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiTV1Spec(BiTSpec):
    """big_vision's `models/bit.py`: a ResNet V1 with the V2's GroupNorm and weight standardisation, and SAME padding.

    Here `weight_eps` is added to the deviation, not to the variance.
    """

    family: ClassVar[str] = "bit_v1"
    norm_eps: float = 1e-6
    weight_eps: float = 1e-5
    stem_pad: Literal["lowest"] = "lowest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignSpec(Spec):
    """A model of another library behind our interface: its sizes and numerics are its own, and so are its weights."""

    backend: ClassVar[str]  # the only one that has it
    name: str  # by that library

    def require_backend(self, backend: str) -> None:
        """Raises ValueError where the backend is not the one that has the library."""
        if backend != self.backend:
            raise ValueError(f"{self.family}:{self.name} runs on backend={self.backend} only, not on {backend}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmSpec(ForeignSpec):
    """Any model of timm: `timm:convnextv2_tiny`, or with the tag of a configuration: `timm:resnet18.a1_in1k`."""

    family: ClassVar[str] = "timm"
    backend: ClassVar[str] = "torch"

    def _check(self) -> None:
        super()._check()
        is_name = re.fullmatch(r"\w+(\.\w+)?", self.name) is not None
        _require(self, "name", is_name, "a name of timm.list_models(); a model of a hub is given by --weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigVisionSpec(ForeignSpec):
    """A model of google-research/big_vision, found at BIG_VISION_PATH: `big_vision:vit/B/16`, `big_vision:bit/50`.

    `bit/50x3` is three times as wide; `bit` is its ResNet V1 with GroupNorm, `bit_paper` BiT's ResNet V2. A ViT pools
    by `gap` unless told otherwise, as its code does.
    """

    family: ClassVar[str] = "big_vision"
    backend: ClassVar[str] = "jax"
    pool: Literal["gap", "map", "tok"] = "gap"
    pos_embed: Literal["learned", "sincos2d"] = "learned"
    rep_size: int = 0  # width of the tanh pre-logits layer; 0 has none, true is the model's width

    def _check(self) -> None:
        super()._check()
        vits, bits = "|".join(BIG_VISION_VITS), "|".join(map(str, BIG_VISION_BITS))
        match = re.fullmatch(rf"vit/({vits})(/(?P<patch>[1-9]\d*))?|bit(_paper)?/({bits})(x[1-4])?", self.name)
        allowed = f"vit/SIZE or vit/SIZE/PATCH (SIZE: {vits}), bit/N, bit/NxWIDTH or bit_paper/... (N: {bits}; 1 to 4)"
        _require(self, "name", match is not None, allowed.replace("|", " "))
        assert match is not None
        patch_size = int(match["patch"] or 16)
        _require(self, "rep_size", self.rep_size >= 0, "0 (none), true (the width), or a width")
        if self.name.startswith("bit") and (self.pool, self.pos_embed, self.rep_size) != ("gap", "learned", 0):
            raise ValueError(f"{self.name} has no pool, pos_embed and rep_size to choose: those are a vit's")
        if self.name.startswith("vit") and min(self.image_size) < patch_size:
            size = format_image_size(self.image_size)
            raise ValueError(f"image_size={size} is smaller than one patch of {patch_size} pixels")


FOREIGN: dict[str, type[ForeignSpec]] = {cls.family: cls for cls in (TimmSpec, BigVisionSpec)}
NAME_PATTERNS = (
    "vit_SIZEPATCH, vitdet_SIZEPATCH (SIZE: {}; PATCH in pixels), resnetN (N: {}), bit_rNxW and bit_v1_rNxW (N: {}; "
    "W: 1 to 4), convnext_SIZE ({}), timm:NAME (torch), big_vision:NAME (JAX)".format(
        *(" ".join(map(str, sizes)) for sizes in (VIT_SIZES, RESNET_SIZES, BIT_DEPTHS, CONVNEXT_SIZES))
    )
)
# The names that --help and did-you-mean list; any other patch size parses too.
NAMES = (
    *(f"{family}_{size}{patch}" for family in ("vit", "vitdet") for size in VIT_SIZES for patch in (8, 14, 16, 32)),
    *(f"resnet{depth}" for depth in RESNET_SIZES),
    *(f"{family}_r{depth}x{width}" for family in ("bit", "bit_v1") for depth in BIT_DEPTHS for width in range(1, 5)),
    *(f"convnext_{size}" for size in CONVNEXT_SIZES),
)


def get_spec(name: str | Spec) -> Spec:
    """Returns the spec of `name`, with overrides as in `vitdet_b16:window_size=16,global_blocks=4,image_size=80x176`.

    Values are written as in Python; tuples are joined by `x` or `+` (`depths=3x4x6x3`); of a field given twice the last
    counts. A spec is returned as it is.
    Raises ValueError for an unknown name or field, with what is allowed and a did-you-mean, or for a bad value.
    """
    if isinstance(name, Spec):
        return name
    if not isinstance(name, str):
        raise ValueError(f"model {name!r} must be a name, such as 'vit_b16:pool=gap', or a spec")
    base, _, overrides = name.strip().partition(":")
    if base in FOREIGN:
        theirs, *rest = re.split("[:,]", overrides, maxsplit=1)  # lists of models put a comma before a field
        base, overrides = f"{base}:{theirs}", "".join(rest)
    cls, fields = _named(base)
    try:
        return cls(**fields | parse_overrides(cls, base, overrides))
    except ValueError as error:
        raise ValueError(f"model {name!r}: {error}") from None


def _named(base: str) -> tuple[type[Spec], dict[str, Any]]:
    if match := re.fullmatch(rf"({'|'.join(FOREIGN)}):(.+)", base):
        return FOREIGN[match[1]], {"name": match[2]}
    if match := re.fullmatch(r"(vit|vitdet)_([a-zA-Z]+|so400m)([1-9][0-9]*)", base):
        family, size, patch = match.groups()
        if size in VIT_SIZES:
            sizes = dict(zip(("width", "depth", "num_heads", "mlp_dim"), VIT_SIZES[size], strict=True))
            return (ViTSpec if family == "vit" else ViTDetSpec), {**sizes, "patch_size": int(patch)}
    if (match := re.fullmatch(r"resnet([1-9][0-9]*)", base)) and int(match[1]) in RESNET_SIZES:
        block, depths = RESNET_SIZES[int(match[1])]
        return ResNetSpec, {"block": block, "depths": depths}
    if (match := re.fullmatch(r"(bit|bit_v1)_r([1-9][0-9]*)x([1-4])", base)) and int(match[2]) in BIT_DEPTHS:
        cls = BiTSpec if match[1] == "bit" else BiTV1Spec
        return cls, {"depths": BIT_DEPTHS[int(match[2])], "width_factor": int(match[3])}
    if match := re.fullmatch(r"convnext_([a-z]+)", base):
        size = CONVNEXT_ALIASES.get(match[1], match[1])
        if size in CONVNEXT_SIZES:
            depths, widths = CONVNEXT_SIZES[size]
            return ConvNeXtSpec, {"depths": depths, "widths": widths}
    raise ValueError(f"unknown model {base!r}{did_you_mean(base, NAMES)}; allowed: {NAME_PATTERNS}")


def _least_padding(length: int, window_size: int) -> int:
    candidates = range((window_size + 1) // 2, window_size + 1)
    return min(candidates, key=lambda window: (-(-length // window) * window, -window))


def _require(spec: Spec, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(spec, name)!r} must be {allowed}")


def _require_choices(spec: Spec) -> None:
    for name, hint in get_type_hints(type(spec)).items():
        if get_origin(hint) is Literal and getattr(spec, name) not in get_args(hint):
            choices = get_args(hint)
            value = str(getattr(spec, name))
            raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}{did_you_mean(value, choices)}")
