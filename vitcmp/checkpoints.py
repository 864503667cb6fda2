"""Weights of a spec from a checkpoint, by canonical, timm's or big_vision's names, and into one.

Names and layouts are tables by family and by kind of leaf. Every fault of a checkpoint is one ValueError that names the
path, what is wrong and what is allowed.
"""

import importlib.metadata
import math
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from vitcmp import big_vision
from vitcmp.big_vision import from_big_vision, to_big_vision
from vitcmp.params import (
    Kind,
    Leaf,
    Weights,
    check_shapes,
    check_weights,
    expected_params,
    fit_image_size,
    sincos2d,
)
from vitcmp.sizes import CONVNEXT_SIZES
from vitcmp.specs import BiTSpec, ConvNeXtSpec, Spec, ViTDetSpec, ViTSpec, get_spec
from vitcmp.timm_hub import TimmState, Told, is_timm, read_timm, split_timm
from vitcmp.trees import select_tree
from vitcmp.weight_files import State, as_floats, file_id, read_arrays, split_subtree, write_arrays

__all__ = [
    "from_big_vision",
    "from_timm",
    "layout_of",
    "load_weights",
    "read_state",
    "save_weights",
    "to_big_vision",
    "to_timm",
    "weights_id",
    "weights_of",
]

Source = str | os.PathLike[str]
Layout = Literal["canonical", "timm", "big_vision"]
# What only canonical names begin with; `head/kernel` and `pre_logits/kernel` are big_vision's too.
CANONICAL_ROOTS = re.compile(r"(patch_embed|blocks|norm|attn_pool|neck|stem|stages|layer\d|conv1|bn1|fc)/")
# timm's names where they differ from the canonical ones, by leaf and, a family at a time, by module.
TIMM_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
TIMM_MODULES = {
    "vit": {"pre_logits": "pre_logits.fc"},
    "vitdet": {"pre_logits": "pre_logits.fc", "norm": "neck", "head": "head.fc"},  # VisionTransformerSAM without a neck
}
# Parts of timm models that no spec describes, by a segment of their names.
TIMM_UNSUPPORTED = {
    "dist_token": "a distillation token",
    "head_dist": "a distillation head",
    "reg_token": "register tokens",
    "norm_pre": "a norm before the blocks (CLIP) or before pooling (ConvNeXt's hnf)",
    "fc_norm": "a norm after pooling",
    "ls1": "layer scale in a ViT",
    "ls2": "layer scale in a ViT",
    "q_norm": "norms of queries and keys",
    "k_norm": "norms of queries and keys",
    "grn": "the response normalisation of ConvNeXt V2",
}
# Sizes whose timm variants have conv_mlp=True: 1x1 convolutions in place of the MLP's linear layers.
TIMM_CONV_MLP = {CONVNEXT_SIZES[size][1] for size in ("atto", "femto", "pico", "nano")}


def load_weights(path: Source, spec: Spec | str) -> Weights:
    """Reads the weights of `spec` by canonical names: float32, or float64 where the file has float64.

    The path is of a `.safetensors`, an `.npz` or a torch file (`weight_files.read_arrays`), with canonical, timm's or
    big_vision's names; `FILE:SUBTREE` (`siglip.npz:img`) is a part of it; `timm:NAME` are the pretrained weights of
    timm's model, and `timm:NAME:FILE` a file as timm reads it for that model. A position embedding of another grid is
    resampled (`fit_image_size`); a plain ViT's file is upcycled where `spec` is a ViTDet's; 16-bit arrays become
    float32. Raises one ValueError for what cannot be read, that holds pickled objects or that does not fit.
    """
    spec = get_spec(spec)
    expected_params(spec)  # raises for a model of another library, before a file is read
    return weights_of(read_state(path), spec, source=os.fspath(path))


