"""Checkpoints of big_vision's made by hand, in every layout: a writer that knows nothing of `vitcmp.big_vision`."""

import numpy as np


def vit_tree(weights, num_heads):
    """Names and shapes of big_vision's `models/vit.py`, from canonical weights of a plain ViT."""
    depth = sum(name.endswith("/norm1/scale") for name in weights)
    tree = put(weights, {"embedding": "patch_embed/proj", "Transformer/encoder_norm": "norm"})
    for i in range(depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks/{i}"
        tree |= put(weights, {f"{theirs}/LayerNorm_0": f"{ours}/norm1", f"{theirs}/LayerNorm_1": f"{ours}/norm2"})
        tree |= put_mlp(weights, f"{theirs}/MlpBlock_0", f"{ours}/mlp")
        fused = {"qkv": ["query", "key", "value"]}
        tree |= put_attention(weights, f"{theirs}/MultiHeadDotProductAttention_0", f"{ours}/attn", fused, num_heads)
    if "cls_token" in weights:
        tree["cls"] = weights["cls_token"]
    if "pos_embed" in weights:
        tree["pos_embedding"] = weights["pos_embed"].reshape(1, -1, weights["pos_embed"].shape[-1])
    if "attn_pool/latent" in weights:
        tree["MAPHead_0/probe"] = weights["attn_pool/latent"]
        fused = {"q": ["query"], "kv": ["key", "value"]}
        tree |= put_attention(weights, "MAPHead_0/MultiHeadDotProductAttention_0", "attn_pool", fused, num_heads)
        tree |= put(weights, {"MAPHead_0/LayerNorm_0": "attn_pool/norm"})
        tree |= put_mlp(weights, "MAPHead_0/MlpBlock_0", "attn_pool/mlp")
    return tree | put(weights, {"pre_logits": "pre_logits", "head": "head"})


def put(weights, modules):
    leaves = ("kernel", "scale", "bias")
    pairs = [(f"{theirs}/{leaf}", f"{ours}/{leaf}") for theirs, ours in modules.items() for leaf in leaves]
    return {theirs: weights[ours] for theirs, ours in pairs if ours in weights}


def put_mlp(weights, theirs, ours):
    return put(weights, {f"{theirs}/Dense_0": f"{ours}/fc1", f"{theirs}/Dense_1": f"{ours}/fc2"})


def put_attention(weights, theirs, ours, fused, num_heads):
    kernel, bias = weights[f"{ours}/proj/kernel"], weights[f"{ours}/proj/bias"]
    tree = {f"{theirs}/out/kernel": kernel.reshape(num_heads, -1, kernel.shape[1]), f"{theirs}/out/bias": bias}
    for joined, names in fused.items():
        for leaf in ("kernel", "bias"):
            parts = np.split(weights[f"{ours}/{joined}/{leaf}"], len(names), axis=-1)
            for name, part in zip(names, parts, strict=True):
                tree[f"{theirs}/{name}/{leaf}"] = part.reshape(*part.shape[:-1], num_heads, -1)
    return tree


def scanned(tree):
    """The form of `scan=True`: one block, each of whose arrays has a first axis of depth."""
    depth = sum(name.endswith("/LayerNorm_0/bias") and "MAPHead" not in name for name in tree)
    stacked = {name: array for name, array in tree.items() if "encoderblock_" not in name}
    for name in tree:
        if "encoderblock_0/" in name:
            blocks = [tree[name.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(depth)]
            stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(blocks)
    return stacked


def augreg(tree, token_position=None):
    """The names of before Linen; with a class token its position is the first row, and is added to the token."""
    old = {}
    for name, array in tree.items():
        if "encoderblock_" in name:
            name = name.replace("LayerNorm_1", "LayerNorm_2").replace("MlpBlock_0", "MlpBlock_3")
            name = name.replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1")
        old[name] = array
    old["Transformer/posembed_input/pos_embedding"] = old.pop("pos_embedding")
    if token_position is not None:
        rows = [token_position, old["Transformer/posembed_input/pos_embedding"]]
        old["Transformer/posembed_input/pos_embedding"] = np.concatenate(rows, axis=1)
    return old


def bit_tree(weights):
    """Names and shapes of `models/bit_paper.py`."""
    tree = {}
    for name, array in weights.items():
        is_norm = name.split("/")[-2].startswith("norm")
        name = name.replace("stem/conv/", "root_block/conv_root/").replace("head/fc/", "head/")
        if name.startswith("norm/"):
            name = f"norm-pre-head/{name.removeprefix('norm/')}"
        for stage in range(9):
            name = name.replace(f"stages/{stage}/blocks/", f"block{stage + 1}/unit")
        if "/unit" in name:
            block, unit, *rest = name.split("/")
            name = "/".join([block, f"unit{int(unit.removeprefix('unit')) + 1:02}", *rest])
            name = name.replace("downsample/conv", "conv_proj").replace("/norm", "/gn")
        tree[name] = array[None, None, None] if is_norm else array
    return tree


def bit_v1_tree(weights, *, is_wide=False):
    """Names and shapes of `models/bit.py`; `is_wide` is old Linen's GroupNorm."""
    tree = {}
    for name, array in bit_tree(weights).items():
        name = (
            name.replace("root_block/conv_root", "conv_root").replace("stem/norm", "gn_root").replace("unit0", "unit")
        )
        name = name.replace("downsample/gn", "gn_proj")
        tree[name] = array if is_wide or array.shape[:3] != (1, 1, 1) else array[0, 0, 0]
    return tree


def bit_dump(weights, *, is_numbered=False):
    """The TensorFlow dumps in which BiT was first published; in some, convolutions are numbered by one long count."""
    tree, count = {}, 0
    for name, array in bit_tree(weights).items():
        conv = "standardized_conv2d"
        if is_numbered and "conv" in name:
            count += 1
            conv += f"_{count}" if count > 1 else ""
        for i, letter in enumerate("abc", 1):
            name = name.replace(f"/conv{i}/", f"/{letter}/{conv}/").replace(f"/gn{i}/", f"/{letter}/group_norm/")
        name = (
            name.replace("conv_root", conv)
            .replace("conv_proj", f"a/proj/{conv}")
            .replace("norm-pre-head", "group_norm")
        )
        name = name.replace("head/", "head/conv2d/")
        if "group_norm" in name:
            name, array = name.replace("/scale", "/gamma").replace("/bias", "/beta"), array[0, 0, 0]
        tree[f"resnet/{name}"] = array[None, None] if name == "head/conv2d/kernel" else array
    return tree


def under(prefix, tree):
    return {f"{prefix}/{name}": array for name, array in tree.items()}


def as_void(array):
    """bfloat16 as numpy stores it: two bytes of no meaning; rounded to nearest even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view("V2")


def widened(array):
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
