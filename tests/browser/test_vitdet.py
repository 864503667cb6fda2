"""The ViTDet section: its numbers are vitcmp's to the FLOP, its drawing is ViTDet's windows, and all of it has keys."""

import itertools
import math

import pytest

from tests.browser.pages import at_rest
from vitcmp import count_flops
from vitcmp.specs import get_spec

LISTS = "sources comparisons knobs crossovers ceilings environments".split()
EMPTY = {"title": "empty", "version": "0", "settings": {}, **{name: [] for name in LISTS}}
DEFAULTS = {"image": "1024", "patch": "16", "window": "14", "global": "4", "model": "B", "relpos": "1", "bits": "16"}
FREE = {"model": "free", "width": "96", "depth": "5", "heads": "3"}
CONFIGS = [
    *(
        {"image": image, "window": window}
        for image in ("224", "512", "1024", "800x1333")
        for window in ("7", "14", "16")
    ),
    *({"image": "640x448", "patch": patch, "relpos": relpos} for patch in ("14", "16", "32") for relpos in "01"),
    *(
        {"image": "896x1024", "model": model, "global": count}
        for model in ("Ti", "S", "L", "H")
        for count in ("0", "4", "12")
    ),
    *({"global": blocks, "relpos": relpos} for blocks in ("2+", "0+11", "11+3+7", "1") for relpos in "01"),
    *(
        {**FREE, "image": image, "window": window}
        for image in ("17x33", "250x90", "1024x32")
        for window in ("1", "3", "100")
    ),
    {**FREE, "image": "2048", "patch": "8", "window": "13", "bits": "32"},
    {"image": "1024", "patch": "8", "model": "H", "global": "32"},
    # The largest: four windows of 255 x 255 for 256 x 256 tokens, and one for all of them.
    *(
        {
            **FREE,
            "image": "2048",
            "patch": "8",
            "window": "255",
            "width": "2048",
            "depth": "48",
            "heads": "64",
            "global": count,
        }
        for count in ("0", "48")
    ),
]
SET = """(hash) => new Promise((resolve) => {
  addEventListener("hashchange", () => resolve(), {once: true});
  location.hash = hash;
})"""
READ = """() => {
  const cells = (name) => [...document.querySelectorAll(`.vitdet-of-${name} tbody tr`)].map((row) =>
    [...row.querySelectorAll("td.number")].map((cell) => Number(cell.dataset.flops ?? cell.dataset.bytes)));
  return {block: cells("block"), model: cells("model"), fault: document.querySelector(".vitdet-fault").textContent};
}"""


@pytest.fixture
def section(page, make_page):
    """Opens the report's page; `address` is the state of the section in it."""

    def open_at(**address):
        query = "&".join(f"vitdet.{name}={value}" for name, value in address.items())
        page.goto(f"{make_page(EMPTY).as_uri()}#{query}")
        page.wait_for_selector("html[data-ready]")
        return page

    return open_at


def at(page, **address):
    page.evaluate(SET, "&".join(f"vitdet.{name}={value.replace('+', '%2B')}" for name, value in address.items()))
    return page.evaluate(READ)


def spec_of(config, family="vitdet", **changes):
    """Returns the spec that the controls describe, as vitcmp itself writes it."""
    config = {**DEFAULTS, **config}
    name = "b" if config["model"] == "free" else config["model"].lower()
    options = {"image_size": config["image"], "num_classes": 0}
    if config["model"] == "free":
        width = int(config["width"])
        options |= {"width": width, "depth": config["depth"], "num_heads": config["heads"], "mlp_dim": 4 * width}
    if family == "vitdet":
        rel_pos = "on" if config["relpos"] == "1" else "off"
        options |= {"window_size": config["window"], "global_blocks": config["global"], "rel_pos": rel_pos}
    else:
        options["pool"] = "gap"
    text = ",".join(f"{key}={value}" for key, value in {**options, **changes}.items())
    return get_spec(f"{family}_{name}{config['patch']}:{text}")


def windows_of(spec, is_global):
    """Returns the (rows, columns) of real tokens in each window, one by one."""
    window = spec.grid_size if is_global else (spec.window_size, spec.window_size)
    starts = [range(0, side, of) for side, of in zip(spec.grid_size, window, strict=True)]
    cut = [
        [min(of, side - start) for start in axis] for axis, side, of in zip(starts, spec.grid_size, window, strict=True)
    ]
    return window, [*itertools.product(*cut)]


