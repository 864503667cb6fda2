"""The names and layouts of big_vision's checkpoints, as tables: ViT of every age, BiT of both kinds.

Source: google-research/big_vision, `models/vit.py` (fix_old_checkpoints, scan_to_pyloop), `models/bit_paper.py`
(maybe_convert_big_transfer_format) and `models/bit.py` (fix_old_checkpoints). Deviation: whether the class token has a
position is told by the names before it is guessed from the number of rows, and a position embedding of another grid is
resampled as in timm (`fit_image_size`), where big_vision's loader takes scipy's linear zoom between the corner patches.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from vitcmp.params import (
    Leaf,
    Weights,
    check_weights,
    expected_params,
    fit_image_size,
    nearest_of,
    sincos2d,
    upcycle,
)
from vitcmp.specs import BiTSpec, BiTV1Spec, Spec, ViTDetSpec, ViTSpec, did_you_mean, get_spec
from vitcmp.weight_files import State, as_floats

Arrays = Mapping[str, np.ndarray]

# Modules of today's names by canonical ones; {} is the number of a block. Several are joined along their last axis.
BLOCK, MAP = "Transformer/encoderblock_{}", "MAPHead_0"
ATTENTION, MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"
VIT_MODULES: dict[str, tuple[str, ...]] = {
    "patch_embed/proj": ("embedding",),
    "blocks/{}/norm1": (f"{BLOCK}/LayerNorm_0",),
    "blocks/{}/attn/qkv": tuple(f"{BLOCK}/{ATTENTION}/{part}" for part in ("query", "key", "value")),
    "blocks/{}/attn/proj": (f"{BLOCK}/{ATTENTION}/out",),
    "blocks/{}/norm2": (f"{BLOCK}/LayerNorm_1",),
    "blocks/{}/mlp/fc1": (f"{BLOCK}/{MLP}/Dense_0",),
    "blocks/{}/mlp/fc2": (f"{BLOCK}/{MLP}/Dense_1",),
    "norm": ("Transformer/encoder_norm",),
    "attn_pool/q": (f"{MAP}/{ATTENTION}/query",),
    "attn_pool/kv": (f"{MAP}/{ATTENTION}/key", f"{MAP}/{ATTENTION}/value"),
    "attn_pool/proj": (f"{MAP}/{ATTENTION}/out",),
    "attn_pool/norm": (f"{MAP}/LayerNorm_0",),
    "attn_pool/mlp/fc1": (f"{MAP}/{MLP}/Dense_0",),
    "attn_pool/mlp/fc2": (f"{MAP}/{MLP}/Dense_1",),
    "pre_logits": ("pre_logits",),
    "head": ("head",),
}
VIT_ARRAYS = {"cls_token": "cls", "pos_embed": "pos_embedding", "attn_pool/latent": f"{MAP}/probe"}
INTO_HEADS = ("attn/qkv", "attn_pool/q", "attn_pool/kv")  # (d, heads, head_dim), and out of them (heads, head_dim, d)
OUT_OF_HEADS = ("attn/proj", "attn_pool/proj")
BIT_MODULES = {"stem/conv": "root_block/conv_root", "norm": "norm-pre-head", "head/fc": "head"}
BIT_V1_MODULES = {"stem/conv": "conv_root", "stem/norm": "gn_root", "head/fc": "head"}
BIT_UNIT = {"downsample/conv": "conv_proj", "downsample/norm": "gn_proj"}
BIT_UNIT |= {f"conv{i}": f"conv{i}" for i in "123"} | {f"norm{i}": f"gn{i}" for i in "123"}

# Older names, each with today's: augreg's (before Linen, modules were numbered by their order), ViT-G's head, and the
# TensorFlow dumps of BiT, some of whose modules carry the numbers of one long count.
UNIT, CONV, NORM = r"^resnet/(block\d+/unit\d+)", r"standardized_conv2d(?:_\d+)?/", r"group_norm(?:_\d+)?/"
OLD_NAMES = {
    re.compile(old): new
    for old, new in {
        r"^Transformer/(?:posembed_input/)?pos_embedding$": "pos_embedding",
        r"(/encoderblock(?:_\d+)?/)LayerNorm_2/": r"\1LayerNorm_1/",
        r"(/encoderblock(?:_\d+)?/)MultiHeadDotProductAttention_1/": rf"\1{ATTENTION}/",
        r"(/encoderblock(?:_\d+)?/)MlpBlock_3/": rf"\1{MLP}/",
        r"^probe$": f"{MAP}/probe",
        r"^(?:MAPHead_\d+/)?(LayerNorm|MlpBlock|MultiHeadDotProductAttention)_\d+/": rf"{MAP}/\1_0/",
        rf"^resnet/root_block/{CONV}": "root_block/conv_root/",
        rf"^resnet/{NORM}": "norm-pre-head/",
        r"^resnet/head/conv2d(?:_\d+)?/": "head/",
        rf"{UNIT}/a/proj/{CONV}": r"\1/conv_proj/",
        **{rf"{UNIT}/{letter}/{CONV}": rf"\1/conv{i}/" for i, letter in enumerate("abc", 1)},
        **{rf"{UNIT}/{letter}/{NORM}": rf"\1/gn{i}/" for i, letter in enumerate("abc", 1)},
        r"((?:^|/)(?:gn\d|norm-pre-head)/)gamma$": r"\1scale",
        r"((?:^|/)(?:gn\d|norm-pre-head)/)beta$": r"\1bias",
    }.items()
}
# What only big_vision's trees begin with.
ROOTS = re.compile(
    r"(embedding|Transformer|cls|pos_embedding|MAPHead_\d+|probe|LayerNorm_\d+|MlpBlock_\d+|MultiHeadDotProduct\w+|"
    r"root_block|norm-pre-head|conv_root|gn_root|resnet|block\d+)(/|$)"
)
BIT_NORM = re.compile(r"(^|/)(gn\w+|norm-pre-head)/(scale|bias)$")


class Part(NamedTuple):
    """One of the arrays that big_vision keeps a canonical one in."""

    name: str
    shape: tuple[int, ...]


class Entry(NamedTuple):
    """An array under its name in the file, and its part of a scanned one: `Transformer/encoderblock/.../bias[3]`."""

    own_name: str
    array: np.ndarray


def from_big_vision(state: State, spec: Spec | str, *, source: str = "state") -> Weights:
    """Returns canonical weights from a tree of big_vision's ViT or BiT, flattened by `/`, strictly.

    Names and layouts are today's, scanned, or old ones (see the tables above). A position of the class token is folded
    into the token; heads are joined; a ViT's tree is upcycled where `spec` is a ViTDet's. Raises one ValueError that
    lists all that does not fit by the names in the file.
    """
    spec = get_spec(spec)
    _refuse_other_families(state, spec, source)
    entries = todays_names(as_floats(state, source), source)
    faults = [_fold_table(entries, spec)] if isinstance(spec, ViTSpec) and "pos_embedding" in entries else []
    leaves = {name: leaf for name, leaf in expected_params(spec).items() if leaf.kind != "rel_pos"}
    parts = {name: _parts_of(name, leaf, spec) for name, leaf in leaves.items()}
    expected = {part.name: part.shape for places in parts.values() for part in places}
    if isinstance(spec, ViTDetSpec):  # what upcycling drops
        dropped = ("cls", "MAPHead_0", *(() if spec.num_classes else ("pre_logits", "head")))
        entries = {name: x for name, x in entries.items() if name in expected or name.split("/")[0] not in dropped}
    if faults := [*filter(None, faults), *_misfits(entries, expected)]:
        raise ValueError(f"{source}: {len(faults)} of its arrays do not fit {spec}:\n  " + "\n  ".join(faults))
    weights = {
        name: _join([entries[part.name].array for part in places], leaves[name]) for name, places in parts.items()
    }
    return upcycled(weights, spec, source) if isinstance(spec, ViTDetSpec) else fit_image_size(weights, spec)


def to_big_vision(weights: Weights, spec: Spec | str, *, scan: bool = False) -> Weights:
    """Returns the weights under big_vision's names of today and in its layouts: the bare tree, flattened by `/`.

    A class token comes back as `cls`, with no position of its own: big_vision has none, and the token holds it. `scan`
    stacks a ViT's blocks. A sincos2d embedding is not written, since big_vision computes it. Raises ValueError for a
    model that big_vision does not have and for weights that do not fit.
    """
    spec = get_spec(spec)
    if isinstance(spec, ViTDetSpec) or not isinstance(spec, ViTSpec | BiTSpec):
        raise ValueError(f"spec={spec}: big_vision has no {spec.family}; allowed are a plain ViT and a BiT")
    if scan and isinstance(spec, BiTSpec):
        raise ValueError("scan=True: only a ViT's blocks are stacked, the units of a BiT differ in shape")
    check_weights(weights, spec)
    state: Weights = {}
    for name, leaf in expected_params(spec).items():
        state |= _split(np.asarray(weights[name]), _parts_of(name, leaf, spec))
    return {name: np.ascontiguousarray(x) for name, x in (_scanned(state) if scan else state).items()}


def todays_names(arrays: Arrays, source: str) -> dict[str, Entry]:
    """Returns the arrays under today's names, block by block, in today's shapes; what has no name there keeps its own.

    Raises ValueError where two arrays come to the same name, as in a file of two layouts.
    """
    entries: dict[str, Entry] = {}
    for own_name, array in arrays.items():
        for name, entry in _unscanned(own_name, array):
            for old, new in OLD_NAMES.items():
                name = old.sub(new, name)
            if name in entries:
                both = f"{entries[name].own_name} and {entry.own_name}"
                raise ValueError(f"{source}: two layouts of big_vision are mixed: {both} are the same array")
            entries[name] = entry
    is_v1 = any(name.startswith(("conv_root/", "gn_root/")) for name in entries)
    embedding, table = entries.get("embedding/kernel"), entries.get("pos_embedding")
    if embedding and table and embedding.array.ndim == 2 and table.array.ndim == 3:  # NaFlex: (h, w, d)
        entries["pos_embedding"] = table._replace(array=table.array[None])
    return {name: entry._replace(array=_todays_shape(name, entry, is_v1)) for name, entry in entries.items()}


def canonical_name(name: str) -> str:
    """Returns the canonical name of today's one, of several parts the first one's; others keep theirs."""
    module, _, kind = name.rpartition("/")
    if match := re.fullmatch(r"block(\d+)/unit(\d+)/(\w+)", module):
        unit = {theirs: ours for ours, theirs in BIT_UNIT.items()}.get(match[3], match[3])
        return f"stages/{int(match[1]) - 1}/blocks/{int(match[2]) - 1}/{unit}/{kind}"
    block = re.search(r"(?<=encoderblock_)\d+", module)
    template = re.sub(r"(?<=encoderblock_)\d+", "{}", module)
    names = {theirs[0]: ours for ours, theirs in VIT_MODULES.items()}
    bits = (*BIT_MODULES.items(), *BIT_V1_MODULES.items())
    names |= {theirs: ours for ours, theirs in bits if theirs != "head"}  # which is a ViT's too
    arrays = {theirs: ours for ours, theirs in VIT_ARRAYS.items()}
    return arrays.get(name) or f"{names.get(template, template).format(block and block[0])}/{kind}"


def family_of(names: Iterable[str], source: str) -> type[Spec] | None:
    """Returns the family of big_vision's model, None where the names do not tell; ValueError for one with no spec."""
    roots = {name.split("/")[0] for name in names}
    is_vit, is_v1 = bool(roots & {"Transformer", "embedding"}), bool(roots & {"conv_root", "gn_root"})
    if is_vit and is_v1:
        raise ValueError(
            f"{source}: this model of big_vision is not supported: a hybrid, a ViT on a ResNet (embedding beside "
            "conv_root); supported are the models of models/vit.py, bit_paper.py and bit.py"
        )
    is_v2 = roots & {"root_block", "norm-pre-head", "resnet"}
    return ViTSpec if is_vit else BiTV1Spec if is_v1 else BiTSpec if is_v2 else None


