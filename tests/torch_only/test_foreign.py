"""timm's models behind our interface: sizes, weights, kernels, numerics and records."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

import vitcmp
from tests.harness.fakes import make_case
from tests.parity.helpers import relative_error
from torch_models.backend import TorchBackend
from vitcmp import worker
from vitcmp.backend import Unsupported, load_backend
from vitcmp.checkpoints import to_timm
from vitcmp.records import validate_record
from vitcmp.timm_hub import TimmState, Told

SIZE = (96, 160)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, *SIZE, 3))
LABELS = np.array([1, 7])
VIT, CNN = "timm:test_vit:num_classes=10", "timm:test_resnet:num_classes=10"  # timm's tiny models
# One of each kind of architecture, in how it takes the size of an image; FLOPs are counted, nothing is computed.
FAMILIES = (
    "vit_tiny_patch16_224 deit3_small_patch16_224 vit_little_patch16_reg4_gap_256 eva02_tiny_patch14_224 "
    "vit_tiny_r_s16_p8_224 mixer_s16_224 resnet18 regnety_002 convnextv2_atto efficientnet_b0 mobilenetv3_small_100"
).split()
LARGE_FAMILIES = (
    "vit_base_patch16_clip_224 beit_base_patch16_224 samvit_base_patch16 swin_tiny_patch4_window7_224 "
    "swinv2_tiny_window8_256 maxvit_tiny_tf_224 coatnet_0_224 xcit_nano_12_p16_224 dm_nfnet_f0 dm_nfnet_f1"
).split()


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return load_backend("torch", platform="cpu")


def spec_of(name: str) -> vitcmp.specs.Spec:
    return dataclasses.replace(vitcmp.get_spec(name), image_size=SIZE)


def load(backend, name, weights=None, *, attention=None, numerics="float32", layout=None):
    return backend.load(backend.build(spec_of(name), attention=attention), weights, numerics=numerics, layout=layout)


def timm_model(name: str, **options):
    """The model as a user of timm makes it, its weights drawn away from zeros and ones."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=10, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def state_of(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def nchw(images: np.ndarray, dtype=torch.float64):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype)


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE_FAMILIES)])
def test_every_family_takes_an_odd_size_and_its_flops_are_counted_there(backend, name):
    own = vitcmp.get_spec(f"timm:{name}:image_size={'x'.join(map(str, timm.get_pretrained_cfg(name).input_size[1:]))}")
    flops, own_flops = backend.count_flops(spec_of(f"timm:{name}")), backend.count_flops(own)
    pixels, own_pixels = (spec.image_size[0] * spec.image_size[1] for spec in (spec_of(f"timm:{name}"), own))
    # Linear in the pixels but for attention, which shrinks faster, and for borders, windows and channels attention.
    assert 0.55 < (flops / own_flops) / (pixels / own_pixels) < 1.35


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {"img_size": SIZE}),
        ("test_vit3", {"img_size": SIZE}),
        ("test_convnext2", {}),
        ("test_efficientnet", {}),
        ("test_nfnet", {}),
        ("test_resnet", {}),
        ("swin_tiny_patch4_window7_224", {"img_size": SIZE, "depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2)}),
    ],
)
def test_outputs_are_the_librarys_own(backend, name, options, monkeypatch):
    model = timm_model(name, **options)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **{**options, **given}))
    out = vitcmp.forward("torch", f"timm:{name}:num_classes=10", state_of(model), IMAGES, numerics="float64")
    with torch.inference_mode():
        features = model.forward_features(nchw(IMAGES))
        expected = {"logits": model(nchw(IMAGES)), "pre_logits": model.forward_head(features, pre_logits=True)}
    is_nhwc = features.ndim == 4 and not name.startswith("swin")
    expected["features"] = features.permute(0, 2, 3, 1) if is_nhwc else features
    assert out.keys() == expected.keys()
    assert max(relative_error(out[key], value.numpy()) for key, value in expected.items()) == 0


