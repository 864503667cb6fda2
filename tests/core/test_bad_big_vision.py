"""Bad checkpoints of big_vision's: one ValueError each, by the names in the file."""

import numpy as np
import pytest

from tests.big_vision_files import bit_tree, bit_v1_tree, scanned, under, vit_tree
from vitcmp.checkpoints import load_weights, to_timm
from vitcmp.params import init_weights

TINY = "vit_ti16:depth=1,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=80x112"
NECK = f"{TINY.replace('vit_', 'vitdet_')},global_blocks=0,window_size=3,neck_dim=16"
BIT = "bit_r26x1:depths=1x1,num_classes=3"
BIT_V1 = BIT.replace("bit", "bit_v1")
BLOCK = "Transformer/encoderblock_0"
QUERY = f"{BLOCK}/MultiHeadDotProductAttention_0/query"


def tree(**changes):
    """A good tree with some arrays changed or added, by names with __ for /."""
    arrays = vit_tree(init_weights(TINY), 3)
    return arrays | {name.replace("__", "/"): array for name, array in changes.items()}


def renamed(old, new):
    return {name.replace(old, new): array for name, array in tree().items()}


def doubled(arrays):
    """A scanned tree with its one block twice."""
    return {name: np.concatenate([x, x]) if "encoderblock/" in name else x for name, x in arrays.items()}


def two_towers():
    text = {"pos_embedding": np.ones((1, 3, 4)), "Embed_0/embedding": np.ones((9, 4))}
    return under("params/img", tree()) | under("params/txt", text) | {"params/t": np.ones(1)}


