"""big_vision's checkpoints: every layout in which they are found, made by hand in `tests/big_vision_files.py`."""

import itertools

import numpy as np
import pytest

from tests.big_vision_files import (
    as_void,
    augreg,
    bit_dump,
    bit_tree,
    bit_v1_tree,
    scanned,
    under,
    vit_tree,
    widened,
)
from vitcmp.big_vision import from_big_vision, to_big_vision
from vitcmp.checkpoints import load_weights, to_timm
from vitcmp.params import fit_image_size, init_weights, sincos2d, upcycle
from vitcmp.specs import get_spec

VIT = "vit_ti16:depth=3,width=48,num_heads=4,mlp_dim=80,num_classes=10,image_size=80x112"
VITDET = "vitdet_ti16:depth=3,width=48,num_heads=4,mlp_dim=80,image_size=96x64,window_size=3,global_blocks=1"
BIT = "bit_r26x1:depths=2x1x3x1,num_classes=7"
BIT_V1 = "bit_v1_r26x1:depths=2x1x3x1,num_classes=7"
POOLS = ("tok", "gap", "map")
VIT_LAYOUTS = {"today": dict, "scan": scanned, "augreg": augreg}
BIT_LAYOUTS = {
    "today": (BIT, bit_tree),
    "no broadcast axes": (BIT, lambda weights: without_broadcast_axes(bit_tree(weights))),
    "dump": (BIT, bit_dump),
    "numbered dump": (BIT, lambda weights: bit_dump(weights, is_numbered=True)),
    "V1": (BIT_V1, bit_v1_tree),
    "V1 of old Linen": (BIT_V1, lambda weights: bit_v1_tree(weights, is_wide=True)),
}
# What is around a tree in a file, and what names it.
OPTIMIZER = {"opt/0/count": np.array(3, np.int32), "opt/0/mu/head/bias": np.ones(10, np.float32)}
STATE = {"opt/state/step": np.array(7), "opt/state/param_states/head/bias/momentum": np.ones(2, np.float32)}
WRAPPED = {
    "raw": (lambda tree: tree, ""),
    "params": (lambda tree: under("params", tree) | OPTIMIZER | {"chrono/accum_train_time": np.array(1.0)}, ""),
    "opt/target": (lambda tree: under("opt/target", tree) | STATE, ""),
    "opt/target/params": (lambda tree: under("opt/target/params", tree) | STATE, ""),
    "params, named": (lambda tree: under("params", tree) | OPTIMIZER, ":params"),
    "img": (lambda tree: under("img", tree) | under("txt", text_tower()) | {"t": np.ones(1)}, ":img"),
    "params/img": (lambda tree: under("params/img", tree) | under("params/txt", text_tower()) | OPTIMIZER, ":img"),
    "the whole path": (lambda tree: under("params/img", tree) | under("params/txt", text_tower()), ":/params/img/"),
    "deep": (lambda tree: under("params/student/img", tree) | under("params/teacher", tree), ":student/img"),
}  # fmt: skip


def text_tower():
    return {"Embed_0/embedding": np.ones((9, 4)), "pos_embedding": np.ones((1, 3, 4)), "head/kernel": np.ones((4, 2))}


def without_broadcast_axes(tree):
    return {name: array[0, 0, 0] if array.shape[:3] == (1, 1, 1) else array for name, array in tree.items()}


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def heads_of(model):
    return get_spec(model).num_heads


@pytest.mark.parametrize(("layout", "pool"), [*itertools.product(VIT_LAYOUTS, POOLS)])
def test_a_vit_of_every_layout_loads_bit_for_bit(tmp_path, layout, pool):
    model = f"{VIT},pool={pool}"
    weights = init_weights(model)
    np.savez(tmp_path / "w.npz", **VIT_LAYOUTS[layout](vit_tree(weights, heads_of(model))))
    assert_equal(load_weights(tmp_path / "w.npz", model), weights)


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("layout", ["today", "scan"])
def test_a_tree_is_found_in_whatever_wraps_it(tmp_path, layout, wrapping):
    model = f"{VIT},pool=map"
    weights = init_weights(model)
    wrap, subtree = WRAPPED[wrapping]
    np.savez(tmp_path / "w.npz", **wrap(VIT_LAYOUTS[layout](vit_tree(weights, heads_of(model)))))
    assert_equal(load_weights(f"{tmp_path}/w.npz{subtree}", model), weights)