def read_state(source: Source) -> State:
    """Reads the arrays of a checkpoint by its own names, without what wraps them; `source` as in `load_weights`."""
    if is_timm(source):
        return read_timm(os.fspath(source))
    path, subtree = split_subtree(source)
    return select_tree(read_arrays(path), subtree, os.fspath(source))


def weights_of(state: State, spec: Spec | str, *, source: str = "state") -> Weights:
    """Returns canonical weights from arrays by canonical, timm's or big_vision's names, strictly."""
    spec, layout = get_spec(spec), layout_of(state, source)
    if layout == "canonical":
        return _fit(as_floats(state, source), spec, is_plain=_is_plain_vit(state), source=source)
    read = from_timm if layout == "timm" else from_big_vision
    return read(state, spec, source=source)


def layout_of(state: State, source: str = "state") -> Layout:
    """Tells whose names the arrays have; raises ValueError where they are of two."""
    found: dict[Layout, str] = {}
    for name in state:
        if big_vision.ROOTS.match(name):
            found.setdefault("big_vision", name)
        elif CANONICAL_ROOTS.match(name):
            found.setdefault("canonical", name)
        elif "." in name and "/" not in name:
            found.setdefault("timm", name)
    if len(found) > 1:
        mixed = ", ".join(f"{layout} ({name})" for layout, name in found.items())
        raise ValueError(f"{source}: names of several layouts are mixed: {mixed}; allowed is one")
    return next(iter(found), "canonical" if any("/" in name for name in state) else "timm")


def weights_id(source: Source) -> str:
    """Returns what identifies weights in a record: "sha256:..." of the file's bytes, with `:SUBTREE` of a part of it.

    Of `timm:NAME` it is "timm:NAME@VERSION", with timm's version, since the arrays are on the hub; of `timm:NAME:FILE`
    that and the file's hash. Raises ValueError where there is no such file, and where timm is not installed.
    """
    if is_timm(source):
        name, path = split_timm(os.fspath(source))
        try:
            version = importlib.metadata.version("timm")
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{source}: timm is not installed; pip install timm, or give a file") from None
        return f"timm:{name}@{version}" + (f":{file_id(path)}" if path else "")
    path, subtree = split_subtree(source)
    return file_id(path) + (f":{subtree}" if subtree else "")


def save_weights(path: str | os.PathLike[str], weights: Mapping[str, Any]) -> None:
    """Writes weights under their names, as `.npz` or `.safetensors`, in one step: an older file is replaced or kept.

    Raises ValueError for another suffix, a missing folder and arrays that are not floating point; OSError where the
    disk is full or the folder read-only, with nothing left behind.
    """
    write_arrays(path, as_floats(weights, "weights"))


def from_timm(state: State, spec: Spec | str, *, source: str = "state") -> Weights:
    """Returns canonical weights from a timm state dict of numpy arrays or CPU tensors, strictly.

    The position of the class token is folded into the token. A flat position embedding is taken to be of the spec's
    grid where it has as many rows, and else of a square one; of `read_timm` it is of the grid of timm's model, and a
    spec that computes otherwise than that model is refused. `source` names the state in errors.
    """
    spec, told = get_spec(spec), state.told if isinstance(state, TimmState) else None
    arrays = as_floats(state, source)
    _refuse_unsupported(arrays, source)
    is_plain = _is_plain_vit(arrays)
    weights: Weights = {}
    for name, leaf in _timm_leaves(spec, is_plain).items():
        if (theirs := timm_name(name, spec, is_plain=is_plain)) in arrays:
            weights[name] = _from_timm_layout(arrays.pop(theirs), leaf, spec)
    weights |= arrays  # what no leaf asked for, to be listed by its own name
    if isinstance(spec, ViTSpec) and "pos_embed" in weights:
        _unflatten_pos_embed(weights, spec, told, source)
    weights = _fit(weights, spec, is_plain=is_plain, is_timm=True, source=source)
    if told:
        told.require(spec, source)
    return weights


