"""timm's weights by name: from a local file through timm's own loading, and from a hub that is played here."""

import importlib.metadata
import pickle

import numpy as np
import pytest

timm = pytest.importorskip("timm")
torch = pytest.importorskip("torch")

from tests.big_vision_files import augreg, vit_tree
from vitcmp.checkpoints import from_timm, load_weights, weights_id
from vitcmp.infer import infer_spec
from vitcmp.params import fit_image_size, init_weights
from vitcmp.specs import get_spec
from vitcmp.timm_hub import TimmState, Told, read_timm, told_of

VIT, RESNET = "vit_tiny_patch16_224", "resnet18"


@pytest.fixture(scope="module")
def models():
    """Gives timm's models with random weights and 5 classes, each built once."""
    torch.manual_seed(0)
    built = {name: timm.create_model(name, pretrained=False, num_classes=5) for name in (VIT, RESNET)}
    for model in built.values():
        for array in model.state_dict().values():
            if array.is_floating_point():
                array.copy_(torch.rand(array.shape) * 0.1 + 0.05)
    return built


@pytest.fixture
def hub(monkeypatch, models):
    """Plays the hub: `create_model(pretrained=True)` gives the models above, or raises what it is told to."""
    faults = []

    def create_model(name, pretrained):
        if faults:
            raise faults[0]
        return models[name.partition(".")[0]]

    monkeypatch.setattr(timm, "create_model", create_model)
    return faults


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize(("name", "model"), [(VIT, "vit_ti16"), (f"{VIT}.augreg_in21k", "vit_ti16"), (RESNET, RESNET)])
def test_weights_of_the_hub_load_by_name(hub, models, name, model):
    expected = from_timm(models[name.partition(".")[0]].state_dict(), f"{model}:num_classes=5")
    assert_equal(load_weights(f"timm:{name}", f"{model}:num_classes=5"), expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("name", "model"), [(VIT, "vit_ti16"), (RESNET, RESNET)])
def test_a_local_file_loads_through_timm(tmp_path, models, name, model, suffix):
    state = models[name].state_dict()
    if suffix == ".pth":
        torch.save({"state_dict": state}, tmp_path / "w.pth")
    else:
        pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "w.safetensors")
    loaded = load_weights(f"timm:{name}:{tmp_path}/w{suffix}", f"{model}:num_classes=5")
    assert_equal(loaded, from_timm(state, f"{model}:num_classes=5"))


def test_a_local_file_of_other_names_is_renamed_by_timm(tmp_path):
    """ConvNeXt as its authors' repository has it, which timm's `checkpoint_filter_fn` renames."""
    model = timm.create_model("convnext_atto", pretrained=False, num_classes=3)
    names = {
        "stem.0": "downsample_layers.0.0",
        "stem.1": "downsample_layers.0.1",
        "head.norm": "norm",
        "head.fc": "head",
    }
    names |= {f"stages.{i}.downsample": f"downsample_layers.{i}" for i in range(1, 4)} | {".blocks.": "."}
    names |= {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
    state = {}
    for name, array in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = array[:, :, 0, 0] if "pwconv" in name and array.ndim == 4 else array
    torch.save({"model": state}, tmp_path / "w.pth")
    loaded = load_weights(f"timm:convnext_atto:{tmp_path}/w.pth", "convnext_atto:num_classes=3")
    assert_equal(loaded, from_timm(model.state_dict(), "convnext_atto:num_classes=3"))


def test_float64_and_another_grid_are_kept_as_they_are_in_the_file(tmp_path, models):
    state = {name: array.double() + 1e-12 for name, array in models[VIT].state_dict().items()}
    state["pos_embed"] = torch.rand(1, 1 + 9, 192).double()
    torch.save(state, tmp_path / "w.pth")
    loaded = load_weights(f"timm:{VIT}:{tmp_path}/w.pth", "vit_ti16:num_classes=5,image_size=80x112")
    expected = from_timm(state, "vit_ti16:num_classes=5,image_size=48")
    assert_equal(loaded, fit_image_size(expected, "vit_ti16:num_classes=5,image_size=80x112"))
    assert torch.get_default_dtype() == torch.float32


def test_a_flax_file_loads_through_timm_and_through_us_alike(tmp_path):
    weights = init_weights("vit_ti16:num_classes=5")
    np.savez(tmp_path / "w.npz", **augreg(vit_tree(weights, 3), np.full((1, 1, 192), 0.5, np.float32)))
    ours = load_weights(tmp_path / "w.npz", "vit_ti16:num_classes=5")
    assert_equal(load_weights(f"timm:{VIT}:{tmp_path}/w.npz", "vit_ti16:num_classes=5"), ours)
    smaller = vit_tree(init_weights("vit_ti16:image_size=96"), 3)
    np.savez(tmp_path / "w.npz", **augreg(smaller, np.ones((1, 1, 192))))
    with pytest.raises(ValueError, match="pos_embedding has 37 rows, not 197; give the path alone"):
        read_timm(f"timm:{VIT}:{tmp_path}/w.npz")


def test_what_timm_would_leave_random_is_refused(tmp_path, models):
    tree = augreg(vit_tree(init_weights("vit_ti16:num_classes=5"), 3), np.ones((1, 1, 192), np.float32))
    np.savez(tmp_path / "w.npz", **{name: x for name, x in tree.items() if name != "cls"})
    with pytest.raises(ValueError, match=f"timm's {VIT} does not take this file: KeyError: 'cls"):
        read_timm(f"timm:{VIT}:{tmp_path}/w.npz")
    state = models[VIT].state_dict()
    torch.save({name: x for name, x in state.items() if not name.startswith("blocks.3")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"does not take this file: .*blocks\.3\.norm1\.weight"):
        read_timm(f"timm:{VIT}:{tmp_path}/w.pth")


class Danger:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:", "timm:: write timm:NAME, or timm:NAME:PATH for a local file"),
        (f"timm:{VIT}:", "write timm:NAME, or timm:NAME:PATH"),
        ("timm:vit_tiny_patch61_224", "has no model 'vit_tiny_patch61_224'; did you mean 'vit_tiny_patch16_224'?"),
        (f"timm:{VIT}.augreg_in22k", f"{VIT} has no weights 'augreg_in22k'; did you mean 'augreg_in21k'?; timm has: "),
        ("timm:samvit_base_patch16_224", "timm has no pretrained weights for samvit_base_patch16_224; give a file, as"),
        (f"timm:{VIT}:nothing.pth", "nothing.pth: no such file"),
        (f"timm:{VIT}:pickle.pth", "pickle.pth: holds a pickled "),
        (f"timm:{RESNET}:vit.pth", "timm's resnet18 does not take this file: RuntimeError: Error(s) in"),
        (f"timm:{VIT}:empty.pth", "empty.pth: is empty"),
    ],
)  # fmt: skip
def test_what_timm_cannot_give_is_one_clear_error(tmp_path, monkeypatch, models, source, message):
    monkeypatch.chdir(tmp_path)
    torch.save(models[VIT].state_dict(), "vit.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Danger(), protocol=2))
    with pytest.raises(ValueError) as caught:
        load_weights(source, "vit_ti16:num_classes=5")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [OSError("no route"), RuntimeError("no hub"), ValueError("no file")])
