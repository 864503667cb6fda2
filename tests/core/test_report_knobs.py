"""What each knob buys: the best at one value over the best at the default, all else free."""

import pytest

from tests.core.fake_records import record
from vitcmp.report.knobs import effects_of
from vitcmp.report.payload import make_payload
from vitcmp.report.summary import settings_of


def effects(records):
    """Returns {(knob, value): (reference, ratio)}."""
    found = list(effects_of(settings_of(records)))
    by_key = {(e.knob, e.value): (e.reference, round(e.ratio.value, 4)) for e in found}
    assert len(by_key) == len(found)
    return by_key


def test_the_rest_is_free_to_be_best_on_either_side():
    records = [
        record("torch", 20.0, attention="math", compile="eager"),
        record("torch", 16.0, attention="math", compile="default"),
        record("torch", 10.0, attention="flash", compile="eager"),
        record("torch", 12.0, attention="flash", compile="default"),
    ]
    found = effects(records)
    assert found == {("attention", "flash"): ("math", 10 / 16), ("compile", "default"): ("eager", 1.2)}


@pytest.mark.parametrize(
    ["measured", "reference"],
    [({"float32": 10, "bfloat16": 5, "float16": 4}, "float32"), ({"bfloat16": 5, "float16": 4}, "float16")],
)
def test_the_reference_is_the_default_and_else_the_fastest(measured, reference):
    found = effects([record("jax", ms, numerics=name) for name, ms in measured.items()])
    expected = {("numerics", n): (reference, ms / measured[reference]) for n, ms in measured.items() if n != reference}
    assert found == {key: (name, round(ratio, 4)) for key, (name, ratio) in expected.items()}


def test_values_come_in_the_order_of_the_backends_list():
    names = ("flex", "cudnn", "math", "flash")
    records = [record("torch", 10.0, attention=name) for name in names]
    assert [e.value for e in effects_of(settings_of(records))] == ["flash", "cudnn", "flex"]


def test_points_are_never_mixed():
    changes = ({"model": "vit_s16"}, {"image_size": "384"}, {"batch_size": 2}, {"mode": "train"}, {"num_threads": 1})
    for change in changes:
        assert effects([record("torch", 10.0), record("torch", 9.0, attention="math", **change)]) == {}
    assert effects([record("torch", 10.0), record("jax", 9.0, attention="xla")]) == {}


def test_a_knob_that_a_model_lacks_or_that_has_one_value_says_nothing():
    assert effects([record("jax", model="convnext_atto"), record("jax", model="resnet50")]) == {}


def test_batch_norm_and_layout_are_knobs_too():
    records = [
        record("torch", 10.0, model="resnet50"),
        record("torch", 8.0, model="resnet50", batch_norm="folded"),
        record("torch", 5.0, model="resnet50", layout="channels_last"),
    ]
    assert effects(records) == {("batch_norm", "folded"): ("kept", 1.6), ("layout", "channels_last"): ("nchw", 0.625)}


@pytest.mark.parametrize(["ms", "word"], [(5.0, "faster"), (20.0, "slower"), (10.0, "same"), (10.3, "ambiguous")])
def test_the_verdict_is_of_the_value_and_not_of_the_reference(ms, word):
    [knob] = make_payload([record("torch", 10.0, attention="math"), record("torch", ms)])["knobs"]
    assert (knob["value"], knob["reference"], knob["ratio"]["verdict"]) == ("flash", "math", word)


def test_an_unknown_backend_or_value_takes_the_fastest_for_reference():
    records = [record("torch", 10.0, compile="magic"), record("torch", 9.0, compile="wizard")]
    for one in records:
        one["case"]["backend"] = "mlx"
    assert effects(records) == {("compile", "magic"): ("wizard", round(10 / 9, 4))}
