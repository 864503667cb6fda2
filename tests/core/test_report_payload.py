"""The payload of the report: its shape, its figures, and that equal records give equal bytes."""

import json
import math
import random
import statistics

import pytest

from tests.browser.payloads import NUMBERS, TEXTS
from tests.core.fake_records import GPU, failure, record
from vitcmp.devices import peak_bytes_per_s, peak_flops
from vitcmp.flops import count_flops
from vitcmp.report.html import render_html
from vitcmp.report.payload import make_payload, payload_of, rows_of
from vitcmp.report.reading import Source
from vitcmp.traffic import count_traffic

RATIO = {"value", "low", "high", "verdict"}


def several():
    """Two frameworks, two models, three sizes, several settings and runs, and failures."""
    records = []
    for i, (model, size) in enumerate((m, s) for m in ("vit_ti16", "resnet50") for s in ("64", "96x160", "224")):
        for run in range(2):
            at_s = 100 * i + 10 * run
            records += [record("jax", 10.0 + i, model=model, image_size=size, run=run, at_s=at_s)]
            records += [record("torch", 12.0 - i, model=model, image_size=size, run=run, at_s=at_s + 5)]
    records += [record("torch", 9.0, attention="math", numerics="bfloat16", at_s=900), failure(compile="default")]
    return [*records, failure("torch", image_size="384"), record("jax", 3.0, batch_size=4, **GPU)]


def columns_of(payload):
    """Returns the settings as columns of plain values."""
    settings = payload["settings"]
    return {name: [settings[name]["values"][i] for i in settings[name]["index"]] for name in TEXTS} | {
        name: settings[name] for name in NUMBERS
    }


def test_the_payload_has_the_shape_that_the_page_reads():
    payload = make_payload(several(), name="some")
    tables = "comparisons knobs crossovers ceilings environments"
    assert [*payload] == ["title", "version", "sources", "settings", *tables.split()]
    assert payload["sources"] == [{"name": "some", "num_records": 28, "left_out": 0, "faults": []}]
    assert {*payload["settings"]} == {*TEXTS, *NUMBERS}
    columns = columns_of(payload)
    assert {len(column) for column in columns.values()} == {16}
    assert all(isinstance(value, str | None) for name in TEXTS for value in columns[name])
    assert all(isinstance(value, int | float | None) for name in NUMBERS for value in columns[name])
    for name in TEXTS:
        values = payload["settings"][name]["values"]
        assert len(values) == len(set(values))
    place = {"source", "device", "mode", "weights"}
    point = place | {"model", "image_size", "batch_size"}
    keys = {"numerics", "jax", "torch", "parity", "refusal", "ratio", "cpu_ratio", "gap_s"}
    assert all({*row} == point | keys for row in payload["comparisons"])
    assert all({*row["parity"]} == {"status", "error", "bound"} for row in payload["comparisons"])
    assert all({*row["ratio"]} == RATIO for row in payload["comparisons"] if row["ratio"])
    keys = {"knob", "backend", "value", "row", "reference", "reference_row", "ratio"}
    assert payload["knobs"] and all({*row} == point | keys and {*row["ratio"]} == RATIO for row in payload["knobs"])
    keys = {"batch_size", "backend", "metric", "a", "b", "status", "low_px", "high_px"}
    assert payload["crossovers"] and all({*row} == place | keys for row in payload["crossovers"])
    keys = {"backend", "numerics", "flops_per_s", "bytes_per_s", "peak_flops_per_s", "peak_bytes_per_s", "how"}
    assert payload["ceilings"] and all({*row} == {"source", "device"} | keys for row in payload["ceilings"])
    assert all({*row} == {"source", "device", "facts"} for row in payload["environments"])


def test_rows_point_at_the_settings_that_were_compared():
    payload = make_payload(several())
    rows = rows_of(payload)
    assert {name: [row[name] for row in rows] for name in rows[0]} == columns_of(payload)
    for c in payload["comparisons"]:
        jax, torch = rows[c["jax"]], rows[c["torch"]]
        assert (jax["backend"], torch["backend"]) == ("jax", "torch")
        for key in ("device", "mode", "weights", "model", "image_size", "batch_size"):
            assert jax[key] == torch[key] == c[key]
        if c["ratio"]:
            assert c["ratio"]["value"] == pytest.approx(torch["latency_s"] / jax["latency_s"], rel=2e-5)
    for knob in payload["knobs"]:
        row, reference = rows[knob["row"]], rows[knob["reference_row"]]
        assert (row[knob["knob"]], reference[knob["knob"]]) == (knob["value"], knob["reference"])
        assert knob["ratio"]["value"] == pytest.approx(row["latency_s"] / reference["latency_s"], rel=2e-5)