def to_timm(weights: Weights, spec: Spec | str, *, conv_mlp: bool | None = None) -> Weights:
    """Returns the weights under timm's names and in torch's layouts, for `load_state_dict`; outputs are the same.

    The position of the class token comes back as zeros, since the token holds it; a sincos2d embedding is written out,
    as timm has no fixed one. `conv_mlp` is timm's own choice for ConvNeXt, by default as in its variant of the same
    widths. BatchNorm's `num_batches_tracked` is left out: torch starts it at 0. Raises ValueError for weights that do
    not fit.
    """
    spec = get_spec(spec)
    check_weights(weights, spec)
    if conv_mlp is None:
        conv_mlp = isinstance(spec, ConvNeXtSpec) and spec.widths in TIMM_CONV_MLP
    state = {}
    for name, leaf in expected_params(spec).items():
        array = _to_timm_layout(np.asarray(weights[name]), leaf.kind)
        is_conv = leaf.kind == "linear" and (isinstance(spec, BiTSpec) or (conv_mlp and "/mlp/" in name))
        state[timm_name(name, spec)] = array[:, :, None, None] if is_conv else array
    if isinstance(spec, ViTSpec):
        _flatten_pos_embed(state, spec)
    return {name: np.ascontiguousarray(array) for name, array in state.items()}


def timm_name(name: str, spec: Spec, *, is_plain: bool = False) -> str:
    """Returns `blocks.3.attn.qkv.weight` for `blocks/3/attn/qkv/kernel`; `is_plain` has a ViTDet's as a plain ViT's."""
    module, _, leaf = name.rpartition("/")
    modules = TIMM_MODULES.get("vit" if is_plain else spec.family, {})
    module = modules.get(module, module.replace("/", "."))
    return ".".join(filter(None, (module, TIMM_LEAVES.get(leaf, leaf))))


def _timm_leaves(spec: Spec, is_plain: bool) -> dict[str, Leaf]:
    """Adds to the leaves of a ViTDet those that a plain ViT may have and that upcycling drops."""
    leaves = expected_params(spec)
    if isinstance(spec, ViTDetSpec) and is_plain:
        shared = ("width", "depth", "num_heads", "mlp_dim", "patch_size", "rep_size")
        sizes = {name: getattr(spec, name) for name in shared}
        for pool in ("tok", "map"):
            leaves = expected_params(ViTSpec(**sizes, image_size=spec.image_size, pool=pool)) | leaves
    return leaves


def _is_plain_vit(state: State) -> bool:
    """Has a plain ViT's names: no relative positions, no neck."""
    return not any(name.endswith(("rel_pos_h", "rel_pos_w")) or name.startswith("neck") for name in state)


def _fit(weights: Weights, spec: Spec, *, is_plain: bool, source: str, is_timm: bool = False) -> Weights:
    """Resamples what depends on the grid, upcycles a plain ViT to a ViTDet, and checks strictly by the file's names."""
    is_vit_alone = is_plain and bool(weights.keys() & {"cls_token", "attn_pool/latent"})
    if isinstance(spec, ViTDetSpec) and (is_vit_alone or (is_plain and spec.rel_pos)):
        return big_vision.upcycled(weights, spec, source)
    weights = fit_image_size(weights, spec)
    if is_timm:
        _check_timm(weights, spec, is_plain=is_plain, source=source)
    else:
        check_weights(weights, spec, source=source)
    return weights


def _check_timm(weights: Weights, spec: Spec, *, is_plain: bool, source: str) -> None:
    """Checks by timm's names and shapes, which are those of the file; a position embedding has its grid."""
    leaves = expected_params(spec)
    own = {name: timm_name(name, spec, is_plain=is_plain) for name in leaves}
    arrays = {
        own.get(name, name): _to_timm_layout(array, leaves[name].kind) if name in leaves else array
        for name, array in weights.items()
    }
    expected = {name: _to_timm_layout(np.broadcast_to(0.0, leaf.shape), leaf.kind) for name, leaf in leaves.items()}
    shapes = {own[name]: array.shape for name, array in expected.items()}
    check_shapes(arrays, shapes, str(spec), source=source)