@pytest.mark.parametrize(
    "options",
    [
        "pool=gap,pos_embed=sincos2d,rep_size=true",
        "pool=tok,rep_size=20",
        "pool=map,num_classes=0",
        "num_heads=1,depth=1",
    ],
)
@pytest.mark.parametrize("layout", ["today", "scan"])
def test_a_vit_of_every_option_loads_and_writes_back_bit_for_bit(options, layout):
    model = f"{VIT},{options}"
    weights = init_weights(model)
    tree = VIT_LAYOUTS[layout](vit_tree(weights, heads_of(model)))
    assert_equal(from_big_vision(tree, model), weights)
    assert_equal(to_big_vision(weights, model, scan=layout == "scan"), tree)


@pytest.mark.parametrize("layout", BIT_LAYOUTS)
def test_a_bit_of_every_layout_loads_bit_for_bit(tmp_path, layout):
    model, make = BIT_LAYOUTS[layout]
    weights = init_weights(model)
    np.savez(tmp_path / "w.npz", **make(weights))
    assert_equal(load_weights(tmp_path / "w.npz", model), weights)


@pytest.mark.parametrize("layout", ["today", "V1"])
@pytest.mark.parametrize("num_classes", [7, 0])
def test_a_bit_is_written_as_big_vision_has_it(layout, num_classes):
    model, make = BIT_LAYOUTS[layout]
    weights = init_weights(f"{model},num_classes={num_classes}")
    assert_equal(to_big_vision(weights, f"{model},num_classes={num_classes}"), make(weights))


def test_float64_stays_float64_and_void_bytes_are_bfloat16(tmp_path):
    model = f"{VIT},pool=map"
    weights = init_weights(model)
    tree = scanned(vit_tree(weights, heads_of(model)))
    np.savez(tmp_path / "f64.npz", **{name: array + np.float64(1e-12) for name, array in tree.items()})
    loaded = load_weights(tmp_path / "f64.npz", model)
    assert_equal(loaded, {name: array + np.float64(1e-12) for name, array in weights.items()})
    np.savez(tmp_path / "bf16.npz", **{name: as_void(array) for name, array in tree.items()})
    loaded = load_weights(tmp_path / "bf16.npz", model)
    assert_equal(loaded, {name: widened(as_void(array)) for name, array in weights.items()})


@pytest.mark.parametrize("place", ["Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding"])
@pytest.mark.parametrize("image_size", ["80x112", "32x80"])  # 1 + 35 rows are 6x6 too, and 10 rows 1 + 3x3
def test_in_old_files_the_first_position_is_the_class_tokens(place, image_size):
    model = f"{VIT},image_size={image_size}"
    weights = init_weights(model)
    position = np.full((1, 1, 48), 0.25, np.float32)
    tree = augreg(vit_tree(weights, 4), position)
    tree[place] = tree.pop("Transformer/posembed_input/pos_embedding")
    assert_equal(from_big_vision(tree, model), weights | {"cls_token": weights["cls_token"] + position})


def test_in_todays_files_a_class_token_has_a_position_only_where_nothing_else_fits():
    weights = init_weights(f"{VIT},image_size=96")
    tree = vit_tree(weights, 4)  # 36 rows, which are 6x6 and 1 + 5x7
    assert_equal(from_big_vision(tree, VIT), fit_image_size(weights, VIT))
    tree["pos_embedding"] = np.concatenate([np.full((1, 1, 48), 0.25, np.float32), tree["pos_embedding"]], axis=1)
    folded = weights | {"cls_token": weights["cls_token"] + np.float32(0.25)}
    assert_equal(from_big_vision(tree, VIT), fit_image_size(folded, VIT))