def expected_block(config, is_global, family="vitdet"):
    changes = {"depth": 1, **({"global_blocks": int(is_global)} if family == "vitdet" else {})}
    spec = spec_of(config, family, **changes)
    by_kind = count_flops(spec).by_kind
    flops = [by_kind["attention"], by_kind.get("rel_pos", 0), by_kind["linear"]]
    window, windows = windows_of(spec, is_global)
    value_bytes = int({**DEFAULTS, **config}["bits"]) // 8
    padded = len(windows) * math.prod(window)
    sizes = [len(windows) * math.prod(window) ** 2 * spec.num_heads * value_bytes, padded * spec.num_heads * 4]
    biases = padded * sum(window) * spec.num_heads * value_bytes if flops[1] else 0
    return [*flops, sum(flops), *sizes, biases]


def expected_padding(config):
    """Returns the FLOPs that windows cut at the grid's edge would spare, window by window, and the padding's own."""
    spec, spared, projected = spec_of(config), 0, 0
    for block in range(spec.depth):
        window, windows = windows_of(spec, block in spec.global_blocks)
        full = (math.prod(window), sum(window))
        for real in ((math.prod(cut), sum(cut)) for cut in windows):
            spared += 4 * spec.width * (full[0] ** 2 - real[0] ** 2)
            if spec.rel_pos:
                spared += 2 * spec.width * (full[0] * full[1] - real[0] * real[1])
            projected += 2 * (full[0] - real[0]) * 4 * spec.width**2
    return spared, projected


def expected(config):
    """Returns the two tables' numbers for block 0, computed in Python."""
    spec, plain = spec_of(config), spec_of(config, "vit")
    block, of_plain = expected_block(config, 0 in spec.global_blocks), expected_block(config, True, "vit")
    rows = [list(row) for row in zip(block, of_plain, strict=True)]
    flops, plain_flops = count_flops(spec), count_flops(plain)
    attention = flops.by_kind["attention"] + flops.by_kind.get("rel_pos", 0)
    kinds = {index in spec.global_blocks for index in range(spec.depth)}
    logits = max(expected_block(config, is_global)[4] for is_global in kinds)
    spared, projected = expected_padding(config)
    model = [
        [flops.total, plain_flops.total],
        [attention, plain_flops.by_kind["attention"]],
        [spared, 0],
        [projected, 0],
        [logits, of_plain[4]],
    ]
    return (rows if spec.rel_pos else rows[:-1]), model


@pytest.mark.parametrize("part", range(4))
def test_every_number_is_vitcmps_to_the_flop(section, part):
    page = section(bits="32" if part else "16", window="2")
    for config in CONFIGS[part::4]:
        shown = at(page, **config)
        block, model = expected(config)
        assert shown["fault"] == "", config
        assert shown["block"][1:] == block, config
        assert shown["model"] == model, config
        assert max(map(max, block + model)) < 2**53


def test_a_global_block_is_shown_with_its_own_numbers(section):
    page = section(block="2")
    shown = page.evaluate(READ)
    assert (
        shown["block"][1:5]
        == [list(pair) for pair in zip(expected_block({}, True), expected_block({}, True, "vit"), strict=True)][:4]
    )
    assert "Block 2, global" in page.inner_text(".vitdet-numbers")


def test_vitdet_at_1024_px_pads_64_tokens_to_70_and_has_25_windows(section):
    page = section()
    text = page.inner_text(".vitdet-summary")
    assert "64 x 64 tokens" in text and "padded to 70 x 70" in text and "25 windows of 14 x 14" in text
    assert "16.4\xa0% of those tokens are padding. Windows of 8 and 16 would need none." in text
    assert page.locator(".vitdet-padding").count() == 2
    at(page, window="16")
    assert "16 windows of 16 x 16, without padding." in page.inner_text(".vitdet-summary")


def attended(page):
    data = page.locator(".vitdet-grid").evaluate("(node) => ({...node.dataset})")
    return data["token"], int(data["attended"]), int(data["padding"])


def rectangle(box):
    return [float(box.get_attribute(name)) for name in ("y", "x", "height", "width")]


def test_arrow_keys_move_the_token_and_light_what_it_attends_to(section):
    page = section(image="240x400", window="4")  # 15 x 25 tokens, padded to 16 x 28
    page.focus(".vitdet-grid")
    assert attended(page) == ("0,0", 16, 0)
    page.keyboard.press("End")
    assert attended(page) == ("0,27", 16, 12)  # one of four columns is real
    assert "Padding at row 0, column 27" in page.inner_text(".vitdet-says")
    for _ in range(20):
        page.keyboard.press("ArrowDown")
    assert attended(page) == ("15,27", 16, 13)
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert attended(page) == ("14,0", 16, 4)
    assert "window 22 of 28" in page.inner_text(".vitdet-says")


