import dataclasses
import json
import math

import numpy as np
import pytest

import vitcmp
from vitcmp.backend import NUMERICS, Unsupported
from vitcmp.parity import STORED, compare_outputs, tolerance
from vitcmp.photo import load_photo
from vitcmp.specs import get_spec

TINY = "vit_ti16:depth=2,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=80x112"
MODELS = {
    "vit": TINY,
    "vitdet": TINY.replace("vit_", "vitdet_") + ",window_size=3,global_blocks=1",
    "resnet": "resnet18:width=8,num_classes=10,image_size=70x90",
    "convnext": "convnext_atto:depths=1x1x2x1,widths=16x32x64x128,num_classes=10,image_size=80x112",
}


def record(backend="jax", logits=(1.0, -2.0, 0.5), **case):
    spec = get_spec(case.get("model", TINY))
    fields = {
        "backend": backend,
        "model": TINY,
        "spec": {"family": spec.family, **json.loads(json.dumps(dataclasses.asdict(spec)))},
        "image_size": "80x112",
        "numerics": "float32",
        "weights": "seed:0",
    }
    return {"case": fields | case, "outputs": logits and {"logits": list(logits), "shape": [1, len(logits)]}}


def outputs(backend, model, numerics="float32"):
    spec = get_spec(model)
    weights = vitcmp.init_weights(get_spec(MODELS[spec.family]))
    images = load_photo(spec.image_size)
    try:
        return vitcmp.forward(backend, spec, weights, images, numerics=numerics, device="cpu")["logits"]
    except Unsupported as error:
        pytest.skip(str(error))


def relative_error(a, b):
    return np.abs(a - b).max() / max(np.abs(a).max(), np.abs(b).max())


def test_the_bound_is_that_of_its_derivation():
    # stem 16 x 16 x 3, in each of two blocks qkv, proj, fc1 of width 48 and fc2 of 96, head 48
    lengths = [768, *(48, 48, 48, 96) * 2, 48]
    eps, eps_sum = 2**-7, 2**-23
    expected = 2 * math.sqrt(2 / 24 * (3 * len(lengths) * eps**2 + sum(lengths) / 8 * eps_sum**2))
    assert tolerance("bfloat16", TINY) == pytest.approx(expected, rel=1e-12)
    expected = 2 * math.sqrt(2 / 24 * (3 * len(lengths) + sum(lengths) / 8)) * 2**-23
    assert tolerance("float32", TINY) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("model", MODELS.values())
def test_the_bound_grows_with_eps_and_every_numerics_has_one(model):
    bounds = {numerics: tolerance(numerics, model) for numerics in NUMERICS}
    assert bounds["float64"] < bounds["float32"] < bounds["tensorfloat32"] == bounds["float16"] < bounds["bfloat16"]
    assert bounds["bfloat16"] == bounds["bfloat16_mixed"]


def test_the_bound_grows_with_depth_and_width_as_a_random_walk():
    shallow, deep = (tolerance("bfloat16", f"vit_ti16:depth={depth}") for depth in (12, 48))
    assert 1.9 < deep / shallow < 2
    narrow, wide = (tolerance("float32", f"vit_ti16:width={width},mlp_dim={4 * width}") for width in (192, 768))
    assert 1.8 < wide / narrow < 2
    assert 6e-6 < tolerance("float32", "vit_b16") < 7e-6


@pytest.mark.parametrize("model", [*MODELS.values(), "vitdet_b16:global_blocks=2+5", "vit_b16:rep_size=true,pool=map"])
def test_the_spec_of_a_record_has_the_bound_of_the_spec(model):
    case = record(model=model)["case"]
    assert tolerance("float32", case["spec"]) == tolerance("float32", model) == tolerance("float32", get_spec(model))


@pytest.mark.parametrize(
    ["numerics", "spec", "message"],
    [
        ("float8", TINY, "numerics='float8'.*allowed: float64, float32"),
        ("float32", {"family": "mlp"}, "family='mlp' must be one of vit, vitdet, resnet, bit, bit_v1, convnext"),
        ("float32", {"family": "vit"}, "missing .* required"),
        ("float32", "vit_x16", "unknown model"),
    ],
)
def test_what_has_no_bound_is_refused(numerics, spec, message):
    with pytest.raises(ValueError, match=message):
        tolerance(numerics, spec)


