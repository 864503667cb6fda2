"""BiT against timm and against big_vision's own outputs, and JAX against torch, in float64.

Bound: 1e-9 of the largest value. Float64 rounding leaves 1e-13; the smallest fault tried, a norm's eps, gives 5e-8,
because standardised weights make values that are large beside it.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.layers import StdConv2d
from timm.models.resnetv2 import ResNetV2

import jax_models.layers
import torch_models.bit
import torch_models.bit_v1
import torch_models.layers
import vitcmp
from tests.parity.helpers import Arrays, draw_images, model_shapes, randomise, run, run_timm, timm_weights, worst_error
from vitcmp.backend import load_backend
from vitcmp.parity import tolerance
from vitcmp.specs import BiTSpec

BOUND = 1e-9
FAULT = 10 * BOUND  # what a fault must exceed
FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "big_vision"
TINY = "bit_r50x1:depths=1x2,num_classes=10"
TINY_V1 = TINY.replace("bit", "bit_v1")
FRAMEWORKS = ["jax", "torch"]


def timm_names(spec: BiTSpec) -> dict[str, str]:
    """Returns our names of timm's module outputs: the stem, every block and stage, and the features."""
    names = {"stem": "stem", "norm": "features"}
    for stage, depth in enumerate(spec.depths):
        first = sum(spec.depths[:stage])
        names |= {f"stages.{stage}.blocks.{i}": f"block/{first + i}" for i in range(depth)}
        names[f"stages.{stage}"] = f"stage/{stage}"
    return names


def make_timm(spec: BiTSpec) -> torch.nn.Module:
    model = ResNetV2(
        layers=spec.depths,
        channels=tuple(256 * 2**stage for stage in range(len(spec.depths))),
        width_factor=spec.width_factor,
        num_classes=spec.num_classes,
        stem_type="fixed" if spec.stem_pad == "zero" else "",
        conv_layer=functools.partial(StdConv2d, eps=spec.weight_eps),
    )
    return randomise(model, seed=0)


@pytest.mark.parametrize(
    ("name", "ours", "image_size"),
    [
        ("resnetv2_50x1_bit", "bit_r50x1", (75, 106)),
        pytest.param("resnetv2_50x1_bit", "bit_r50x1", (224, 224), marks=pytest.mark.slow),
    ],
)
def test_torch_equals_timm_at_every_block(name, ours, image_size):
    model, spec = randomise(timm.create_model(name), seed=0), vitcmp.get_spec(ours)
    images = draw_images(image_size, batch_size=1)
    theirs = run_timm(model, images, timm_names(spec))
    assert len(theirs) == sum(spec.depths) + 4 + 3
    assert worst_error(run("torch", spec, timm_weights(model), images), theirs) < BOUND


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize(
    ("options", "image_size"),
    [
        ("depths=1x2", (33, 46)),
        ("depths=2,width_factor=2,stem_pad=lowest,weight_eps=1e-3", (64, 47)),
    ],
)
def test_both_equal_timm_at_every_block(backend, options, image_size):
    spec = vitcmp.get_spec(f"{TINY},{options}")
    model, images = make_timm(spec), draw_images(image_size, batch_size=2)
    ours, theirs = run(backend, spec, timm_weights(model), images), run_timm(model, images, timm_names(spec))
    assert worst_error(ours, theirs) < BOUND
    assert np.array_equal(ours["pooled"], ours["pre_logits"])


def unnormed_shortcut(self, x):
    """The fault: the projection reads x as it came."""
    shortcut = x if self.downsample is None else self.downsample(x)
    x = self.conv1(torch_models.bit.relu(self.norm1(x)))
    x = self.conv2(torch_models.bit.relu(self.norm2(x)))
    return self.conv3(torch_models.bit.relu(self.norm3(x))) + shortcut


def strided_conv1(self, x):
    """The fault: the stride of V1, in the first convolution; the maps' sizes are the same."""
    stride, self.conv2.stride = self.conv2.stride, (1, 1)
    self.conv1.stride = stride if stride != (1, 1) else self.conv1.stride
    return BLOCK(self, x)


def unbiased_kernel(self, dtype):
    """The fault: the variance of a sample."""
    var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
    return (self.weight - mean) / (var + self.eps).sqrt()


def scrambled_groups(self, x):
    """The fault: groups of channels that are far apart."""
    groups = x.unflatten(1, (-1, self.num_groups)).transpose(1, 2)
    x = torch.nn.functional.group_norm(groups.flatten(1, 2), self.num_groups, eps=self.eps)
    x = x.unflatten(1, (self.num_groups, -1)).transpose(1, 2).flatten(1, 2)
    return x * self.weight[:, None, None] + self.bias[:, None, None]


def name_of_fault(fault):
    """The same in every process, as `str` of a function is not."""
    return str(fault) if isinstance(fault, dict) else fault[2].__name__