def test_our_vit_and_timms_are_one_model_by_our_interface_alone():
    spec = spec_of("vit_ti16:num_classes=10")
    weights = vitcmp.init_weights(spec)
    ours = vitcmp.forward("torch", spec, weights, IMAGES, numerics="float64")
    state = to_timm(weights, spec)
    theirs = vitcmp.forward("torch", "timm:vit_tiny_patch16_224:num_classes=10", state, IMAGES, numerics="float64")
    assert {"logits", "pre_logits", "features"} == theirs.keys()
    assert max(relative_error(ours[name], theirs[name]) for name in theirs) < 1e-9


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("vit_ti16", "vit_tiny_patch16_224"), ("resnet18", "resnet18"), ("bit_r50x1", "resnetv2_50x1_bit")],
)
def test_timms_graph_has_the_flops_of_our_formulas(backend, ours, theirs):
    assert backend.count_flops(spec_of(f"timm:{theirs}")) == vitcmp.count_flops(spec_of(ours)).total


def test_weights_that_nobody_gave_are_timms_own_from_seed_0_and_no_other_draw_is_moved(backend):
    states = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        states.append(backend.export(load(backend, VIT)))
        assert torch.equal(torch.rand(3), expected)
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["blocks.0.attn.qkv.weight"].std() > 0


@pytest.mark.parametrize("name", [VIT, CNN])
def test_exported_weights_have_timms_names_and_load_again(backend, name):
    state = backend.export(load(backend, name))
    shapes = {key: x.shape for key, x in timm.create_model(spec_of(name).name, num_classes=10).state_dict().items()}
    assert state.keys() == shapes.keys()
    again = backend.export(load(backend, name, state))
    assert all(np.array_equal(again[key], state[key]) for key in state)
    counts = {key for key in state if key.endswith("num_batches_tracked")}
    load(backend, name, {key: array for key, array in state.items() if key not in counts})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["test_vit", "flexivit_small", "swin_tiny_patch4_window7_224"])
def test_weights_of_another_image_size_are_fitted_as_timm_fits_them(name):
    """`swin` has smaller windows, and so tables, where its map is smaller; `flexivit` is resampled otherwise."""
    state = timm_model(name).float().state_dict()
    theirs = as_timm_loads(name, state, SIZE)
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    assert any(tuple(x.shape) != arrays[key].shape for key, x in theirs.state_dict().items())
    out = vitcmp.forward("torch", f"timm:{name}:num_classes=10", arrays, IMAGES.astype(np.float32))
    with torch.inference_mode():
        expected = theirs(torch.tensor(IMAGES.transpose(0, 3, 1, 2), dtype=torch.float32)).numpy()
    np.testing.assert_allclose(out["logits"], expected, atol=1e-4 * abs(expected).max())


def as_timm_loads(name, state, size):
    overlay = {"state_dict": dict(state), "num_classes": 10, "label_offset": 0, "custom_load": False}
    options = {"num_classes": 10, "img_size": size, "pretrained_cfg_overlay": overlay}
    return timm.create_model(name, pretrained=True, **options).eval()


def test_positions_of_another_grid_of_as_many_patches_are_fitted_where_the_name_tells(backend):
    """10x10 patches to 4x25."""
    state = timm_model("test_vit").float().state_dict()
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    spec = dataclasses.replace(vitcmp.get_spec(VIT), image_size=(64, 400))
    expected = as_timm_loads("test_vit", state, (64, 400)).state_dict()["pos_embed"].numpy()
    for weights in (arrays, TimmState(arrays, Told(grid_size=(10, 10)))):
        loaded = backend.export(backend.load(backend.build(spec), weights, numerics="float32"))["pos_embed"]
        np.testing.assert_allclose(loaded, arrays["pos_embed"] if weights is arrays else expected, atol=1e-6)
    assert abs(expected - arrays["pos_embed"]).max() > 0.01


