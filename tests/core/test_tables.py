import io
import re

import pytest
from rich.console import Console

from tests.core.fake_records import GPU, failure, record
from tests.core.shown import show, words
from vitcmp.devices import peak_flops
from vitcmp.records import validate_record
from vitcmp.report.comparison import comparison_table
from vitcmp.report.summary import settings_of
from vitcmp.report.tables import best_table, failures_table, print_report
from vitcmp.report.text import Column, Fitted, duration, number, percent, power

OVERRIDES = "vitdet_b16:window_policy=divide,window_size=16,rel_pos=false"
LONGEST = {"attention": "mem_efficient", "compile": "max-autotune-no-cudagraphs", "layout": "channels_last"}


def test_the_records_of_these_tests_are_good_ones():
    assert validate_record(record()) == [] and validate_record(failure()) == []


def test_the_best_setting_is_that_of_lowest_median_latency():
    records = [
        record("torch", 12.0),
        record("torch", 11.0, attention="math", numerics="bfloat16", compile="default"),
        record("torch", 13.0, attention="mem_efficient"),
    ]
    text = show(best_table(records))
    assert "torch bfloat16 math default nchw" in words(text)
    assert "11.00" in text and "12.00" not in text and "13.00" not in text


def test_there_is_a_row_for_each_backend_model_size_and_batch():
    records = [
        record(backend, model=model, image_size=size, batch_size=batch)
        for backend in ("torch", "jax")
        for model in ("vit_ti16", "resnet50")
        for size in ("96x160", "64")
        for batch in (4, 1)
    ]
    rows = re.findall(r"(\S+) +(\S+) px, (\d) +(jax|torch) float32", show(best_table(records)))
    sizes = [("64", "1"), ("64", "4"), ("96x160", "1"), ("96x160", "4")]
    assert rows == [(m, s, b, f) for m in ("vit_ti16", "resnet50") for s, b in sizes for f in ("jax", "torch")]


def test_a_row_has_its_figures_with_units_interval_and_number():
    text = show(best_table([record(ms=10.0, batch_size=4)]))
    assert re.search(r"latency, ms +95 % interval +calls +runs +images/s +GFLOP/img +activ\., MB +param\., MB", text)
    [row] = [line for line in text.splitlines() if line.startswith("vit_ti16")]
    low, high = (float(x) for x in re.search(r"\[(\S+), (\S+)\]", row).groups())
    assert low < 10.0 < high < 10.1
    # images/s: of the throughput's own 8 ms a call, not of the latency's 10 ms
    assert re.search(r"10\.00 +\[.*\] +60 +1 +500\.0 ±0\.\d+ % +2\.507 +12\.3 +22\.9 +ok", row)
    assert "60 samples; ± half the width of its 95 % interval" in words(text)
    assert "forward on AMD EPYC (cpu, 2 threads), weights seed:0" in text
    assert "jax 0.10.2" in text


def test_the_unknown_is_a_dash_and_never_0():
    unknown = record() | {"throughput": None, "flops": None, "contention": None}
    unknown["memory"] = dict.fromkeys(unknown["memory"])
    [row] = [line for line in show(best_table([unknown])).splitlines() if line.startswith("vit_ti16")]
    assert row.split()[-5:] == ["–", "–", "–", "–", "ok"]
    assert " 0 " not in row and "None" not in row


def test_the_share_of_peak_is_there_where_the_peak_is_known():
    records = [record("torch", numerics="bfloat16", mode="train", batch_size=8, **GPU)]
    share = 100 * 8 * 3 * 2_507_366_000 / 8e-3 / peak_flops("NVIDIA H200", "bfloat16")
    text = show(best_table(records))
    assert "of peak" in text and f" {share:.2f} %" in text
    assert "of peak" not in show(best_table([record()]))


def test_forward_and_train_and_two_devices_are_different_tables():
    records = [record(), record(mode="train"), record(**GPU), record(weights="sha256:0")]
    assert show(best_table(records)).count("Best setting of each model") == 4


@pytest.mark.parametrize(
    ["changes", "mark", "note"],
    [
        ({"is_converged": False}, "~10.00", "~ not converged"),
        ({"others": 0.2}, "!10.00", "! others used more than 5%"),
        ({"num_values": 5}, "]*", "* not a 95 % interval"),
    ],
)
def test_a_doubtful_timing_is_marked_and_the_mark_explained(changes, mark, note):
    for table in (best_table([record(**changes)]), comparison_table([record(**changes), record("torch")])):
        assert mark in show(table) and note in show(table)
    clean = show(best_table([record(others=0.05)]))
    assert mark not in clean and note not in clean


