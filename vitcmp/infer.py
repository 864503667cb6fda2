"""The spec of a checkpoint, told from the names and shapes of its arrays, and the text that stands for a spec.

Numerics leave no trace in arrays: they are those of timm's model where its name was given (`timm:NAME`), those of the
library whose names the file has (GELU's tanh form and BiT's epsilons of big_vision), and else a spec's defaults.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from vitcmp import big_vision
from vitcmp.checkpoints import TIMM_LEAVES, Layout, layout_of
from vitcmp.sizes import BIT_DEPTHS, CONVNEXT_SIZES, RESNET_SIZES, VIT_SIZES
from vitcmp.specs import (
    BiTSpec,
    BiTV1Spec,
    ConvNeXtSpec,
    ResNetSpec,
    Spec,
    ViTDetSpec,
    ViTSpec,
    format_image_size,
    get_spec,
)
from vitcmp.timm_hub import TimmState, Told
from vitcmp.weight_files import State

Shapes = Mapping[str, tuple[int, ...]]
Fields = dict[str, Any]
BIG_VISION_NUMERICS: dict[type[Spec], Fields] = {
    ViTSpec: {"gelu": "tanh"},
    BiTSpec: {"weight_eps": 1e-10, "stem_pad": "lowest"},
}


def infer_spec(state: State, *, source: str = "state") -> Spec:
    """Returns the spec that has arrays of these names and shapes; ValueError where they do not tell it.

    A position embedding without a grid is taken for that of a square image; one that is not there, for sincos2d at 224.
    """
    layout = layout_of(state, source)
    shapes = _canonical_shapes(state, layout, source)
    told = state.told if isinstance(state, TimmState) else Told()
    if grid := told.grid_of(shapes.get("pos_embed", (0, 0))[1]):
        shapes["pos_embed"] = (1, *grid[1], shapes["pos_embed"][-1])
    try:
        cls, fields = _family(shapes, told.fields.get("num_heads"))
        if layout == "big_vision":
            fields |= BIG_VISION_NUMERICS.get(cls, {})
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**fields | {name: value for name, value in told.fields.items() if name in known})
    except KeyError as error:
        fault = f"there is no {error.args[0]}"
    except (IndexError, ValueError) as error:
        fault = str(error)
    raise ValueError(
        f"{source}: its arrays do not tell the model: {fault}; give it as a spec, such as vit_b16:image_size=80x176"
    )


def name_of(spec: Spec) -> str:
    """Returns text that `get_spec` reads as this spec: the nearest name, and the fields that differ."""
    names = _names(spec)
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}

    def overrides(name: str) -> Fields:
        return {field: value for field, value in values.items() if getattr(get_spec(name), field) != value}

    name = min(names, key=lambda name: len(overrides(name)))
    return ":".join(filter(None, (name, ",".join(f"{key}={_text(key, x)}" for key, x in overrides(name).items()))))


def _names(spec: Spec) -> list[str]:
    if isinstance(spec, ViTSpec):
        return [f"{spec.family}_{size}{spec.patch_size}" for size in VIT_SIZES]
    if isinstance(spec, BiTSpec):
        return [f"{spec.family}_r{depth}x{width}" for depth in BIT_DEPTHS for width in range(1, 5)]
    if isinstance(spec, ResNetSpec):
        return [f"resnet{depth}" for depth in RESNET_SIZES]
    return [f"convnext_{size}" for size in CONVNEXT_SIZES]


def _text(field: str, value: Any) -> str:
    if field == "image_size":
        return format_image_size(value)
    if isinstance(value, tuple):
        return "+".join(map(str, value)) + "+" * (len(value) == 1) or "0"  # as global_blocks is written
    return str(value).lower() if isinstance(value, bool) else str(value)


def _canonical_shapes(state: State, layout: Layout, source: str) -> dict[str, tuple[int, ...]]:
    """Returns shapes by canonical names; big_vision's attention keeps its axis of heads."""
    if layout == "big_vision":
        big_vision.family_of(state, source)
        entries = big_vision.todays_names(state, source).items()
        return {big_vision.canonical_name(name): entry.array.shape for name, entry in entries}
    shapes = {name: tuple(array.shape) for name, array in state.items()}
    if layout == "canonical":
        return shapes
    is_vit = any(name.startswith("patch_embed.") for name in shapes)
    return dict(_from_timm(name, shape, is_vit=is_vit) for name, shape in shapes.items())


def _from_timm(name: str, shape: tuple[int, ...], *, is_vit: bool) -> tuple[str, tuple[int, ...]]:
    """Guesses the canonical name and shape of timm's array: to tell the model, never to load it."""
    module, _, leaf = name.rpartition(".")
    if is_vit:
        module = {"pre_logits.fc": "pre_logits", "head.fc": "head"}.get(module, module)
    is_linear = len(shape) == 2 or (shape[2:] == (1, 1) and module.endswith(("fc", "fc1", "fc2")))
    if leaf != "weight":
        leaf = {theirs: ours for ours, theirs in TIMM_LEAVES.items()}.get(leaf, leaf)
    elif len(shape) < 2:
        leaf = "scale"
    else:
        leaf, shape = "kernel", (*(() if is_linear else shape[2:]), shape[1], shape[0])
    return "/".join(filter(None, (module.replace(".", "/"), leaf))), shape