@pytest.mark.parametrize("layout", VIT_LAYOUTS)
def test_a_position_embedding_of_another_grid_is_resampled(layout):
    square = f"{VIT},image_size=96"
    weights = init_weights(square)
    tree = vit_tree(weights, 4)
    tree = augreg(tree, np.zeros((1, 1, 48), np.float32)) if layout == "augreg" else VIT_LAYOUTS[layout](tree)
    assert_equal(from_big_vision(tree, VIT), fit_image_size(weights, VIT))


def test_a_fixed_embedding_that_is_in_the_file_is_dropped_only_where_it_is_the_true_one():
    model = f"{VIT},pos_embed=sincos2d"
    tree = vit_tree(init_weights(model), 4)
    tree["pos_embedding"] = sincos2d((5, 7), 48).astype(np.float32).reshape(1, 35, 48)
    assert_equal(from_big_vision(tree, model), init_weights(model))
    tree["pos_embedding"][0, 3, 5] += 0.01
    with pytest.raises(ValueError, match=r"unexpected pos_embedding \(1, 5, 7, 48\)"):
        from_big_vision(tree, model)


@pytest.mark.parametrize("num_classes", [10, 0])
@pytest.mark.parametrize(("layout", "pool"), [*itertools.product(VIT_LAYOUTS, POOLS)])
def test_a_vits_tree_is_upcycled_to_a_vitdet(tmp_path, layout, pool, num_classes):
    plain = f"{VIT},image_size=64,pool={pool},rep_size={0 if num_classes else 12}"
    vitdet = get_spec(f"{VITDET},num_classes={num_classes}")
    weights = init_weights(plain)
    np.savez(tmp_path / "w.npz", **under("params", VIT_LAYOUTS[layout](vit_tree(weights, 4))))
    assert_equal(load_weights(tmp_path / "w.npz", vitdet), upcycle(weights, vitdet))


def test_a_vits_tree_is_upcycled_where_no_table_of_relative_positions_tells_it():
    vitdet = get_spec(f"{VITDET},num_classes=0,rel_pos=false,pool=map")
    weights = init_weights(f"{VIT},pool=map,image_size=64")
    loaded = from_big_vision(vit_tree(weights, 4), vitdet)
    assert_equal(loaded, upcycle(weights, vitdet))
    assert "attn_pool/latent" in loaded


def test_heads_inlined_as_in_the_days_of_vit_g_load():
    model = f"{VIT},pool=map"
    weights = init_weights(model)
    tree = {name.removeprefix("MAPHead_0/"): array for name, array in vit_tree(weights, 4).items()}
    assert "probe" in tree
    assert_equal(from_big_vision(tree, model), weights)


def test_naflex_layouts_load():
    model = f"{VIT},pool=map"
    weights = init_weights(model)
    tree = vit_tree(weights, 4)
    tree["embedding/kernel"] = tree["embedding/kernel"].reshape(-1, 48)
    tree["pos_embedding"] = tree["pos_embedding"].reshape(5, 7, 48)
    assert_equal(from_big_vision(tree, model), weights)


def test_timm_reads_the_same_bit_from_the_same_dump(tmp_path):
    timm = pytest.importorskip("timm")
    model = "bit_r50x1:depths=2x1x1x1,num_classes=7"
    np.savez(tmp_path / "w.npz", **bit_dump(init_weights(model)))
    theirs = timm.models.resnetv2.ResNetV2((2, 1, 1, 1), num_classes=7, stem_type="fixed")
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    state = to_timm(load_weights(tmp_path / "w.npz", model), model)
    assert_equal(state, {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()})


def test_what_big_vision_does_not_have_is_not_written():
    for model in (VITDET, "resnet18:width=8", "convnext_atto"):
        with pytest.raises(ValueError, match="big_vision has no .*; allowed are a plain ViT and a BiT"):
            to_big_vision({}, model)
    with pytest.raises(ValueError, match="scan=True: only a ViT's blocks are stacked"):
        to_big_vision(init_weights(BIT), BIT, scan=True)
    with pytest.raises(ValueError, match="weights: 1 of its arrays do not fit"):
        to_big_vision(init_weights(VIT) | {"head/bias": np.ones(3, np.float32)}, VIT)