def test_equal_outputs_are_equal_up_to_the_bound_and_no_further():
    bound = tolerance("float32", TINY) + STORED
    for error, status in ((0.0, "equal"), (0.99 * bound, "equal"), (1.01 * bound, "differs")):
        result = compare_outputs(record(), record("torch", (1.0 + 2 * error, -2.0, 0.5)))
        assert (result.status, result.bound) == (status, bound)
        assert result.error == pytest.approx(error, rel=1e-6)


def test_the_order_of_the_records_makes_no_difference():
    a, b = record(), record("torch", (1.1, -2.3, 0.5))
    assert compare_outputs(a, b) == compare_outputs(b, a)
    assert compare_outputs(a, b).error == pytest.approx(0.3 / 2.3)


def test_outputs_of_a_collapsed_model_differ():
    assert compare_outputs(record(), record("torch", (0.0, 0.0, 0.0))).error == 1


@pytest.mark.parametrize(
    ["logits", "status", "note"],
    [
        (None, "missing", "no outputs of torch"),
        ((), "missing", "no outputs of torch"),
        ((1.0, 2.0), "differs", "their shapes are (3,) and (2,)"),
        ((1.0, math.nan, 0.5), "differs", "not finite"),
        ((math.inf, -2.0, 0.5), "differs", "not finite"),
    ],
)
def test_outputs_that_cannot_be_compared_are_not_called_equal(logits, status, note):
    result = compare_outputs(record(), record("torch", logits))
    assert (result.status, result.error) == (status, None)
    assert note in result.note
    assert compare_outputs(record("torch", logits), record()).status == status


def test_zeros_on_both_sides_prove_nothing():
    assert compare_outputs(record(logits=(0.0, 0.0)), record("torch", (0.0, 0.0))).status == "missing"


def test_missing_on_both_sides_names_both():
    assert compare_outputs(record(logits=None), record("torch", None)).note == "no outputs of jax and torch"


def test_a_model_without_a_head_is_compared_by_what_the_head_would_read():
    a, b = record(), record("torch")
    for side in (a, b):
        side["outputs"] = {"pre_logits": side["outputs"]["logits"]}
    assert compare_outputs(a, b).status == "equal"


def test_a_model_without_a_bound_is_not_proved():
    result = compare_outputs(record(spec={"family": "vit"}), record("torch", spec={"family": "vit"}))
    assert (result.status, result.bound) == ("missing", None)
    assert "no bound" in result.note


@pytest.mark.parametrize(
    "other", [{"numerics": "bfloat16"}, {"model": "resnet50"}, {"image_size": "224"}, {"weights": "sha256:0"}]
)
def test_outputs_of_different_points_are_never_compared(other):
    with pytest.raises(ValueError, match=next(iter(other))):
        compare_outputs(record(), record("torch", **other))


@pytest.mark.parametrize(
    ["family", "numerics"],
    [
        *((family, numerics) for family in MODELS for numerics in ("float32", "bfloat16")),
        ("vit", "float16"),
        ("resnet", "bfloat16_mixed"),
    ],
)
def test_the_twins_are_well_within_the_bound(family, numerics):
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    error = relative_error(outputs("jax", MODELS[family], numerics), outputs("torch", MODELS[family], numerics))
    # within: the derivation holds; not far within: it is tight enough to mean something
    assert 0.01 < error / tolerance(numerics, MODELS[family]) < 0.75


@pytest.mark.parametrize(
    ["family", "fault"],
    [
        (family, fault)
        for family in MODELS
        for fault in ("gelu=tanh", "norm_eps=1e-5")
        if (family, fault[:4]) != ("resnet", "gelu")
    ],
)
def test_the_bound_of_float32_catches_a_wrong_gelu_and_a_wrong_eps(family, fault):
    pytest.importorskip("torch")
    model = MODELS[family]
    fault = fault.replace("1e-5", "1e-6") if family == "resnet" else fault
    error = relative_error(outputs("torch", f"{model},{fault}"), outputs("torch", model))
    assert error > 2 * (tolerance("float32", model) + STORED)


def test_a_train_step_is_compared_by_its_first_loss_too():
    sides = [record(backend, mode="train", batch_size=2) for backend in ("jax", "torch")]
    for side, loss in zip(sides, (7.0, 7.0), strict=True):
        side["outputs"]["loss"] = loss
    assert compare_outputs(*sides).status == "equal"
    sides[1]["outputs"]["loss"] = 7.001
    result = compare_outputs(*sides)
    assert result.status == "differs" and "7.001" in result.note