def _family(shapes: Shapes, num_heads: int | None) -> tuple[type[Spec], Fields]:
    is_vitdet = any(name.startswith("neck/") or "/rel_pos_" in name for name in shapes)
    if "patch_embed/proj/kernel" in shapes:
        fields = _vit(shapes, num_heads)
        return (ViTDetSpec, fields | _vitdet(shapes)) if is_vitdet else (ViTSpec, fields)
    if "conv1/kernel" in shapes:
        return ResNetSpec, _resnet(shapes)
    if "stem/0/kernel" in shapes:
        return ConvNeXtSpec, _convnext(shapes)
    if "stem/conv/kernel" in shapes:
        return (BiTV1Spec if "stem/norm/scale" in shapes else BiTSpec), _bit(shapes)
    raise ValueError("the names are of no family that it knows (ViT, ViTDet, ResNet, BiT, ConvNeXt)")


def _vit(shapes: Shapes, num_heads: int | None) -> Fields:
    patch_size, _, _, width = shapes["patch_embed/proj/kernel"]
    depth, mlp_dim = _count(shapes, r"blocks/(\d+)/"), shapes["blocks/0/mlp/fc1/kernel"][1]
    has_token = "cls_token" in shapes
    fields: Fields = {
        "width": width,
        "depth": depth,
        "num_heads": num_heads or _num_heads(shapes, width, depth, mlp_dim),
        "mlp_dim": mlp_dim,
        "patch_size": patch_size,
        "pool": "tok" if has_token else "map" if "attn_pool/latent" in shapes else "gap",
        "rep_size": shapes.get("pre_logits/kernel", (0, 0))[1],
        "num_classes": shapes.get("head/kernel", (0, 0))[1],
    }
    if "pos_embed" not in shapes:
        return fields | {"pos_embed": "sincos2d"}
    try:
        rows, columns = _grid(shapes["pos_embed"], has_token)
    except ValueError as error:
        raise ValueError(f"{error}: all but its image_size is {name_of(ViTSpec(**fields))}") from None
    return fields | {"image_size": (rows * patch_size, columns * patch_size)}


def _vitdet(shapes: Shapes) -> Fields:
    """Tells windows from the tables of relative positions: those as long as the grid needs are of global blocks."""
    neck = {"neck_dim": shapes["neck/0/kernel"][3]} if "neck/0/kernel" in shapes else {}
    tables = {int(name.split("/")[1]): shape[0] for name, shape in shapes.items() if name.endswith("/attn/rel_pos_h")}
    widths = {int(name.split("/")[1]): shape[0] for name, shape in shapes.items() if name.endswith("/attn/rel_pos_w")}
    if not tables:
        return {**neck, "rel_pos": False}
    rows, columns = _grid(shapes["pos_embed"], has_token=False)
    lengths = {block: ((tables[block] + 1) // 2, (widths[block] + 1) // 2) for block in tables}
    windows = {length for length in lengths.values() if length != (rows, columns)}
    if len(windows) > 1 or any(height != width for height, width in windows):
        raise ValueError(f"the windows of its blocks differ: {', '.join(f'{h}x{w}' for h, w in sorted(windows))}")
    return {
        **neck,
        "global_blocks": tuple(block for block, length in lengths.items() if length == (rows, columns)),
        **({"window_size": windows.pop()[0]} if windows else {}),
    }


def _resnet(shapes: Shapes) -> Fields:
    return {
        "block": "bottleneck" if "layer1/0/conv3/kernel" in shapes else "basic",
        "depths": _depths(shapes, "layer{}/", first=1),
        "width": shapes["conv1/kernel"][3],
        "num_classes": shapes.get("fc/kernel", (0, 0))[1],
        "is_folded": "conv1/bias" in shapes,
    }


def _convnext(shapes: Shapes) -> Fields:
    depths = _depths(shapes, "stages/{}/blocks/", first=0)
    return {
        "depths": depths,
        "widths": tuple(shapes[f"stages/{stage}/blocks/0/conv_dw/kernel"][3] for stage in range(len(depths))),
        "kernel_size": shapes["stages/0/blocks/0/conv_dw/kernel"][0],
        "num_classes": shapes.get("head/fc/kernel", (0, 0))[1],
    }


def _bit(shapes: Shapes) -> Fields:
    width = shapes["stem/conv/kernel"][3]
    head = shapes.get("head/fc/kernel") or shapes.get("head/kernel", (0, 0))  # ours and timm's; big_vision's
    if width % 64:
        raise ValueError(f"the stem's width of {width} is no multiple of 64")
    return {
        "depths": _depths(shapes, "stages/{}/blocks/", first=0),
        "width_factor": width // 64,
        "num_classes": head[1],
    }


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _depths(shapes: Shapes, stage: str, *, first: int) -> tuple[int, ...]:
    num_stages = _count(shapes, stage.format(r"(\d+)"))
    return tuple(_count(shapes, stage.format(first + i) + r"(\d+)/") for i in range(num_stages))


def _num_heads(shapes: Shapes, width: int, depth: int, mlp_dim: int) -> int:
    attention = shapes["blocks/0/attn/qkv/kernel"]
    if len(attention) == 3:  # big_vision's (d, heads, head_dim)
        return attention[1]
    if "blocks/0/attn/rel_pos_h" in shapes:
        return width // shapes["blocks/0/attn/rel_pos_h"][1]
    for size in VIT_SIZES.values():
        if (size[0], size[1], size[3]) == (width, depth, mlp_dim):
            return size[2]
    raise ValueError(f"num_heads, since no known size has {width=}, {depth=}, {mlp_dim=}")


def _grid(shape: tuple[int, ...], has_token: bool) -> tuple[int, int]:
    if len(shape) == 4:
        return shape[1], shape[2]
    for num_tokens in (0, 1) if has_token else (0,):  # no two squares but 0 and 1 are 1 apart
        side = math.isqrt(max(shape[1] - num_tokens, 0))
        if side and side**2 == shape[1] - num_tokens:
            return side, side
    raise ValueError(f"the {shape[1]} rows of its position embedding are of no square grid")
