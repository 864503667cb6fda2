"""Canonical weights: what a spec expects, what is refused, what is drawn, and what is resampled."""

import dataclasses
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

import vitcmp
from vitcmp.params import (
    Leaf,
    Weights,
    check_weights,
    count_params,
    expected_params,
    expected_shapes,
    fit_image_size,
    init_weights,
    sincos2d,
    upcycle,
)

VIT = "vit_ti16:depth=1,width=8,num_heads=2,mlp_dim=12,num_classes=3,image_size=32x48"
VITDET = "vitdet_ti16:depth=2,width=8,num_heads=2,mlp_dim=12,num_classes=3,image_size=80x176,global_blocks=1"
RESNET = "resnet18:depths=1x1,width=4,num_classes=3"
CONVNEXT = "convnext_atto:depths=1x1,widths=4x6,num_classes=3"
# sha256 over the sorted names and the bytes of VIT's weights from seed 0. It changes with the drawing, or with numpy's
# generators: results measured with other weights do not compare, so a new hash is a new method version.
VIT_HASH = "44b770a54c4fd247f78e579b2b9991abd08f3cc27184f0956e6c90ded078867a"


def digest(weights: Weights) -> str:
    return hashlib.sha256(b"".join(name.encode() + weights[name].tobytes() for name in sorted(weights))).hexdigest()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_b16", 86_566_888),  # big_vision's; timm has 768 more, the class token's position
        ("vit_b16:pool=gap", 86_566_120),
        ("vit_ti16", 5_717_224),
        ("vit_gopt16:pool=map,num_classes=0,image_size=256", 1_163_168_256),  # timm's vit_giantopt_patch16_siglip_256
        ("vitdet_b16:image_size=1024,neck_dim=256,num_classes=0", 89_670_912),  # SAM's image encoder
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("convnext_base", 88_591_464),
        ("convnext_atto", 3_695_520),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count):
    assert count_params(name) == count


def test_expected_params_name_every_leaf_of_a_vit_with_its_shape_and_kind():
    block = {
        "norm1/scale": Leaf((8,), "norm_scale"),
        "norm1/bias": Leaf((8,), "norm_bias"),
        "attn/qkv/kernel": Leaf((8, 24), "linear"),
        "attn/qkv/bias": Leaf((24,), "bias"),
        "attn/proj/kernel": Leaf((8, 8), "linear"),
        "attn/proj/bias": Leaf((8,), "bias"),
        "norm2/scale": Leaf((8,), "norm_scale"),
        "norm2/bias": Leaf((8,), "norm_bias"),
        "mlp/fc1/kernel": Leaf((8, 12), "linear"),
        "mlp/fc1/bias": Leaf((12,), "bias"),
        "mlp/fc2/kernel": Leaf((12, 8), "linear"),
        "mlp/fc2/bias": Leaf((8,), "bias"),
    }
    assert expected_params(VIT) == {
        "patch_embed/proj/kernel": Leaf((16, 16, 3, 8), "conv"),
        "patch_embed/proj/bias": Leaf((8,), "bias"),
        "pos_embed": Leaf((1, 2, 3, 8), "pos_embed"),
        "cls_token": Leaf((1, 1, 8), "token"),
        **{f"blocks/0/{name}": leaf for name, leaf in block.items()},
        "norm/scale": Leaf((8,), "norm_scale"),
        "norm/bias": Leaf((8,), "norm_bias"),
        "head/kernel": Leaf((8, 3), "linear"),
        "head/bias": Leaf((3,), "bias"),
    }


