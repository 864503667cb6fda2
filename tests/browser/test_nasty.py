"""Pages that are large, empty, hostile or half broken: what a reader sees of them is still true, and can be used."""

import csv

import pytest

from tests.browser.pages import at_rest, control, drawn, open_page, use, wait_until
from tests.browser.payloads import columns, make_payload
from tests.browser.test_charts import rows_of
from vitcmp.report import html as page_of
from vitcmp.report.csv_table import csv_table

NONE = {"comparisons": [], "knobs": [], "crossovers": []}
EVIL = '</script><img src=x> "q" & 100 %25 =1+1'


def renamed(payload, changes):
    """Gives models, by their names, others, in every table."""
    payload["settings"]["model"]["values"] = [changes.get(v, v) for v in payload["settings"]["model"]["values"]]
    for row in (*payload["comparisons"], *payload["knobs"], *payload["crossovers"]):
        row |= {key: changes.get(row[key], row[key]) for key in ("model", "a", "b") if key in row}
    return payload


def failed(row):
    unknown = [name for name in row if name.endswith(("_s", "_bytes", "_share")) or name.startswith(("num_", "is_"))]
    return {**row, **dict.fromkeys(unknown), "status": "oom", "message": "MemoryError: 9 GB"}


@pytest.mark.parametrize("name", ["common.js", "speed.js", "lab_text.js"])
def test_a_script_that_is_broken_blanks_its_own_part_only(browser, make_page, monkeypatch, name):
    read = page_of._read
    monkeypatch.setattr(page_of, "_read", lambda asset: read(asset) + ("\n}" if asset == name else ""))
    page = browser.new_page()
    open_page(page, make_page(make_payload()))
    assert page.locator("#vitdet svg, #vitdet canvas").count() > 0
    lost = page.locator("main > section", has_text="could not be drawn").count()
    assert lost == 1 if name != "common.js" else 1 < lost < 9
    page.close()


def test_a_page_without_a_timing_has_no_null_on_it(page, make_page):
    payload = make_payload()
    open_page(page, make_page(payload | NONE | {"settings": columns([failed(row) for row in rows_of(payload)])}))
    assert "null" not in page.inner_text("body")
    open_page(page, make_page(payload | NONE | {"settings": columns([]), "environments": []}))
    assert "null" not in page.inner_text("body") and "on , with" not in page.inner_text("#top")


def test_where_nothing_ran_no_axis_of_values_is_invented(page, make_page):
    payload = make_payload()
    open_page(page, make_page(payload | NONE | {"settings": columns([failed(row) for row in rows_of(payload)])}))
    drawn(page, "speed")
    assert page.locator("#speed figure.latency [aria-label^='y-axis']").count() == 0
    assert page.locator("#speed figure.latency svg[aria-label='What did not run']").count() == 1


def test_a_model_whose_name_has_blanks_is_switched_off_and_on(page, make_page):
    payload = renamed(make_payload(), {"vit_ti16": EVIL})
    open_page(page, make_page(payload))
    before = drawn(page, "speed")
    switch = page.locator("#speed fieldset label", has_text=EVIL).locator("input")
    at_rest(switch).uncheck()
    without = drawn(page, "speed")
    assert without != before
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert drawn(page, "speed") == without
    at_rest(switch).check()
    assert drawn(page, "speed") == before


def test_long_words_of_records_do_not_widen_a_phone(page, make_page):
    payload = renamed(make_payload(), {"vit_ti16": "m" * 120})
    payload["settings"]["numerics"]["values"] = ["n" * 90, *payload["settings"]["numerics"]["values"][1:]]
    payload["settings"]["device"]["values"] = ["d" * 90, *payload["settings"]["device"]["values"][1:]]
    page.set_viewport_size({"width": 360, "height": 800})
    open_page(page, make_page(payload))
    drawn(page, "speed")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_every_model_has_its_name_in_the_choice_where_there_is_room(page, make_page):
    open_page(page, make_page(make_payload()), "#vitdet=1", section="choose")
    texts = page.locator("#choose figure [aria-label=text] text").all()
    assert {text.text_content() for text in texts} == {"vit_b16", "convnext_b", "resnet50", "vit_ti16", "vitdet_b16:…"}
    boxes = [text.bounding_box() for text in texts]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            is_apart = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
            assert is_apart or abs(a["y"] - b["y"]) >= 10


