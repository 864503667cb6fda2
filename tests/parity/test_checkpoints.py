"""Checkpoints against the libraries that wrote them: one file, read by timm and by us, the same logits in float64.

Bound: 1e-9 of the largest value, as for models whose weights are handed over in memory; of a float32 file with a class
token in augreg's layout float32's eps, since the token and its position are added in the file's precision, as in
big_vision itself.
"""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.layers import StdConv2d
from timm.models.resnetv2 import ResNetV2

import vitcmp
from tests.big_vision_files import augreg, bit_dump, scanned, under, vit_tree
from tests.parity.helpers import draw_images, randomise, relative_error, run, run_timm
from vitcmp.checkpoints import from_timm

BOUND = 1e-9
SPEC = "vit_ti16:depth=3,width=48,num_heads=4,mlp_dim=96,num_classes=10,image_size=96"
TIMM = {"depth": 3, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 2, "img_size": 96, "num_classes": 10}
GAP = {"global_pool": "avg", "class_token": False, "fc_norm": False, "act_layer": "gelu_tanh"}
MAP = {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"}
FRAMEWORKS = ["jax", "torch"]


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize(
    ("options", "timm_options", "layout", "dtype"),
    [
        ("pool=tok", {}, "augreg", np.float32),
        ("pool=tok", {}, "augreg", np.float64),
        ("pool=gap,gelu=tanh", GAP, "today", np.float32),
        ("pool=map,gelu=tanh", MAP, "scan", np.float32),
        ("pool=map,gelu=tanh", MAP, "today", np.float64),
    ],
)
def test_a_vits_file_computes_what_timm_computes_from_it(tmp_path, backend, options, timm_options, layout, dtype):
    pytest.importorskip(backend)
    spec = vitcmp.get_spec(f"{SPEC},{options}")
    rng = np.random.default_rng(2)
    weights = {name: (x + 1e-3 * rng.random(x.shape)).astype(dtype) for name, x in vitcmp.init_weights(spec).items()}
    tree = vit_tree(weights, spec.num_heads)
    if layout == "augreg":
        tree = augreg(tree, rng.standard_normal((1, 1, 48)).astype(dtype))
    else:
        tree = under("params", scanned(tree) if layout == "scan" else tree)
    np.savez(tmp_path / "w.npz", **tree)
    theirs = timm.create_model("vit_tiny_patch16_224", **TIMM, **timm_options).double().eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    images = draw_images(spec.image_size)
    ours = run(backend, spec, vitcmp.load_weights(tmp_path / "w.npz", spec), images)
    bound = np.finfo(np.float32).eps if layout == "augreg" and dtype == np.float32 else BOUND
    assert relative_error(ours["logits"], run_timm(theirs, images, {})["logits"]) < bound


@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_a_bits_dump_computes_what_timm_computes_from_it(tmp_path, backend):
    pytest.importorskip(backend)
    spec = vitcmp.get_spec("bit_r50x1:depths=1x2x1x1,num_classes=7,image_size=64x96")
    np.savez(tmp_path / "w.npz", **bit_dump(vitcmp.init_weights(spec)))
    conv = functools.partial(StdConv2d, eps=1e-8)  # as in timm's resnetv2_50x1_bit
    theirs = ResNetV2((1, 2, 1, 1), num_classes=7, stem_type="fixed", conv_layer=conv).double().eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    images = draw_images(spec.image_size)
    ours = run(backend, spec, vitcmp.load_weights(tmp_path / "w.npz", spec), images)
    assert relative_error(ours["logits"], run_timm(theirs, images, {})["logits"]) < BOUND


def test_timms_bit_hands_its_weights_over():
    model = randomise(timm.create_model("resnetv2_50x1_bit", num_classes=7), seed=0)
    spec = vitcmp.get_spec("bit_r50x1:num_classes=7,image_size=64x96")
    images = draw_images(spec.image_size, batch_size=1)
    ours = run("torch", spec, from_timm(model.state_dict(), spec), images)
    assert relative_error(ours["logits"], run_timm(model, images, {})["logits"]) < BOUND