def upcycled(weights: Weights, spec: ViTDetSpec, source: str) -> Weights:
    """Upcycles a plain ViT's weights; errors name their source."""
    try:
        return upcycle(weights, spec)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def is_sincos2d(table: np.ndarray) -> bool:
    """Says whether a position embedding (1 h w d) is the fixed one, to the rounding of float32."""
    if table.ndim != 4 or table.shape[-1] % 4 or table.shape[-1] < 8:
        return False
    return table.shape[0] == 1 and np.allclose(table, sincos2d(table.shape[1:3], table.shape[-1]), rtol=0, atol=1e-6)


def _refuse_other_families(state: State, spec: Spec, source: str) -> None:
    """Raises ValueError for what big_vision has and no spec describes, and for another family than that of `spec`."""
    theirs = family_of(state, source)
    ours = ViTSpec if isinstance(spec, ViTSpec) else type(spec)
    if ours not in (ViTSpec, BiTSpec, BiTV1Spec) or theirs not in (ours, None):
        what = theirs.family if theirs else "names"
        raise ValueError(f"{source}: holds big_vision's {what}, and the model is a {spec.family}: {spec}")
    if isinstance(spec, ViTDetSpec) and spec.neck_dim:
        upcycled({}, spec, source)  # raises


def _parts_of(name: str, leaf: Leaf, spec: Spec) -> tuple[Part, ...]:
    """Returns where big_vision keeps a leaf: one array, or several to be joined along the last axis."""
    if isinstance(spec, BiTSpec):
        is_wide = leaf.kind in ("norm_scale", "norm_bias") and not isinstance(spec, BiTV1Spec)
        return (Part(_bit_name(name, spec), (1, 1, 1, *leaf.shape) if is_wide else leaf.shape),)
    assert isinstance(spec, ViTSpec)
    if name in VIT_ARRAYS:
        is_flat = leaf.kind == "pos_embed"
        return (Part(VIT_ARRAYS[name], (1, math.prod(leaf.shape[1:3]), leaf.shape[3]) if is_flat else leaf.shape),)
    module, _, kind = name.rpartition("/")
    block = re.search(r"(?<=/)\d+(?=/)", module)
    theirs = VIT_MODULES[module.replace(f"/{block[0]}/", "/{}/") if block else module]
    shape = _split_heads(module, kind, leaf.shape, spec.num_heads, len(theirs))
    return tuple(Part(f"{part.format(block and block[0])}/{kind}", shape) for part in theirs)