BLOCK = torch_models.bit.Bottleneck.forward
CODE_FAULTS = [
    (torch_models.bit.Bottleneck, "forward", unnormed_shortcut),
    (torch_models.bit.Bottleneck, "forward", strided_conv1),
    (torch_models.layers.StdConv, "read_kernel", unbiased_kernel),
    (torch_models.layers.GroupNorm, "forward", scrambled_groups),
    (torch_models.bit, "max_pool", lambda x, pad: torch.nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)),
]
SPEC_FAULTS = [{"norm_eps": 1e-6}, {"weight_eps": 1e-6}, {"stem_pad": "lowest"}, {"num_groups": 16}]


@pytest.mark.parametrize("fault", SPEC_FAULTS + CODE_FAULTS, ids=name_of_fault)
def test_timm_tells_faults_apart(monkeypatch, fault):
    spec = vitcmp.get_spec(TINY)
    model, images = make_timm(spec), draw_images((64, 96), batch_size=1)
    weights, theirs = timm_weights(model), run_timm(model, images, {})
    assert worst_error(run("torch", spec, weights, images), theirs) < BOUND
    if isinstance(fault, dict):
        spec = dataclasses.replace(spec, **fault)
    else:
        monkeypatch.setattr(*fault)
    assert worst_error(run("torch", spec, weights, images), theirs) > FAULT


def read_fixture(name: str) -> tuple[Arrays, Arrays]:
    """Returns the arrays of the file, and big_vision's weights, drawn as the fixtures' README says."""
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    rng, weights = np.random.default_rng(int(arrays["seed"])), {}
    for leaf, shape in sorted(json.loads(arrays["shapes"].tobytes()).items()):
        noise = rng.standard_normal(shape)
        if leaf.endswith("kernel"):
            noise = noise / math.sqrt(math.prod(shape[:-1]))
        else:
            noise = 0.1 * noise + leaf.endswith("scale")
        weights[leaf] = noise.astype(np.float32)
    return arrays, weights


BIG_VISION_NAMES = {  # replaced in this order
    "root_block/": "",
    "conv_root": "stem/conv",
    "gn_root": "stem/norm",
    "conv_proj": "downsample/conv",
    "gn_proj": "downsample/norm",
    "norm-pre-head": "norm",
    "/gn": "/norm",
    "head/": "head/fc/",
}


def from_big_vision(weights: Arrays) -> Arrays:
    canonical = {}
    for name, array in weights.items():
        for theirs, ours in BIG_VISION_NAMES.items():
            name = name.replace(theirs, ours)
        if match := re.match(r"block(\d)/unit(\d+)/", name):
            stage, block = (int(number) - 1 for number in match.groups())
            name = f"stages/{stage}/blocks/{block}/{name[match.end() :]}"
        canonical[name] = array.reshape(-1) if name.endswith(("scale", "bias")) else array
    return canonical


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize(
    ("fixture", "model"),
    [
        ("bit_r26", "bit_r26x1:stem_pad=lowest,weight_eps=1e-10"),
        pytest.param("bit_r50", "bit_r50x1:stem_pad=lowest,weight_eps=1e-10", marks=pytest.mark.slow),
        ("bit_v1", "bit_v1_r50x1:depths=1x2x1x1"),
    ],
)
def test_outputs_are_those_of_big_vision(tmp_path, backend, fixture, model):
    arrays, params = read_fixture(fixture)
    np.savez(tmp_path / "w.npz", **params)
    weights = vitcmp.load_weights(tmp_path / "w.npz", f"{model},num_classes=6")
    second_reading = from_big_vision(params)
    assert weights.keys() == second_reading.keys()
    assert all(np.array_equal(weights[name], array) for name, array in second_reading.items())
    ours = run(backend, f"{model},num_classes=6", weights, arrays["image"].astype(np.float64))
    ours |= {"stem": ours["stem"][..., ::8], "stage2": ours["stage/1"][..., ::8]}
    theirs = {name.removeprefix("out/"): x for name, x in arrays.items() if name.startswith("out/")}
    assert worst_error(ours, theirs) < BOUND


@pytest.mark.parametrize(
    ("options", "image_size"),
    [
        (TINY, (1, 1)),
        (f"{TINY},depths=1,width_factor=3,num_groups=6", (2, 5)),
        (f"{TINY},stem_pad=lowest,num_classes=0,num_groups=64", (33, 48)),
        (f"{TINY_V1},depths=1", (1, 1)),
        (f"{TINY_V1},num_classes=0", (33, 46)),
    ],
)
def test_jax_equals_torch_at_the_edges(options, image_size):
    spec = vitcmp.get_spec(options)
    weights, images = vitcmp.init_weights(spec, seed=3), draw_images(image_size)
    jax_out, torch_out = (run(backend, spec, weights, images) for backend in FRAMEWORKS)
    assert jax_out.keys() == torch_out.keys()
    assert ("logits" in jax_out) == (spec.num_classes > 0)
    assert worst_error(jax_out, torch_out) < BOUND


