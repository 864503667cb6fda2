"""Pictures of every kind as (h, w, 3) uint8, and a folder of them as a dataset."""

import io
import os

import numpy as np
import pytest

PIL = pytest.importorskip("PIL")
from PIL import Image

from experiments.capacity.data.folder import open_folder
from experiments.capacity.data.images import ImageError, decode_image, encode_png, find_fault, image_size
from experiments.capacity.data.recipes import RECIPES, help_text, resolution_notes, splits_of
from experiments.capacity.data.sources import open_dataset

COLOURS = np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8)
GREY = COLOURS[..., 0]


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# One picture, many files


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_colours_are_kept(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(
        decode_image(encoded(Image.fromarray(COLOURS), kind, **options), rotate=True), COLOURS
    )


def test_grey_is_repeated_over_the_channels():
    expected = np.repeat(GREY[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(encode_png(GREY), rotate=True), expected)
    bilevel = Image.fromarray(GREY > 127)
    assert bilevel.mode == "1"
    np.testing.assert_array_equal(decode_image(encoded(bilevel), rotate=True), np.where(expected > 127, 255, 0))


def test_a_palette_becomes_its_colours():
    picture = Image.fromarray(COLOURS).quantize(8)
    ours = decode_image(encoded(picture), rotate=True)
    np.testing.assert_array_equal(ours, np.asarray(picture.convert("RGB")))
    assert ours.shape == (6, 9, 3)


@pytest.mark.parametrize("alpha", [0, 255, 128])
def test_transparency_is_laid_over_white(alpha):
    rgba = np.dstack([COLOURS, np.full(GREY.shape, alpha, np.uint8)])
    ours = decode_image(encoded(Image.fromarray(rgba)), rotate=True)
    expected = COLOURS * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(ours - expected).max() <= 1  # Pillow rounds


def test_a_transparent_palette_entry_is_white():
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    ours = decode_image(encoded(picture, transparency=0), rotate=True)
    assert ours[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_cmyk_becomes_rgb():
    ours = decode_image(encoded(Image.new("CMYK", (4, 3), (0, 255, 255, 0)), "JPEG", quality=100), rotate=True)
    assert ours.shape == (3, 4, 3)
    assert np.abs(ours - np.array([255, 0, 0])).max() < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(kind):
    deep = GREY.astype(np.uint16) * 256 + 200
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(deep), kind), rotate=True)[..., 1], GREY)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_where_asked_for_and_known_from_the_header(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = encoded(Image.fromarray(COLOURS), "PNG", exif=exif)
    expected = {1: COLOURS, 2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1],
                5: COLOURS.swapaxes(0, 1), 6: COLOURS[::-1].swapaxes(0, 1),
                7: COLOURS[::-1, ::-1].swapaxes(0, 1), 8: COLOURS[:, ::-1].swapaxes(0, 1)}[orientation]  # fmt: skip
    np.testing.assert_array_equal(decode_image(source, rotate=True), expected)
    np.testing.assert_array_equal(decode_image(source, rotate=False), COLOURS)
    assert image_size(source, rotate=True) == expected.shape[:2]
    assert image_size(source, rotate=False) == (6, 9)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.fromarray(np.full((4, 4), level, np.uint8)) for level in (10, 200)]
    source = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(source, rotate=True) == 10).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"no picture", "no picture that Pillow knows"),
        (b"", "no picture that Pillow knows"),
        (encode_png(COLOURS)[:60], "."),
        (encoded(Image.fromarray(COLOURS.repeat(40, 0)), "JPEG")[:-200], "truncated"),
        (encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((2, 2), 1 << 20, np.int32)), "TIFF"), "32-bit"),
    ],
)
def test_what_cannot_be_decoded_is_an_image_error_and_a_fault(source, message, tmp_path):
    with pytest.raises(ImageError, match=message):
        decode_image(source, rotate=True)
    path = tmp_path / "file.png"
    path.write_bytes(source)
    assert find_fault(path)


# Folders


def make_folder(root, classes=("cat", "dog"), num=10, **sizes):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(num):
            picture = np.full(sizes.get("size", (6, 9)), 20 * i + label, np.uint8)
            (root / name / f"{i:02}.png").write_bytes(encode_png(picture))


def open_it(root, split, tmp_path):
    return open_folder(root, split, data_dir=tmp_path / "data")


def test_one_subfolder_a_class_is_split_four_to_one(tmp_path):
    make_folder(tmp_path / "pets")
    train, test = (open_it(tmp_path / "pets", split, tmp_path) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)
    assert train.class_names == test.class_names == ("cat", "dog") and train.num_classes == 2
    assert test.files == ("cat/04.png", "cat/09.png", "dog/04.png", "dog/09.png")
    assert not set(train.files) & set(test.files)
    example = test[2]
    assert example.id == "dog/04.png" and example.label.tolist() == [1] and example.label.dtype == np.int64
    assert (example.image == 81).all() and example.image.shape == (6, 9, 3)
    assert train.image_sizes(3) == [(6, 9)] * 3


