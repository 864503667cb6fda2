"""Analytic FLOPs equal torch's count on the meta device, the walk over the jaxpr, and timm's models, to the FLOP."""

import importlib

import numpy as np
import pytest

from vitcmp.backend import load_backend
from vitcmp.flops import count_flops
from vitcmp.params import init_weights
from vitcmp.specs import get_spec

VIT = "width=48,depth=2,num_heads=3,mlp_dim=96,num_classes=10"
VITDET = "width=48,depth=3,num_heads=3,mlp_dim=96,num_classes=10"
RESNET = "width=8,num_classes=10"
CONVNEXT = "depths=1x2x1x1,widths=8x16x24x32,num_classes=10"

MODELS = {
    "vit": f"vit_ti16:{VIT}",
    "vit-big_vision": f"vit_ti16:{VIT},pool=gap,pos_embed=sincos2d,gelu=tanh",
    "vit-map-rep": f"vit_ti14:{VIT},pool=map,rep_size=true",
    "vit-rep": f"vit_ti16:{VIT},pool=tok,rep_size=20",
    "vit-map-headless": f"vit_ti16:{VIT},pool=map,num_classes=0",
    "vitdet": f"vitdet_ti16:{VITDET},window_size=2,global_blocks=1",
    "vitdet-no-rel-pos": f"vitdet_ti16:{VITDET},window_size=3,global_blocks=0+1,rel_pos=off",
    "vitdet-neck": f"vitdet_ti16:{VITDET},window_size=3,global_blocks=0,neck_dim=20",
    "vitdet-divide-map": f"vitdet_ti16:{VITDET},window_size=3,window_policy=divide,global_blocks=1,pool=map",
    "vitdet-global": f"vitdet_ti16:{VITDET},window_size=14,global_blocks=3,rel_pos=off,pos_embed=sincos2d",
    "vitdet-neck-map-rep": f"vitdet_ti16:{VITDET},window_size=14,neck_dim=24,pool=map,rep_size=true,global_blocks=1",
    "resnet-basic": f"resnet18:{RESNET}",
    "resnet-two-stages": f"resnet18:{RESNET},depths=2x1",
    "resnet-bottleneck": f"resnet50:{RESNET},depths=2x1x1x2",
    "resnet-headless": f"resnet50:{RESNET},num_classes=0",
    "bit": "bit_r50x1:depths=1x2,num_classes=10",
    "bit-lowest-headless": "bit_r50x2:depths=2x1x1x1,num_groups=16,stem_pad=lowest,num_classes=0",
    "bit-v1": "bit_v1_r50x1:depths=2x1x1,num_classes=10",
    "convnext": f"convnext_atto:{CONVNEXT}",
    "convnext-3x3": f"convnext_atto:{CONVNEXT},kernel_size=3,gelu=tanh",
    "convnext-headless": f"convnext_atto:{CONVNEXT},num_classes=0",
}
SIZES = [
    "32",  # two patches a side; ResNet ends in one pixel
    "80x112",  # not square, and no multiple of the windows
    "101x67",  # nor of the patches
]

FULL_SIZE = [
    *("vit_ti16", "vit_b32", "vitdet_b16", "vitdet_b16:neck_dim=256"),
    *("resnet34", "resnet50", "bit_r50x1", "bit_r152x4", "convnext_b"),
]

# timm's model, ours, the size, and whether timm's constructor wants to know it, for a position embedding.
TIMM = [
    ("vit_base_patch16_224", "vit_b16", "224", True),
    ("vit_base_patch16_224", "vit_b16", "101x170", True),
    ("resnet50", "resnet50", "224", False),
    ("resnet50", "resnet50", "97x131", False),
    ("resnet18", "resnet18", "97x131", False),
    ("resnetv2_101x3_bit", "bit_r101x3", "97x131", False),
    ("convnext_base", "convnext_b", "224", False),
    ("convnext_base", "convnext_b", "97x131", False),
    ("samvit_base_patch16", "vitdet_b16:neck_dim=256,num_classes=0", "1024", True),
    ("samvit_base_patch16", "vitdet_b16:neck_dim=256,num_classes=0", "352x240", True),
]


@pytest.fixture(params=["jax", "torch"])
def backend(request):
    pytest.importorskip(request.param)
    return load_backend(request.param, platform="cpu")


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_the_analytic_count_is_the_frameworks_own(backend, model, image_size):
    spec = get_spec(f"{MODELS[model]},image_size={image_size}")
    assert count_flops(spec).total == backend.count_flops(spec)