def test_names_beside_failures_stay_on_the_page(page, make_page):
    payload = renamed(make_payload(), {"convnext_b": "timm:convnextv2_huge.fcmae_ft_in22k_in1k"})
    open_page(page, make_page(payload), "#batch=8&backend=both", section="speed")
    figure = page.locator("#speed figure.throughput")
    left = figure.bounding_box()["x"]
    texts = figure.locator("svg[aria-label='What did not run'] [aria-label=text] text").all()
    assert texts and all(text.bounding_box()["x"] >= left - 1 for text in texts)


def test_what_is_not_separable_is_not_said_to_be_outside_the_range(page, make_page):
    payload = make_payload()
    payload["crossovers"] = [{**c, "status": "not separable"} for c in payload["crossovers"]]
    open_page(page, make_page(payload), section="crossovers")
    assert "not in the measured range" not in page.inner_text("#crossovers table")


def test_of_many_pairs_the_chart_shows_some_and_says_so(page, make_page):
    payload = make_payload()
    one = next(c for c in payload["crossovers"] if c["status"] == "crosses" and c["backend"] == "best")
    payload["crossovers"] = [{**one, "low_px": 300 + i, "high_px": 500 + i} for i in range(90)]
    open_page(page, make_page(payload), section="crossovers")
    assert "The first 40 of 90 pairs" in page.inner_text("#crossovers figcaption")
    assert page.locator("#crossovers figure.chart").bounding_box()["height"] < 1600


@pytest.mark.parametrize("section", ["choose", "lab", "method"])
def test_a_link_to_a_section_ends_there(page, make_page, section):
    path = make_page(make_payload())
    top = f"Math.abs(document.getElementById('{section}').getBoundingClientRect().top)"
    open_page(page, path)
    page.goto("about:blank")
    page.goto(f"{path.as_uri()}#{section}")
    page.wait_for_selector("html[data-ready]", state="attached")
    page.wait_for_timeout(1500)
    assert page.evaluate(top) < 60 or page.evaluate("scrollY + innerHeight >= document.body.scrollHeight - 2")
    page.evaluate("scrollTo(0, 0)")
    page.locator(f'nav a[href="#{section}"]').click()
    page.wait_for_timeout(1500)
    assert page.evaluate(top) < 60 or page.evaluate("scrollY + innerHeight >= document.body.scrollHeight - 2")


def test_paper_is_white_and_has_the_legend_and_the_choices(page, make_page):
    page.emulate_media(color_scheme="dark")
    open_page(page, make_page(make_payload()), "#off=resnet50")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    labels = page.locator("#speed fieldset.models label")
    assert labels.filter(has_text="vit_ti16").is_visible() and not labels.filter(has_text="resnet50").is_visible()
    assert control(page, "speed", "device").is_visible()


@pytest.mark.parametrize("text", ["\ufeff=1", "＝cmd", "|x", "a;=1", "a\u2028b", "%1", "a\r\n=1", "plain, text"])
def test_the_csv_of_the_page_is_that_of_the_program(page, make_page, tmp_path, text):
    payload = make_payload()
    rows = rows_of(payload)
    rows[0]["message"] = text
    payload["settings"] = columns(rows)
    open_page(page, make_page(payload))
    with page.expect_download() as event:
        page.click("text=CSV of all settings")
    event.value.save_as(tmp_path / "all.csv")
    with open(tmp_path / "all.csv", encoding="utf-8", newline="") as file:
        found = next(csv.DictReader(file))
    assert found["message"] == next(csv.DictReader(csv_table(payload).splitlines()))["message"]


def test_the_tab_has_the_title_of_the_report(page, make_page):
    open_page(page, make_page(make_payload() | {"title": "our  cluster"}))
    wait_until(page, "document.title === 'our cluster'")
    use(page, "speed", "batch", "8")


def test_the_choice_names_the_models_that_did_not_run(page, make_page):
    open_page(page, make_page(make_payload()), "#batch=8&choose.size=1024", section="choose")
    assert "Did not run at this size: convnext_b (4 out of memory)." in page.inner_text("#choose")
