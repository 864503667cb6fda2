"""The truth built into the drawn pictures: the coarse grid sees nothing of what is fine, and all of what is coarse."""

import dataclasses
import functools

import numpy as np
import pytest

pytest.importorskip("PIL")

from experiments.capacity.data.glyphs import (
    COUNTED,
    DRAW,
    KINDS,
    LETTERS,
    MOST_CONTRAST,
    MOST_NOISE,
    NAMED,
    NUM_ANSWERS,
    GlyphsSpec,
    draw_example,
    draw_ink,
    draw_noise,
    parse_glyphs,
    remove_coarse,
)
from experiments.capacity.data.pipeline import Preprocess
from vitcmp.resample import resize

LOW, DOWN_UP, HIGH = (
    Preprocess(information=information, compute=compute) for information, compute in ((32, 32), (32, 64), (64, 64))
)
NUM_TRAIN, NUM_TEST = 320, 240
CHANCE = 1 / NUM_ANSWERS
# Five standard deviations of the share of NUM_TEST guesses that are right.
CHANCE_BOUND = CHANCE + 5 * np.sqrt(CHANCE * (1 - CHANCE) / NUM_TEST)


@functools.cache
def drawn(spec, split, num):
    pictures, answers = zip(*(draw_example(spec, split, i) for i in range(num)), strict=True)
    return np.stack(pictures), np.stack(answers)


def accuracy(spec, preprocess):
    """Returns how often a linear classifier (ridge) is right that sees pixels and their squares as the arm does."""
    seen = {}
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        pictures, answers = drawn(spec, split, num)
        pixels = np.stack([preprocess(picture[..., None]).ravel() for picture in pictures]).astype(float)
        seen[split] = pixels, answers[:, 0]
    mean = seen["train"][0].mean(axis=0)
    train, test = (np.hstack([x - mean, (x - mean) ** 2]) for x, _ in seen.values())
    centre, spread = train.mean(axis=0), train.std(axis=0) + 1e-9
    train, test = (train - centre) / spread, (test - centre) / spread
    targets = np.eye(NUM_ANSWERS)[seen["train"][1]] - CHANCE
    weights = train.T @ np.linalg.solve(train @ train.T + train.shape[1] / 2 * np.eye(NUM_TRAIN), targets)
    return ((test @ weights).argmax(axis=1) == seen["test"][1]).mean()


@pytest.mark.parametrize("kind", DRAW)
def test_fine_pictures_cannot_be_read_from_low_information_and_can_from_high(kind):
    spec = dataclasses.replace(NAMED["fine"], kind=kind, jitter=0.0)
    assert accuracy(spec, LOW) < CHANCE_BOUND
    assert accuracy(spec, DOWN_UP) < CHANCE_BOUND
    assert accuracy(spec, HIGH) > 0.8


@pytest.mark.parametrize("information", [12, 24, 28])
def test_fine_pictures_cannot_be_read_from_fewer_pixels_either(information):
    spec = dataclasses.replace(NAMED["fine"], jitter=0.0)
    assert accuracy(spec, Preprocess(information=information, compute=information)) < CHANCE_BOUND


@pytest.mark.parametrize(("method", "is_hidden"), [("bicubic", True), ("lanczos3", True), ("nearest", False)])
def test_other_kernels_hide_the_fine_answer_too_unless_they_alias(method, is_hidden):
    spec = dataclasses.replace(NAMED["fine"], jitter=0.0)
    seen = accuracy(spec, Preprocess(information=32, compute=32, method=method))
    assert seen < CHANCE_BOUND if is_hidden else seen > 0.9


@pytest.mark.parametrize("name", ["coarse", "coarse:kind=dial"])
def test_coarse_pictures_are_read_alike_from_low_and_from_high_information(name):
    _, spec = parse_glyphs(*name.partition(":")[::2])
    low, down_up, high = (accuracy(spec, arm) for arm in (LOW, DOWN_UP, HIGH))
    assert min(low, down_up, high) > 0.7
    assert max(low, down_up, high) - min(low, down_up, high) < 0.05


def test_detail_is_the_dial_of_how_many_pixels_an_answer_takes():
    """It is found from about 1.5 times canvas / detail pixels a side on: here from 24 and from 48."""
    for detail, blind, seeing in ((4, 16, 28), (2, 32, 50)):
        spec = GlyphsSpec(detail=detail, jitter=0.0)
        assert accuracy(spec, Preprocess(information=blind, compute=blind)) < CHANCE_BOUND
        assert accuracy(spec, Preprocess(information=seeing, compute=seeing)) > 0.9