@pytest.mark.parametrize("model", FULL_SIZE)
def test_the_analytic_count_is_the_frameworks_own_at_full_size(backend, model):
    spec = get_spec(model)
    assert count_flops(spec).total == backend.count_flops(spec)


@pytest.mark.parametrize("model", MODELS)
def test_the_analytic_training_count_is_the_frameworks_own(backend, model):
    spec = get_spec(f"{MODELS[model]},image_size=101x67")
    counted = {"jax": _jax_training, "torch": _torch_training}[backend.name](backend.build(spec), spec)
    excess = _torch_excess(spec) if backend.name == "torch" else 0
    assert count_flops(spec, mode="train").total == counted - excess


@pytest.mark.parametrize("model", ["resnet-basic", "resnet-bottleneck"])
def test_a_folded_batch_norm_changes_no_count(backend, model):
    kept, folded = (get_spec(f"{MODELS[model]},image_size=101x67,is_folded={choice}") for choice in ("false", "true"))
    assert count_flops(folded) == count_flops(kept)
    assert backend.count_flops(folded) == count_flops(kept).total


def test_a_model_with_weights_counts_alike_and_keeps_them(backend):
    spec = get_spec(f"resnet18:{RESNET},image_size=40x33")
    weights = init_weights(spec)
    model = backend.load(backend.build(spec), weights, numerics="float32")
    counter = importlib.import_module(f"{backend.name}_models.flops")
    assert counter.count_flops(model, spec) == count_flops(spec).total
    exported = backend.export(model)
    assert all(np.array_equal(exported[name], weights[name]) for name in weights)


@pytest.mark.parametrize(("timm_name", "model", "image_size", "is_fixed_size"), TIMM)
def test_the_analytic_count_is_that_of_timms_model(timm_name, model, image_size, is_fixed_size):
    timm = pytest.importorskip("timm")
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    size = get_spec(f"resnet18:image_size={image_size}").image_size
    with torch.device("meta"):
        theirs = timm.create_model(timm_name, **({"img_size": size} if is_fixed_size else {})).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            theirs(torch.empty(1, 3, *size))
    spec = get_spec(f"{model}{',' if ':' in model else ':'}image_size={image_size}")
    assert count_flops(spec).total == counter.get_total_flops() - _timm_excess(spec)


def _timm_excess(spec):
    """Returns what timm executes and ours does not: in ViTDet, the projections of the padding."""
    if spec.family != "vitdet":
        return 0
    (height, width), (rows, columns) = spec.grid_size, spec.window_of(0)
    padding = (height + -height % rows) * (width + -width % columns) - height * width
    assert padding
    return (spec.depth - len(spec.global_blocks)) * 8 * padding * spec.width**2


def _torch_excess(spec):
    """Returns what conv_backward_flop of torch 2.15 adds: it takes the gradient of depthwise weights for dense."""
    if spec.family != "convnext":
        return 0
    rows, columns = spec.image_size[0] // 4, spec.image_size[1] // 4
    stages = enumerate(zip(spec.depths, spec.widths, strict=True))
    maps = ((depth * width, width, (rows >> i) * (columns >> i)) for i, (depth, width) in stages)
    return sum(2 * spec.kernel_size**2 * channels * pixels * (width - 1) for channels, width, pixels in maps)


def _torch_training(model, spec):
    """Counts a step on two images, because BatchNorm refuses to train on one value, and halves it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from torch_models.train import make_train_step

    images = torch.empty((2, 3, *spec.image_size), device="meta")
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    step = make_train_step(model.to("meta"), optimizer="adamw")
    with FlopCounterMode(display=False) as counter:
        step(images, labels)
    return counter.get_total_flops() / 2


def _jax_training(model, spec):
    import jax
    import jax.numpy as jnp

    from jax_models.flops import count_jaxpr_flops
    from jax_models.layers import Conv
    from jax_models.train import make_train_step

    model.set_attributes(Conv, method="native")  # expanded for a CPU, a depthwise convolution has no matmul to count
    images = jax.ShapeDtypeStruct((2, *spec.image_size, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    step, state = make_train_step(model, optimizer="adamw")
    return count_jaxpr_flops(jax.make_jaxpr(step)(state, images, labels)) / 2