def test_runs_are_pooled_and_their_number_is_said():
    records = [record(ms=ms, run=run) for run, ms in enumerate((10.0, 30.0, 11.0))]
    text = show(best_table(records))
    assert re.search(r" 11\.00 +\[9\.\d+, 30\.\d+\]\* +180 +3 ", text)


def test_the_last_record_of_a_run_counts():
    assert "none" not in show(best_table([failure("jax"), record(ms=10.0)]))
    [setting] = settings_of([record(ms=12.0), failure("jax"), record(ms=10.0)])
    assert len(setting.ok) == 1 and not setting.failed
    assert "1 oom" in show(best_table([record(ms=10.0), failure("jax")]))


def test_a_group_in_which_nothing_ran_shows_why():
    records = [
        failure(),
        failure(attention="math"),
        failure("torch", "timeout", "not done after 9 s", compile="default"),
    ]
    text = words(show(best_table(records), 400))
    assert "2 oom, 1 timeout: " in text and "failed out of memory: 20 GiB" in text
    assert "latency: median" not in text


def test_a_setting_that_failed_in_some_runs_says_so():
    assert "ok, 1 run failed" in show(best_table([record(), failure("jax", run=1)]))


def test_failures_show_case_reason_and_log_and_those_that_differ_in_size_share_a_row():
    records = [failure(image_size=size) for size in ("224", "384")] + [failure("jax", "crashed", "killed by SIGSEGV")]
    text = show(
        failures_table(
            [record("jax", numerics="bfloat16"), *records], log_of=lambda r: f"logs/{r['case']['backend']}.log"
        )
    )
    assert "What did not run: 1 crashed, 2 oom" in text
    assert words("torch vit_ti16 forward float32 flash eager nchw: 224 px, 1; 384 px, 1") in words(text)
    assert "MemoryError: out of memory: 20 GiB" in text and "more\n" not in text.replace("1 more\n", "")
    assert "logs/torch.log and 1 more" in text and "logs/jax.log" in text
    assert text.count("flash eager") == 1 and "bfloat16" not in text


def test_without_failures_there_is_no_table_of_them():
    assert show(failures_table([record()])).strip() == ""


def test_markup_in_a_message_is_shown_as_it_is():
    assert "[bold]no[/bold] [/x] [1, 2]" in show(failures_table([failure(message="[bold]no[/bold] [/x] [1, 2]")]))


def everything():
    return [
        *(
            record(side, 10 + run, run=run, is_converged=False, others=0.5)
            for side in ("jax", "torch")
            for run in range(3)
        ),
        *(
            record(s, 123.4, model=OVERRIDES, image_size="1024x1536", batch_size=128, numerics="bfloat16_mixed")
            for s in ("jax",)
        ),
        record(
            "torch",
            234.5,
            model=OVERRIDES,
            image_size="1024x1536",
            batch_size=128,
            numerics="bfloat16_mixed",
            **LONGEST,
        ),
        record("jax", model="convnext_xlarge"),
        record("torch", model="convnext_xlarge", shift=0.03),
        failure(model="resnet152", message="torch.OutOfMemoryError:" + " CUDA out of memory" * 20),
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, 400])
def test_nothing_is_cut_off_at_any_width(width):
    text = show(best_table(everything()), width) + show(comparison_table(everything()), width)
    text += show(failures_table(everything(), log_of=lambda record: "results/logs/0123456789abcdef-run0.log"), width)
    assert "…" not in text
    solid = re.sub(r"\s", "", text)
    for part in ("123.4", "234.5", "~!11.00", "12.3", "22.9", "2.507", "180", "differs", "oom", "bfloat16_mixed"):
        assert part in solid
    if width >= 80:
        assert "[123." in text and "JAX 1.90x" in words(text) and "1024x1536 px, 128" in text
        assert "results/logs/0123456789abcdef-run0.log" in text and "< 3." in text


@pytest.mark.parametrize(["width", "lines"], [(100, 2), (160, 1)])
def test_a_row_of_the_best_table_takes_two_lines_at_100_columns_and_one_at_160(width, lines):
    text = show(best_table([record("jax"), record("torch")]), width).splitlines()
    start, end = (
        next(i for i, line in enumerate(text) if line.startswith(word)) for word in ("───", "latency: median")
    )
    assert len([line for line in text[start + 1 : end] if line.strip()]) == 2 * lines


def test_a_table_too_narrow_for_its_columns_becomes_a_list():
    table = Fitted("t", [[Column("a", "first")], [Column("b", "second")]], [{"a": "x" * 30, "b": "y" * 30}])
    assert "first: " + "x" * 30 + "\nsecond: " + "y" * 30 in show(table, 50)
    assert "first: " not in show(table, 70)