@pytest.mark.parametrize(
    ("options", "windowed", "of_the_grid"),
    [
        ("window_size=14", (27, 27), (9, 21)),
        ("window_size=4,window_policy=divide", (5, 7), (9, 21)),
        ("window_size=4,window_policy=divide,image_size=128x64", (7, 7), (15, 7)),
    ],
)
def test_rel_pos_tables_have_a_row_for_each_distance_in_the_window(options, windowed, of_the_grid):
    shapes = expected_shapes(f"{VITDET},{options}")
    for block, lengths in enumerate((windowed, of_the_grid)):
        tables = [shapes[f"blocks/{block}/attn/rel_pos_{axis}"] for axis in "hw"]
        assert tables == [(length, 4) for length in lengths]


def test_a_neck_takes_the_place_of_the_norm_and_sets_the_width_of_the_head():
    shapes = expected_shapes(f"{VITDET},neck_dim=6,pool=map")
    assert "norm/scale" not in shapes
    assert [shapes[f"neck/{name}"] for name in ("0/kernel", "1/scale", "2/kernel", "3/bias")] == [
        (1, 1, 8, 6),
        (6,),
        (3, 3, 6, 6),
        (6,),
    ]
    assert "neck/0/bias" not in shapes
    assert (shapes["attn_pool/latent"], shapes["head/kernel"]) == ((1, 1, 6), (6, 3))


@pytest.mark.parametrize("spec", [VIT, VITDET, RESNET, CONVNEXT])
def test_drawn_weights_are_what_the_spec_expects_and_none_is_trivial(spec):
    weights = init_weights(spec, seed=1)
    check_weights(weights, spec)
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
    assert all(array.std() > 0.01 for array in weights.values())
    assert len({array.tobytes() for array in weights.values()}) == len(weights)


def test_drawn_weights_are_those_of_the_pinned_hash():
    assert digest(init_weights(VIT, seed=0)) == VIT_HASH
    assert digest(init_weights(VIT, seed=1)) != VIT_HASH


def test_drawn_weights_are_the_same_in_another_process():
    program = f"import vitcmp, tests.core.test_params as t; print(t.digest(vitcmp.init_weights({VITDET!r}, 2)))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == digest(init_weights(VITDET, 2))


def test_a_leaf_is_drawn_alike_whatever_the_rest_of_the_model():
    deeper, shallower = (init_weights(vitcmp.get_spec(f"{VIT},depth={depth}")) for depth in (3, 1))
    assert all(np.array_equal(deeper[name], array) for name, array in shallower.items())


def test_one_error_lists_every_missing_unexpected_misshapen_and_non_finite_array():
    weights = init_weights(VIT)
    weights["blocks/0/attn/qkv/weight"] = weights.pop("blocks/0/attn/qkv/kernel")
    weights["head/kernel"] = weights["head/kernel"].T
    weights["norm/bias"] = weights["norm/bias"] + np.float32(np.nan)
    weights["norm/scale"] = weights["norm/scale"] * np.float64(np.inf)
    with pytest.raises(ValueError, match=r"x\.npz: 5 of its arrays do not fit vit_ti16") as error:
        check_weights(weights, VIT, source="x.npz")
    for fault in (
        "missing blocks/0/attn/qkv/kernel (8, 24)",
        "unexpected blocks/0/attn/qkv/weight (8, 24); did you mean 'blocks/0/attn/qkv/kernel'?",
        "head/kernel has shape (3, 8), expected (8, 3)",
        "norm/bias has values that are not finite",
        "norm/scale has values that are not finite",
    ):
        assert fault in str(error.value)


def test_a_long_list_of_faults_is_whole():
    with pytest.raises(ValueError, match="152 of its arrays do not fit vit_ti16") as error:
        check_weights({}, "vit_ti16")
    assert str(error.value).count("missing") == 152


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_fit_image_size_changes_positions_only_and_keeps_dtypes(dtype):
    spec = dataclasses.replace(vitcmp.get_spec(VIT), image_size=(80, 64))
    weights = {name: array.astype(dtype) for name, array in init_weights(VIT).items()}
    fitted = fit_image_size(weights, spec)
    check_weights(fitted, spec)
    assert {array.dtype for array in fitted.values()} == {np.dtype(dtype)}
    assert [name for name in weights if fitted[name] is not weights[name]] == ["pos_embed"]
    assert weights["pos_embed"].shape == (1, 2, 3, 8)


