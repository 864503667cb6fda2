"""The shipped photograph is the one that its README names, and reaches the models unrounded."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

import vitcmp
from vitcmp.photo import load_photo
from vitcmp.resample import resize

DATA = Path(vitcmp.__file__).parent / "data"


def pixels():
    with np.load(DATA / "photo.npz", allow_pickle=False) as file:
        assert file.files == ["image"]
        return file["image"]


def test_the_photograph_is_the_one_in_the_readme():
    readme = (DATA / "README.md").read_text()
    in_c_order = hashlib.sha256(pixels().tobytes()).hexdigest()
    archive = hashlib.sha256((DATA / "photo.npz").read_bytes()).hexdigest()
    assert {in_c_order, archive} <= set(re.findall(r"`([0-9a-f]{64})`", readme))
    assert "CC0" in readme
    assert "Stefan van der Walt" in readme


def test_the_original_size_is_the_pixels_in_minus_one_to_one():
    photo = load_photo()
    assert (photo.shape, photo.dtype) == ((1, 300, 451, 3), np.float32)
    np.testing.assert_array_equal(np.rint((photo[0] + 1) * 127.5).astype(np.uint8), pixels())
    assert np.ptp(photo) > 1.5
    assert photo.std(axis=(1, 2)).min() > 0.2  # a real picture in every channel


@pytest.mark.parametrize(
    ("size", "shape"), [(224, (224, 224)), ("80x176", (80, 176)), ((40, 33), (40, 33)), (1, (1, 1))]
)
def test_any_size_is_resampled_in_float_and_not_rounded(size, shape):
    photo = load_photo(size)
    assert (photo.shape, photo.dtype) == ((1, *shape, 3), np.float32)
    assert np.abs(photo).max() <= 1
    np.testing.assert_allclose(photo, resize(pixels()[None] / 127.5 - 1, shape), rtol=0, atol=2**-25 + 1e-12)
    levels = (photo.astype(np.float64) + 1) * 127.5
    assert np.abs(levels - np.rint(levels)).max() > 0.01


def test_a_photograph_is_the_callers_own():
    load_photo()[:] = 7
    assert load_photo().max() <= 1


def test_a_bad_size_is_named():
    with pytest.raises(ValueError, match="image_size='0x5' must be a side"):
        load_photo("0x5")
