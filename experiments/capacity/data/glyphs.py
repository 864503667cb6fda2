"""Drawn pictures whose answer lies in detail of a chosen size: the truth that the experiment must recover.

A picture shows a letter, a bar chart, a dial or a crowd of letters for each question, and each question has eight
answers: which letter, which bar is the tallest, which way the needle points, how many X are in the crowd. `detail`
pixels of the canvas make one pixel of the *coarse grid* (canvas / detail), and `band` says on which side of it the
answer lies:

- `fine`: the ink is a check, a product of two sines with a period of `detail` pixels and soft edges, and a pixel of the
  coarse grid averages a whole period. What would still show there is taken away: with R the resize (bilinear,
  antialiased) and P the projection onto its rows, R (x - P x) = 0, so that the coarse grid is blank paper to the last
  bit. So are, to below the noise, coarser grids and other antialiased kernels; `area` lets a little through, and
  resizing without antialias aliases and shows it all. Only an arm that sees more than the coarse grid can answer, from
  about 1.5 times as many pixels a side on: its gain is resolution.
- `coarse`: the drawing resized to the coarse grid, noise and all, and enlarged again. The grid has every answer, and a
  larger picture knows nothing more: a gain from more pixels is capacity. One letter is easy, and there is no gain
  (`glyphs/coarse`). A crowd of small letters, dark and light, of which several share a patch, is hard for few tokens,
  which must tell them apart at once, and easy for many, which see them one by one (`glyphs/crowded`: shrunk
  to 64 pixels, each pixel of its coarse grid is still two wide, so that shrinking and enlarging again loses nothing).
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import numpy as np

from vitcmp.resample import resize, resize_matrix
from vitcmp.spec_text import parse_overrides
from vitcmp.specs import did_you_mean

LETTERS = "AEHKMOTX"
NUM_ANSWERS = len(LETTERS)
COUNTED = "X"
LIGHT, BLANK, DARK = 1, 128, 255  # what the pen draws with
PAPER = 128.0
MOST_CONTRAST, MOST_NOISE = 80.0, 12.0
SUPERSAMPLE = 4  # the pen draws without antialias, on a canvas this much larger


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlyphsSpec:
    """`canvas`, `detail` in pixels; `rows` x `columns` drawings, a question each; `crowd` x `crowd` letters to count.

    `contrast` is ink against paper; `noise` the standard deviation of Gaussian noise, which hides the rounding to whole
    grey levels, both in grey levels; `jitter` the share of its cell that a drawing leaves free, to be moved at random.
    Example i of a split depends on the spec and on i alone, as far as numpy and Pillow draw the same in each version;
    what was prepared once is not drawn again.
    """

    band: Literal["fine", "coarse"] = "fine"
    canvas: int = 64
    detail: float = 2.0
    kind: Literal["text", "chart", "dial", "any", "count"] = "text"
    rows: int = 1
    columns: int = 1
    crowd: int = 4
    contrast: float = 70.0
    noise: float = 6.0
    jitter: float = 0.2
    num_train: int = 4096
    num_test: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        faults = [f"{name}={getattr(self, name)} must be 1 or more" for name in
                  ("canvas", "rows", "columns", "num_train", "num_test") if getattr(self, name) < 1]  # fmt: skip
        if self.band not in ("fine", "coarse"):
            faults.append(f"band={self.band!r} must be fine or coarse")
        if self.kind not in KINDS:
            faults.append(f"kind={self.kind!r}{did_you_mean(self.kind, KINDS)}; allowed: {', '.join(KINDS)}")
        if self.kind == "count" and self.crowd**2 < NUM_ANSWERS:
            faults.append(f"crowd={self.crowd} must be 3 or more: up to {NUM_ANSWERS - 1} of its letters are X")
        least = 2 if self.band == "fine" else 1  # a check has two pixels
        if not least <= self.detail <= self.canvas:
            faults.append(
                f"detail={self.detail:g} must be from {least} ({self.band}) to the canvas, {self.canvas} pixels"
            )
        if not 0 <= self.contrast <= MOST_CONTRAST or not 0 <= self.noise <= MOST_NOISE or not 0 <= self.jitter <= 0.8:
            given = f"contrast={self.contrast:g}, noise={self.noise:g}, jitter={self.jitter:g}"
            allowed = f"{MOST_CONTRAST:g} and {MOST_NOISE:g} grey levels, beyond which pixels clip, and 0.8"
            faults.append(f"{given} must be at most {allowed}")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def num_questions(self) -> int:
        return self.rows * self.columns

    @property
    def coarse_grid(self) -> int:
        """The side, in pixels, of the grid on which `fine` is blank and `coarse` is complete."""
        return max(round(self.canvas / self.detail), 1)


def parse_glyphs(base: str, overrides: str) -> tuple[str, GlyphsSpec]:
    """Returns the canonical name and the spec of `fine`, `coarse` or `crowded` with overrides (`detail=6,rows=2`)."""
    if base not in NAMED:
        raise ValueError(f"unknown glyphs {base!r}{did_you_mean(base, NAMED)}; allowed: {', '.join(NAMED)}")
    spec = dataclasses.replace(NAMED[base], **parse_overrides(GlyphsSpec, f"glyphs/{base}", overrides))
    return canonical_name(base, NAMED[base], spec), spec


def canonical_name(base: str, plain: Any, spec: Any) -> str:
    """Returns the name, and after a colon the fields by which the spec differs from the plain one, in their order."""
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    differing = {name: value for name, value in fields.items() if value != getattr(plain, name)}
    words = (
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in differing.items()
    )
    return base + (":" + ",".join(words) if differing else "")


def draw_example(spec: GlyphsSpec, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the picture (canvas, canvas) uint8 and its answers (k,) int64."""
    key = [spec.seed, {"train": 0, "test": 1}[split]]
    rng = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=np.array([0, index, 0, 0])))
    answers = rng.integers(NUM_ANSWERS, size=spec.num_questions)
    ink = draw_ink(spec, answers, rng)
    return finish(spec, ink, rng), answers