BAD_ARRAYS = {
    "deeper": (
        lambda: tree() | {"Transformer/encoderblock_1/LayerNorm_0/bias": np.ones(48)},
        "1 of its arrays do not fit ",
        "unexpected Transformer/encoderblock_1/LayerNorm_0/bias (48,)",
    ),
    "deeper, scan": (
        lambda: doubled(scanned(tree())),
        "16 of its arrays do not fit ",
        f"unexpected {QUERY.replace('_0/M', '/M')}/bias[1] (3, 16)",
    ),
    "other heads": (
        lambda: vit_tree(init_weights(TINY), 4),
        "7 of its arrays do not fit ",
        f"{QUERY}/kernel has shape (48, 4, 12), expected (48, 3, 16)",
    ),
    "no key": (
        lambda: {name: array for name, array in tree().items() if "/key/bias" not in name},
        "1 of its arrays do not fit ",
        f"missing {QUERY.replace('query', 'key')}/bias (3, 16)",
    ),
    "more": (lambda: tree(heads__kernel=np.ones(3)), "1 of its arrays do not fit ", "unexpected heads/kernel (3,)"),
    "misspelt": (
        lambda: renamed("encoder_norm/bias", "encoder_norm/bais"),
        "2 of its arrays do not fit ",
        "unexpected Transformer/encoder_norm/bais (48,); did you mean 'Transformer/encoder_norm/bias'?",
    ),
    "no grid": (
        lambda: tree(pos_embedding=np.ones((1, 33, 48))),
        "1 of its arrays do not fit ",
        "pos_embedding has 33 rows, which fit neither the spec's 5x7 grid nor a square, with or without one for the cl",
    ),
    "two position embeddings": (  # not taken for NaFlex's grid
        lambda: tree(pos_embedding=np.ones((2, 35, 48))),
        "1 of its arrays do not fit ",
        "pos_embedding has shape (2, 5, 7, 48), expected (1, 35, 48)",
    ),
    "other width": (
        lambda: tree(pos_embedding=np.ones((1, 35, 24))),
        "1 of its arrays do not fit ",
        "pos_embedding has shape (1, 5, 7, 24), expected (1, 35, 48)",
    ),
    "NaN": (
        lambda: {name: array * np.nan for name, array in tree().items()},
        "24 of its arrays do not fit ",
        "Transformer/encoder_norm/scale has values that are not finite",
    ),
    "integers": (lambda: tree(cls=np.ones((1, 1, 48), int)), "not of floating point: ", "cls (int64); allowed are"),
}
BAD_MODELS = {
    "class token too much": (tree, f"{TINY},pool=gap", "1 of its arrays do not fit .*\n  unexpected cls .1, 1, 48"),
    "head too much": (tree, f"{TINY},num_classes=0", r"unexpected head/kernel .48, 10.\n  unexpected head/bias .10"),
    "another family": (tree, "resnet18:width=8", "holds big_vision's vit, and the model is a resnet: "),
    "a BiT": (lambda: bit_tree(init_weights(BIT)), TINY, "holds big_vision's bit, and the model is a vit: "),
    "a V1": (lambda: bit_v1_tree(init_weights(BIT_V1)), BIT, "holds big_vision's bit_v1, and the model is a bit: "),
    "no V1": (lambda: bit_tree(init_weights(BIT)), BIT_V1, "holds big_vision's bit, and the model is a bit_v1: "),
    "a hybrid": (lambda: tree(conv_root__kernel=np.ones((7, 7, 3, 64))), TINY, "not supported: a hybrid, a ViT on"),
    "a neck": (tree, NECK, "must be a ViTDet with neck_dim=0"),
}
MIXED = {
    "two forms": (
        lambda: tree() | scanned(tree()),
        f"two layouts of big_vision are mixed: {BLOCK}/LayerNorm_0/scale and {BLOCK[:-2]}/LayerNorm_0/scale[0] are",
    ),
    "two ages": (
        lambda: tree() | {f"{BLOCK}/LayerNorm_2/bias": np.ones(48)},
        f"{BLOCK}/LayerNorm_1/bias and {BLOCK}/LayerNorm_2/bias are the same array",
    ),
    "two libraries": (
        lambda: tree() | to_timm(init_weights(TINY), TINY),
        "layouts are mixed: big_vision (embedding/kernel), timm (patch_embed.proj.weight); allowed is one",
    ),
    "ours and theirs": (
        lambda: tree() | init_weights(TINY),
        "layouts are mixed: big_vision (embedding/kernel), canonical (patch_embed/proj/kernel); allowed is one",
    ),
    "two trees": (
        lambda: under("params", tree()) | under("ema", tree()),
        "has weights under params/ and others beside it (ema/embedding/kernel, ema/embedding/bias, ",
    ),
    "a pickle beside": (
        lambda: under("params", tree()) | {"opt/0/count": np.array([print])},
        "Object arrays cannot be loaded",
    ),
}
BAD_SUBTREES = {
    "none named": (two_towers, "", "its weights are in subtrees; name one: {path}:img, {path}:txt"),
    "none named in a subtree": (
        two_towers,
        ":params",
        "its weights are in subtrees; name one: {path}:params/img, {path}:params/txt",
    ),
    "an optimizer's alone": (
        lambda: under("opt/0/mu", tree()) | {"opt/0/count": np.ones(())},
        "",
        "holds an optimizer's state (opt/0/mu) and no weights; allowed are weights, bare or under params, opt/target,",
    ),
    "an optimizer's beside them": (
        lambda: under("opt/0/mu", tree()) | under("net/img", tree()),
        "",
        "its weights are in subtrees; name one: {path}:net/img",
    ),
    "misspelt": (two_towers, ":image", "'image' is not there; did you mean 'img'?; subtrees in the file: img, txt"),
    "not there": (tree, ":img", "'img' is not there; subtrees in the file: Transformer, embedding, head"),
    "an array": (two_towers, ":t", "'t' is an array, not a subtree; subtrees in the file: img, txt"),
    "twice": (
        lambda: under("params/img", tree()) | under("img", tree()),
        ":img",
        "several subtrees go by that name; write one of img, params/img",
    ),
    "empty": (tree, ":", "names no subtree after the colon; write {path}, or {path}:img"),
    "of another model": (two_towers, ":txt", "unexpected Embed_0/embedding (9, 4)"),
}


def error_of(path, arrays, model=TINY, subtree=""):
    np.savez(path, **arrays)
    with pytest.raises(ValueError) as caught:
        load_weights(f"{path}{subtree}", model)
    assert str(caught.value).startswith(f"{path}{subtree}: ")
    return str(caught.value)


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_listed_by_their_own_names(tmp_path, case):
    make, what, which = BAD_ARRAYS[case]
    message = error_of(tmp_path / "w.npz", make())
    assert what in message
    assert which in message


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_the_file_is_not_of_is_named(tmp_path, case):
    make, model, pattern = BAD_MODELS[case]
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(error_of(tmp_path / "w.npz", make(), model))


@pytest.mark.parametrize("case", MIXED)
def test_a_file_of_two_layouts_is_refused(tmp_path, case):
    make, message = MIXED[case]
    assert message in error_of(tmp_path / "w.npz", make())


@pytest.mark.parametrize("case", BAD_SUBTREES)
def test_a_subtree_that_is_not_there_is_answered_by_those_that_are(tmp_path, case):
    make, subtree, message = BAD_SUBTREES[case]
    path = tmp_path / "w.npz"
    assert message.replace("{path}", str(path)) in error_of(path, make(), subtree=subtree)