def test_a_hub_out_of_reach_says_what_to_do(hub, monkeypatch, fault):
    hub.append(fault)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(
        ValueError, match=rf"timm:{VIT}: cannot be had from the hub \({type(fault).__name__}: no "
    ) as caught:
        load_weights(f"timm:{VIT}", "vit_ti16")
    assert f"download the weights of timm/{VIT}.augreg_in21k_ft_in1k from the hub elsewhere" in str(caught.value)
    assert f"timm:{VIT}:PATH" in str(caught.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set, and it is not in the cache"):
        load_weights(f"timm:{VIT}", "vit_ti16")


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match=f"timm:{VIT}: needs timm, which is not installed: pip install timm, or give"):
        load_weights(f"timm:{VIT}", "vit_ti16")


def test_the_id_of_timms_weights_has_its_version_and_the_hash_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"x")
    version = importlib.metadata.version("timm")
    assert weights_id(f"timm:{VIT}") == f"timm:{VIT}@{version}"
    assert weights_id(f"timm:{VIT}:{tmp_path}/w.pth") == f"timm:{VIT}@{version}:{weights_id(tmp_path / 'w.pth')}"
    with pytest.raises(ValueError, match="write timm:NAME"):
        weights_id("timm:")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ValueError, match="timm is not installed; pip install timm, or give a file"):
        weights_id(f"timm:{VIT}")


def test_a_proxy_that_refuses_is_one_clear_error(hub):
    errors = pytest.importorskip("huggingface_hub.errors")
    hub.append(errors.HTTPError("403 Forbidden"))
    with pytest.raises(ValueError, match=r"timm:vit_tiny_patch16_224: cannot be had from the hub \(.*; download"):
        read_timm(f"timm:{VIT}")


def saved(path, name, **options):
    """A file of timm's model with random weights, and its state."""
    torch.manual_seed(0)
    state = timm.create_model(name, pretrained=False, **options).state_dict()
    torch.save(state, path)
    return state


@pytest.mark.parametrize("size", ["112x448", "208x240"])
def test_the_name_tells_the_grid_where_rows_alone_would_mislead(tmp_path, size):
    """196 rows are 14x14 and 7x28, and a class token and 13x15."""
    state = saved(tmp_path / "w.pth", VIT)
    loaded = load_weights(f"timm:{VIT}:{tmp_path}/w.pth", f"vit_ti16:image_size={size}")
    assert_equal(loaded, fit_image_size(from_timm(state, "vit_ti16"), f"vit_ti16:image_size={size}"))


def test_the_name_tells_a_table_without_a_class_token_of_another_grid():
    """As `no_embed_class=True` has it: 196 rows of 14x14, and none of the class token, at 13x15 = 195."""
    state = timm.create_model(VIT, no_embed_class=True).state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    told = Told(grid_size=(14, 14), num_positions_before=0)
    weights = from_timm(TimmState(arrays, told), "vit_ti16:image_size=208x240")
    np.testing.assert_array_equal(weights["cls_token"], arrays["cls_token"])


