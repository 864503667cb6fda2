"""The charts show what the payload holds: values, intervals, failures, refusals; checked against Python's own sums."""

import csv
import itertools

import pytest

from tests.browser.pages import SECTIONS, cells, control, drawn, open_page, use, wait_until
from tests.browser.payloads import CPU, GPU, MODELS, SIZES, columns, make_payload


def rows_of(payload):
    settings = payload["settings"]
    names = {n: [c["values"][i] for i in c["index"]] if isinstance(c, dict) else c for n, c in settings.items()}
    return [dict(zip(names, values, strict=True)) for values in zip(*names.values(), strict=True)]


def shown(payload, **wanted):
    wanted = {"device": CPU, "mode": "forward", "batch_size": 1, **wanted}
    return [row for row in rows_of(payload) if all(row[key] == value for key, value in wanted.items())]


def best_by_point(rows):
    best = {}
    for row in rows:
        key = row["model"], row["image_size"]
        if row["latency_s"] and row["latency_s"] < best.get(key, {"latency_s": 1e9})["latency_s"]:
            best[key] = row
    return best


def test_every_section_is_drawn(page, make_page):
    open_page(page, make_page(make_payload()))
    for section in SECTIONS[:-1]:
        assert page.locator(f"#{section} figure.chart svg path").count() > 0, section
    assert page.get_by_text("could not be drawn").count() == 0
    assert page.locator("#speed figure.chart").count() == 7


def test_svgs_say_what_they_are(page, make_page):
    open_page(page, make_page(make_payload()))
    labels = page.eval_on_selector_all(
        "figure.chart svg", "nodes => nodes.map(node => node.getAttribute('aria-label'))"
    )
    assert labels and all(labels)
    frames = page.eval_on_selector_all(
        ".frame", "nodes => nodes.map(node => node.tabIndex + node.getAttribute('aria-label'))"
    )
    assert all((frame.startswith("0") and "points" in frame) or "point." in frame for frame in frames)


@pytest.mark.parametrize("batch", [1, 8])
def test_best_of_all_is_the_lowest_median_latency(page, make_page, batch):
    payload = make_payload()
    open_page(page, make_page(payload), f"#speed.table=1&batch={batch}&vitdet=1")
    best = best_by_point(shown(payload, batch_size=batch))
    found = {(row[0], row[1]): row for row in cells(page, "#speed .scroll")}
    assert len(found) == len(MODELS) * len(SIZES)
    for key, row in found.items():
        if key in best:
            assert float(row[4].split()[0].replace(",", "")) == pytest.approx(1e3 * best[key]["latency_s"], rel=5e-4)
            assert float(row[3].split()[0].replace(",", "")) == pytest.approx(batch / best[key]["call_s"], rel=5e-4)
            assert best[key]["numerics"] in row[2]
        else:
            assert row[4] == "–"


def test_unknown_is_a_dash_and_never_nought(page, make_page):
    open_page(page, make_page(make_payload()), "#speed.table=1&backend=torch")
    found = [row for row in cells(page, "#speed .scroll") if row[0] == "resnet50"]
    assert {row[8] for row in found} == {"–"}


def test_what_did_not_run_is_drawn_at_its_size(page, make_page):
    payload = make_payload()
    open_page(page, make_page(payload), "#batch=8")
    lost = {
        (r["model"], r["height"])
        for r in shown(payload, batch_size=8)
        if r["status"] != "ok" and "vitdet" not in r["model"]
    }
    marks = page.locator("#speed figure.latency svg[aria-label='What did not run'] [aria-label=dot] path")
    assert marks.count() == len(lost)
    text = page.inner_text("#speed .keys")
    assert all(
        word in text for word in ("out of memory", "timed out", "crashed", "error", "interrupted", "unsupported")
    )


def test_hovering_shows_value_interval_n_setting_and_marks(page, make_page):
    payload = make_payload()
    open_page(page, make_page(payload))
    row = best_by_point(shown(payload))["resnet50", "384"]
    text = point_text(page, "figure.latency", "resnet50", 384)
    assert f"{1e3 * row['latency_s']:.2f} ms [" in text
    assert "n: 2 runs, 60 calls" in text and "jax, bfloat16" in text and "others used the machine (8.0 %" in text
    text = point_text(page, "figure.latency", "vit_b16", 1024)
    assert "did not run: 2 out of memory" in text
    assert "~ not converged" in point_text(page, "figure.latency", "vit_b16", 896)


