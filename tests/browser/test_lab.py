"""The resize lab: the page's resampling against vitcmp's, its controls, its address, and pictures of one's own."""

import base64
import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.capacity.data.pipeline import Preprocess
from tests.browser.payloads import make_payload
from vitcmp.report import html
from vitcmp.resample import METHODS, resize

Image = pytest.importorskip("PIL.Image")
IMAGES = Path(__file__).parents[2] / "vitcmp" / "report" / "assets" / "images"
INDEX = json.loads((IMAGES / "index.json").read_text(encoding="utf-8"))
DOWN = "nearest area bilinear bilinear-noaa bicubic gaussian lanczos3 lanczos5 mitchell".split()
KINDS = "natural|natural with text|phone screen|chart|diagram|desktop|single-page document".split("|")
# (height, width) of a 23 x 37 picture: down, up, one axis each way, one axis alone, one pixel, the same size.
SIZES = [(11, 13), (8, 37), (46, 74), (50, 14), (1, 1), (23, 37)]
SCRIPTS = [name for name in html.SCRIPTS if name == "core.js" or name.startswith(("resample", "lab"))]
READY = "#lab .lab-view[aria-busy=false]"


@pytest.fixture
def lab(page, make_page, monkeypatch):
    """Returns a function of the address's hash that opens a report with no other section and waits for its drawing."""
    monkeypatch.setattr(html, "SCRIPTS", SCRIPTS)
    return functools.partial(open_lab, page, make_page(make_payload()).as_uri())


def open_lab(page, url, address=""):
    page.goto("about:blank")
    page.goto(f"{url}#{address}" if address else url)
    page.wait_for_selector(READY)
    return page


@pytest.fixture
def resampler(page):
    """A page that holds resample.js and what it stands on, and nothing else."""
    for name in ("core.js", "resample.js"):
        page.add_script_tag(path=IMAGES.parent / name)
    return page


def choose(page, name, value):
    page.select_option(f"#lab select[data-state='{name}']", value)
    settle(page)


def settle(page):
    """Waits until the model's picture is drawn, and once more for the size of the panes."""
    page.wait_for_selector(READY)
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")


def drawn(page):
    """Returns the pixels that the panes show, as text."""
    return page.evaluate(
        "() => [...document.querySelectorAll('#lab .lab-view canvas')].map((c) => c.toDataURL()).join()"
    )


def chain(page):
    return page.text_content("#lab .lab-chain")


def picture(shape=(23, 37, 4)):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    pixels[:5, :9] = 255  # flat parts, where a sum of weights a little below 1 would cost a level
    pixels[-6:, -9:] = 128
    return pixels


def resize_in_page(page, image, size, **options):
    """Returns vitcmp.resample.resize of an (h, w, 4) uint8 picture, as the page computes it."""
    data = page.evaluate(
        """({ data, width, height, to, options }) => {
          const pixels = Uint8ClampedArray.from(atob(data), (c) => c.charCodeAt(0));
          const resized = vitcmp.resample.resize(new ImageData(pixels, width, height), to[1], to[0], options);
          return [...resized.data];
        }""",
        {
            "data": base64.b64encode(image.tobytes()).decode(),
            "width": image.shape[1],
            "height": image.shape[0],
            "to": size,
            "options": options,
        },
    )
    return np.array(data, np.uint8).reshape(*size, 4)


def resize_here(image, size, *, method, antialias, rounding="truncate"):
    if image.shape[:2] == tuple(size):
        return image
    clipped = np.clip(resize(image, size, method=method, antialias=antialias), 0, 255)
    return np.floor(clipped + 0.5 * (rounding == "nearest")).astype(np.uint8)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_pages_resampling_is_vitcmps(resampler, method, antialias):
    image = picture()
    for size in SIZES:
        theirs = resize_in_page(resampler, image, size, method=method, antialias=antialias)
        # No level may differ: both sum in float64, whose rounding is a billionth of what float32 then rounds away.
        np.testing.assert_array_equal(theirs, resize_here(image, size, method=method, antialias=antialias), str(size))