def test_a_row_has_the_figures_of_its_records_to_five_digits():
    records = [record("jax", ms, run=run, batch_size=4) for run, ms in enumerate((10.0, 12.0, 11.0))]
    [row] = rows_of(make_payload(records))
    medians = [statistics.median(r["latency"]["wall_s"]) for r in records]
    assert row["latency_s"] == pytest.approx(statistics.median(medians), rel=1e-5)
    assert row["latency_low_s"] < min(medians) and row["latency_high_s"] > max(medians)  # the hull of the runs' own
    assert row["call_s"] == pytest.approx(0.8 * row["latency_s"], rel=2e-5)  # 3.2 times over 4 calls
    assert (row["num_runs"], row["num_calls"]) == (3, 180)
    assert (row["height"], row["width"], row["batch_size"], row["num_threads"]) == (224, 224, 4, 2)
    assert (row["image_flops"], row["step_flops"]) == (2_507_366_000, 4 * 2_507_366_000)
    assert (row["parameters_bytes"], row["activation_peak_bytes"]) == (22_900_000, 12_300_000)
    assert row["process_peak_bytes"] is None and row["peak_share"] is None
    assert row["traffic_bytes"] == count_traffic("vit_ti16", 224, batch_size=4)
    assert (row["status"], row["message"], row["origin"], row["family"]) == ("ok", None, "vitcmp", "vit")
    assert (row["device"], row["is_converged"], row["is_contended"]) == ("AMD EPYC, 2 threads", 1, 0)


def test_doubt_is_carried_and_a_share_of_peak_where_the_peak_is_known():
    doubtful = record(is_converged=False, others=0.2, numerics="bfloat16", batch_size=8, **GPU)
    [row] = rows_of(make_payload([doubtful]))
    assert (row["is_converged"], row["is_contended"], row["others_cpu_share"]) == (0, 1, 0.2)
    share = row["step_flops"] / row["call_s"] / peak_flops("NVIDIA H200", "bfloat16")
    assert row["device"] == "NVIDIA H200" and row["peak_share"] == pytest.approx(share, rel=1e-4)


def test_what_failed_is_a_row_with_its_status_its_reason_and_its_flops():
    records = [failure(image_size="384", batch_size=2, mode="train", message="no room in /home/me/tmp/x: 9 GiB\nmore")]
    [row] = rows_of(make_payload(records))
    assert (row["status"], row["message"]) == ("oom", "MemoryError: no room in .../x: 9 GiB")
    unknown = "latency_s call_s num_runs num_calls params activation_peak_bytes is_converged is_contended"
    assert all(row[name] is None for name in unknown.split())
    assert row["image_flops"] == count_flops("vit_ti16", 384).total
    assert row["step_flops"] == 2 * count_flops("vit_ti16", 384, mode="train").total


@pytest.mark.parametrize(
    ["statuses", "said"],
    [
        (("oom", "crashed"), ("crashed", "MemoryError: out of memory: 20 GiB")),
        (("interrupted", "timeout"), ("timeout", "MemoryError: out of memory: 20 GiB")),
        (("ok", "oom", "ok"), ("ok", "1 of 3 runs failed: oom: MemoryError: out of memory: 20 GiB")),
    ],
)
def test_of_several_attempts_the_worst_is_said_and_a_measured_one_is_ok(statuses, said):
    attempts = [record("torch") if s == "ok" else failure(status=s) for s in statuses]
    [row] = rows_of(make_payload([one | {"run": run} for run, one in enumerate(attempts)]))
    assert (row["status"], row["message"]) == said and (row["latency_s"] is None) == ("ok" not in statuses)


def test_an_interrupted_case_without_an_error_has_no_message():
    [row] = rows_of(make_payload([failure(status="interrupted") | {"error": None}]))
    assert (row["status"], row["message"]) == ("interrupted", None)