def point_text(page, figure, model, size):
    """Walks a chart with the arrow keys until the live text names the point; returns what the tip shows there."""
    frame = page.locator(f"#speed {figure} .frame")
    said = page.locator(f"#speed {figure} .said")
    frame.focus()
    for _ in range(len(MODELS)):
        page.keyboard.press("Home")
        for _ in range(len(SIZES)):
            if said.text_content().startswith(f"{model}, {size} px"):
                tip = " ".join(frame.locator("[aria-label=tip] text tspan").all_text_contents())
                assert f"{model}, {size} px" in tip
                return said.text_content()
            page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
    raise AssertionError(f"no point of {model} at {size} px")


def test_the_mouse_shows_the_same_tip(page, make_page):
    open_page(page, make_page(make_payload()))
    dot = page.locator("#speed figure.latency .frame > svg:last-of-type [aria-label=dot] path").first
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.locator("#speed figure.latency .frame > svg:last-of-type [aria-label=tip] text")
    assert "Latency per batch:" in tip.text_content()


def test_intervals_are_drawn(page, make_page):
    payload = make_payload()
    open_page(page, make_page(payload), "#backend=jax&numerics=float32")
    count = len(
        [r for r in shown(payload, backend="jax", numerics="float32") if r["latency_s"] and "vitdet" not in r["model"]]
    )
    assert page.locator("#speed figure.latency [aria-label=rule] line").count() == count


def test_the_article_is_dashed_and_its_flops_marked(page, make_page):
    open_page(page, make_page(make_payload()), f"#device={GPU}")
    dashes = page.eval_on_selector_all(
        "#speed figure.flops [aria-label=line]", "nodes => nodes.map(node => node.getAttribute('stroke-dasharray'))"
    )
    assert "7 4" in dashes
    assert "under-counted" in page.inner_text("#speed figure.flops figcaption")


def test_shares_refer_to_the_makers_peak_or_to_the_measured_ceiling(page, make_page):
    path = make_page(make_payload())
    open_page(page, path, "#numerics=float32")
    assert "the measured ceiling of 500 GFLOP/s (jax, float32)" in page.inner_text("#flops figure.share figcaption")
    open_page(page, path, f"#device={GPU}&backend=jax")
    assert "the maker's peak of 990 TFLOP/s (bfloat16)" in page.inner_text("#flops figure.share figcaption")
    open_page(page, path, "#numerics=bfloat16")
    assert "No ceiling was measured here" in page.inner_text("#flops figure.share figcaption")


def test_the_table_of_flops_has_what_was_reached(page, make_page):
    payload = make_payload()
    open_page(page, make_page(payload), "#flops.table=1")
    best = best_by_point(shown(payload))
    for row in cells(page, "#flops .scroll"):
        one = best[row[0], row[1]]
        assert float(row[5].replace(",", "")) == pytest.approx(one["step_flops"] / one["call_s"] / 1e9, rel=5e-4)
        assert float(row[6].replace(",", "")) == pytest.approx(one["step_flops"] / one["traffic_bytes"], rel=5e-4)


def test_a_ratio_is_refused_where_parity_failed(page, make_page):
    payload = make_payload()
    open_page(page, make_page(payload), "#frameworks.table=1&numerics=bfloat16")
    rows = cells(page, "#frameworks .scroll")
    wanted = [
        c for c in payload["comparisons"] if c["device"] == CPU and c["mode"] == "forward" and c["batch_size"] == 1
    ]
    wanted = [c for c in wanted if c["numerics"] == "bfloat16" and "vitdet" not in c["model"]]
    assert len(rows) == len(wanted)
    refused = [row for row in rows if row[8].startswith("refused")]
    assert {row[0] for row in refused} == {"resnet50", "convnext_b"}
    strip = page.locator("#frameworks svg[aria-label='What did not run']")
    assert strip.locator("[aria-label=dot] path").count() == len(refused)
    assert set(strip.locator("[aria-label=text] text").all_text_contents()) == {"resnet50", "convnext_b"}
    assert "error 3.1e-2 > bound 1.2e-5" in " ".join(itertools.chain(*rows))


def test_crossovers_say_who_overtakes_whom(page, make_page):
    open_page(page, make_page(make_payload()), "#vitdet=1")
    text = page.inner_text("#crossovers")
    assert "convnext_b overtakes vit_b16 between 560 and 640 px" in text
    assert "no crossing in the measured range: resnet50 is faster at every measured size" in text
    assert "too few sizes" in text and "not to be told" in text