def test_the_report_prints_all_tables_and_says_so_where_there_are_no_records():
    console = Console(width=100, file=io.StringIO())
    print_report(console, everything(), log_of=lambda record: "x.log")
    text = console.file.getvalue()
    assert [text.count(title) for title in ("Best setting of", "The same model in", "What did not run")] == [1, 1, 1]
    assert "x.log" in text
    console = Console(width=100, file=io.StringIO())
    print_report(console, [])
    assert console.file.getvalue() == "No records yet.\n"


def test_records_of_an_older_method_are_in_no_table_and_one_line_says_how_many():
    old = [record("jax", 1.0), record("torch", 2.0), failure("torch", run=1)]
    for one in old:
        one["method_version"] = 1
        del one["case"]["batch_norm"]
    new = [record("jax", 10.0), record("torch", 20.0)]
    for records in ([*old, *new], [*new, *old]):
        console = Console(width=200, file=io.StringIO())
        print_report(console, records)
        text = console.file.getvalue()
        note = (
            "Left out: 3 records of method version 1; these are of version 2, and results of different versions do not"
        )
        assert text.count(note) == 1 and text.index(note) < text.index("Best setting")
        assert "10.00" in text and "JAX 2.00x faster" in text and "1.000" not in text and "What did not run" not in text
        assert show(best_table(records)) == show(best_table(new))
        assert show(comparison_table(records)) == show(comparison_table(new))
        assert show(failures_table(records)).strip() == ""
    console = Console(width=200, file=io.StringIO())
    print_report(console, old)
    assert "1.000" in console.file.getvalue() and "Left out" not in console.file.getvalue()


def test_the_two_sides_of_a_point_are_never_of_two_methods():
    records = [record("jax", 1.0) | {"method_version": 1}, record("torch", 10.0)]
    assert show(comparison_table(records)).strip() == ""


def test_a_folded_batch_norm_competes_with_a_kept_one_and_is_named():
    folded = record("torch", 9.0, model="resnet50", batch_norm="folded")
    records = [record("jax", 20.0, model="resnet50"), record("torch", 10.0, model="resnet50"), folded]
    text = words(show(best_table(records)))
    assert "eager nchw folded 9.000" in text and "kept" not in text and "10.00" not in text
    assert "JAX" in (text := words(show(comparison_table(records)))) and "torch 2.22x faster" in text
    assert "float32 eager nchw folded: 224 px, 1" in words(
        show(failures_table([failure(model="resnet50", batch_norm="folded")]))
    )


def test_throughput_has_its_spread_and_the_number_of_its_samples():
    records = [record(ms=ms, run=run, num_values=40) for run, ms in enumerate((10.0, 11.0, 12.0))]
    text = show(best_table([*records, record("torch", 10.0)]))
    # medians of 8, 8.8 and 9.6 ms a call: 113.6 images/s, of which 104 to 125 were seen
    assert re.search(r" 113\.6 ±9\.\d %\* ", text)
    assert "with calls queued, 60 to 120 samples; ± half" in words(text)


def test_another_librarys_model_has_the_flops_of_its_graph():
    foreign = record()
    foreign["flops"] = {"analytic": None, "counted": 3_000_000_000, "by_kind": None, "step": None}
    assert " 3.000 " in show(best_table([foreign]))


def test_a_record_with_a_spec_of_another_version_does_not_stop_the_report():
    records = [record("jax"), record("torch")]
    for one in records:
        one["case"]["spec"] = {"family": "vit"}
    assert "refused: no parity (no bound" in words(show(comparison_table(records), 400))


@pytest.mark.parametrize(
    ["value", "expected"],
    [
        (None, "–"),
        (12.3456, "12.35"),
        (1234.4, "1234"),
        (123456.0, "123456"),
        (0.0123456, "0.01235"),
        (0.0, "0"),
        (9.9999, "10.00"),
    ],
)
def test_numbers_have_their_digits_and_no_exponent(value, expected):
    assert number(value) == expected


def test_small_numbers_percentages_and_durations_are_short():
    assert [power(x) for x in (3.14e-5, 0.0, 2.0)] == ["3.1e-5", "0", "2.0e0"]
    assert [percent(x) for x in (None, 0.1234, 0.00123)] == ["–", "12 %", "0.12 %"]
    assert [duration(x) for x in (12, 600, 7200)] == ["12 s", "10 min", "2.0 h"]


def test_markdown_has_a_line_a_row_and_shows_every_character():
    columns = ((Column("a", "A"), Column("b", "B", is_number=True)),)
    text = Fitted("Title", columns, [{"a": "x|y\nz", "b": r"<b>*\ "}], ("One note.",)).to_markdown()
    head, rule, row = text.split("\n\n")[1].splitlines()
    assert (head, rule) == ("| A | B |", "| --- | ---: |")
    assert row == r"| x\|y z | &lt;b>\*\\  |"
    assert text.startswith("**Title**\n\n") and text.endswith("\n\n- One note.")
