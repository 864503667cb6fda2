"""Models of other libraries with our weights equal ours, in float64; both sides' steps come from one code.

Bound: 1e-9 of the largest value. Float64 rounding leaves about 1e-15; the smallest fault tried here gives 2e-6.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments import pairs
from experiments.peer_models.child import draw_batch, make_sides, make_step
from experiments.peer_models.names import check_names, rename
from experiments.peer_models.points import Grid
from experiments.peer_models.registry import PEERS, Setting, default_attention, load_peer
from vitcmp.backend import Unsupported, load_backend
from vitcmp.params import init_weights
from vitcmp.parity import tolerance
from vitcmp.specs import Spec, get_spec

BOUND = 1e-9
FAULT = 1e3 * BOUND  # what a fault must exceed
VIT = "depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10"
TINY = {
    "vit_ti16": VIT,
    "vitdet_b16": f"{VIT},depth=4,global_blocks=2,window_size=4",  # on a grid of 7x7: padded
    "resnet50": "depths=1x2x1x1,num_classes=10",
    "convnext_tiny": "depths=1x2x1x1,widths=8x12x16x20,num_classes=10",
}
# timm's are built by name, in the sizes of the name.
SIZED = dict.fromkeys(("vit_ti16", "vitdet_b16", "resnet50", "convnext_tiny", "bit_r50x1"), "num_classes=10")
SQUARE = {("torchvision", "vit_ti16"), ("transformers", "vitdet_b16")}
SLOW = {"vitdet_b16", "resnet50", "convnext_tiny", "bit_r50x1"}  # in timm's sizes
backend = functools.cache(lambda: load_backend("torch", platform="cpu"))


def make_spec(peer: str, model: str, faults: str = "") -> Spec:
    size = "112x112" if (peer, model) in SQUARE else "80x112"
    sizes = (SIZED if peer == "timm" else TINY)[model]
    return get_spec(
        f"{model}:{sizes},{PEERS[peer].models[model]},image_size={size},{faults}".replace(",,", ",").strip(",")
    )


def compare(peer: str, spec: Spec, mode: str, *, ours: Spec | None = None, **options: str) -> float:
    """Returns how far the outputs are apart: logits, and in training half of the first loss."""
    pytest.importorskip(peer)
    attention = default_attention(spec, peer=peer, platform="cpu", mode=mode)
    setting = Setting(**{"numerics": "float64", "attention": attention} | options)
    weights, batch = init_weights(spec), draw_batch(spec, 2)
    with backend().numerics(setting.numerics):
        model = backend().build(ours or spec, attention=setting.attention)
        model = backend().load(model, weights, numerics=setting.numerics, layout=setting.layout)
        theirs = load_peer(peer, backend(), spec, weights, setting)
        a, b = (make_step(backend(), side, batch, mode=mode, compile="eager")[1] for side in (model, theirs))
    return float(np.abs(a - b).max() / np.abs(a).max())


def cases() -> list:
    params = []
    for peer, mode in itertools.product(("timm", "torchvision", "transformers"), ("forward", "train")):
        for model in SIZED if peer == "timm" else TINY:
            # in float64 a training step of timm's ViTDet-B takes 6 GB; transformers' is trained here, in small
            if model in PEERS[peer].models and (peer, model, mode) != ("timm", "vitdet_b16", "train"):
                marks = [pytest.mark.slow] if peer == "timm" and model in SLOW else []
                params.append(pytest.param(peer, model, mode, marks=marks, id=f"{peer}-{model}-{mode}"))
    return params


@pytest.mark.parametrize(("peer", "model", "mode"), cases())
def test_a_library_equals_ours(peer, model, mode):
    assert compare(peer, make_spec(peer, model), mode) < BOUND


@pytest.mark.parametrize(
    ("peer", "model", "fault"),
    [
        ("timm", "vit_ti16", "norm_eps=1e-5"),
        ("torchvision", "vit_ti16", "gelu=tanh"),
        ("torchvision", "convnext_tiny", "norm_eps=1e-5"),
        ("torchvision", "resnet50", "norm_eps=1e-6"),
        ("transformers", "vit_ti16", "gelu=tanh"),
        ("transformers", "vitdet_b16", "neck_eps=1e-5"),
        ("transformers", "vitdet_b16", "global_blocks=0+1"),
        ("transformers", "resnet50", "norm_eps=1e-6"),
        ("transformers", "convnext_tiny", "norm_eps=1e-5"),
    ],
)
def test_a_wrong_numeric_of_ours_shows(peer, model, fault):
    spec = make_spec(peer, model)
    faulty = make_spec(peer, model, fault)
    if "global_blocks" in fault:  # without tables of relative positions, whose shapes would give it away
        spec, faulty = (dataclasses.replace(one, rel_pos=False) for one in (spec, faulty))
    assert compare(peer, spec, "forward", ours=faulty) > FAULT


def test_channels_last_equals_ours_too_and_the_library_has_it():
    pytest.importorskip("torchvision")
    spec = make_spec("torchvision", "resnet50")
    assert compare("torchvision", spec, "train", layout="channels_last") < BOUND
    setting = Setting(numerics="float32", layout="channels_last")
    model = load_peer("torchvision", backend(), spec, init_weights(spec), setting)
    assert model.model.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("peer", ["torchvision", "transformers"])
@pytest.mark.parametrize(("kernel", "ran"), [("math", "_math"), ("flash", "_flash_attention_for_cpu")])
def test_the_kernel_is_forced(peer, kernel, ran):
    pytest.importorskip(peer)
    spec = make_spec("torchvision", "vit_ti16", "num_heads=4")  # torch has the fast path for even numbers only
    model = load_peer(peer, backend(), spec, init_weights(spec), Setting(numerics="float32", attention=kernel))
    step, _ = make_step(backend(), model, draw_batch(spec, 2), mode="forward", compile="eager")
    with torch.profiler.profile() as profile:
        step()
    names = [event.name for event in profile.events()]
    assert names.count(f"aten::_scaled_dot_product{ran.replace('_math', '_attention_math')}") == spec.depth
    assert not any("native_multi_head_attention" in name for name in names)  # torchvision's fast path, not SDPA


@pytest.mark.parametrize("peer", ["torchvision", "transformers"])
def test_parameters_and_outputs_have_the_dtype_that_was_asked_for(peer):
    pytest.importorskip(peer)
    spec = make_spec(peer, "convnext_tiny")
    model = load_peer(peer, backend(), spec, init_weights(spec), Setting(numerics="bfloat16"))
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, *spec.image_size, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("peer", "model", "options", "message"),
    [
        ("torchvision", "vit_ti16", {"image_size": (80, 112)}, "square images only"),
        ("transformers", "vitdet_b16", {"image_size": (80, 112)}, "not square"),
        ("torchvision", "vitdet_b16", {}, "no vitdet"),
    ],
)
def test_what_a_library_cannot_do_is_said_and_not_replaced(peer, model, options, message):
    pytest.importorskip(peer)
    spec = dataclasses.replace(get_spec(f"{model}:{TINY[model]}"), **options)
    setting = Setting(numerics="float32", attention="math")
    with pytest.raises(Unsupported, match=message):
        load_peer(peer, backend(), spec, init_weights(spec), setting)


def test_a_kernel_that_cannot_be_forced_on_a_library_is_said():
    pytest.importorskip("transformers")
    for kernel, model in (("flash", "vitdet_b16"), ("flex", "vit_ti16")):
        spec = make_spec("transformers", model)
        with pytest.raises(Unsupported, match=kernel):
            load_peer(
                "transformers", backend(), spec, init_weights(spec), Setting(numerics="float32", attention=kernel)
            )


def test_a_library_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.convnext", None)
    monkeypatch.delitem(sys.modules, "experiments.peer_models.torchvision_models", raising=False)
    spec = make_spec("torchvision", "resnet50")
    with pytest.raises(Unsupported, match="torchvision is not installed"):
        load_peer("torchvision", backend(), spec, init_weights(spec), Setting(numerics="float32"))


def test_a_version_with_other_names_is_said():
    with pytest.raises(ValueError, match=r"version of timm .* 1 of its own are not given \(b\), 1 are not .* \(c\)"):
        check_names({"a": 0, "c": 0}, {"a": 0, "b": 0}, library="timm")


def test_renaming_leaves_nothing_out_and_nothing_twice():
    rules = ((r"block(\d)\.w", r"layer.\1"), (r"layer(\d)", r"layer.\1"))
    zero = np.zeros(1)
    assert rename({"block3.w": zero}, rules) == {"layer.3": zero}
    with pytest.raises(ValueError, match="no rule renames block3"):
        rename({"block3": zero}, rules)
    with pytest.raises(ValueError, match="two arrays are renamed to layer.3"):
        rename({"block3.w": zero, "layer3": zero}, rules)


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_the_child_makes_both_sides_of_a_pair(mode, monkeypatch):
    pytest.importorskip("torchvision")
    held = contextlib.ExitStack()
    monkeypatch.setattr(pairs, "_held", held)
    grid = Grid(backend="torch", peers=("torchvision",), models=("resnet50",), image_sizes=("32",), batch_sizes=(2,))
    (pair,) = dataclasses.replace(grid, modes=(mode,)).make_pairs()
    pair["ours"]["model"] = f"resnet50:{TINY['resnet50']}"
    with held:
        sides = make_sides(pair)
    assert sides.bound == tolerance("float32", get_spec(pair["ours"]["model"]))
    assert np.abs(sides.ours_output - sides.theirs_output).max() < sides.bound * np.abs(sides.ours_output).max()
    assert sides.ours_output.shape == (20 + (mode == "train"),)
    assert sides.facts["num_params"][0] == sides.facts["num_params"][1]
    assert sides.ours() is None and sides.theirs() is None