def _join(parts: Iterable[np.ndarray], leaf: Leaf) -> np.ndarray:
    """Makes one canonical array of its parts; a position embedding stays as it is."""
    if leaf.kind == "pos_embed":
        return next(iter(parts))
    return np.concatenate([part.reshape(*leaf.shape[:-1], -1) for part in parts], axis=-1)


def _split(array: np.ndarray, parts: tuple[Part, ...]) -> Weights:
    """Undoes `_join`."""
    pieces = np.split(array, len(parts), axis=-1)
    return {part.name: piece.reshape(part.shape) for part, piece in zip(parts, pieces, strict=True)}


def _scanned(state: Arrays) -> Weights:
    """Stacks the blocks of a ViT's tree along a first axis, as `scan=True` in big_vision has them."""
    stacked: dict[str, dict[int, np.ndarray]] = {}
    rest = {}
    for name, array in state.items():
        if match := re.fullmatch(r"(Transformer/encoderblock)_(\d+)(/.*)", name):
            stacked.setdefault(match[1] + match[3], {})[int(match[2])] = array
        else:
            rest[name] = array
    return rest | {name: np.stack([blocks[i] for i in sorted(blocks)]) for name, blocks in stacked.items()}


def _fold_table(entries: dict[str, Entry], spec: ViTSpec) -> str | None:
    """Gives the position embedding its grid, (1 n d) -> (1 h w d), and adds a class token's row to the token.

    A fixed embedding that `spec` computes is left out. Returns what is wrong where the rows fit no grid.
    """
    own_name, table = entries["pos_embedding"]
    token = entries.get("cls")
    if table.ndim == 3:
        is_old = own_name.startswith("Transformer/")
        found = _grid_of(table.shape[1], spec.grid_size, has_token=token is not None, is_old=is_old)
        if found is None:
            height, width = spec.grid_size
            return (
                f"{own_name} has {table.shape[1]} rows, which fit neither the spec's {height}x{width} grid nor a square"
                f"{', with or without one for the class token' if token else ''}; give the image_size it was made for"
            )
        num_tokens, grid = found
        if token and num_tokens and token.array.shape == (1, 1, table.shape[2]):
            entries["cls"] = token._replace(array=token.array + table[:, :1])
        table = table[:, num_tokens:].reshape(len(table), *grid, table.shape[2])
        entries["pos_embedding"] = Entry(own_name, table)
    if spec.pos_embed == "sincos2d" and is_sincos2d(table):
        del entries["pos_embedding"]
    return None


