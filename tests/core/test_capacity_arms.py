import numpy as np
import pytest

import vitcmp
from experiments.capacity.arms import (
    CELLS,
    arm_weights,
    carry_weights,
    cross_pairs,
    make_arms,
    undefined_arms,
    weights_sha256,
)
from vitcmp.flops import count_flops
from vitcmp.initial import initial_weights
from vitcmp.params import check_weights, expected_shapes, fit_image_size
from vitcmp.specs import get_spec

TINY = "depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10"
VIT = f"vit_ti8:{TINY},image_size=40"
VITDET = f"vitdet_ti8:{TINY},global_blocks=1,window_size=3"
CNNS = ("resnet18", "bit_r26x1", "bit_v1_r26x1", "convnext_atto")


def test_the_arms_are_the_four_cells_of_information_and_compute():
    arms = make_arms("vit_s16", 224, 448)
    assert {name: (arm.information, arm.compute) for name, arm in arms.items()} == CELLS
    assert {name: arm.sizes for name, arm in arms.items()} == {
        "low": ((224, 224),),
        "down_up": ((224, 224), (448, 448)),
        "high": ((448, 448),),
        "patch": ((448, 448),),
    }
    assert arms["down_up"].spec == arms["high"].spec
    assert [arm.spec.patch_size for arm in arms.values()] == [16, 16, 16, 32]


@pytest.mark.parametrize("model", ["vit_b16", "vitdet_b16", "vitdet_s16:window_policy=divide", "vit_s14:pool=map"])
def test_the_patch_arm_has_the_tokens_of_low_and_its_flops_but_for_the_larger_patches(model):
    arms = make_arms(model, "224x112", "448x224")
    assert arms["patch"].num_tokens == arms["low"].num_tokens < arms["high"].num_tokens
    assert arms["patch"].spec.grid_size == arms["low"].spec.grid_size
    flops = {name: count_flops(arm.spec).by_kind for name, arm in arms.items()}
    assert flops["patch"] == flops["low"] | {"patch_embed": 4 * flops["low"]["patch_embed"]}


@pytest.mark.parametrize(["low", "high", "patch_size"], [(32, 48, 24), (64, 192, 48), ("32x64", "80x160", 40)])
def test_the_patch_grows_as_the_image_does(low, high, patch_size):
    assert make_arms("vit_ti16", low, high)["patch"].spec.patch_size == patch_size


def test_flops_are_those_of_the_spec():
    arms = make_arms("vit_b16", 224, 512)
    assert [round(arms[name].flops * 1e-9, 3) for name in ("low", "high")] == [35.128, 214.056]


@pytest.mark.parametrize("model", CNNS)
def test_a_cnn_has_three_arms_and_says_why_not_the_fourth(model):
    assert [*make_arms(model, 64, 128)] == ["low", "down_up", "high"]
    [(name, reason)] = undefined_arms(model, 64, 128).items()
    assert name == "patch" and reason.startswith("patch is not defined: a CNN (") and reason.endswith("has no patch")
    assert make_arms(model, 64, 128)["low"].num_tokens is None
    with pytest.raises(ValueError, match="arms=patch: none is left: patch is not defined: a CNN"):
        make_arms(model, 64, 128, ["patch"])


@pytest.mark.parametrize(
    ["sizes", "reason"],
    [((48, 64), "a patch would be of 16 x 64 / 48 px, which is no whole number"), (("32x32", "64x96"), "by different")],
)
def test_a_patch_that_cannot_grow_so_far_is_left_out_with_its_reason(sizes, reason):
    assert "patch" not in make_arms("vit_ti16", *sizes)
    assert reason in undefined_arms("vit_ti16", *sizes)["patch"]


def test_a_model_that_has_every_arm_lacks_none():
    assert undefined_arms("vit_ti16", 32, 64) == {}
    assert undefined_arms("resnet18", 32, 64, ["low", "high"]) == {}


@pytest.mark.parametrize(
    ["model", "low", "high", "names", "message"],
    [
        ("vit_ti16", 64, 64, ["low"], "low=64 and high=64: each side of low must be less than that of high"),
        ("vit_ti16", 64, 32, ["low"], "low=64 and high=32: each side of low must be less"),
        ("vit_ti16", "64x32", "128x32", ["low"], "low=64x32 and high=128x32: each side"),
        ("vit_ti16", 60, 128, ["low"], "low=60: each side must be a multiple of the patch size of 16 pixels"),
        ("vit_ti16", 60, 100, ["low"], "low=60 and high=100: each side must be a multiple of the patch size of 16"),
        ("vitdet_ti16", 64, "128x100", ["low"], "high=128x100: each side must be a multiple"),
        ("convnext_atto", 16, 64, ["low"], "image_size=16 is too small for convnext"),
        ("vit_ti16", 64, 128, ["lo"], "unknown arm 'lo'; did you mean 'low'?; allowed: low, down_up, high, patch"),
        ("vit_ti16", 64, 128, [], "arms='' must name one or more of low, down_up, high, patch, each once"),
        ("vit_ti16", 64, 128, ["low", "low"], "arms='low,low' must name one or more"),
        ("vit_ti16", 0, 128, ["low"], "low=0 must be a side"),
        ("vit_ti16", 64, "big", ["low"], "high='big' must be a side"),
        ("timm:resnet18", 64, 128, ["low"], "model timm:resnet18 has no arms"),
        ("vit_xx16", 64, 128, ["low"], "unknown model 'vit_xx16'"),
    ],
)
def test_bad_arms_are_one_error_before_anything_runs(model, low, high, names, message):
    for make in (make_arms, undefined_arms):
        with pytest.raises(ValueError) as error:
            make(model, low, high, names)
        assert message in str(error.value)