def test_weights_of_a_deeper_model_at_another_size_are_listed_as_what_does_not_fit(backend):
    state = state_of(timm_model("swin_tiny_patch4_window7_224", depths=(2, 2, 8, 2)))
    with pytest.raises(ValueError, match=r"unexpected layers\.2\.blocks\.6"):
        load(backend, "timm:swin_tiny_patch4_window7_224:num_classes=10", state)


def test_patches_of_another_size_are_never_made_to_fit(backend):
    state = state_of(timm_model("vit_tiny_patch16_224", patch_size=32))
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight has shape \(192, 3, 32, 32\), expected"):
        load(backend, "timm:vit_tiny_patch16_224:num_classes=10", state)


def test_every_array_that_does_not_fit_is_in_one_error(backend):
    state = backend.export(load(backend, CNN))
    state["fc.weihgt"] = state.pop("fc.weight")
    state["conv1.0.weight"] = state["conv1.0.weight"][:-1]
    state["fc.bias"] = np.full_like(state["fc.bias"], np.nan)
    with pytest.raises(ValueError) as error:
        load(backend, CNN, state)
    for words in (
        "timm:test_resnet",
        "missing fc.weight",
        "unexpected fc.weihgt",
        "conv1.0.weight has shape",
        "finite",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("maxvit_tiny_tf_224", "90x130", ["maxvit_tiny_tf_224", "90x130", "takes 224 and 96x160"]),
        ("efficientformer_l1", "96x160", ["takes 224"]),
        ("convnext_atto", "18", ["image_size=18", "takes 224 and 32"]),
        ("mvitv2_tiny", "96x160", ["assert feat_size[0] == feat_size[1]", "takes 224"]),  # no words of its own
    ],
)
def test_a_size_that_a_model_cannot_take_is_named_with_sizes_that_it_takes(backend, name, size, words):
    with pytest.raises(ValueError) as error:
        backend.build(vitcmp.get_spec(f"timm:{name}:image_size={size}"))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:vit_tinny_patch16_224", "did you mean 'vit_tiny_patch16_224'"),
        ("timm:test_vit.bogus", "allowed: test_vit.r160_in1k"),
        ("big_vision:vit/Ti/16", "backend=jax only"),
    ],
)
def test_a_model_that_is_not_timms_is_a_clear_error(backend, name, words):
    with pytest.raises(ValueError, match=words):
        backend.build(spec_of(name))