@pytest.mark.parametrize("spec", [VIT, VITDET, f"{VIT},pos_embed=sincos2d", RESNET, CONVNEXT])
def test_fit_image_size_returns_the_same_arrays_where_nothing_changes(spec):
    weights = init_weights(spec)
    fitted = fit_image_size(weights, spec)
    assert fitted is not weights
    assert list(fitted) == list(weights)
    assert all(fitted[name] is array for name, array in weights.items())


def test_fit_image_size_resamples_the_tables_of_windows_that_follow_the_image_only():
    for policy, changed in (("pad", {"pos_embed", "blocks/1"}), ("divide", {"pos_embed", "blocks/0", "blocks/1"})):
        spec = vitcmp.get_spec(f"{VITDET},window_size=8,window_policy={policy}")
        weights = init_weights(spec)
        larger = dataclasses.replace(spec, image_size=(112, 256))
        fitted = fit_image_size(weights, larger)
        check_weights(fitted, larger)
        assert {"/".join(name.split("/")[:2]) for name in weights if fitted[name] is not weights[name]} == changed


def test_fit_image_size_leaves_what_does_not_fit_otherwise_for_check_weights():
    spec = vitcmp.get_spec(f"{VITDET},window_size=7")
    weights = init_weights(f"{VITDET},window_size=14") | {"pos_embed": np.zeros((1, 9, 8)), "norm/scale": np.ones(3)}
    del weights["head/bias"]
    fitted = fit_image_size(weights, spec)
    assert all(fitted[name] is array for name, array in weights.items())
    with pytest.raises(ValueError, match="blocks/0/attn/rel_pos_h has shape"):
        check_weights(fitted, spec)


@pytest.mark.parametrize("grid", [(5, 11), (2, 3), (1, 1), (20, 9), (7, 7)])
def test_resampled_position_embeddings_are_those_of_timm(grid):
    torch = pytest.importorskip("torch")
    pos_embed = pytest.importorskip("timm.layers.pos_embed")
    spec = dataclasses.replace(vitcmp.get_spec(VIT), image_size=(112, 112))
    weights = {name: array.astype(np.float64) for name, array in init_weights(spec).items()}
    ours = fit_image_size(weights, dataclasses.replace(spec, image_size=(16 * grid[0], 16 * grid[1])))["pos_embed"]
    tensor = torch.from_numpy(weights["pos_embed"])
    theirs = pos_embed.resample_abs_pos_embed(tensor.reshape(1, 49, 8), list(grid), num_prefix_tokens=0)  # in float32
    assert np.abs(ours - theirs.numpy().reshape(ours.shape)).max() < 1e-6
    exact = torch.nn.functional.interpolate(tensor.permute(0, 3, 1, 2), size=grid, mode="bicubic", antialias=True)
    assert np.abs(ours - exact.permute(0, 2, 3, 1).numpy()).max() < 1e-12


@pytest.mark.parametrize("length", [1, 2, 5, 16, 40])
def test_resampled_rel_pos_tables_are_those_of_timm(length):
    torch = pytest.importorskip("torch")
    sam = pytest.importorskip("timm.models.vision_transformer_sam")
    spec = vitcmp.get_spec(f"{VITDET},image_size=80x112")
    weights = {name: array.astype(np.float64) for name, array in init_weights(spec).items()}
    fitted = fit_image_size(weights, dataclasses.replace(spec, image_size=(16 * length, 112)))
    ours = fitted["blocks/1/attn/rel_pos_h"]
    theirs = sam.get_rel_pos(length, length, torch.from_numpy(weights["blocks/1/attn/rel_pos_h"])).numpy()
    distances = np.arange(length)[:, None] - np.arange(length) + length - 1
    assert np.abs(ours[distances] - theirs).max() < 1e-12


