"""BatchNorm folded into the convolutions: the same outputs in both frameworks, no norm left, nothing to train."""

import dataclasses

import numpy as np
import pytest

import vitcmp
from vitcmp.backend import load_backend
from vitcmp.params import fold_batch_norm, init_weights

SPECS = {
    "basic": "resnet18:depths=2x1,width=6,num_classes=10",
    "bottleneck": "resnet50:depths=1x2,width=8,num_classes=10,norm_eps=3e-2",  # an eps that the outputs show
    "headless": "resnet50:depths=1x1x1,width=3,num_classes=0",
}
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 47, 61, 3))
# Folding rounds each weight twice (2^-52 of it), a sum of K <= 288 products of either sign by sqrt(K) as much, and the
# 17 layers' errors add up at worst: 1.3e-13. Measured: 1e-15.
BOUND = 1e-12


@pytest.fixture(params=["jax", "torch"])
def backend(request):
    pytest.importorskip(request.param)
    return load_backend(request.param, platform="cpu")


def folded(spec: str) -> vitcmp.specs.Spec:
    return dataclasses.replace(vitcmp.get_spec(spec), is_folded=True)


def draw(spec: str, dtype=np.float64) -> dict[str, np.ndarray]:
    """Draws statistics that are far from 0 and 1, so that none of them can be left out unseen."""
    weights = {name: array.astype(dtype) for name, array in init_weights(spec, seed=2).items()}
    return {name: 5 * array if name.endswith(("mean", "var")) else array for name, array in weights.items()}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_output_is_the_same(backend, spec):
    weights = draw(spec)
    kept = vitcmp.forward(backend.name, spec, weights, IMAGES, numerics="float64", device="cpu")
    out = vitcmp.forward(
        backend.name, folded(spec), fold_batch_norm(weights, spec), IMAGES, numerics="float64", device="cpu"
    )
    assert out.keys() == kept.keys() and {"stem", "block/0", "stage/1", "pre_logits"} <= out.keys()
    assert max(np.abs(out[name] - kept[name]).max() / np.abs(kept[name]).max() for name in kept) < BOUND


@pytest.mark.parametrize("leaf", ["scale", "bias", "mean", "var"])
def test_each_array_of_a_norm_is_folded(leaf):
    weights = draw(SPECS["bottleneck"])
    changed = {name: array * 1.01 if f"downsample/1/{leaf}" in name else array for name, array in weights.items()}
    before, after = (fold_batch_norm(arrays, SPECS["bottleneck"]) for arrays in (weights, changed))
    assert {name for name in before if not np.array_equal(before[name], after[name])} <= {
        f"layer{stage}/0/downsample/0/{name}" for stage in (1, 2) for name in ("kernel", "bias")
    }
    assert not np.array_equal(before["layer1/0/downsample/0/bias"], after["layer1/0/downsample/0/bias"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_folded_weights_are_what_the_folded_spec_expects_in_their_dtype(backend, spec, dtype):
    weights = fold_batch_norm(draw(spec, dtype), spec)
    vitcmp.params.check_weights(weights, folded(spec))
    assert {array.dtype for array in weights.values()} == {np.dtype(dtype)}
    assert not any("bn" in name or "downsample/1" in name for name in weights)
    model = backend.load(backend.build(folded(spec)), weights, numerics="float32")
    assert backend.count_params(model) == vitcmp.count_params(folded(spec)) < vitcmp.count_params(spec)
    assert all(np.array_equal(array, np.float32(weights[name])) for name, array in backend.export(model).items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vit_ti16", "must be a ResNet: a vit has no BatchNorm to fold"),
        ("bit_r50x1", "must be a ResNet: a bit has no BatchNorm to fold"),
        (f"{SPECS['basic']},is_folded=true", "is folded already"),
        (f"{SPECS['basic']},depths=1x1", "of its arrays do not fit"),
    ],
)
def test_what_cannot_be_folded_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        fold_batch_norm(draw(SPECS["basic"]), spec)


def test_a_folded_model_cannot_be_trained(backend):
    spec = folded(SPECS["basic"])
    model = backend.load(backend.build(spec), init_weights(spec), numerics="float32")
    labels = np.zeros(2, np.int64)
    compile = "jit" if backend.name == "jax" else "eager"
    backend.compile(model, IMAGES, labels, mode="forward", compile=compile)()
    with pytest.raises(ValueError, match="a folded BatchNorm cannot be trained; build it with is_folded=False"):
        backend.compile(model, IMAGES, labels, mode="train", compile=compile)()
