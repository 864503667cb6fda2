"""Analytic FLOPs against published and hand-made numbers, with no framework."""

import pytest

from vitcmp import count_flops, count_params

SAM = "vitdet_b16:num_classes=0"  # timm's samvit_base_patch16 has no head

# FLOPs at 2 per multiply-add. Where others have published numbers they publish half of these, as MACs.
PINNED = {
    ("vit_ti16", 224): 2_507_366_400,
    ("vit_b16", 224): 35_127_656_448,
    ("vit_b16", 384): 110_968_700_928,
    ("vit_b16", 512): 214_055_780_352,
    ("vit_b16", 1024): 1_319_565_262_848,
    ("convnext_b", 224): 30_709_458_944,
    ("convnext_b", 1024): 641_724_268_544,
    ("resnet50", 224): 8_178_368_512,
    ("resnet50", 1024): 170_829_709_312,
    ("bit_r50x1", 224): 8_178_368_512,  # ResNet-50's: norms cost nothing here, and neither do standardised weights
    ("bit_v1_r50x1", 224): 8_178_368_512,
    ("bit_r152x4", 224): 365_554_565_120,
    (f"{SAM},neck_dim=256", 1024): 941_727_350_784,
    (f"{SAM},rel_pos=off,window_size=16", 1024): 932_544_774_144,
    (f"{SAM},rel_pos=off", 1024): 930_377_760_768,
}


@pytest.mark.parametrize(("model", "image_size"), PINNED)
def test_totals_are_the_pinned_ones(model, image_size):
    assert count_flops(model, image_size).total == PINNED[model, image_size]


@pytest.mark.parametrize(
    ("model", "image_size", "by_kind"),
    [
        ("vit_b16", 224, {"patch_embed": 231_211_008, "linear": 33_465_790_464, "attention": 1_430_654_976}),
        ("resnet50", 224, {"convolution": 8_174_272_512, "linear": 4_096_000}),
        ("convnext_b", 224, {"convolution": 655_097_856, "depthwise": 457_304_064, "linear": 29_597_057_024}),
        (
            f"{SAM},neck_dim=256",
            1024,
            {
                "patch_embed": 4_831_838_208,
                "linear": 695_784_701_952,
                "rel_pos": 4_907_139_072,
                "attention": 229_761_220_608,
                "convolution": 6_442_450_944,
            },
        ),
    ],
)
def test_only_the_kinds_that_a_model_has_are_counted_and_they_add_up(model, image_size, by_kind):
    count = count_flops(model, image_size)
    assert count.by_kind == by_kind
    assert count.total == sum(by_kind.values())
    assert all(type(flops) is int for flops in count.by_kind.values())


def test_a_smallest_vit_counts_as_by_hand():
    model = "vit_ti16:width=2,depth=1,num_heads=1,mlp_dim=3,num_classes=5,pool=gap"
    count = count_flops(model, "16x32")  # two tokens
    assert count.by_kind == {
        "patch_embed": 2 * 2 * (16 * 16 * 3) * 2,
        "linear": 2 * 2 * (2 * 6 + 2 * 2 + 2 * 3 + 3 * 2) + 2 * 2 * 5,
        "attention": 2 * (2 * 2 * 2) * 2,
    }


def test_padded_windows_are_counted_as_executed():
    model = "vitdet_ti16:width=2,depth=1,num_heads=1,mlp_dim=3,num_classes=0,global_blocks=0,window_size=2"
    count = count_flops(model, "48x80")  # 3x5 patches, padded to 4x6: six windows of four tokens
    assert count.by_kind == {
        "patch_embed": 2 * 15 * (16 * 16 * 3) * 2,
        "linear": 2 * 15 * (2 * 6 + 2 * 2 + 2 * 3 + 3 * 2),
        "rel_pos": 2 * 24 * 2 * (2 + 2),
        "attention": 2 * 6 * (4 * 4 * 2) * 2,
    }