@pytest.mark.parametrize(
    ["torch_ms", "word"], [(13.2, "JAX faster"), (8.0, "torch faster"), (10.0, "same"), (10.3, "ambiguous")]
)
def test_a_ratio_of_torch_over_jax_is_judged_from_jaxs_side(torch_ms, word):
    [c] = make_payload([record("jax", 10.0), record("torch", torch_ms)])["comparisons"]
    assert c["ratio"]["verdict"] == c["cpu_ratio"]["verdict"] == word
    assert c["ratio"]["low"] <= c["ratio"]["value"] <= c["ratio"]["high"]
    assert c["parity"] == {"status": "equal", "error": 0.0, "bound": c["parity"]["bound"]} and c["refusal"] is None


def test_a_ratio_is_refused_where_outputs_differ_and_the_best_of_any_has_no_parity_of_its_own():
    [c] = make_payload([record("jax"), record("torch", 20.0, shift=0.05, at_s=310)])["comparisons"]
    assert (c["ratio"], c["cpu_ratio"], c["refusal"], c["gap_s"]) == (None, None, "outputs differ", 300.0)
    assert c["parity"]["status"] == "differs" and c["parity"]["error"] > c["parity"]["bound"]
    sides = [("jax", 5.0, "bfloat16"), ("torch", 12.0, "bfloat16"), ("jax", 11.0, "float32"), ("torch", 9.0, "float32")]
    comparisons = make_payload([record(side, ms, numerics=n) for side, ms, n in sides])["comparisons"]
    overall = comparisons[-1]
    assert overall["numerics"] == "best of any" and overall["ratio"]["verdict"] == "JAX faster"
    assert overall["parity"] == {"status": None, "error": None, "bound": None}


def test_the_same_records_in_any_order_give_the_same_bytes():
    records = several()
    page = render_html(make_payload(records))
    for seed in range(5):
        shuffled = random.Random(seed).sample(records, len(records))
        assert render_html(make_payload(shuffled)) == page
    sources = [Source("b", several()), Source("a", several())]
    assert json.dumps(payload_of(sources)) == json.dumps(payload_of(sources[::-1]))


def test_of_several_records_of_a_run_the_last_in_time_counts_wherever_it_stands():
    records = [record("jax", 8.0, at_s=50), record("jax", 10.0, at_s=0), failure("jax", at_s=20)]
    [row] = rows_of(make_payload(records))
    assert row["latency_s"] == 0.008 and row["status"] == "ok"


def test_older_method_versions_are_left_out_with_a_count():
    old = [record(run=run) | {"method_version": 1} for run in range(3)]
    payload = payload_of([Source("new", [record()]), Source("old", old, faults=["x.jsonl:1: bad"], num_left_out=1)])
    new, older = payload["sources"]
    assert (new["num_records"], new["left_out"], older["num_records"], older["left_out"]) == (1, 0, 0, 4)
    assert older["faults"][0].startswith("3 records of method version 1: ") and older["faults"][1] == "x.jsonl:1: bad"
    assert [row["source"] for row in rows_of(payload)] == ["new"]


def test_at_most_20_faults_are_listed_and_all_are_counted():
    source = Source("a", [record()], faults=[f"x:{i}: bad" for i in range(50)], num_left_out=50)
    [shown] = payload_of([source])["sources"]
    assert len(shown["faults"]) == 21 and shown["faults"][-1] == "and 30 more" and shown["left_out"] == 50


def test_a_sweeps_records_that_cannot_be_shown_are_left_out_and_named():
    unfit = record("torch", image_size="384")
    unfit["case"]["batch_size"] = 0
    payload = make_payload([record("torch"), unfit])
    assert [row["image_size"] for row in rows_of(payload)] == ["224"] and payload["sources"][0]["left_out"] == 1
    assert payload["sources"][0]["faults"][0].startswith(f"case {unfit['case_id'][:12]}, run 0: 384 px, batch size 0")


@pytest.mark.parametrize(
    ["first", "second", "how"],
    [
        ((2.0, 1.0, "A matmul; A copy"), (1.0, 2.0, "B matmul; B copy"), "A matmul; B copy"),
        ((1.0, 1.0, "A matmul; A copy"), (2.0, 2.0, "B matmul; B copy"), "B matmul; B copy"),
        ((2.0, None, "A matmul; copy_bytes_per_s: E: no"), (1.0, None, "B"), "A matmul; copy_bytes_per_s: E: no"),
        ((2.0, 1.0, None), (1.0, 2.0, "B matmul; B copy"), "B matmul; B copy"),
    ],
)
def test_how_a_ceiling_was_measured_is_said_of_the_largest_one(first, second, how):
    records = [record(numerics="bfloat16", run=i, **GPU) for i in range(2)]
    for one, values in zip(records, (first, second), strict=True):
        one["ceilings"] = dict(zip(("matmul_flops_per_s", "copy_bytes_per_s", "how"), values, strict=True))
    assert make_payload(records)["ceilings"][0]["how"] == how