@pytest.mark.parametrize("options", [TINY, TINY_V1])
def test_outputs_are_named_and_maps_are_nhwc(options):
    spec = vitcmp.get_spec(options)
    out = run("torch", spec, vitcmp.init_weights(spec), draw_images((61, 90)))
    maps = {"stem": (2, 16, 23, 64), "block/0": (2, 16, 23, 256), "stage/0": (2, 16, 23, 256)}
    maps |= dict.fromkeys(("block/1", "block/2", "stage/1", "features"), (2, 8, 12, 512))
    assert {name: x.shape for name, x in out.items()} == {
        **maps, "pooled": (2, 512), "pre_logits": (2, 512), "logits": (2, 10)
    }  # fmt: skip


@pytest.mark.parametrize("name", ["bit_r26x2", "bit_r50x1", "bit_r101x3", "bit_r152x4", "bit_v1_r50x2"])
def test_every_size_has_the_expected_weights_in_both_frameworks(name):
    spec = vitcmp.get_spec(name)
    for backend in FRAMEWORKS:
        assert model_shapes(backend, spec) == vitcmp.expected_shapes(spec)


@pytest.mark.parametrize("options", [TINY, TINY_V1])
def test_a_layout_changes_nothing(options):
    """StdConv reads a kernel's rows in memory's order, which channels_last changes."""
    spec, engine = vitcmp.get_spec(options), load_backend("torch", platform="cpu")
    weights, images = vitcmp.init_weights(spec, seed=3), draw_images((61, 90))
    nchw, channels_last = (
        engine.outputs(engine.load(engine.build(spec), weights, numerics="float64", layout=layout), images)
        for layout in ("nchw", "channels_last")
    )
    assert worst_error(channels_last, nchw) < BOUND


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize(
    ("options", "numerics"),
    [(f"{TINY},depths=1", "float32"), (TINY, "bfloat16"), (f"{TINY_V1},depths=1", "bfloat16_mixed")],
)
def test_other_numerics_stay_within_their_rounding(backend, options, numerics):
    weights, images = vitcmp.init_weights(options, seed=3), draw_images((33, 46), batch_size=1)
    exact = {"logits": run("torch", options, weights, images)["logits"]}
    error = worst_error(run(backend, options, weights, images, numerics=numerics), exact)
    assert 1e-9 < error < tolerance(numerics, options)


def run_layers(backend: str, x: np.ndarray, kernel: np.ndarray, dtype: str) -> Arrays:
    """Returns what GroupNorm makes of x (b h w d), and the kernel that StdConv reads, both held in `dtype`."""
    width = x.shape[-1]
    if backend == "jax":
        layers = jax_models.layers
        norm, conv = layers.GroupNorm(width, num_groups=4, eps=1e-5), layers.StdConv(9, 6, kernel_size=1, eps=1e-8)
        conv.kernel[...] = jax.numpy.asarray(kernel, dtype)
        y, standardised = norm(jax.numpy.asarray(x, dtype)), conv.read_kernel(jax.numpy.dtype(dtype))
        return {"y": np.asarray(y, np.float64), "kernel": np.asarray(standardised, np.float64)}
    layers = torch_models.layers
    norm, conv = layers.GroupNorm(width, num_groups=4, eps=1e-5), layers.StdConv(9, 6, kernel_size=1, eps=1e-8)
    conv.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).to(getattr(torch, dtype))
    with torch.inference_mode():
        y = norm(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(getattr(torch, dtype))).permute(0, 2, 3, 1)
        standardised = conv.read_kernel(getattr(torch, dtype)).permute(2, 3, 1, 0)
    return {"y": y.double().numpy(), "kernel": standardised.double().numpy()}


@pytest.mark.parametrize("backend", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_lose_one_rounding(backend, dtype):
    """Statistics are kept in float32: half an ulp of the result, eps / 2 of the largest value, and little more.

    Subtracting a mean ten times as large as the rest costs float32 ten times its own 2^-24; its sums cost less.
    """
    rng, torch_dtype = np.random.default_rng(0), getattr(torch, dtype)
    x, kernel = 10 + rng.standard_normal((2, 5, 7, 12)), 10 + rng.standard_normal((1, 1, 9, 6))
    x, kernel = (torch.from_numpy(array).to(torch_dtype).double().numpy() for array in (x, kernel))
    groups = x.reshape(2, 35, 4, 3)
    y = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    standardised = (kernel - kernel.mean(2)) / np.sqrt(kernel.var(2) + 1e-8)
    error = worst_error(run_layers(backend, x, kernel, dtype), {"y": y.reshape(x.shape), "kernel": standardised})
    assert error < torch.finfo(torch_dtype).eps / 2 + 1e-5


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("_count_pads", lambda size, kernel_size, stride: (kernel_size // 2, kernel_size // 2)),
        ("relu", lambda x: x),
    ],
)
def test_big_vision_tells_faults_of_v1_apart(monkeypatch, name, fault):
    arrays, weights = read_fixture("bit_v1")
    monkeypatch.setattr(torch_models.bit_v1, name, fault)
    model = "bit_v1_r50x1:depths=1x2x1x1,num_classes=6"
    ours = run("torch", model, from_big_vision(weights), arrays["image"].astype(np.float64))
    assert worst_error(ours, {"logits": arrays["out/logits"]}) > FAULT