def _from_timm_layout(array: np.ndarray, leaf: Leaf, spec: Spec) -> np.ndarray:
    if leaf.kind == "linear":
        if isinstance(spec, ConvNeXtSpec | BiTSpec) and array.shape[2:] == (1, 1):  # conv_mlp=True, and BiT's head
            array = array[:, :, 0, 0]
        return array.T  # from (out, in)
    if leaf.kind == "conv" and array.ndim == 4:  # any other is left for the strict check to name
        return array.transpose(2, 3, 1, 0)  # from (out, in / groups, height, width)
    return array


def _to_timm_layout(array: np.ndarray, kind: Kind) -> np.ndarray:
    if kind == "linear":
        return array.T
    return array.transpose(3, 2, 0, 1) if kind == "conv" and array.ndim == 4 else array


def _unflatten_pos_embed(weights: Weights, spec: ViTSpec, told: Told | None, source: str) -> None:
    """Gives the position embedding its grid: (1 1+n d) -> (1 h w d), and adds its first row to the class token."""
    table, token = weights["pos_embed"], weights.get("cls_token")
    if table.ndim == 3 and (token is None or token.shape == (1, 1, table.shape[-1])):
        num_tokens, grid = (told and told.grid_of(table.shape[1])) or _grid_of(
            table.shape[1], spec.grid_size, has_token=token is not None, source=source
        )
        if num_tokens:
            weights["cls_token"] = token + table[:, :1]
        table = weights["pos_embed"] = table[:, num_tokens:].reshape(-1, *grid, table.shape[-1])
    if spec.pos_embed == "sincos2d" and big_vision.is_sincos2d(table):
        del weights["pos_embed"]


def _grid_of(num_rows: int, expected: tuple[int, int], *, has_token: bool, source: str) -> tuple[int, tuple[int, int]]:
    """Returns the rows before the grid's, 0 or 1, and the grid: the expected one where its size fits, else a square."""
    choices = (1, 0) if has_token else (0,)  # 0 with a class token: timm's no_embed_class
    for num_tokens in choices:
        if num_rows - num_tokens == math.prod(expected):
            return num_tokens, expected
    for num_tokens in choices:
        side = math.isqrt(max(num_rows - num_tokens, 0))
        if side and side**2 == num_rows - num_tokens:
            return num_tokens, (side, side)
    raise ValueError(
        f"{source}: pos_embed has {num_rows} rows, which fit neither the spec's {expected[0]}x{expected[1]} grid nor a "
        f"square{', with or without one for the class token' if has_token else ''}; give the image_size it was made for"
    )


def _flatten_pos_embed(state: Weights, spec: ViTSpec) -> None:
    if spec.pos_embed == "sincos2d":
        state["pos_embed"] = sincos2d(spec.grid_size, spec.width).astype(state["patch_embed.proj.weight"].dtype)
    if not isinstance(spec, ViTDetSpec):
        table = state["pos_embed"].reshape(1, -1, spec.width)
        no_position = np.zeros((1, int(spec.pool == "tok"), spec.width), table.dtype)
        state["pos_embed"] = np.concatenate([no_position, table], axis=1)


def _refuse_unsupported(state: State, source: str) -> None:
    found: dict[str, list[str]] = {}
    for name in state:
        for reason in {TIMM_UNSUPPORTED[part] for part in name.split(".") if part in TIMM_UNSUPPORTED}:
            found.setdefault(reason, []).append(name)
    if found:
        parts = [f"{reason} ({', '.join(names[:3] + ['...'] * (len(names) > 3))})" for reason, names in found.items()]
        raise ValueError(
            f"{source}: this variant is not supported: it has {'; '.join(parts)}; supported is what a spec describes"
        )