def test_nothing_of_one_source_is_compared_with_another_and_equal_devices_are_told_apart():
    sources = [Source("one", [record("jax")]), Source("two", [record("torch"), record("jax", **GPU)])]
    payload = payload_of(sources)
    assert payload["comparisons"] == [] and payload["knobs"] == []
    devices = [row["device"] for row in rows_of(payload)]
    assert devices == ["AMD EPYC, 2 threads (one)", "AMD EPYC, 2 threads (two)", "NVIDIA H200"]
    assert {c["device"] for c in payload["environments"]} == set(devices)


def test_ceilings_are_the_largest_measured_and_the_makers():
    measured = {"matmul_flops_per_s": 4.5e14, "copy_bytes_per_s": 4.1e12, "how": "8192 x 8192, 1 GiB"}
    slower = measured | {"matmul_flops_per_s": 4.4e14, "copy_bytes_per_s": 4.2e12}
    records = [record(numerics="bfloat16", run=i, **GPU) for i in range(3)]
    for one, ceilings in zip(records, (measured, slower, None), strict=True):
        one["ceilings"] = ceilings
    [ceiling] = make_payload([*records, record("torch")])["ceilings"]  # nothing is known of the CPU's
    assert ceiling == {
        "source": "results",
        "device": "NVIDIA H200",
        "backend": "jax",
        "numerics": "bfloat16",
        "flops_per_s": 4.5e14,
        "bytes_per_s": 4.2e12,
        "peak_flops_per_s": peak_flops("NVIDIA H200", "bfloat16"),
        "peak_bytes_per_s": peak_bytes_per_s("NVIDIA H200"),
        "how": "8192 x 8192, 1 GiB",
    }


def test_the_environment_says_versions_and_commit_and_no_path():
    host = {"cpu": "AMD EPYC 9B45", "num_cpus": 2, "memory_bytes": 24 * 2**30, "commit": "0123456789abcdef"}
    host |= {"is_dirty": True, "flags": {"OMP_NUM_THREADS": "2", "CUDA_HOME": "/usr/local/cuda", "XLA_FLAGS": ""}}
    one, two = record("jax"), record("torch", at_s=86400)
    for each, version in ((one, {"jax": "0.10.2"}), (two, {"torch": "2.15.0"})):
        each["environment"], each["device"]["versions"] = host, version
    [environment] = make_payload([one, two])["environments"]
    facts = dict(environment["facts"])
    assert facts["CPU"] == "AMD EPYC 9B45" and facts["memory, GiB"] == "24.0" and facts["OMP_NUM_THREADS"] == "2"
    assert (facts["jax"], facts["torch"], facts["commit"]) == ("0.10.2", "2.15.0", "0123456789 with changes")
    assert facts["measured"] == "2026-11-20 to 2026-11-21"
    assert "/usr/local" not in json.dumps(environment) and "XLA_FLAGS" not in facts


def test_every_float_has_five_digits_at_most_and_every_count_all_of_them():
    def floats(value):
        if isinstance(value, float):
            yield value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from floats(item)

    payload = make_payload(several())
    assert all(math.isfinite(value) and value == float(f"{value:.5g}") for value in floats(payload))
    assert 2_507_366_000 in payload["settings"]["image_flops"]


def test_a_model_that_this_version_does_not_know_keeps_its_row():
    stranger = record("jax")
    stranger["case"] |= {"model": "vit_z99", "mode": "other", "numerics": "int4"}
    [row] = rows_of(make_payload([stranger]))
    assert row["model"] == "vit_z99" and row["latency_s"] == 0.01 and row["traffic_bytes"] is None
    failed = failure()
    failed["case"] |= {"mode": "other"}
    [row] = rows_of(make_payload([failed]))
    assert row["status"] == "oom" and row["image_flops"] is None


def test_without_records_there_are_no_rows():
    payload = make_payload([])
    assert rows_of(payload) == [] and payload["sources"][0]["num_records"] == 0
