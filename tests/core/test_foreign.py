"""Models of other libraries where no library is needed: their names, their records in tables, their parity."""

import dataclasses
import io

import pytest
from rich.console import Console

from tests.core.fake_records import record
from vitcmp.params import expected_params
from vitcmp.parity import compare_outputs, tolerance
from vitcmp.report.tables import print_report
from vitcmp.specs import BigVisionSpec, TimmSpec, get_spec

COUNTED = {"analytic": None, "counted": 2_000_000_000, "by_kind": None, "step": 2_000_000_000}


def foreign_record(backend="torch", model="timm:test_vit", ms=10.0, **changes):
    made = record(backend, ms, model=model, attention=None, **changes)
    return {**made, "flops": {**COUNTED, "step": None if changes.get("mode") == "train" else COUNTED["step"]}}


def report(records, width=200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(console, records)
    return console.export_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("timm:convnextv2_tiny", TimmSpec(name="convnextv2_tiny")),
        ("timm:resnet18.a1_in1k:image_size=96x160,num_classes=10",
         TimmSpec(name="resnet18.a1_in1k", image_size=(96, 160), num_classes=10)),
        ("timm:resnet18,num_classes=10", TimmSpec(name="resnet18", num_classes=10)),  # as a list of models joins it
        ("big_vision:vit/B/16", BigVisionSpec(name="vit/B/16")),
        ("big_vision:vit/B/14:pool=map,rep_size=true", BigVisionSpec(name="vit/B/14", pool="map", rep_size=True)),
        ("big_vision:bit/50", BigVisionSpec(name="bit/50")),
        ("big_vision:bit_paper/152x4", BigVisionSpec(name="bit_paper/152x4")),
    ],
)  # fmt: skip
def test_a_foreign_name_gives_its_spec(text, expected):
    assert get_spec(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("timm:", "unknown model"),
        ("timm:hf-hub", "timm.list_models"),
        ("timm:resnet18:depth=3", "unknown field 'depth=3'"),
        ("big_vision:vit", "SIZE: mu Ti S"),
        ("big_vision:vit/X/16", "vit/X/16"),
        ("big_vision:vit/B/0", "vit/B/0"),
        ("big_vision:bit/51", "N: 26 50 101 152 200"),
        ("big_vision:bit/50x5", "bit/50x5"),
        ("big_vision:bit/50:pool=map", "no pool, pos_embed and rep_size"),
        ("big_vision:vit/B/32:image_size=31x64", "smaller than one patch of 32"),
        ("big_vision:vit/B/16:pool=mean", "must be one of gap, map, tok"),
    ],
)
def test_a_wrong_foreign_name_is_an_error_that_says_what_is_allowed(text, words):
    with pytest.raises(ValueError, match="model") as error:
        get_spec(text)
    assert words in str(error.value)


def test_a_foreign_model_has_no_formulas_and_its_parity_is_missing_with_the_reason():
    with pytest.raises(ValueError, match="timm:resnet18 has no canonical weights"):
        expected_params("timm:resnet18")
    with pytest.raises(ValueError, match="timm:resnet18"):
        tolerance("float32", "timm:resnet18")
    a, b = foreign_record(compile="eager"), foreign_record(compile="default")
    result = compare_outputs(a, b)
    assert result.status == "missing" and result.bound is None
    assert "timm:test_vit" in result.note and "library" in result.note


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_show_a_foreign_model_with_its_counted_flops_and_no_ratio(mode, width):
    ours = [record("jax", 10, mode=mode), record("torch", 12, mode=mode)]
    theirs = [foreign_record(mode=mode, ms=7.0), foreign_record("jax", "big_vision:vit/B/16", 8.0, mode=mode)]
    text = report(ours + theirs, width)
    assert "test_vit" in text and "big_vision:" in text
    assert "2.000" in text and "from its graph" in " ".join(text.split())
    assert text.count("equal") == report(ours, width).count("equal") > 0
    assert "measured in one framework only" not in " ".join(text.split())


def test_a_foreign_model_alone_makes_no_comparison():
    text = report([foreign_record(), foreign_record(compile="default", ms=5.0)])
    assert "torch / JAX" not in text and "timm:test_vit" in text


def test_a_foreign_specs_image_follows_the_case():
    assert dataclasses.replace(get_spec("timm:resnet18"), image_size=(90, 130)).image_size == (90, 130)
