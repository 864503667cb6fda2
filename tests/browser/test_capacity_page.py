"""The capacity experiment's section: every control changes what is drawn, and its numbers are the payload's."""

import copy
import functools
import json

import pytest

from experiments.capacity.examples import Examples
from tests.browser.capacity_pages import CNN, add_example, make_capacity_payload
from tests.browser.pages import cells, draw, drawn, open_page, use
from tests.browser.payloads import make_payload
from tests.core.fake_capacity import failure, records

EVIL = "<img src=x onerror=alert(1)></script>"
CONTROLS = [
    ("capacity.dataset", "glyphs/fine"),
    ("capacity.model", CNN),
    ("capacity.backend", "torch"),
    ("capacity.metric", "loss"),
    ("capacity.log", "1"),
    ("capacity.both", "0"),
    ("capacity.table", "1"),
    ("capacity.kind", "all"),
    ("capacity.kind", "none"),
    ("capacity.kind", "patch and high"),
]


@functools.cache
def payload_text():
    return json.dumps(make_capacity_payload())


@pytest.fixture
def payload():
    return json.loads(payload_text())


@pytest.fixture
def show(page, make_page, payload):
    """Opens the page of the made-up records, or of a payload, at an address."""

    def show(address="", shown=payload):
        open_page(page, make_page(shown), address, section="capacity")
        return page

    return show


def group_of(payload, dataset="digit_canvas", model=None, backend="jax"):
    found = (g for g in payload["capacity"]["groups"] if (g["dataset"], g["backend"]) == (dataset, backend))
    return next(g for g in found if g["model"] == model or (model is None and g["model"] != CNN))


@pytest.mark.parametrize("name, value", CONTROLS)
def test_control_changes_what_is_drawn_and_the_address_restores_it(page, show, name, value):
    show()
    before = drawn(page, "capacity")
    use(page, "capacity", name, value)
    after = drawn(page, "capacity")
    assert after != before and f"{name}=" in page.url
    show(page.url.partition(".html")[2])
    assert drawn(page, "capacity") == after


def test_a_control_works_by_key_and_the_choice_comes_back(page, show):
    show()
    before = drawn(page, "capacity")
    page.locator('#capacity [data-state="capacity.log"]').focus()
    page.keyboard.press("Space")
    assert drawn(page, "capacity") != before
    page.keyboard.press("Space")
    assert drawn(page, "capacity") == before


def test_every_part_is_drawn_and_said(page, show, payload):
    show()
    titles = page.locator("#capacity h3").all_inner_texts()
    assert len(titles) == 8 and titles[0] == "All groups" and titles[-1] == "What the arms saw"
    assert page.locator("#capacity .capacity-bars figure").count() == 3  # one a data set, of this model and framework
    group = group_of(payload)
    text = page.inner_text("#capacity")
    split = group["splits"]["accuracy"]
    assert split["share_words"] in text and all(gain["words"] in text for gain in split["gains"])
    assert "the largest difference of their losses" in text and "diverged" in text
    assert page.locator("#capacity .capacity-curves figure").count() == 8
    assert page.locator("nav a", has_text="Resolution or compute?").count() == 1


@pytest.mark.parametrize("metric, scale", [("accuracy", 100), ("loss", 1)])
def test_bars_and_seeds_stand_where_the_numbers_are(page, show, payload, metric, scale):
    show(f"#capacity.metric={metric}")
    group = group_of(payload)
    figure = page.locator("#capacity .capacity-chosen")
    assert figure.locator("strong").inner_text().startswith("digit_canvas")
    tops = figure.evaluate(
        """figure => { const svg = figure.querySelector("svg"), y = svg.scale("y");
             const rects = [...svg.querySelectorAll('[aria-label="rect"] rect')];
             return rects.map(rect => y.invert(Number(rect.getAttribute("y")))); }"""
    )
    assert tops == pytest.approx([scale * arm[metric]["value"] for arm in group["arms"]], rel=1e-6)
    assert figure.locator('[aria-label="dot"] circle').count() == sum(len(arm["seeds"]) for arm in group["arms"])


def test_tables_hold_the_payloads_numbers(page, show, payload):
    show("#capacity.table=1")
    group = group_of(payload)
    overview = cells(page, '#capacity [aria-label^="Gains, points"]')
    assert len(overview) == len(payload["capacity"]["groups"])
    (own,) = [row for row in overview if row[0].startswith("digit_canvas") and row[1:3] == ["vit_ti16:…", "JAX"]]
    gains = {gain["name"]: gain for gain in group["splits"]["accuracy"]["gains"]}
    assert own[3:6] == ["+{:.1f} [{:.1f}, {:.1f}]".format(*(100 * gains[name][end] for end in ("value", "low", "high")))
                        for name in ("capacity", "resolution", "total")]  # fmt: skip
    share = group["splits"]["accuracy"]["share"]
    assert own[6] == "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * share[end] for end in ("value", "low", "high")))
    rows = {row[0]: row for row in cells(page, '#capacity [aria-label^="Brackets"]')}
    for arm in group["arms"]:
        value = f"{100 * arm['accuracy']['value']:.1f}"
        assert rows[arm["arm"]][5].startswith(f"{value} [") and rows[arm["arm"]][10] == "3 x 1,000"
    (cross,) = [row for row in cells(page, "#capacity .capacity-cross") if row[0] == "high"]
    of = {cell["tested"]: cell["accuracy"] for cell in group["cross"] if cell["trained"] == "high"}
    assert cross[1:] == [
        f"{100 * of[arm]['mean']:.1f} ± {100 * of[arm]['sd']:.1f}" for arm in ("low", "down_up", "high", "patch")
    ]