@pytest.mark.parametrize("method", METHODS)
def test_rounding_is_to_the_nearest_level(resampler, method):
    image, options = picture(), {"method": method, "antialias": True, "rounding": "nearest"}
    for size in SIZES:
        np.testing.assert_array_equal(
            resize_in_page(resampler, image, size, **options), resize_here(image, size, **options), str(size)
        )


def test_the_page_knows_vitcmps_methods_and_no_others(resampler):
    assert resampler.evaluate("() => vitcmp.resample.METHODS") == list(METHODS)
    with pytest.raises(Exception, match="unknown method cubic; allowed: nearest, area"):
        resize_in_page(resampler, picture(), (3, 3), method="cubic")


def save(page):
    """Returns what the model sees, as the page's own button saves it, (h, w, 3) uint8."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Save what the model sees").click()
    return np.asarray(Image.open(download.value.path()).convert("RGB"))


def read_image(file):
    """Returns a shipped picture; of one that is kept without loss every decoder gives the same."""
    with Image.open(IMAGES / file) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.mark.parametrize(("arm", "information", "compute"), [(0, 224, 224), (1, 224, 448), (2, 448, 448)])
def test_paligemmas_arms_are_the_capacity_experiments(lab, arm, information, compute):
    page = lab("lab.image=chart.webp&lab.down=nearest")
    button = page.locator("#lab [role=group] button").nth(arm)
    button.click()
    settle(page)
    assert button.get_attribute("aria-pressed") == "true"
    expected = Preprocess(information=information, compute=compute)(read_image("chart.webp"))
    np.testing.assert_array_equal(save(page), expected)
    assert f"Tokens: {(compute // 14) ** 2:,} with patches of 14 px" in page.text_content("#lab .lab-tokens")


@pytest.mark.parametrize("down", DOWN)
@pytest.mark.parametrize("file", ["document.webp"])
def test_each_way_down_and_up_again_to_the_original(lab, down, file):
    page = lab(f"lab.image={file}&lab.size=256&lab.down={down}&lab.up=bicubic")
    image = read_image(file)
    method, _, is_without = down.partition("-")
    small = resize_here(image, (256, 256), method=method, antialias=not is_without)
    np.testing.assert_array_equal(save(page), resize_here(small, image.shape[:2], method="bicubic", antialias=True))


# Each control with values that must each be drawn differently; and what must be set for it to matter.
CONTROLS = {
    "lab.image": ([image["file"] for image in INDEX], ""),
    "lab.size": (["128", "224", "256", "384", "448", "512", "768", "896", "1024", "original"], ""),
    "lab.down": (DOWN, ""),
    "lab.up": (["nearest", "bilinear", "bicubic"], ""),
    "lab.input": (["same", "128", "384", "448", "1024", "original"], "lab.up=bicubic"),
    "lab.shape": (["square", "keep"], ""),
    "lab.rounding": (["truncate", "nearest"], ""),
    "lab.grid": (["none", "14", "16", "32"], ""),
    "lab.view": (["side", "wipe"], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_changes_what_is_drawn_and_the_address_restores_it(lab, name):
    values, others = CONTROLS[name]
    page = lab(f"lab.image=document.webp&{others}" if name != "lab.image" else others)
    seen = {}
    for value in values:
        choose(page, name, value)
        seen[value] = drawn(page)
    assert len(set(seen.values())) == len(values), "two values are drawn alike"
    last, is_drawn = values[-1], seen[values[-1]]
    lab(page.url.partition("#")[2])
    settle(page)
    assert page.input_value(f"#lab select[data-state='{name}']") == last
    assert drawn(page) == is_drawn


def test_bilinear_up_without_antialias_matters_only_where_it_shrinks(lab):
    page = lab("lab.image=chart.webp&lab.size=512&lab.input=224&lab.up=bilinear")
    before = drawn(page)
    choose(page, "lab.up", "bilinear-noaa")
    assert drawn(page) != before
    choose(page, "lab.input", "1024")
    before = drawn(page)
    choose(page, "lab.up", "bilinear")
    assert drawn(page) == before


def test_the_divider_moves_and_comes_back_by_the_address(lab):
    page = lab("lab.view=wipe")
    before = drawn(page)
    page.locator("#lab .lab-view input[type=range]").fill("20")
    assert drawn(page) != before
    page.wait_for_function("() => location.hash.includes('lab.wipe=20')")
    before = drawn(page)
    lab(page.url.partition("#")[2])
    settle(page)
    assert drawn(page) == before


def test_both_panes_move_together_by_keys_wheel_buttons_and_drag(lab):
    page = lab("lab.size=original&lab.input=same")  # both panes hold the same picture
    both = "() => [...document.querySelectorAll('#lab .lab-view canvas')].map((c) => c.toDataURL())"
    pane = page.locator("#lab .lab-view canvas").nth(1)
    box = pane.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def drag():
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] + 60, middle[1] - 25)
        page.mouse.up()

    pane.scroll_into_view_if_needed()
    box = pane.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    moves = [
        lambda: pane.press("+"), lambda: pane.press("1"), lambda: pane.press("ArrowLeft"),
        lambda: pane.press("ArrowDown"), drag, lambda: (page.mouse.move(*middle), page.mouse.wheel(0, -100)),
        lambda: page.get_by_role("button", name="Zoom in").click(), lambda: pane.press("0"),
    ]  # fmt: skip
    seen = [page.evaluate(both)]
    for move in moves:
        move()
        seen.append(page.evaluate(both))
        assert seen[-1][0] == seen[-1][1], "the panes show different parts"
        assert seen[-1] != seen[-2], "nothing moved"
    assert seen[-1] == seen[0], "0 does not fit"


def test_the_place_is_in_the_address(lab):
    page = lab()
    page.locator("#lab .lab-view canvas").first.press("1")
    page.locator("#lab .lab-view canvas").first.press("ArrowRight")
    page.wait_for_function("() => location.hash.includes('lab.at=100')")
    before = drawn(page)
    lab(page.url.partition("#")[2])
    settle(page)
    assert drawn(page) == before


@pytest.mark.parametrize(
    "address", ["lab.image=passwd", "lab.size=225", "lab.down=cubic", "lab.at=9", "lab.wipe=101", "lab.image=own"]
)
def test_an_address_that_is_not_allowed_counts_as_not_given(lab, address):
    assert chain(lab(address)) == chain(lab())


def test_patches_that_do_not_fit_are_said_to_be_cut_off(lab):
    page = lab("lab.size=384&lab.input=same&lab.grid=14")
    assert page.text_content("#lab .lab-tokens") == (
        "Tokens: 729 with patches of 14 px (27 × 27, edge cut off); 576 with patches of 16 px (24 × 24); "
        "144 with patches of 32 px (12 × 12)."
    )


def test_proportions_are_kept_with_the_longer_side_at_the_size(lab):
    page = lab("lab.image=phone.webp&lab.size=512&lab.input=same&lab.shape=keep")
    assert save(page).shape == (512, 256, 3)


# ---- pictures of one's own


def encode(pixels, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def give(page, event, name, kind, data):
    """Drops or pastes a file, as a reader would."""
    page.evaluate(
        """({ event, name, kind, data }) => {
          const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], name, { type: kind }));
          const made = event === "paste"
            ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
            : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
          document.querySelector("#lab .lab-view").dispatchEvent(made);
        }""",
        {"event": event, "name": name, "kind": kind, "data": base64.b64encode(data).decode()},
    )


def attach(page, name, kind, data):
    page.set_input_files("#lab input[type=file]", {"name": name, "mimeType": kind, "buffer": data})


@pytest.mark.parametrize("way", ["drop", "paste", "file"])
def test_ones_own_picture_is_resized_and_never_leaves_the_page(lab, way):
    page, own = lab("lab.size=128&lab.input=same"), picture((150, 210, 3))
    if way == "file":
        attach(page, "mine.png", "image/png", encode(own))
    else:
        give(page, way, "mine.png", "image/png", encode(own))
    page.wait_for_function("() => document.querySelector('#lab .lab-chain').textContent.startsWith('210 × 150')")
    assert "mine.png" in page.locator("#lab select[data-state='lab.image'] option:checked").text_content()
    np.testing.assert_array_equal(save(page), resize_here(own, (128, 128), method="bilinear", antialias=True))
    choose(page, "lab.image", "chart.webp")
    choose(page, "lab.image", "own")
    assert chain(page).startswith("210 × 150")


def test_what_is_transparent_is_laid_over_white(lab):
    page = lab("lab.size=original&lab.input=same")
    own = np.zeros((20, 30, 4), np.uint8)
    own[:, 10:] = (200, 10, 10, 255)
    attach(page, "logo.png", "image/png", encode(own))
    page.wait_for_function("() => document.querySelector('#lab .lab-chain').textContent.startsWith('30 × 20')")
    seen = save(page)
    assert (seen[:, :10] == 255).all() and (seen[:, 10:] == (200, 10, 10)).all()


def test_a_large_picture_is_shrunk_and_the_page_says_so(lab):
    page = lab()
    attach(page, "big.jpg", "image/jpeg", encode(np.full((4000, 6000, 3), 90, np.uint8), "JPEG"))
    page.wait_for_function("() => document.querySelector('#lab .lab-chain').textContent.startsWith('2048 × 1365')")
    assert "It has 6000 × 4000 px; the browser shrank it to 2048 × 1365 px" in page.text_content("#lab")


@pytest.mark.parametrize(
    ("name", "kind", "data"),
    [
        ("notes.txt", "text/plain", b"no picture"),
        ("cut.png", "image/png", encode(picture((9, 9, 3)))[:40]),
        ("empty.jpg", "image/jpeg", b""),
        ("page.svg", "image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
        ("<img src=x onerror=alert(1)>.txt", "", b"no"),
    ],
)
def test_what_is_no_picture_is_refused_and_nothing_is_lost(lab, name, kind, data):
    page = lab()
    before = chain(page)
    give(page, "drop", name, kind, data)
    page.wait_for_selector("#lab .lab-fault:not([hidden])")
    assert page.text_content("#lab .lab-fault").startswith(f"{name} is no picture that this browser can read")
    assert chain(page) == before and page.locator("#lab .lab-fault img").count() == 0
    attach(page, "mine.png", "image/png", encode(picture((9, 9, 3))))
    page.wait_for_selector("#lab .lab-fault[hidden]", state="attached")


# ---- the page


def test_the_lab_is_in_the_whole_report(page, make_page):
    page = open_lab(page, make_page(make_payload()).as_uri(), "lab.image=phone.webp")
    assert chain(page).startswith("1024 × 2048 px → 224 × 224 px by bilinear → 1024 × 2048 px by bilinear")


def test_every_control_has_a_label_and_nothing_is_wider_than_a_phone(lab):
    page = lab()
    page.set_viewport_size({"width": 360, "height": 740})
    settle(page)

    def count(selector, condition):
        return page.evaluate(f"() => [...document.querySelectorAll('{selector}')].filter((e) => {condition}).length")

    assert count("#lab select, #lab input", "!e.labels.length && !e.ariaLabel") == 0
    assert count("#lab *", "e.getBoundingClientRect().right > 360.5") == 0


def test_seven_kinds_of_picture_each_with_credit_and_licence_in_under_2_mb():
    assert [image["kind"] for image in INDEX] == KINDS
    credits = (IMAGES / "CREDITS.md").read_text(encoding="utf-8")
    for image in INDEX:
        assert image["credit"] and image["license"] and image["file"] in credits
        assert min(read_image(image["file"]).shape[:2]) >= 768
    assert sum((IMAGES / image["file"]).stat().st_size for image in INDEX) < 2e6