def state_of(name, **options):
    """What `read_timm` gives, of a model whose arrays are zeros and take no memory."""
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    zero = np.float32(0)
    return TimmState({key: np.broadcast_to(zero, x.shape) for key, x in model.state_dict().items()}, told_of(model))


SIGLIP = "vit_b32:pool=map,num_classes=0,image_size=256"
SAM = "vitdet_b16:neck_dim=256,num_classes=0,image_size=1024"
TEST_VIT = "vit_ti16:width=64,depth=6,mlp_dim=192,image_size=160"


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("test_vit", f"{TEST_VIT},num_heads=4", "num_heads=2 and not 4; write MODEL:num_heads=2"),
        ("vit_base_patch32_siglip_256", SIGLIP, "gelu=tanh and not erf; write MODEL:gelu=tanh, or give a file by its"),
        ("resnetblur18", "resnet18", "this variant is not supported: it has BlurPool2d, which no spec has"),
        ("samvit_base_patch16", SAM, "norm_eps=1e-05 and not 1e-06"),
        ("samvit_base_patch16", f"{SAM},norm_eps=1e-5,global_blocks=2+5+11", "blocks.8.attn.rel_pos_h has shape"),
        ("resnetv2_50x1_bit", "bit_r50x1:weight_eps=1e-10,stem_pad=lowest", "stem_pad=zero and not lowest"),
        ("samvit_base_patch16", f"{SAM},norm_eps=1e-5,neck_eps=1e-5", "neck_eps=1e-06 and not 1e-05"),
        ("samvit_base_patch16", f"{SAM},norm_eps=1e-5,window_policy=divide", "window_policy=pad and not divide"),
        ("samvit_base_patch16_224", "vitdet_b16:pos_embed=sincos2d,norm_eps=1e-5", "it has no position embedding"),
        ("resnetv2_50x1_bit", "bit_r50x1:num_groups=16", "num_groups=32 and not 16"),
        ("convnext_atto", "convnext_atto:gelu=tanh", "gelu=erf and not tanh"),
        ("vit_base_patch16_224", "vitdet_b16:norm_eps=1e-5", "norm_eps=1e-06 and not 1e-05"),
    ],
)
def test_a_spec_that_computes_otherwise_than_the_named_model_is_refused(name, model, message):
    with pytest.raises(ValueError) as caught:
        from_timm(state_of(name), model)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "avg", "fc_norm": False}, "it pools by 'avg' beside a class token"),
        ({"global_pool": "max", "fc_norm": False, "class_token": False}, "it pools by 'max'"),
        ({"act_layer": "quick_gelu"}, "it has QuickGELU"),
    ],
)
def test_a_vit_of_the_same_arrays_that_no_spec_describes_is_refused(options, message):
    model = "vit_ti16" if options.get("class_token", True) else "vit_ti16:pool=gap"
    with pytest.raises(ValueError, match=f"this variant is not supported: {message}, which no spec has"):
        from_timm(state_of(VIT, **options), model)


@pytest.mark.parametrize(
    ("name", "trait"),
    [
        ("resnetv2_18d", "its stem has several convolutions"),
        ("vit_small_patch16_18x2_224", "its blocks are ParallelThingsBlock"),
        ("vit_pwee_patch16_reg1_gap_256", "its blocks are ParallelScalingBlock"),
        ("vit_dpwee_patch16_reg1_gap_256", "its blocks are DiffParallelScalingBlock"),
    ],
)
def test_what_no_spec_has_is_told_of_any_model(name, trait):
    assert trait in state_of(name).told.traits


def test_a_vit_without_positions_is_no_crash():
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "pos_embed": "none"}
    state = state_of(VIT, **options)
    with pytest.raises(ValueError, match="it has no position embedding, which no spec has"):
        from_timm(state, infer_spec(state))


def test_how_a_vit_pools_is_dropped_where_it_is_upcycled_and_its_gelu_is_not():
    from_timm(state_of(VIT, global_pool="avg", fc_norm=False), "vitdet_ti16")
    with pytest.raises(ValueError, match="it has QuickGELU, which no spec has"):
        from_timm(state_of(VIT, act_layer="quick_gelu"), "vitdet_ti16")


def test_a_dilated_resnet_is_refused():
    with pytest.raises(ValueError, match="its convolutions are dilated"):
        from_timm(state_of("resnet18", output_stride=16), "resnet18")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("test_vit", f"{TEST_VIT},num_heads=2"),
        ("vit_base_patch32_siglip_256", f"{SIGLIP},gelu=tanh"),
        ("resnetv2_50x1_bit", "bit_r50x1"),
        ("samvit_base_patch16", f"{SAM},norm_eps=1e-5"),
        ("convnext_atto", "convnext_atto"),
        ("resnet50", "resnet50"),
    ],
)
def test_the_name_tells_the_spec(name, model):
    assert infer_spec(state_of(name)) == get_spec(model)
    from_timm(state_of(name), model)
