"""ResNet against timm, and JAX against torch, in float64.

Bound: 1e-9 of the largest value. Float64 rounding leaves 1e-15; the smallest fault tried gives 2e-5.
"""

import dataclasses

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

import jax_models.layers
import jax_models.resnet
import torch_models.resnet
import vitcmp
from tests.parity.helpers import draw_images, model_shapes, randomise, run, run_timm, timm_weights, worst_error
from vitcmp.specs import RESNET_SIZES, ResNetSpec

BOUND = 1e-9
FAULT = 1e3 * BOUND  # what a fault must exceed
TINY = "resnet50:depths=1x2,width=8,num_classes=10"
TINY_BASIC = "resnet18:depths=1x2,width=8,num_classes=10"


def timm_names(spec: ResNetSpec) -> dict[str, str]:
    """Returns our names of timm's module outputs: the stem, every block and stage, and the pooled features."""
    names = {"maxpool": "stem", "global_pool": "pooled"}
    for stage, depth in enumerate(spec.depths):
        first = sum(spec.depths[:stage])
        names |= {f"layer{stage + 1}.{i}": f"block/{first + i}" for i in range(depth)}
        names[f"layer{stage + 1}"] = f"stage/{stage}"
    return names


@pytest.mark.parametrize("image_size", [(75, 106), (224, 224)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torch_equals_timm_at_every_block(name, image_size):
    model, spec = randomise(timm.create_model(name), seed=0), vitcmp.get_spec(name)
    images = draw_images(image_size, batch_size=1)
    theirs = run_timm(model, images, timm_names(spec))
    ours = run("torch", spec, timm_weights(model), images)
    assert len(theirs) == sum(spec.depths) + 4 + 3
    assert worst_error(ours, theirs) < BOUND


def test_timm_tells_a_wrong_eps_apart():
    model = randomise(timm.create_model("resnet18"), seed=0)
    images = draw_images((33, 47), batch_size=1)
    theirs = run_timm(model, images, {})
    for eps, is_right in ((1e-5, True), (1e-6, False)):
        spec = dataclasses.replace(vitcmp.get_spec("resnet18"), norm_eps=eps)
        error = worst_error(run("torch", spec, timm_weights(model), images), theirs)
        assert (error < BOUND) if is_right else (error > FAULT)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_jax_equals_torch_at_every_block(name):
    weights, images = vitcmp.init_weights(name, seed=3), draw_images((75, 106))
    assert worst_error(run("jax", name, weights, images), run("torch", name, weights, images)) < BOUND


@pytest.mark.parametrize(
    ("options", "image_size"),
    [
        (TINY, (1, 1)),
        (TINY, (61, 90)),
        (f"{TINY},width=3,depths=1", (2, 5)),
        (TINY_BASIC, (64, 96)),
        (f"{TINY_BASIC},num_classes=0", (33, 47)),
    ],
)
def test_jax_equals_torch_at_the_edges(options, image_size):
    spec = vitcmp.get_spec(options)
    weights, images = vitcmp.init_weights(spec, seed=3), draw_images(image_size)
    jax_out, torch_out = (run(backend, spec, weights, images) for backend in ("jax", "torch"))
    assert jax_out.keys() == torch_out.keys()
    assert ("logits" in jax_out) == (spec.num_classes > 0)
    assert worst_error(jax_out, torch_out) < BOUND


def test_outputs_are_named_and_maps_are_nhwc():
    spec = vitcmp.get_spec(TINY)
    out = run("torch", spec, vitcmp.init_weights(spec), draw_images((61, 90)))
    maps = {"stem": (2, 16, 23, 8), "block/0": (2, 16, 23, 32), "stage/0": (2, 16, 23, 32)}
    maps |= dict.fromkeys(("block/1", "block/2", "stage/1", "features"), (2, 8, 12, 64))
    assert {name: x.shape for name, x in out.items()} == {
        **maps, "pooled": (2, 64), "pre_logits": (2, 64), "logits": (2, 10)
    }  # fmt: skip


@pytest.mark.parametrize("depth", RESNET_SIZES)
def test_every_size_has_the_expected_weights_in_both_frameworks(depth):
    spec = vitcmp.get_spec(f"resnet{depth}")
    for backend in ("jax", "torch"):
        assert model_shapes(backend, spec) == vitcmp.expected_shapes(spec)


def same_padding(self, x):
    """The fault: what 'SAME' pads at stride 2, (2, 3) for 7x7 and (0, 1) for 3x3 on even sides."""
    return jax.lax.conv_general_dilated(
        x, self.kernel[...].astype(x.dtype), (self.stride, self.stride), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def same_max_pool(x):
    return jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        (jax_models.layers.Conv, "__call__", same_padding),
        (jax_models.resnet, "max_pool", same_max_pool),
        (torch_models.resnet, "max_pool", lambda x: torch.nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)),
    ],
)
def test_padding_on_the_wrong_side_is_seen(monkeypatch, module, name, fault):
    weights, images = vitcmp.init_weights(TINY, seed=3), draw_images((64, 96))
    assert worst_error(run("jax", TINY, weights, images), run("torch", TINY, weights, images)) < BOUND
    monkeypatch.setattr(module, name, fault)
    jax_out, torch_out = (run(backend, TINY, weights, images) for backend in ("jax", "torch"))
    assert jax_out["logits"].shape == torch_out["logits"].shape
    assert worst_error(jax_out, torch_out) > FAULT