@pytest.mark.parametrize("name", ["test", "val"])
def test_train_and_test_folders_are_the_splits(tmp_path, name):
    make_folder(tmp_path / "pets" / "train", num=3)
    make_folder(tmp_path / "pets" / name, num=2)
    assert len(open_it(tmp_path / "pets", "train", tmp_path)) == 6
    assert open_it(tmp_path / "pets", name, tmp_path).files[0] == f"{name}/cat/00.png"


def test_broken_pictures_are_named_counted_and_left_out_without_moving_the_others(tmp_path):
    root = tmp_path / "pets"
    make_folder(root)
    whole = open_it(root, "train", tmp_path).files
    (root / "cat/00.png").write_bytes((root / "cat/00.png").read_bytes()[:40])
    (root / "dog/02.png").write_bytes(b"")
    train = open_it(root, "train", tmp_path)
    assert train.files == tuple(file for file in whole if file not in ("cat/00.png", "dog/02.png"))
    (note,) = train.notes
    assert note.startswith("2 broken pictures left out: cat/00.png: ") and "dog/02.png: no picture" in note
    assert open_it(root, "test", tmp_path).notes == ()


def test_what_was_read_once_is_not_read_again_until_it_changes(tmp_path, monkeypatch):
    from experiments.capacity.data import folder

    reads = []
    monkeypatch.setattr(folder, "find_fault", lambda path: reads.append(path.name))
    make_folder(tmp_path / "pets")
    for _ in range(2):
        open_it(tmp_path / "pets", "train", tmp_path)
    assert len(reads) == 16
    os.utime(tmp_path / "pets/cat/00.png", (1, 1))
    open_it(tmp_path / "pets", "train", tmp_path)
    assert reads[16:] == ["00.png"]


def test_a_picture_that_breaks_later_is_named(tmp_path):
    make_folder(tmp_path / "pets")
    train = open_it(tmp_path / "pets", "train", tmp_path)
    (tmp_path / "pets/cat/00.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"pets/cat/00\.png: no picture"):
        train[0]


def test_hidden_files_and_other_files_are_passed_over(tmp_path):
    make_folder(tmp_path / "pets")
    (tmp_path / "pets/cat/notes.txt").write_text("no picture")
    (tmp_path / "pets/cat/._00.png").write_bytes(b"")
    (tmp_path / "pets/.cache").mkdir()
    assert len(open_it(tmp_path / "pets", "train", tmp_path)) == 16


def fill(root, kind):
    if kind == "empty":
        root.mkdir()
    elif kind == "flat":
        make_folder(root.parent, classes=(root.name,))
    elif kind == "one class":
        make_folder(root, classes=("cat",))
    elif kind == "few":
        make_folder(root, num=4)
    elif kind == "empty class":
        make_folder(root)
        (root / "emu").mkdir()
    elif kind == "other classes":
        make_folder(root / "train")
        make_folder(root / "test", classes=("cat", "emu"))
    elif kind == "all broken":
        make_folder(root)
        for path in (root / "dog").iterdir():
            path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no folder"),
        ("empty", "has no pictures; expected one subfolder a class, with files of .bmp"),
        ("flat", "has no pictures"),
        ("one class", "has one class, 'cat'; two or more are needed"),
        ("few", "too few pictures for train and test in class 'cat', 'dog' .each is split 4 to 1, and needs 5."),
        ("empty class", "too few pictures for train and test in class 'emu'"),
        ("other classes", "train and test must have the same classes; not all have 'dog', 'emu'"),
        (
            "all broken",
            "8 broken pictures left out: dog/00.png: .*; and 3 more; that leaves no picture of train in 'dog'",
        ),
    ],
)
def test_a_bad_folder_is_a_clear_error(tmp_path, kind, message):
    fill(tmp_path / "pets", kind)
    with pytest.raises(ValueError, match=message):
        open_it(tmp_path / "pets", "train", tmp_path)


def test_an_unknown_split_lists_those_that_there_are(tmp_path):
    make_folder(tmp_path / "pets")
    with pytest.raises(ValueError, match=r"no split 'tset'; did you mean 'test'\?; it has train .16 files., test .4"):
        open_dataset(f"folder:{tmp_path / 'pets'}", "tset", data_dir=tmp_path / "data")


# What is said of how large pictures are


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((20, 30), "sides of 20 and 30 pixels: low=32 has all of its information, so a gain of high=64 is capacity"),
        ((20, 50), "high=64 enlarges it, and informs no more than 50 would"),
        ((40, 90), "high=64 enlarges its short side"),
        ((64, 64), None),
    ],
)
def test_pictures_too_small_for_high_are_warned_of(tmp_path, size, message):
    make_folder(tmp_path / "pets", size=size)
    notes = resolution_notes(open_it(tmp_path / "pets", "train", tmp_path), low=32, high=64)
    assert len(notes) == (message is not None)
    assert message is None or message in notes[0]


def test_recipes_tell_splits_and_controls():
    assert splits_of("dtd") == ("train+validation", "test")
    assert splits_of("glyphs/fine") == ("train", "test")
    assert {name for name, recipe in RECIPES.items() if recipe.is_control} == {"cifar10", "eurosat", "svhn_cropped"}
    assert all(name in help_text() for name in RECIPES)