def draw_ink(spec: GlyphsSpec, answers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns (canvas, canvas) float64, 0 for paper, 1 for ink and -1 for light ink: a drawing a cell, row by row."""
    pillow = _pillow()
    page = pillow.Image.new("L", (spec.canvas * SUPERSAMPLE,) * 2, BLANK)
    pen, whole = pillow.ImageDraw.Draw(page), np.array([page.width, page.height]) / 2
    for (centre, side), answer in zip(
        _cells(whole, page.width, spec.rows, spec.columns), answers.tolist(), strict=True
    ):
        if spec.kind == "count":
            _draw_crowd(pen, centre, side, answer, rng, spec)
        else:
            kind = ANY[rng.integers(len(ANY))] if spec.kind == "any" else spec.kind
            DRAW[kind](pen, *_place(centre, side, rng, spec), answer, rng)
    return (np.asarray(page.reduce(SUPERSAMPLE), np.float64) - BLANK) / (DARK - BLANK)


def finish(spec: GlyphsSpec, ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns what is left of the ink in the band, on noisy paper, in whole grey levels. No pixel clips."""
    grid, size = spec.coarse_grid, (spec.canvas, spec.canvas)
    if spec.band == "fine":
        check = remove_coarse(_soften(ink, grid) * _check(spec.canvas, spec.detail), grid)
        levels = PAPER + spec.contrast * check + spec.noise * draw_noise(rng, size)
    else:
        coarse = PAPER - spec.contrast * _resize(ink, grid) + spec.noise * draw_noise(rng, (grid, grid))
        levels = _resize(coarse, spec.canvas)
    return np.rint(levels).clip(0, 255).astype(np.uint8)


def _soften(ink: np.ndarray, grid: int) -> np.ndarray:
    return _resize(_resize(ink, grid), len(ink))


def _resize(picture: np.ndarray, side: int) -> np.ndarray:
    return resize(picture[..., None], (side, side))[..., 0]


def remove_coarse(ink: np.ndarray, grid: int) -> np.ndarray:
    """Returns x - P x: all of the (h, w) picture that a bilinear, antialiased resize to (grid, grid) does not see."""
    rows, columns = (_projection(side, grid) for side in ink.shape)
    return ink - rows @ ink @ columns


@functools.lru_cache(maxsize=8)
def _check(side: int, period: float) -> np.ndarray:
    """Returns (side, side) in [-1, 1]. Checks, not stripes: a leak of 4 % of each axis is one of 0.2 % of both."""
    wave = np.sin(2 * np.pi * (np.arange(side) + 0.5) / period)
    return np.outer(wave, wave)


@functools.lru_cache(maxsize=8)
def _projection(side: int, grid: int) -> np.ndarray:
    """Returns the (side, side) orthogonal projection onto the rows of the resize matrix."""
    matrix = resize_matrix(side, grid, method="bilinear")
    return np.linalg.pinv(matrix) @ matrix


def draw_noise(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Cut off at three standard deviations, so that no pixel clips: clipping would show on the coarse grid."""
    return rng.standard_normal(size).clip(-3, 3)


def _cells(centre: np.ndarray, side: float, rows: int, columns: int) -> list[tuple[np.ndarray, float]]:
    """Returns the (x, y) centre and the side of the squares in `rows` x `columns` cells of a square, row by row."""
    steps = np.array([side / columns, side / rows])
    indices = [(column, row) for row in range(rows) for column in range(columns)]
    return [(centre - side / 2 + (np.array(index) + 0.5) * steps, steps.min()) for index in indices]


def _place(centre: np.ndarray, side: float, rng: np.random.Generator, spec: GlyphsSpec) -> tuple[np.ndarray, float]:
    """Returns where a drawing is moved to within its cell, and its side, up to a tenth less than what there is."""
    moved = centre + spec.jitter * side * rng.uniform(-0.5, 0.5, 2)
    return moved, (1 - spec.jitter) * side * rng.uniform(0.9, 1)


def _draw_crowd(
    pen: Any, centre: np.ndarray, side: float, answer: int, rng: np.random.Generator, spec: GlyphsSpec
) -> None:
    """Letters, as many X among them as the answer says; dark or light at random, so that no sum of pixels counts."""
    is_counted = rng.permutation(spec.crowd**2) < answer
    others = rng.choice([i for i, letter in enumerate(LETTERS) if letter != COUNTED], spec.crowd**2)
    letters = np.where(is_counted, LETTERS.index(COUNTED), others).tolist()
    for (middle, size), letter in zip(_cells(centre, side, spec.crowd, spec.crowd), letters, strict=True):
        fill = DARK if rng.integers(2) else LIGHT
        _draw_letter(pen, *_place(middle, size, rng, spec), letter, rng, fill)


def _draw_letter(
    pen: Any, centre: np.ndarray, side: float, answer: int, rng: np.random.Generator, fill: int = DARK
) -> None:
    mask = _mask(LETTERS[answer], round(side))
    pen.bitmap(tuple(np.rint(centre - np.array(mask.size) / 2).astype(int).tolist()), mask, fill=fill)


def _draw_chart(pen: Any, centre: np.ndarray, side: float, answer: int, rng: np.random.Generator) -> None:
    """Bars on a base line; the answer's is the tallest by a sixth of the side at least."""
    heights = rng.uniform(0.2, 0.6, NUM_ANSWERS)
    heights[answer] = heights.max() + rng.uniform(1 / 6, 1 / 4)
    (left, base), step = centre + side * np.array([-0.5, 0.42]), side / NUM_ANSWERS
    for i, height in enumerate(heights):
        x = left + (i + 0.15) * step
        pen.rectangle((x, base - side * height, x + 0.7 * step, base), fill=DARK)
    pen.line((left, base, left + side, base), fill=DARK, width=max(round(side / 30), 1))


def _draw_dial(pen: Any, centre: np.ndarray, side: float, answer: int, rng: np.random.Generator) -> None:
    """A rim and a needle; the angle is the answer's eighth of the circle, give or take a quarter of it."""
    radius, width = 0.48 * side, max(round(side / 16), 1)
    angle = 2 * math.pi * (answer + rng.uniform(-0.25, 0.25)) / NUM_ANSWERS
    pen.ellipse((*(centre - radius), *(centre + radius)), outline=DARK, width=max(round(side / 30), 1))
    tip = centre + 0.8 * radius * np.array([math.sin(angle), -math.cos(angle)])
    pen.line((*centre, *tip), fill=DARK, width=width)
    pen.ellipse((*(centre - width), *(centre + width)), fill=DARK)


DRAW: dict[str, Any] = {"text": _draw_letter, "chart": _draw_chart, "dial": _draw_dial}
ANY = tuple(DRAW)
KINDS = (*DRAW, "any", "count")

# fine: resolution; coarse: neither; crowded: capacity.
NAMED = {
    "fine": GlyphsSpec(),
    "coarse": GlyphsSpec(band="coarse"),
    "crowded": GlyphsSpec(band="coarse", kind="count", canvas=128, detail=4.0, noise=4.0, jitter=0.1, num_train=8192),
}


@functools.lru_cache(maxsize=4096)
def _mask(letter: str, size: int) -> Any:
    """Returns the letter in the middle of a square, in Pillow's own font, Aileron (CC0), which every wheel can render.

    It is kept: to render the letters of a crowd takes 5 ms, to copy them 1.
    """
    pillow = _pillow()
    mask = pillow.Image.new("L", (2 * size, 2 * size))
    font = pillow.ImageFont.load_default(size=float(size))
    pillow.ImageDraw.Draw(mask).text((size, size), letter, fill=255, font=font, anchor="mm")
    return mask


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as error:
        raise ValueError("glyphs are drawn by Pillow: pip install 'vitcmp[data]'") from error
    return PIL