@pytest.mark.parametrize(("options", "samvit"), [(",neck_dim=256", 972_077_334_528), (",rel_pos=off", 960_727_744_512)])
def test_timms_samvit_has_the_projections_of_its_padding_on_top(options, samvit):
    """64 x 64 patches are padded to 70 x 70 in the 8 blocks that have windows; ours projects the patches alone."""
    padding = 8 * 2 * (70**2 - 64**2) * (768 * 3 * 768 + 768 * 768)
    assert count_flops(f"{SAM}{options}", 1024).total + padding == samvit


def test_windows_that_divide_the_grid_cost_no_padding():
    padded, divided = (
        count_flops(f"vitdet_b16:window_size=16,window_policy={policy}", 384) for policy in ("pad", "divide")
    )
    whole = count_flops("vitdet_b16:window_size=12", 384)  # 24 = 2 x 12 patches
    assert divided.by_kind == whole.by_kind
    assert padded.total > divided.total


def test_global_blocks_in_every_place_are_a_plain_vit():
    vitdet, vit = (
        count_flops(model, "80x112") for model in ("vitdet_b16:global_blocks=12,rel_pos=off", "vit_b16:pool=gap")
    )
    assert vitdet.by_kind == vit.by_kind


@pytest.mark.parametrize(
    ("model", "image_size", "same_as"),
    [
        ("resnet50", "63x95", "64x96"),  # its strides pad, and so round up
        ("bit_r50x1", "63x95", "64x96"),
        ("vit_b16", "79x95", "64x80"),  # these drop what does not fill a patch
        ("vitdet_b16", "79x95", "64x80"),
        ("convnext_b", "67x35", "64x32"),
    ],
)
def test_sizes_that_are_no_multiple_of_the_stride_round_as_the_model_does(model, image_size, same_as):
    assert count_flops(model, image_size) == count_flops(model, same_as)
    assert count_flops(model, image_size) != count_flops(model, "128x96")


@pytest.mark.parametrize("image_size", [(80, 176), "80x176", [80, 176]])
def test_image_size_is_height_and_width_in_any_form(image_size):
    assert count_flops("vitdet_b16", image_size) == count_flops("vitdet_b16:image_size=80x176")


def test_image_size_defaults_to_the_models_own():
    assert count_flops("resnet50:image_size=96x64") == count_flops("resnet50", (96, 64))


@pytest.mark.parametrize("model", ["vit_b16", "vitdet_b16:neck_dim=256", "resnet50", "convnext_b"])
def test_training_costs_three_times_the_forward_pass_less_the_gradient_towards_the_image(model):
    forward, train = (count_flops(model, 224, mode=mode) for mode in ("forward", "train"))
    stem = {"resnet50": 2 * 112**2 * 7**2 * 3 * 64, "convnext_b": 2 * 56**2 * 4**2 * 3 * 128}.get(model, 231_211_008)
    assert train.total == 3 * forward.total - stem
    assert train.by_kind.keys() == forward.by_kind.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit_b17x", 224), "unknown model"),
        (("vit_b16", 8), "image_size=8"),
        (("vit_b16", "big"), "image_size='big'"),
    ],
)
def test_what_cannot_be_counted_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        count_flops(*arguments)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="unknown mode 'training'; did you mean 'train'"):
        count_flops("vit_b16", mode="training")


def test_parameters_are_the_published_counts():
    # timm's ViT-B/16 has 768 more: the class token's position, which ours folds into the token.
    assert count_params("vit_b16") == 86_567_656 - 768
    assert count_params("convnext_b") == 88_591_464
    assert count_params("resnet50") == count_params("bit_v1_r50x1") == 25_557_032
    assert count_params("bit_r50x1") == 25_549_352
    assert count_params("bit_r152x4") == 936_533_224
    assert count_params(f"{SAM},neck_dim=256,image_size=1024") == 89_670_912