def test_upcycling_refuses_what_a_plain_vit_has_no_weights_for():
    weights = init_weights(VIT)
    for spec in (f"{VITDET},neck_dim=6", VIT):
        with pytest.raises(ValueError, match="must be a ViTDet with neck_dim=0: a plain ViT has no weights for a neck"):
            upcycle(weights, spec)
    with pytest.raises(ValueError, match="upcycled weights: 12 of its arrays do not fit"):
        upcycle(weights, VITDET)  # of another depth


def test_upcycling_drops_the_heads_that_have_no_use():
    plain = VIT.replace("depth=1", "depth=2")
    upcycled = upcycle(init_weights(f"{plain},pool=map,rep_size=5"), f"{VITDET},num_classes=0")
    assert upcycled.keys() == expected_shapes(f"{VITDET},num_classes=0").keys()
    kept = upcycle(init_weights(f"{plain},pool=map"), f"{VITDET},pool=map")
    assert "attn_pool/latent" in kept
    with pytest.raises(ValueError, match="unexpected pre_logits/kernel"):
        upcycle(init_weights(f"{plain},rep_size=8"), VITDET)


def test_sincos2d_puts_columns_first_and_needs_two_frequencies():
    embedding = sincos2d((2, 3), 8)
    assert (embedding.shape, embedding.dtype) == ((1, 2, 3, 8), np.float64)
    one, two = np.array([1, 1e-4]), np.array([2, 2e-4])
    expected = np.concatenate([np.sin(two), np.cos(two), np.sin(one), np.cos(one)])
    assert np.allclose(embedding[0, 1, 2], expected, rtol=1e-15)
    with pytest.raises(ValueError, match="width=4 must be a multiple of 4, and 8 or more"):
        vitcmp.get_spec("vit_ti16:width=4,num_heads=1,pos_embed=sincos2d")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit_b16:depth=1000000000000", "depth=1000000000000 must be 1,000 at most"),
        ("vitdet_b16:depth=9999999999,global_blocks=9999999999", "depth=9999999999 must be 1,000 at most"),
        ("resnet50:depths=1x9999", r"depths=\(1, 9999\) must be 1,000 at most"),
        ("vit_b16:image_size=64x9999999", r"image_size=\(64, 9999999\) must be 1,000,000 at most"),
    ],
)
def test_a_size_that_would_never_end_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        vitcmp.get_spec(model)


def test_an_epsilon_is_written_as_in_python():
    assert vitcmp.get_spec("vit_b16:norm_eps=1E-5").norm_eps == 1e-5


def test_misspelt_names_are_guessed_only_where_they_are_few():
    weights = init_weights(VIT)
    for num_more, is_guessed in ((20, True), (21, False)):
        more = {f"blocks/0/norm1/scael{i}": weights["norm/scale"] for i in range(num_more)}
        without = {name: x for name, x in weights.items() if name != "blocks/0/norm1/scale"}
        with pytest.raises(ValueError, match="unexpected") as caught:
            check_weights(without | more, VIT)
        assert ("did you mean 'blocks/0/norm1/scale'" in str(caught.value)) == is_guessed


def test_a_neck_must_fit_the_heads_of_attention_pooling():
    with pytest.raises(ValueError, match="neck_dim=7 is not divisible by num_heads=2"):
        vitcmp.get_spec(f"{VITDET},neck_dim=7,pool=map")
    assert vitcmp.get_spec(f"{VITDET},neck_dim=7").neck_dim == 7


def test_raw_bytes_are_no_weights():
    """As numpy reads bfloat16 from an `.npz`; `load_weights` makes floats of them."""
    weights = {name: np.zeros(array.shape, "V2") for name, array in init_weights(VIT).items()}
    with pytest.raises(ValueError, match=r"expected numpy arrays of floats, got .*\(\|V2\)"):
        check_weights(weights, VIT)
