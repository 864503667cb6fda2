"""Every control changes what is drawn, by mouse or key, and the address brings the same view back."""

import pytest

from tests.browser.pages import control, drawn, open_page, use, wait_until
from tests.browser.payloads import CPU, GPU, make_payload

CONTROLS = [
    *[(section, "device", GPU) for section in ("speed", "flops", "frameworks", "knobs", "choose")],
    *[(section, "mode", "train") for section in ("speed", "flops", "frameworks", "knobs", "choose")],
    *[(section, "batch", "8") for section in ("speed", "flops", "frameworks", "knobs", "choose")],
    *[(section, "backend", value) for section in ("speed", "flops", "choose") for value in ("jax", "torch")],
    *[(section, "backend", "both") for section in ("speed", "flops")],
    *[(section, "numerics", "float32") for section in ("speed", "flops", "frameworks", "choose")],
    *[(section, "vitdet", "1") for section in ("speed", "flops", "frameworks", "knobs", "crossovers", "choose")],
    *[("speed", "speed.x", "linear"), ("speed", "speed.y", "linear"), ("speed", "speed.table", "1")],
    *[("flops", "flops.table", "1"), ("frameworks", "frameworks.table", "1")],
    *[("knobs", "knobs.knob", "attention"), ("knobs", "knobs.table", "1")],
    *[("crossovers", "crossovers.backend", "jax"), ("crossovers", "crossovers.model", "resnet50")],
    ("crossovers", "crossovers.table", "0"),
    *[("choose", "choose.size", "1024"), ("choose", "choose.latency", "20"), ("choose", "choose.memory", "250")],
    *[("choose", "choose.kind", "process"), ("choose", "choose.cost", "process"), ("choose", "choose.cost", "params")],
]


@pytest.mark.parametrize("section, name, value", CONTROLS)
def test_control_changes_what_is_drawn_and_the_address_restores_it(page, make_page, section, name, value):
    path = make_page(make_payload())
    open_page(page, path, section=section)
    before = drawn(page, section)
    use(page, section, name, value)
    after = drawn(page, section)
    assert after != before
    assert f"{name}=" in page.url
    open_page(page, path, page.url.partition(".html")[2], section=section)
    assert drawn(page, section) == after


def test_the_device_changes_the_pairs_that_cross(page, make_page):
    payload = make_payload()
    payload["crossovers"] = [c for c in payload["crossovers"] if c["device"] == CPU or c["status"] != "crosses"]
    open_page(page, make_page(payload))
    before = drawn(page, "crossovers")
    for name, value in (("device", GPU), ("mode", "train"), ("batch", "8")):
        use(page, "crossovers", name, value)
    assert drawn(page, "crossovers") != before
    assert "None crosses" in page.inner_text("#crossovers")


@pytest.mark.parametrize("section", ["speed", "flops", "frameworks", "knobs", "crossovers", "choose"])
def test_a_model_is_switched_off_and_on_by_key_alone(page, make_page, section):
    path = make_page(make_payload())
    open_page(page, path)
    before = drawn(page, section)
    switch = page.locator(f'#{section} [data-model="vit_ti16"]')
    switch.focus()
    page.keyboard.press("Space")
    without = drawn(page, section)
    assert without != before
    assert "off=vit_ti16" in page.url
    assert all(not node.is_checked() for node in page.locator('[data-model="vit_ti16"]').all())
    open_page(page, path, page.url.partition(".html")[2])
    assert drawn(page, section) == without
    page.locator(f'#{section} [data-model="vit_ti16"]').focus()
    page.keyboard.press("Space")
    assert drawn(page, section) == before


def test_shared_controls_agree_in_all_sections(page, make_page):
    open_page(page, make_page(make_payload()))
    use(page, "choose", "batch", "8")
    assert all(node.input_value() == "8" for node in page.locator('[data-state="batch"]').all())


def test_select_works_by_key(page, make_page):
    open_page(page, make_page(make_payload()))
    control(page, "speed", "batch").focus()
    page.keyboard.press("ArrowDown")
    assert "batch=8" in page.url


def test_an_address_of_nonsense_is_the_first_view(page, make_page):
    path = make_page(make_payload())
    open_page(page, path)
    first = drawn(page, "speed") + drawn(page, "choose")
    open_page(
        page,
        path,
        "#device=<img>&batch=-1&backend=&speed.x=cubic&choose.latency=abc&choose.memory=-4&off=none&x=%E0%A4",
    )
    assert drawn(page, "speed") + drawn(page, "choose") == first


def test_a_link_to_a_section_leaves_the_values(page, make_page):
    path = make_page(make_payload())
    open_page(page, path, "#batch=8")
    page.click("nav a >> text=Crossovers")
    assert "batch=8" in page.url
    page.evaluate("location.hash = '#knobs'")
    wait_until(page, "location.hash.includes('batch=8')")
    assert control(page, "speed", "batch").input_value() == "8"


def test_going_back_in_the_address_draws_again(page, make_page):
    open_page(page, make_page(make_payload()))
    before = drawn(page, "speed")
    page.evaluate("location.hash = '#batch=8'")
    wait_until(page, "document.querySelector('[data-state=batch]').value === '8'")
    assert drawn(page, "speed") != before
