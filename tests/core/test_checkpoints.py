"""Checkpoints: every file format and both naming schemes, what timm really writes, and every kind of bad file."""

import argparse
import collections

import numpy as np
import pytest

from vitcmp.checkpoints import from_timm, load_weights, save_weights, to_timm
from vitcmp.params import expected_params, fit_image_size, init_weights, sincos2d, upcycle
from vitcmp.specs import get_spec

VIT = "depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=80x112"
SPECS = [
    f"vit_ti16:{VIT}",
    f"vit_ti16:{VIT},pool=gap,rep_size=24",
    f"vit_ti16:{VIT},pool=map",
    f"vit_ti16:{VIT},pos_embed=sincos2d",
    "vit_ti16:depth=1,width=48,num_heads=3,mlp_dim=96,num_classes=0",
    f"vitdet_ti16:{VIT},window_size=3,global_blocks=1",
    f"vitdet_ti16:{VIT},window_size=4,window_policy=divide,global_blocks=0,pos_embed=sincos2d",
    "vitdet_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=0,image_size=80x112,neck_dim=24,rel_pos=false,"
    "global_blocks=1",
    "bit_r26x1:depths=1x2,num_classes=10",
    "bit_v1_r26x1:depths=1x1,num_classes=0",
    "resnet18:width=8,depths=1x1x1x1,num_classes=10",
    "resnet50:width=8,depths=1x1x1x1,num_classes=10",
    "convnext_tiny:depths=1x1x1x1,widths=8x16x24x32,num_classes=10",
]
TINY = SPECS[0]
# timm's own models with the spec that describes each, at sizes that are cheap to build.
PLAIN = {"depth": 2, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 2, "img_size": (80, 112)}
SAM = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": (80, 112), "window_size": 3}
TIMM_MODELS = {
    "vit_tiny_patch16_224": ("vit_ti16", {}),
    "vit_base_patch16_siglip_224": (f"vit_b16:{VIT},pool=map,num_classes=0", PLAIN),
    "vit_small_patch16_224": (f"vit_s16:{VIT}", PLAIN | {"num_classes": 10}),
    "samvit_base_patch16": (
        f"vitdet_b16:{VIT},depth=3,mlp_dim=192,window_size=3,global_blocks=0+1,neck_dim=16,num_classes=0",
        SAM | {"neck_chans": 16, "global_attn_indexes": (0, 1)},
    ),
    "samvit_base_patch16_224": (
        f"vitdet_b16:{VIT},depth=3,mlp_dim=192,window_size=3,global_blocks=1+2",
        SAM | {"use_abs_pos": True, "global_attn_indexes": (1, 2), "num_classes": 10},
    ),
    "resnet18": ("resnet18", {}),
    "resnet50": ("resnet50", {}),
    "convnext_atto": ("convnext_atto", {}),  # conv_mlp=True: 1x1 convolutions for linear layers
    "convnext_tiny": (
        "convnext_tiny:depths=1x1x2x1,widths=8x16x24x32",
        {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
    ),
}


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.fixture(scope="module")
def timm_model():
    """Builds timm's model with random weights, once; norms, statistics and zero-init arrays are drawn too."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    models = {}

    def build(name):
        if name not in models:
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=False, **TIMM_MODELS[name][1]).eval()
            for array in model.state_dict().values():
                if array.is_floating_point():
                    array.copy_(torch.rand(array.shape) * 0.1 + 0.05)
            models[name] = model
        return models[name]

    return build


def write(path, state):
    """Writes a torch state dict in the format of the suffix."""
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: array.numpy() for name, array in state.items()})
    else:
        pytest.importorskip("torch").save(state, path)


def arrays_of_timm(model, spec):
    """Names and lays out a timm model's arrays by its modules' types: an oracle that knows nothing of leaf kinds."""
    arrays = {}
    for prefix, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name != "num_batches_tracked":
                leaf, array = leaf_of_timm(module, prefix, name, tensor.detach().numpy())
                arrays["/".join([*filter(None, prefix.split(".")), leaf])] = array
    if spec.family == "vit":
        table, num_tokens = arrays["pos_embed"], int("cls_token" in arrays)
        if num_tokens:
            arrays["cls_token"] = arrays["cls_token"] + table[:, :1]
        arrays["pos_embed"] = table[:, num_tokens:].reshape(1, *spec.grid_size, spec.width)
    if spec.family == "vitdet" and not spec.neck_dim:
        renamed = {"neck/scale": "norm/scale", "neck/bias": "norm/bias"}
        renamed |= {"head/fc/kernel": "head/kernel", "head/fc/bias": "head/bias"}
        arrays = {renamed.get(name, name): array for name, array in arrays.items()}
    return arrays


def leaf_of_timm(module, prefix, name, array):
    from torch import nn

    if name != "weight":
        return {"running_mean": "mean", "running_var": "var"}.get(name, name), array
    if isinstance(module, nn.Linear):
        return "kernel", array.T
    if isinstance(module, nn.Conv2d) and prefix.endswith(("fc1", "fc2")):
        return "kernel", array.squeeze((2, 3)).T
    if isinstance(module, nn.Conv2d):
        return "kernel", np.einsum("oihw->hwio", array)
    return "scale", array


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("model", SPECS)
def test_saved_weights_come_back_bit_for_bit(tmp_path, model, suffix):
    weights = init_weights(model, seed=1)
    save_weights(tmp_path / f"w{suffix}", weights)
    assert_equal(load_weights(tmp_path / f"w{suffix}", model), weights)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_float64_weights_stay_float64(tmp_path, suffix):
    weights = {name: array + np.float64(1e-12) for name, array in init_weights(TINY).items()}
    save_weights(tmp_path / f"w{suffix}", weights)
    assert_equal(load_weights(tmp_path / f"w{suffix}", TINY), weights)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_order_of_arrays_in_memory_does_not_matter(tmp_path, suffix):
    weights = init_weights(TINY)
    scattered = {name: np.asfortranarray(array)[..., ::-1] for name, array in weights.items()}
    save_weights(tmp_path / f"w{suffix}", {name: array[..., ::-1] for name, array in scattered.items()})
    assert_equal(load_weights(tmp_path / f"w{suffix}", TINY), weights)


@pytest.mark.parametrize("model", SPECS)
def test_timm_names_there_and_back_change_nothing(model):
    weights = init_weights(model, seed=1)
    assert_equal(from_timm(to_timm(weights, model), model), weights)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("name", TIMM_MODELS)
def test_a_timm_models_file_loads_with_every_array_in_its_place(tmp_path, timm_model, name, suffix):
    model, spec = timm_model(name), get_spec(TIMM_MODELS[name][0])
    write(tmp_path / f"w{suffix}", model.state_dict())
    weights = load_weights(tmp_path / f"w{suffix}", spec)
    assert_equal(weights, arrays_of_timm(model, spec))
    assert weights.keys() == expected_params(spec).keys()


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_a_timm_model_takes_our_weights_strictly_and_computes_the_same(timm_model, name):
    import timm
    import torch

    original, (model, options) = timm_model(name), TIMM_MODELS[name]
    weights = from_timm(original.state_dict(), model)
    state = {key: torch.from_numpy(array) for key, array in to_timm(weights, model).items()}
    copy = timm.create_model(name, pretrained=False, **options).eval()
    copy.load_state_dict(state, strict=True)
    images = torch.rand(1, 3, *(get_spec(model).image_size if options.get("img_size") else (64, 64)))
    if name == "vit_tiny_patch16_224":
        images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(copy(images), original(images), rtol=0, atol=0)


def test_a_class_token_and_its_position_are_folded_into_one():
    weights = init_weights(TINY)
    state = to_timm(weights, TINY)
    assert state["pos_embed"].shape == (1, 1 + 5 * 7, 48)
    assert not state["pos_embed"][:, 0].any()
    state["pos_embed"][:, 0] = 0.25
    np.testing.assert_array_equal(from_timm(state, TINY)["cls_token"], weights["cls_token"] + np.float32(0.25))


def test_a_class_token_without_a_position_is_kept():
    weights = init_weights(TINY)
    state = to_timm(weights, TINY)
    state["pos_embed"] = state["pos_embed"][:, 1:]
    assert_equal(from_timm(state, TINY), weights)


def test_a_fixed_embedding_is_written_for_timm_and_only_a_true_one_is_dropped_again():
    model = f"vit_ti16:{VIT},pos_embed=sincos2d"
    state = to_timm(init_weights(model), model)
    np.testing.assert_allclose(state["pos_embed"][:, 1:].reshape(1, 5, 7, 48), sincos2d((5, 7), 48), atol=1e-7)
    state["pos_embed"][0, 3, 5] += 0.01
    with pytest.raises(ValueError, match=r"unexpected pos_embed \(1, 5, 7, 48\)"):
        from_timm(state, model)


@pytest.mark.parametrize(
    ("model", "is_conv"), [("convnext_atto:depths=1x1x1x1", True), ("convnext_t:depths=1x1x1x1", False)]
)
def test_conv_mlp_is_as_in_timms_variant_of_the_same_widths(model, is_conv):
    weights = init_weights(model)
    for conv_mlp in (None, True, False):
        state = to_timm(weights, model, conv_mlp=conv_mlp)
        is_4d = state["stages.0.blocks.0.mlp.fc1.weight"].ndim == 4
        assert is_4d == (is_conv if conv_mlp is None else conv_mlp)
        assert_equal(from_timm(state, model), weights)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_arrays_become_float32(tmp_path, suffix, dtype):
    torch = pytest.importorskip("torch")
    model = f"vit_ti16:{VIT},pool=gap"
    expected = to_timm(init_weights(model), model)
    state = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in expected.items()}
    if suffix == ".npz":  # as numpy itself stores them: bfloat16 as two bytes of no meaning
        raw = {name: tensor.view(torch.uint16).numpy() for name, tensor in state.items()}
        np.savez(tmp_path / "w.npz", **{name: a.view("V2" if dtype == "bfloat16" else "f2") for name, a in raw.items()})
    else:
        write(tmp_path / f"w{suffix}", state)
    weights = load_weights(tmp_path / f"w{suffix}", model)
    assert_equal(weights, from_timm({name: tensor.float().numpy() for name, tensor in state.items()}, model))
    assert {array.dtype for array in weights.values()} == {np.dtype("float32")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_live_models_tensors_and_parameters_load_too(dtype):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3).to(getattr(torch, dtype))
    spec = "vit_ti16:depth=1,num_classes=3"
    weights = from_timm(dict(model.named_parameters()), spec)
    state = {name: (x if dtype == "float64" else x.float()).numpy() for name, x in model.state_dict().items()}
    assert_equal(weights, from_timm(state, spec))


def other(state):
    return {name: array * 0 for name, array in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model": state},
        lambda state: {"model_ema": state, "model": other(state)},
        lambda state: {"state_dict_ema": state, "state_dict": other(state), "optimizer": {"state": {0: 1}}},
        lambda state: {f"module.{name}": array for name, array in state.items()},
        lambda state: {"model": {f"_orig_mod.module.{name}": array for name, array in state.items()}},
        lambda state: collections.OrderedDict(state),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_the_state_dict_is_found_where_training_programs_put_it(tmp_path, wrap, suffix):
    torch = pytest.importorskip("torch")
    weights = init_weights(SPECS[-2])
    state = {name: torch.from_numpy(array) for name, array in to_timm(weights, SPECS[-2]).items()}
    torch.save(wrap(state), tmp_path / f"w{suffix}")
    assert_equal(load_weights(tmp_path / f"w{suffix}", SPECS[-2]), weights)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_wraps_every_name_is_dropped_from_other_files_too(tmp_path, suffix):
    weights = init_weights(TINY)
    state = {f"module.{name}": array for name, array in to_timm(weights, TINY).items()}
    save_weights(tmp_path / f"w{suffix}", state)
    assert_equal(load_weights(tmp_path / f"w{suffix}", TINY), weights)


def test_torchs_old_format_loads_too(tmp_path):
    torch = pytest.importorskip("torch")
    weights = init_weights(TINY)
    state = {name: torch.from_numpy(array) for name, array in to_timm(weights, TINY).items()}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_equal(load_weights(tmp_path / "old.pth", TINY), weights)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("names", ["canonical", "timm"])
def test_a_position_embedding_of_another_grid_is_resampled(tmp_path, names, suffix):
    square, wide = (f"vit_ti16:{VIT},image_size={size}" for size in ("96x96", "80x112"))
    weights = init_weights(square)
    save_weights(tmp_path / f"w{suffix}", weights if names == "canonical" else to_timm(weights, square))
    loaded = load_weights(tmp_path / f"w{suffix}", wide)
    assert_equal(loaded, fit_image_size(weights, get_spec(wide)))
    assert loaded["pos_embed"].shape == (1, 5, 7, 48)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (
            "gap",
            "state: pos_embed has 35 rows, which fit neither the spec's 4x4 grid nor a square; give the image_size",
        ),
        (
            "tok",
            "pos_embed has 38 rows, which fit neither .* nor a square, with or without one for the class token; give",
        ),
    ],
)
def test_a_flat_embedding_of_no_square_grid_needs_its_image_size(pool, message):
    state = to_timm(init_weights(f"vit_ti16:{VIT},pool=gap"), f"vit_ti16:{VIT},pool=gap")
    if pool == "tok":
        state["cls_token"] = np.zeros((1, 1, 48))
        state["pos_embed"] = np.zeros((1, 38, 48))
    with pytest.raises(ValueError, match=message):
        from_timm(state, f"vit_ti16:{VIT},image_size=64,pool={pool}")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("names", ["canonical", "timm"])
@pytest.mark.parametrize("pool", ["tok", "gap", "map"])
def test_a_plain_vits_file_is_upcycled_to_a_vitdet(tmp_path, pool, names, suffix):
    plain = f"vit_ti16:{VIT},image_size=64,pool={pool}"
    vitdet = get_spec(f"vitdet_ti16:{VIT},window_size=3,global_blocks=1")
    weights = init_weights(plain)
    save_weights(tmp_path / f"w{suffix}", weights if names == "canonical" else to_timm(weights, plain))
    loaded = load_weights(tmp_path / f"w{suffix}", vitdet)
    assert_equal(loaded, upcycle(weights, vitdet))
    np.testing.assert_array_equal(loaded["head/kernel"], weights["head/kernel"])


def test_a_class_token_alone_tells_a_plain_vit():
    vitdet = get_spec(f"vitdet_ti16:{VIT},rel_pos=false,global_blocks=1,num_classes=0")
    weights = init_weights(TINY)
    loaded = from_timm(to_timm(weights, TINY), vitdet)
    assert_equal(loaded, upcycle(weights, vitdet))