def test_the_front_is_pareto_optimal_and_keeps_to_the_budgets(page, make_page):
    payload = make_payload()
    open_page(page, make_page(payload), "#choose.latency=90&choose.memory=300&choose.cost=activations")
    rows = [r for r in shown(payload, image_size="224") if r["latency_s"] and "vitdet" not in r["model"]]
    rows = [r for r in rows if r["latency_s"] <= 0.090 and (r["activation_peak_bytes"] or 1e99) <= 300e6]
    costs = [(r["latency_s"], r["activation_peak_bytes"]) for r in rows]
    front = sorted({c for c in costs if not any(o != c and o[0] <= c[0] and o[1] <= c[1] for o in costs)})
    found = [float(row[2]) for row in cells(page, "#choose .scroll")]
    assert found == pytest.approx([1e3 * latency for latency, _ in front], rel=5e-4)
    answer = page.inner_text("#choose .answer")
    assert f"of 4 models measured, those that keep to the budget: {len({r['model'] for r in rows})}." in answer
    assert "Lowest latency: vit_ti16" in answer
    assert "No accuracy was measured" in page.inner_text("#choose")


def test_csv_holds_the_rows_and_no_formula(page, make_page, tmp_path):
    payload = make_payload()
    rows = rows_of(payload)
    rows[0]["message"] = '=HYPERLINK("http://x"),"\n'
    payload["settings"] = columns(rows)
    open_page(page, make_page(payload))
    with page.expect_download() as event:
        page.click("text=CSV of all settings")
    event.value.save_as(tmp_path / "all.csv")
    with open(tmp_path / "all.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(rows)
    assert found[0]["message"] == "'" + rows[0]["message"].replace("\n", " ")
    for row, cell in zip(rows, found, strict=True):
        assert cell["model"] == row["model"] and cell["status"] == row["status"]
        assert cell["latency_s"] == "" if row["latency_s"] is None else float(cell["latency_s"]) == row["latency_s"]


def test_csv_of_what_is_shown_follows_the_controls(page, make_page, tmp_path):
    payload = make_payload()
    open_page(page, make_page(payload), "#batch=8")
    with page.expect_download() as event:
        page.click("text=CSV of what is shown")
    event.value.save_as(tmp_path / "shown.csv")
    with open(tmp_path / "shown.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    rows = [row for row in shown(payload, batch_size=8) if "vitdet" not in row["model"]]
    assert len([row for row in found if row["status"] == "ok"]) == len(best_by_point(rows))
    assert len([row for row in found if row["status"] != "ok"]) == len([row for row in rows if row["status"] != "ok"])


def test_texts_of_records_are_never_markup(page, make_page):
    evil = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"
    payload = make_payload()
    for name in ("model", "device", "message", "framework_version", "source"):
        column = payload["settings"][name]
        column["values"] = [value and f"{value}{evil}" for value in column["values"]]
    for table, name in itertools.product(
        ("comparisons", "knobs", "crossovers", "ceilings", "environments"), ("device", "model", "a", "b")
    ):
        for item in payload[table]:
            if name in item:
                item[name] += evil
    payload["title"] += evil
    payload["sources"][0]["faults"].append(evil)
    payload["environments"][0]["facts"].append([evil, evil])
    open_page(page, make_page(payload), "#speed.table=1&frameworks.table=1&knobs.table=1&flops.table=1")
    assert page.title() == payload["title"]
    assert page.locator("#top img, #speed img, #knobs img, #crossovers img, #method img, #frameworks img").count() == 0
    assert evil in page.text_content("h1")


def test_a_payload_of_nothing_is_a_page_that_says_so(page, make_page):
    empty = {key: [] for key in ("sources", "comparisons", "knobs", "crossovers", "ceilings", "environments")}
    open_page(page, make_page({"title": "nothing", "version": None, "settings": columns([]), **empty}))
    assert page.get_by_text("could not be drawn").count() == 0
    assert "Nothing was measured" in page.inner_text("#speed")


def test_rows_of_which_nothing_is_known_are_drawn(page, make_page):
    payload = make_payload()
    rows = rows_of(payload)
    known = {
        "device",
        "mode",
        "backend",
        "model",
        "family",
        "image_size",
        "height",
        "width",
        "batch_size",
        "origin",
        "status",
        "source",
    }
    payload["settings"] = columns(
        [{key: value if key in known else None for key, value in row.items()} for row in rows]
    )
    payload |= {"comparisons": [], "knobs": [], "crossovers": [], "ceilings": []}
    open_page(page, make_page(payload), "#speed.table=1&flops.table=1")
    assert page.get_by_text("could not be drawn").count() == 0


def test_two_sources_of_one_device_are_kept_apart(page, make_page):
    payload = make_payload()
    rows = rows_of(payload)
    payload["settings"] = columns([*rows, *({**row, "source": "other.jsonl"} for row in rows if row["device"] == CPU)])
    open_page(page, make_page(payload))
    options = control(page, "speed", "device").locator("option").all_text_contents()
    assert {f"{CPU} (cpu.jsonl)", f"{CPU} (other.jsonl)", GPU} == set(options)


def test_printing_draws_everything(page, make_page):
    path = make_page(make_payload())
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.locator("#choose .view svg").count() == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#choose .view svg").count() > 0


def test_what_comes_near_is_drawn(page, make_page):
    page.goto(make_page(make_payload()).as_uri())
    page.locator("#choose h2").scroll_into_view_if_needed()
    page.mouse.wheel(0, 600)
    page.wait_for_selector("#choose .view svg")


@pytest.mark.parametrize("width", [360, 390, 768])
def test_no_width_makes_the_page_scroll_sideways(page, make_page, width):
    page.set_viewport_size({"width": width, "height": 800})
    open_page(page, make_page(make_payload()), "#speed.table=1&frameworks.table=1&knobs.table=1&vitdet=1")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_charts_follow_the_width(page, make_page):
    open_page(page, make_page(make_payload()), section="speed")
    drawing = page.locator("#speed figure.throughput .frame > svg:last-of-type")
    wide = int(drawing.get_attribute("width"))
    page.set_viewport_size({"width": 500, "height": 800})
    page.evaluate("document.querySelector('#speed .view').scrollIntoView()")  # what is far from the screen waits
    size = "document.querySelector('#speed figure.throughput .frame > svg:last-of-type').getAttribute('width')"
    wait_until(page, f"{size} < {wide - 500}")


def test_a_narrow_chart_says_under_it_what_is_pointed_at(page, make_page):
    page.set_viewport_size({"width": 390, "height": 800})
    open_page(page, make_page(make_payload()), section="speed")
    page.locator("#speed figure.latency .frame").focus()
    page.keyboard.press("Home")
    said = page.locator("#speed figure.latency .said")
    assert "128 px, batch 1" in said.inner_text()
    box = said.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] > 50
    assert not page.locator("#speed figure.latency [aria-label=tip] text").last.is_visible()


def test_failures_are_reached_by_key(page, make_page):
    open_page(page, make_page(make_payload()), "#batch=8", section="speed")
    page.locator("#speed figure.latency .frame").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    said = page.locator("#speed figure.latency .said").text_content()
    assert "1024 px" in said and "out of memory" in said and "RuntimeError: <i>oom</i> at 1024 px" in said
    tip = page.locator("#speed figure.latency svg[aria-label='What did not run'] [aria-label=tip] text")
    assert "out of memory" in tip.text_content()


def test_the_head_says_what_was_measured_and_what_was_left_out(page, make_page):
    payload = make_payload()
    open_page(page, make_page(payload))
    text = page.inner_text("#top")
    assert "line 9: <b>schema</b> 7" in text and "records, 2 records left out" in text
    assert CPU in text and GPU in text
    best = min(best_by_point(shown(payload, image_size="224")).values(), key=lambda row: row["latency_s"])
    assert f"{best['model']} has the lowest latency, {1e3 * best['latency_s']:.3f} ms" in text
    verdicts = [c["ratio"]["verdict"] if c["ratio"] else "refused" for c in payload["comparisons"]]
    verdicts = verdicts[: len(verdicts) // 2]  # of the first device; the second has the same again
    assert (
        f"JAX faster in {verdicts.count('JAX faster')}" in text
        and f"not proved equal: {verdicts.count('refused')}" in text
    )
    assert "convnext_b overtakes vit_b16 between 560 and 640 px" in text


def test_knobs_show_the_ratio_of_latencies(page, make_page):
    payload = make_payload()
    open_page(page, make_page(payload), "#knobs.table=1&knobs.knob=attention")
    rows = cells(page, "#knobs .scroll")
    assert rows
    for row in rows:
        assert float(row[5].split()[0]) == pytest.approx(
            float(row[7].replace(",", "")) / float(row[9].replace(",", "")), rel=5e-3
        )
    assert drawn(page, "knobs") != use(page, "knobs", "batch", "8")