@pytest.mark.parametrize("model", [VIT, VITDET, f"{VITDET},window_policy=divide", f"{VIT},pool=map", *CNNS])
def test_every_arm_starts_from_one_checkpoint(model):
    base = initial_weights(model, seed=3)
    arms = make_arms(model, 64, 128)
    for arm in arms.values():
        weights = arm_weights(base, model, arm)
        check_weights(weights, arm.spec)
        resampled = {name for name in base if weights[name] is not base[name]}
        assert {name.split("/")[-1] for name in resampled} <= {"pos_embed", "rel_pos_h", "rel_pos_w", "kernel"}
        assert ("patch_embed/proj/kernel" in resampled) == (arm.name == "patch")


def test_arms_of_one_grid_start_from_equal_positions_and_the_base_grid_is_untouched():
    base = initial_weights(VIT, seed=0)
    weights = {name: arm_weights(base, VIT, arm) for name, arm in make_arms(VIT, 40, 80).items()}
    assert weights["low"]["pos_embed"] is weights["patch"]["pos_embed"] is base["pos_embed"]
    np.testing.assert_array_equal(weights["down_up"]["pos_embed"], weights["high"]["pos_embed"])
    assert weights["high"]["pos_embed"].shape == (1, 10, 10, 48)
    np.testing.assert_array_equal(
        weights["high"]["pos_embed"], fit_image_size(base, f"{VIT},image_size=80")["pos_embed"]
    )


def test_the_patch_arm_sees_an_enlarged_image_as_low_sees_the_small_one():
    base = initial_weights(VIT, seed=0)
    arms = make_arms(VIT, 40, 80)
    small = np.random.default_rng(0).uniform(-1, 1, (8, 8, 3))
    large = vitcmp.resample.resize(small, (16, 16), method="bilinear", antialias=False)
    kernels = [arm_weights(base, VIT, arms[name])["patch_embed/proj/kernel"] for name in ("low", "patch")]
    tokens = [np.einsum("hwc,hwcd->d", *pair) for pair in zip((small, large), kernels, strict=True)]
    np.testing.assert_allclose(tokens[1], tokens[0], atol=1e-6)


@pytest.mark.parametrize("policy", ["pad", "divide"])
def test_vitdet_windows_and_relative_positions_fit_both_sizes(policy):
    model = get_spec(f"vitdet_ti16:window_size=14,window_policy={policy},depth=4,global_blocks=1")
    arms = make_arms(model, 224, 448)
    windows = {name: arm.spec.window_of(0) for name, arm in arms.items()}
    assert set(windows.values()) == {(14, 14)}  # tokens: at high, a quarter of the image
    shapes = {name: expected_shapes(arm.spec)["blocks/3/attn/rel_pos_h"] for name, arm in arms.items()}
    assert shapes == {"low": (27, 64), "down_up": (55, 64), "high": (55, 64), "patch": (27, 64)}
    odd = make_arms(model, 160, 320)["low"].spec
    assert odd.window_of(0) == ((14, 14) if policy == "pad" else (10, 10))


@pytest.mark.parametrize("model", [VIT, VITDET, "resnet18:num_classes=10"])
def test_trained_weights_are_carried_to_every_other_arm(model):
    arms = make_arms(model, 64, 128)
    pairs = [*cross_pairs(arms)]
    assert len(pairs) == len(arms) * (len(arms) - 1)
    for trained, tested in pairs:
        weights = initial_weights(trained.spec, seed=1)
        carried = carry_weights(weights, trained, tested)
        check_weights(carried, tested.spec)
        if trained.spec == tested.spec:
            assert all(carried[name] is weights[name] for name in weights)


def test_weights_of_another_model_are_refused_by_what_differs():
    arm = make_arms(VIT, 40, 80)["low"]
    with pytest.raises(ValueError, match=r"of another model than the arm: depth=3 and 2"):
        arm_weights(initial_weights(VIT.replace("depth=2", "depth=3")), VIT.replace("depth=2", "depth=3"), arm)
    with pytest.raises(ValueError, match=r"family='vitdet' and 'vit'"):
        arm_weights({}, VITDET, arm)
    with pytest.raises(ValueError, match=r"weights: \d+ of its arrays do not fit"):
        arm_weights({}, VIT, arm)


def test_the_hash_of_weights_is_of_names_and_values_in_any_order():
    weights = initial_weights(VIT, seed=0)
    assert weights_sha256(weights) == weights_sha256(dict(reversed(weights.items())))
    others = [
        weights | {"norm/scale": np.nextafter(weights["norm/scale"], 2)},
        weights | {"norm/scale": weights["norm/scale"].astype(np.float64)},
        weights | {"pos_embed": weights["pos_embed"].reshape(1, 25, 1, 48)},
        {name.replace("norm/", "norm2/"): array for name, array in weights.items()},
    ]
    assert len({weights_sha256(each) for each in (weights, *others)}) == 5


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_patch_arm_runs(backend):
    pytest.importorskip(backend)
    arm = make_arms(VIT, 32, 64)["patch"]
    images = np.random.default_rng(0).uniform(-1, 1, (1, *arm.sizes[-1], 3))
    weights = arm_weights(initial_weights(VIT, seed=0), VIT, arm)
    assert vitcmp.forward(backend, arm.spec, weights, images)["logits"].shape == (1, 10)