def test_every_token_lights_its_own_window(section):
    """Against windows cut in Python: the same window, for each token of a grid that is not square."""
    page = section(image="48x80", window="2")
    page.focus(".vitdet-grid")
    for row in range(4):
        page.keyboard.press("Home")
        for column in range(6):
            assert rectangle(page.locator(".vitdet-lit")) == [row // 2 * 2, column // 2 * 2, 2, 2]
            query = page.locator(".vitdet-query")
            assert [float(query.get_attribute(name)) for name in ("cy", "cx")] == [row + 0.5, column + 0.5]
            real = [(y, x) for y in range(3) for x in range(5) if (y // 2, x // 2) == (row // 2, column // 2)]
            assert attended(page) == (f"{row},{column}", 4, 4 - len(real))
            page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")


def test_in_a_global_block_a_token_attends_to_all_and_nothing_is_padded(section):
    page = section(image="240x400", window="4", block="2")  # 15 x 25 tokens
    assert attended(page) == ("0,0", 375, 0)
    assert "Block 2 is global" in page.inner_text(".vitdet-says")
    page.focus(".vitdet-grid")
    page.keyboard.press("End")
    assert attended(page) == ("0,24", 375, 0)
    assert rectangle(page.locator(".vitdet-lit")) == [0, 0, 15, 25]
    assert [rectangle(box)[2:] for box in page.locator(".vitdet-padding").all()] == [[15, 0], [0, 25]]


def test_pointing_lights_a_token_and_leaving_goes_back_to_the_kept_one(section):
    page = section(image="224", window="7")
    grid = page.locator(".vitdet-grid")
    box = at_rest(grid).bounding_box()
    place = (box["width"] * 10.5 / 14, box["height"] * 3.5 / 14)
    grid.hover(position={"x": place[0], "y": place[1]})
    assert attended(page)[0] == "3,10"
    page.mouse.move(0, 0)
    assert attended(page)[0] == "0,0"
    grid.click(position={"x": place[0], "y": place[1]})
    page.mouse.move(0, 0)
    assert attended(page)[0] == "3,10"


def test_blocks_are_chosen_and_toggled_by_keys_and_the_address_keeps_them(section):
    page = section()
    page.focus(".vitdet-block input:checked")
    page.keyboard.press("ArrowRight")
    assert "vitdet.block=1" in page.url and "Block 1, windowed" in page.inner_text(".vitdet-numbers")
    assert page.evaluate("document.activeElement.value") == "1"
    page.focus(".vitdet-toggle input")
    page.keyboard.press("Space")
    assert page.evaluate("vitcmp.state.get('vitdet.global')") == "1+2+5+8+11"
    assert "Block 1, global" in page.inner_text(".vitdet-numbers")
    page.keyboard.press("Space")
    assert page.evaluate("vitcmp.state.get('vitdet.global')") == "2+5+8+11"
    page.keyboard.press("Space")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator(".vitdet-global").count() == 5 and page.locator(".vitdet-toggle input").is_checked()


def test_the_last_global_block_can_be_turned_off_and_one_alone_kept(section):
    page = section(**{"global": "1"}, block="11")
    at_rest(page.locator(".vitdet-toggle input")).uncheck()
    assert page.evaluate("vitcmp.state.get('vitdet.global')") == "0"
    at_rest(page.locator(".vitdet-toggle input")).check()
    assert page.evaluate("vitcmp.state.get('vitdet.global')") == "11+"
    assert page.evaluate(READ)["fault"] == "" and page.locator(".vitdet-global").count() == 1


@pytest.mark.parametrize(
    ("name", "label", "value"),
    [("image", "Image", "320x480"), ("patch", "Patch", "32"), ("window", "Window", "5"), ("global", "Global bl", "3")],
)
def test_each_field_changes_the_numbers_and_survives_a_reload(section, name, label, value):
    page = section()
    before = page.evaluate(READ)
    field = page.locator("#vitdet label", has_text=label).locator("input").first
    field.fill(value)
    after = page.evaluate(READ)
    assert before["model"] != after["model"]
    assert (after["block"][1:], after["model"]) == expected({name: value})
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#vitdet label", has_text=label).locator("input").first.input_value() == value
    assert page.evaluate(READ) == after


def test_presets_model_numbers_and_positions(section):
    page = section(**{"global": "2+5"})
    at_rest(page.get_by_role("button", name="all", exact=True)).click()
    assert page.evaluate(READ)["model"] == expected({"global": "12"})[1]
    assert "plain ViT" in page.inner_text(".vitdet-summary")
    at_rest(page.get_by_role("button", name="none", exact=True)).click()
    assert page.evaluate(READ)["model"] == expected({"global": "0"})[1]
    page.get_by_label("Model").and_(page.locator("#vitdet select")).select_option("H")
    assert page.evaluate(READ)["model"] == expected({"model": "H", "global": "4"})[1]
    assert page.locator(".vitdet-block").count() == 32
    at_rest(page.locator("#vitdet label.check", has_text="relative positions").locator("input")).uncheck()
    page.locator("#vitdet label", has_text="Logits").locator("select").select_option("32")
    shown, config = page.evaluate(READ), {"model": "H", "relpos": "0", "bits": "32"}
    assert (shown["block"][1:], shown["model"]) == expected(config)
    page.get_by_label("Model").and_(page.locator("#vitdet select")).select_option("free")
    assert page.get_by_label("Width", exact=True).is_visible()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ({"image": "8"}, "Image: 8 x 8 pixels are smaller than one patch of 16 pixels."),
        ({"image": "big"}, "Image: a side in pixels, as 1024, or height x width, as 800x1333."),
        ({"image": ""}, "Image: a side in pixels"),
        ({"image": "8192"}, "Image: 512 x 512 tokens, of which 256 a side can be drawn."),
        ({"image": "0"}, "smaller than one patch"),
        ({"patch": "0"}, "Patch: a whole number from 1 to 256."),
        ({"patch": "1.5"}, "Patch: a whole number"),
        ({"window": "999999999999999999999"}, "Window: a whole number from 1 to 256."),
        ({"global": "13"}, "Global blocks: a count from 0 to 12, or different blocks from 0 to 11, as 2+5+8+11."),
        ({"global": "2%2B2"}, "Global blocks"),
        ({"global": "2%2B12"}, "Global blocks"),
        ({"global": "%2B"}, "Global blocks"),
        ({"global": "four"}, "Global blocks"),
        ({"model": "free", "width": "100", "heads": "3"}, "Width: 100 cannot be shared by 3 heads."),
        ({"model": "free", "depth": "65"}, "Depth: a whole number from 1 to 48."),
        ({"model": "free", "width": ""}, "Width: a whole number from 1 to 2048."),
        ({"image": "<img src=x>"}, "Image: a side in pixels"),
    ],
)
def test_bad_input_is_one_clear_message_and_good_input_brings_the_drawing_back(section, address, message):
    page = section(**address)
    assert message in page.inner_text(".vitdet-fault")
    assert page.locator(".vitdet-fault").get_attribute("role") == "alert"
    assert not page.locator(".vitdet-body").is_visible()
    at(page, image="512")
    assert page.evaluate(READ)["fault"] == "" and page.locator(".vitdet-body").is_visible()


@pytest.mark.parametrize(
    "address", [{"block": "99"}, {"block": "x"}, {"model": "XXL"}, {"relpos": "maybe"}, {"bits": "3"}]
)
def test_an_address_with_nonsense_is_read_as_what_is_nearest(section, address):
    page = section(**address)
    assert page.evaluate(READ)["model"] == expected({})[1]


def test_pixels_that_fill_no_patch_are_named(section):
    page = section(image="1000x1030")
    text = page.inner_text(".vitdet-summary")
    assert "62 x 64 tokens" in text and "8 px at the bottom, 6 px at the right" in text


@pytest.mark.parametrize("image", ["1024", "2048"])
def test_128_and_256_tokens_a_side_stay_responsive(section, image):
    """An arrow key is far from a frame's 16 ms of work, and the drawing has no element for each token."""
    page = section(image=image, patch="8")
    assert page.locator(".vitdet-grid *").count() < 30
    page.focus(".vitdet-grid")
    seconds = page.evaluate(
        """() => {
          const grid = document.querySelector(".vitdet-grid"), start = performance.now();
          for (let i = 0; i < 100; i += 1) grid.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
          return (performance.now() - start) / 1e3;
        }"""
    )
    assert seconds < 1.0  # 10 ms a key, on a machine that others use


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_section_fits_the_screen(section, width, scheme):
    page = section(image="1024")
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    for address in ({"model": "H", "global": "4"}, {"image": "320x1600"}, {"image": "1600x320"}):
        at(page, **address)
        box = page.locator("#vitdet").bounding_box()
        overflow = page.evaluate(
            """() => [...document.querySelectorAll("#vitdet *")].filter((node) => !node.closest(".scroll, svg") &&
              node.getBoundingClientRect().right > innerWidth + 1).length"""
        )
        assert box["width"] <= width and overflow == 0


def test_every_control_has_a_name_and_the_figure_too(section):
    page = section(model="free")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("#vitdet :is(input, select, button)")].filter((node) =>
          !node.labels?.[0]?.textContent.trim() && !node.ariaLabel && !node.textContent.trim()).length"""
    )
    assert unnamed == 0
    assert "Arrow keys" in page.locator(".vitdet-grid").get_attribute("aria-label")