@pytest.mark.parametrize(
    ("kernel", "operator"),
    [
        ("math", "aten::_scaled_dot_product_attention_math"),
        ("flash", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_a_named_kernel_is_forced_on_the_whole_model(backend, kernel, operator):
    model = load(backend, VIT, attention=kernel)
    step = backend.compile(model, IMAGES, LABELS, mode="forward", compile="eager")
    with torch.profiler.profile() as profile:
        step()
    ran = {event.name for event in profile.events() if event.name.startswith("aten::_scaled_dot_product")}
    assert ran == {operator}
    assert model.effective()["num_sdpa_calls"] == 6


def test_a_kernel_that_cannot_be_forced_is_unsupported(backend):
    with pytest.raises(Unsupported, match="never calls scaled_dot_product_attention"):
        backend.build(spec_of(CNN), attention="math")
    with pytest.raises(Unsupported, match="flex"):
        backend.build(spec_of(VIT), attention="flex")


@pytest.mark.parametrize("numerics", ["float16", "bfloat16", "bfloat16_mixed"])
def test_numerics_cast_what_they_say_and_mixed_is_autocast(backend, numerics):
    model = load(backend, VIT, numerics=numerics)
    wide = load(backend, VIT).library.eval()
    logits = backend.outputs(model, IMAGES)["logits"]
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if numerics == "bfloat16_mixed":
        assert dtypes == {torch.float32} and "autocast" in model.effective()["mixed"]
        assert model.compute_dtype == torch.float32  # of the images, as a user of autocast gives them
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            expected = wide(nchw(IMAGES, torch.float32))
    else:
        dtype = getattr(torch, numerics)
        assert dtypes == {dtype} and "mixed" not in model.effective()
        with torch.inference_mode():
            expected = wide.to(dtype)(nchw(IMAGES, dtype))
    assert expected.dtype.itemsize == 2
    np.testing.assert_array_equal(logits, expected.float().numpy())


def test_channels_last_changes_the_memory_format_and_not_the_outputs(backend):
    plain, last = (load(backend, CNN, numerics="float64", layout=layout) for layout in ("nchw", "channels_last"))
    weight = last.library.conv1[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert relative_error(*(backend.outputs(model, IMAGES)["logits"] for model in (plain, last))) < 1e-12


@pytest.mark.parametrize("name", [VIT, CNN])
def test_a_train_step_moves_every_parameter(backend, name):
    state = state_of(timm_model(spec_of(name).name, **({"img_size": SIZE} if name == VIT else {})))  # no gate is closed
    model = load(backend, name, state)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = backend.compile(model, IMAGES, LABELS, mode="train", compile="eager")
    assert np.isfinite(step.result())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_without_classes_ends_in_what_its_head_would_read(backend):
    out = backend.outputs(load(backend, "timm:test_resnet:num_classes=0"), IMAGES)
    assert out["pre_logits"].shape == (2, out["features"].shape[-1]) and "logits" not in out


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_foreign_model_is_compiled_with_its_kernel_and_its_autocast(backend, mode):
    model = load(backend, VIT, attention="flash", numerics="bfloat16_mixed")
    step = backend.compile(model, IMAGES, LABELS, mode=mode, compile="default")
    assert np.isfinite(step.result()).all() and step.compile_s > 0


@pytest.mark.parametrize("name", [VIT, CNN])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_case_becomes_a_valid_record_with_counted_flops_and_the_librarys_version(backend, name, mode):
    device = backend.describe()
    case = make_case(
        model=name,
        spec=vars(spec_of(name)),
        image_size="96x160",
        mode=mode,
        attention=None,
        device_name=device.name,
        num_threads=device.num_threads,
    )
    record = worker.measure(case, 0, None)
    assert record["status"] == "ok", record["error"]
    assert validate_record({**record, "case": case.to_json() | {"spec": {"family": "timm"}}}) == []
    counted = backend.count_flops(spec_of(name))
    step = 2 * counted if mode == "forward" else None
    assert record["flops"] == {"analytic": None, "counted": counted, "by_kind": None, "step": step}
    assert record["effective"]["library"] == {"timm": timm.__version__} == {"timm": device.versions["timm"]}
    assert record["num_params"] == sum(parameter.numel() for parameter in backend.build(spec_of(name)).parameters())


def test_the_probe_names_every_model_and_size_that_cannot_be_before_a_sweep_starts():
    request = {
        "backend": "torch",
        "platform": "cpu",
        "weights_path": None,
        "models": [CNN, "timm:nothing_like_it", "timm:maxvit_tiny_tf_224", "resnet18"],
        "image_sizes": ["90x130", "96x160"],
    }
    error = worker.probe(request)["error"]
    assert "nothing_like_it" in error and "image_size=90x130" in error
    assert "test_resnet" not in error and "image_size=96x160" not in error
    assert "device" in worker.probe({**request, "models": [CNN, "big_vision:vit/B/16"]})


def test_weights_of_another_model_stop_a_sweep_before_it_starts(backend, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    request = {"backend": "torch", "platform": "cpu", "weights_path": str(path), "image_sizes": ["64x96"]}
    assert "device" in worker.probe({**request, "models": [CNN]})
    error = worker.probe({**request, "models": ["timm:test_resnet"]})["error"]
    assert "2 of its arrays do not fit timm:test_resnet" in error and "fc.weight has shape (10, " in error