def test_an_arm_that_a_cnn_lacks_is_named_and_one_seed_is_not_judged(page, show):
    show(f"#capacity.model={CNN}")
    text = page.inner_text("#capacity")
    assert "a CNN (convnext) has no patch" in text and "not judged" in text
    assert page.locator("#capacity .capacity-chosen", has_text="no patch").count() == 1


def test_a_choice_that_nobody_trained_says_what_there_is(page, show):
    show(f"#capacity.model={CNN}&capacity.backend=torch")
    assert "Nothing was trained with these choices. On digit_canvas there is: " in page.inner_text("#capacity")
    assert page.locator("#capacity figure").count() == 0


@pytest.mark.parametrize("kind", ["only high", "patch and high", "all", "none"])
def test_examples_show_each_arms_pixels_at_one_size(page, show, payload, kind):
    show(f"#capacity.dataset=glyphs%2Ffine&capacity.kind={kind.replace(' ', '+')}")
    (of_kind,) = [one for one in group_of(payload, "glyphs/fine")["kinds"] if one["kind"] == kind]
    cards = page.locator(".capacity-card")
    assert cards.count() == len(of_kind["examples"])
    if not cards.count():
        assert "There is none." in page.inner_text("#capacity")
        return
    sizes = page.eval_on_selector_all(
        ".capacity-card:first-child img",
        """async images => { await Promise.all(images.map(image => image.decode()));
             return images.map(image => [image.naturalWidth, image.clientWidth, image.clientHeight,
                                         getComputedStyle(image).imageRendering]); }""",
    )
    assert [size[0] for size in sizes] == [16, 32, 32, 32]
    assert len({tuple(size[1:]) for size in sizes}) == 1 and sizes[0][1] == sizes[0][2] and sizes[0][3] == "pixelated"
    first = of_kind["examples"][0]["right"]
    said = cards.first.locator("figcaption").all_inner_texts()
    assert len(said) == 4
    for arm, text in zip(("low", "down_up", "high", "patch"), said, strict=True):
        assert ("✓" in text, "✗" in text) == (first[arm] > 0.5, first[arm] < 0.5)
        assert text.startswith(arm) and f"right in {round(3 * first[arm])} of 3 seeds" in text
    assert all(page.locator(".capacity-card img").nth(i).get_attribute("alt") for i in range(4))


def test_a_report_without_pixels_says_so(page, show):
    show(shown=make_capacity_payload(records(seeds=2), Examples()))
    assert "Their pixels are not stored" in page.inner_text("#capacity")


def test_settings_that_differ_are_told_apart(page, show):
    some = [
        *records(seeds=2),
        *records(seeds=2, recipe={"learning_rate": 0.1, "batch_size": 32, "numerics": "float32"}),
    ]
    show(shown=make_capacity_payload(some, Examples()))
    assert "Setting 1 of 2" in page.inner_text("#capacity")
    before = drawn(page, "capacity")
    use(page, "capacity", "capacity.setting", "2")
    assert drawn(page, "capacity") != before and "Setting 2 of 2" in page.inner_text("#capacity")


def test_a_group_in_which_nothing_went_well_is_a_row(page, show):
    show(shown=make_capacity_payload([failure(), failure(seed=1)], Examples()))
    text = page.inner_text("#capacity")
    assert "No run of this group went well" in text and "the loss of step 7 is not finite" in text


def test_hostile_text_is_shown_as_text(page, show):
    some = records(seeds=1, dataset=EVIL, device_name=EVIL)
    payload = make_capacity_payload(some, Examples())
    found = Examples()
    add_example(found, payload["capacity"]["groups"][0]["key"], 1, answer=(EVIL,), id=EVIL)
    for kind in ("only high", "all", "none"):
        show(f"#capacity.kind={kind}", make_capacity_payload(some, found))
    assert EVIL in page.inner_text("#capacity") and page.locator('img[src="x"]').count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(page, show, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    show("#capacity.table=1")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = page.eval_on_selector_all(
        "#capacity figure svg, #capacity img",
        "nodes => nodes.filter(n => n.getBoundingClientRect().right > innerWidth).length",
    )
    assert wide == 0


def test_arrow_keys_go_from_point_to_point(page, show):
    show()
    frames = page.locator("#capacity .frame")
    for i in range(frames.count()):
        frames.nth(i).focus()
        page.keyboard.press("ArrowRight")
        assert frames.nth(i).locator("xpath=../p[@class='said']").inner_text() != "", i


def test_one_page_holds_a_sweep_too(page, show, make_page, payload):
    both = make_payload() | {"capacity": copy.deepcopy(payload["capacity"])}
    show(shown=both)
    draw(page)
    links = page.locator("nav a").all_inner_texts()
    assert "Against image size" in links and "Resolution or compute?" in links
    show(shown=payload)
    links = page.locator("nav a").all_inner_texts()
    assert links == ["Resolution or compute?", "ViTDet, drawn", "Look at your data the way your model sees it"]
    assert "training runs on 3 data sets" in page.inner_text("#top") and page.title() == "Resolution or compute?"
    assert "null" not in page.inner_text("#top")
    open_page(page, make_page(make_payload()))
    assert page.locator("#capacity").count() == 0 and "Resolution or compute?" not in page.inner_text("nav")
