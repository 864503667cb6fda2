"""The bytes that a step must move, against counts by hand, and the arrays behind them."""

import math

import pytest

from vitcmp import count_flops, count_params
from vitcmp.flops import num_passes
from vitcmp.params import expected_params
from vitcmp.products import Product, list_products
from vitcmp.specs import get_spec
from vitcmp.traffic import count_traffic

VIT = "vit_ti16:width=4,depth=1,num_heads=2,mlp_dim=6,num_classes=5,pool=gap"
# One block on 2 x 3 tokens, by hand: inputs, weights and outputs of each product.
BLOCK = [
    (32 * 48 * 3, 16 * 16 * 3 * 4, 6 * 4),  # patch_embed
    (6 * 4, 4 * 12, 6 * 12),  # qkv
    (6 * 12, 0, 6 * 4),  # attention reads q, k and v
    (6 * 4, 4 * 4, 6 * 4),  # proj
    (6 * 4, 4 * 6, 6 * 6),  # fc1
    (6 * 6, 6 * 4, 6 * 4),  # fc2
    (4, 4 * 5, 5),  # head
]
MODELS = [
    "vit_b16:pool=map,image_size=79x95",
    "vitdet_b16:image_size=1024,neck_dim=256",
    "vitdet_ti16:image_size=80x176,window_size=3,rel_pos=off",
    "resnet18:image_size=63x95",
    "resnet50",
    "bit_r50x1",
    "bit_v1_r26x1:image_size=63x95",
    "convnext_t:image_size=67x99",
]


def arrays(model: str, image_size=None) -> list[tuple[int, int, int]]:
    spec = get_spec(model if image_size is None else f"{model},image_size={image_size}")
    return [(product.inputs, product.weights, product.outputs) for product in list_products(spec)]


def test_a_vit_block_reads_and_writes_what_it_does_by_hand():
    assert arrays(VIT, "32x48") == BLOCK
    for batch_size in (1, 3):
        values = sum(batch_size * (inputs + outputs) + weights for inputs, weights, outputs in BLOCK)
        assert count_traffic(VIT, "32x48", batch_size=batch_size, numerics="float32", mode="forward") == 4 * values


def test_a_training_step_by_hand():
    """Each product thrice, the first twice; AdamW reads parameter, gradient, two moments and writes all but one."""
    values = [3 * (inputs + outputs) + weights for inputs, weights, outputs in BLOCK]
    adamw = 7 * count_params(VIT + ",image_size=32x48")
    expected = 4 * (2 * values[0] + 3 * sum(values[1:]) + adamw)
    assert count_traffic(VIT, "32x48", batch_size=3, mode="train") == expected


def test_a_stride_reads_only_what_its_kernels_cover():
    """ResNet-18's stage 1 by hand, at 64 px: a map of 16 x 16 x 64 becomes 8 x 8 x 128."""
    stage = arrays("resnet18:depths=1+1,num_classes=0", 64)[3:]
    assert stage == [
        (16 * 16 * 64, 3 * 3 * 64 * 128, 8 * 8 * 128),
        (8 * 8 * 128, 3 * 3 * 128 * 128, 8 * 8 * 128),
        (8 * 8 * 64, 64 * 128, 8 * 8 * 128),  # the shortcut's 1x1 convolution passes over three of four
    ]


def test_a_depthwise_convolution_and_an_mlp_by_hand():
    first, depthwise, fc1, fc2 = arrays("convnext_atto:depths=1,widths=8,num_classes=0", "35x64")
    assert first == (32 * 64 * 3, 4 * 4 * 3 * 8, 8 * 16 * 8)  # three rows fill no patch
    assert depthwise == (8 * 16 * 8, 7 * 7 * 8, 8 * 16 * 8)
    assert fc1 == (8 * 16 * 8, 8 * 32, 8 * 16 * 32) and fc2 == (8 * 16 * 32, 32 * 8, 8 * 16 * 8)


def test_relative_positions_are_written_and_read_again():
    model = "vitdet_ti16:width=4,depth=1,num_heads=2,mlp_dim=6,num_classes=0,window_size=2,global_blocks=0"
    tokens = 4 * 6  # 3 x 5, padded to six windows of 2 x 2
    biases = tokens * 2 * (2 + 2)
    rel_pos, attention = arrays(model, "48x80")[2:4]
    assert rel_pos == (tokens * 4, (3 + 3) * 2, biases)
    assert attention == (tokens * 12 + biases, 0, tokens * 4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_the_products_are_those_whose_flops_are_counted(model, mode):
    products = [*list_products(get_spec(model))]
    flops = sum(product.flops * num_passes(mode, is_first=i == 0) for i, product in enumerate(products))
    assert flops == count_flops(model, mode=mode).total


@pytest.mark.parametrize("model", MODELS)
def test_the_weights_of_the_products_are_the_models_kernels_and_tables(model):
    leaves = expected_params(model).values()
    kernels = sum(math.prod(leaf.shape) for leaf in leaves if leaf.kind in ("linear", "conv", "rel_pos"))
    assert sum(product.weights for product in list_products(get_spec(model))) == kernels


@pytest.mark.parametrize("model", MODELS)
def test_the_flops_of_a_matmul_follow_from_its_arrays(model):
    """Arrays of n i, i o and n o values: 2 n i o FLOPs, whose square is 4 times the product of the three."""
    for product in list_products(get_spec(model)):
        if product.kind == "linear":
            assert product.flops**2 == 4 * math.prod(product[2:])
        assert min(product.inputs, product.outputs) > 0


@pytest.mark.parametrize(
    ("numerics", "param_bytes", "value_bytes"),
    [
        ("float64", 8, 8),
        ("float32", 4, 4),
        ("tensorfloat32", 4, 4),
        ("bfloat16", 2, 2),
        ("float16", 2, 2),
        ("bfloat16_mixed", 4, 2),
    ],
)
def test_numerics_are_bytes_of_parameters_and_of_values(numerics, param_bytes, value_bytes):
    weights = sum(product.weights for product in list_products(get_spec("resnet50")))
    values = sum(product.inputs + product.outputs for product in list_products(get_spec("resnet50")))
    for batch_size in (1, 8):
        expected = weights * param_bytes + batch_size * values * value_bytes
        assert count_traffic("resnet50", 224, batch_size=batch_size, numerics=numerics) == expected


def test_windows_move_more_than_their_grid_where_they_are_padded():
    padded, divided = (
        count_traffic(f"vitdet_b16:window_size={size},rel_pos=off", 1024, batch_size=1) for size in (14, 16)
    )
    assert padded - divided == 8 * 4 * (70**2 - 64**2) * 4 * 768  # q, k, v and the output of 8 blocks, in float32


def test_a_model_of_another_library_is_unknown():
    assert count_traffic("timm:resnet18", 224, batch_size=1) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "training"}, "unknown mode 'training'"),
        ({"numerics": "fp32"}, "unknown numerics 'fp32'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"image_size": 8}, "image_size=8"),
    ],
)
def test_what_cannot_be_counted_is_named(changes, message):
    arguments = {"image_size": 224, "batch_size": 1, **changes}
    with pytest.raises(ValueError, match=message):
        count_traffic("vit_b16", **arguments)


def test_a_product_is_its_kind_and_four_numbers():
    first = next(list_products(get_spec("vit_b16")))
    assert first == Product("patch_embed", 231_211_008, 224 * 224 * 3, 16 * 16 * 3 * 768, 196 * 768)
