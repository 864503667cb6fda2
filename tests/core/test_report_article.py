"""The article's own rows: shown with what they are, never compared with ours."""

import json

import pytest

from tests.core.fake_records import record
from vitcmp.report.article import article_row
from vitcmp.report.payload import payload_of, rows_of
from vitcmp.report.reading import read_source, read_sources

GPU = "NVIDIA A100-SXM4-80GB"


def row(**changes):
    """A row as main.py of the article's code writes it: 2 x 350 GMAC of ViT-B/16 at 1024 px, for 8 images."""
    return {
        "gpu": GPU,
        "m": "ViT-B/16",
        "res": 1024,
        "bs": 8,
        "kernel": "FLASH_ATTENTION",
        "dtype": "bf16",
        "time": 95.25,
        "flops": 8 * 2 * 350_000_000_000,
        "params": 89_000_000,
        "mem_tot": 10**9,
        "mem_fwd": 10**8,
        **changes,
    }


def shown(tmp_path, rows, name="results.json"):
    (tmp_path / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return rows_of(payload_of([read_source(tmp_path / name)]))


def test_a_row_is_shown_with_its_own_figures(tmp_path):
    [one] = shown(tmp_path, [row()])
    expected = {
        "origin": "article",
        "device": GPU,
        "platform": "gpu",
        "backend": "torch",
        "mode": "forward",
        "model": "ViT-B/16",
        "family": "vit",
        "image_size": "1024",
        "height": 1024,
        "width": 1024,
        "batch_size": 8,
        "numerics": "bfloat16",
        "attention": "flash",
        "compile": "reduce-overhead",
        "status": "ok",
        "latency_s": 0.09525,
        "num_calls": 20,
        "params": 89_000_000,
        "image_flops": 700_000_000_000,
        "step_flops": 5_600_000_000_000,
    }
    assert {key: one[key] for key in expected} == expected
    unknown = "latency_low_s latency_high_s call_s activation_peak_bytes process_peak_bytes parameters_bytes weights"
    assert all(one[key] is None for key in unknown.split())  # its memory is of another definition
    assert "least of 20 calls" in one["message"] and "without attention's products" in one["message"]


@pytest.mark.parametrize(
    ["name", "family", "attention", "is_undercounted"],
    [
        ("ViTDet-B/16w14", "vitdet", "math", True),
        ("ConvNeXt-B", "convnext", None, False),
        ("NFNet-F0", "nfnet", None, False),
        ("Mixer", None, None, False),
    ],
)
def test_only_models_with_attention_have_a_kernel_and_too_few_flops(name, family, attention, is_undercounted):
    one = article_row(row(m=name, kernel="MATH"), "x")
    assert (one["family"], one["attention"]) == (family, attention)
    assert ("without attention" in one["message"]) == is_undercounted


@pytest.mark.parametrize(
    ["dtype", "numerics"],
    [("fp32_max", "fp32_max"), ("fp32_hi", "tensorfloat32"), ("bf16", "bfloat16"), ("f16", "float16")],
)
def test_numerics_are_ours_where_they_are_the_same(dtype, numerics):
    assert article_row(row(dtype=dtype), "x")["numerics"] == numerics


def test_a_case_that_ran_out_of_memory_is_a_row_that_failed(tmp_path):
    nan = float("nan")
    text = json.dumps([row(time=nan, flops=nan, params=nan, mem_tot=nan, mem_fwd=nan)])
    assert "NaN" in text
    [one] = shown(tmp_path, text)
    assert (one["status"], one["message"], one["latency_s"], one["image_flops"]) == ("oom", "out of memory", None, None)


def test_json_lines_and_a_list_are_read_alike(tmp_path):
    rows = [row(res=res, kernel="MATH") for res in (512, 224)]
    assert [r["height"] for r in shown(tmp_path, rows)] == [224, 512]
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    assert [r["height"] for r in shown(tmp_path, lines, "rows.jsonl")] == [224, 512]


@pytest.mark.parametrize(
    "change",
    [
        {"res": "224"},
        {"bs": 0},
        {"m": None},
        {"time": "fast"},
        {"flops": []},
        {"res": 1e9},
        {"time": -1.5},
        {"time": 10**400},
        {"time": 0},
        {"time": True},
        {"time": 5e-324},
    ],
)
def test_a_bad_row_is_named_and_left_out(tmp_path, change):
    (tmp_path / "results.json").write_text(json.dumps([row(), row(**change)]))
    source = read_source(tmp_path / "results.json")
    assert len(source.article) == 1 and source.num_left_out == 1
    assert source.faults[0].startswith(f"results.json:2: {next(iter(change))} is ")


def test_they_enter_no_comparison_no_knob_and_no_crossover(tmp_path):
    ours = [
        record("torch", ms, image_size=size, attention=a) for ms, size, a in ((5, "224", "flash"), (6, "224", "math"))
    ]
    for one in ours:
        one["case"] |= {"device_name": GPU, "platform": "gpu", "num_threads": None, "model": "ViT-B/16"}
    theirs = [row(res=res, kernel=k, bs=1, dtype="fp32_max") for res in (224, 512) for k in ("MATH", "FLASH_ATTENTION")]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ours))
    (tmp_path / "results.json").write_text(json.dumps(theirs))
    payload = payload_of(read_sources([str(tmp_path)]))
    rows = rows_of(payload)
    assert [r["origin"] for r in rows] == ["vitcmp"] * 2 + ["article"] * 4
    assert payload["sources"][0]["num_records"] == 6
    alone = payload_of([read_source(tmp_path / "records.jsonl")])
    for table in ("comparisons", "knobs", "crossovers", "ceilings", "environments"):
        assert [one | {"source": ""} for one in payload[table]] == [one | {"source": ""} for one in alone[table]]
    assert all(rows[knob["row"]]["origin"] == "vitcmp" for knob in payload["knobs"])
