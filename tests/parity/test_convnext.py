"""ConvNeXt against timm, and JAX against torch, in float64.

Bound: 1e-9 of the largest value. Float64 rounding leaves 1e-15; the smallest fault tried gives 2e-5.
"""

import dataclasses

import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

import jax_models.layers
import vitcmp
from tests.parity.helpers import draw_images, model_shapes, randomise, run, run_timm, timm_weights, worst_error
from vitcmp.specs import CONVNEXT_SIZES, ConvNeXtSpec

BOUND = 1e-9
FAULT = 1e3 * BOUND  # what a fault must exceed
TINY = "convnext_atto:depths=1x2,widths=8x12,num_classes=10"
FOUR_STAGES = "convnext_atto:depths=1x2x1x1,widths=8x12x16x20,num_classes=10"  # timm has no fewer
TIMM_FOUR_STAGES = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 20), "num_classes": 10}


def timm_names(spec: ConvNeXtSpec) -> dict[str, str]:
    """Returns our names of timm's module outputs: the stem, every block and stage, and the pooled features."""
    names = {"stem": "stem", "head.flatten": "pre_logits"}
    for stage, depth in enumerate(spec.depths):
        first = sum(spec.depths[:stage])
        names |= {f"stages.{stage}.blocks.{i}": f"block/{first + i}" for i in range(depth)}
        names[f"stages.{stage}"] = f"stage/{stage}"
    return names


@pytest.mark.parametrize(
    ("name", "options", "image_size"),
    [
        ("convnext_atto", {}, (75, 106)),
        ("convnext_atto", {}, (224, 224)),
        ("convnext_base", {"depths": (1, 1, 3, 1)}, (75, 106)),
        ("convnext_base", {"depths": (1, 1, 1, 1)}, (224, 224)),
        pytest.param("convnext_base", {}, (75, 106), marks=pytest.mark.slow),
    ],
)
def test_torch_equals_timm_at_every_block(name, options, image_size):
    model = randomise(timm.create_model(name, **options), seed=0)
    spec = dataclasses.replace(vitcmp.get_spec(name), **options)
    images = draw_images(image_size, batch_size=1)
    theirs = run_timm(model, images, timm_names(spec))
    ours = run("torch", spec, timm_weights(model), images)
    assert len(theirs) == sum(spec.depths) + 4 + 3
    assert worst_error(ours, theirs) < BOUND


@pytest.mark.parametrize(("gelu", "act_layer"), [("erf", "gelu"), ("tanh", "gelu_tanh")])
@pytest.mark.parametrize(("kernel_size", "conv_mlp"), [(7, True), (3, False)])
def test_torch_equals_timm_for_every_gelu_kernel_and_form_of_the_mlp(gelu, act_layer, kernel_size, conv_mlp):
    options = {"act_layer": act_layer, "kernel_sizes": kernel_size, "conv_mlp": conv_mlp}
    model = randomise(timm.create_model("convnext_atto", **TIMM_FOUR_STAGES, **options), seed=0)
    spec = dataclasses.replace(vitcmp.get_spec(FOUR_STAGES), gelu=gelu, kernel_size=kernel_size)
    images = draw_images((61, 90))
    theirs = run_timm(model, images, timm_names(spec))
    assert worst_error(run("torch", spec, timm_weights(model), images), theirs) < BOUND


@pytest.mark.parametrize("fault", [{"norm_eps": 1e-5}, {"gelu": "tanh"}], ids=str)
def test_timm_tells_a_wrong_eps_and_a_wrong_gelu_apart(fault):
    model = randomise(timm.create_model("convnext_atto", **TIMM_FOUR_STAGES), seed=0)
    spec = dataclasses.replace(vitcmp.get_spec(FOUR_STAGES), **fault)
    images = draw_images((61, 90))
    theirs = run_timm(model, images, {})
    assert worst_error(run("torch", spec, timm_weights(model), images), theirs) > FAULT


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_base:depths=1x1x3x1"])
def test_jax_equals_torch_at_every_block(name):
    weights, images = vitcmp.init_weights(name, seed=3), draw_images((75, 106), batch_size=1)
    assert worst_error(run("jax", name, weights, images), run("torch", name, weights, images)) < BOUND


@pytest.mark.parametrize(
    ("options", "image_size"),
    [
        (TINY, (32, 32)),
        (TINY, (61, 90)),
        (f"{TINY},depths=1,widths=5", (33, 47)),
        (f"{TINY},gelu=tanh,kernel_size=3,num_classes=0", (64, 96)),
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
    maps = dict.fromkeys(("stem", "block/0", "stage/0"), (2, 15, 22, 8))
    maps |= dict.fromkeys(("block/1", "block/2", "stage/1", "features"), (2, 7, 11, 12))
    assert {name: x.shape for name, x in out.items()} == {
        **maps, "pooled": (2, 12), "pre_logits": (2, 12), "logits": (2, 10)
    }  # fmt: skip


@pytest.mark.parametrize("size", CONVNEXT_SIZES)
def test_every_size_has_the_expected_weights_in_both_frameworks(size):
    spec = vitcmp.get_spec(f"convnext_{size}")
    for backend in ("jax", "torch"):
        assert model_shapes(backend, spec) == vitcmp.expected_shapes(spec)


@pytest.mark.parametrize("padding", [(2, 4), (4, 2)])
def test_padding_on_the_wrong_side_is_seen(monkeypatch, padding):
    def shifted(self, x):
        pads = (padding, padding) if self.padding == 3 else ((0, 0), (0, 0))
        x = jax.lax.conv_general_dilated(
            x, self.kernel[...].astype(x.dtype), (self.stride, self.stride), pads,
            feature_group_count=self.groups, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return x + self.bias[...].astype(x.dtype)

    weights, images = vitcmp.init_weights(TINY, seed=3), draw_images((61, 90))
    assert worst_error(run("jax", TINY, weights, images), run("torch", TINY, weights, images)) < BOUND
    monkeypatch.setattr(jax_models.layers.Conv, "__call__", shifted)
    assert worst_error(run("jax", TINY, weights, images), run("torch", TINY, weights, images)) > FAULT
