"""Handwritten digits on a canvas: where they come from, where they stand, and that test digits are never trained on."""

import gzip
import struct

import numpy as np
import pytest

from experiments.capacity.data.digit_canvas import (
    DigitCanvasSpec,
    draw_canvas,
    in_canonical_order,
    load_idx,
    load_sklearn,
    parse_digit_canvas,
    resize_digits,
)


def fake_digits(num=30, side=28):
    """Digit i is a square of grey level i + 1, of class i % 10."""
    images = np.broadcast_to(np.arange(1, num + 1, dtype=np.uint8)[:, None, None], (num, side, side))
    return images.copy(), np.arange(num) % 10


def write_idx(folder, digits, *, dash="-", suffix=""):
    folder.mkdir(exist_ok=True)
    for stem, (images, labels) in zip(("train", "t10k"), digits, strict=True):
        for name, array in (("images", images), ("labels", labels.astype(np.uint8))):
            content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
            path = folder / f"{stem}-{name}{dash}idx{array.ndim}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)


def test_answers_are_the_digits_row_by_row_each_within_its_cell():
    spec = DigitCanvasSpec(digits="mnist", rows=2, columns=3, canvas=96, digit_size=20)
    images, labels = resize_digits(fake_digits(), 20)
    for i in range(20):
        page, answers = draw_canvas(spec, (images, labels), "train", i)
        for question, answer in enumerate(answers):
            row, column = divmod(question, 3)
            cell = page[48 * row : 48 * (row + 1), 32 * column : 32 * (column + 1)]
            levels = np.unique(cell[cell > 0])
            assert len(levels) == 1 and (levels[0] - 1) % 10 == answer
            assert (cell > 0).sum() == 400


def test_digits_are_moved_over_the_whole_cell():
    spec = DigitCanvasSpec(digits="mnist", digit_size=28)
    corners = [np.argwhere(draw_canvas(spec, fake_digits(), "train", i)[0][:32, :32]).min(axis=0) for i in range(100)]
    assert {tuple(corner) for corner in corners} == {(i, j) for i in range(5) for j in range(5)}


def test_an_example_depends_on_digits_spec_split_and_number_alone():
    spec = DigitCanvasSpec(digits="mnist")
    page, answers = draw_canvas(spec, fake_digits(), "train", 5)
    again = draw_canvas(spec, fake_digits(), "train", 5)
    np.testing.assert_array_equal(page, again[0])
    np.testing.assert_array_equal(answers, again[1])
    assert (draw_canvas(spec, fake_digits(), "train", 6)[0] != page).any()
    assert (draw_canvas(spec, fake_digits(), "test", 5)[0] != page).any()


@pytest.mark.slow  # to import scikit-learn takes seconds
def test_scikit_learns_digits_of_train_and_test_are_different_ones():
    pytest.importorskip("sklearn")
    digits = load_sklearn()
    assert {split: len(labels) for split, (_, labels) in digits.items()} == {"train": 1438, "test": 359}
    train, test = ({image.tobytes() for image in images} for images, _ in digits.values())
    assert not train & test
    assert all(images.max() == 255 and images.dtype == np.uint8 for images, _ in digits.values())
    assert all((np.bincount(labels, minlength=10) > len(labels) / 20).all() for _, labels in digits.values())


@pytest.mark.parametrize(("dash", "suffix"), [("-", ""), (".", ""), ("-", ".gz")])
def test_idx_files_are_read_packed_or_not(tmp_path, dash, suffix):
    write_idx(tmp_path / "mnist", (fake_digits(30), fake_digits(20)), dash=dash, suffix=suffix)
    digits = load_idx(tmp_path / "mnist")
    for split, num in (("train", 30), ("test", 20)):
        np.testing.assert_array_equal(digits[split][0], fake_digits(num)[0])
        np.testing.assert_array_equal(digits[split][1], fake_digits(num)[1])


def test_the_order_of_the_source_does_not_matter():
    images, labels = fake_digits()
    shuffled = np.random.default_rng(0).permutation(len(labels))
    for ours, theirs in zip(
        in_canonical_order((images, labels)), in_canonical_order((images[shuffled], labels[shuffled])), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", None, "has none of train-images-idx3-ubyte, train-images-idx3-ubyte.gz"),
        ("train-images-idx3-ubyte", b"\0\0\x08", "is no whole idx file"),
        ("t10k-labels-idx1-ubyte", struct.pack(">HBBI", 0, 8, 1, 7) + b"123", "shape .7,.; it has 3 bytes"),
        ("t10k-labels-idx1-ubyte", struct.pack(">HBBI", 0, 13, 1, 3) + b"123", "type 13"),
        ("t10k-images-idx3-ubyte", struct.pack(">HBBI", 0, 8, 1, 3) + b"123", "with 3 axes"),
    ],
)
def test_bad_idx_files_are_named(tmp_path, name, content, message):
    write_idx(tmp_path / "mnist", (fake_digits(), fake_digits()))
    (tmp_path / "mnist" / name).unlink()
    if content is not None:
        (tmp_path / "mnist" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_idx(tmp_path / "mnist")


@pytest.mark.parametrize(
    ("digits", "overrides", "message"),
    [
        ("minst", "", "unknown digits 'minst'; did you mean 'mnist'"),
        ("mnist", "digit_size=40", "digit_size=40 must be at most a cell of the canvas, 32 pixels"),
        ("mnist", "rows=0", "rows=0 must be 1 or more"),
        ("mnist", "digits=sklearn", "digits= and the name differ"),
        ("mnist", "colums=3", "unknown field 'colums=3'; did you mean 'columns'"),
    ],
)
def test_a_bad_spec_is_a_clear_error(digits, overrides, message):
    with pytest.raises(ValueError, match=message):
        parse_digit_canvas(digits, overrides)


def test_a_spec_has_one_name():
    assert parse_digit_canvas("mnist", "rows=1,canvas=64")[0] == "mnist:rows=1"