@pytest.mark.parametrize(("side", "grid"), [(64, 32), (64, 27), (96, 16), (65, 43)])
def test_what_is_left_of_a_fine_picture_is_nothing_on_the_coarse_grid(side, grid):
    ink = np.random.default_rng(0).random((side, side))
    left = remove_coarse(ink, grid)
    assert np.abs(resize(left[..., None], (grid, grid))).max() < 1e-12
    np.testing.assert_allclose(remove_coarse(left, grid), left, atol=1e-12)
    assert left.std() > 0.5 * ink.std()


def test_rounding_to_grey_levels_hides_in_the_noise():
    """Averaged over many pictures of one drawing, the coarse grid is as even as the noise alone makes it."""
    spec = dataclasses.replace(NAMED["fine"], jitter=0.0)
    pictures, answers = drawn(spec, "train", NUM_TRAIN)
    chosen = pictures[answers[:, 0] == 3]
    mean = resize(chosen[..., None].astype(float), (32, 32)).mean(axis=0)
    # Of the noise a resize by 2 leaves 5/16 in each direction, (1 9 9 1) / 64, squared and summed.
    expected = spec.noise * 20 / 64 / np.sqrt(len(chosen))
    assert 0.8 < mean.std() / expected < 1.2


def test_a_coarse_picture_is_what_its_grid_shows_enlarged():
    picture, _ = draw_example(NAMED["coarse"], "train", 0)
    enlarge = np.linalg.pinv(resize(np.eye(32)[..., None], (64, 32))[..., 0])
    grid = enlarge @ picture @ enlarge.T
    assert np.abs(resize(grid[..., None], (64, 64))[..., 0] - picture).max() < 1.5  # grey levels, by rounding


def test_in_crowded_pictures_low_information_tells_each_letter_and_several_share_a_patch():
    """Each letter of the low arm's picture is the nearest of a bank of single letters, and the X among them count."""
    spec = NAMED["crowded"]
    assert (32 / (64 / spec.crowd)) ** 2 >= 4  # letters in a patch of 32 pixels of the low arm
    bank = dataclasses.replace(spec, kind="text", rows=spec.crowd, columns=spec.crowd, noise=0.0)
    pictures, letters = drawn(bank, "train", 100)
    known = low_cells(pictures, spec.crowd)
    pictures, answers = drawn(spec, "test", 40)
    likeness = np.abs(low_cells(pictures, spec.crowd) @ known.T)  # of dark and of light letters
    read = letters.ravel()[likeness.argmax(axis=1)].reshape(len(pictures), -1)
    assert ((read == LETTERS.index(COUNTED)).sum(axis=1) == answers[:, 0]).mean() > 0.7


def low_cells(pictures, crowd):
    """Returns the letters' cells as the low arm sees them, (n * crowd * crowd, pixels), of mean 0 and length 1."""
    grid = pictures.shape[-1] // 2
    low = np.stack([resize(picture[..., None], (grid, grid))[..., 0] for picture in pictures])
    low = low.clip(0, 255).astype(np.uint8).astype(float)  # cut off, as the arm has it
    side = grid // crowd
    cells = low.reshape(-1, crowd, side, crowd, side).swapaxes(2, 3).reshape(-1, side * side)
    cells -= cells.mean(axis=1, keepdims=True)
    return cells / np.linalg.norm(cells, axis=1, keepdims=True)


def test_no_sum_of_pixels_counts_the_letters():
    """Dark and light letters cancel: pixels alone, in any linear combination, are at chance."""
    seen = {}
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        pictures, answers = drawn(NAMED["crowded"], split, num)
        seen[split] = low_cells(pictures, 1), answers[:, 0]
    (pixels, answers), (test_pixels, test_answers) = seen["train"], seen["test"]
    weights = pixels.T @ np.linalg.solve(pixels @ pixels.T + np.eye(NUM_TRAIN), answers - answers.mean())
    assert np.corrcoef(test_pixels @ weights, test_answers)[0, 1] < 5 / np.sqrt(NUM_TEST)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", KINDS)
def test_no_pixel_clips_however_strong_contrast_and_noise(name, kind):
    spec = dataclasses.replace(NAMED[name], kind=kind, contrast=MOST_CONTRAST, noise=MOST_NOISE)
    ink = draw_example(dataclasses.replace(spec, noise=0.0), "train", 0)[0].astype(int)
    most = 3 * spec.noise  # where the noise is cut off
    assert ink.min() - most > 0 and ink.max() + most < 255
    assert np.abs(draw_noise(np.random.default_rng(0), (300, 300))).max() == 3