def _grid_of(
    num_rows: int, expected: tuple[int, int], *, has_token: bool, is_old: bool
) -> tuple[int, tuple[int, int]] | None:
    """Returns the rows before the grid's, 0 or 1, and the grid: the expected one or a square; None where none fits.

    In old files (`Transformer/posembed_input`) a class token, where there is one, was joined before positions were
    added, and has the first; in today's it has none. The other is tried where this fits no grid.
    """
    for num_tokens in ((1, 0) if is_old else (0, 1)) if has_token else (0,):
        rows = num_rows - num_tokens
        side = math.isqrt(max(rows, 0))
        if rows == math.prod(expected):
            return num_tokens, expected
        if rows > 0 and rows == side**2:
            return num_tokens, (side, side)
    return None


def _misfits(entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Lists what is missing, unexpected, misshapen or not finite, by the names that the file itself has.

    `expected` has shapes by today's names; of a position embedding only the width counts, since it is resampled.
    """
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in entries]
    absent = nearest_of(entries, expected)
    for name, (own_name, array) in entries.items():
        shape = expected.get(name)
        if shape is None:
            faults.append(f"unexpected {own_name} {array.shape}{did_you_mean(own_name, absent)}")
        elif array.shape != shape and not (name == "pos_embedding" and _is_table(array, shape[-1])):
            faults.append(f"{own_name} has shape {array.shape}, expected {shape}")
        elif not np.isfinite(array).all():
            faults.append(f"{own_name} has values that are not finite")
    return faults


def _unscanned(name: str, array: np.ndarray) -> list[tuple[str, Entry]]:
    match = re.fullmatch(r"(Transformer/encoderblock)(/.*)", name)
    if not match or not array.ndim:
        return [(name, Entry(name, array))]
    return [(f"{match[1]}_{i}{match[2]}", Entry(f"{name}[{i}]", array[i])) for i in range(len(array))]


def _todays_shape(name: str, entry: Entry, is_v1: bool) -> np.ndarray:
    own_name, array = entry
    if BIT_NORM.search(name) and (array.size,) == array.shape[-1:]:
        return array.reshape(-1) if is_v1 else array.reshape(1, 1, 1, -1)
    if own_name.startswith("resnet/") and name == "head/kernel" and array.shape[:2] == (1, 1):
        return array[0, 0]  # from a 1x1 convolution
    if name == "embedding/kernel" and array.ndim == 2:  # NaFlex: a linear layer on flattened patches
        side = math.isqrt(array.shape[0] // 3)
        return array.reshape(side, side, 3, -1) if 3 * side**2 == array.shape[0] else array
    return array


def _is_table(array: np.ndarray, width: int) -> bool:
    return array.ndim in (3, 4) and array.shape[0] == 1 and array.shape[-1] == width and array.size > 0


def _bit_name(name: str, spec: BiTSpec) -> str:
    is_v1 = isinstance(spec, BiTV1Spec)
    module, _, kind = name.rpartition("/")
    if match := re.fullmatch(r"stages/(\d+)/blocks/(\d+)/(.+)", module):
        unit = int(match[2]) + 1
        return f"block{int(match[1]) + 1}/unit{unit if is_v1 else f'{unit:02}'}/{BIT_UNIT[match[3]]}/{kind}"
    return f"{(BIT_V1_MODULES if is_v1 else BIT_MODULES)[module]}/{kind}"


def _split_heads(module: str, kind: str, shape: tuple[int, ...], num_heads: int, num_parts: int) -> tuple[int, ...]:
    if module.endswith(INTO_HEADS):
        return (*shape[:-1], num_heads, shape[-1] // num_parts // num_heads)
    if module.endswith(OUT_OF_HEADS) and kind == "kernel":
        return (num_heads, shape[0] // num_heads, shape[1])
    return shape