def test_the_answers_bar_is_the_tallest():
    spec = GlyphsSpec(kind="chart", jitter=0.0)
    for answer in range(NUM_ANSWERS):
        ink = draw_ink(spec, np.array([answer]), np.random.default_rng(answer))
        columns = (ink[: spec.canvas * 9 // 10] > 0.5).sum(axis=0)
        inked = np.flatnonzero(ink.any(axis=0))
        tallest = np.flatnonzero(columns == columns.max()).mean()
        assert int((tallest - inked[0]) / (inked[-1] + 1 - inked[0]) * NUM_ANSWERS) == answer


def test_the_needle_points_to_the_answers_eighth():
    spec = GlyphsSpec(kind="dial", jitter=0.0)
    for answer in range(NUM_ANSWERS):
        ink = draw_ink(spec, np.array([answer]), np.random.default_rng(answer))
        y, x = np.indices(ink.shape) - 31.5
        ink = ink * (np.hypot(y, x) < 20)  # without the rim
        angle = np.arctan2((ink * x).sum(), -(ink * y).sum())  # clockwise from the top
        assert round(angle / (2 * np.pi) * NUM_ANSWERS) % NUM_ANSWERS == answer


def test_questions_are_the_cells_row_by_row():
    spec = GlyphsSpec(rows=2, columns=3, canvas=96, jitter=0.0)
    one, other = (draw_ink(spec, np.array([0, 1, 2, 3, last, 5]), np.random.default_rng(0)) for last in (4, 6))
    changed = np.argwhere(one != other)
    assert changed.min(axis=0).tolist() >= [48, 32] and changed[:, 0].min() >= 48
    assert changed[:, 1].min() >= 32 and changed[:, 1].max() < 64


def test_an_example_depends_on_spec_split_and_number_alone():
    spec = NAMED["fine"]
    picture, answers = draw_example(spec, "train", 7)
    again = draw_example(spec, "train", 7)
    np.testing.assert_array_equal(picture, again[0])
    np.testing.assert_array_equal(answers, again[1])
    others = [draw_example(*other)[0] for other in (
        (spec, "test", 7), (spec, "train", 8), (dataclasses.replace(spec, seed=1), "train", 7)
    )]  # fmt: skip
    assert all((picture != other).any() for other in others)
    longer = dataclasses.replace(spec, num_train=2 * spec.num_train)
    np.testing.assert_array_equal(draw_example(longer, "train", 7)[0], picture)


def test_answers_are_even():
    spec = GlyphsSpec(rows=3, columns=3, canvas=48)
    counts = np.bincount(drawn(spec, "train", 100)[1].ravel(), minlength=NUM_ANSWERS)
    expected = 100 * spec.num_questions / NUM_ANSWERS
    assert abs(counts - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize(
    ("base", "overrides", "name"),
    [
        ("fine", "", "fine"),
        ("fine", "detail=2", "fine"),
        ("fine", "noise=0,detail=3.0,canvas=96", "fine:canvas=96,detail=3,noise=0"),
        ("coarse", "kind=dial", "coarse:kind=dial"),
    ],
)
def test_a_spec_has_one_name(base, overrides, name):
    assert parse_glyphs(base, overrides)[0] == name
    assert parse_glyphs(*name.partition(":")[::2]) == parse_glyphs(base, overrides)


@pytest.mark.parametrize(
    ("base", "overrides", "message"),
    [
        ("fien", "", "unknown glyphs 'fien'; did you mean 'fine'"),
        ("fine", "detial=3", "unknown field 'detial=3'; did you mean 'detail'"),
        ("fine", "kind=texts", "kind='texts'; did you mean 'text'"),
        ("crowded", "crowd=2", "crowd=2 must be 3 or more"),
        ("fine", "band=finer", "band='finer' must be fine or coarse"),
        ("fine", "detail=1.5", "detail=1.5 must be from 2 .fine. to the canvas"),
        ("coarse", "detail=100", "detail=100 must be from 1 .coarse. to the canvas, 64 pixels"),
        ("fine", "noise=50", "noise=50.* must be at most"),
        ("fine", "rows=0,canvas=0", "canvas=0 must be 1 or more; rows=0 must be 1 or more"),
    ],
)
def test_a_bad_spec_is_a_clear_error(base, overrides, message):
    with pytest.raises(ValueError, match=message):
        parse_glyphs(base, overrides)
